"""Precision, recall, density and coverage on points of a line, worked out by hand."""

import math

import pytest
import torch

from common.errors import UserError
from evaluation.metrics import distances
from evaluation.metrics.manifolds import precision_recall_density_coverage


def on_a_line(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def values_of(real: torch.Tensor, generated: torch.Tensor, k: int) -> dict[str, list[float]]:
    metrics = precision_recall_density_coverage(real, generated, k)
    assert all(metric.dtype == torch.float64 for metric in metrics.values())
    return {name: metric.tolist() for name, metric in metrics.items()}


def test_by_hand_with_one_neighbour():
    """Real balls: 0 ± 1, 1 ± 1, 3 ± 2, 13 ± 10. Generated ones: 2.5 ± 2, 4.5 ± 2, 24 ± 19.5."""
    assert values_of(on_a_line(0, 1, 3, 13), on_a_line(2.5, 4.5, 24), k=1) == {
        "precision": [1.0, 1.0, 0.0],
        "recall": [0.0, 1.0, 1.0, 1.0],
        "density": [1.0, 2.0, 0.0],  # 2.5 is in 3 ± 2; 4.5 in 3 ± 2 and 13 ± 10
        "coverage": [0.0, 0.0, 1.0, 1.0],
    }


def test_by_hand_with_two_neighbours():
    """Real balls: 0 ± 3, 1 ± 2, 3 ± 3, 13 ± 12. Generated ones: 2.5 ± 21.5, 4.5 ± 19.5, 24 ± 21.5."""
    assert values_of(on_a_line(0, 1, 3, 13), on_a_line(2.5, 4.5, 24), k=2) == {
        "precision": [1.0, 1.0, 1.0],
        "recall": [1.0, 1.0, 1.0, 1.0],
        "density": [2.0, 1.0, 0.5],
        "coverage": [1.0, 1.0, 1.0, 1.0],
    }


def test_the_border_of_a_ball_is_inside():
    """Real balls: 0 ± 1, 1 ± 1, 5 ± 4. Generated ones: 2 ± 1, 3 ± 1, 9 ± 6."""
    metrics = values_of(on_a_line(0, 1, 5), on_a_line(2, 3, 9), k=1)
    assert metrics["precision"] == [1.0, 1.0, 1.0]
    assert metrics["density"] == [2.0, 1.0, 1.0]
    assert metrics["recall"] == [0.0, 1.0, 1.0]
    assert metrics["coverage"] == [0.0, 1.0, 1.0]


def test_copies_of_the_real_volumes_are_perfect_in_any_order(monkeypatch):
    """Every k-th neighbour lies on a border here, up to rounding of 2048 products."""
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    real = torch.randn(40, 2048, generator=torch.Generator().manual_seed(0))
    metrics = precision_recall_density_coverage(real, real.flip(0), k=3)
    for name in ("precision", "recall", "coverage"):
        assert (metrics[name] == 1).all()
    # A ball holds its centre and 3 neighbours.
    assert metrics["density"].mean().item() == pytest.approx(4 / 3, abs=1e-12)


def test_parts_make_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(30, 3, generator=generator), torch.randn(24, 3, generator=generator) + 0.7
    whole = precision_recall_density_coverage(real, generated, k=2)
    assert all(len(metric.unique()) > 1 for metric in whole.values())
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    parts = precision_recall_density_coverage(real, generated, k=2)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_balls_of_no_size_hold_their_copies():
    metrics = precision_recall_density_coverage(torch.ones(4, 2), torch.ones(5, 2), k=2)
    assert {name: metric.mean().item() for name, metric in metrics.items()} == {
        "precision": 1.0,
        "recall": 1.0,
        "density": 2.0,
        "coverage": 1.0,
    }


def test_sets_far_apart_share_nothing():
    real, generated = torch.randn(8, 3), torch.randn(9, 3) + 1e3
    assert all(not metric.any() for metric in precision_recall_density_coverage(real, generated).values())


@pytest.mark.parametrize(
    ("counts", "k", "message"),
    [
        ((5, 9), 5, "at least 6 feature vectors here, got 5 and 9"),
        ((9, 3), 3, "at least 4 feature vectors here, got 9 and 3"),
        ((9, 9), 0, "at least 1 neighbour, got k = 0"),
    ],
)
def test_refuses(counts, k, message):
    with pytest.raises(UserError, match=message):
        precision_recall_density_coverage(*(torch.randn(count, 2) for count in counts), k)


def test_refuses_nan():
    with pytest.raises(UserError, match="NaN or infinite"):
        precision_recall_density_coverage(torch.randn(9, 2), torch.full((9, 2), math.nan))

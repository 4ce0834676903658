"""Metrics and pictures against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from AutoEncoder.model.codebook import codebook_usage, perplexity
from common.errors import UserError
from dataset.volumes.pictures import Coloured, central_slices, save_comparison, save_slice_grid
from evaluation.metrics.reconstruction import l1, psnr

# PSNR ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "data_range", "expected"),
    [(0.2, 2.0, 20.0), (0.02, 2.0, 40.0), (0.1, 1.0, 20.0), (2.0, 2.0, 0.0)],
)
def test_psnr_of_a_constant_error(error, data_range, expected):
    x = torch.linspace(-1, 1, 4 * 4 * 4, dtype=torch.float64).reshape(1, 4, 4, 4)
    assert psnr(x, x + error, data_range) == pytest.approx(expected, abs=1e-9)


def test_psnr_default_range_is_that_of_the_model():
    assert psnr(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5)) == pytest.approx(10 * math.log10(16))


def test_psnr_averages_the_error_before_the_logarithm():
    x, y = torch.zeros(2, 1), torch.tensor([[0.1], [0.3]])
    assert psnr(x, y) == pytest.approx(10 * math.log10(4 / 0.05), abs=1e-5)


def test_psnr_is_computed_in_float64():
    x, y = torch.zeros(8, dtype=torch.bfloat16), torch.full((8,), 0.3, dtype=torch.bfloat16)
    assert psnr(x, y) == pytest.approx(10 * math.log10(4 / y[0].item() ** 2), abs=1e-9)


def test_psnr_of_identical_tensors_is_infinite():
    assert psnr(torch.ones(3), torch.ones(3)) == math.inf


@pytest.mark.parametrize(
    ("x", "y", "data_range", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), 2.0, r"one shape, got \(2, 3\) and \(3, 2\)"),
        (torch.zeros(0), torch.zeros(0), 2.0, "empty"),
        (torch.zeros(2), torch.ones(2), 0.0, "positive data range"),
        (torch.tensor([0.0, math.nan]), torch.ones(2), 2.0, "NaN or infinite"),
    ],
)
def test_psnr_refuses(x, y, data_range, message):
    with pytest.raises(UserError, match=message):
        psnr(x, y, data_range)


# L1 -----------------------------------------------------------------------------------------------------------------


def test_l1_by_hand():
    assert l1(torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([0.5, -1.0, -1.0, 0.25])) == 2.75 / 4


def test_psnr_and_l1_of_more_elements_than_are_converted_at_once():
    """One in four elements is off by 1, in whichever part it is."""
    x = torch.zeros(2**20 + 2**18, dtype=torch.int8)
    y = x.clone()
    y[-len(x) // 4 :] = 1
    assert l1(x, y) == 0.25
    assert psnr(x, y) == pytest.approx(10 * math.log10(16), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), r"L1 compares tensors of one shape, got \(2, 3\) and \(3, 2\)"),
        (torch.zeros(0), torch.zeros(0), "L1 of an empty tensor"),
        (torch.tensor([0.0, math.inf]), torch.ones(2), "L1 is not defined for tensors with NaN or infinite"),
    ],
)
def test_l1_refuses(x, y, message):
    with pytest.raises(UserError, match=message):
        l1(x, y)


# Codes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "usage", "expected"),
    [
        ([3, 3, 3, 3], 1.0, 4.0),
        ([0, 7, 0, 0], 0.25, 1.0),
        ([2, 1, 1, 0], 0.75, 2**1.5),  # entropy (1/2)·ln 2 + (1/2)·ln 4
    ],
)
def test_codebook_usage_and_perplexity_by_hand(counts, usage, expected):
    assert codebook_usage(torch.tensor(counts)) == usage
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [codebook_usage, perplexity])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.ones(2, 3), r"counts \(n_codes,\) of codes that occurred, got shape \(2, 3\)"),
        (torch.zeros(0), r"got shape \(0,\)"),
        (torch.tensor([-1, 2]), "got -1 to 2"),
        (torch.zeros(3), "got 0 to 0"),
        (torch.tensor([math.inf, 1.0]), "got 1 to inf"),
    ],
)
def test_codes_refuse(metric, counts, message):
    with pytest.raises(ValueError, match=message):
        metric(counts)


# Pictures -----------------------------------------------------------------------------------------------------------


def test_central_slices_planes_and_orientation():
    """A voxel at (z, x, y) appears in the plane that cuts it, with z and y upwards."""
    depth, height, width = 4, 6, 8
    volume = torch.arange(depth * height * width, dtype=torch.float32).reshape(1, depth, height, width)
    slices = central_slices(volume)
    assert {name: array.shape for name, array in slices.items()} == {
        "axial": (width, height),
        "coronal": (depth, height),
        "sagittal": (depth, width),
    }
    z, x, y = 1, 2, 3
    assert slices["axial"][width - 1 - y, x] == volume[0, depth // 2, x, y]
    assert slices["coronal"][depth - 1 - z, x] == volume[0, z, x, width // 2]
    assert slices["sagittal"][depth - 1 - z, y] == volume[0, z, height // 2, y]


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 4), (1, 1, 4, 4, 4), (0, 4, 4)])
def test_central_slices_refuse_other_shapes(shape):
    with pytest.raises(UserError, match=r"a picture needs a volume \(D, H, W\)"):
        central_slices(torch.zeros(shape))


def test_comparison_picture_shows_rows_and_columns(tmp_path):
    path = tmp_path / "new" / "grid.png"
    black, white = -torch.ones(1, 8, 8, 8), torch.ones(8, 8, 8)
    drawn = save_comparison(path, [("dark", [black, black]), ("light", [white])], planes=("axial", "sagittal"))
    written = (imread(path)[..., :3] * 255).round().astype(np.uint8)
    assert np.array_equal(written, drawn)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    is_black = (drawn == 0).all(-1)
    upper, lower = np.array_split(is_black, 2)
    assert upper.mean() > 4 * lower.mean()  # four black cells above; below only letters are black
    assert is_black[:, : drawn.shape[1] // 10].mean() < 0.1  # the label's column is paper


def test_labels_above_leave_no_column_of_their_own(tmp_path):
    black = -np.ones((8, 8))
    long = "a_name_of_a_file_that_is_too_long_for_one_line_of_so_narrow_a_picture.nii.gz"
    drawn = save_slice_grid(tmp_path / "grid.png", [(long, [black] * 3)] * 2, labels_above=True)
    beside = save_slice_grid(tmp_path / "beside.png", [(long, [black] * 3)] * 2)
    short = save_slice_grid(tmp_path / "short.png", [("a", [black] * 3)] * 2)
    is_black = (drawn == 0).all(-1)
    assert is_black.any(0)[: drawn.shape[1] // 10].all()
    assert drawn.shape[1] == pytest.approx(3 * 1.6 * 110, abs=2)
    assert drawn.shape[0] > short.shape[0]
    assert beside.shape[1] - short.shape[1] < 2.3 * 110  # wrapped, and no wider than that


def test_differences_have_colours_and_a_scale(tmp_path):
    """Grey up to the column where differences begin; below these alone a bar with all the colours of the scale."""
    ramp = np.linspace(0, 0.5, 64).reshape(8, 8)
    scale = Coloured(1, (0.0, 0.5), "difference")
    drawn = save_slice_grid(tmp_path / "grid.png", [("a", [ramp, ramp])], coloured=scale).astype(int)
    plain = save_slice_grid(tmp_path / "plain.png", [("a", [ramp, ramp])]).astype(int)
    is_coloured = drawn.max(-1) - drawn.min(-1) > 30
    assert not (plain.max(-1) - plain.min(-1) > 30).any()
    middle = drawn.shape[1] - round(1.6 * 110)
    assert not is_coloured[:, :middle].any()
    assert is_coloured[: plain.shape[0], middle:].mean() > 0.3
    bar = is_coloured[plain.shape[0] :, middle:]
    assert bar.any(0).mean() > 0.8
    assert drawn.shape[0] > plain.shape[0]


@pytest.mark.parametrize(
    ("rows", "planes", "message"),
    [
        ([], ("axial",), "no slices to draw"),
        ([("real", [])], ("axial",), "no slices to draw"),
        ([("real", [torch.zeros(4, 4, 4)])], ("oblique",), "axial, coronal, sagittal, got oblique"),
    ],
)
def test_comparison_refuses(tmp_path, rows, planes, message):
    with pytest.raises(UserError, match=message):
        save_comparison(tmp_path / "grid.png", rows, planes=planes)


def test_a_failed_picture_leaves_nothing(tmp_path):
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(UserError, match="the picture cannot be written"):
        save_slice_grid(tmp_path / "grid.png", [("real", [np.zeros((4, 4))])])
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]

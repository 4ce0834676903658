"""The averaged weights of BiFlowNet training."""

import copy

import pytest
import torch
from torch import nn

from train.diffusion.ema import EMA


class Counter(nn.Module):
    """One parameter and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("count", torch.tensor(0))


def set_values(model: Counter, weight: float, count: int) -> None:
    with torch.no_grad():
        model.weight.fill_(weight)
        model.count.fill_(count)


def test_average_by_hand():
    model = Counter()
    ema = EMA(model, decay=0.9, every=1, start=0)
    set_values(model, 2.0, 1)
    ema.update(1)
    assert ema.model.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2, rel=1e-6)
    ema.update(2)
    assert ema.model.weight.item() == pytest.approx(0.9 * 1.1 + 0.1 * 2, rel=1e-6)
    assert ema.model.count.item() == 1  # buffers are copied, never averaged


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 5.0),  # before the start: a plain copy, at every step
        (7, 5.0),
        (19, 5.0),
        (20, 0.5 * 1 + 0.5 * 5),  # from the start on: an average at every tenth step
        (21, 1.0),
        (29, 1.0),
        (30, 3.0),
    ],
)
def test_plain_copy_before_the_start_and_an_average_at_every_tenth_step_after(step, expected):
    model = Counter()
    ema = EMA(model, decay=0.5, every=10, start=20)
    set_values(model, 5.0, 0)
    ema.update(step)
    assert ema.model.weight.item() == expected


def test_published_defaults():
    ema = EMA(Counter())
    assert (ema.decay, ema.every, ema.start) == (0.995, 10, 2000)


def test_average_is_frozen_and_apart_from_the_model():
    model = Counter().train()
    ema = EMA(model, start=0, every=1)
    set_values(model, 9.0, 9)
    assert ema.model.weight.item() == 1.0
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training
    assert model.weight.requires_grad


@pytest.mark.parametrize("change", [lambda ema: ema, copy.deepcopy])
def test_averages_go_on_after_models_were_converted_loaded_or_copied(change):
    ema = EMA(Counter(), decay=0.5, every=1, start=0)
    ema.model.to(torch.float64).to(torch.float32)
    ema.model.load_state_dict({"weight": torch.tensor([3.0]), "count": torch.tensor(4)})
    ema = change(ema)
    set_values(ema.source, 5.0, 2)
    ema.update(1)
    assert ema.model.weight.item() == 4.0
    assert ema.model.count.item() == 2


def test_state_has_the_models_names_and_comes_back():
    model = Counter()
    ema = EMA(model, decay=0.5, every=1, start=0)
    set_values(model, 3.0, 2)
    ema.update(1)
    assert ema.state_dict().keys() == model.state_dict().keys()
    other = EMA(Counter())
    other.model.load_state_dict(ema.state_dict())
    assert other.model.weight.item() == 2.0


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}])
def test_impossible_arguments(arguments):
    with pytest.raises(ValueError, match="EMA needs"):
        EMA(Counter(), **arguments)

"""Attributes as conditions: nothing at first, then what they are; unknown ones, guidance, checkpoints without them."""

import math

import pytest
import torch

from ddpm.attributes import AttributeSpec
from ddpm.BiFlowNet import BiFlowNet
from ddpm.denoiser import conditioned

SPECS = (AttributeSpec("age", range=(20, 80)), AttributeSpec("sex", categories=("F", "M")))
SMALL = dict(
    dim=12, dim_mults=(1, 2), use_sparse_linear_attn=(0, 0), resnet_groups=4, DiT_num_heads=2, attn_heads=1, channels=2,
    patch_size=2, cond_classes=2,
)  # fmt: skip


def build(**options) -> BiFlowNet:
    torch.manual_seed(0)
    return BiFlowNet(**SMALL, **options).eval()


@pytest.fixture(scope="module")
def inputs() -> dict:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 8, 8, 8, generator=generator)
    return {"x": x, "time": torch.tensor([5.0, 900.0]), "y": torch.tensor([0, 1]), "res": torch.ones(3) / 8}


def trained(**options) -> BiFlowNet:
    """With weights that let every condition have an effect."""
    model = build(attributes=SPECS, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_values_are_encoded_by_range_and_place():
    assert [SPECS[0].encoded(value) for value in (20, 50, 80, 110)] == [-1, 0, 1, 2]
    assert [SPECS[1].encoded(value) for value in ("F", "M")] == [0, 1]
    assert all(math.isnan(spec.encoded(None)) for spec in SPECS)


@torch.no_grad()
def test_a_new_attribute_changes_nothing(inputs):
    plain, model = build(), build(attributes=SPECS)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("attribute_emb.") for name in missing)
    assert list(model.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())
    expected = plain(**inputs)
    assert torch.equal(model(**inputs), expected)
    assert torch.equal(model(**inputs, attributes=torch.tensor([[0.3, 1], [math.nan, 0]])), expected)


@torch.no_grad()
def test_each_attribute_counts_and_none_is_unknown(inputs):
    model = trained()
    unknown = torch.full((2, 2), math.nan)
    outputs = [model(**inputs)]
    for values in ([0.5, math.nan], [0.6, math.nan], [math.nan, 0], [math.nan, 1]):
        outputs.append(model(**inputs, attributes=torch.tensor([values, [math.nan] * 2])))
    assert torch.equal(outputs[0], model(**inputs, attributes=unknown))
    for first in range(5):
        for second in range(first):
            assert (outputs[first][0] - outputs[second][0]).abs().max() > 1e-4
        torch.testing.assert_close(outputs[first][1], outputs[0][1])  # of the other sample nothing is known


def test_gradients_reach_everything_and_stay_finite(inputs):
    model = trained()
    model(**inputs, attributes=torch.tensor([[0.5, math.nan], [math.nan, 1]])).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.startswith("attribute_emb.")}
    assert len(gradients) == 6
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in gradients.values())


@torch.no_grad()
@pytest.mark.parametrize("null_label", [False, True])
def test_guidance_is_towards_the_attributes(inputs, null_label):
    model = trained(null_label=null_label)
    attributes = torch.tensor([[0.5, 1], [-1, 0]])
    conditions = {"y": inputs["y"], "res": inputs["res"], "attributes": attributes}
    found = conditioned(model, inputs["x"], conditions, 2.0)(inputs["x"], inputs["time"])
    without = {"y": torch.tensor([2, 2])} if null_label else {}
    base = model(**{**inputs, **without})
    torch.testing.assert_close(found, base + 2 * (model(**inputs, attributes=attributes) - base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "attributes", "message"),
    [
        ({}, torch.zeros(2, 2), "this model has none"),
        ({"attributes": SPECS}, torch.zeros(2, 3), r"shape \(2, 3\): expected \(2, 2\)"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(inputs, options, attributes, message):
    with pytest.raises(ValueError, match=message):
        build(**options)(**inputs, attributes=attributes)


def test_a_category_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"attribute sex: \[2.0\], expected 0 to 1"):
        trained().check_conditions({"attributes": torch.tensor([[0.0, 2.0]])})
    with pytest.raises(ValueError, match="a name that torch has taken"):
        build(attributes=(AttributeSpec("values", range=(0, 1)),))

"""ControlNet: parity with the official numbers, the frozen base, hints."""

import copy

import pytest
import torch
from golden import GOLDEN_SEED, fill_module, golden_normal, load_golden, load_keys

from ddpm.BiFlowNet import BiFlowNet
from ddpm.ControlNet import ControlledBiFlowNet, ControlNet
from ddpm.diffusion import GaussianDiffusion
from ddpm.frozen_base import part_of, with_part
from ddpm.latent_scaling import LatentScaling

SMALL = {
    "dim": 24, "cond_classes": 2, "dim_mults": (1, 1, 2), "use_sparse_linear_attn": (0, 0, 1), "channels": 4,
    "patch_size": 2, "resnet_groups": 8, "DiT_num_heads": 4,
}  # fmt: skip
SHAPE = (2, 4, 16, 8, 16)


def official() -> ControlledBiFlowNet:
    """The golden case's network, zero convolutions filled like any other."""
    base = fill_module(BiFlowNet(**SMALL), prefix="noise_estimator.")
    return ControlledBiFlowNet(base, fill_module(ControlNet(hint_channel=4, **SMALL), prefix="controlnet."))


@pytest.fixture(scope="module")
def controlled() -> ControlledBiFlowNet:
    return official()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    x, hint = (golden_normal(GOLDEN_SEED, name, SHAPE) for name in ("x", "hint"))
    return {
        "x": x, "time": torch.tensor([3, 999]), "hint": hint.clamp(-1, 1), "y": torch.tensor([0, 1]),
        "res": torch.tensor([16 / 64, 8 / 64, 16 / 64]),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- parity


def test_names_and_shapes_are_the_official_ones_in_order():
    network = ControlNet(dim=72, hint_channel=8, cond_classes=7, channels=8, patch_size=1)
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert list(found.items()) == list(load_keys("controlnet_8x").items())


@pytest.mark.parametrize("scale", [0, 1, 2])
@torch.no_grad()
def test_output_at_each_control_scale(controlled, inputs, scale):
    expected = torch.from_numpy(load_golden("controlnet_small")[f"eps_scale{scale}"])
    found = ControlledBiFlowNet(controlled.biflownet, controlled.controlnet, scale)(**inputs)
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@torch.no_grad()
def test_maps_of_the_levels_and_the_middle(controlled, inputs):
    golden = load_golden("controlnet_small")
    maps = controlled.controlnet(**inputs)
    assert len(maps) == 4
    for index, found in enumerate(maps):
        assert tuple(found.shape) == tuple(golden[f"control{index}_shape"])
        assert found.mean().item() == pytest.approx(golden[f"control{index}_mean"].item(), abs=1e-4)
        assert found.std().item() == pytest.approx(golden[f"control{index}_std"].item(), rel=1e-4)


def test_loss_and_gradients(inputs):
    golden, controlled = load_golden("controlnet_small"), official().train()
    conditions = {name: inputs[name] for name in ("hint", "y", "res")}
    process = GaussianDiffusion(channels=4, timesteps=1000, loss_type="l1")
    noise = golden_normal(GOLDEN_SEED, "noise", SHAPE)
    loss = process.p_losses(controlled, inputs["x"].clamp(-1, 1), inputs["time"], noise=noise, conditions=conditions)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-4)
    gradients = {name: p.grad for name, p in controlled.controlnet.named_parameters() if p.requires_grad}
    total = torch.nn.utils.get_total_norm(list(gradients.values()))
    assert total.item() == pytest.approx(golden["grad_norm"].item(), rel=1e-3)
    for name in ("init_conv.weight", "x_embedder.proj.weight", "mid_zero_conv.weight", "downs.1.5.weight"):
        assert gradients[name].norm().item() == pytest.approx(golden[f"grad_{name}"].item(), rel=1e-3), name
    assert all(parameter.grad is None for parameter in controlled.biflownet.parameters())


# ------------------------------------------------------------------------------------------------------------ beginning


def begun(hint_channel: int = 3) -> ControlledBiFlowNet:
    base = fill_module(BiFlowNet(**SMALL))
    network = fill_module(ControlNet(hint_channel=hint_channel, **SMALL), seed=3)
    network.begin_as(base)
    return ControlledBiFlowNet(base, network)


@torch.no_grad()
def test_it_begins_as_the_base_bit_for_bit(inputs):
    controlled = begun()
    plain = controlled.biflownet(**{name: value for name, value in inputs.items() if name != "hint"})
    given = {**inputs, "hint": inputs["hint"][:, :3]}
    assert torch.equal(controlled(**given), plain)
    assert torch.equal(ControlledBiFlowNet(controlled.biflownet, official().controlnet, 0.0)(**inputs), plain)
    weights, base = controlled.controlnet.state_dict(), controlled.biflownet.state_dict()
    assert not weights["init_conv.weight"][:, 4:].any()
    assert torch.equal(weights["init_conv.weight"][:, :4], base["init_conv.weight"])
    assert torch.equal(weights["downs.1.2.block1.proj.weight"], base["downs.1.2.block1.proj.weight"])


def test_only_the_controlnet_trains_and_learns_of_the_hint(inputs):
    controlled = begun(4).train()
    assert not controlled.biflownet.training
    assert part_of(controlled) is controlled.controlnet
    optimizer = torch.optim.Adam(part_of(controlled).parameters(), lr=1e-2)
    before = copy.deepcopy(controlled.biflownet.state_dict())
    for _ in range(3):  # first the zero convolutions, then what lies before them
        optimizer.zero_grad()
        controlled(**inputs).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in controlled.biflownet.state_dict().items())
    with torch.no_grad():
        other = controlled(**{**inputs, "hint": -inputs["hint"]})
        assert (other - controlled(**inputs)).abs().max() > 1e-4
        averaged = with_part(controlled, begun(4).controlnet)
        assert averaged.biflownet is controlled.biflownet


@torch.no_grad()
def test_a_hint_that_is_dropped_is_zero_behind_its_scaling(controlled, inputs):
    scaling = LatentScaling(4)
    scaling.load_state_dict({"mean": torch.full((4,), 0.5), "std": torch.full((4,), 2.0)})
    scaled = ControlledBiFlowNet(controlled.biflownet, controlled.controlnet, 1.0, scaling)
    given = {**inputs, "hint": inputs["hint"] * 2 + 0.5}
    torch.testing.assert_close(scaled(**given), controlled(**inputs))
    dropped = scaled.drop_conditions(given, torch.tensor([True, False]))
    expected = controlled(**{**inputs, "hint": inputs["hint"] * torch.tensor([0.0, 1.0])[:, None, None, None, None]})
    torch.testing.assert_close(scaled(**dropped), expected)
    assert torch.equal(dropped["y"], inputs["y"])


def test_guidance_is_that_of_the_hint(controlled, inputs):
    process = GaussianDiffusion(channels=4, timesteps=20)
    conditions = {name: inputs[name] for name in ("hint", "y", "res")}
    options = dict(strategy="ddim", ddim_steps=2, conditions=conditions)
    plain, guided = (process.sample(controlled, inputs["x"], cond_scale=s, **options) for s in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    without = {"y": inputs["y"], "res": inputs["res"]}
    with pytest.raises(ValueError, match="no hint was given"):
        process.sample(controlled, inputs["x"], strategy="ddim", ddim_steps=2, conditions=without)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (torch.zeros(2, 3, 16, 8, 16), r"hint has shape \(2, 3, 16, 8, 16\): expected \(2, 4, 16, 8, 16\)"),
        (torch.zeros(2, 4, 8, 8, 16), r"expected \(2, 4, 16, 8, 16\), the grid of the latents"),
        (None, "no hint was given"),
    ],
)
def test_hints_of_other_shapes_are_refused(controlled, inputs, hint, message):
    with pytest.raises(ValueError, match=message):
        controlled(**{**inputs, "hint": hint})

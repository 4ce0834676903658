"""What makes BiFlowNet's steps fast changes nothing but rounding: attention, layouts, half precision, the optimiser."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from timm.layers import Attention
from torch import nn

from common.compilation import CompiledDenoiser
from common.optimiser import build_adam
from ddpm.BiFlowNet import BiFlowNet
from ddpm.blocks import ConvBlock, PatchAttention, downsample, upsample
from train.diffusion.ema import EMA
from train.diffusion.state import TrainingState

TINY = {
    "dim": 24,
    "cond_classes": 2,
    "dim_mults": (1, 2, 2),
    "use_sparse_linear_attn": (0, 0, 1),
    "channels": 2,
    "patch_size": 1,
    "resnet_groups": 4,
    "DiT_num_heads": 4,
    "attn_heads": 2,
}


def tiny_network(**changes) -> BiFlowNet:
    torch.manual_seed(0)
    network = BiFlowNet(**{**TINY, **changes})
    for parameter in network.parameters():  # zeros would hide most of it
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


def loss_and_gradients(network: BiFlowNet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(2, 2, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    network.zero_grad()
    loss = network(x, torch.tensor([5, 700]), torch.tensor([0, 1]), torch.tensor([8, 8, 16]) / 64).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(("dim", "num_heads"), [(72, 8), (24, 4), (24, 3)])
def test_padded_attention_is_attention(dim, num_heads):
    """Heads of 9, 6 and 8 channels; outputs and gradients, of the input too."""
    torch.manual_seed(0)
    reference = Attention(dim, num_heads=num_heads, qkv_bias=True)
    ours = PatchAttention(dim, num_heads)
    ours.load_state_dict(reference.state_dict())
    outcomes = []
    for module in (reference, ours):
        x = torch.randn(3, 64, dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        (y**2).sum().backward()
        outcomes.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_fill_sixteen_bytes(monkeypatch, dtype):
    seen = []
    attend = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, scale: (seen.append((q.shape[-1], scale)), attend(q, k, v, scale=scale))[1],
    )
    PatchAttention(72, 8).to(dtype)(torch.randn(1, 8, 72, dtype=dtype))
    assert seen == [(12 if dtype == torch.float32 else 16, 1 / 3)]


def test_gradient_checkpointing_gives_the_same_gradients_bit_for_bit(monkeypatch):
    network = tiny_network()
    plain_loss, plain = loss_and_gradients(network)
    calls = []
    forward = ConvBlock.forward
    monkeypatch.setattr(ConvBlock, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    loss_and_gradients(network)
    once = len(calls)
    network.gradient_checkpointing = True
    loss, gradients = loss_and_gradients(network)
    assert len(calls) == once + 2 * once  # forward, and again in the backward pass
    assert torch.equal(loss, plain_loss)
    assert plain.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[name]), name


def test_channels_last_and_compile_change_nothing_but_rounding():
    network = tiny_network()
    plain_loss, plain = loss_and_gradients(network)
    names = list(network.state_dict())
    network.to(memory_format=torch.channels_last_3d)
    assert network.downs[0][0].block1.proj.weight.is_contiguous(memory_format=torch.channels_last_3d)
    loss, gradients = loss_and_gradients(network)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-4 * plain[name].abs().max().item() + 1e-7)
    assert list(network.state_dict()) == names


SMALL_GRIDS = [(2, 2, 2), (2, 4, 4), (4, 2, 4)]


@pytest.mark.parametrize(
    ("make", "grids"),
    [
        (lambda: ConvBlock(24, 24, 4).proj, SMALL_GRIDS),
        (lambda: downsample(24), SMALL_GRIDS),
        (lambda: upsample(24), [(1, 1, 1), (2, 1, 2), (3, 1, 2), *SMALL_GRIDS]),
    ],
    ids=["3³", "4³, stride 2", "4³ transposed"],
)
def test_gradients_of_weights_are_right_in_bf16_on_small_grids(make, grids):
    """Memory is poisoned first: what is read unwritten shows."""
    for grid in grids:
        torch.manual_seed(0)
        module = make()
        x = torch.randn(2, 24, *grid)
        module(x).square().sum().backward()
        expected = module.weight.grad.clone()
        module.zero_grad()
        poison = [torch.full((2**power,), 1e30) for power in range(8, 20) for _ in range(3)]
        del poison
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().square().sum()
        loss.backward()
        assert (module.weight.grad - expected).norm() < 0.02 * expected.norm(), grid


def test_sampling_in_bf16_stays_in_bf16_on_small_grids():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert downsample(24)(torch.randn(1, 24, 2, 2, 2)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ optimiser, averages


def trained_a_step(layout: torch.memory_format) -> tuple[nn.Module, TrainingState]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 3)).to(memory_format=layout)
    optimizer = build_adam(model.parameters(), 0.1, (0.9, 0.999), fused=True)
    state = TrainingState(model, EMA(model), optimizer, torch.amp.GradScaler("cpu", enabled=False))
    a_step(model, optimizer)
    return model, state


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_averages_of_another_layout_train_on_alike(tmp_path):
    """A run goes on with channels_last, and Adam does not mix up the elements of its averages."""
    model, state = trained_a_step(torch.contiguous_format)
    other, other_state = trained_a_step(torch.channels_last_3d)
    saved = {"model": model.state_dict(), "opt": state.optimizer.state_dict()}
    other.load_state_dict(model.state_dict())
    other_state._load_optimizer(copy.deepcopy(saved), tmp_path, logging.getLogger("test"))
    for trained, of in ((model, state), (other, other_state)):
        a_step(trained, of.optimizer)
    torch.testing.assert_close(other[0].weight, model[0].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False])
def test_an_old_optimisers_file_goes_on_fused(tmp_path, fused):
    """Files of before say `fused: None`, official ones nothing."""
    model = nn.Sequential(nn.Conv3d(2, 3, 3))
    old = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(1, 2, 4, 4, 4)).sum().backward()
        old.step()
    saved = old.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = fused
        if fused is None:
            del group["fused"]
    new = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    state = TrainingState(model, EMA(model), new, torch.amp.GradScaler("cpu", enabled=False))
    state._load_optimizer({"model": model.state_dict(), "opt": saved}, tmp_path, logging.getLogger("test"))
    assert all(group["fused"] for group in new.param_groups)
    for parameter in model.parameters():
        for name, value in old.state[parameter].items():
            assert torch.equal(new.state[parameter][name], value), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_step_leaves_weights_and_averages_untouched(value):
    """Through a disabled scaler's `step`, by `found_inf` alone."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(factor: float, found_inf: float) -> list[torch.Tensor]:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 5)).sum() * factor).backward()
        optimizer.found_inf = torch.tensor(found_inf)
        scaler.step(optimizer)
        scaler.update()
        return [p.detach().clone() for p in model.parameters()] + [
            item.clone() for p in model.parameters() for item in optimizer.state[p].values()
        ]

    before = step(1.0, 0.0)
    for expected, found in zip(before, step(value, 1.0), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(step(1.0, 0.0)[0], before[0])


# ---------------------------------------------------------------------------------------------- compiled sampling


@pytest.mark.parametrize(("device", "mode", "num_marks"), [("cuda", "reduce-overhead", 2), ("cpu", None, 0)])
def test_a_gpu_replays_graphs_and_hands_out_copies(monkeypatch, device, mode, num_marks):
    """A replay overwrites the result of the one before."""
    result, modes, marks = torch.zeros(2), [], []
    compiled = lambda: result.add_(1)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda network, dynamic, mode: modes.append(mode) or compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    network = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))
    denoiser = CompiledDenoiser(network)
    first, second = denoiser(), denoiser()
    assert (modes, len(marks)) == ([mode], num_marks)
    if device == "cuda":
        assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])

"""Options for speed and memory change nothing but rounding; a step reads nothing back; DDP wraps each pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from configs import tiny_autoencoder
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from AutoEncoder.model.PatchVolume import AE_finetuning, patchvolumeAE
from common.convolution import Conv3d, ConvTranspose3d
from common.optimiser import build_adam
from train.autoencoder.step_watch import _news
from train.autoencoder.strategy import TwoPassDDPStrategy


def build(**options) -> patchvolumeAE:
    """A tiny autoencoder with a started codebook, the same weights each time."""
    torch.manual_seed(0)
    model = patchvolumeAE(tiny_autoencoder(discriminator_iter_start=0, no_random_restart=True, **options))
    model.codebook.N.fill_(1.0)
    return model.train()


def drive(model: patchvolumeAE, monkeypatch, steps: int, size: int = 16) -> list[dict[str, float]]:
    """Steps of both optimisers without a trainer; what was logged."""
    optimizers = model.configure_optimizers()
    for optimizer in optimizers:  # as Lightning does
        optimizer.register_step_pre_hook(lambda optimizer, *_: model.on_before_optimizer_step(optimizer))
    logged = []
    monkeypatch.setattr(model, "optimizers", lambda: optimizers)
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.append(values))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        monkeypatch.setattr(type(model), "global_step", step)
        model.training_step({"data": torch.rand(2, 1, size, size, size, generator=generator)}, step)
    return [{name: value.item() for name, value in values.items()} for values in logged]


# ------------------------------------------------------------------------------------------------------- options


@pytest.fixture
def without_code_generation(monkeypatch):
    """Compiles to the operations that eager mode runs: traced as always, but within seconds."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("options", [["channels_last"], ["gradient_checkpointing"], ["compile"]])
def test_options_change_nothing_but_rounding(monkeypatch, without_code_generation, options, stage):
    plain, fast = build(stage=stage), build(stage=stage, **dict.fromkeys(options, True))
    fast.setup("fit")
    expected, found = drive(plain, monkeypatch, 4), drive(fast, monkeypatch, 4)
    for values, others in zip(expected, found, strict=True):
        assert others == pytest.approx(values, rel=2e-3, abs=1e-5)
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_channels_last_holds_from_the_first_convolution_to_the_last(monkeypatch):
    """Of those that look at neighbours: where one doesn't, torch may choose another layout for its small result."""
    model = build(channels_last=True)
    model.setup("fit")
    kept = []
    for network in (model.encoder, model.decoder, model.volume_discriminator):
        for part in network.modules():
            if isinstance(part, nn.Conv3d) and part.out_channels > 1 and part.kernel_size[0] > 1:
                part.register_forward_hook(
                    lambda module, args, out: kept.append(out.is_contiguous(memory_format=torch.channels_last_3d))
                )
    drive(model, monkeypatch, 1)
    assert len(kept) > 20
    assert all(kept)


def saved_bytes(model: patchvolumeAE, x: torch.Tensor) -> int:
    """What the backward pass of `x` keeps, beside the weights: storages once each."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept, _ = model.generator_pass(x)
    assert kept.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_gradient_checkpointing_keeps_less():
    x = torch.rand(1, 1, 16, 16, 16)
    plain, lean = build(), build(gradient_checkpointing=True)
    lean.setup("fit")
    assert saved_bytes(lean, x) < 0.45 * saved_bytes(plain, x)


def test_compiled_networks_are_run_uncompiled_on_whole_volumes(monkeypatch):
    model = build(compile=True)
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        calls.append(len(inputs))
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    model.setup("fit")
    model.reconstruct(torch.rand(1, 1, 16, 32, 16))
    assert calls == []
    model.generator_pass(torch.rand(1, 1, 16, 16, 16))
    assert len(calls) == 2  # encoder, decoder


@pytest.mark.parametrize(("kernel", "padding", "depth"), [(3, 1, 2), (4, 2, 3)])
def test_bf16_gradients_of_a_convolution_deeper_than_its_input(kernel, padding, depth):
    """On some processors oneDNN's read what lies in memory, so the heap is filled with what would show."""
    torch.manual_seed(0)
    conv = Conv3d(16, 16, kernel, padding=padding)
    x = torch.randn(2, 16, depth, 4, 4)
    gradients = []
    for enabled in (False, True):
        junk = [torch.full((conv.weight.numel() * 4,), 1e30) for _ in range(20)]
        del junk
        with torch.autocast("cpu", enabled=enabled):
            conv(x).sum().backward()
        gradients.append(conv.weight.grad)
        conv.weight.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0.2)


@pytest.mark.parametrize(
    ("layer", "grid", "is_half"),
    [
        (Conv3d(1, 1, 3, padding=1), (3, 3, 3), True),
        (Conv3d(1, 1, 3, padding=1), (8, 2, 8), False),
        (Conv3d(1, 1, 4, stride=2, padding=1), (4, 4, 4), True),
        (Conv3d(1, 1, 4, stride=2, padding=1), (12, 2, 12), False),
        (Conv3d(1, 1, 1), (1, 1, 1), True),
        (ConvTranspose3d(1, 1, 4, stride=2, padding=1), (2, 2, 2), True),
        (ConvTranspose3d(1, 1, 4, stride=2, padding=1), (6, 1, 6), False),
    ],
)
def test_grids_smaller_than_the_kernel_stay_in_float32(layer, grid, is_half):
    with torch.autocast("cpu"):
        assert layer(torch.randn(1, 1, *grid)).dtype == (torch.bfloat16 if is_half else torch.float32)


# ----------------------------------------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_adam_goes_on_from_a_state_of_another_kind(layout):
    """That of an optimiser that isn't fused, of parameters in the usual layout."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 6, 3, 3, 3), torch.randn(4, 4, 6, 3, 3, 3)
    plain = torch.nn.Parameter(start.clone())
    old = torch.optim.Adam([plain], lr=0.1, betas=(0.5, 0.9))
    for gradient in gradients[:2]:
        plain.grad = gradient.clone()
        old.step()
    parameter = torch.nn.Parameter(plain.detach().clone().to(memory_format=layout))
    new = build_adam([parameter], lr=0.1, betas=(0.5, 0.9), fused=True)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    for gradient in gradients[2:]:
        plain.grad, parameter.grad = gradient.clone(), gradient.clone().to(memory_format=layout)
        old.step()
        new.step()
    assert new.param_groups[0]["fused"] is True
    torch.testing.assert_close(parameter, plain, rtol=1e-5, atol=1e-6)


def test_fp16_is_not_fused():
    assert [optimizer.defaults["fused"] for optimizer in build().configure_optimizers()] == [True, True]
    assert [o.defaults["fused"] for o in build(precision="16").configure_optimizers()] == [False, False]


# -------------------------------------------------------------------------------------------- nothing is read back


READING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__len__", "numpy", "cpu", "nonzero"}
READING_OPS = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "_unique")


class NoReading(TorchFunctionMode):
    """Python calls that hand a tensor's values to the host: on a GPU, a wait for all work given so far."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name == "__len__" or name not in READING, name
        return function(*args, **(kwargs or {}))


class NoReadingOps(TorchDispatchMode):
    """The same below Python."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in READING_OPS, name
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_a_gpu(monkeypatch):
    """Of both kinds, with clipping and what the callback makes of them."""
    model = build(gradient_clip=1.0)
    assert model.codebook.initialised  # asked of the device once
    step = model.training_step
    trainer = type("Trainer", (), {"world_size": 1})

    def watched_step(batch, batch_idx):
        with NoReading(), NoReadingOps():
            step(batch, batch_idx)
            _news(model.watched, 0, trainer)

    monkeypatch.setattr(model, "training_step", watched_step)
    drive(model, monkeypatch, 4)


@pytest.mark.parametrize("read", [bool, torch.Tensor.item, torch.Tensor.tolist, torch.nonzero])
def test_reading_is_noticed(read):
    with pytest.raises(AssertionError), NoReading(), NoReadingOps():
        read(torch.ones(1))


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def group():
    """A process group of this process alone: all that DDP checks it checks here too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "channels_last": True}])
@pytest.mark.parametrize("stage", [1, 2])
def test_ddp_wraps_each_pass(monkeypatch, group, stage, options):
    plain, wrapped = build(stage=stage, **options), build(stage=stage, **options)
    strategy = TwoPassDDPStrategy(parallel_devices=[torch.device("cpu")])
    for model in (plain, wrapped):
        model.setup("fit")
        if stage == 2:
            AE_finetuning().freeze_before_training(model)
    names = list(wrapped.state_dict())
    strategy.connect(wrapped)
    strategy.configure_ddp()
    assert list(wrapped.state_dict()) == names
    for ddp in wrapped.passes.values():
        assert not ddp.find_unused_parameters
    # a parameter without gradient would be an error at the next step of its pass
    expected, found = drive(plain, monkeypatch, 6), drive(wrapped, monkeypatch, 6)
    assert found == expected
    assert isinstance(strategy.model, patchvolumeAE)
    wrapped.passes = wrapped.own_passes()

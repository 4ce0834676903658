"""On a GPU training leaves bad steps out, goes on bit for bit, and shares the memory with previews; encoding fits."""

import copy
import logging

import pytest
import torch

pytest.importorskip("nibabel", reason="the trainings read NIfTI files: needs nibabel")

import autoencoder_runs
import biflownet_runs as runs
import latent_runs
from configs import tiny_autoencoder
from golden import golden_normal
from torch import nn

from AutoEncoder.checkpoint import load_autoencoder
from common.errors import UserError
from common.optimiser import build_adam
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.volume_io import read_latent, read_volume
from ddpm.checkpoint import build_biflownet
from ddpm.diffusion import GaussianDiffusion
from train.autoencoder.training import train as train_autoencoder
from train.diffusion import run_folder
from train.diffusion.batches import LatentBatches, make_cache
from train.diffusion.preview import Previews
from train.latents.encoding import generate_latents
from train.loop.session import session
from train.loop.step_flags import StepFlags
from train.train_BiFlowNet_SingleRes import train

EXACT = {"device": "cuda", "arithmetic": "exact"}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("latents"))


# -------------------------------------------------------------------------------------------------- optimiser and flags


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_fused_adam_leaves_a_bad_step_out_and_goes_on_from_a_cpus_checkpoint(gpu, layout):
    """The same three steps as on a CPU, of which the GPU does the last two, with a bad one between."""
    network = nn.Conv3d(4, 6, 3)
    gradients = [golden_normal(i, "gradient", network.weight.shape) for i in range(3)]

    def step(model: nn.Conv3d, optimizer: torch.optim.Adam, gradient: torch.Tensor, is_bad: bool = False) -> None:
        weight = model.weight
        weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.found_inf = torch.tensor(float(is_bad), device=weight.device)
        optimizer.step()

    adam = build_adam([network.weight], 1e-2, (0.9, 0.999), fused=True)
    step(network, adam, gradients[0])
    moved = copy.deepcopy(network).to(gpu, memory_format=layout)
    on_gpu = build_adam([moved.weight], 1e-2, (0.9, 0.999), fused=True)
    on_gpu.load_state_dict(copy.deepcopy(adam.state_dict()))
    for gradient in gradients[1:]:
        step(network, adam, gradient)
        before = moved.weight.detach().clone()
        step(moved, on_gpu, gradient * torch.inf, is_bad=True)
        assert torch.equal(moved.weight, before)
        step(moved, on_gpu, gradient)
    torch.testing.assert_close(moved.weight.cpu(), network.weight, rtol=1e-5, atol=1e-7)


def test_flags_come_one_step_late_and_in_order(gpu):
    flags = StepFlags(gpu)
    found = [flags.exchange(step, torch.tensor([step, step % 2], device=gpu)) for step in range(5)]
    assert found == [None, (0, [0, 0]), (1, [1, 1]), (2, [2, 0]), (3, [3, 1])]
    assert flags.flush() == (4, [4, 0])


def poison(monkeypatch, bad_step: int) -> None:
    """Let the loss of one step be infinite."""
    losses, calls = GaussianDiffusion.p_losses, []

    def p_losses(*arguments, **options):
        calls.append(1)
        return losses(*arguments, **options) * (torch.inf if len(calls) == bad_step else 1)

    monkeypatch.setattr(GaussianDiffusion, "p_losses", p_losses)


def test_a_loss_without_end_stops_training_before_it_does_harm(gpu, latents, tmp_path, monkeypatch):
    """In fp16, where infinite gradients are usual, and flags come late: what is saved is of sound steps."""
    poison(monkeypatch, 4)
    with pytest.raises(UserError, match="step 4: the loss is not finite"):
        train(runs.config(latents, tmp_path, max_steps=6, enable_amp=True, amp_dtype="fp16", **EXACT))
    (run,) = tmp_path.iterdir()
    assert list((run / "checkpoints").glob("*.pt")) == [run_folder.checkpoint_path(run, 2)]
    weights = runs.checkpoint(run, 2)["model"].values()
    assert all(weight.isfinite().all() for weight in weights)


def test_an_overflow_in_fp16_is_left_out_and_training_goes_on(gpu, latents, tmp_path, monkeypatch):
    """The loss is sound and its gradient is not, as where the loss scale is too large."""
    unscale, calls = torch.amp.GradScaler.unscale_, []

    def overflow(scaler, optimizer):
        calls.append(1)
        if len(calls) == 2:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.fill_(torch.inf)
        unscale(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    done = train(runs.config(latents, tmp_path, max_steps=4, enable_amp=True, amp_dtype="fp16", **EXACT))
    found = runs.checkpoint(done["folder"], 4)
    assert done["step"] == 4
    assert found["scaler"]["scale"] < 65536
    assert all(weight.isfinite().all() for weight in found["model"].values())


# -------------------------------------------------------------------------------------------------- batches and resume


def test_pinned_batches_are_those_of_a_cpu(gpu, latents):
    found = {}
    for device in ("cpu", "cuda"):
        cfg = runs.config(latents, latents.parent, device=device)
        with session(device) as here:
            dataset = Singleres_dataset(latents, cfg.resolution, vq_size=64, cache=make_cache(cfg, here.logger))
            batches = LatentBatches(dataset, 2, 3, 2, here)
            batches.build_cache(here.logger)
            stream = batches.endless(lambda: (0, 0))
            moved = [next(stream).to(here.device) for _ in range(4)]
            found[device] = [[z.cpu(), *(value.cpu() for value in named.values())] for z, named in moved]
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(on_cpu, on_gpu, strict=True))


@pytest.mark.parametrize("precision", [{}, {"enable_amp": True, "amp_dtype": "bf16"}])
def test_a_run_of_biflownet_goes_on_bit_for_bit(gpu, latents, tmp_path, precision):
    once = train(runs.config(latents, tmp_path / "once", max_steps=6, **EXACT, **precision))
    for steps in (3, 6):
        twice = train(runs.config(latents, tmp_path / "twice", max_steps=steps, **EXACT, **precision))
    runs.assert_same_training(*(runs.checkpoint(run["folder"], 6) for run in (once, twice)))


def test_a_run_of_the_autoencoder_goes_on_bit_for_bit(gpu, tmp_path):
    data = autoencoder_runs.make_data(tmp_path / "volumes")
    options = ("model.accelerator=gpu", "model.arithmetic=exact", "model.precision=bf16")
    found = []
    for name, ends in (("once", (6,)), ("twice", (3, 6))):
        for end in ends:
            cfg = autoencoder_runs.config(data, tmp_path / name, f"model.max_steps={end}", *options)
            train_autoencoder(cfg, stage=1)
        found.append(autoencoder_runs.weights(tmp_path / name))
    autoencoder_runs.assert_same_weights(*found)


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.mark.parametrize(("leaving", "is_made"), [(4_000_000_000, True), (0, False)])
def test_a_preview_on_a_nearly_full_gpu(gpu, tmp_path, caplog, leaving, is_made):
    """It is made or left out with a warning, and what training holds is as before."""
    autoencoder = load_autoencoder(runs.save_autoencoder(tmp_path / "ae.ckpt"))
    cfg = runs.config(tmp_path, tmp_path)
    model = build_biflownet(cfg).eval()
    logger = logging.getLogger("preview test")
    diffusion = GaussianDiffusion(4, 20).to(gpu)
    previews = Previews(tmp_path, [(0, (16, 16, 16)), (1, (16, 16, 16))], 3, model, diffusion, autoencoder, gpu, logger)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    held = fill_memory(gpu, leaving)
    path = previews.write(12, 1, weights)
    torch.cuda.synchronize(gpu)
    assert (path is not None) == is_made
    if is_made:
        assert read_volume(path).data.isfinite().all()
    else:
        assert "preview of step 12" in caplog.text
    assert all(part.min() == part.max() == 1 for part in held)


def fill_memory(gpu: torch.device, leaving: int) -> list[torch.Tensor]:
    """Tensors of ones that leave so many bytes of the GPU free; with 0 none of a megabyte can be had."""
    torch.cuda.empty_cache()
    held, size = [], max(2**21, torch.cuda.mem_get_info(gpu)[0] - leaving)
    while size >= 2**20:
        try:
            held.append(torch.ones(size, dtype=torch.uint8, device=gpu))
        except torch.OutOfMemoryError:
            size //= 2
        else:
            size = size if leaving == 0 else 0
    return held


def test_encoding_with_its_default_options(gpu, tmp_path):
    """Four volumes of 128³ at once through an encoder of paper size: within a few GB, and as on a CPU."""
    cfg = tiny_autoencoder(patch_size=64, downsample=[8, 8, 8], n_hiddens=48, num_groups=24)
    autoencoder = runs.save_autoencoder(tmp_path / "ae.ckpt", cfg)
    for seed in range(4):
        latent_runs.save_volume(tmp_path / "CT" / f"{seed}.nii.gz", (128, 128, 128), seed=seed)
    data = latent_runs.save_json(tmp_path, {"0": "CT"})
    torch.cuda.reset_peak_memory_stats(gpu)
    files = generate_latents(latent_runs.config(data, autoencoder, device="cuda", batch_size=4))
    assert torch.cuda.max_memory_allocated(gpu) < 6e9
    first = read_latent(files[0])
    assert first.shape == (4, 16, 16, 16)
    assert first.isfinite().all()

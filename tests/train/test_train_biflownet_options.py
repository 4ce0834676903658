"""Training of BiFlowNet: the effect of its options, and what it refuses before any work."""

from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, checkpoint, crash_at

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from common import precision
from common.errors import UserError
from dataset.checking import before_training as sample_check
from dataset.volumes.volume_io import read_latent, write_latent
from ddpm.diffusion import GaussianDiffusion
from ddpm.latent_scaling import LatentScaling
from train.diffusion import run_folder, state
from train.train_BiFlowNet_SingleRes import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.make_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def ae_ckpt(tmp_path_factory) -> Path:
    return runs.save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "ae.ckpt")


@pytest.fixture(scope="module")
def plain_loss(data, tmp_path_factory) -> float:
    """Mean loss of the second step, before which the weights moved far enough for every option to show."""
    return train(runs.config(data, tmp_path_factory.mktemp("plain"), **QUICK))["loss"]


QUICK = {"max_steps": 2, "lr": 1e-2, "preview_steps": 2}


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "change",
    [{"loss_type": "l2"}, {"timesteps": 50}, {"vq_size": 32}, {"global_seed": 1}, {"prediction": "v"}]
    + [
        {"loss_weighting": "min_snr"},
        {"timestep_draw": "logit_normal"},
        {"process": "flow"},
        {"latent_scaling": "unit"},
    ],
)
def test_option_has_an_effect(data, tmp_path, plain_loss, change):
    changed = train(runs.config(data, tmp_path, **QUICK, **change))["loss"]
    assert changed != pytest.approx(plain_loss, rel=1e-6)


def test_the_scale_of_latents_is_kept_where_a_run_goes_on(data, tmp_path):
    """The weights know the scale that the run began with, though the files' may have changed since."""
    options = {**QUICK, "latent_scaling": "unit"}
    began = train(runs.config(data, tmp_path, **options))
    saved = checkpoint(began["folder"], 2)["latent_scaling"]
    latents = torch.stack([read_latent(path) for path in sorted(data.parent.rglob("*.nii.gz"))])
    torch.testing.assert_close(saved["std"], latents.std((0, 2, 3, 4), correction=0))
    torch.testing.assert_close(saved["mean"], latents.mean((0, 2, 3, 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentScaling, "measure", lambda self, latents: self.std.fill_(7))
        went_on = train(runs.config(data, tmp_path, **{**options, "max_steps": 3}))
    torch.testing.assert_close(checkpoint(went_on["folder"], 3)["latent_scaling"], saved, rtol=0, atol=0)


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(data, tmp_path, monkeypatch, amp_dtype):
    """fp16 arithmetic takes seconds a step on a CPU, so bf16 stands in for it; the gradient scaler is the real one."""
    monkeypatch.setitem(precision.PRECISIONS, "fp16", torch.bfloat16)
    options = {"enable_amp": True, "amp_dtype": amp_dtype, "grad_clip": 0.5, "max_steps": 3, "ckpt_every": 1}
    straight = train(runs.config(data, tmp_path / "straight", **options))
    plain = train(runs.config(data, tmp_path / "plain", **{**options, "enable_amp": False}))
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(RuntimeError, match="power cut"):
            train(runs.config(data, tmp_path, **options))
    resumed = train(runs.config(data, tmp_path, **options))
    ended = checkpoint(straight["folder"], 3)
    assert_same_training(ended, checkpoint(resumed["folder"], 3))
    assert {value.dtype for value in ended["model"].values()} == {torch.float32}
    assert ended["scaler"].get("_growth_tracker") == (3 if amp_dtype == "fp16" else None)  # three steps, none skipped
    assert straight["loss"] != plain["loss"]
    assert straight["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_fp16_on_a_cpu_is_refused(data, tmp_path):
    """Its convolutions take seconds each there."""
    with pytest.raises(UserError, match=r"^amp_dtype is fp16, which needs a GPU: take bf16 on a CPU$"):
        train(runs.config(data, tmp_path, enable_amp=True, amp_dtype="fp16"))
    assert train(runs.config(data, tmp_path, enable_amp=False, amp_dtype="fp16", max_steps=1))["step"] == 1


def test_backward_runs_outside_autocast(data, tmp_path, monkeypatch):
    seen = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: (seen.append(torch.is_autocast_enabled("cpu")), backward(self))[1]
    )
    train(runs.config(data, tmp_path, enable_amp=True, amp_dtype="bf16", max_steps=1))
    assert seen == [False]


@pytest.mark.parametrize("enable_amp", [False, True])
def test_gradients_are_clipped(data, tmp_path, monkeypatch, enable_amp):
    """What the optimiser gets has the given norm, not that of the scaled loss; without clipping a larger one."""
    monkeypatch.setitem(precision.PRECISIONS, "fp16", torch.bfloat16)
    norms = []

    def step(self, closure=None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    for grad_clip in (0.0, 0.25):
        train(runs.config(data, tmp_path, max_steps=1, grad_clip=grad_clip, enable_amp=enable_amp))
    assert 0.5 < norms[0] < 5
    assert norms[1] == pytest.approx(0.25, rel=1e-2)


def test_non_finite_gradient_stops_before_the_step(data, tmp_path, monkeypatch):
    """The loss is finite and its gradient is not: sqrt at zero."""
    losses = GaussianDiffusion.p_losses
    monkeypatch.setattr(
        GaussianDiffusion,
        "p_losses",
        lambda *arguments, **options: (losses(*arguments, **options) * 0).sqrt() + 1,
    )
    with pytest.raises(UserError, match=r"step 1: the gradient is not finite, .*rank 0: loss 1, files .*nii\.gz"):
        train(runs.config(data, tmp_path))
    assert run_folder.list_checkpoints(tmp_path / "000-BiFlowNet") == []


def test_gradient_overflow_at_every_scale_stops(data, tmp_path, monkeypatch):
    monkeypatch.setitem(precision.PRECISIONS, "fp16", torch.bfloat16)
    monkeypatch.setattr(state, "SMALLEST_LOSS_SCALE", 2.0**17)
    with pytest.raises(UserError, match="step 1: gradients overflow fp16 whatever the loss scale"):
        train(runs.config(data, tmp_path, enable_amp=True, amp_dtype="fp16"))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_path": None}, "data_path"),
        ({"data_path": "nowhere.json"}, "nowhere.json"),
        ({"resolution": [16, 16, 16]}, "--resolution 8 8 8"),
        ({"volume_channels": 8}, "give --volume-channels 4"),
        ({"num_classes": 1}, "give --num-classes 2"),
        ({"batch_size": 11}, r"world size that doesn't fit: 1 process\(es\) with batch_size 11 take 11 .* has 10"),
        ({"model": "UNet"}, "model=UNet: there is no such model"),
        ({"dim_mults": [1, 1, 2, 2, 2, 2], "use_attn": [0] * 6}, r"resolution \[8, 8, 8\] has to be divisible by \[16"),
        ({"resnet_groups": 7}, "BiFlowNet"),
        ({"AE_ckpt": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"ckpt": "nowhere.pt"}, "nowhere.pt"),
        ({"loss_weighting": "x0"}, "loss_weighting 'x0' would weigh the noise .* use prediction 'v' or 'x0' with it"),
    ],
)
def test_wrong_option_is_one_line_before_any_work(data, tmp_path, values, message):
    with pytest.raises(UserError, match=message) as refused:
        train(runs.config(data, tmp_path, **values))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_gpu_demanded_without_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: cuda is demanded and this machine has no usable GPU"):
        train(runs.config(data, tmp_path, device="cuda"))


def test_more_processes_than_gpus(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="world size that doesn't fit: process 2 of this node has no GPU"):
        train(runs.config(data, tmp_path, device="cuda"))


def test_autoencoder_has_to_be_the_one_that_made_the_latents(ae_ckpt, tmp_path):
    data = runs.make_latents(tmp_path)
    cfg = runs.config(data, tmp_path / "results", AE_ckpt=str(ae_ckpt), max_steps=1)
    runs.write_records(data, "another")
    with pytest.raises(UserError, match=r"ae\.ckpt: not the autoencoder that made the latents in .*\(some\.ckpt\)"):
        train(cfg)
    runs.write_records(data, latent_fingerprint(load_autoencoder(ae_ckpt)))
    assert train(cfg)["step"] == 1
    (data.parent / "class1_latents" / "latents.json").write_text('{"autoencoder": "third"}')
    with pytest.raises(UserError, match="class1_latents: latents of another autoencoder"):
        train(cfg)


def test_options_without_effect_are_named(data, tmp_path, capfd):
    train(runs.config(data, tmp_path, preview=True, max_steps=1))
    assert "warning: preview has no effect: it needs the autoencoder, give --AE-ckpt" in capfd.readouterr().err


def test_checkpoint_of_another_model(data, tmp_path):
    source = train(runs.config(data, tmp_path, max_steps=1))
    path = run_folder.checkpoint_path(source["folder"], 1)
    with pytest.raises(UserError, match="BiFlowNet_0000001.pt: the weights do not fit"):
        train(runs.config(data, tmp_path, ckpt=str(path), dim_mults=[1, 2, 2]))


@pytest.mark.parametrize(("cache", "num_workers"), [("none", 0), ("none", 1), ("float32", 0), ("float32", 1)])
def test_truncated_latent_is_named_in_one_line(tmp_path, cache, num_workers, monkeypatch):
    """Its header is whole, so only reading it shows; the sample read at the start has missed it."""
    monkeypatch.setattr(sample_check, "SAMPLE_SIZE", 0)
    data = runs.make_latents(tmp_path)
    path = data.parent / "class0_latents" / "4.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"^\S*class0_latents/4\.nii\.gz: .*truncated") as refused:
        train(runs.config(data, tmp_path / "results", cache=cache, num_workers=num_workers))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"0\.nii\.gz: every value is 0\.5: leave"),
        (torch.nan, r"0\.nii\.gz: 2048 NaN or infinite voxels: replace"),
    ],
)
def test_a_sample_is_read_whole_before_the_model_is_built(tmp_path, monkeypatch, value, message):
    data = runs.make_latents(tmp_path)
    write_latent(data.parent / "class0_latents" / "0.nii.gz", torch.full((4, *runs.GRID), value))
    monkeypatch.setattr("ddpm.checkpoint.build_biflownet", lambda cfg: pytest.fail("built"))
    with pytest.raises(UserError, match=rf"{message}.*`python dataset/check\.py {data}` reads all") as refused:
        train(runs.config(data, tmp_path / "results"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "results").exists()


def test_all_processes_stop_for_a_bad_sample(tmp_path):
    """Rank 0 alone reads it."""
    data = runs.make_latents(tmp_path)
    write_latent(data.parent / "class0_latents" / "0.nii.gz", torch.zeros(4, *runs.GRID))
    process = runs.start(runs.torchrun(runs.arguments(data, tmp_path / "results")))
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("files whole as a check") == 1
    assert "every value is 0: leave the files out" in output
    assert not (tmp_path / "results").exists()

"""Generation samples a checkpoint as it was trained, and refuses options that say otherwise."""

import json
from pathlib import Path

import pytest
import torch
from generation_models import CUBE, TIMESTEPS, config, row, save_models, voxels

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.latents import denormalise_latents
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from ddpm.checkpoint import load_biflownet
from ddpm.diffusion import GaussianDiffusion
from ddpm.flow import RectifiedFlow
from ddpm.latent_scaling import LatentScaling
from evaluation.generation.record import read_record
from evaluation.generation.requests import list_requests, noise_generator
from evaluation.generation.run import generate

CHEST = [row(0, "Chest", CUBE)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def trained(models: Path, folder: Path, **args) -> str:
    """The tiny BiFlowNet as if trained with these options."""
    checkpoint = load_checkpoint(models / "flow.pt")
    for name, value in args.items():
        setattr(checkpoint["args"], name, value)
    path = folder / f"{'_'.join(map(str, args.values()))}.pt"
    save_checkpoint(checkpoint, path)
    return str(path)


def by_hand(cfg, process) -> torch.Tensor:
    """The only volume of a config, by the library's parts."""
    (request,) = list_requests(cfg)
    generator = noise_generator(request)
    z = torch.randn((1, 4, *CUBE), generator=generator)
    conditions = {"y": torch.tensor([0]), "res": torch.tensor(CUBE) / cfg.vq_size}
    options = {"strategy": cfg.sampling_strategy, "ddim_steps": cfg.ddim_steps, "generator": generator}
    latent = process.sample(load_biflownet(cfg, cfg.model_ckpt), z, conditions=conditions, **options)
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    raw = denormalise_latents(latent, autoencoder.codebook.embeddings)
    return autoencoder.decode(raw, quantize=True)[0].clamp(-1, 1)


def test_the_prediction_is_read_from_the_checkpoint(models, tmp_path):
    cfg = config(models, tmp_path, CHEST, model_ckpt=trained(models, tmp_path, prediction="v"))
    (path,) = generate(cfg)
    expected = by_hand(cfg, GaussianDiffusion(4, TIMESTEPS, prediction="v"))
    torch.testing.assert_close(voxels(path), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, by_hand(cfg, GaussianDiffusion(4, TIMESTEPS)), atol=1e-2)
    assert read_record(path)["run"]["prediction"] == "v"
    assert "prediction: v\n" in (path.parent / "config.yaml").read_text()


def test_a_flow_is_sampled_as_a_flow(models, tmp_path):
    flow = trained(models, tmp_path, process="flow")
    classes = [row(0, "Chest", CUBE, [8, 8, 16])]  # shifted otherwise each
    cfg = config(models, tmp_path, classes, model_ckpt=flow, sampling_strategy="euler", ddim_steps=20, batch_size=2)
    paths = generate(cfg)  # more steps than the 12 timesteps of the training
    assert [voxels(path).shape for path in paths] == [(1, 32, 32, 32), (1, 32, 32, 64)]
    record = read_record(paths[0])
    assert (record["sampling_strategy"], record["ddim_steps"], record["run"]["process"]) == ("euler", 20, "flow")
    assert "eta" not in record
    alone = config(models, tmp_path / "alone", CHEST, model_ckpt=flow, sampling_strategy="euler", ddim_steps=20)
    torch.testing.assert_close(voxels(paths[0]), by_hand(alone, RectifiedFlow(4, TIMESTEPS)), rtol=1e-5, atol=1e-5)


def test_the_scale_of_latents_is_read_from_the_checkpoint(models, tmp_path):
    checkpoint, scaling = load_checkpoint(models / "flow.pt"), LatentScaling(4)
    checkpoint["latent_scaling"] = {"mean": torch.tensor([0.1, 0.2, 0.3, 0.4]), "std": torch.full((4,), 0.2)}
    scaling.load_state_dict(checkpoint["latent_scaling"])
    save_checkpoint(checkpoint, tmp_path / "unit.pt")
    cfg = config(models, tmp_path, CHEST, model_ckpt=str(tmp_path / "unit.pt"))
    (path,) = generate(cfg)
    expected = by_hand(cfg, GaussianDiffusion(4, TIMESTEPS, scaling=scaling))
    torch.testing.assert_close(voxels(path), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, by_hand(cfg, GaussianDiffusion(4, TIMESTEPS)), atol=1e-2)


def test_what_the_checkpoint_says_may_be_said_again(models, tmp_path):
    """And is no other setting: the volumes that are there stay."""
    (path,) = generate(config(models, tmp_path, CHEST))
    written = path.stat().st_mtime_ns
    assert read_record(path)["run"]["prediction"] == "noise"
    assert generate(config(models, tmp_path, CHEST, prediction="noise")) == [path]
    assert path.stat().st_mtime_ns == written


def test_volumes_of_before_are_kept(models, tmp_path):
    """Their records don't say what the network predicts."""
    (path,) = generate(config(models, tmp_path, CHEST))
    record = read_record(path)
    del record["run"]
    path.with_name("Chest_32x32x32.json").write_text(json.dumps(record))
    written = path.stat().st_mtime_ns
    generate(config(models, tmp_path, CHEST))
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("args", "values", "message"),
    [
        ({}, {"prediction": "v"}, r"^prediction is v, but .*\.pt was trained with noise: leave prediction out$"),
        (
            {"prediction": "x0"},
            {"prediction": "noise"},
            r"prediction is noise, but .*x0\.pt was trained with x0: leave",
        ),
        ({}, {"process": "flow"}, r"^process is flow, but .*\.pt was trained with diffusion: leave process out$"),
        (
            {},
            {"sampling_strategy": "euler"},
            "euler, but .* was trained with process diffusion: choose ddpm or ddim",
        ),
        ({"process": "flow"}, {"process": "diffusion"}, "process is diffusion, but .* was trained with flow"),
        (
            {"process": "flow"},
            {},
            r"strategy is ddim, but .*flow\.pt was trained with process flow: choose euler$",
        ),
        ({"process": "flow"}, {"sampling_strategy": "ddpm"}, "sampling_strategy is ddpm, but"),
        ({"process": "flow"}, {"sampling_strategy": "euler", "eta": 0.5}, "eta must be 0 with sampling_strategy euler"),
        ({"process": "flow"}, {"process": "flow", "prediction": "v"}, "prediction v has no meaning with process flow"),
        ({}, {"prediction": "eps"}, r"prediction must be one of noise \| v \| x0"),
    ],
)
def test_options_that_the_checkpoint_contradicts(models, tmp_path, args, values, message):
    """A file that says nothing, as the official ones, means the official values."""
    path = trained(models, tmp_path, **args)
    with pytest.raises(UserError, match=message):
        generate(config(models, tmp_path / "out", CHEST, model_ckpt=path, **values))
    assert not (tmp_path / "out").exists()

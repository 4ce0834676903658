"""Class-conditional generation with tiny random models: what is drawn, written, kept and refused."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from configs import tiny_autoencoder

from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.PatchVolume import patchvolumeAE
from config.errors import UserError
from config.loading import load_config
from config.schema import GenerationConfig
from dataset.classes import add_classes
from dataset.manifest import KEYS, Intensity, write_manifest
from dataset.volume_io import read_volume
from ddpm.diffusion import GaussianDiffusion
from evaluation import class_conditional_generation, class_conditional_generation_4x, generation
from evaluation.generation import check_grids, generate
from evaluation.volume_requests import list_requests, noise_generator
from train.checkpoints import (
    build_biflownet,
    latent_fingerprint,
    load_autoencoder,
    load_biflownet,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
CUBE, WIDE = [8, 8, 8], [8, 16, 24]  # latent grids (z, x, y)
TIMESTEPS = 12
MODEL = {
    "volume_channels": 4,
    "model_dim": 24,
    "dim_mults": [1, 1, 2],
    "use_attn": [0, 0, 1],
    "patch_size": 2,
    "num_classes": 2,
    "resnet_groups": 8,
    "dit_num_heads": 4,
    "attn_heads": 2,
    "timesteps": TIMESTEPS,
}


def row(class_id: int, name: str, *grids: list[int], spacing=(1.0, 1.0, 1.0)) -> dict:
    return {"id": class_id, "name": name, "grids": list(grids), "spacings_mm": [list(spacing)] * len(grids)}


def config(models: Path, output_dir: Path, classes: list[dict] | None = None, **values):
    files = {"AE_ckpt": str(models / "ae.ckpt"), "model_ckpt": str(models / "flow.pt"), "output_dir": str(output_dir)}
    sampling = {"sampling_strategy": "ddim", "ddim_steps": 3, "downsample": 4, "tile": 32, "device": "cpu"}
    classes = [row(0, "Chest", CUBE), row(1, "Head", CUBE)] if classes is None else classes
    return load_config(GenerationConfig, None, values={**files, **MODEL, **sampling, "classes": classes, **values})


def save_models(folder: Path, null_label: bool = False, **autoencoder) -> Path:
    """A tiny 4x autoencoder and a BiFlowNet of two classes with random weights; plain and EMA weights differ."""
    torch.manual_seed(0)
    cfg = tiny_autoencoder(**autoencoder)
    model = patchvolumeAE(cfg)
    model.codebook.embeddings.normal_()
    model.codebook.N.fill_(1)
    save_checkpoint({"state_dict": model.state_dict(), "hyper_parameters": {"cfg": cfg}}, folder / "ae.ckpt")
    flow = build_biflownet(config(folder, folder), null_label)
    with torch.no_grad():
        for parameter in flow.parameters():  # adaLN starts at zero: without this no condition would have an effect
            parameter.add_(0.05 * torch.randn_like(parameter))
    ema = {name: value.clone() for name, value in flow.state_dict().items()}
    plain = {name: value + 0.1 for name, value in ema.items()}
    args = argparse.Namespace(timesteps=TIMESTEPS)
    save_checkpoint({"model": plain, "ema": ema, "args": args, "epoch": 1, "step": 10}, folder / "flow.pt")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def voxels(path: Path) -> torch.Tensor:
    return read_volume(path).data


def by_hand(cfg, class_id: int, grid: list[int]) -> torch.Tensor:
    """The latent (1, C, d, h, w) of a lone class and grid, by the library's parts."""
    (request,) = [r for r in list_requests(cfg) if (r.class_id, list(r.grid)) == (class_id, grid)]
    generator = noise_generator(cfg.seed, request)
    z = torch.randn((1, 4, *grid), generator=generator)
    flow = load_biflownet(cfg, cfg.model_ckpt)
    diffusion = GaussianDiffusion(4, TIMESTEPS)
    options = {"strategy": cfg.sampling_strategy, "ddim_steps": cfg.ddim_steps, "generator": generator}
    return diffusion.sample(flow, z, torch.tensor([class_id]), torch.tensor(grid) / cfg.vq_size, **options)


# What is written ----------------------------------------------------------------------------------------------------


def prepared(folder: Path, **classes: list[Intensity]) -> Path:
    """A dataset JSON of classes 0, 1, ... whose manifests have these intensities."""
    for name, intensities in classes.items():
        (folder / name).mkdir(parents=True)
        entries = [
            {**dict.fromkeys(KEYS, 0), "file": f"{i}", "intensity": one.record()} for i, one in enumerate(intensities)
        ]
        write_manifest(folder / name, entries)
    add_classes(folder, dict(enumerate(classes)))
    return folder / "Singleres_dataset.json"


def test_denormalize_writes_hounsfield_units_and_zero_to_one(models, tmp_path):
    plain = [voxels(path) for path in generate(config(models, tmp_path / "plain"))]
    window = Intensity("window", -200.0, 400.0, "HU")
    data = prepared(tmp_path, Chest=[window, window], Head=[Intensity("percentiles", 3.0, 70.0)])
    cfg = config(models, tmp_path / "units", denormalize=str(data))
    chest, head = generate(cfg)
    torch.testing.assert_close(voxels(chest), plain[0] * 300 + 100, atol=1e-2, rtol=0)
    torch.testing.assert_close(voxels(head), (plain[1] + 1) / 2, atol=1e-5, rtol=0)
    assert voxels(chest).max() > 100
    record = json.loads(chest.with_name("Chest_32x32x32.json").read_text())
    assert record["intensity"] == {"method": "window", "low": -200, "high": 400, "unit": "HU"}
    before = chest.stat().st_mtime_ns
    assert generate(cfg) == [chest, head]  # done already, and recognised as such
    assert chest.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(intensity"):
        generate(config(models, tmp_path / "units"))


def test_denormalize_needs_units_that_are_known(models, tmp_path):
    data = prepared(tmp_path, Chest=[Intensity("window", 0.0, 1.0), Intensity("window", 0.0, 2.0)])
    chest = [row(0, "Chest", CUBE)]
    with pytest.raises(UserError, match="prepared in different ways"):
        generate(config(models, tmp_path / "a", chest, denormalize=str(data)))
    with pytest.raises(UserError, match=r"denormalize: .*Singleres_dataset\.json has no class 1"):
        generate(config(models, tmp_path / "a", denormalize=str(data)))
    with pytest.raises(UserError, match=r"missing\.json: no such dataset JSON"):
        generate(config(models, tmp_path / "a", chest, denormalize=str(tmp_path / "missing.json")))
    assert not (tmp_path / "a").exists()


def test_files_axes_spacing_and_range(models, tmp_path):
    """Grid (z, x, y) = (8, 16, 24) at 4x is a NIfTI image of 64 x 96 x 32 voxels."""
    cfg = config(models, tmp_path, [row(1, "MRHead", WIDE, spacing=(0.7, 0.8, 2.0))], seed=5)
    (path,) = generate(cfg)
    assert path == tmp_path / "seed_5" / "MRHead_64x96x32.nii.gz"
    image = nib.load(path)
    assert image.shape == (64, 96, 32)
    assert image.get_data_dtype() == np.float32
    assert np.allclose(image.affine, np.diag([0.7, 0.8, 2.0, 1.0]))
    data = voxels(path)
    assert -1 <= data.min() < data.max() <= 1
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    raw = denormalise_latents(by_hand(cfg, 1, WIDE), autoencoder.codebook.embeddings)
    expected = autoencoder.decode(raw, quantize=True)[0]
    torch.testing.assert_close(data, expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert sorted(file.name for file in path.parent.iterdir()) == ["MRHead_64x96x32.json", path.name, "config.yaml"]
    reloaded = load_config(GenerationConfig, path.parent / "config.yaml")
    assert reloaded == cfg


def test_values_beyond_the_range_are_clamped(models, tmp_path, monkeypatch):
    monkeypatch.setattr(patchvolumeAE, "decode", lambda self, latent, quantize: 5 * torch.ones(1, 1, 32, 32, 32))
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    assert torch.equal(voxels(path), torch.ones(1, 32, 32, 32))


def test_ema_weights_are_used(models, tmp_path):
    swapped = torch.load(models / "flow.pt", weights_only=False)
    swapped["model"], swapped["ema"] = swapped["ema"], swapped["model"]
    torch.save(swapped, tmp_path / "swapped.pt")
    classes = [row(0, "Chest", CUBE)]
    (path,) = generate(config(models, tmp_path / "a", classes))
    (other,) = generate(config(models, tmp_path / "b", classes, model_ckpt=str(tmp_path / "swapped.pt")))
    assert not torch.allclose(voxels(path), voxels(other), atol=1e-2)


@pytest.mark.parametrize(("num_samples", "names"), [(1, ["A_32x32x32"]), (2, ["A_32x32x32_0", "A_32x32x32_1"])])
def test_numbers_of_samples(models, tmp_path, num_samples, names):
    paths = generate(config(models, tmp_path, [row(0, "A", CUBE)], num_samples=num_samples))
    assert [path.name for path in paths] == [f"{name}.nii.gz" for name in names]


def test_record_beside_a_volume(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(1, "Head", CUBE, spacing=(1.0, 1.0, 2.0))], seed=3, eta=0.5))
    record = json.loads((path.parent / "Head_32x32x32.json").read_text())
    assert {len(record.pop(name)) for name in ("AE_sha256", "model_sha256")} == {64}
    assert record == {
        "class_id": 1,
        "class_name": "Head",
        "grid": [8, 8, 8],
        "spacing_mm": [1.0, 1.0, 2.0],
        "sample": 0,
        "voxels": [32, 32, 32],
        "tile": None,
        "intensity": None,
        "seed": 3,
        "timesteps": 12,
        "sampling_strategy": "ddim",
        "ddim_steps": 3,
        "eta": 0.5,
        "guidance_scale": 1.0,
    }


# Noise --------------------------------------------------------------------------------------------------------------


def test_seed_class_and_sample_each_change_the_volume(models, tmp_path):
    paths = generate(config(models, tmp_path, num_samples=2))
    paths += generate(config(models, tmp_path, num_samples=2, seed=1))
    volumes = [voxels(path) for path in paths]
    assert len(volumes) == 8
    for i, volume in enumerate(volumes):
        assert all((volume - other).abs().mean() > 1e-3 for other in volumes[:i])


def test_noise_is_a_function_of_the_request_alone(models, tmp_path):
    cfg = config(models, tmp_path, num_samples=2)
    draws = [torch.randn(4, generator=noise_generator(0, request)) for request in list_requests(cfg)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    again = [torch.randn(4, generator=noise_generator(0, request)) for request in list_requests(cfg)[::-1]]
    assert all(torch.equal(a, b) for a, b in zip(draws, again[::-1], strict=True))


def test_batches_and_order_change_no_volume(models, tmp_path):
    """Three of one grid together, the last class first, beside volumes of another grid: each as it is alone."""
    chest, head = row(0, "Chest", CUBE, [8, 8, 16]), row(1, "Head", CUBE)
    together = generate(config(models, tmp_path / "a", [head, chest], num_samples=2, batch_size=3))
    alone = generate(config(models, tmp_path / "b", [chest, head], num_samples=2))
    assert {path.name for path in together} == {path.name for path in alone}
    for path in together:
        other = voxels(tmp_path / "b" / "seed_0" / path.name)
        # Rounding may move a latent over the border between two codes, which changes a few voxels around it.
        assert ((voxels(path) - other).abs() > 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("values", [{"sampling_strategy": "ddpm"}, {"eta": 1.0}])
def test_noise_drawn_on_the_way_is_each_volumes_own(models, tmp_path, values):
    together = generate(config(models, tmp_path / "a", batch_size=2, **values))
    alone = generate(config(models, tmp_path / "b", **values))
    for path, other in zip(together, alone, strict=True):
        assert ((voxels(path) - voxels(other)).abs() > 1e-4).float().mean() < 1e-3


def test_another_autoencoder_than_the_models_own_is_refused(models, tmp_path):
    cfg = config(models, tmp_path / "a")
    checkpoint = load_checkpoint(cfg.model_ckpt)
    own = latent_fingerprint(load_autoencoder(cfg.AE_ckpt))
    for name, fingerprint in (("own", own), ("other", "0" * 64)):
        save_checkpoint({**checkpoint, "autoencoder": fingerprint}, tmp_path / f"{name}.pt")
    generate(config(models, tmp_path / "b", model_ckpt=str(tmp_path / "own.pt")))
    with pytest.raises(UserError, match="not the autoencoder whose latents"):
        generate(config(models, tmp_path / "c", model_ckpt=str(tmp_path / "other.pt")))


def test_eta_reaches_the_sampler(models, tmp_path):
    classes = [row(0, "Chest", CUBE)]
    (path,) = generate(config(models, tmp_path / "a", classes))
    (noisy,) = generate(config(models, tmp_path / "b", classes, eta=1.0))
    assert not torch.allclose(voxels(path), voxels(noisy), atol=1e-3)


@pytest.mark.parametrize("vq_size", [64, 16])
def test_ddpm_is_ancestral_sampling_from_the_volumes_own_noise(models, tmp_path, vq_size):
    cfg = config(models, tmp_path, sampling_strategy="ddpm", vq_size=vq_size)
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    raw = denormalise_latents(by_hand(cfg, 1, CUBE), autoencoder.codebook.embeddings)
    expected = autoencoder.decode(raw, quantize=True)[0].clamp(-1, 1)
    torch.testing.assert_close(voxels(generate(cfg)[1]), expected, rtol=1e-5, atol=1e-5)


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_single_pass", "tiled"), [(8, False), (7, True)])
def test_larger_latents_are_decoded_in_tiles(models, tmp_path, max_single_pass, tiled):
    classes = [row(0, "Chest", CUBE)]
    cfg = config(models, tmp_path, classes, max_single_pass=max_single_pass, tile=16)
    (path,) = generate(cfg)
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    raw = denormalise_latents(by_hand(cfg, 0, CUBE), autoencoder.codebook.embeddings)
    one_pass = autoencoder.decode(raw, quantize=True)[0].clamp(-1, 1)
    in_tiles = autoencoder.decode_sliding(raw, quantize=True, patch_size=16)[0].clamp(-1, 1)
    expected, other = (in_tiles, one_pass) if tiled else (one_pass, in_tiles)
    torch.testing.assert_close(voxels(path), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(voxels(path), other, atol=1e-3)


# Guidance -----------------------------------------------------------------------------------------------------------


def test_guidance_with_a_null_label(tmp_path):
    models = save_models(tmp_path / "models", null_label=True)
    classes = [row(0, "Chest", CUBE)]
    (path,) = generate(config(models, tmp_path / "a", classes))
    (guided,) = generate(config(models, tmp_path / "b", classes, guidance_scale=4.0))
    assert not torch.allclose(voxels(path), voxels(guided), atol=1e-3)


def test_guidance_without_a_null_label_is_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"guidance_scale is 2.0, but .*flow.pt has no null label"):
        generate(config(models, tmp_path, guidance_scale=2.0))
    assert not list(tmp_path.iterdir())


# Volumes that are there ---------------------------------------------------------------------------------------------


def test_whole_volumes_are_kept_and_all_others_made_again(models, tmp_path):
    paths = generate(config(models, tmp_path, num_samples=2))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    whole, truncated, missing, other_size = paths
    truncated.write_bytes(truncated.read_bytes()[:-10])
    missing.unlink()
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)), other_size)
    assert generate(config(models, tmp_path, num_samples=2)) == paths
    for path, (content, mtime) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == mtime) == (path == whole)


def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    """The second volume cannot be written; the same command later makes it alone."""
    write, written = generation.write_volume, []

    def full_disk(path, *args):
        if written:
            raise UserError(f"{path}: cannot be written (No space left on device)")
        written.append(path)
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_volume", full_disk)
        with pytest.raises(UserError, match="No space left"):
            generate(config(models, tmp_path))
    time = written[0].stat().st_mtime_ns
    paths = generate(config(models, tmp_path))
    assert all(path.is_file() for path in paths)
    assert paths[0].stat().st_mtime_ns == time


def test_a_larger_table_keeps_what_is_there(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(1, "Head", CUBE)]))
    time = path.stat().st_mtime_ns
    assert len(generate(config(models, tmp_path))) == 2
    assert path.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ddim_steps": 4}, r"other settings \(ddim_steps: ddim_steps was 3, is 4\)"),
        ({"classes": [row(1, "Chest", CUBE)]}, r"class_id was 0, is 1"),
        ({"classes": [row(0, "Chest", CUBE, spacing=(1.0, 1.0, 3.0))]}, "spacing_mm was"),
    ],
)
def test_volumes_of_other_settings_are_not_taken_for_done(models, tmp_path, values, message):
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    with pytest.raises(UserError, match=message):
        generate(config(models, tmp_path, **{"classes": [row(0, "Chest", CUBE)], **values}))


def test_other_weights_are_other_settings(models, tmp_path):
    classes = [row(0, "Chest", CUBE)]
    generate(config(models, tmp_path, classes))
    other = torch.load(models / "flow.pt", weights_only=False)
    other["ema"]["init_conv.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="model_sha256"):
        generate(config(models, tmp_path, classes, model_ckpt=str(tmp_path / "other.pt")))


def test_volumes_of_unknown_settings_are_not_taken_for_done(models, tmp_path):
    (path,) = generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))
    (path.parent / "Chest_32x32x32.json").unlink()
    with pytest.raises(UserError, match=r"Chest_32x32x32.nii.gz: how this volume was made is not known"):
        generate(config(models, tmp_path, [row(0, "Chest", CUBE)]))


def test_processes_share_the_volumes_out(models, tmp_path, monkeypatch):
    alone = generate(config(models, tmp_path / "alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(31500 + os.getpid() % 2000))
    write = generation.write_volume

    def rank(number: int) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
        written = []
        generation.write_volume = lambda path, *args: written.append(path.name) or write(path, *args)
        generate(config(models, tmp_path / "shared"))
        (tmp_path / f"rank{number}").write_text(" ".join(written))

    fork = multiprocessing.get_context("fork")  # children share the loaded modules
    children = [fork.Process(target=rank, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [(tmp_path / f"rank{number}").read_text() for number in range(2)] == [path.name for path in alone]
    for path in alone:
        assert (tmp_path / "shared" / "seed_0" / path.name).read_bytes() == path.read_bytes()


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"AE_ckpt": ""}, "required but not set: AE_ckpt"),
        ({"AE_ckpt": "none.ckpt"}, "none.ckpt: no such checkpoint"),
        ({"model_ckpt": "none.pt"}, "none.pt: no such checkpoint"),
        ({"downsample": 8}, r"ae.ckpt: this autoencoder compresses by 4x, 8x is needed"),
        ({"volume_channels": 8}, r"ae.ckpt: its latents have 4 channels, volume_channels is 8"),
        ({"model_dim": 48}, r"flow.pt: the weights do not fit"),
        ({"timesteps": 20}, r"timesteps is 20, but .*flow.pt was trained with 12"),
        ({"classes": []}, "classes is empty"),
        ({"classes": [row(2, "Knee", CUBE)]}, r"id must be below num_classes 2, got 2"),
        ({"classes": [row(0, "A", CUBE), row(1, "A", CUBE)]}, r"two entries would both write .*A_32x32x32.nii.gz"),
        ({"tile": 30}, "tile is 30: it has to be a multiple of downsample 4"),
        ({"sampling_strategy": "euler"}, "sampling_strategy must be one of"),
        pytest.param(
            {"device": "cuda"},
            "no usable GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU"),
        ),
    ],
)
def test_mistakes_are_found_before_any_work(models, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        generate(config(models, tmp_path, **values))
    assert not list(tmp_path.iterdir())


def test_checkpoints_in_each_others_place(models, tmp_path):
    places = {"AE_ckpt": str(models / "flow.pt"), "model_ckpt": str(models / "ae.ckpt")}
    with pytest.raises(UserError, match=r"flow.pt: a BiFlowNet checkpoint, expected an autoencoder"):
        generate(config(models, tmp_path, **places))


@pytest.mark.parametrize(
    ("grid", "nearest"), [([8, 16, 16], [16, 16, 16]), ([40, 16, 24], [32, 16, 32]), ([16, 56, 16], [16, 64, 16])]
)
def test_grids_the_network_cannot_do(models, tmp_path, grid, nearest):
    """Six levels, of which two keep their width, halve the grid four times: multiples of 16."""
    cfg = config(models, tmp_path, [row(0, "Chest", grid)], dim_mults=[1, 1, 2, 2, 2, 2], use_attn=[0] * 6)
    with pytest.raises(UserError) as error:
        check_grids(build_biflownet(cfg), list_requests(cfg))
    assert str(error.value) == (
        f"classes: Chest: the network cannot do the latent grid {grid}, only multiples of [16, 16, 16]: "
        f"the nearest is {nearest}"
    )


def test_grids_are_checked_before_any_work(models, tmp_path, monkeypatch):
    load_models = generation.load_models

    def deeper_models(*args):
        autoencoder, model = load_models(*args)
        model.down_factor = 16
        return autoencoder, model

    monkeypatch.setattr(generation, "load_models", deeper_models)
    with pytest.raises(UserError, match=r"Chest: the network cannot do the latent grid \[8, 8, 8\]"):
        generate(config(models, tmp_path))
    assert not list(tmp_path.iterdir())


def test_nan_is_never_written(models, tmp_path):
    diverged = torch.load(models / "flow.pt", weights_only=False)
    diverged["ema"]["init_conv.bias"].fill_(torch.nan)
    torch.save(diverged, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"Chest_32x32x32.nii.gz: .*nan.pt .* give NaN"):
        generate(config(models, tmp_path / "out", model_ckpt=str(tmp_path / "nan.pt")))
    assert not list((tmp_path / "out").glob("**/*.nii.gz"))


# Scripts ------------------------------------------------------------------------------------------------------------


def arguments(models: Path, output_dir: Path) -> list[str]:
    """The published flags, with values for the tiny models; what has no flag comes as overrides."""
    table = "classes=[{id: 1, name: Head, grids: [[8, 8, 8]], spacings_mm: [[1, 1, 1]]}]"
    files = [
        "--AE-ckpt",
        str(models / "ae.ckpt"),
        "--model-ckpt",
        str(models / "flow.pt"),
        "--output-dir",
        str(output_dir),
    ]
    model = (
        "--timesteps 12 --model-dim 24 --patch-size 2 --num-dit 1 --dim-mults 1 1 2 --use-attn 0 0 1 --num-classes 2"
    )
    sampling = "--sampling-strategy ddim --ddim_steps 3 --loss-type l1 --volume-channels 4 --vq-size 64 --seed 7"
    overrides = ["resnet_groups=8", "dit_num_heads=4", "attn_heads=2", "device=cpu", table]
    return [*files, *model.split(), *sampling.split(), *overrides]


def test_4x_script(models, tmp_path):
    class_conditional_generation_4x.main(arguments(models, tmp_path))
    (expected,) = generate(config(models, tmp_path / "config", [row(1, "Head", CUBE)], seed=7))
    assert (tmp_path / "seed_7" / "Head_32x32x32.nii.gz").read_bytes() == expected.read_bytes()


def test_8x_script_refuses_a_4x_autoencoder(models, tmp_path):
    with pytest.raises(UserError, match=r"ae.ckpt: this autoencoder compresses by 4x, 8x is needed"):
        class_conditional_generation.main(arguments(models, tmp_path))


@pytest.mark.parametrize(
    ("script", "downsample", "max_single_pass", "patch_size", "edge"),
    [(class_conditional_generation, 8, 32, 1, 256), (class_conditional_generation_4x, 4, 64, 2, 256)],
)
def test_scripts_start_from_their_class_table(monkeypatch, script, downsample, max_single_pass, patch_size, edge):
    seen = []
    monkeypatch.setattr(generation, "generate", seen.append)
    script.main(["--AE-ckpt", "a", "--model-ckpt", "b", "--output-dir", "out"])
    (cfg,) = seen
    assert (cfg.downsample, cfg.max_single_pass, cfg.patch_size) == (downsample, max_single_pass, patch_size)
    requests = list_requests(cfg)
    names = [request.path.name for request in requests]
    assert names == [
        "CTHeadNeck_256x256x256.nii.gz",
        "CTHeadNeck_256x256x128.nii.gz",
        "CTChestAbdomen_256x256x256.nii.gz",
        "CTChestAbdomen_512x512x512.nii.gz",
        "CTLegs_256x256x256.nii.gz",
        "CTLegs_256x256x512.nii.gz",
        "MRT1Brain_192x192x192.nii.gz",
        "MRT2Brain_192x192x192.nii.gz",
        "MRAbdomen_256x256x128.nii.gz",
        "MRKnee_320x320x64.nii.gz",
    ]
    assert [request.path.name for request in requests if request.tile] == [names[3], names[5]]


def test_script_runs_from_anywhere(tmp_path):
    script = ROOT / "evaluation" / "class_conditional_generation.py"
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: required but not set: AE_ckpt")

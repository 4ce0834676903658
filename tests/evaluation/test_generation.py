"""Class-conditional generation with tiny random models: what is drawn and decoded, and what is refused."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from generation_models import CUBE, TIMESTEPS, WIDE, config, row, save_models, voxels
from report_results import shown_in

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.autoencoder import Autoencoder
from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from config.loading import load_config
from config.schema.diffusion import GenerationConfig
from ddpm.checkpoint import load_biflownet
from ddpm.diffusion import GaussianDiffusion
from evaluation import class_conditional_generation, class_conditional_generation_4x
from evaluation.generation import run as generation
from evaluation.generation.requests import list_requests, noise_generator
from evaluation.generation.run import generate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def by_hand(cfg, class_id: int, grid: list[int]) -> torch.Tensor:
    """The latent (1, C, d, h, w) of a lone class and grid, by the library's parts."""
    (request,) = [r for r in list_requests(cfg) if (r.class_id, list(r.grid)) == (class_id, grid)]
    generator = noise_generator(request)
    z = torch.randn((1, 4, *grid), generator=generator)
    flow = load_biflownet(cfg, cfg.model_ckpt)
    diffusion = GaussianDiffusion(4, TIMESTEPS)
    options = {"strategy": cfg.sampling_strategy, "ddim_steps": cfg.ddim_steps, "generator": generator}
    return diffusion.sample(flow, z, torch.tensor([class_id]), torch.tensor(grid) / cfg.vq_size, **options)


# What is written ----------------------------------------------------------------------------------------------------


def test_files_axes_spacing_and_range(models, tmp_path):
    """Grid (z, x, y) = (8, 16, 24) at 4x is a NIfTI image of 64 x 96 x 32 voxels."""
    cfg = config(models, tmp_path, [row(1, "MRHead", WIDE, spacing=(0.7, 0.8, 2.0))], seed=5)
    (path,) = generate(cfg)
    assert path == tmp_path / "seed_5" / "MRHead_64x96x32.nii.gz"
    image = nib.load(path)
    assert image.shape == (64, 96, 32)
    assert image.get_data_dtype() == np.float32
    middle = (np.array(image.shape) - 1) / 2
    assert np.allclose(image.affine[:3, :3], np.diag([0.7, 0.8, 2.0]))
    assert np.allclose(image.affine @ [*middle, 1], [0, 0, 0, 1], atol=1e-5)
    data = voxels(path)
    assert -1 <= data.min() < data.max() <= 1
    autoencoder = load_autoencoder(cfg.AE_ckpt)
    raw = denormalise_latents(by_hand(cfg, 1, WIDE), autoencoder.codebook.embeddings)
    expected = autoencoder.decode(raw, quantize=True)[0]
    torch.testing.assert_close(data, expected.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "MRHead_64x96x32.json",
        path.name,
        "config.yaml",
        "contact_sheet.png",
        "view.html",
    ]
    ((panel,),) = [entry["panels"] for entry in shown_in(path.parent)]
    assert (panel["role"], panel["file"], panel["range"]) == ("generated", path.name, [-1, 1])
    reloaded = load_config(GenerationConfig, path.parent / "config.yaml")
    assert reloaded == cfg


def test_values_beyond_the_range_are_clamped(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Autoencoder, "decode", lambda self, latent, quantize, max_bytes: 5 * torch.ones(1, 1, 32, 32, 32)
    )
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
    draws = [torch.randn(4, generator=noise_generator(request)) for request in list_requests(cfg)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    again = [torch.randn(4, generator=noise_generator(request)) for request in list_requests(cfg)[::-1]]
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


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"AE_ckpt": ""}, "required but not set: AE_ckpt"),
        ({"AE_ckpt": "none.ckpt"}, "none.ckpt: no such file"),
        ({"model_ckpt": "none.pt"}, "none.pt: no such file"),
        ({"downsample": 8}, r"ae.ckpt: this autoencoder compresses by 4x, 8x is needed"),
        ({"volume_channels": 8}, r"ae.ckpt: its latents have 4 channels, volume_channels is 8"),
        ({"model_dim": 48}, r"flow.pt: the weights do not fit"),
        ({"timesteps": 20}, r"timesteps is 20, but .*flow.pt was trained with 12"),
        ({"classes": []}, "classes is empty"),
        ({"classes": [row(2, "Knee", CUBE)]}, r"id must be below num_classes 2, got 2"),
        ({"classes": [row(0, "A", [8, 8, 8], [8, 8, 8])]}, r"classes: A: asks for .*A_32x32x32.nii.gz a second time"),
        (
            {"classes": [row(0, "A", CUBE), row(1, "A", CUBE)]},
            r"asks for .*A_32x32x32.nii.gz a second time, after A: give",
        ),
        ({"tile": 30, "decoding": "tiles"}, "tile is 30: it has to be a multiple of downsample 4"),
        ({"sampling_strategy": "heun"}, "sampling_strategy must be one of"),
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
    assert not [request for request in requests if request.tile or request.decoding != "exact"]
    cfg.decoding = "tiles"
    tiled = [request for request in list_requests(cfg) if request.tile]
    assert [request.path.name for request in tiled] == [names[3], names[5]]
    assert {(request.decoding, request.tile) for request in tiled} == {("tiles", 256)}


def test_script_runs_from_anywhere(tmp_path):
    script = ROOT / "evaluation" / "class_conditional_generation.py"
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: required but not set: AE_ckpt")

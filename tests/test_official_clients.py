"""Clients that call our modules as the official scripts do, one for each of their entry points.

Written from what those scripts are said to call, with tiny models on the CPU; configs hold official keys only. Each
client goes on with the files of the one before, and its results are those of our own scripts.
"""

import copy
import json
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from configs import tiny_autoencoder
from latent_runs import config
from torch.utils.data import DataLoader

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.PatchVolume import AE_finetuning, patchvolumeAE
from common.errors import UserError
from dataset.Singleres_dataset import Singleres_dataset
from dataset.tr_generate import GenerateTrData_dataset
from dataset.volumes.volume_io import read_latent, write_volume
from dataset.vqgan_4x import VQGANDataset_4x
from ddpm import BiFlowNet
from ddpm.BiFlowNet import GaussianDiffusion
from ddpm.checkpoint import load_biflownet_weights
from train.latents.encoding import generate_latents

BIFLOWNET = dict(
    dim=24,
    dim_mults=(1, 1, 2),
    channels=4,
    init_kernel_size=3,
    cond_classes=2,
    learn_sigma=False,
    use_sparse_linear_attn=(0, 0, 1),
    vq_size=64,
    num_mid_DiT=1,
    patch_size=2,
)
GRID = (8, 8, 8)


class OfficialLogger(pl.Callback):
    """Evaluates for a while, asks the model for volumes and sets all of it to training afterwards."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.eval()
        with torch.no_grad():
            volumes = pl_module.log_volumes(batch, split="train")
        self.logged.append((batch["data"], volumes, copy.deepcopy(pl_module.state_dict())))
        pl_module.train()


def fit(model: patchvolumeAE, cfg, folder: Path, *callbacks: pl.Callback) -> Path:
    """Both sides of the data, a Trainer with the official callbacks; returns the best checkpoint."""
    loaders = []
    for split, batch_size in (("train", cfg.model.batch_size), ("val", 1)):
        data = VQGANDataset_4x(
            root_dir=cfg.dataset.root_dir,
            augmentation=split == "train",
            split=split,
            stage=cfg.model.stage,
            patch_size=cfg.dataset.patch_size,
        )
        loaders.append(DataLoader(data, batch_size=batch_size, shuffle=split == "train", num_workers=0))
    best = pl.callbacks.ModelCheckpoint(
        monitor="val/recon_loss", save_top_k=3, mode="min", filename="best-{epoch}-{step}", dirpath=folder
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[best, *callbacks],
        max_steps=4,
        precision=cfg.model.precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, *loaders)
    return Path(best.best_model_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of volumes of 32³ in [-1, 1], as the JSON that names them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("CT", "MR"):
        for i in range(3):
            volume = torch.rand((32, 32, 32), generator=torch.Generator().manual_seed(i)) * 2 - 1
            volume[:4] = -1
            write_volume(folder / name / f"{i}.nii.gz", volume, np.eye(4))
    (folder / "data.json").write_text(json.dumps({"0": "CT", "1": "MR"}))
    return folder / "data.json"


def official_config(data: Path, **model):
    cfg = tiny_autoencoder(discriminator_iter_start=0, **model)
    cfg.dataset.root_dir = str(data)
    return cfg


@pytest.fixture(scope="module")
def stage_1(data, tmp_path_factory) -> tuple[Path, OfficialLogger]:
    pl.seed_everything(1234, verbose=False)
    cfg, logger = official_config(data), OfficialLogger()
    return fit(patchvolumeAE(cfg), cfg, tmp_path_factory.mktemp("stage_1"), logger), logger


@pytest.fixture(scope="module")
def stage_2(data, stage_1, tmp_path_factory) -> tuple[Path, OfficialLogger]:
    cfg, logger = official_config(data, stage=2, batch_size=1, lr=0.01), OfficialLogger()
    del cfg.model.downsample  # which is that of stage 1
    cfg.model.resume_from_checkpoint = str(stage_1[0])
    model = patchvolumeAE.load_from_checkpoint(cfg.model.resume_from_checkpoint)
    model.cfg = cfg
    return fit(model, cfg, tmp_path_factory.mktemp("stage_2"), AE_finetuning(), logger), logger


@pytest.fixture(scope="module")
def latents(data, stage_1) -> Path:
    """Latents of all volumes beside their folders, by the official encoding, as a JSON."""
    model = patchvolumeAE.load_from_checkpoint(str(stage_1[0])).eval()
    low, high = model.codebook.embeddings.min(), model.codebook.embeddings.max()
    volumes = Singleres_dataset(root_dir=str(data), generate_latents=True)
    for volume, paths in DataLoader(volumes, batch_size=2, num_workers=0):
        with torch.no_grad():
            z = model.patch_encode(volume, quantize=False, patch_size=16)
        z = 2 * (z - low) / (high - low) - 1
        for latent, path in zip(z, map(Path, paths), strict=True):
            target = path.parent.with_name(f"{path.parent.name}_latents") / path.name
            target.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(latent.permute(1, 2, 3, 0).numpy(), np.eye(4)), target)
    path = data.with_name("latents.json")
    path.write_text(json.dumps({"0": "CT_latents", "1": "MR_latents"}))
    return path


@pytest.fixture(scope="module")
def flow(latents, tmp_path_factory) -> Path:
    """Three steps of the official loop, and its checkpoint."""
    torch.manual_seed(0)
    model = BiFlowNet(**BIFLOWNET)
    diffusion = GaussianDiffusion(channels=4, timesteps=10, loss_type="l1")
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    data = Singleres_dataset(root_dir=str(latents), resolution=list(GRID))
    for z, y, res in DataLoader(data, batch_size=2, shuffle=True, drop_last=True):
        t = torch.randint(0, diffusion.num_timesteps, (z.shape[0],))
        loss = diffusion.p_losses(model, z, t, y=y, res=res)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            averaged.mul_(0.995).add_(parameter.detach(), alpha=0.005)
    states = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "epoch": 0}
    path = tmp_path_factory.mktemp("flow") / "BiFlowNet_0000003.pt"
    torch.save(states, path)
    return path


def test_stage_1(data, stage_1):
    path, logger = stage_1
    assert path.is_file()
    assert len(logger.logged) == 4
    for batch, volumes, weights in logger.logged:
        assert batch.shape == (2, 1, 16, 16, 16)
        assert list(volumes) == ["inputs", "reconstructions"]
        assert torch.equal(volumes["inputs"], batch)
        then = patchvolumeAE(official_config(data)).eval()
        then.load_state_dict(weights)
        with torch.no_grad():
            torch.testing.assert_close(volumes["reconstructions"], then(batch)[0])


def test_stage_2(stage_1, stage_2):
    """Only the decoder's side is trained, on whole volumes, although a callback sets all of it to training."""
    begin, (path, logger) = torch.load(stage_1[0], weights_only=False)["state_dict"], stage_2
    end = logger.logged[-1][2]
    changed = {name.split(".")[0] for name in begin if not torch.equal(begin[name], end[name])}
    assert changed == {"decoder", "post_vq_conv", "volume_discriminator"}
    assert all(volumes["reconstructions"].shape == (1, 1, 32, 32, 32) for _, volumes, _ in logger.logged)
    saved = torch.load(path, weights_only=False)["hyper_parameters"]["cfg"].model
    assert (saved.stage, list(saved.downsample), saved.lr_schedule) == (2, [4, 4, 4], "constant")
    assert load_autoencoder(path, downsample=4).stage == 2


def test_a_config_of_other_networks_cannot_be_set(data, stage_1):
    model = patchvolumeAE.load_from_checkpoint(str(stage_1[0]))
    for change, message in (
        ({"n_codes": 64}, "model.n_codes is 64, but the networks of this autoencoder were built with 32"),
        ({"stage": 3}, "model.stage is 3, expected 1 or 2"),
        ({"disc_loss_type": "x"}, "model.disc_loss_type is 'x', expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            model.cfg = official_config(data, **change)
    model.cfg = official_config(data, lr_schedule="cosine", l1_weight=3)
    official = official_config(data)
    del official.model.l1_weight
    model.cfg = official
    assert (model.cfg.model.lr_schedule, model.cfg.model.l1_weight) == ("constant", 3)  # the default of ours; kept
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        model.load_from_checkpoint(str(stage_1[0]))


def test_damaged_weights_are_noticed(stage_1, tmp_path):
    content = bytearray(stage_1[0].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt: damaged: .* is no longer what was saved"):
        patchvolumeAE.load_from_checkpoint(str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint file"),
        (b"no checkpoint", "not a readable checkpoint"),
        (pickle.dumps(os.getcwd, protocol=2), "not a readable checkpoint|could run code"),
    ],
    ids=["missing", "junk", "code"],
)
def test_a_checkpoint_that_cannot_be_loaded_is_a_users_mistake(tmp_path, content, message):
    """And nobody is told to let the file run code, as torch advises."""
    path = tmp_path / "a.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        patchvolumeAE.load_from_checkpoint(str(path))
    assert "weights_only" not in str(caught.value)


def test_encoding(data, stage_1, latents, tmp_path):
    """The latents are those of our script."""
    theirs = [read_latent(path) for path in Singleres_dataset(latents, GRID).files]
    for name in ("CT", "MR"):
        (tmp_path / name).symlink_to(data.parent / name)
    (tmp_path / "data.json").write_text(data.read_text())
    ours = [read_latent(path) for path in generate_latents(config(tmp_path / "data.json", stage_1[0]))]
    torch.testing.assert_close(torch.stack(theirs), torch.stack(ours), atol=1e-5, rtol=1e-5)


def test_encoding_of_official_data(data, stage_1, latents, tmp_path):
    """Files of [0, 1] are refused, and once they are declared the latents are the same."""
    for volume, path in GenerateTrData_dataset(str(data.parent / "CT")):
        write_volume(tmp_path / "CT" / Path(path).name, (volume + 1) / 2, np.eye(4))
    (tmp_path / "data.json").write_text('{"0": "CT"}')
    with pytest.raises(UserError, match=r"dataset.intensity_range=\[0,1\] fits"):
        Singleres_dataset(root_dir=str(tmp_path / "data.json"), generate_latents=True)
    volumes = Singleres_dataset(str(tmp_path / "data.json"), generate_latents=True, intensity_range=(0, 1))
    model = patchvolumeAE.load_from_checkpoint(str(stage_1[0])).eval()
    low, high = model.codebook.embeddings.min(), model.codebook.embeddings.max()
    z = model.patch_encode_sliding(volumes[0][0][None], quantize=False, patch_size=16, sliding_window=4)
    expected = read_latent(data.parent / "CT_latents" / "0.nii.gz")
    torch.testing.assert_close((2 * (z - low) / (high - low) - 1)[0], expected, atol=1e-4, rtol=1e-4)


def test_biflownet_training(latents, flow):
    """The loss is that of the formula; our scripts take the checkpoint."""
    saved = torch.load(flow)
    model, diffusion = BiFlowNet(**BIFLOWNET), GaussianDiffusion(channels=4, timesteps=10, loss_type="l1")
    model.load_state_dict(saved["model"])
    z, y, res = next(iter(DataLoader(Singleres_dataset(str(latents), resolution=list(GRID)), batch_size=2)))
    noise, t = torch.randn_like(z), torch.tensor([1, 8])
    loss = diffusion.p_losses(model, z, t, y=y, res=res, noise=noise)
    expected = (model(diffusion.q_sample(z, t, noise), t, y=y, res=torch.full((2, 3), 8 / 64)) - noise).abs().mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(y, torch.zeros(2, dtype=torch.int64))
    load_biflownet_weights(model, flow)
    assert all(torch.equal(value, saved["ema"][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["ddpm", "ddim"])
def test_generation(stage_2, flow, tmp_path, strategy):
    """The volume is that of the same latent by our own loader, whole and in tiles of the whole size."""
    model = BiFlowNet(**BIFLOWNET).eval()
    model.load_state_dict(torch.load(flow)["ema"])
    assert isinstance(model, BiFlowNet)
    diffusion = GaussianDiffusion(channels=4, timesteps=10, loss_type="l1")
    decoder = patchvolumeAE.load_from_checkpoint(str(stage_2[0])).eval()
    torch.manual_seed(0)
    z = torch.randn(1, 4, *GRID)
    y, res = torch.tensor([1]), torch.tensor(GRID) / 64
    with torch.no_grad():
        samples = diffusion.sample(
            denoise_fn=model, z=z, y=y, res=res, strategy=strategy, **({"ddim_steps": 3} if strategy == "ddim" else {})
        )
        low, high = decoder.codebook.embeddings.min(), decoder.codebook.embeddings.max()
        raw = (samples + 1) / 2 * (high - low) + low
        volume = decoder.decode(raw, quantize=True)
        tiles = decoder.decode_sliding(raw, quantize=True, patch_size=32, sliding_window=1, compress_ratio=4)
        expected = load_autoencoder(stage_2[0]).decode(raw)
    assert volume.shape == (1, 1, 32, 32, 32)
    assert samples.abs().max() <= 1.001
    torch.testing.assert_close(volume, expected)
    torch.testing.assert_close(tiles, expected)

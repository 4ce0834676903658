"""The library as the README shows it: a NIfTI file to a latent and back, whatever its axes."""

import re
from pathlib import Path

import latent_runs
import nibabel as nib
import numpy as np
import pytest
import torch

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.decoding import decode
from AutoEncoder.encoding import encode
from AutoEncoder.latents import denormalise_latents
from dataset.volumes.volume_io import read_volume, write_volume

ROOT = Path(__file__).parents[2]
AFFINE = np.array([[0, -2.0, 0, 40], [1.5, 0, 0, -20], [0, 0, 3.0, 7], [0, 0, 0, 1]])


@pytest.fixture
def autoencoder(tmp_path):
    return load_autoencoder(latent_runs.save_autoencoder(tmp_path / "ae.ckpt"))


def test_the_example_of_the_readme_keeps_axes_size_and_affine(tmp_path, monkeypatch):
    """A file of three different sides that don't divide into patches; X, Y, Z by nibabel alone."""
    checkpoint = tmp_path / "results" / "PatchVolume_8x_s2" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    latent_runs.save_autoencoder(checkpoint)
    array = np.random.default_rng(0).uniform(-1, 1, (20, 12, 16)).astype(np.float32)  # (X, Y, Z)
    path = tmp_path / "data" / "phantoms" / "CTChest" / "CTChest_0000.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names := {})
    found = nib.load(tmp_path / "decoded.nii.gz")
    np.testing.assert_array_equal(found.affine, AFFINE)
    volume = torch.from_numpy(array.transpose(2, 0, 1).copy())[None, None]  # (1, 1, Z, X, Y)
    expected = load_autoencoder(checkpoint).reconstruct(volume)[0, 0].clamp(-1, 1).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(found.get_fdata(), expected, atol=1e-5)
    assert names["latent"].shape == (4, 4, 8, 4)  # patches of 16 voxels, compressed four times


def test_a_batch_has_the_latents_of_its_volumes(autoencoder):
    volumes = torch.rand(2, 1, 16, 32, 16) * 2 - 1
    batch = encode(autoencoder, volumes)
    for latent, volume in zip(batch, volumes, strict=True):
        torch.testing.assert_close(encode(autoencoder, volume, sliding_window=None), latent)
    raw = denormalise_latents(batch, autoencoder.codebook.embeddings)
    torch.testing.assert_close(raw, autoencoder.patch_encode(volumes))
    assert decode(autoencoder, batch[0]).shape == (1, 16, 32, 16)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (torch.zeros(16, 16, 16), r"got an array \(16, 16, 16\), expected \(1, D, H, W\) .* read_model_volume, which"),
        (torch.zeros(16, 16, 16, 1), r"got an array \(16, 16, 16, 1\)"),
        (torch.zeros(2, 3, 16, 16, 16), r"got an array \(2, 3, 16, 16, 16\)"),
        (torch.full((1, 16, 16, 16), 40.0), r"got intensities 40 to 40, expected \[-1, 1\]"),
        (torch.full((1, 16, 16, 16), torch.nan), "got intensities nan to nan"),
    ],
)
def test_arrays_that_are_no_volumes_of_the_model_are_refused(autoencoder, volume, message):
    with pytest.raises(ValueError, match=message):
        encode(autoencoder, volume)


def test_data_in_the_order_of_a_file_do_not_get_its_affine(tmp_path):
    array = np.zeros((4, 5, 6), np.float32)  # (X, Y, Z)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    for data in (array, np.zeros((8, 8, 8))):
        with pytest.raises(ValueError, match=r"a.nii.gz has \(D, H, W\) = \(6, 4, 5\), D = z, .* turn NIfTI's X, Y, Z"):
            write_volume(tmp_path / "b.nii.gz", data, volume)
    assert not (tmp_path / "b.nii.gz").exists()
    write_volume(tmp_path / "b.nii.gz", volume.data, volume)
    assert nib.load(tmp_path / "b.nii.gz").shape == (4, 5, 6)

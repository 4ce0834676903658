"""NIfTI files: axes, ranges, latents in TorchIO's layout, and every kind of unfit file refused by name."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torchio as tio

from common.errors import UserError
from dataset.volumes import volume_io
from dataset.volumes.geometry import affine_from_spacing, crop_affine
from dataset.volumes.index import list_volumes
from dataset.volumes.intensity import from_model_range, to_model_range
from dataset.volumes.volume_io import (
    is_whole_volume,
    nifti_to_tensor,
    read_header,
    read_latent,
    read_latent_header,
    read_model_volume,
    read_volume,
    tensor_to_nifti,
    write_latent,
    write_volume,
)

SHAPE = (4, 5, 6)  # X, Y, Z


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)


# Axes and ranges


def test_axes_known_answer_and_round_trip(array):
    tensor = nifti_to_tensor(array)
    assert tensor.shape == (6, 4, 5)
    assert tensor[3, 1, 2] == array[1, 2, 3]
    assert np.array_equal(tensor_to_nifti(tensor), array)
    batch = torch.from_numpy(array)[None, None]
    assert nifti_to_tensor(batch).shape == (1, 1, 6, 4, 5)
    assert torch.equal(tensor_to_nifti(nifti_to_tensor(batch)), batch)


def test_volume_round_trip_and_nibabel_agree(tmp_path, array):
    affine = affine_from_spacing((1.25, 0.7, 3))
    volume = read_volume(save(tmp_path / "a.nii.gz", array, affine))
    assert volume.data.shape == (1, 6, 4, 5)
    assert volume.data.dtype == torch.float32
    write_volume(tmp_path / "sub" / "b.nii.gz", volume.data, volume.affine)
    image = nib.load(tmp_path / "sub" / "b.nii.gz")
    assert np.array_equal(image.get_fdata(dtype=np.float32), array)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_allclose(image.header.get_zooms(), (1.25, 0.7, 3))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float64])
def test_other_voxel_types(tmp_path, dtype):
    array = np.arange(120).reshape(SHAPE).astype(dtype)
    data = read_volume(save(tmp_path / "a.nii.gz", array)).data
    assert np.array_equal(tensor_to_nifti(data[0]).numpy(), array.astype(np.float32))


def test_scaled_integers_and_nifti2(tmp_path):
    image = nib.Nifti2Image(np.arange(120, dtype=np.int16).reshape(SHAPE), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    stored = nib.load(tmp_path / "a.nii.gz").get_fdata(dtype=np.float32)
    assert np.array_equal(tensor_to_nifti(read_volume(tmp_path / "a.nii.gz").data[0]).numpy(), stored)
    assert read_header(tmp_path / "a.nii.gz").tensor_shape == (6, 4, 5)


def test_header_reads_no_voxels(tmp_path, array):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).random((32, 32, 16)), affine_from_spacing((1, 2, 3)))
    path.write_bytes(path.read_bytes()[:4096])
    header = read_header(path)
    assert header.tensor_shape == (16, 32, 32)
    np.testing.assert_allclose(np.diag(header.affine), (1, 2, 3, 1))


def test_trailing_axis_of_length_one_is_accepted(tmp_path, array):
    path = save(tmp_path / "a.nii.gz", array[..., None])
    assert read_header(path).tensor_shape == (6, 4, 5)
    assert read_volume(path).data.shape == (1, 6, 4, 5)


@pytest.mark.parametrize(
    ("intensity_range", "value", "expected"),
    [
        ((-1, 1), 0.25, 0.25),
        ((0, 1), 0.25, -0.5),
        ((-1000, 1000), 40, 0.04),
        ((0, 1), 1.0005, 1.0),
        ((0, 255), 0, -1.0),
    ],
)
def test_model_range(intensity_range, value, expected):
    data = to_model_range(torch.full((1, 2, 2, 2), float(value)), intensity_range, "a.nii.gz")
    torch.testing.assert_close(data, torch.full((1, 2, 2, 2), float(expected)))


def test_from_model_range_is_the_inverse():
    data = torch.linspace(-1, 1, 27).reshape(1, 3, 3, 3)
    torch.testing.assert_close(to_model_range(from_model_range(data, (-1024, 3071)), (-1024, 3071), "a"), data)


@pytest.mark.parametrize("value", [1.0025, -1.0025, 400.0])
def test_values_outside_the_declared_range(tmp_path, array, value):
    array[1, 2, 3] = value
    path = save(tmp_path / "scan.nii.gz", array)
    with pytest.raises(UserError, match=r"scan\.nii\.gz.*outside the declared range \[-1, 1\]") as caught:
        read_model_volume(path, (-1, 1))
    message = str(caught.value)
    assert f"{array.min():g} to {array.max():g}" in message
    assert f"dataset.intensity_range=[{array.min():g},{array.max():g}]" in message
    assert "dataset/preprocess.py" in message
    assert "\n" not in message


@pytest.mark.parametrize("intensity_range", [(1, -1), (0, 0), (0, float("nan")), (0, 1, 2)])
def test_intensity_range_itself_is_checked(intensity_range):
    with pytest.raises(UserError, match=r"dataset\.intensity_range"):
        to_model_range(torch.zeros(1, 2, 2, 2), intensity_range, "a.nii.gz")


def test_crop_affine_keeps_world_coordinates():
    affine = np.array([[0, 2, 0, 5], [3, 0, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1.0]])
    cropped = crop_affine(affine, (1, 2, -3))  # d, h, w = z, x, y
    np.testing.assert_allclose(cropped @ [0, 0, 0, 1], affine @ [2, -3, 1, 1])


@pytest.mark.parametrize("spacing_mm", [(1, 1), (1, 0, 1), (1, -1, 1), (1, float("inf"), 1)])
def test_spacing_is_checked(spacing_mm):
    with pytest.raises(UserError, match="three positive numbers in mm"):
        affine_from_spacing(spacing_mm)


# Latents


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grid", [(4, 5, 6), (3, 3, 3), (1, 5, 6)])
def test_latents_are_exchanged_with_torchio(tmp_path, channels, grid):
    latent = torch.randn(channels, *grid)
    write_latent(tmp_path / "ours.nii.gz", latent)
    assert torch.equal(tio.ScalarImage(tmp_path / "ours.nii.gz").data, latent)
    tio.ScalarImage(tensor=latent).save(tmp_path / "theirs.nii.gz")
    for name in ("ours", "theirs"):
        assert torch.equal(read_latent(tmp_path / f"{name}.nii.gz"), latent)
        assert read_latent_header(tmp_path / f"{name}.nii.gz").latent_shape == (channels, *grid)
    assert nib.load(tmp_path / "ours.nii.gz").shape == (*grid, channels)


def test_latent_with_channels_as_fourth_axis(tmp_path):
    latent = torch.randn(8, 4, 5, 6)
    save(tmp_path / "a.nii.gz", latent.permute(1, 2, 3, 0).numpy())
    assert torch.equal(read_latent(tmp_path / "a.nii.gz"), latent)


# Bad files


def content(array: np.ndarray) -> bytes:
    return nib.Nifti1Image(array, np.eye(4)).to_bytes()


NOISE = np.random.default_rng(1).random((8, 8, 8)).astype(np.float32)
EMPTY = bytearray(content(NOISE))
EMPTY[42:44] = (0).to_bytes(2, "little")  # dim[1]
COLOUR = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("read", [read_volume, read_latent])
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        pytest.param(gzip.compress(content(NOISE))[:-200], "truncated", id="half the voxels"),
        pytest.param(gzip.compress(content(NOISE))[:-6], "truncated", id="no checksum"),
        pytest.param(gzip.compress(content(NOISE)[:-4]), "truncated", id="a voxel less"),
        pytest.param(gzip.compress(content(NOISE)[:100]), "truncated", id="half a header"),
        pytest.param(content(NOISE)[:-4], "truncated", id="uncompressed"),
        pytest.param(gzip.compress(b"no image at all" * 50), "not a NIfTI", id="compressed text"),
        pytest.param(b"<html>" * 200, "not a NIfTI", id="web page"),
        pytest.param(b"", "not a NIfTI", id="no byte"),
        pytest.param(gzip.compress(bytes(EMPTY)), r"empty \(size 0x8x8\)", id="no voxel"),
        pytest.param(gzip.compress(content(COLOUR)), "colour", id="colour"),
        pytest.param(gzip.compress(content(NOISE.astype(np.complex64))), "complex", id="complex"),
        pytest.param(gzip.compress(content(NOISE[0])), "2D image|not that of a latent", id="2D"),
    ],
)
def test_unfit_files(tmp_path, read, stored, message):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(stored)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, array, value):
    array[1, 2, 3:5] = value
    with pytest.raises(UserError, match=r"scan\.nii\.gz: 2 NaN or infinite voxels"):
        read_volume(save(tmp_path / "scan.nii.gz", array))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5), "2D image"),
        ((4, 5, 1), "2D image"),
        ((4, 5, 1, 1), "2D image"),
        ((4, 5, 6, 3), "4D series"),
        ((4, 5, 6, 1, 3), "several channels"),
    ],
)
@pytest.mark.parametrize("read", [read_header, read_volume])
def test_other_numbers_of_axes(tmp_path, shape, message, read):
    with pytest.raises(UserError, match=rf"scan\.nii\.gz: .*{message}.*{'x'.join(map(str, shape[:3]))}"[:70]):
        read(save(tmp_path / "scan.nii.gz", np.zeros(shape, dtype=np.float32)))


@pytest.mark.parametrize("value", [-1.0, -0.9985, 0.3])
def test_nothing_but_background(tmp_path, value):
    path = save(tmp_path / "scan.nii.gz", np.full(SHAPE, value, dtype=np.float32))
    with pytest.raises(UserError, match=r"scan\.nii\.gz: all background"):
        read_model_volume(path, (-1, 1))


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(UserError, match=r"none\.nii\.gz: no such file"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(UserError, match=r"folder\.nii\.gz: cannot be read"):
        read_volume(tmp_path / "folder.nii.gz")


# Writing


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_volume(path, torch.zeros(2, 3, 4), np.eye(4))
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"a\.nii\.gz: cannot be written \(No space left on device\)"):
        write_volume(path, torch.ones(2, 3, 4), np.eye(4))
    with pytest.raises(UserError, match="cannot be written"):
        write_latent(tmp_path / "b.nii.gz", torch.ones(8, 2, 3, 4))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_an_interrupted_write_is_not_seen(tmp_path, monkeypatch):
    def killed(descriptor: int) -> None:
        assert list_volumes(tmp_path) == [tmp_path / "old.nii.gz"]
        raise KeyboardInterrupt

    write_volume(tmp_path / "old.nii.gz", torch.zeros(2, 3, 4), np.eye(4))
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_volume(tmp_path / "new.nii.gz", torch.zeros(2, 3, 4), np.eye(4))


def test_equal_images_give_equal_files(tmp_path, monkeypatch):
    write_volume(tmp_path / "a.nii.gz", torch.zeros(2, 3, 4), np.eye(4))
    monkeypatch.setattr("time.time", lambda: 0.0)
    write_volume(tmp_path / "b.nii.gz", torch.zeros(2, 3, 4), np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3, 4), (1, 1, 2, 3, 4)])
def test_only_volumes_are_written(tmp_path, shape):
    with pytest.raises(ValueError, match="is needed, got shape"):
        write_volume(tmp_path / "a.nii.gz", torch.zeros(shape), np.eye(4))


def test_name_without_suffix(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.nii\.gz"):
        write_volume(tmp_path / "a.png", torch.zeros(2, 3, 4), np.eye(4))


def test_is_whole(tmp_path):
    write_latent(tmp_path / "a.nii.gz", torch.randn(8, 4, 4, 4))
    write_volume(tmp_path / "b.nii.gz", torch.randn(4, 4, 4), np.eye(4))
    assert is_whole_volume(tmp_path / "b.nii.gz")
    assert not is_whole_volume(tmp_path / "a.nii.gz")
    assert not is_whole_volume(tmp_path / "c.nii.gz")
    stored = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(stored[:-1])
    assert not is_whole_volume(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_files_are_laid_out_so_that_other_readers_find_the_same_voxels(tmp_path, dtype):
    """Slices are converted one by one and turned; SimpleITK has its own NIfTI reader and gunzip."""
    volume = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1  # (D, H, W)
    write_volume(tmp_path / "a.nii.gz", volume, np.diag([1, 2, 3, 1]), dtype, (-1, 1))
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert image.GetSize() == (6, 7, 5)  # x = H, y = W, z = D
    assert image.GetSpacing() == (1, 2, 3)
    found = sitk.GetArrayFromImage(image)  # (z, y, x)
    np.testing.assert_allclose(found.swapaxes(1, 2), volume, atol=0 if dtype == "float32" else 1.6e-5)


def test_only_volume_io_reads_and_writes_nifti():
    folder = Path(volume_io.__file__).parent
    users = [path.name for path in sorted(folder.glob("*.py")) if "import nibabel" in path.read_text()]
    assert users == ["geometry.py", "nifti_geometry.py", "nifti_header.py", "volume_io.py"]
    assert "Nifti" not in (folder / "geometry.py").read_text()

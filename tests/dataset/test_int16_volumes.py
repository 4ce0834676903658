"""Volumes as int16: every reader gets the values back, and the codes depend on the range alone."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torchio as tio

from dataset.volumes.intensity import from_model_range
from dataset.volumes.volume_io import is_whole_volume, nifti_to_tensor, read_volume, write_volume


@pytest.fixture
def array() -> np.ndarray:  # (D, H, W)
    return np.random.default_rng(0).uniform(-1, 1, (4, 5, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("value_range", "is_whole_units", "slope", "half_a_code"),
    [
        ((-1000.0, 1000.0), True, 1.0, 0.5),  # HU
        ((-1024.0, 40000.0), True, 41024 / 65534, 0.32),  # HU beyond what int16 can hold
        ((0.0, 1.0), False, 1 / 65534, 0.5 / 65534),
        ((-1.0, 1.0), False, 2 / 65534, 1 / 65534),
    ],
)
def test_int16_gives_the_values_back_within_half_a_code(
    array, tmp_path, value_range, is_whole_units, slope, half_a_code
):
    """For our reader, nibabel, SimpleITK and TorchIO, at the ends of the range too."""
    data = from_model_range(torch.from_numpy(array), value_range)
    data[0, 0, 0], data[0, 0, 1] = value_range
    path, affine = tmp_path / "a.nii.gz", np.diag([0.7, 0.8, 2.0, 1.0])
    write_volume(path, data, affine, "int16", value_range, is_whole_units)
    image = nib.load(path)
    assert image.get_data_dtype() == np.int16
    assert np.allclose(image.affine, affine)
    assert (image.dataobj.slope, image.dataobj.inter) == pytest.approx(
        (slope, 0.0 if slope == 1 else sum(value_range) / 2)
    )
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32))  # (Z, Y, X)
    read = {
        "ours": read_volume(path).data[0],
        "nibabel": nifti_to_tensor(torch.from_numpy(image.get_fdata(dtype=np.float32))),
        "SimpleITK": torch.from_numpy(itk).movedim(1, 2),
        "TorchIO": nifti_to_tensor(tio.ScalarImage(path).data[0].float()),
    }
    rounding = 1e-6 * max(map(abs, value_range))
    for name, values in read.items():
        assert (values - data).abs().max() <= half_a_code + rounding, name
    assert (read["ours"] - data).abs().max() > half_a_code / 2
    if slope == 1:
        assert torch.equal(read["ours"], data.round())
    assert is_whole_volume(path)


def test_int16_codes_do_not_depend_on_the_data(tmp_path):
    """So that equal values have equal codes in every volume of a class."""
    for name, top in (("a", 0.5), ("b", 1.0)):
        write_volume(tmp_path / f"{name}.nii.gz", torch.tensor([[[0.25], [top]]]), np.eye(4), "int16", (0.0, 1.0))
    codes = [nib.load(tmp_path / f"{name}.nii.gz").dataobj.get_unscaled()[0, 0, 0] for name in "ab"]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("value", [1.1, -0.1, np.nan])
def test_int16_refuses_values_outside_the_range(tmp_path, value):
    with pytest.raises(ValueError, match=r"outside the range \[0, 1\]"):
        write_volume(tmp_path / "a.nii.gz", torch.full((2, 2, 2), value), np.eye(4), "int16", (0.0, 1.0))
    with pytest.raises(ValueError, match="float32 or int16"):
        write_volume(tmp_path / "a.nii.gz", torch.zeros(2, 2, 2), np.eye(4), "int8")
    assert not list(tmp_path.iterdir())

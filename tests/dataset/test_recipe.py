"""Preparation of one volume: known answers for intensities, geometry, crops, and what can't be prepared."""

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from dataset.preparation.recipe import Recipe, coarse_foreground, describe, find_intensity, prepare
from dataset.preparation.sources import Scan

CT = Recipe(window=(-1000, 1000), unit="HU", multiple=1)
MR = Recipe(percentiles=(0.5, 99.5), multiple=1)


def ramp(shape=(6, 5, 4), low=-1000.0, high=1000.0) -> np.ndarray:
    return np.linspace(low, high, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def ball(shape=(40, 40, 40), middle=(20, 20, 20), radius=8, inside=100.0, outside=-1000.0) -> np.ndarray:
    """A bright ball, its middle in voxels."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid - np.array(middle), axis=-1)
    return np.where(distance <= radius, inside, outside).astype(np.float32)


def prepared(data, recipe, affine=None):
    """The result, and its voxels (X, Y, Z)."""
    result = prepare(Scan(data, np.eye(4) if affine is None else affine), recipe)
    assert result.data.ndim == 3
    assert result.data.dtype == np.float32
    return result, result.data


# Intensities


def test_window_keeps_absolute_units():
    data = ramp(low=-2000, high=2000)
    result, voxels = prepared(data, CT)
    np.testing.assert_allclose(voxels, np.clip(data / 1000, -1, 1), atol=1e-6)
    assert (voxels.min(), voxels.max()) == (-1, 1)
    assert result.intensity.record() == {"method": "window", "low": -1000, "high": 1000, "unit": "HU"}
    assert result.steps == ["window -1000 to 1000 HU mapped to [-1, 1]"]


def test_percentiles_are_those_of_the_volume():
    data = ramp(shape=(10, 10, 10), low=0, high=999)
    result, voxels = prepared(data, Recipe(percentiles=(10, 90), multiple=1))
    low, high = result.intensity.low, result.intensity.high
    assert (low, high) == pytest.approx((99.9, 899.1))
    assert result.intensity.unit is None
    np.testing.assert_allclose(voxels, np.clip((data - low) / (high - low) * 2 - 1, -1, 1), atol=1e-5)


def test_percentiles_do_not_depend_on_the_crop_or_the_padding():
    data = ramp(shape=(10, 10, 10), low=0, high=999)
    one, two = (prepared(data, Recipe(percentiles=(1, 99), size=size))[0] for size in ((10, 10, 10), (40, 4, 10)))
    assert one.intensity == two.intensity


@pytest.mark.parametrize(
    ("data", "recipe", "message"),
    [
        (ramp(low=0, high=2000), CT, r"no Hounsfield units, air has -1000: the offset.*-1024"),
        (ramp(low=-1000, high=64512), CT, "no Hounsfield units: negative values were stored as unsigned"),
        (ramp(low=-1, high=1), CT, "nothing to see in the window -1000 to 1000"),
        (ramp(low=-3000, high=-1100), CT, "nothing to see in the window"),
        (np.zeros((6, 6, 6), np.float32), MR, r"percentiles 0\.5 and 99\.5 are both 0"),
        (np.zeros((6, 6, 3), np.float32), MR, "size 6x6x3: at least 4 voxels"),
    ],
)
def test_volumes_without_anything_to_see(data, recipe, message):
    with pytest.raises(UserError, match=message):
        prepared(data, recipe)


def test_a_window_of_other_units_is_not_checked_for_hounsfield():
    assert find_intensity(ramp(low=0, high=2000), Recipe(window=(0, 2000))).unit is None


# Orientation and spacing


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
def test_every_orientation_becomes_ras(orientation):
    base = ramp(shape=(6, 5, 4))
    image = nib.Nifti1Image(base, np.diag([1, 2, 3, 1.0]))
    target = nib.orientations.axcodes2ornt(tuple(orientation))
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))
    result, voxels = prepared(np.ascontiguousarray(turned.get_fdata(dtype=np.float32)), CT, turned.affine)
    np.testing.assert_allclose(voxels, base / 1000, atol=1e-6)
    np.testing.assert_allclose(result.affine, np.diag([1, 2, 3, 1.0]), atol=1e-6)
    assert (f"reoriented {orientation} to RAS" in result.steps) == (orientation != "RAS")


def test_resampling_keeps_places_and_values():
    """A ramp in mm stays the same ramp on any grid."""
    affine = np.diag([1, 2, 3, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    x, y, z = np.meshgrid(np.arange(24), np.arange(12), np.arange(8), indexing="ij")
    data = (10 * (x - 10) + 7 * (2 * y + 5) - 3 * (3 * z + 7)).astype(np.float32)
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), multiple=1, spacing_mm=(1.5, 1.5, 1.5)), affine)
    assert voxels.shape == (16, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(result.affine[:3, :3], axis=0), 1.5)
    index = np.stack(np.meshgrid(*map(np.arange, voxels.shape), indexing="ij"), -1)[3:-3, 3:-3, 3:-3]
    mm = index @ result.affine[:3, :3].T + result.affine[:3, 3]
    np.testing.assert_allclose(voxels[3:-3, 3:-3, 3:-3], (mm @ [10, 7, -3]) / 1000, atol=2e-3)
    assert "resampled from 1 x 2 x 3 mm to 1.5 x 1.5 x 1.5 mm (linear)" in result.steps


def test_equal_spacing_is_not_resampled():
    affine = np.diag([1.0004, 1, 1, 1])
    result, voxels = prepared(ramp(), Recipe(window=(-1000, 1000), multiple=1, spacing_mm=(1, 1, 1)), affine)
    np.testing.assert_allclose(voxels, ramp() / 1000, atol=1e-6)


def test_nothing_outside_becomes_anything_but_background():
    for interpolation in ("linear", "bspline"):
        recipe = Recipe(
            window=(-1000, 1000), spacing_mm=(0.7, 1.3, 0.9), size=(90, 10, 60), interpolation=interpolation
        )
        _, voxels = prepared(np.full((20, 20, 20), 500, np.float32) + ramp((20, 20, 20), -50, 50), recipe)
        values = voxels[voxels > -0.999]
        assert values.min() > 0.4
        assert values.max() < 0.6
        assert (voxels.min(), voxels.max() <= 1) == (-1, True)


def test_coarser_grids_are_smoothed_first():
    """Stripes finer than the new voxels become their mean, not whichever stripe is hit."""
    data = np.where(np.arange(60) % 2, 600, -600).astype(np.float32)[:, None, None] + np.zeros((60, 12, 12), np.float32)
    recipe = Recipe(window=(-1000, 1000), multiple=1, spacing_mm=(3, 1, 1))
    _, voxels = prepared(data, recipe)
    assert np.abs(voxels[3:-3]).max() < 0.1


def test_interpolation_is_that_of_the_recipe():
    data = ball(shape=(20, 20, 20), middle=(10, 10, 10), radius=5)
    spline, linear = (
        prepared(data, Recipe(window=(-1000, 1000), spacing_mm=(0.8,) * 3, interpolation=kind, multiple=1))[1]
        for kind in ("bspline", "linear")
    )
    assert np.abs(spline - linear).max() > 0.05
    assert (spline.min(), spline.max() <= 1) == (-1, True)  # a spline overshoots: clipped to the range


def test_volume_smaller_than_the_spacing():
    with pytest.raises(UserError, match="6 x 5 x 4 mm large as a whole: too small for voxels of 10 x 10 x 10 mm"):
        prepared(ramp(), Recipe(window=(-1000, 1000), spacing_mm=(10, 10, 10)))


@pytest.mark.parametrize(("shift", "size_y"), [(0.5, 42), (-0.5, 42)])
@pytest.mark.parametrize("direction", [1, -1])
def test_sheared_volume_is_straightened(shift, size_y, direction):
    """A ball in a volume of shifted slices is a ball again, where it was; also where slices run downwards."""
    shape = (30, 30, 24)
    affine = np.eye(4)
    affine[1:3, 2] = (shift, direction)
    centre = np.array([15, 15 + 12 * shift, 12 * direction])
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = index @ affine[:3, :3].T
    data = np.where(np.linalg.norm(mm - centre, axis=-1) < 7, 800, -1000).astype(np.float32)
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), multiple=1), affine)
    assert "sheared slices resampled to a straight grid" in result.steps
    np.testing.assert_allclose(result.affine[:3, :3], np.eye(3), atol=1e-6)
    assert voxels.shape == (30, size_y, 24)
    inside = np.argwhere(voxels > 0) @ result.affine[:3, :3].T + result.affine[:3, 3]
    np.testing.assert_allclose(inside.mean(axis=0), centre, atol=0.2)
    _, whole = prepared(np.full(shape, 500, np.float32) + ramp(shape, -50, 50), Recipe(window=(-1000, 1000)), affine)
    assert (whole > 0).sum() == pytest.approx(np.prod(shape), rel=0.05)  # nothing lies outside of the grid
    radius = np.linalg.norm(inside - centre, axis=1).max()
    assert 6.5 < radius < 7.6


# Size


def test_crop_is_centred_on_the_foreground():
    data = ball(middle=(12, 20, 30))
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), size=(20, 20, 20)))
    assert voxels.shape == (20, 20, 20)
    np.testing.assert_array_equal(voxels > 0, data[2:22, 10:30, 20:40] > 0)
    np.testing.assert_allclose(result.affine[:3, 3], [2, 10, 20])
    assert result.foreground_lost == 0
    assert result.steps[-1] == "cropped from 40x40x40 to 20x20x20 at 2x10x20"


def test_foreground_that_fits_exactly_is_kept():
    data = np.full((40, 12, 12), -1000, np.float32)
    data[5:15] = 300
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), size=(10, 12, 12)))
    assert (voxels > 0).all()
    assert result.foreground_lost == 0


def test_foreground_that_is_cut_off_is_measured():
    data = np.full((40, 12, 12), -1000, np.float32)
    data[5:35, 2:10, 2:10] = 300
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), size=(15, 12, 12)))
    assert result.foreground_lost == pytest.approx(0.5)
    assert (voxels[:, 5, 5] > 0).all()


def test_a_bright_speck_does_not_move_the_crop():
    data = ball(middle=(28, 28, 28))
    data[1, 1, 1] = data[38, 1, 38] = 1000
    result, _ = prepared(data, Recipe(window=(-1000, 1000), size=(20, 20, 20)))
    np.testing.assert_allclose(result.affine[:3, 3], [18, 18, 18])


def test_padding_is_on_both_sides():
    data = ramp((4, 5, 6), 100, 900)
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), size=(8, 8, 8)))
    np.testing.assert_allclose(voxels[2:6, 1:6, 1:7], data / 1000, atol=1e-6)
    assert (voxels == -1).sum() == 8**3 - 4 * 5 * 6
    np.testing.assert_allclose(result.affine[:3, 3], [-2, -1, -1])


@pytest.mark.parametrize(("shape", "expected"), [((33, 32, 5), (64, 32, 32)), ((32, 64, 32), (32, 64, 32))])
def test_padding_to_the_next_multiple(shape, expected):
    result, voxels = prepared(ramp(shape), Recipe(window=(-1000, 1000), multiple=32))
    assert voxels.shape == expected
    assert result.foreground_lost == 0


def test_crop_of_a_large_volume_is_centred_too():
    """There the foreground is looked for on a grid with gaps."""
    data = ball(shape=(300, 40, 40), middle=(200, 20, 20), radius=15)
    result, voxels = prepared(data, Recipe(window=(-1000, 1000), size=(40, 40, 40)))
    assert result.affine[0, 3] == pytest.approx(180, abs=2)
    assert (voxels > 0).sum() == (data > 0).sum()


def test_foreground_of_a_large_volume_is_found_on_a_coarse_grid():
    data = ball(shape=(260, 100, 130), middle=(200, 50, 65), radius=20)
    mask, stride = coarse_foreground(data)
    assert stride.tolist() == [3, 1, 2]
    places = np.argwhere(mask) * stride
    np.testing.assert_allclose((places.min(axis=0) + places.max(axis=0)) / 2, [200, 50, 65], atol=2)


def test_description():
    affine = nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, 1]], (6, 5, 4)) @ np.diag([1, 2, 3, 1])
    assert describe(ramp(), affine) == {
        "size": [6, 5, 4], "spacing_mm": [1, 2, 3], "orientation": "LAS", "range": [-1000, 1000],
    }  # fmt: skip


def test_record_of_a_recipe_is_plain_json():
    assert CT.record()["window"] == [-1000, 1000]
    assert CT.record() != MR.record()
    assert Recipe(percentiles=(0.5, 99.5), multiple=1).record() == MR.record()

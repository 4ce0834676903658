"""DICOM series as volumes: grouping, geometry against known answers, and every kind that is left out or refused."""

import numpy as np
import pytest
from dicom_files import AXIAL, write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, generate_uid

from common.errors import UserError
from dataset.preparation.dicom_conversion import convert
from dataset.preparation.dicom_header import read_slices
from dataset.preparation.dicom_series import check_series, group_series
from dataset.preparation.measured import NotAVolume
from dataset.preparation.sources import find_sources, read_source

SHAPE = (7, 6, 8)  # rows, columns, slices


def volume(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(float)


def all_series(folder):
    return group_series(image for path in sorted(folder.rglob("*")) if path.is_file() for image in read_slices(path))


def only_series(folder):
    (series,) = all_series(folder)
    return series


def error_of(folder) -> str:
    with pytest.raises(UserError) as caught:
        check_series(only_series(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Voxels and geometry


def test_slices_are_sorted_by_position_and_scaled(tmp_path):
    expected = volume()
    write_series(tmp_path, expected, spacing_mm=(0.5, 0.75, 3), origin_mm=(-10, 20, 30))
    stack = check_series(only_series(tmp_path))
    data = convert(stack)[0]
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data, expected.transpose(1, 0, 2))  # (columns, rows, slices)
    np.testing.assert_allclose(
        stack.affine, [[-0.5, 0, 0, 10], [0, -0.75, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]], atol=1e-6
    )
    assert stack.notes == ()


def test_oblique_series_put_every_voxel_where_the_scanner_says(tmp_path):
    row, column = np.array([0.6, 0.8, 0]), np.array([0, 0, -1.0])
    write_series(tmp_path, volume(), orientation=(*row, *column), spacing_mm=(0.5, 2, 3), origin_mm=(5, 6, 7))
    affine = check_series(only_series(tmp_path)).affine
    lps = np.array([5, 6, 7]) + 4 * 0.5 * row + 3 * 2 * column + 2 * 3 * np.cross(row, column)
    np.testing.assert_allclose(affine @ [4, 3, 2, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [(np.uint16, 1, -1024), (np.int16, 1, 0), (np.int16, 1, -8192), (np.uint16, 0.5, -1000.5), (np.int16, 2, 1)],
)
def test_signed_and_unsigned_voxels_and_their_rescaling(tmp_path, dtype, slope, intercept):
    expected = np.round((volume() - intercept) / slope) * slope + intercept
    write_series(tmp_path, expected, dtype=dtype, slope=slope, intercept=intercept)
    data = convert(check_series(only_series(tmp_path)))[0]
    np.testing.assert_allclose(data, expected.transpose(1, 0, 2), rtol=0, atol=1e-3)
    assert data.min() < -900


def test_each_slice_has_its_own_slope(tmp_path):
    slopes = [1.0, 0.25, 3.5, 1, 1, 2, 1, 1]
    write_series(tmp_path, volume(), each=[{"RescaleSlope": slope} for slope in slopes])
    data = convert(check_series(only_series(tmp_path)))[0]
    expected = (volume() + 1024) * np.array(slopes) - 1024
    np.testing.assert_allclose(data, expected.transpose(1, 0, 2), rtol=1e-6)


def test_gantry_tilt_is_kept_in_the_affine_and_noted(tmp_path):
    write_series(tmp_path, volume(), step_mm=(0, 3 * np.tan(np.radians(20)), 3))
    stack = check_series(only_series(tmp_path))
    assert stack.notes == ("gantry tilt of 20.0 degrees",)
    np.testing.assert_allclose(stack.affine[:3, 2], [0, -3 * np.tan(np.radians(20)), 3], atol=1e-5)


def test_rounded_positions_are_even(tmp_path):
    positions = [(0, 0, round(k * 0.625, 2)) for k in range(8)]
    write_series(tmp_path, volume(), positions_mm=positions)
    stack = check_series(only_series(tmp_path))
    np.testing.assert_allclose(stack.affine[2, 2], 0.625, atol=0.005)


def test_mr_series_without_rescaling(tmp_path):
    expected = np.abs(volume())
    write_series(tmp_path, expected, modality="MR", intercept=0)
    assert only_series(tmp_path).modality == "MR"
    np.testing.assert_array_equal(convert(check_series(only_series(tmp_path)))[0], expected.transpose(1, 0, 2))


# Grouping


def test_several_series_in_one_folder(tmp_path):
    write_series(tmp_path, volume(0), number=2, description="thin")
    write_series(tmp_path, volume(1, (7, 6, 5)), number=3, description="thick", prefix="b")
    thin, thick = all_series(tmp_path)
    assert [(one.description, len(one.slices)) for one in (thin, thick)] == [("thin", 8), ("thick", 5)]
    assert thin.key != thick.key
    assert f"{tmp_path} [series 2 thin]" == thin.label
    np.testing.assert_array_equal(convert(check_series(thick))[0], volume(1, (7, 6, 5)).transpose(1, 0, 2))


def test_one_series_in_several_folders(tmp_path):
    uid = generate_uid()
    positions = [(0, 0, k) for k in range(8)]
    write_series(tmp_path / "a", volume()[..., :5], uid=uid, positions_mm=positions[:5])
    write_series(tmp_path / "b", volume()[..., 5:], uid=uid, positions_mm=positions[5:])
    series = only_series(tmp_path)
    assert series.folder == tmp_path
    np.testing.assert_array_equal(convert(check_series(series))[0], volume().transpose(1, 0, 2))


def test_key_depends_on_the_series_not_on_file_names(tmp_path):
    uid = generate_uid()
    for name in ("a", "b"):
        write_series(tmp_path / name, volume(), uid=uid, prefix=name)
    assert only_series(tmp_path / "a").key == only_series(tmp_path / "b").key


@pytest.mark.parametrize(
    ("orientation", "kind"), [(AXIAL, "LOCALIZER"), ((0, 1, 0, 0, 0, -1), "LOCALIZER"), ((0, 1, 0, 0, 0, -1), "MPR")]
)
def test_other_images_within_a_series_are_taken_apart(tmp_path, orientation, kind):
    uid = generate_uid()
    write_series(tmp_path, volume(), uid=uid)
    write_series(
        tmp_path, volume(1)[:6, :6, :1], uid=uid, prefix="other", orientation=orientation, origin_mm=(0, 0, 50),
        tags={"ImageType": ["ORIGINAL", "PRIMARY", kind], "Rows": 7, "PixelData": bytes(7 * 6 * 2)},
    )  # fmt: skip
    kinds = {len(one.slices) for one in all_series(tmp_path)}
    assert kinds == {8, 1}


@pytest.mark.parametrize("tag", ["EchoTime", "ImageType"])
def test_echoes_and_contrasts_are_volumes_of_their_own(tmp_path, tag):
    uid = generate_uid()
    values = {"EchoTime": (2.3, 4.6), "ImageType": (["ORIGINAL", "PRIMARY", "W"], ["ORIGINAL", "PRIMARY", "F"])}[tag]
    for i, value in enumerate(values):
        write_series(
            tmp_path, np.abs(volume(i)), modality="MR", intercept=0, uid=uid, prefix=f"e{i}", tags={tag: value}
        )
    found = all_series(tmp_path)
    assert len({one.key for one in found}) == 2
    sums = {float(convert(check_series(one))[0].sum()) for one in found}
    assert sums == {float(np.abs(volume(i)).sum()) for i in (0, 1)}


def test_people_with_the_same_identifier_are_told_apart_by_folder(tmp_path):
    uid = generate_uid()
    for i in range(2):
        write_series(tmp_path / f"p{i}", volume(i), uid=uid)
    found = all_series(tmp_path)
    assert [one.folder.name for one in found] == ["p0", "p1"]


def two_phases(folder, uid, second):
    """Two volumes of the same places under one identifier, the second with other tags."""
    write_series(folder / "a", volume(0), uid=uid)
    write_series(folder / "a", volume(1), uid=uid, prefix="second", tags=second)


def two_people(folder, uid, *places, height=8, **second):
    """Two people's series with one identifier, one above the other."""
    write_series(folder / places[0], volume(0), uid=uid)
    write_series(folder / places[1], volume(1), uid=uid, prefix="second", origin_mm=(0, 0, height), tags=second)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda f, uid: two_people(f, uid, "a", "b", PatientID="T2"), id="touching"),
        pytest.param(lambda f, uid: two_people(f, uid, "a", "a", PatientID="T2"), id="in one folder"),
        pytest.param(lambda f, uid: two_people(f, uid, "a", "a", PatientName="Other"), id="by name"),
        pytest.param(lambda f, uid: two_people(f, uid, "a", "b", height=200), id="apart, by folder alone"),
        pytest.param(lambda f, uid: two_people(f, uid, "a", "a", StudyInstanceUID="1.2.3"), id="by study"),
        pytest.param(lambda f, uid: two_people(f, "", "a", "a", PatientID="T2"), id="without identifier"),
        pytest.param(lambda f, uid: two_phases(f, uid, {"AcquisitionNumber": 2}), id="two acquisitions"),
        pytest.param(lambda f, uid: two_phases(f, uid, {"ConvolutionKernel": "BONE"}), id="two kernels"),
        pytest.param(lambda f, uid: two_phases(f, uid, {"SeriesDescription": "late"}), id="two descriptions"),
    ],
)
def test_two_volumes_of_one_identifier_are_two(tmp_path, write):
    write(tmp_path, generate_uid())
    found = all_series(tmp_path)
    names = {(one.folder, one.key) for one in found}
    sums = sorted(float(convert(check_series(one))[0].sum()) for one in found)
    assert len(names) == 2
    assert sums == sorted(float(volume(seed).sum()) for seed in (0, 1))


@pytest.mark.parametrize("tag", ["SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "AcquisitionNumber"])
def test_an_identifier_for_every_slice_says_nothing(tmp_path, tag):
    write_series(tmp_path, volume(), each=[{tag: str(k + 1)} for k in range(8)])
    np.testing.assert_array_equal(convert(check_series(only_series(tmp_path)))[0], volume().transpose(1, 0, 2))


def test_a_copy_a_micrometre_beside_is_a_copy(tmp_path):
    paths = write_series(tmp_path, volume())
    copy = dcmread(paths[4])
    copy.ImagePositionPatient = [0, 0, 4.001]
    copy.save_as(tmp_path / "copy")
    assert check_series(only_series(tmp_path)).notes == ("1 duplicate slice(s) left out",)


@pytest.mark.parametrize(("unit", "is_volume"), [("HU", True), ("US", True), ("MGML", False), ("HU_MOD", False)])
def test_ct_in_other_units_is_left_out(tmp_path, unit, is_volume):
    write_series(tmp_path, volume(), tags={"RescaleType": unit})
    if is_volume:
        check_series(only_series(tmp_path))
    else:
        assert f"CT in units of {unit} (RescaleType), not in HU" in leave_out(tmp_path)


def test_orientations_that_round_differently_are_one_stack(tmp_path):
    turned = [(x, (1 - x * x) ** 0.5, 0, 0, 0, -1) for x in (0.994999, 0.995001)]
    positions = [np.cross(turned[0][:3], turned[0][3:]) * k for k in range(8)]
    each = [{"ImageOrientationPatient": list(turned[k % 2])} for k in range(8)]
    write_series(tmp_path, volume(), positions_mm=positions, each=each)
    assert len(check_series(only_series(tmp_path)).files) == 8


def test_echoes_of_several_contrasts_with_an_empty_slice(tmp_path):
    uid, empty = generate_uid(), np.abs(volume())
    empty[..., 0] = 0
    for i in range(4):
        tags = {"EchoTime": i % 2 + 1, "ImageType": ["ORIGINAL", "PRIMARY", "WF"[i // 2]]}
        write_series(tmp_path, empty + i * (empty > 0), modality="MR", intercept=0, uid=uid, prefix=f"{i}", tags=tags)
    assert [len(one.slices) for one in all_series(tmp_path)] == [8] * 4
    assert len({one.key for one in all_series(tmp_path)}) == 4


# Duplicates


@pytest.mark.parametrize("place", ["", "copy"])
def test_duplicate_slices_are_left_out(tmp_path, place):
    paths = write_series(tmp_path, volume())
    (tmp_path / place).mkdir(exist_ok=True)
    for path in paths if place else paths[:3]:
        header = dcmread(path)
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.save_as(tmp_path / place / f"again_{path.name}")
    stack = check_series(only_series(tmp_path))
    assert stack.notes == (f"{8 if place else 3} duplicate slice(s) left out",)
    np.testing.assert_array_equal(convert(stack)[0], volume().transpose(1, 0, 2))


# Left out


def leave_out(folder) -> str:
    with pytest.raises(NotAVolume) as caught:
        check_series(only_series(folder))
    return str(caught.value)


def test_localisers(tmp_path):
    write_series(tmp_path / "a", volume(), tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_series(tmp_path / "b", volume(), description="Topogram 0.6")
    assert "a localiser" in leave_out(tmp_path / "a")
    assert "a localiser" in leave_out(tmp_path / "b")


@pytest.mark.parametrize(("samples", "kind"), [(3, "RGB"), (1, "PALETTE COLOR")])
def test_colour_images(tmp_path, samples, kind):
    write_series(
        tmp_path, volume(),
        tags={
            "SamplesPerPixel": samples, "PhotometricInterpretation": kind, "PlanarConfiguration": 0,
            "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(7 * 6 * samples),
        },
    )  # fmt: skip
    assert "colour images" in leave_out(tmp_path)


@pytest.mark.parametrize("count", [1, 4])
def test_single_images(tmp_path, count):
    write_series(tmp_path, volume()[..., :count])
    assert f"{count} image(s): no volume" in leave_out(tmp_path)


def test_objects_without_an_image(tmp_path):
    (path,) = write_series(tmp_path, volume()[..., :1])
    report = dcmread(path)
    del report.PixelData, report.Rows, report.Columns
    report.Modality, report.SOPClassUID = "SR", BasicTextSRStorage
    report.save_as(path)
    assert read_slices(path) == []


# Refused


def test_four_dimensional_series(tmp_path):
    uid = generate_uid()
    for i in range(3):
        write_series(tmp_path, volume(i), uid=uid, prefix=f"t{i}")
    assert "a 4D series, 3 different images of one position, 8 positions" in error_of(tmp_path)


def test_missing_slices(tmp_path):
    paths = write_series(tmp_path, volume(), spacing_mm=(1, 1, 2.5))
    paths[3].unlink()
    message = error_of(tmp_path)
    assert "not evenly spaced: mostly 2.5 mm, but 5 mm between" in message
    assert paths[2].name in message


def test_one_gap_that_is_a_little_too_wide(tmp_path):
    write_series(tmp_path, volume(), positions_mm=[(0, 0, z) for z in (0, 1, 2, 3, 4.3, 5.3, 6.3, 7.3)])
    assert "mostly 1 mm, but 1.3 mm between" in error_of(tmp_path)


def test_ct_without_intercept(tmp_path):
    write_series(tmp_path, volume(), tags={"RescaleIntercept": None, "RescaleSlope": None})
    assert "CT without RescaleIntercept" in error_of(tmp_path)


def test_spacing_that_changes_midway(tmp_path):
    heights = [0, 1, 2, 3, 4, 6, 8, 10]
    write_series(tmp_path, volume(), positions_mm=[(0, 0, z) for z in heights])
    assert "not evenly spaced" in error_of(tmp_path)


def test_slices_that_drift_are_found_though_each_gap_is_nearly_even(tmp_path):
    shape = (4, 4, 40)
    heights = np.cumsum([0] + [1.0] * 20 + [1.08] * 19)
    write_series(tmp_path, volume(shape=shape), positions_mm=[(0, 0, z) for z in heights])
    assert "not evenly spaced" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImageOrientationPatient": None}, r"no orientation \(ImageOrientationPatient\) in 8 image"),
        ({"ImagePositionPatient": None}, r"no position \(ImagePositionPatient\) in 8 image"),
        ({"PixelSpacing": None}, "PixelSpacing is missing or zero"),
        ({"PixelSpacing": [0, 1]}, "PixelSpacing is missing or zero"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "is no rotation"),
        (
            {"NumberOfFrames": 20, "PixelData": bytes(7 * 6 * 2 * 20)},
            "holds 20 frames and doesn't say where each one lies",
        ),
    ],
)
def test_geometry_that_is_not_known(tmp_path, tags, message):
    write_series(tmp_path, volume(), tags=tags)
    with pytest.raises(UserError, match=message):
        check_series(only_series(tmp_path))


def test_images_of_different_spacing(tmp_path):
    write_series(tmp_path, volume(), each=[{"PixelSpacing": [1, 1 + k // 4]} for k in range(8)])
    assert "different PixelSpacing" in error_of(tmp_path)


def test_truncated_header_and_other_files(tmp_path):
    paths = write_series(tmp_path, volume())
    paths[0].write_bytes(paths[0].read_bytes()[:140])  # within the file's meta information
    paths[7].write_bytes(paths[7].read_bytes()[:700])  # before the image's size
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    found = find_sources(tmp_path)
    assert found.num_other == 1
    assert sorted(found.failed) == sorted(
        (str(path), "a damaged DICOM header (cut off before the image): export the file again")
        for path in (paths[0], paths[7])
    )
    assert len(found.sources[0].files) == 6


def test_file_without_preamble(tmp_path):
    for path in write_series(tmp_path, volume()):
        header = dcmread(path)
        bare = Dataset({element.tag: element for element in header})
        bare.save_as(path, implicit_vr=True, little_endian=True)
    (source,) = find_sources(tmp_path).sources
    np.testing.assert_array_equal(read_source(source).data, volume().transpose(1, 0, 2))

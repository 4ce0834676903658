"""Voxels and places of DICOM series, by value: a ramp over the patient, in every encoding and with every odd header."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import ramp, ramp_error, ramp_volume, write_enhanced, write_series
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, generate_uid

from common.errors import UserError
from dataset.preparation import dicom_conversion
from dataset.preparation.sources import check_source, find_sources, read_source

NIBABEL_DATA = Path(nib.__file__).parent / "nicom" / "tests" / "data"
AXIAL_TAG = [1, 0, 0, 0, 1, 0]
PYDICOM_DATA = Path(pydicom.__file__).parent / "data" / "test_files"


def read_only_volume(folder: Path):
    found = find_sources(folder)
    assert found.failed == []
    (source,) = found.sources
    check_source(source)
    return read_source(source)


def edit(paths, change) -> None:
    """Applies `change(header, k)` to each file and writes it, unless that wrote it."""
    for k, path in enumerate(paths):
        header = dcmread(path)
        if change(header, k) is None:
            header.save_as(path)


# Encodings


def big_endian(header, _k):
    list(header)  # reads every value before the encoding changes
    header.PixelData = np.frombuffer(header.PixelData, np.uint16).byteswap().tobytes()
    header.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    header.set_original_encoding(False, False)


def deflated(header, _k):
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def rle(header, _k):
    header.compress(RLELossless)


def without_meta(implicit: bool, little: bool, *removed: str):
    def change(header, _k):
        for tag in removed:
            delattr(header, tag)
        bare, path = Dataset({element.tag: element for element in header}), header.filename
        if not little:
            bare.PixelData = np.frombuffer(bare.PixelData, np.uint16).byteswap().tobytes()
        bare.save_as(path, implicit_vr=implicit, little_endian=little)
        return "written"

    return change


def meta_without_preamble(header, _k):
    path = Path(header.filename)
    path.write_bytes(path.read_bytes()[132:])
    return "written"


def gzipped(header, _k):
    path = Path(header.filename)
    path.with_name(path.name + ".dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return "written"


def set_tags(**tags):
    def change(header, k):
        for name, value in tags.items():
            setattr(header, name, value(k) if callable(value) else value)

    return change


def preamble_of_nifti(header, _k):
    header.preamble = (348).to_bytes(4, "little") + bytes(124)


def twelve_bits_below_an_overlay(header, _k):
    stored = np.frombuffer(header.PixelData, np.uint16) | (0x8000 * (np.arange(42) % 3 == 0)).astype(np.uint16)
    header.BitsStored, header.HighBit, header.PixelData = 12, 11, stored.tobytes()


def private_scale(header, _k):
    header.Manufacturer = "Philips"
    header.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "FL", 0.25)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda header, k: None, id="as it is"),
        big_endian,
        deflated,
        rle,
        gzipped,
        meta_without_preamble,
        preamble_of_nifti,
        twelve_bits_below_an_overlay,
        private_scale,
        pytest.param(without_meta(True, True), id="no meta, from 0008,0005 on"),
        pytest.param(without_meta(True, True, "ImageType"), id="no meta, from 0008,0016 on"),
        pytest.param(without_meta(True, True, "ImageType", "SOPClassUID", "SOPInstanceUID"), id="no meta, 0008,0060"),
        pytest.param(without_meta(False, True), id="no meta, explicit"),
        pytest.param(without_meta(False, False), id="no meta, big-endian"),
        pytest.param(set_tags(PhotometricInterpretation="MONOCHROME1"), id="shown inverted"),
        pytest.param(set_tags(InstanceNumber=lambda k: 8 - k), id="numbered backwards"),
        pytest.param(set_tags(InstanceNumber=1), id="one number"),
        pytest.param(set_tags(InstanceNumber=lambda k: k * 5 % 8), id="numbered at random"),
        pytest.param(set_tags(SeriesNumber=lambda k: k % 2), id="two series numbers"),
        pytest.param(set_tags(StudyDate="20200101", StudyTime=lambda k: f"12000{k}"), id="each its study time"),
        pytest.param(set_tags(AcquisitionNumber=lambda k: k), id="each its acquisition"),
        pytest.param(set_tags(SeriesInstanceUID=lambda k: generate_uid()), id="each its series"),
        pytest.param(set_tags(SeriesInstanceUID=""), id="no series"),
        pytest.param(set_tags(ImageOrientationPatient=[1.004, 0, 0, 0, 1.004, 0]), id="directions too long"),
        pytest.param(set_tags(PixelSpacing=lambda k: [f"1.25{'000006' * (k > 3)}", "1.5"]), id="spacing rounded"),
        pytest.param(set_tags(RescaleSlope=""), id="empty slope"),
        pytest.param(set_tags(RescaleSlope=0), id="slope of 0"),
    ],
)
def test_every_voxel_has_its_value_at_its_place(tmp_path, change):
    volume, geometry = ramp_volume()
    edit(write_series(tmp_path, volume, **geometry), change)
    scan = read_only_volume(tmp_path)
    assert scan.data.shape == (6, 7, 8)
    assert ramp_error(scan.data, scan.affine) <= 0.5001  # stored values are whole


@pytest.mark.parametrize("bits_stored", [8, 7])
@pytest.mark.parametrize("change", [lambda header, k: None, rle, gzipped], ids=["as it is", "rle", "gzipped"])
def test_signed_bytes(tmp_path, change, bits_stored):
    volume, geometry = ramp_volume((7, 7, 8), origin_mm=(-8, -8, -9))  # an odd number of bytes in a slice
    tags = {"RescaleSlope": 10, "RescaleIntercept": 0, "BitsStored": bits_stored, "HighBit": bits_stored - 1}
    paths = write_series(tmp_path, volume, modality="MR", slope=10, intercept=0, dtype=np.int8, tags=tags, **geometry)
    edit(paths, change)
    scan = read_only_volume(tmp_path)
    assert scan.data.min() < 0 < scan.data.max()
    assert ramp_error(scan.data, scan.affine) <= 5.001


@pytest.mark.parametrize("frames_per_file", [None, 1])
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("step_mm", [(0, 0, 2.5), (0, 0.7, 2.5), (0, 0, -2.5)])
def test_enhanced_files(tmp_path, modality, frames_per_file, step_mm):
    volume, geometry = ramp_volume(step_mm=step_mm)
    intercept = -1024 if modality == "CT" else 0
    paths = write_series(tmp_path, np.abs(volume) if modality == "MR" else volume, modality=modality,
                         intercept=intercept, **geometry)  # fmt: skip
    write_enhanced(paths, tmp_path / "enhanced", frames_per_file)
    scan = read_only_volume(tmp_path)
    if modality == "MR":
        scan.data[ramp_volume(step_mm=step_mm)[0].transpose(1, 0, 2)[..., :: int(np.sign(step_mm[2]))] < 0] *= -1
    assert ramp_error(scan.data, scan.affine) <= 0.5
    assert len(scan.notes) == (step_mm[1] != 0)


def test_enhanced_slices_with_slopes_of_their_own(tmp_path):
    volume, geometry = ramp_volume()
    slopes = [1, 0.5, 2, 1, 0.25, 1, 3, 1]
    paths = write_series(tmp_path, volume, **geometry)
    for k, path in enumerate(paths):
        header = dcmread(path)
        stored = np.rint((volume[..., k] + 1024) / slopes[k]).astype(np.uint16)
        header.PixelData, header.RescaleSlope = stored.tobytes(), slopes[k]
        header.save_as(path)
    write_enhanced(paths, tmp_path / "enhanced")
    scan = read_only_volume(tmp_path)
    assert ramp_error(scan.data, scan.affine) <= max(slopes) / 2


@pytest.mark.parametrize("frames_per_file", [None, 4, 1])
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("order", [(0, 2, 4, 6, 1, 3, 5, 7), (1, 0, 2, 3, 4, 5, 6, 7), (0, 7, 6, 5, 4, 3, 2, 1)])
def test_frames_in_any_order(tmp_path, order, modality, frames_per_file):
    volume, geometry = ramp_volume(origin_mm=(4, 5, 9))  # positive all over, as MR is
    paths = write_series(tmp_path, volume, modality=modality, intercept=-1024 * (modality == "CT"), **geometry)
    write_enhanced([paths[k] for k in order], tmp_path / "enhanced", frames_per_file)
    scan = read_only_volume(tmp_path)
    assert ramp_error(scan.data, scan.affine) <= 0.5001


@pytest.mark.parametrize("is_tagged", [True, False])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("tilt_deg", [-18, -5, -0.45, 0.45, 5, 18])
def test_tilted_stacks_numbered_either_way(tmp_path, tilt_deg, direction, is_tagged):
    tilt = np.radians(tilt_deg)
    column, step = np.array([0, np.cos(tilt), np.sin(tilt)]), np.array([0, 0, 5.0 * direction])  # the table moves in z
    r, c, k = np.meshgrid(*map(np.arange, (7, 6, 40)), indexing="ij")
    places = c[..., None] * [2, 0, 0] + r[..., None] * 2 * column + k[..., None] * step - 50 * np.sign(step)
    tags = {"GantryDetectorTilt": float(tilt_deg)} if is_tagged else {}
    write_series(tmp_path, ramp(places), orientation=(1, 0, 0, *column), spacing_mm=(2, 2, 5), step_mm=step,
                 origin_mm=-50 * np.sign(step), tags=tags)  # fmt: skip
    scan = read_only_volume(tmp_path)
    assert ramp_error(scan.data, scan.affine) <= 0.501
    assert scan.notes == ((f"gantry tilt of {abs(tilt_deg)}.0 degrees",) if abs(tilt_deg) > 0.5 else ())


# Real files, which nibabel and pydicom bring along


def unpack(name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name.removesuffix(".gz")
    path.write_bytes(gzip.decompress((NIBABEL_DATA / name).read_bytes()))
    header = dcmread(path)
    noise = np.random.default_rng(0).integers(0, 4096, len(header.PixelData) // 2)  # their voxels are all 0
    header.PixelData = noise.astype(np.uint16).tobytes()
    header.save_as(path)
    return path


@pytest.mark.parametrize(
    ("name", "slope", "notes"),
    [("siemens_dwi_0.dcm.gz", 1, ("a mosaic",)), ("philips_mprage.dcm.gz", 2.1079365, ())],
)
def test_scanners_files_of_many_slices(tmp_path, name, slope, notes):
    path = unpack(name, tmp_path)
    scan = read_only_volume(tmp_path)
    other = wrapper_from_file(path)
    grid = np.stack(np.meshgrid(*[[0, n // 3, n - 1] for n in scan.data.shape], indexing="ij"), axis=-1).reshape(-1, 3)
    places = grid @ scan.affine[:3, :3].T + scan.affine[:3, 3]  # RAS
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ other.affine)  # its affine is LPS
    index = places @ to_index[:3, :3].T + to_index[:3, 3]
    np.testing.assert_allclose(index, np.rint(index), atol=2e-2)
    expected = slope * np.asarray(other.get_data(), float)[tuple(np.rint(index).astype(int).T)]
    np.testing.assert_allclose(scan.data[tuple(grid.T)], expected, rtol=1e-5)
    assert scan.notes == notes


def test_several_mosaics_are_a_4d_series(tmp_path):
    for name in ("siemens_dwi_0.dcm.gz", "siemens_dwi_1000.dcm.gz"):
        unpack(name, tmp_path)
    (source,) = find_sources(tmp_path).sources
    with pytest.raises(UserError, match="a 4D series, 2 mosaics: export each time point"):
        check_source(source)


@pytest.mark.parametrize(
    ("name", "mean"),
    [  # as pydicom's own decoders have it
        ("J2K_pixelrep_mismatch", -658.4368057),  # signed, 13 of 16 bits
        ("JPGExtended", 14.3699913),  # 12 bits
        ("MR_small_jpeg_ls_lossless", 518.8813477),
        ("MR_small_RLE", 518.8813477),
        ("JPEG2000", 13.4581604),
    ],
)
def test_compressed_voxels(tmp_path, name, mean):
    for k in range(5):
        image = dcmread(PYDICOM_DATA / f"{name}.dcm")
        image.Modality, image.InstanceNumber = "MR", k + 1
        image.PixelSpacing, image.ImageOrientationPatient, image.ImagePositionPatient = [1, 1], AXIAL_TAG, [0, 0, k]
        image.save_as(tmp_path / f"{k}.dcm")
    data = read_only_volume(tmp_path).data
    np.testing.assert_allclose(data.mean(axis=(0, 1), dtype=np.float64), mean, rtol=1e-6)


# Faults


def cut_file(header, _k):
    path = Path(header.filename)
    path.write_bytes(path.read_bytes()[:-20])
    return "written"


def fewer_voxels(header, _k):
    header.PixelData = header.PixelData[:-20]


def fewer_voxels_and_something_behind(header, _k):
    header.PixelData = header.PixelData[:-20]
    header.add_new(0xFFFCFFFC, "OB", bytes(500))  # padding, which makes the file long enough


def no_voxels(header, _k):
    del header.PixelData


def cut_compressed(header, _k):
    header.compress(RLELossless)
    header.PixelData = header.PixelData[:-40] + header.PixelData[-8:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_file, "im0003 is cut off: 64 of 84 bytes of voxels are left"),
        (fewer_voxels, "im0003 has 64 bytes of voxels where its size needs 84"),
        (fewer_voxels_and_something_behind, "im0003 has 64 bytes of voxels where its size needs 84"),
        (no_voxels, "im0003 has no voxels: the file is cut off, or was exported without them"),
        (cut_compressed, "im0003 cannot be read"),
    ],
)
def test_voxels_that_are_missing(tmp_path, change, message):
    volume, geometry = ramp_volume()
    edit(write_series(tmp_path, volume, **geometry)[2:3], change)
    (source,) = find_sources(tmp_path).sources
    with pytest.raises(UserError, match=message + ".*export the series again"):
        read_source(source)


@pytest.mark.parametrize(
    ("places", "message"), [((0, 1, 2, 3, 5, 6), "not evenly spaced"), ((0, 1, 2, 2, 3, 4), "a 4D series")]
)
def test_frames_of_an_enhanced_file_that_are_no_volume(tmp_path, places, message):
    volume, _ = ramp_volume((7, 6, 6))
    paths = write_series(tmp_path, volume, positions_mm=[(0, 0, z) for z in places])
    write_enhanced(paths, tmp_path / "enhanced")
    (source,) = find_sources(tmp_path).sources
    with pytest.raises(UserError, match=message):
        check_source(source)


def test_places_that_dcm2niix_sees_otherwise_are_refused(tmp_path, monkeypatch):
    volume, geometry = ramp_volume()
    write_series(tmp_path, volume, **geometry)
    (source,) = find_sources(tmp_path).sources
    load = nib.load
    monkeypatch.setattr(
        dicom_conversion.nib,
        "load",
        lambda path: nib.Nifti1Image(
            np.asarray(load(path).dataobj), load(path).affine + np.eye(4)[:, [3, 3, 3, 0]] * 3
        ),
    )
    with pytest.raises(UserError, match="dcm2niix places its first voxel 2x0x0 voxels from where"):
        read_source(source)


def test_no_room_for_a_conversion_is_said(tmp_path, monkeypatch):
    volume, geometry = ramp_volume()
    write_series(tmp_path, volume, **geometry)
    (source,) = find_sources(tmp_path).sources
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="10 bytes are free, .* are needed to convert: set TMPDIR"):
        read_source(source)

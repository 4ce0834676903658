"""Finding and reading of NIfTI files and series, by content, and every header that is handled or refused."""

import errno
import gzip
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series
from nifti_files import volume, write_nifti

from common.errors import UserError
from dataset.preparation import dicom_header
from dataset.preparation.sources import check_source, find_sources, fingerprint, read_source, source_sha256


def read_only(folder, **options):
    (source,) = find_sources(folder).sources
    return read_source(source, **options)


# Finding


def test_everything_is_found_by_content(tmp_path):
    write_nifti(tmp_path / "a" / "scan.nii.gz")
    write_nifti(tmp_path / "b" / "scan.nii")
    write_nifti(tmp_path / "b" / "without_suffix")
    write_nifti(tmp_path / ".hidden.nii")
    write_series(tmp_path / "c" / "deep", np.zeros((4, 4, 6)), number=12)
    (tmp_path / "readme.txt").write_text("text")
    (tmp_path / "d.nii.gz").write_bytes(b"no image, but named like one")
    found = find_sources(tmp_path, num_workers=2)
    series = found.sources[3].name
    assert [source.name for source in found.sources] == ["a/scan", "b/scan", "b/without_suffix", series, "d"]
    assert series.startswith("c/deep/series012_")
    assert (found.num_other, found.failed) == (1, [])
    with pytest.raises(UserError, match=r"d\.nii\.gz: not a NIfTI image"):
        read_source(found.sources[4])


def test_pipes_are_not_read(tmp_path):
    write_nifti(tmp_path / "scan.nii.gz")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    found = find_sources(tmp_path)
    assert [source.name for source in found.sources] == ["scan"]
    assert [reason for _, reason in found.failed] == ["cannot be read (No such file or directory)"]


def test_links_in_circles_end(tmp_path):
    write_nifti(tmp_path / "a" / "scan.nii.gz")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert [source.name for source in find_sources(tmp_path).sources] == ["a/scan"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("slice.dcm", b"", "an empty file"),
        ("SLICE.IMA", b"no DICOM", "named as DICOM, but its content is not"),
        ("slice.dcm.gz", gzip.compress(b"no DICOM", mtime=0), "named as DICOM, but its content is not"),
        ("brain.mgz", gzip.compress(b"any", mtime=0), "volumes of this format are not read: convert it to .nii.gz"),
        ("chest.nrrd", b"NRRD0004", "volumes of this format are not read: convert it to .nii.gz"),
        ("pair.img", b"voxels", "volumes of this format are not read: convert it to .nii.gz"),
        ("report.pdf", b"", None),
        ("DICOMDIR", b"", None),
    ],
)
def test_images_that_cannot_be_read_are_named(tmp_path, name, content, reason):
    write_nifti(tmp_path / "scan.nii.gz")
    (tmp_path / name).write_bytes(content)
    if name == "pair.img":
        write_nifti(tmp_path / "pair.nii")
        (tmp_path / "pair.nii").rename(tmp_path / "pair.hdr")
    found = find_sources(tmp_path)
    assert [source.name for source in found.sources] == ["scan"]
    assert [(path, why.split(reason)[0]) for path, why in found.failed] == ([(str(tmp_path / name), "")] * bool(reason))


def test_a_gzip_file_that_inflates_is_no_dicom_image(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_header, "MOST_INFLATED", 2**20)
    (tmp_path / "bomb.dcm.gz").write_bytes(gzip.compress(bytes(128) + b"DICM" + bytes(2**22)))
    ((_, reason),) = find_sources(tmp_path).failed
    assert "the gzip file holds more than 0 GiB: unpack it if that is right" in reason


def test_archives_are_counted(tmp_path):
    (tmp_path / "patient1.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="1 archives, unpack them, and 0 other files"):
        find_sources(tmp_path)
    write_nifti(tmp_path / "scan.nii.gz")
    assert find_sources(tmp_path).archives == [tmp_path / "patient1.zip"]


def test_a_closed_folder_is_named(tmp_path, monkeypatch):
    write_nifti(tmp_path / "scan.nii.gz")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(tmp_path / "closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_sources(tmp_path)
    assert found.failed == [
        (str(tmp_path / "closed"), "cannot be listed or entered (Permission denied): what is in it?")
    ]


def test_damaged_files_beside_a_series_are_noted(tmp_path):
    write_series(tmp_path / "a", np.zeros((4, 4, 6)))
    write_series(tmp_path / "b", np.zeros((4, 4, 6)))
    (tmp_path / "a" / "last").touch()  # as the others without suffix
    (tmp_path / "b" / "done.txt").touch()
    found = find_sources(tmp_path)
    assert found.failed == [(str(tmp_path / "a" / "last"), "an empty file among DICOM images")]
    notes = [source.series.notes for source in found.sources]
    assert notes == [("1 damaged file(s) beside it, e.g. last: slices may be missing",), ()]
    assert found.num_other == 1


def test_nothing_to_find(tmp_path):
    with pytest.raises(UserError, match="no NIfTI file and no DICOM image below it"):
        find_sources(tmp_path)
    with pytest.raises(UserError, match="scan.nii.gz is a file: give the folder that it lies in"):
        find_sources(write_nifti(tmp_path / "scan.nii.gz"))
    with pytest.raises(UserError, match="no such folder"):
        find_sources(tmp_path / "missing")


# NIfTI


def test_nifti_is_read_as_it_is(tmp_path):
    affine = np.array([[0, -2, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / "a.nii.gz", affine=affine)
    scan = read_only(tmp_path)
    np.testing.assert_array_equal(scan.data, volume())
    np.testing.assert_allclose(scan.affine, affine)
    assert scan.notes == ()


@pytest.mark.parametrize(("unit", "factor"), [("meter", 0.001), ("micron", 1000), ("unknown", 1)])
def test_units_are_converted(tmp_path, unit, factor):
    write_nifti(tmp_path / "a.nii.gz", affine=np.diag([1 * factor, 2 * factor, 3 * factor, 1]), units=unit)
    scan = read_only(tmp_path)
    np.testing.assert_allclose(scan.affine, np.diag([1, 2, 3, 1.0]), rtol=1e-6)
    assert scan.notes == (() if unit == "unknown" else (f"header in {unit}, converted to mm",))


@pytest.mark.parametrize("factor", [0.001, 1000])
def test_wrong_units_are_refused(tmp_path, factor):
    write_nifti(tmp_path / "a.nii.gz", affine=np.diag([factor, factor, factor, 1]))
    with pytest.raises(UserError, match=r"a\.nii\.gz: spacing .* not that of a scan .*wrong units"):
        read_only(tmp_path)


def test_missing_orientation_is_refused_or_assumed(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", codes=(0, 0))
    with pytest.raises(UserError, match=r"a\.nii\.gz: no orientation .*assume-orientation"):
        read_only(tmp_path)
    scan = read_only(tmp_path, orientation="PIR")
    assert "".join(nib.aff2axcodes(scan.affine)) == "PIR"
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), [1, 2, 3])
    assert scan.notes == ("orientation assumed to be PIR",)


def test_orientation_in_the_header_is_never_overruled(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    assert "".join(nib.aff2axcodes(read_only(tmp_path, orientation="LPS").affine)) == "RAS"


def test_zero_spacing_is_refused(tmp_path):
    write_nifti(tmp_path / "q" / "a.nii.gz", codes=(1, 0), header={"pixdim": [1, 1, 1, 0, 0, 0, 0, 0]})
    write_nifti(tmp_path / "none" / "a.nii.gz", codes=(0, 0), header={"pixdim": [1, 1, 2, 0, 0, 0, 0, 0]})
    for folder, spacing in (("q", "1 x 1 x 0"), ("none", "1 x 2 x 0")):
        with pytest.raises(UserError, match=rf"a\.nii\.gz: a spacing of 0 in the header \({spacing} mm\)"):
            read_only(tmp_path / folder)


@pytest.mark.parametrize("srow_x", [[1, 0, 3, 0], [1, 0, 0, 0]])
def test_axes_in_one_plane_are_refused(tmp_path, srow_x):
    write_nifti(tmp_path / "a.nii.gz", codes=(0, 1), header={"srow_z": [0, 0, 0, 0], "srow_x": srow_x})
    with pytest.raises(UserError, match=r"a\.nii\.gz: no orientation \(sform .* is singular\)"):
        read_only(tmp_path)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((6, 7, 1), np.float32), "a 2D image"),
        (np.zeros((6, 7), np.float32), "a 2D image"),
        (np.zeros((6, 7, 8, 3), np.float32), "a 4D series"),
        (np.zeros((6, 7, 8), RGB), "colour or complex"),
        (np.full((6, 7, 8), np.nan, np.float32), "NaN or infinite"),
    ],
)
def test_files_that_are_no_volume(tmp_path, data, message):
    write_nifti(tmp_path / "a.nii.gz", data)
    with pytest.raises(UserError, match=rf"a\.nii\.gz: .*{message}"):
        read_only(tmp_path)


def test_truncated_nifti(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.nii\.gz: .*truncated"):
        read_only(tmp_path)


def test_what_headers_tell(tmp_path):
    write_nifti(tmp_path / "n" / "a.nii.gz", np.zeros((6, 7, 8, 3), np.float32))
    write_series(tmp_path / "d", np.zeros((4, 4, 3)))
    for folder, message in (("n", "a 4D series"), ("d", "no volume")):
        (source,) = find_sources(tmp_path / folder).sources
        with pytest.raises(UserError, match=message):
            check_source(source)


# Identity


def test_identity_is_that_of_the_content(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    write_series(tmp_path / "d", np.zeros((4, 4, 6)))
    nifti, series = find_sources(tmp_path).sources
    assert fingerprint(series)["num_files"] == 6
    before = {source.name: source_sha256(source) for source in (series, nifti)}
    assert len(set(before.values())) == 2
    turned = replace(series, files=series.files[::-1])  # the order of files, by their names, doesn't matter
    assert source_sha256(turned) == before[series.name]
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert source_sha256(nifti) != before["a"]

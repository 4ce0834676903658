"""Odd fields of NIfTI headers: what is right is read by value, what isn't is refused by the name of the field."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from dataset.volumes import volume_io
from dataset.volumes.volume_io import read_header, read_latent, read_latent_header, read_nifti

DATA = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
NUM_BYTES = DATA.nbytes
KINDS = {"1": (nib.Nifti1Image, 348, 352), "2": (nib.Nifti2Image, 540, 544)}  # size of the header, of it with its flag


def stored(kind: str = "1", at: int | None = None, extension: bool = False, **fields) -> bytes:
    """A file whose voxels begin at byte `at`, whatever its fields say."""
    image_class, size, first = KINDS[kind]
    content = image_class(DATA, np.diag([1, 2, 3, 1.0])).to_bytes()
    raw = image_class.header_class(content[:size], check=False)
    raw.set_slope_inter(1, 0)
    for name, value in fields.items():
        raw[name] = value
    flag = bytes([extension, 0, 0, 0])
    return (raw.binaryblock + flag).ljust(at or first, b"x")[: at or first] + content[first:]


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [None, 0, 1, 16, 400])
def test_voxels_are_read_from_where_they_begin(tmp_path, kind, gap):
    """gap: bytes between the header and the voxels; None: the header says byte 0."""
    first = KINDS[kind][2]
    content = stored(kind, first + (gap or 0), vox_offset=0 if gap is None else first + gap)
    data, _ = read_nifti(write(tmp_path / "a.nii.gz", content))
    np.testing.assert_array_equal(data, DATA)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"scl_slope": 1, "scl_inter": -1024}, DATA - 1024.0),
        ({"scl_slope": 0.5, "scl_inter": 3}, DATA * 0.5 + 3),
        ({"scl_slope": np.nan, "scl_inter": np.nan}, DATA),
        ({"scl_slope": np.inf, "scl_inter": 0}, DATA),
        ({"scl_slope": 0, "scl_inter": 55}, DATA),  # a slope of 0 means not scaled, so the standard
        ({"scl_slope": 0, "scl_inter": np.nan}, DATA),
        ({"magic": b"ni1"}, DATA),  # that of a pair, but the voxels are there
        ({"sizeof_hdr": 0}, DATA),
        ({"bitpix": 99}, DATA),
    ],
)
def test_odd_fields_that_do_not_matter(tmp_path, fields, expected):
    data, _ = read_nifti(write(tmp_path / "a.nii.gz", stored(**fields)))
    np.testing.assert_array_equal(data, expected)


def test_big_endian(tmp_path):
    image = nib.Nifti1Image(DATA.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    data, header = read_nifti(write(tmp_path / "a.nii.gz", image.to_bytes()))
    np.testing.assert_array_equal(data, DATA)
    assert header.shape == DATA.shape


PAIR = nib.Nifti1Pair(DATA, np.eye(4)).header.binaryblock
ANALYZE = nib.AnalyzeHeader()
ANALYZE.set_data_shape(DATA.shape)
INTERCEPT = r"scl_inter is (nan|inf) \(scl_slope 2\)"
# (content, what is said, whether the header alone tells)
WRONG = {
    "offset within the header": (stored(vox_offset=348, at=348), "vox_offset is 348, voxels begin at byte 352", True),
    "offset at the start": (stored(vox_offset=1), "vox_offset is 1,", True),
    "offset below zero": (stored(vox_offset=-352), "vox_offset is -352,", True),
    "offset NaN": (stored(vox_offset=np.nan), "vox_offset is nan,", True),
    "offset infinite": (stored(vox_offset=np.inf), "vox_offset is inf,", True),
    "offset NIfTI-2": (stored("2", vox_offset=352), "vox_offset is 352, voxels begin at byte 544", True),
    "offset 0 beside extensions": (
        stored(vox_offset=0, at=384, extension=True),
        "vox_offset is 0 beside header ext",
        True,
    ),
    "offset beyond the file": (stored(vox_offset=99999), rf"vox_offset is 99999, but {NUM_BYTES} bytes", False),
    "offset too far": (stored(vox_offset=368), "vox_offset is 368, but .* begin at byte 352 at the latest", False),
    "intercept NaN": (stored(scl_slope=2, scl_inter=np.nan), INTERCEPT, True),
    "intercept infinite": (stored(scl_slope=2, scl_inter=np.inf), INTERCEPT, True),
    "bits": (stored(datatype=1, bitpix=1), r"datatype is 1 \(single bits\)", True),
    "no type": (stored(datatype=0), "datatype is 0, not a type", True),
    "unknown type": (stored(datatype=7777), "datatype is 7777, not a type", True),
    "no axes": (stored(dim=[0] * 8), r"empty \(size 0\)", True),
    "too many axes": (stored(dim=[9] * 8), r"dim\[0\] is 9", True),
    "an axis below zero": (stored(dim=[3, 6, -7, 8, 1, 1, 1, 1]), r"empty \(size 6x-7x8\)", True),
    "half a pair": (PAIR, r"a pair of files \(.hdr and .img\).*convert the pair", True),
    "half a pair with an offset": (stored(magic=b"ni1", vox_offset=352)[:352], r"a pair of files \(.hdr and", False),
    "Analyze": (ANALYZE.binaryblock, "magic is b'' in place of b'n\\+1': an Analyze header", True),
    "another magic": (stored(magic=b"n+3"), r"magic is b'n\+3' in place of b'n\+1'", True),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_field_that_is_wrong_is_named(tmp_path, case):
    content, message, is_header_enough = WRONG[case]
    path = write(tmp_path / "a.nii.gz", content)
    for read in (read_header, read_nifti)[not is_header_enough :]:
        with pytest.raises(UserError, match=rf"a\.nii\.gz: .*{message}") as caught:
            read(path)
        assert "truncated" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            stored()[:-1],
            rf"truncated: {NUM_BYTES + 351} bytes, {NUM_BYTES + 352} are needed for 6x7x8 voxels of",
        ),
        (stored(vox_offset=400)[:400], r"truncated: 400 bytes, \d+ are needed .* from byte 400 \(vox_offset\)"),
        (stored()[:200], "truncated: 200 of 348 bytes of header"),
        (stored(dim=[3, 6, 7, 9, 1, 1, 1, 1]), "truncated: .* 6x7x9 voxels"),
    ],
)
def test_truncated_is_what_lacks_bytes(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_nifti(write(tmp_path / "a.nii.gz", content))


HUGE = {
    "2000³": dict(dim=[3, 2000, 2000, 2000, 1, 1, 1, 1]),
    "60000³": dict(kind="2", dim=[3, 60000, 60000, 60000, 1, 1, 1, 1]),
    "7 axes": dict(dim=[7] + [32767] * 7),
    "beyond 64 bits": dict(kind="2", dim=[3, 2**62, 2**62, 2**62, 1, 1, 1, 1]),
    "offset 1e30": dict(vox_offset=1e30),
    "offset beyond 64 bits": dict(kind="2", vox_offset=2**63 - 1),
}


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_says_that_it_is_huge_is_compared_with_the_file(tmp_path, case, name):
    path, content = tmp_path / name, stored(**HUGE[case])
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    what = "vox_offset is [0-9.e+]+, but 672 bytes" if "offset" in case else "dim says .*, but the file has"
    for read in (read_header, read_nifti, read_latent, read_latent_header)[:: 1 if case == "2000³" else 2]:
        with pytest.raises(UserError, match=rf"a\.nii.*: {what} ") as caught:
            read(path)
        assert "truncated" not in str(caught.value)


def test_what_inflates_is_not_read_on(tmp_path, monkeypatch):
    """A few kilobytes of gzip stand for megabytes, or for what the header says where memory does not suffice."""
    path = write(tmp_path / "a.nii.gz", stored() + bytes(2**20))
    np.testing.assert_array_equal(read_nifti(path)[0], DATA)
    path.write_bytes(gzip.compress(stored()) + gzip.compress(bytes(2**26)) + b"never read: no gzip")
    with pytest.raises(UserError, match=f"goes on after the {352 + NUM_BYTES} bytes that its header describes"):
        read_nifti(path)
    large = stored(dim=[3, 600, 1000, 1000, 1, 1, 1, 1], datatype=2, bitpix=8)
    path.write_bytes(gzip.compress(large + bytes(2**22)) * 150)
    monkeypatch.setattr(volume_io, "free_main_memory", lambda: 2**31)
    with pytest.raises(UserError, match="600x1000x1000 voxels of type uint8 take 3 GB of memory, 2.15 GB are free"):
        read_nifti(path)
    monkeypatch.setattr(volume_io, "whole_bytes", lambda *args: bytearray(2**62))
    monkeypatch.setattr(volume_io, "free_main_memory", lambda: 2**60)
    with pytest.raises(UserError, match="3 GB of memory are needed and not free"):
        read_nifti(path)


def test_compressed_files_that_are_damaged_but_not_cut_off(tmp_path):
    path = write(tmp_path / "a.nii.gz", stored())
    path.write_bytes(path.read_bytes() + b"trailing bytes")
    with pytest.raises(UserError, match=r"a\.nii\.gz: the compressed file is damaged"):
        read_nifti(path)
    path.write_bytes(gzip.compress(stored())[:-20])
    with pytest.raises(UserError, match=r"a\.nii\.gz: the file is truncated"):
        read_nifti(path)


def test_what_is_found_in_place_of_an_image(tmp_path):
    for content, message in ((b"version https://git-lfs", "begins with b'version https://'"), (b"", "is empty")):
        with pytest.raises(UserError, match=f"not a NIfTI image: the file {message}"):
            read_nifti(write(tmp_path / "a.nii.gz", content))

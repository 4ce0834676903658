"""Which of the two geometries of a NIfTI header counts, by value: a ramp over the patient, at world coordinates."""

import re

import nibabel as nib
import numpy as np
import pytest
from nifti_files import write_nifti

from common.errors import UserError
from dataset.checking import examine
from dataset.preparation.sources import Source, check_source, read_source
from dataset.volumes.volume_io import read_header, read_volume

SHAPE, SPACING = (6, 7, 8), (1.5, 1.25, 2.0)
STUB = {"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]}
ZERO = dict.fromkeys(STUB, [0, 0, 0, 0])


def turned(degrees: float, axis: int = 2) -> np.ndarray:
    """(3, 3)"""
    turn, angle = np.eye(3), np.radians(degrees)
    i, j = (k for k in range(3) if k != axis)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def affine_of(axes: np.ndarray, spacing=SPACING) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = (-7, 11, 3)
    return affine


def ramp(affine: np.ndarray) -> np.ndarray:
    """8 x + 5 y + 3 z + 40 in mm of the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return ((index @ affine[:3, :3].T + affine[:3, 3]) @ [8, 5, 3] + 40).astype(np.float32)


def qform(affine: np.ndarray, stretch: float = 1.0) -> dict:
    """The fields of a qform; the quaternion is longer than 1 by the factor `stretch`."""
    header = nib.Nifti1Header()
    header.set_qform(affine, 1)
    fields = "pixdim quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z".split()
    return {name: header[name] * (stretch if name.startswith("quat") else 1) for name in fields}


def sform(affine: np.ndarray) -> dict:
    return dict(zip(STUB, affine[:3], strict=True))


PLAIN = affine_of(np.eye(3))
OBLIQUE = affine_of(turned(50) @ turned(50, 0))
HALF_TURN = affine_of(2 * np.outer([0.6, 0.64, 0.48], [0.6, 0.64, 0.48]) - np.eye(3))  # a quaternion without real part
SHEARED = PLAIN.copy()
SHEARED[1, 2] = 0.55  # a gantry tilted by 15 degrees
LONG = affine_of(np.eye(3), (1.5, 1.25, np.hypot(2, 0.55)))  # its qform, where sizes are those along the axes
LEFT = affine_of(np.diag([-1, 1, 1]))


def written(tmp_path, true: np.ndarray, codes=(1, 1), **header):
    return write_nifti(tmp_path / "scan.nii.gz", ramp(true), PLAIN, codes=codes, header=header)


def scan_of(path, **options):
    return read_source(Source("scan", (path,)), **options)


# (codes of qform and sform, fields, what is right, a note)
SOUND = {
    "both alike": ((1, 1), qform(OBLIQUE) | sform(OBLIQUE), OBLIQUE, None),
    "alike but for rounding": ((1, 1), qform(OBLIQUE) | sform(OBLIQUE + 5e-5), OBLIQUE, None),
    "only a qform": ((1, 0), qform(OBLIQUE) | ZERO, OBLIQUE, None),
    "only a sform": ((0, 1), sform(OBLIQUE), OBLIQUE, None),
    "a left-handed qform": ((1, 0), qform(LEFT), LEFT, None),
    "sform zero": ((1, 1), qform(OBLIQUE) | ZERO, OBLIQUE, "sform .* is zero: qform taken"),
    "sform singular": ((2, 1), qform(OBLIQUE) | sform(OBLIQUE) | {"srow_z": [0] * 4}, OBLIQUE, "sform .* singular"),
    "sform not finite": ((1, 4), qform(LEFT) | sform(LEFT) | {"srow_y": [np.nan] * 4}, LEFT, "sform .* not finite"),
    "sform a stub": ((1, 2), qform(OBLIQUE) | STUB, OBLIQUE, r"sform .* identity, .* 1\.5 x 1\.25 x 2 mm"),
    "sform a stub, qform straight": ((1, 2), qform(PLAIN) | STUB, PLAIN, "sform .* is the identity.*: qform taken"),
    "qform a stub": ((1, 2), qform(np.eye(4)) | sform(OBLIQUE), OBLIQUE, "qform .* is the identity: sform taken"),
    "sizes of a stub alone": ((0, 2), {"pixdim": [1] * 8} | sform(OBLIQUE), OBLIQUE, None),
    "quaternion rounded": ((1, 0), qform(HALF_TURN, 1 + 2e-6), HALF_TURN, None),
    "quaternion rounded a lot": ((1, 0), qform(HALF_TURN, 1 + 9e-4), HALF_TURN, None),
    "quaternion none": ((1, 1), qform(HALF_TURN, 1.1) | sform(HALF_TURN), HALF_TURN, r"qform .* length 1\.1"),
    "quaternion NaN": ((1, 1), qform(PLAIN) | sform(OBLIQUE) | {"quatern_c": np.nan}, OBLIQUE, "qform .* not finite"),
    "qform without sizes": ((1, 1), qform(LEFT) | sform(LEFT) | {"pixdim": [0] * 8}, LEFT, "qform .* no sizes, "),
    "aligned": ((1, 2), qform(PLAIN) | sform(affine_of(turned(6))), affine_of(turned(6)), "sform .* is turned"),
    "sheared": ((1, 1), qform(PLAIN) | sform(SHEARED), SHEARED, "sform .* is sheared.*: sform taken"),
    "sheared, sizes along axes": ((1, 1), qform(LONG) | sform(SHEARED), SHEARED, "sform .* is sheared.*: sform taken"),
    "sheared alone": ((0, 1), qform(LONG) | sform(SHEARED), SHEARED, None),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_the_sound_geometry_counts(tmp_path, case):
    codes, fields, true, note = SOUND[case]
    scan = scan_of(written(tmp_path, true, codes, **fields))
    np.testing.assert_allclose(scan.data, ramp(scan.affine), atol=0.02)
    np.testing.assert_allclose(scan.affine, true, atol=2e-3)
    assert len(scan.notes) == (note is not None)
    if note:
        assert re.match(note, scan.notes[0])


# (codes, fields, what is said)
CONTRADICTIONS = {
    "mirrored": ((1, 1), qform(LEFT) | sform(PLAIN), "axes RAS by the sform, LAS by the qform"),
    "turned by 180 degrees": ((1, 1), qform(affine_of(turned(180))) | sform(PLAIN), "RAS by the sform, LPS by"),
    "exchanged": ((1, 1), qform(affine_of(turned(90), (1.25, 1.5, 2))) | sform(PLAIN), "RAS by the sform, ALS by"),
    "mirrored, of 1 mm": ((1, 1), qform(np.eye(4)) | sform(np.diag([-1, -1, 1, 1])), "LPS by the sform, RAS by"),
    "sizes": ((1, 1), qform(PLAIN) | sform(affine_of(np.eye(3), (3, 2.5, 4))), "spacing 3 x 2.5 x 4 mm by"),
    "sheared and other sizes": ((1, 1), qform(affine_of(np.eye(3), (3, 1.25, 2))) | sform(SHEARED), "spacing 1.5 x"),
    "sizes beside a sform": ((0, 1), sform(np.diag([-1, -1, 1, 1])), "1 x 1 x 1 mm by the sform, 1.5 .* by the pixdim"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_two_that_disagree_are_refused_by_preparation_alone(tmp_path, case):
    codes, fields, message = CONTRADICTIONS[case]
    fields = {"pixdim": [1, *SPACING, 0, 0, 0, 0]} | fields
    path = written(tmp_path, PLAIN, codes, **fields)
    for judge in (check_source, read_source):
        with pytest.raises(UserError, match=rf"scan\.nii\.gz: two geometries in the header that disagree, .*{message}"):
            judge(Source("scan", (path,)), orientation="RAS")
    assert read_volume(path).data.shape == (1, 8, 6, 7)  # training takes voxels alone
    header = read_header(path)
    np.testing.assert_allclose(header.affine[:3], [fields[name] for name in STUB], rtol=1e-6)
    problems = examine.header_problems(header)
    assert (problems[0].kind, problems[0].found) == (examine.CONTRADICTION, header.geometry_fault)


# (codes, fields, what is said)
UNSOUND = {
    "none": ((0, 0), {}, "qform and sform code are 0"),
    "a stub": ((0, 2), STUB, r"sform .* is the identity, but pixdim 1\.5 x 1\.25 x 2 mm"),
    "a zero": ((0, 1), ZERO, r"sform \(srow_x, srow_y, srow_z\) is zero"),
    "no turn": ((1, 0), qform(HALF_TURN, 1.1), r"qform \(quatern_b, .* length 1\.1"),
    "both": ((1, 1), qform(HALF_TURN, 1.1) | ZERO, r"sform .* zero; qform .* length 1\.1"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_without_a_sound_geometry_the_orientation_is_asked_for(tmp_path, case):
    codes, fields, message = UNSOUND[case]
    path = written(tmp_path, PLAIN, codes, **{"pixdim": [1, *SPACING, 0, 0, 0, 0]} | fields)
    with pytest.raises(UserError, match=rf"scan\.nii\.gz: no orientation \({message}.*--assume-orientation"):
        scan_of(path)
    scan = scan_of(path, orientation="LAS")
    np.testing.assert_allclose(scan.affine, np.diag([-1.5, 1.25, 2, 1]), rtol=1e-6)
    assert scan.notes == ("orientation assumed to be LAS",)
    header = read_header(path)
    assert (header.is_oriented, header.spacing_mm) == (False, SPACING)
    assert [problem.kind for problem in examine.header_problems(header)] == [examine.NO_ORIENTATION]
    np.testing.assert_allclose(scan.data, ramp(PLAIN), rtol=1e-6)


@pytest.mark.parametrize(("size", "shown"), [(0, "0"), (-2, "-2"), (np.nan, "nan"), (np.inf, "inf")])
@pytest.mark.parametrize("codes", [(1, 0), (0, 0)])
def test_sizes_that_are_none(tmp_path, size, shown, codes):
    path = written(tmp_path, PLAIN, codes, pixdim=[1, 1, 1, size, 0, 0, 0, 0])
    with pytest.raises(UserError, match=rf"a spacing of {shown} in the header \(1 x 1 x {shown} mm\): correct it"):
        scan_of(path, orientation="RAS")


def test_notes_of_headers_are_told_by_the_check(tmp_path):
    path = written(tmp_path, PLAIN, **qform(PLAIN) | ZERO)
    facts = {"CT": [examine.examine_volume(path, (-200, 400))]}
    assert examine.volume_set_problems(facts, (-200, 400)) == []
    assert "CT: 1 headers: sform (srow_x, srow_y, srow_z) is zero: qform taken" in examine.volume_set_notes(facts, 6)

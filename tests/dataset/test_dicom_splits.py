"""Which images of one DICOM series are volumes of their own, by value, and what they are called."""

from pathlib import Path

import numpy as np
import pytest
from dicom_files import ramp_error, ramp_volume, write_series
from pydicom.uid import generate_uid

from common.errors import UserError
from dataset.preparation.sources import check_source, find_sources, read_source


@pytest.mark.parametrize(
    ("modality", "first", "second", "are_same"),
    [
        ("CT", {}, {}, True),
        ("CT", {}, {"RescaleSlope": 2}, False),
        ("CT", {}, {"RescaleIntercept": 0}, False),
        ("MR", {}, {"RescaleSlope": 1, "RescaleIntercept": 0}, True),  # what isn't said is 1 and 0
        ("MR", {}, {"RescaleSlope": 2, "RescaleIntercept": 0}, False),
    ],
)
def test_copies_have_the_same_values_not_only_the_same_bytes(tmp_path, modality, first, second, are_same):
    volume, geometry = ramp_volume(origin_mm=(4, 5, 9))
    uid = generate_uid()
    for name, tags in (("first", first), ("second", second)):
        write_series(tmp_path, volume, modality=modality, intercept=-1024 * (modality == "CT"), uid=uid, prefix=name,
                     tags=tags, **geometry)  # fmt: skip
    (source,) = find_sources(tmp_path).sources
    if are_same:
        scan = read_source(source)
        assert scan.notes == ("8 duplicate slice(s) left out",)
        assert ramp_error(scan.data, scan.affine) <= 0.5001
    else:
        with pytest.raises(UserError, match="a 4D series, 2 different images of one position, 8 positions"):
            check_source(source)


@pytest.mark.parametrize(
    ("tag", "of_slice", "num_volumes"),
    [
        pytest.param("EchoTime", lambda k: 10 * (k % 2 + 1), 2, id="echoes in turn"),
        pytest.param("EchoTime", lambda k: 10 * (k // 10 + 1), 2, id="an echo above the other"),
        pytest.param("EchoTime", lambda k: 10 * (k % 4 + 1), 4, id="four echoes in turn"),
        pytest.param("ConvolutionKernel", lambda k: "B30" if k < 10 else "B70", 2, id="a kernel above the other"),
        pytest.param("ConvolutionKernel", lambda k: ["B30", "B70"][k % 2], 2, id="kernels in turn"),
        pytest.param("ConvolutionKernel", lambda k: "B30" if k < 17 else "B70", 1, id="too few of a kernel"),
        pytest.param("EchoTime", lambda k: 10 + k / 100, 1, id="an echo time for each"),
        pytest.param("EchoTime", lambda k: [10, 20, 20][k % 3], 1, id="echoes without even places"),
        pytest.param("ImageType", lambda k: ["ORIGINAL", "PRIMARY", "AB"[k % 2]], 1, id="image types in turn"),
        pytest.param("AcquisitionNumber", lambda k: k // 10, 1, id="acquisitions"),
        pytest.param("SeriesDescription", lambda k: "ab"[k // 10], 1, id="descriptions"),
    ],
)
@pytest.mark.parametrize("has_copy", [False, True])
def test_volumes_whose_places_together_are_even(tmp_path, tag, of_slice, num_volumes, has_copy):
    volume, geometry = ramp_volume((7, 6, 20), origin_mm=(4, 5, 9))
    kind = {"modality": "MR", "intercept": 0} if tag == "EchoTime" else {}
    paths = write_series(tmp_path, volume, each=[{tag: of_slice(k)} for k in range(20)], **kind, **geometry)
    if has_copy:
        (tmp_path / "copy").write_bytes(paths[3].read_bytes())
    sources = find_sources(tmp_path).sources
    assert len({source.name for source in sources}) == len(sources) == num_volumes
    scans = [read_source(source) for source in sources]
    assert sorted(scan.data.shape[2] for scan in scans) == [20 // num_volumes] * num_volumes
    assert max(ramp_error(scan.data, scan.affine) for scan in scans) <= 0.5001
    assert sum(scan.notes == ("1 duplicate slice(s) left out",) for scan in scans) == has_copy


def person(folder: Path, name: str, uid: str, value: int) -> None:
    tags = {"PatientID": name, "PatientName": name, "StudyInstanceUID": f"1.2.{value}"}
    write_series(folder, np.full((7, 6, 8), float(value)), uid=uid, prefix=name, tags=tags)


@pytest.mark.parametrize("uid", [generate_uid(), ""], ids=["one identifier", "none"])
@pytest.mark.parametrize("second", ["A", "B"])
def test_a_second_person_in_another_folder_renames_nobody(tmp_path, second, uid):
    person(tmp_path / "A", "one", uid, 100)
    (alone,) = find_sources(tmp_path).sources
    person(tmp_path / second, "two", uid, 200)
    values = {source.name: np.unique(read_source(source).data).tolist() for source in find_sources(tmp_path).sources}
    assert sorted(values.values()) == [[100], [200]]
    assert {name.split("/")[0] for name in values} == {"A", second}
    if second == "B" or not uid:
        assert values[alone.name] == [100]

"""Which images of one DICOM series are volumes of their own, by value, and what they are called."""

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

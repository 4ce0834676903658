"""Whatever comes in by the header of a NIfTI file, the program ends soon with a UserError or a right result."""

import gzip
import struct
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from fuzz.examples import look
from hypothesis import strategies as st
from nifti_files import write_nifti

from dataset.volumes.volume_io import read_header, read_volume

FIELDS = {  # of the header: place, form
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent": (68, "h"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    "units": (123, "B"), "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "6f"),
    "srow": (280, "12f"), "magic": (344, "4s"),
}  # fmt: skip
floats = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e30, 352.0, 348.0, 353.5])
shorts = st.integers(-(2**15), 2**15 - 1) | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, 512, 768, 2000, 32767])


def field_bytes(name: str) -> st.SearchStrategy:
    place, form = FIELDS[name]
    size, kind = struct.calcsize(f"<{form}"), form[-1]
    if kind in "Bs":
        return st.binary(min_size=size, max_size=size).map(lambda content: (place, content))
    count = int(form[:-1] or 1)
    single = {"i": st.integers(-(2**31), 2**31 - 1), "h": shorts, "f": floats}[kind]
    items = st.lists(single, min_size=count, max_size=count)
    return items.map(lambda found: (place, struct.pack(f"<{form}", *found)))


changes = st.lists(st.sampled_from(sorted(FIELDS)).flatmap(field_bytes), max_size=3)
nifti_files = st.tuples(changes, st.none() | st.integers(0, 3000), st.booleans(), st.binary(max_size=8))
ZEROS = gzip.compress(bytes(2**24))


def nifti_content(example) -> bytes:
    overwritten, length, _, tail = example
    content = bytearray(base_content())
    for place, new in overwritten:
        content[place : place + len(new)] = new
    return bytes(content[:length]) + tail


def nifti_door(folder: Path, example) -> None:
    content = example if isinstance(example, bytes) else nifti_content(example)
    path = folder / "x.nii.gz"
    path.write_bytes(content if isinstance(example, bytes) else gzip.compress(content, 1) if example[2] else content)
    header = read_header(path)
    volume = read_volume(path).data
    assert volume.numel() == np.prod(header.shape)
    assert volume.isfinite().all()


def dims(*sizes: int) -> tuple:
    return [(40, struct.pack("<8h", len(sizes), *sizes, *[1] * (7 - len(sizes))))]


@lru_cache
def base_content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_nifti(Path(folder) / "x.nii").read_bytes()


def test_nifti_headers():
    known = {
        "large": (dims(2000, 2000, 2000), None, True, b""),
        "largest": (dims(32767, 32767, 32767), None, True, b""),
        "offset": ([(108, struct.pack("<f", 1e30))], None, True, b""),
        "inflates": gzip.compress(base_content()) + ZEROS * 64,
        "inflates whole": gzip.compress(nifti_content((dims(2000, 2000, 2000), 352, True, b""))) + ZEROS * 64,
    }
    look(nifti_door, nifti_files, known.values())

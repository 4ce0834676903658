"""NIfTI files with the headers that tests need, odd ones among them."""

import gzip

import nibabel as nib
import numpy as np


def volume(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def write_nifti(path, data=None, affine=None, *, units="mm", codes=(1, 1), header=None):
    """A NIfTI file of `data`, its header fields overwritten by `header` as they stand in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume() if data is None else data, np.diag([1, 2, 3, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units(units)
    content = bytearray(image.to_bytes())
    raw = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in {"qform_code": codes[0], "sform_code": codes[1], **(header or {})}.items():
        raw[name] = value
    content[:348] = raw.binaryblock
    path.write_bytes(gzip.compress(bytes(content)) if path.name.endswith("gz") else bytes(content))
    return path

"""Runs of the preprocessing script on a small folder of mixed files, as tests share them."""

import sys
from pathlib import Path

import numpy as np
from dicom_files import write_series

from dataset.preprocess import main
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import nifti_to_tensor, write_volume

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, str(ROOT / "dataset" / "preprocess.py")]
CT = ("--name", "Thorax", "--modality", "CT", "--multiple", 4)


def ct(seed: int = 0, shape=(12, 10, 8)) -> np.ndarray:
    """A noisy block of soft tissue in air, HU."""
    rng = np.random.default_rng(seed)
    data = np.full(shape, -1000.0)
    data[2:-2, 2:-2, 1:-1] = 40
    return np.round(data + rng.uniform(-20, 20, shape))


def add_nifti(path: Path, data: np.ndarray) -> Path:
    write_volume(path, nifti_to_tensor(data.astype(np.float32)), affine_from_spacing((1, 1, 2)))
    return path


def make_raw(folder: Path) -> Path:
    """Two CT volumes as NIfTI, one as DICOM, one MR series, a localiser and a text."""
    add_nifti(folder / "p1" / "a.nii.gz", ct(0))
    add_nifti(folder / "p2" / "a.nii.gz", ct(1))
    write_series(folder / "p3" / "dicom", ct(2), spacing_mm=(1, 1, 2), number=4, description="Thorax 2.0")
    write_series(folder / "p3" / "dicom", ct(2), modality="MR", intercept=-2000, prefix="mr", description="t2")
    write_series(folder / "p3" / "dicom", ct(2)[..., :1], prefix="loc", description="Topogram")
    (folder / "report.txt").write_text("text")
    return folder


def run(raw: Path, *options: object, output: str = "data") -> int:
    """Runs the script in this process on raw/ and returns its exit status."""
    words = ["--input", raw, "--output-dir", raw.parent / output, "--num-workers", 0, *options]
    return main([str(word) for word in words])


def times(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.nii.gz"))}

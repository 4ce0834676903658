"""Conditions by real operators: what they measure, reconstruct and are brought to agree with."""

import json
from pathlib import Path

import numpy as np
import pytest
from user_errors import error_of

from common.errors import UserError
from dataset.degradation.degrading import read_measurement
from dataset.degradation.operators import FastMRI, Inpainting, SparseViewCT, ThickSlices
from dataset.degrade import main
from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION, files_of_side
from dataset.preparation.phantoms import make_phantom, write_phantoms
from dataset.volumes.volume_io import read_header, read_volume, write_nifti

SPACING = (4.0, 4.0, 4.0)


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    return make_phantom(0, 0, 32).data[:, :, 8:12]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * np.log10(4 / np.square(first - second).mean())


@pytest.mark.parametrize(
    ("operator", "least"),
    [
        (SparseViewCT(views=16), 20),
        (SparseViewCT(views=16, photons=1e5), 18),
        (SparseViewCT(views=12, arc=120.0), 14),
        (FastMRI(4.0), 14),
        (FastMRI(4.0, "equispaced", 0.01), 16),
        (FastMRI(4.0, "poisson"), 18),
        (ThickSlices(2), 20),
        (ThickSlices(4, axis=1), 16),
        (Inpainting(0.4), 12),
    ],
    ids=str,
)
def test_a_condition_is_the_volume_as_far_as_it_was_measured(chest, operator, least):
    rng = np.random.default_rng(0)
    measured = operator.measure(chest, SPACING, rng)
    condition = operator.reconstruct(measured)
    assert condition.shape == chest.shape
    assert condition.dtype == np.float32
    assert -1 <= condition.min() <= condition.max() <= 1
    assert least < psnr(condition, chest) < 60
    # A volume that does not agree is brought near, the true one stays
    guess = np.clip(chest + rng.normal(0, 0.2, chest.shape), -1, 1).astype(np.float32)
    agreeing = operator.agreeing(guess, measured)
    assert operator.residual(agreeing, measured) < 0.5 * operator.residual(guess, measured)
    assert psnr(agreeing, chest) > psnr(guess, chest)
    assert psnr(operator.agreeing(chest, measured), chest) > 27


def test_more_views_and_photons_are_better(chest):
    def of(**options) -> float:
        operator = SparseViewCT(**options)
        return psnr(operator.reconstruct(operator.measure(chest, SPACING, np.random.default_rng(0))), chest)

    assert of(views=64) > of(views=8) + 4
    assert of(views=64) > of(views=64, photons=1e3) + 2


def test_water_stays_water(chest):
    water = np.full((32, 32, 1), -1, dtype=np.float32)
    water[8:24, 8:24] = 0  # 0 HU in a window of -1000 to 1000
    operator = SparseViewCT(views=90)
    found = operator.reconstruct(operator.measure(water, SPACING, np.random.default_rng(0)))
    assert abs(found[12:20, 12:20].mean()) < 0.02


@pytest.mark.parametrize("mask", ["gaussian", "equispaced", "poisson"])
def test_masks_keep_one_in_so_many_and_the_centre(mask):
    kept = FastMRI(4.0, mask)._mask((64, 64), np.random.default_rng(1))
    assert 0.2 < kept.mean() < 0.32
    assert kept[0, 0]  # zero frequency


# ----------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, {TRAINING: 2, VALIDATION: 0, HELD_OUT: 1}, size=16, seed=0)
    return folder


def run(phantoms: Path, output: Path, *options: str) -> None:
    data = str(phantoms / "Singleres_dataset.json")
    main(["--data-path", data, "--output-dir", str(output), "--num-workers", "0", *options])


def test_a_data_set_of_conditions(phantoms, tmp_path):
    run(phantoms, tmp_path, "--operator", "mri", "--acceleration", "2", "--classes", "1")
    files = sorted((tmp_path / "MRBrain").glob("*.nii.gz"))
    originals = sorted((phantoms / "MRBrain").glob("*.nii.gz"))
    assert [file.name for file in files] == [file.name for file in originals]
    assert np.array_equal(read_header(files[0]).affine, read_header(originals[0]).affine)
    operator, measured = read_measurement(files[0])
    assert operator == FastMRI(2.0)
    assert operator.residual(read_volume(originals[0]).data[0].numpy().transpose(1, 2, 0), measured) < 1e-3
    conditions = json.loads((tmp_path / "conditions.json").read_text())
    assert conditions == {"1": {"images": [str(phantoms / "MRBrain")], "hints": {"mri": [str(tmp_path / "MRBrain")]}}}
    assert json.loads((tmp_path / "latents.json").read_text())["1"]["images"] == [str(phantoms / "MRBrain_latents")]
    assert len(files_of_side(tmp_path / "volumes.json", HELD_OUT)["1"]) == 1
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    run(phantoms, tmp_path, "--operator", "mri", "--acceleration", "2", "--classes", "1")
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    found = error_of(lambda: run(phantoms, tmp_path, "--operator", "mri", "--acceleration", "3", "--classes", "1"))
    assert "name another output_dir" in found
    files[1].with_name(files[1].name.replace(".nii.gz", ".npz")).write_bytes(b"PK")
    assert "what was measured is not known" in error_of(read_measurement, files[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "ct", "--views", "0"], "views must be at least 1, got 0"),
        (["--operator", "mri", "--acceleration", "0.5"], "acceleration must be at least 1, got 0.5"),
        (["--operator", "blur"], "operator must be one of ct"),
        (["--operator", "ct", "--classes", "7"], "has no class 7, only 0, 1"),
        ([], "required but not set: operator"),
    ],
)
def test_mistakes(phantoms, tmp_path, options, message):
    assert message in error_of(lambda: run(phantoms, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- two contrasts


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Heads of two studies as T2; their T1, of one, on another grid: shifted by 4 mm, half the voxels."""
    root = tmp_path_factory.mktemp("scans")
    for study in (0, 1):
        head = make_phantom(1, study, 32)
        write_nifti(root / "T2" / f"p{study}_T2.nii.gz", head.data, np.diag([4.0, 4, 4, 1]))
    head = make_phantom(1, 0, 32)
    affine = np.diag([8.0, 8, 8, 1])
    affine[:3, 3] = [2, 2, 2 + 8]
    small = head.data.reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5))[:, :, 1:]
    write_nifti(root / "T1" / "x" / "p0_T1.nii.gz", -small, affine)
    (root / "data.json").write_text('{"0": "T2"}')
    return root


def test_the_other_contrast_of_a_study_comes_onto_its_grid(scans, tmp_path, capsys):
    options = ["--operator", "contrast", "--others", str(scans / "T1"), "--pattern", r"p\d+"]
    command = ["--data-path", str(scans / "data.json"), "--output-dir", str(tmp_path), "--num-workers", "0", *options]
    for _ in range(2):  # the second finds all of it
        main(command)
    assert [path.name for path in sorted((tmp_path / "T2").glob("*.nii.gz"))] == ["p0_T2.nii.gz"]
    image, other = read_volume(scans / "T2" / "p0_T2.nii.gz"), read_volume(tmp_path / "T2" / "p0_T2.nii.gz")
    np.testing.assert_array_equal(image.affine, other.affine)
    inside = np.s_[0, 4:-2, 2:-2, 2:-2]
    assert np.corrcoef(image.data[inside].ravel(), -other.data[inside].ravel())[0, 1] > 0.93
    assert (other.data[0, 0] == -1).all()  # the slices that were not measured
    assert json.loads((tmp_path / "latents.json").read_text())["0"]["pairs_only"] is True
    assert "1 of 2 volumes have no other contrast" in capsys.readouterr().err
    with pytest.raises(UserError, match="of which nothing was measured"):
        read_measurement(tmp_path / "T2" / "p0_T2.nii.gz")


@pytest.mark.parametrize(
    ("others", "pattern", "words"),
    [
        ([], r"p\d+", "needs others"),
        (["T2"], None, "needs others"),
        (["T1"], "T1|T2", "no study of"),
        (["T2"], "(p)", "tells them apart"),
        (["T1"], "q", "finds no study in"),
        (["far"], r"p\d+", "covers 0% of what is seen"),
    ],
)
def test_contrasts_that_do_not_belong_together(scans, tmp_path, others, pattern, words):
    far = np.diag([4.0, 4, 4, 1])
    far[:3, 3] = 500
    write_nifti(scans / "far" / "p0.nii.gz", make_phantom(1, 0, 32).data, far)
    command = ["--data-path", str(scans / "data.json"), "--output-dir", str(tmp_path / "out"), "--operator", "contrast"]
    command += ["--num-workers", "0", *(["--others", *[str(scans / name) for name in others]] if others else [])]
    assert words in error_of(main, [*command, *(["--pattern", pattern] if pattern else [])])
    assert not list(tmp_path.rglob("*.nii.gz"))

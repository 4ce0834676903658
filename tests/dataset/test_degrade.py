"""Conditions by real operators: what they measure, reconstruct and are brought to agree with."""

import json
from pathlib import Path

import numpy as np
import pytest
from user_errors import error_of

from common.errors import UserError
from dataset.degradation.degrading import read_measurement
from dataset.degradation.operators import FastMRI, Inpainting, SparseViewCT, ThickSlices, _thrown
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


def test_a_limited_arc_misses_the_edges_that_no_ray_runs_along(chest):
    def errors(arc: float, plate: np.ndarray) -> float:
        operator = SparseViewCT(views=60, arc=arc)
        found = operator.reconstruct(operator.measure(plate, SPACING, np.random.default_rng(0)))
        return float(np.abs(found - plate).mean())

    assert SparseViewCT(views=4, arc=90.0)._angles.tolist() == [0, 22.5, 45, 67.5]
    plate = np.full((32, 32, 1), -1, dtype=np.float32)
    plate[4:28, 14:18] = 0  # rays of 90 degrees +- 45 do not run along it, those of 0 +- 45 do
    turned = plate.transpose(1, 0, 2).copy()
    assert errors(180, plate) == pytest.approx(errors(180, turned), rel=0.1)
    first, second = errors(60, plate), errors(60, turned)
    assert max(first, second) > 1.3 * min(first, second)
    assert min(first, second) > 1.3 * errors(180, plate)


def test_noise_is_as_strong_as_asked():
    """Of 400 photons in air the logarithm varies by 1 / sqrt(400); both parts of k-space by the same."""
    air = np.full((32, 32, 4), -1, dtype=np.float32)
    rng = np.random.default_rng(0)
    sinogram = SparseViewCT(views=32, photons=400).measure(air, (2.0, 2.0, 2.0), rng)["sinogram"] * 2  # without unit
    assert sinogram.std() == pytest.approx(1 / 20, rel=0.05)
    assert abs(sinogram.mean()) < 0.005
    values = FastMRI(2.0, noise=0.05).measure(air, SPACING, rng)["values"]
    assert (values.real.std(), values.imag.std()) == (pytest.approx(0.05, rel=0.05), pytest.approx(0.05, rel=0.05))


@pytest.mark.parametrize("operator", [SparseViewCT(photons=1e3), FastMRI(mask="poisson", noise=0.1), Inpainting()])
def test_a_seed_gives_one_measurement(chest, operator):
    first, again, other = (operator.measure(chest, SPACING, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("mask", "accelerations", "tolerance"),
    [("gaussian", (2, 4, 7), 0.01), ("equispaced", (2, 4, 7), 0.01), ("poisson", (1.5, 4, 7, 20), 0.05)],
)
@pytest.mark.parametrize("shape", [(64, 64), (48, 84)])
def test_masks_keep_one_in_so_many_and_the_centre(mask, accelerations, tolerance, shape):
    for acceleration in accelerations:
        kept = FastMRI(acceleration, mask)._mask(shape, np.random.default_rng(1))
        wanted = acceleration if mask == "poisson" else shape[1] / round(shape[1] / acceleration)
        assert 1 / kept.mean() == pytest.approx(wanted, rel=tolerance)
        assert kept[0, 0]  # zero frequency
        assert kept[-1, 0] or mask == "poisson"  # lines are whole


def test_equispaced_lines_are_so_far_apart():
    kept = FastMRI(4.0, "equispaced")._mask((4, 64), np.random.default_rng(1))[0]
    lines = np.flatnonzero(np.fft.fftshift(kept))
    assert set(np.diff(lines)) <= {1, 2, 3, 4, 5, 6}
    assert np.median(np.diff(lines)) in (4, 5)


def test_poisson_points_keep_their_distance_and_thin_out():
    shape = (72, 60)
    axes = [np.fft.fftshift(np.fft.fftfreq(extent)) * 2 for extent in shape]
    radius = np.hypot(*np.meshgrid(*axes, indexing="ij"))
    nearest, rng = 0.1, np.random.default_rng(2)
    places = np.argwhere(_thrown(radius, rng.permutation(radius.size), nearest, max(shape)))
    local = nearest * max(shape) / 10 * (1 + 5 * radius[tuple(places.T)])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    assert len(places) > 100
    assert (apart >= np.minimum(local[:, None], local[None])).all()
    # and the mask is made of such points and of the centre
    kept = np.fft.fftshift(FastMRI(5.0, "poisson")._mask(shape, np.random.default_rng(3)))
    assert kept[radius < 0.04].all()
    assert not kept[radius > 1].any()
    rings = [kept[(radius >= low) & (radius < low + 0.3)].mean() for low in (0.1, 0.4, 0.7)]
    assert rings[0] > 2 * rings[1] > 3 * rings[2]


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
        (["--operator", "mri", "--acceleration", "1.2", "--mask", "poisson"], "acceleration 1.2 is out of reach"),
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

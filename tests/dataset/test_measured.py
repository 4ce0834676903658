"""What voxels are, judged by their values: Hounsfield units, padding, label maps."""

from itertools import product

import numpy as np
import pytest
from preprocessing_runs import add_nifti, run
from scipy import ndimage

from common.errors import UserError
from dataset.preparation.measured import NotAVolume, check_is_image, find_padding
from dataset.preparation.phantoms import make_phantom
from dataset.preparation.recipe import Recipe, find_intensity, prepare
from dataset.preparation.sources import Scan

SHAPE = (40, 40, 40)
CT = Recipe(window=(-1000, 1000), unit="HU", multiple=1)
MR = Recipe(percentiles=(0.5, 99.5), multiple=1)

# Hounsfield units

# (share of the voxels, mean, standard deviation) of each tissue
SCANS = {
    "chest": [(0.4, -1000, 20), (0.2, -830, 60), (0.1, -100, 25), (0.25, 45, 20), (0.05, 700, 250)],
    "chest, low dose": [(0.4, -1000, 150), (0.2, -830, 160), (0.1, -100, 150), (0.25, 45, 150), (0.05, 700, 250)],
    "skull, little air": [(0.7, 32, 12), (0.21, 1000, 250), (0.08, -90, 20), (0.01, -950, 50)],
    "skull, no air": [(0.72, 32, 12), (0.22, 900, 300), (0.06, -90, 20)],
    "abdomen within the body": [(0.4, -100, 20), (0.55, 60, 20), (0.05, 500, 150)],
    "abdomen with contrast": [(0.4, -100, 20), (0.35, 60, 20), (0.2, 350, 60), (0.05, 500, 150)],
    "legs": [(0.8, -1000, 10), (0.08, -100, 20), (0.1, 55, 15), (0.02, 900, 300)],
    "a hand": [(0.96, -1000, 10), (0.01, -100, 20), (0.02, 55, 15), (0.01, 500, 300)],
    "lung alone": [(0.85, -850, 60), (0.15, 20, 90)],
    "temporal bone": [(0.6, 1100, 400), (0.15, -900, 120), (0.25, 40, 30)],
    "brain, zeros outside": [(0.6, 0, 0), (0.3, 32, 8), (0.1, 4, 6)],
    "water phantom": [(0.5, -1000, 15), (0.5, 0, 15)],
    "metal": [(0.6, -1000, 20), (0.37, 45, 20), (0.01, 3071, 0), (0.01, 12000, 3000), (0.01, -1200, 250)],
}  # fmt: skip


def scan(name: str, seed: int = 0) -> np.ndarray:
    """(X, Y, Z), whole numbers."""
    rng = np.random.default_rng(seed)
    counts = [round(share * np.prod(SHAPE)) for share, _, _ in SCANS[name]]
    parts = [rng.normal(mean, sd, count) for count, (_, mean, sd) in zip(counts, SCANS[name], strict=True)]
    return np.rint(rng.permutation(np.concatenate(parts)).reshape(SHAPE)).astype(np.float32)


def padded(data: np.ndarray, *values: float, share: float = 0.2) -> np.ndarray:
    """Some of the voxels replaced."""
    chosen = np.random.default_rng(1).random(SHAPE) < share
    return np.where(chosen, np.random.default_rng(2).choice(values, SHAPE), data).astype(np.float32)


@pytest.mark.parametrize("name", ["chest", "legs", "lung alone", "water phantom"])
def test_padding_that_lossy_compression_spread_passes(name):
    data = padded(scan(name), -3040)
    noise = np.random.default_rng(3).laplace(0, 150, SHAPE)
    data = np.where(data == -3040, data + np.rint(noise), data).astype(np.float32)
    assert find_padding(data) == ()
    find_intensity(data, CT)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("padding", [(), (-2000,), (-3024,), (-32768,), (-1024,), (-2048, -3024)])
def test_scans_in_hounsfield_units_pass(name, padding):
    data = padded(scan(name), *padding) if padding else scan(name)
    data = np.maximum(data, -1024) if -1024 in padding else data
    result = prepare(Scan(data, np.eye(4)), CT)
    np.testing.assert_allclose(result.data, np.clip(data / 1000, -1, 1), atol=1e-6)


ODD = np.array([[[-12]], [[-1000]], [[-2000]]], np.float32)  # (3, 1, 1)


def with_odd_voxels(data: np.ndarray) -> np.ndarray:
    data = data.copy()
    data[5:8, 6:7, 7:8] = ODD
    return data


# what was done to HU, and what is said of it
OTHERS = {
    "offset of 1024": (lambda hu: hu + 1024, "offset of the scanner"),
    "offset, cut at 0": (lambda hu: np.maximum(hu + 1024, 0), "offset of the scanner"),
    "offset of 1000": (lambda hu: hu + 1000, "offset of the scanner"),
    "offset and odd voxels": (lambda hu: with_odd_voxels(np.maximum(hu + 1024, 0)), "offset of the scanner"),
    "offset and padding": (lambda hu: padded(hu + 1024, -2000), "offset of the scanner"),
    "times three": (lambda hu: hu * 3, "another slope|lie near 0"),
    "times ten": (lambda hu: hu * 10, "another slope|lie near 0"),
    "taken off twice": (lambda hu: hu - 1024, "taken off twice|lie near 0"),
    "8 bits": (lambda hu: np.rint(np.clip((hu + 1000) / 2000 * 255, 0, 255)), "offset of the scanner"),
    "8 bits and an odd voxel": (
        lambda hu: with_odd_voxels(np.rint(np.clip((hu + 1000) / 2000 * 255, 0, 255))),
        "offset of the scanner",
    ),
    "from -1 to 1": (lambda hu: np.clip(hu / 1000, -1, 1), "nothing to see in the window"),
    "unsigned": (lambda hu: hu % 65536, "stored as unsigned"),
}
# What could as well be the HU of something else: a brain of 300 to 400, a thin leg in air, without air anything.
NO_AIR = {"skull, little air", "skull, no air", "abdomen within the body", "brain, zeros outside"}
UNKNOWABLE = {("times ten", "brain, zeros outside"), ("times three", "chest, low dose")}
UNKNOWABLE |= {("taken off twice", name) for name in ("skull, little air", "skull, no air")}
UNKNOWABLE |= {("times three", name) for name in NO_AIR} | {(other, "temporal bone") for other in OTHERS}


@pytest.mark.parametrize(("other", "name"), [pair for pair in product(OTHERS, SCANS) if pair not in UNKNOWABLE])
def test_other_units_are_refused(other, name):
    change, message = OTHERS[other]
    data = change(scan(name))
    with pytest.raises(UserError, match=message if name == "chest" else "no Hounsfield units|nothing to see"):
        find_intensity(data, CT, find_padding(data))


def body_of_many_values() -> np.ndarray:
    """From -380 to 450, as many of each, in air."""
    x, y, z = np.meshgrid(np.arange(40) - 20, np.arange(36) - 18, np.arange(32) - 16, indexing="ij")
    return np.where(abs(x) > 18, -1000, 12 * x + 7 * y + 5 * z + 40).astype(np.float32)


def test_a_body_of_many_values():
    hu = body_of_many_values()
    find_intensity(hu, CT)
    with pytest.raises(UserError, match="1.% of the voxels lie below -1500 and .% above 2500: they are no Hounsfield"):
        find_intensity(hu * 10, CT, find_padding(hu * 10))


# Padding


@pytest.mark.parametrize("values", [(-2000,), (-3024,), (-32768,), (-1200,), (-2048, -3024), (-2000.5,)])
def test_padding_counts_in_no_percentile_and_becomes_background(values):
    data = scan("chest")
    with_padding = padded(data, *values)
    is_padding = with_padding != data
    expected = np.percentile(data[~is_padding], (0.5, 99.5))
    result = prepare(Scan(with_padding, np.eye(4)), MR)
    assert (result.intensity.low, result.intensity.high) == pytest.approx(expected, rel=1e-5)
    assert (result.data[is_padding] == -1).all()
    low, high = expected
    inside = np.clip((data[~is_padding] - low) / (high - low) * 2 - 1, -1, 1)
    np.testing.assert_allclose(result.data[~is_padding], inside, atol=1e-4)
    shown = ", ".join(f"{value:g}" for value in sorted(values))
    assert result.steps[-1] == f"padding became background: {shown}"


def test_padding_is_background_whatever_the_window():
    data = padded(scan("chest"), -2000)
    result = prepare(Scan(data, np.eye(4)), Recipe(window=(-4000, 4000), multiple=1))
    assert (result.data[data == -2000] == -1).all()
    np.testing.assert_allclose(result.data[data != -2000], data[data != -2000] / 4000, atol=1e-6)


NOT_PADDING = {
    "a few voxels": lambda: padded(scan("chest"), -2000, share=5e-4),
    "air": lambda: np.maximum(scan("chest"), -1024),
    "noise of air": lambda: scan("chest, low dose"),
    "zeros around a head": lambda: padded(scan("chest") + 2000, 0),
    "below, but measured": lambda: scan("chest") * 3,
    "a coarse scale": lambda: np.rint(body_of_many_values() / 6) * 60,
    "nothing else": lambda: np.full(SHAPE, -2000, np.float32),
}


@pytest.mark.parametrize("case", NOT_PADDING)
def test_what_is_no_padding(case):
    assert find_padding(NOT_PADDING[case]()) == ()


# Label maps


def blocks(edge: int, shape=SHAPE, labels: int = 120, seed: int = 0) -> np.ndarray:
    """A label map of cubes, half of it background."""
    small = np.random.default_rng(seed).integers(-labels, labels + 1, [-(-extent // edge) for extent in shape]).clip(0)
    data = small.repeat(edge, 0).repeat(edge, 1).repeat(edge, 2)
    return data[tuple(map(slice, shape))].astype(np.float32)


def speck() -> np.ndarray:
    """A lesion that lies between the voxels that are looked at in a large volume."""
    data = np.zeros((300, 8, 8), np.float32)
    data[100:101, 3, 3] = 1
    return data


def touching(labels: int) -> np.ndarray:
    """Layers numbered in their order."""
    layers = np.arange(SHAPE[0]) * labels // SHAPE[0]
    return np.broadcast_to(layers[:, None, None], SHAPE).astype(np.float32)


LABEL_MAPS = {
    "mask": (lambda: (blocks(8) > 60).astype(np.float32), "2 distinct whole values"),
    "mask of 255": (lambda: (blocks(8) > 60) * np.float32(255), "2 distinct whole values"),
    "mask, scaled": (lambda: (blocks(8) > 60) * np.float32(0.4), "2 distinct values"),
    "mask of -1": (lambda: -(blocks(8) > 60).astype(np.float32), "2 distinct whole values"),
    "thin vessels": (
        lambda: (np.random.default_rng(0).random(SHAPE) > 0.9).astype(np.float32),
        "2 distinct whole values",
    ),
    "speck": (speck, "2 distinct whole values"),
    "three labels": (lambda: blocks(8) // 50, "3 distinct whole values"),
    "twenty layers": (lambda: touching(20), "20 distinct whole values"),
    "atlas": (lambda: blocks(7), r"\d+ distinct whole values"),
    "atlas of large numbers": (lambda: blocks(7) * 35, r"\d+ distinct whole values"),
    "atlas, fine": (lambda: blocks(4), r"1\d\d distinct whole values"),
    "atlas, slices far apart": (lambda: blocks(12, (96, 96, 96))[:, :, ::6], r"\d+ distinct whole values"),
}


@pytest.mark.parametrize("case", LABEL_MAPS)
def test_label_maps_are_left_out(case):
    make, message = LABEL_MAPS[case]
    with pytest.raises(NotAVolume, match=f"^{message}: a label map or mask, not an image"):
        check_is_image(make())


def brain(size: int = 64) -> np.ndarray:
    """(X, Y, Z) from 0 to 1, zeros outside."""
    return (make_phantom(1, 0, size=size).data + 1) / 2


def with_rod() -> np.ndarray:
    data = scan("chest")
    data[10:20, 10:20] = 130
    return data


IMAGES = {
    "phantom": lambda: make_phantom(0, 0, size=32).data,
    "8 bits": lambda: np.rint(brain() * 255),
    "8 bits, dark": lambda: np.rint(brain() * 80),
    "8 bits, smooth": lambda: np.rint(ndimage.gaussian_filter(brain(), 1.5) * 255),
    "8 bits of a window": lambda: np.rint(np.clip((scan("chest") + 100) / 300, 0, 1) * 255),
    "slices three times over": lambda: np.rint(brain() * 255).repeat(4, axis=0),
    "a ramp": lambda: np.rint(sum(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")) * 0.7),
    "slices of one value each": lambda: touching(40),
    "CT with a rod": with_rod,
    "unsigned CT with a rod": lambda: with_rod() + 1024,
    "two values of CT": lambda: np.where(blocks(8) > 60, 100, -1000),
    "one value": lambda: np.zeros(SHAPE),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_are_no_label_maps(case):
    check_is_image(np.asarray(IMAGES[case](), np.float32))


def test_a_label_map_among_images_does_not_end_in_the_class(tmp_path, capsys):
    add_nifti(tmp_path / "raw" / "t1.nii.gz", np.random.default_rng(0).normal(500, 60, (8, 8, 8)))
    add_nifti(tmp_path / "raw" / "t1_seg.nii.gz", blocks(2, (8, 8, 8)) // 50)
    assert run(tmp_path / "raw", "--name", "Brain", "--modality", "MR", "--multiple", 4) == 0
    assert [path.name for path in tmp_path.rglob("data/**/*.nii.gz")] == ["t1.nii.gz"]
    assert "3 distinct whole values: a label map or mask" in capsys.readouterr().err.replace("\n", " ")

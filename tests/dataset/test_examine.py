"""What the check of a data set finds: each kind of problem in a file made for it, and nothing in sound ones."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset.checking import examine
from dataset.checking.examine import (
    FileFacts,
    by_kind,
    choose_sample,
    examine_latent,
    examine_volume,
    header_problems,
    holds_latents,
    latent_set_problems,
    volume_set_notes,
    volume_set_problems,
)
from dataset.volumes.volume_io import read_header, write_latent, write_volume

RANGE = (-1.0, 1.0)


def values(seed: int = 0, shape: tuple[int, ...] = (6, 5, 4), low: float = -1.0) -> np.ndarray:
    array = np.random.default_rng(seed).uniform(low, 1, shape).astype(np.float32)
    array.flat[0] = low
    return array


def save(path: Path, array: np.ndarray | None = None, affine: np.ndarray | None = None, **header: object) -> Path:
    """A NIfTI file (X, Y, Z) with qform and sform, or with header fields as given."""
    image = nib.Nifti1Image(values() if array is None else array, np.eye(4) if affine is None else affine)
    image.set_qform(image.affine, 1)
    content = image.to_bytes()
    written = nib.Nifti1Header(content[:348])  # an image would set these fields right again
    for name, value in header.items():
        written[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written.binaryblock + content[348:])
    return path


def kinds(facts: FileFacts) -> list[str]:
    return [problem.kind for problem in facts.problems]


# One volume


def test_a_sound_volume(tmp_path):
    array = values(low=-1.0)
    array[:3] = -1
    facts = examine_volume(save(tmp_path / "a.nii.gz", array, np.diag([1.0, 2.0, 3.0, 1.0])), RANGE)
    assert facts.problems == ()
    assert (facts.header.shape, facts.header.spacing_mm, facts.header.orientation) == ((6, 5, 4), (1, 2, 3), "RAS")
    assert (facts.low, facts.high) == (float(array.min()), float(array.max()))
    assert facts.mean == pytest.approx(array.mean(dtype=np.float64), abs=1e-6)
    assert facts.foreground == pytest.approx(np.mean(array > -0.998))


def damaged(path: Path) -> Path:
    content = save(path).read_bytes()
    path.write_bytes(content[:-40])
    return path


def no_image(path: Path) -> Path:
    path.write_bytes(b"no image at all")
    return path


def with_value(value: float):
    array = values()
    array[2, 2, 2] = value
    return lambda path: save(path, array)


RGB = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
SHEARED = np.eye(4)
SHEARED[1, 2] = 0.3  # a gantry tilted by 17 degrees
OBLIQUE = np.eye(4)
OBLIQUE[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]


@pytest.mark.parametrize(
    ("make", "kind", "found"),
    [
        pytest.param(damaged, examine.UNREADABLE, "truncated", id="truncated"),
        pytest.param(no_image, examine.UNREADABLE, "not a NIfTI image", id="no image"),
        pytest.param(lambda p: p, examine.UNREADABLE, "no such file", id="missing"),
        pytest.param(lambda p: save(p, values(shape=(6, 5))), examine.UNREADABLE, "a 2D image", id="2D"),
        pytest.param(lambda p: save(p, values(shape=(6, 5, 4, 3))), examine.UNREADABLE, "a 4D series", id="4D"),
        pytest.param(lambda p: save(p, RGB), examine.UNREADABLE, "colour", id="colour"),
        pytest.param(with_value(np.nan), examine.NOT_FINITE, "1 NaN or infinite voxels", id="NaN"),
        pytest.param(with_value(-np.inf), examine.NOT_FINITE, "1 NaN or infinite voxels", id="infinite"),
        pytest.param(
            with_value(1.1), examine.OUTSIDE_RANGE, "from -1 to 1.1 lie outside the declared range", id="range"
        ),
        pytest.param(lambda p: save(p, 0 * values() - 1), examine.EMPTY, "every voxel is -1", id="background"),
        pytest.param(lambda p: save(p, 0 * values() + 0.5), examine.EMPTY, "every voxel is 0.5", id="constant"),
        pytest.param(lambda p: save(p, affine=np.diag([-1, 1, 1, 1])), examine.ORIENTATION, "axes are LAS", id="LAS"),
        pytest.param(lambda p: save(p, affine=np.eye(4)[[1, 0, 2, 3]]), examine.ORIENTATION, "ARS", id="swapped"),
        pytest.param(lambda p: save(p, qform_code=0, sform_code=0), examine.NO_ORIENTATION, "code are 0", id="no form"),
        pytest.param(lambda p: save(p, affine=np.diag([1, 1, 30, 1])), examine.SPACING, "1×1×30 mm is not", id="large"),
        pytest.param(
            lambda p: save(p, affine=np.diag([1, 1, 1e-3, 1])), examine.SPACING, "0.001 mm is not", id="metre"
        ),
        pytest.param(
            lambda p: save(p, sform_code=0, pixdim=[1, 1, 0, 1, 0, 0, 0, 0]), examine.SPACING, "1×0×1 mm", id="zero"
        ),
        pytest.param(lambda p: save(p, affine=SHEARED), examine.SHEARED, "two axes are 16.7° off", id="sheared"),
    ],
)
def test_each_kind_of_problem(tmp_path, make, kind, found):
    facts = examine_volume(make(tmp_path / "a.nii.gz"), RANGE)
    assert kinds(facts) == [kind]
    assert found in facts.problems[0].found
    assert facts.problems[0].path == tmp_path / "a.nii.gz"
    assert str(facts.problems[0]).startswith(f"{tmp_path / 'a.nii.gz'}: ")
    assert str(tmp_path) not in facts.problems[0].found
    assert kind in examine.REMEDIES


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([0.06, 0.06, 19.0, 1.0])], ids=["oblique", "thick"])
def test_unusual_but_sound_headers(tmp_path, affine):
    assert header_problems(read_header(save(tmp_path / "a.nii.gz", affine=affine))) == []


def test_a_header_with_nothing_sound_in_it(tmp_path):
    """The voxels can be read all the same."""
    path = save(tmp_path / "a.nii.gz", srow_x=[np.nan] * 4, quatern_b=5.0, pixdim=[0] * 8)
    assert kinds(examine_volume(path, RANGE)) == [examine.NO_ORIENTATION, examine.SPACING]


def test_several_problems_of_one_file(tmp_path):
    facts = examine_volume(save(tmp_path / "a.nii.gz", 5 * values(), np.diag([-1, 1, 50, 1])), RANGE)
    assert kinds(facts) == [examine.ORIENTATION, examine.SPACING, examine.OUTSIDE_RANGE]
    assert facts.foreground is None
    assert facts.high == pytest.approx(5, rel=0.1)


# Several volumes


def facts_of(folder: Path, arrays: list[np.ndarray], intensity_range=RANGE, **options) -> list[FileFacts]:
    paths = [save(folder / f"{i}.nii.gz", array, **options) for i, array in enumerate(arrays)]
    return [examine_volume(path, intensity_range) for path in paths]


def test_sound_volumes_together(tmp_path):
    facts = {name: facts_of(tmp_path / name, [values(i), values(i + 9)]) for i, name in enumerate("AB")}
    assert volume_set_problems(facts, RANGE) == []


@pytest.mark.parametrize(
    ("lows", "intensity_range", "found"),
    [
        ([0.0, 0.0], (-1, 1), "fits (--intensity-range 0 1)"),
        ([0.0, 0.001], (-1, 1), "dataset.intensity_range=[0,1]"),
        ([0.0, 0.0], (-3, 1), "intensities from 0 to 0.9"),
        ([0.0, -0.01], (-1, 1), None),
        ([0.0, 0.0], (0, 1), None),
        ([-1.0, 0.0], (-1, 1), None),
    ],
)
def test_only_the_upper_half_of_the_range(tmp_path, lows, intensity_range, found):
    """Of a whole name: files of [0, 1] read as [-1, 1]."""
    half = facts_of(tmp_path / "half", [values(i, low=low) for i, low in enumerate(lows)], intensity_range)
    whole = facts_of(tmp_path / "whole", [values(i, low=intensity_range[0]) for i in (5, 6)], intensity_range)
    problems = volume_set_problems({"half": half, "whole": whole}, intensity_range)
    assert [problem.kind for problem in problems] == ([] if found is None else [examine.UPPER_HALF])
    if found is not None:
        assert found in problems[0].found
        assert problems[0].found.startswith("half: ")
        assert problems[0].path is None


def test_mixed_orientations(tmp_path):
    turned = facts_of(tmp_path / "A", [values(0)], affine=np.diag([-1, -1, 1, 1]))
    problems = volume_set_problems({"A": turned + facts_of(tmp_path / "A2", [values(1), values(2)])}, RANGE)
    assert [(problem.kind, problem.found) for problem in problems] == [
        (examine.MIXED_ORIENTATIONS, "A: 2 RAS, 1 LPS"),
    ]
    alike = {"A": turned, "B": facts_of(tmp_path / "B", [values(3)])}  # each name by itself is consistent
    assert volume_set_problems(alike, RANGE) == []


def test_the_same_voxels_twice(tmp_path):
    """Equal voxels in other files: other name, header, type; but not other shapes of equal bytes."""
    first = facts_of(tmp_path / "A", [values(0), values(1)])
    again = [examine_volume(save(tmp_path / "B" / "x.nii.gz", values(1), np.diag([2, 2, 2, 1])), RANGE)]
    again += [examine_volume(save(tmp_path / "B" / "y.nii.gz", values(0).astype(np.float64)), RANGE)]
    again += [examine_volume(save(tmp_path / "B" / "z.nii.gz", values(0).reshape(5, 6, 4)), RANGE)]
    problems = by_kind(volume_set_problems({"A": first, "B": again}, RANGE))
    assert list(problems) == [examine.COPIES]
    found = [(problem.path.name, problem.found) for problem in problems[examine.COPIES]]
    assert found == [
        ("x.nii.gz", f"the same voxels as {tmp_path}/A/1.nii.gz, one under A, one under B"),
        ("y.nii.gz", f"the same voxels as {tmp_path}/A/0.nii.gz, one under A, one under B"),
    ]
    assert [p.kind for p in volume_set_problems({"A": first, "B": first}, RANGE)] == [examine.COPIES] * 2


def test_notes(tmp_path):
    files = facts_of(tmp_path / "A", [values(0), values(1)]) + facts_of(tmp_path / "B", [values(2, (8, 8, 4))])
    files += facts_of(tmp_path / "C", [values(2, (8, 8, 8))], affine=np.diag([2, 2, 2, 1]))
    notes = volume_set_notes({"A": files, "B": files[2:3]}, patch_size=4)
    assert [note.split(":")[0] + ":" + note.split(":")[1] for note in notes] == [
        "A: 2 do not divide into patches of 4",
        "A: 3 sizes",
        "A: 2 spacings",
    ]
    assert "B: 1 smaller than a patch of 8" in " ".join(volume_set_notes({"B": files[2:3]}, patch_size=8))


# Latents


def latent(path: Path, data: torch.Tensor) -> FileFacts:
    write_latent(path, data)
    return examine_latent(path)


def test_a_sound_latent(tmp_path):
    data = torch.rand(4, 3, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data[0, 0, 0, :3] = 4.0  # a few lie beyond the codebook's range
    facts = latent(tmp_path / "a.nii.gz", data)
    assert facts.problems == ()
    assert facts.header.latent_shape == (4, 3, 3, 5)
    assert facts.high == 4


@pytest.mark.parametrize(
    ("data", "kind", "found"),
    [
        (torch.full((4, 2, 2, 2), 0.5), examine.EMPTY, "every value is 0.5"),
        (3 * torch.randn(4, 4, 4, 4), examine.NOT_NORMALISED, "beyond ±1.05"),
        (torch.full((4, 2, 2, 2), torch.nan), examine.NOT_FINITE, "32 NaN or infinite"),
    ],
)
def test_each_kind_of_unfit_latent(tmp_path, data, kind, found):
    facts = latent(tmp_path / "a.nii.gz", data)
    assert kinds(facts) == [kind]
    assert found in facts.problems[0].found


def test_a_truncated_latent(tmp_path):
    write_latent(tmp_path / "a.nii.gz", torch.rand(4, 2, 2, 2))
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:-9])
    assert kinds(examine_latent(tmp_path / "a.nii.gz")) == [examine.UNREADABLE]


def test_latents_that_differ(tmp_path):
    shapes = [(4, 2, 2, 2), (4, 2, 2, 2), (4, 2, 2, 3), (8, 2, 2, 2)]
    facts = [latent(tmp_path / f"{i}.nii.gz", torch.rand(shape)) for i, shape in enumerate(shapes)]
    problems = latent_set_problems({"0": facts[:1], "1": facts[1:]})
    assert [(problem.kind, problem.path.name, problem.found) for problem in problems] == [
        (examine.LATENT_SIZES, "2.nii.gz", "size 2×2×3, most have 2×2×2"),
        (examine.LATENT_CHANNELS, "3.nii.gz", "channels 8, most have 4"),
    ]
    assert latent_set_problems({"0": facts[:2]}) == []
    assert [p.kind for p in latent_set_problems({"0": facts[:2], "1": facts[:1]})] == [examine.COPIES]


def test_latents_are_told_by_their_headers(tmp_path):
    write_latent(tmp_path / "latent.nii.gz", torch.rand(4, 2, 2, 2))
    write_volume(tmp_path / "volume.nii.gz", torch.rand(4, 4, 4), np.eye(4))
    no_image(tmp_path / "none.nii.gz")
    names = lambda *names: [tmp_path / f"{name}.nii.gz" for name in names]  # noqa: E731
    assert holds_latents(names("latent", "latent", "volume", "none", "none"))
    assert not holds_latents(names("latent", "volume", "volume"))
    assert not holds_latents(names("none"))


# A sample


def test_a_sample_is_spread_over_names_and_files():
    files = {name: [Path(f"{name}{i}") for i in range(count)] for name, count in (("a", 100), ("b", 2), ("c", 1))}
    sample = list(choose_sample(files, 8))
    assert [str(path) for _, path in sample] == ["a0", "a50", "a99", "b0", "b1", "c0"]
    assert [name for name, _ in sample] == list("aaabbc")
    assert [str(path) for _, path in choose_sample(files, 2)] == ["a0", "c0"]
    assert list(choose_sample(files, 0)) == []
    many = {str(i): [Path(str(i))] for i in range(30)}
    assert len(list(choose_sample(many, 8))) == 8

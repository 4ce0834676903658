"""Of whom files are: by a split, by a pattern, or each of a subject of its own, and what is noticed then."""

import json
from pathlib import Path

import pytest
from user_errors import error_of

from dataset.order.data_split import SPLIT_NAME, Shares, find_split
from dataset.order.draw_split import draw_split
from dataset.order.subjects import find_subjects

PATIENT = "^p[0-9]+"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.nii.gz").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.nii.gz").touch()
    return folder


def find(pattern: str | None = None, **sets: Path):
    return find_subjects(given(**sets), pattern)


def given(**sets: Path) -> dict[str, tuple[str, list[Path]]]:
    """All files of folders, or of the class CT of dataset JSONs."""
    folders = {option: place if place.is_dir() else place.parent / "CT" for option, place in sets.items()}
    return {o: (str(place), sorted(folders[o].rglob("*.nii.gz"))) for o, place in sets.items()}


@pytest.fixture
def with_split(tmp_path) -> Path:
    """A dataset JSON of three patients with two scans each, and its split by patient."""
    touch(tmp_path / "CT", *[f"p{i}/{scan}" for i in range(3) for scan in "ab"])
    path = tmp_path / "data.json"
    path.write_text('{"CT": "CT"}')
    draw_split(path, Shares("^[^/]+", 0.3, 0.3, 0)).write(tmp_path)
    return path


def test_the_split_tells_subjects_unasked(with_split, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "own.json"
    elsewhere.write_text(json.dumps({"mine": str(with_split.parent / "CT")}))
    files = given(real=with_split)["real"][1]
    for text in (with_split, elsewhere, with_split.parent / "CT", f"{with_split.parent / SPLIT_NAME}:held_out"):
        found = find_subjects({"real": (str(text), files)}, None)
        assert list(found.of["real"].values()) == ["p0", "p0", "p1", "p1", "p2", "p2"]
        assert found.shared is None
    assert find("^[^/]+", real=with_split).of == {"real": found.of["real"]}


def test_a_pattern_that_is_not_the_splits_is_refused(with_split):
    message = error_of(find_subjects, given(real=with_split), PATIENT)
    assert f"subject_pattern is '{PATIENT}', {with_split.parent / SPLIT_NAME} was drawn with '^[^/]+': leave" in message


def test_a_folder_near_a_split_that_it_is_not_of(with_split):
    other = touch(with_split.parent / "other", "x1/a", "x2/b")
    assert find(real=other).of == {"real": {}}
    assert set(find("x.", real=other).of["real"].values()) == {"x1", "x2"}


def test_a_pattern_finds_subjects_below_the_folder_that_is_given(tmp_path):
    real = touch(tmp_path / "p9" / "real", "p1/a", "p1/b", "p2/a")
    found = find("p([0-9])", real=real)
    assert list(found.of["real"].values()) == ["1", "1", "2"]
    assert found.shared is None
    assert "finds no subject in 'p1/a.nii.gz'" in error_of(find_subjects, given(real=real), "q.")


@pytest.mark.parametrize("names", [("p1/a", "p1/b"), ("p1_a", "p1_b")])
def test_a_subject_on_both_sides_is_refused(tmp_path, names):
    real, training = touch(tmp_path / "real", names[0], "p2/a"), touch(tmp_path / "training", names[1], "p3/a")
    sets = given(real=real, training=training)
    message = error_of(find_subjects, sets, PATIENT)
    first, second = (folder / f"{name}.nii.gz" for folder, name in zip((real, training), names, strict=True))
    assert f"training: {second} is of subject p1, as {first} of real is: give sets without common subjects" in message
    assert "subject_pattern" in message
    find_subjects({**sets, "training": (str(training), [training / "p3" / "a.nii.gz"])}, PATIENT)


def test_sizes_of_a_scan_are_of_one_subject(tmp_path):
    touch(tmp_path / "CT", "8x8x8/a", "8x8x8/b", "native/a", "16x8x8/a")
    found = find(real=tmp_path / "CT")
    assert len(found.of["real"]) == 4
    assert len(set(found.of["real"].values())) == 2
    assert found.shared is None  # a size is nobody
    sets = given(real=tmp_path / "CT" / "8x8x8", training=tmp_path / "CT" / "native")
    assert "training: " in error_of(find_subjects, sets, None)


@pytest.mark.parametrize(
    ("real", "training", "pattern", "num_names", "example"),
    [
        (["sub-01_x", "sub-01_y", "sub-02"], [], "sub-[A-Za-z0-9]+", 2, ["sub-01_x", "sub-01_y"]),
        (["sub-01/a", "sub-01/b", "x/b"], ["sub-01_c"], "sub-[A-Za-z0-9]+", 1, ["a", "sub-01_c"]),
        (["one/a", "one/b", "two/c"], [], "^[^/]+(?=/)", 2, ["a", "b"]),
        (["one/a", "one/b", "two/b"], ["two/c", "three/d"], "^[^/]+(?=/)", 3, ["b", "c"]),
    ],
)
def test_names_in_common_are_noticed_where_nothing_tells_subjects(
    tmp_path, real, training, pattern, num_names, example
):
    sets = {"real": touch(tmp_path / "real", *real)}
    sets |= {"training": touch(tmp_path / "training", *training)} if training else {}
    shared = find(**sets).shared
    assert (shared.pattern, shared.num_names) == (pattern, num_names)
    assert [path.name for path in shared.example] == [f"{name}.nii.gz" for name in example]
    assert find(".+", **sets).shared is None  # told


@pytest.mark.parametrize(
    "names", [["a", "b"], ["all/a", "all/b"], ["x/a", "y/b"], ["x/a", "x/b", "c"], ["sub-1", "sub-2"]]
)
def test_names_of_which_nothing_is_to_be_said(tmp_path, names):
    found = find(real=touch(tmp_path / "real", *names))
    assert (found.of, found.shared) == ({"real": {}}, None)


def test_a_split_without_a_pattern_is_no_knowledge_of_subjects(with_split):
    record = json.loads((with_split.parent / SPLIT_NAME).read_text()) | {"subject_pattern": None}
    (with_split.parent / SPLIT_NAME).write_text(json.dumps(record))
    found = find(real=with_split)
    assert len(set(found.of["real"].values())) == 6
    assert (found.shared.num_files, found.shared.num_names) == (6, 3)
    assert find_split(with_split).shares.subject_pattern is None

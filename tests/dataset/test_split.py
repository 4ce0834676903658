"""The split into training and validation: shares, subjects that stay together, and the record in a run folder."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_atomically
from dataset.order.split import keep_split, split_dataset, spread_evenly

OPTIONS = {"val_fraction": 0.2, "split_seed": 0, "subject_pattern": None}


def make_set(folder: Path, files: dict[str, list[str]], name: str = "set.json") -> Path:
    """Empty files `name -> paths below the folder of that name`, and their JSON."""
    for top, paths in files.items():
        for path in paths:
            (folder / top / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / top / path).touch()
    (folder / name).write_text(json.dumps({top: top for top in files}))
    return folder / name


def numbered(count: int) -> list[str]:
    return [f"{i:03d}.nii.gz" for i in range(count)]


def names(side: dict[str, list[Path]], name: str = "A") -> list[str]:
    return [path.name for path in side[name]]


# Every file a subject


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1, 0.1, 0), (2, 0.1, 1), (5, 0.1, 1), (40, 0.1, 4), (40, 0.0, 0), (3, 0.99, 2), (100, 0.25, 25)],
)
def test_split_is_a_share(tmp_path, count, fraction, expected):
    split = split_dataset(make_set(tmp_path, {"A": numbered(count)}), fraction, seed=0)
    assert len(split.validation["A"]) == expected
    assert sorted(names(split.training) + names(split.validation)) == numbered(count)


def by_file(files: list[Path], fraction: float, seed: int) -> set[Path]:
    """The rule without subjects, class by class: those with the lowest hashes of seed and name are held out."""
    common = os.path.commonpath([file.parent for file in files])
    key = lambda file: hashlib.sha256(f"{seed}/{os.path.relpath(file, common)}".encode()).digest()  # noqa: E731
    return set(sorted(files, key=key)[: max(1, round(fraction * len(files)))])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_without_a_pattern_classes_are_split_by_file(tmp_path, seed):
    files = {
        "A": [f"s{i:02d}/scan.nii.gz" for i in range(23)],
        "B": numbered(8),
        "C": [f"deep/{n}" for n in numbered(5)],
    }
    split = split_dataset(make_set(tmp_path, files), 0.3, seed)
    for name, paths in files.items():
        expected = by_file([tmp_path / name / path for path in paths], 0.3, seed)
        assert split.validation[name] == sorted(expected)
        assert split.training[name] == sorted({tmp_path / name / path for path in paths} - expected)


def test_known_choice(tmp_path):
    """Runs of earlier versions go on with their files."""
    split = split_dataset(make_set(tmp_path, {"A": numbered(20)}), 0.2, seed=0)
    assert names(split.validation) == ["004.nii.gz", "005.nii.gz", "006.nii.gz", "017.nii.gz"]


def test_split_depends_on_seed_and_names_alone(tmp_path):
    first, second = (make_set(tmp_path / place, {"A": numbered(40)}) for place in ("here", "there"))
    validation = names(split_dataset(first, 0.2, seed=0).validation)
    assert names(split_dataset(second, 0.2, seed=0).validation) == validation
    assert names(split_dataset(first, 0.2, seed=1).validation) != validation
    assert validation not in (numbered(40)[-8:], numbered(40)[:8])


def test_folders_given_in_different_ways(tmp_path, monkeypatch):
    """A folder by its full path, one relative to the working directory."""
    make_set(tmp_path / "data", {"A": numbered(3), "B": ["x.nii.gz"]})
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "set.json"
    path.write_text(json.dumps({"0": [str(tmp_path / "data" / "A"), "data/B"]}))
    monkeypatch.chdir(tmp_path)
    split = split_dataset(path, 0.25, 0)
    assert (len(split.training["0"]), len(split.validation["0"])) == (3, 1)
    keep_split(tmp_path / "run", path, split, OPTIONS, is_resumed=False)
    files = json.loads((tmp_path / "run" / "split.json").read_text())["files"]["0"]
    assert sorted(files["training"] + files["validation"]) == [*(f"A/{name}" for name in numbered(3)), "B/x.nii.gz"]


# Subjects

PATTERN = r"sub-(\d+)"


def scans(subjects: range | list[int], count: int = 1) -> list[str]:
    return [f"sub-{subject:02d}/ses-{i}.nii.gz" for subject in subjects for i in range(count)]


def subjects(side: dict[str, list[Path]], *of: str) -> set[str]:
    return {re.search(PATTERN, str(path))[1] for name in of or side for path in side[name]}


@pytest.mark.parametrize("seed", range(4))
def test_subjects_stay_together_in_all_names(tmp_path, seed):
    files = {"T1": scans(range(30), 2), "T2": scans(range(10, 30), 1), "CT": scans([3, 40, 41, 42], 3)}
    split = split_dataset(make_set(tmp_path, files), 0.2, seed, PATTERN)
    assert not subjects(split.training) & subjects(split.validation)
    for name, paths in files.items():
        assert len(split.training[name]) + len(split.validation[name]) == len(paths)
        assert split.training[name]
        assert split.validation[name]
    assert 10 <= len(split.validation["T1"]) <= 14  # 12 of 60
    assert 3 <= len(split.validation["T2"]) <= 5  # 4 of 20


def test_the_choice_of_subjects_depends_on_seed_and_subject_alone(tmp_path):
    first = split_dataset(make_set(tmp_path / "a", {"T1": scans(range(40))}), 0.2, 0, PATTERN)
    again = split_dataset(make_set(tmp_path / "b", {"X": scans(range(40), 2)}), 0.2, 0, PATTERN)
    other = split_dataset(make_set(tmp_path / "a", {"T1": scans(range(40))}), 0.2, 1, PATTERN)
    assert len(subjects(first.validation)) == 8
    assert subjects(first.validation) == subjects(again.validation)
    assert subjects(first.validation) != subjects(other.validation)


def test_a_name_of_one_subject_trains_and_two_subjects_are_parted(tmp_path):
    files = {"one": scans([1], 5), "two": scans([2, 3], 20)}
    split = split_dataset(make_set(tmp_path, files), 0.05, 0, PATTERN)
    assert (len(split.training["one"]), len(split.validation["one"])) == (5, 0)
    assert (len(split.training["two"]), len(split.validation["two"])) == (20, 20)  # far from 2, but each side has one


def test_subjects_are_taken_only_where_that_comes_nearer_to_the_share(tmp_path):
    path = make_set(tmp_path, {"A": scans(range(8), 2)})
    shares = {fraction: len(split_dataset(path, fraction, 0, PATTERN).validation["A"]) for fraction in (0.2, 0.26, 0.4)}
    assert shares == {0.2: 2, 0.26: 4, 0.4: 6}  # of 16 files 3 (one subject or two are as near), 4, 6


def test_whole_match_without_a_group(tmp_path):
    path = make_set(tmp_path, {"A": ["p1_a.nii.gz", "p1_b.nii.gz", "p2_a.nii.gz", "p2_b.nii.gz"]})
    split = split_dataset(path, 0.5, 0, r"^p\d")
    assert len({name[:2] for name in names(split.validation)}) == 1
    assert len(names(split.validation)) == 2


def test_the_pattern_sees_only_the_path_below_the_class_folder(tmp_path):
    path = make_set(tmp_path / "sub-99", {"A": scans(range(6))})
    assert len(split_dataset(path, 0.5, 0, r"sub-\d+").validation["A"]) == 3
    with pytest.raises(UserError, match="finds no subject"):
        split_dataset(path, 0.5, 0, "sub-99")


@pytest.mark.parametrize(
    ("fraction", "pattern", "message"),
    [
        (-0.1, None, r"dataset\.val_fraction is -0\.1"),
        (1.0, None, r"dataset\.val_fraction is 1\.0"),
        (0.1, "sub-(", r"subject_pattern 'sub-\(': not a regular expression"),
        (0.1, "pat-(.)", r"sub-00/ses-0\.nii\.gz: subject_pattern 'pat-\(\.\)' finds no subject"),
        (0.1, "(x)?sub", "finds no subject"),
        (0.0, "pat-(.)", "finds no subject"),
    ],
)
def test_mistakes(tmp_path, fraction, pattern, message):
    path = make_set(tmp_path, {"A": scans(range(3))})
    with pytest.raises(UserError, match=message) as caught:
        split_dataset(path, fraction, 0, pattern)
    assert "\n" not in str(caught.value)


# Record


def test_record(tmp_path):
    path = make_set(tmp_path, {"A": scans(range(4)), "B": numbered(1)})
    split = split_dataset(path, 0.2, 0)
    keep_split(tmp_path / "run", path, split, OPTIONS, is_resumed=False)
    record = json.loads((tmp_path / "run" / "split.json").read_text())
    files = record.pop("files")
    assert record == OPTIONS
    assert files["B"] == {"training": numbered(1), "validation": []}
    assert sorted(files["A"]["training"] + files["A"]["validation"]) == scans(range(4))
    assert files["A"]["validation"] == [path.relative_to(tmp_path / "A").as_posix() for path in split.validation["A"]]


def test_a_resumed_run_needs_the_same_split(tmp_path):
    path = make_set(tmp_path, {"A": numbered(40)})
    run = tmp_path / "run"
    keep = lambda resumed, seed=0: keep_split(  # noqa: E731
        run, path, split_dataset(path, 0.2, seed), OPTIONS, is_resumed=resumed
    )
    keep(False)
    before = (run / "split.json").read_bytes()
    keep(True)
    with pytest.raises(UserError, match=r"split\.json.*\d+ moved to the other side \(e\.g\. A/\d+\.nii\.gz\);"):
        keep(True, seed=1)
    (tmp_path / "A" / "007.nii.gz").unlink()
    (tmp_path / "A" / "a.nii.gz").touch()
    (tmp_path / "A" / "b.nii.gz").touch()
    with pytest.raises(
        UserError, match=r"2 new \(e\.g\. A/a\.nii\.gz\), 1 gone \(e\.g\. A/007\.nii\.gz\).*give the data as it was, or"
    ):
        keep(True)
    assert (run / "split.json").read_bytes() == before
    keep(False)  # a run without checkpoints begins anew
    assert (run / "split.json").read_bytes() != before


def test_names_that_are_no_text_are_split_and_read_back(tmp_path):
    path = make_set(tmp_path, {"A": [os.fsdecode(b"M\xfcller%d.nii.gz" % i) for i in range(4)]})
    split = split_dataset(path, 0.5, 0)
    assert len(split.validation["A"]) == 2
    for resumed in (False, True):
        keep_split(tmp_path / "run", path, split, OPTIONS, is_resumed=resumed)


def test_a_run_of_an_earlier_version_gets_its_record(tmp_path):
    path = make_set(tmp_path, {"A": numbered(4)})
    keep_split(tmp_path / "run", path, split_dataset(path, 0.2, 0), OPTIONS, is_resumed=True)
    assert (tmp_path / "run" / "split.json").is_file()


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"files": {"A": []}}', b"[]"])
def test_unreadable_record(tmp_path, content):
    path = make_set(tmp_path, {"A": numbered(4)})
    write_atomically(tmp_path / "run" / "split.json", content)
    with pytest.raises(UserError, match=r"split\.json: cannot be read as the record of a split"):
        keep_split(tmp_path / "run", path, split_dataset(path, 0.2, 0), OPTIONS, is_resumed=True)


# A few of all names


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1, 0, 0]), (3, [1, 1, 1]), (7, [3, 1, 3]), (9, [4, 1, 4]), (30, [20, 1, 9]), (99, [20, 1, 9])],
)
def test_every_name_gives_files_in_turn(count, expected):
    files = {name: [Path(name, path) for path in numbered(n)] for name, n in (("A", 20), ("B", 1), ("C", 9))}
    chosen = spread_evenly(files, count, seed=3)
    assert [sum(path.parent == Path(name) for path in chosen) for name in files] == expected
    assert chosen == sorted(set(chosen))  # as they were
    elsewhere = {name: [Path("/data", path) for path in reversed(paths)] for name, paths in files.items()}
    assert {Path("/data", path) for path in chosen} == set(spread_evenly(elsewhere, count, seed=3))
    assert set(spread_evenly(files, count - 1, seed=3)) <= set(chosen)


def test_another_seed_gives_others():
    files = {"A": [Path("A", path) for path in numbered(20)]}
    assert len({tuple(spread_evenly(files, 5, seed)) for seed in range(5)}) == 5

"""Several sizes and inputs of a class: where their volumes go, what the dataset JSONs name, what is said of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nifti_files import write_nifti
from preprocessing_runs import CT, ROOT, add_nifti, ct, run, times
from user_errors import error_of

from dataset.order.split import split_dataset
from dataset.preparation import prepared_folder
from dataset.preparation.manifest import Intensity, common_intensity, read_manifest
from dataset.preparation.prepared_folder import Outcome
from dataset.preparation.sources import Source
from dataset.preparation.summary import _notes
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.index import read_class_folders

SMALL, LARGE = ("--size", 8, 8, 4), ("--size", 16, 12, 8)


@pytest.fixture
def raw(tmp_path) -> Path:
    for i in range(3):
        add_nifti(tmp_path / "raw" / f"p{i}" / "a.nii.gz", ct(i))
    return tmp_path / "raw"


def jsons(raw: Path) -> list[dict]:
    names = ("PatchVolume_data", "Singleres_dataset", "Singleres_latents")
    return [json.loads((raw.parent / "data" / f"{name}.json").read_text()) for name in names]


def problems(raw: Path) -> list[tuple[str, str]]:
    """(name of the source, size) of what is listed."""
    path = raw.parent / "data" / "Thorax" / "problems.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Path(problem["source"]).parent.name, problem["size"]) for problem in map(json.loads, lines))


# Sizes


def test_sizes_lie_side_by_side_in_the_same_jsons(raw, capsys):
    assert run(raw, *CT, *SMALL) == 0
    assert jsons(raw) == [{"Thorax": "Thorax/8x8x4"}, {"0": "Thorax/8x8x4"}, {"0": "Thorax/8x8x4_latents"}]
    assert run(raw, "--name", "Other", "--modality", "CT", *SMALL) == 0
    folder = raw.parent / "data" / "Thorax"
    before = times(folder)
    capsys.readouterr()
    assert run(raw, *CT, *LARGE) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "/Thorax: 6 volumes" in said
    assert "│ prepared │ 3 │ 16x12x8" in said
    assert "│ were there │ 3 │ 8x8x4" in said
    assert run(raw, *CT) == 0
    assert run(raw, *CT, *LARGE) == 0
    places = ["Thorax/8x8x4", "Thorax/16x12x8", "Thorax/native"]
    assert jsons(raw) == [
        {"Other": "Other/8x8x4", "Thorax": places},
        {"0": places, "1": "Other/8x8x4"},
        {"0": [f"{place}_latents" for place in places], "1": "Other/8x8x4_latents"},
    ]
    assert {name: when for name, when in times(folder).items() if name in before} == before
    for size in ("8x8x4", "16x12x8", "native"):
        assert sorted(read_manifest(folder / size)) == [f"p{i}/a.nii.gz" for i in range(3)]
    data = Singleres_dataset(raw.parent / "data" / "Singleres_dataset.json", generate_latents=True)
    assert [shape for shape, label in zip(data.shapes, data.labels, strict=True) if label == 0] == (
        3 * [(4, 8, 8)] + 3 * [(8, 16, 12)] + 3 * [(8, 12, 12)]  # (z, x, y); native ones are padded to multiples of 4
    )
    assert data.latent_paths[0] == folder / "8x8x4_latents" / "p0" / "a.nii.gz"
    folders = read_class_folders(raw.parent / "data" / "Singleres_dataset.json")
    assert common_intensity(folders[0]) == Intensity("window", -1000.0, 1000.0, "HU")


def test_another_run_that_is_writing_the_jsons_is_waited_for(raw):
    """It takes the id that this run meant to have, after the volumes of this run are there."""
    data = raw.parent / "data"
    data.mkdir()
    code = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[2]); from common.files import lock\n"
        "from dataset.preparation.classes import add_classes; from dataset.preparation.manifest import read_manifest\n"
        "data = pathlib.Path(sys.argv[1]); held = lock(data / '.lock'); print('held', flush=True)\n"
        "while len(read_manifest(data / 'Thorax' / 'native')) < 3: time.sleep(0.01)\n"
        "time.sleep(0.5); add_classes(data, {0: 'Other/native'})"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(data), str(ROOT)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        assert run(raw, *CT) == 0
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
        other.communicate()
    assert jsons(raw)[1] == {"0": "Other/native", "1": "Thorax/native"}


def test_one_source_is_on_one_side_of_the_split_in_all_sizes(raw):
    for i in range(3, 9):
        add_nifti(raw / f"p{i}" / "a.nii.gz", ct(i))
    path, sides = raw.parent / "data" / "PatchVolume_data.json", []
    for size in (SMALL, LARGE):
        assert run(raw, *CT, *size) == 0
        split = split_dataset(path, 1 / 3, seed=0)
        sides.append({p.parent.name for p in split.validation["Thorax"]})
    assert sides[0] == sides[1]
    assert len(split.validation["Thorax"]) == 2 * len(sides[0]) == 6
    assert not sides[1] & {p.parent.name for p in split.training["Thorax"]}


# Folders of earlier versions


@pytest.fixture
def old(raw) -> Path:
    """As versions without folders for sizes left it: volumes and manifest in the class folder itself."""
    assert run(raw, *CT, *SMALL) == 0
    data = raw.parent / "data"
    for path in [*(data / "Thorax" / "8x8x4").iterdir()]:
        path.rename(data / "Thorax" / path.name)
    (data / "Thorax" / "8x8x4").rmdir()
    for path in data.glob("*.json"):
        path.write_text(path.read_text().replace("Thorax/8x8x4", "Thorax"))
    (data / "Thorax" / "problems.jsonl").write_text('{"source": "raw/x.nii", "reason": "of an earlier version"}\n')
    return raw


def test_a_class_folder_of_an_earlier_version_goes_on(old):
    before = times(old.parent / "data" / "Thorax")
    add_nifti(old / "p9" / "a.nii.gz", ct(9))
    assert run(old, *CT, *SMALL) == 0
    after = times(old.parent / "data" / "Thorax")
    assert after.pop("p9/a.nii.gz")
    assert after == before
    assert jsons(old) == [{"Thorax": "Thorax"}, {"0": "Thorax"}, {"0": "Thorax_latents"}]
    assert problems(old) == []


def test_a_class_folder_of_an_earlier_version_gets_no_second_size(old):
    data = old.parent / "data"
    message = error_of(lambda: run(old, *CT, *LARGE))
    assert "an earlier version put volumes (size: 8x8x4) into the class folder itself" in message
    assert "move its content into" in message
    assert sorted(path.name for path in (data / "Thorax").iterdir()) == [
        *("manifest.jsonl", "p0", "p1", "p2", "problems.jsonl")
    ]
    (data / "Thorax" / "8x8x4").mkdir()  # the way out that it names
    for name in ("manifest.jsonl", "p0", "p1", "p2"):
        (data / "Thorax" / name).rename(data / "Thorax" / "8x8x4" / name)
    assert '"0" names Thorax, and the volumes of this run go into Thorax/16x12x8: they would count twice' in error_of(
        lambda: run(old, *CT, *LARGE)
    )
    for path in data.glob("*.json"):
        path.write_text(path.read_text().replace('"Thorax"', '"Thorax/8x8x4"').replace('"Thorax/8x8x4":', '"Thorax":'))
    assert run(old, *CT, *LARGE) == 0
    assert jsons(old)[0] == {"Thorax": ["Thorax/8x8x4", "Thorax/16x12x8"]}


# Problems over several runs


def test_a_problem_stays_until_it_is_solved(raw, capsys):
    bad = add_nifti(raw / "bad" / "a.nii.gz", ct(5) + 1100)
    gone = add_nifti(raw / "gone" / "a.nii.gz", ct(6) + 1100)
    assert run(raw, *CT, *SMALL) == 1
    assert problems(raw) == [("bad", "8x8x4"), ("gone", "8x8x4")]
    assert run(raw, *CT, *LARGE, "--select", "gone") == 1
    assert problems(raw) == [("bad", "8x8x4"), ("gone", "16x12x8"), ("gone", "8x8x4")]
    capsys.readouterr()
    assert run(raw, *CT, *SMALL, "--select", "p0") == 0  # of what this run wanted all is there
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("│ failed │ 1 │") == 3
    assert "(16x12x8)" in said
    assert problems(raw) == [("bad", "8x8x4"), ("gone", "16x12x8"), ("gone", "8x8x4")]
    gone.unlink()
    assert run(raw, *CT, *SMALL, "--select", "p0") == 0
    assert problems(raw) == [("bad", "8x8x4")]
    add_nifti(bad, ct(5))
    assert run(raw, *CT, *LARGE) == 0
    assert problems(raw) == [("bad", "8x8x4")]  # of this size it isn't made yet
    assert run(raw, *CT, *SMALL) == 0
    assert problems(raw) == []


def test_problems_of_another_input_stay_while_it_is_there(raw):
    other = raw.parent / "second"
    add_nifti(other / "bad" / "x.nii.gz", ct(5) + 1100)
    add_nifti(other / "good" / "x.nii.gz", ct(6))
    assert run(other, *CT) == 1
    assert run(raw, *CT) == 0
    assert problems(raw) == [("bad", "native")]
    other.rename(raw.parent / "elsewhere")
    assert run(raw, *CT) == 0
    assert problems(raw) == []


# What is said, what it costs


def test_what_was_handled_on_reading_is_said_and_kept(raw, capsys):
    write_nifti(raw / "m" / "a.nii", ct(7), np.diag([0.001, 0.001, 0.002, 1]), units="meter")
    assert run(raw, *CT) == 0
    note = "header in meter, converted to mm"
    assert f"note: {note}: 1 new volume(s), e.g. m/a.nii.gz\n" in capsys.readouterr().err
    entries = read_manifest(raw.parent / "data" / "Thorax" / "native")
    assert {file: entry["notes"] for file, entry in entries.items() if entry["notes"]} == {"m/a.nii.gz": [note]}
    assert entries["m/a.nii.gz"]["steps"][0] == note
    assert run(raw, *CT) == 0
    assert "note" not in capsys.readouterr().err  # of new volumes only


def test_notes_that_differ_in_numbers_are_of_one_kind():
    notes = {"a": ["tilt of 15 degrees"], "b": ["2 copies left out", "tilt of -3.5 degrees"], "c": []}
    new = [Outcome(Source(file, ()), {"file": file, "notes": of}) for file, of in notes.items()]
    assert list(_notes(new)) == [
        "note: tilt of 15 degrees: 2 new volume(s), e.g. a",
        "note: 2 copies left out: 1 new volume(s), e.g. b",
    ]


def test_sources_that_moved_are_read_once_more_and_no_other(raw, monkeypatch):
    hashed = []
    sha256 = prepared_folder.source_sha256
    monkeypatch.setattr(prepared_folder, "source_sha256", lambda source: hashed.append(source.name) or sha256(source))
    assert run(raw, *CT) == 0
    moved = raw.rename(raw.parent / "moved")
    for expected in (3 * ["p"], []):
        hashed.clear()
        assert run(moved, *CT) == 0
        assert [name[0] for name in hashed] == expected
    folder = raw.parent / "data" / "Thorax" / "native"
    assert {entry["input"] for entry in read_manifest(folder).values()} == {str(moved)}

"""The preprocessing script with files that fail, wrong options, and folders in each other's way."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dicom_files import write_series
from nifti_files import write_nifti
from preprocessing_runs import CT, ROOT, SCRIPT, add_nifti, ct, make_raw, run, times
from user_errors import error_of

from dataset.preparation import prepared_folder
from dataset.preparation.manifest import MANIFEST_NAME, read_manifest


def problems(raw: Path) -> list[tuple[str, str]]:
    lines = (raw.parent / "data" / "Thorax" / "problems.jsonl").read_text().splitlines()
    return [(problem["source"], problem["reason"]) for problem in map(json.loads, lines)]


@pytest.fixture
def raw(tmp_path) -> Path:
    return make_raw(tmp_path / "raw")


# Problems of files


def test_a_failing_file_is_reported_and_skipped(raw, capsys):
    path = raw / "p2" / "a.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    add_nifti(raw / "p5" / "offset.nii.gz", ct(5) + 1100)
    series = write_series(raw / "p6", ct(6), number=7, description="Gap")
    series[3].unlink()
    assert run(raw, *CT) == 1
    folder = raw.parent / "data" / "Thorax" / "native"
    assert sorted(times(folder))[0] == "p1/a.nii.gz"
    assert len(times(folder)) == 2
    problems = [json.loads(line) for line in (folder.parent / "problems.jsonl").read_text().splitlines()]
    assert {Path(problem["source"]).name for problem in problems} == {
        "a.nii.gz", "offset.nii.gz", "p6 [series 7 Gap]",
    }  # fmt: skip
    assert any("truncated" in problem["reason"] for problem in problems)
    said = " ".join(capsys.readouterr().err.split())
    assert "failed" in said
    assert "[series 7 Gap]" in said
    assert "no Hounsfield units" in said

    add_nifti(path, ct(1))
    (raw / "p5" / "offset.nii.gz").unlink()
    shutil.rmtree(raw / "p6")
    assert run(raw, *CT) == 0
    assert not (folder.parent / "problems.jsonl").exists()


def test_what_an_earlier_run_made_of_a_file_that_fails_now_is_removed(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    add_nifti(raw / "p2" / "a.nii.gz", ct(1) + 1100)
    assert run(raw, *CT) == 1
    assert "p2/a.nii.gz" not in times(folder)
    assert "p2/a.nii.gz" not in read_manifest(folder)


def test_an_unexpected_error_of_one_file_does_not_end_the_run(raw, monkeypatch):
    prepare = prepared_folder.prepare

    def fails_once(scan, recipe):
        if (scan.data == ct(1)).all():
            raise RuntimeError("of a\nlibrary")
        return prepare(scan, recipe)

    monkeypatch.setattr(prepared_folder, "prepare", fails_once)
    add_nifti(raw / "p2" / "a.nii.gz", ct(1))
    assert run(raw, *CT, "--select", r"p1|p2") == 1
    (line,) = (raw.parent / "data" / "Thorax" / "problems.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "RuntimeError: of a library"


def test_cut_off_foreground_is_mentioned(raw, capsys):
    assert run(raw, *CT, "--size", 4, 4, 4) == 0
    assert "cropping cut off more than 2%" in " ".join(capsys.readouterr().err.split())


# Mistakes


def fails(raw: Path, *options: object, output: str = "data") -> str:
    return error_of(lambda: run(raw, *options, output=output))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "which class is it"),
        (("--name", "X"), "modality of X is not set"),
        (("--preset", "CTArm"), "there is no CTArm: choose one of CTHeadNeck, CTHeadNeck_256x256x256"),
        (("--preset", "CTLegs", "--modality", "MR"), "modality MR doesn't fit the preset CTLegs"),
        ((*CT, "--window", 0, 1, "--percentiles", 1, 99), "exclude each other"),
        ((*CT, "--window", 10, 0), "window must be two numbers, the lower one first"),
        ((*CT, "--percentiles", 1, 101), "percentiles must be between 0 and 100"),
        ((*CT, "--spacing", 1, 1, 0), "spacing must be three numbers from 0.05 to 20"),
        ((*CT, "--size", 64, 64), "size must be three numbers above 0"),
        ((*CT, "--assume-orientation", "LLS"), "assume_orientation must be three letters"),
        ((*CT, "--select", "("), "select must be a regular expression"),
        ((*CT, "--select", "nothing"), "of 5 volumes in .* none is wanted"),
        (("--name", "X_cache", "--modality", "CT"), "name must be a name that doesn't end like"),
        (("--name", "..", "--modality", "CT"), "name must be a name that a folder can have"),
        ((*CT, "--window=a"), "window must be a list"),
    ],
)
def test_options(raw, options, message):
    assert re.search(message, fails(raw, *options))
    assert not (raw.parent / "data").exists()


def test_output_within_the_input(raw):
    assert "lies in the input folder" in fails(raw, *CT, output="raw/prepared")
    assert "no such folder" in fails(raw.parent / "missing", *CT)


def test_output_that_is_a_file(raw):
    (raw.parent / "data").write_text("")
    assert "data can't be written to" in fails(raw, *CT)


def test_output_that_is_for_reading_only(raw, monkeypatch):
    """The class folder, or only the folder of the dataset JSONs."""
    folder = raw.parent / "data" / "Thorax" / "native"
    folder.mkdir(parents=True)
    for closed in (folder, raw.parent / "data"):
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: Path(path) != closed)
        assert f"output_dir: {closed} can't be written to" in fails(raw, *CT)


def test_class_ids_are_kept_apart(raw):
    assert run(raw, *CT, "--class-id", 3) == 0
    assert "class Thorax has the id 3, not 4" in fails(raw, *CT, "--class-id", 4)
    assert "class id 3 is Thorax: give class Other" in fails(
        raw, "--name", "Other", "--modality", "CT", "--class-id", 3
    )
    assert run(raw, "--name", "Other", "--modality", "CT", "--select", "p1") == 0
    assert json.loads((raw.parent / "data" / "Singleres_dataset.json").read_text()) == {
        "3": "Thorax/native", "4": "Other/native",
    }  # fmt: skip


def test_volumes_of_other_options_are_not_mixed(raw):
    assert run(raw, *CT) == 0
    message = fails(raw, *CT, "--window", -100, 100, "--select", "p1")
    assert "holds 2 volume(s) made with other options" in message
    assert "window was [-1000.0, 1000.0], is [-100.0, 100.0]" in message


def test_two_sources_of_one_name(raw):
    """The first one counts, or the one that made the volume which is there; the others go on."""
    folder = raw.parent / "data" / "Thorax" / "native"
    write_nifti(raw / "p1" / "b{}.nii", ct(1))
    add_nifti(raw / "p1" / "b{}.nii.gz", ct(2))
    assert run(raw, *CT, "--select", "p1") == 1
    ((source, reason),) = problems(raw)
    assert source == f"{raw}/p1/b{{}}.nii.gz"
    assert reason == f"would become {folder}/p1/b{{}}.nii.gz as {raw}/p1/b{{}}.nii does: rename or move one"
    assert sorted(times(folder)) == ["p1/a.nii.gz", "p1/b{}.nii.gz"]
    before = times(folder)
    (raw / "p1" / "b{}.nii").rename(raw / "p1" / "c.nii")
    assert run(raw, *CT, "--select", "p1") == 0
    assert times(folder)["p1/b{}.nii.gz"] != before["p1/b{}.nii.gz"]
    before = times(folder)
    (raw / "p1" / "c.nii").rename(raw / "p1" / "b{}.nii")
    assert run(raw, *CT, "--select", "p1") == 1
    assert [Path(source).name for source, _ in problems(raw)] == ["b{}.nii"]
    assert times(folder)["p1/b{}.nii.gz"] == before["p1/b{}.nii.gz"]


def test_volumes_of_another_input_are_not_overwritten(raw):
    folder, other = raw.parent / "data" / "Thorax" / "native", raw.parent / "second"
    assert run(raw, *CT) == 0
    before = times(folder)
    add_nifti(other / "p1" / "a.nii.gz", ct(9))
    add_nifti(other / "p1" / "new.nii.gz", ct(8))
    assert run(other, *CT) == 1
    ((source, reason),) = problems(raw)
    assert source == f"{other}/p1/a.nii.gz"
    assert f"would overwrite {folder}/p1/a.nii.gz, which was made from {raw}/p1/a: give another name" in reason
    after = times(folder)
    assert after.pop("p1/new.nii.gz")
    assert after == before
    (other / "p1" / "a.nii.gz").write_bytes((raw / "p1" / "a.nii.gz").read_bytes())  # the same file is no other one
    assert run(other, *CT) == 0
    assert not (raw.parent / "data" / "Thorax" / "problems.jsonl").exists()


@pytest.mark.parametrize("name", ["x" * 250 + ".nii", "p1/a.nii.gz/b.nii"])  # too long with .gz; below a file
def test_a_name_that_cannot_be_written_does_not_end_the_run(raw, name):
    assert run(raw, *CT, "--select", "p1") == 0
    other = raw.parent / "second"
    write_nifti(other / "0.nii", ct(4))
    write_nifti(other / name, ct(3))
    assert run(other, *CT) == 1
    ((source, reason),) = problems(raw)
    assert source == f"{other}/{name}"
    assert "its volume can't be called" in reason
    assert sorted(times(raw.parent / "data" / "Thorax" / "native")) == ["0.nii.gz", "p1/a.nii.gz"]


def test_a_name_of_the_longest_is_prepared(raw):
    name = "x" * (255 - len(".nii.gz")) + ".nii.gz"
    add_nifti(raw / name, ct(3))
    assert run(raw, *CT) == 0
    assert name in times(raw.parent / "data" / "Thorax" / "native")


def test_two_runs_at_once_into_one_folder(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    folder.mkdir(parents=True)
    code = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[2]); from common.files import lock_folder\n"
        "lock = lock_folder(pathlib.Path(sys.argv[1]), 'preparing volumes'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder), str(ROOT)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        assert f"another process (process {other.pid} on " in fails(raw, *CT)
        assert not times(folder)
    finally:
        other.kill()
        other.communicate()
    assert run(raw, *CT) == 0


def test_damaged_manifest(raw):
    assert run(raw, *CT) == 0
    path = raw.parent / "data" / "Thorax" / "native" / MANIFEST_NAME
    path.write_text('{"file": 1}\n' + path.read_text())
    assert f"{MANIFEST_NAME}: line 1 is no entry" in fails(raw, *CT)


def test_full_disk_ends_the_run_with_one_line(raw):
    """A file-size limit stands for the full disk: writing fails in the middle of a file."""
    add_nifti(raw / "p9" / "large.nii.gz", ct(5, (64, 64, 64)))
    words = ["--input", raw, "--output-dir", raw.parent / "data", "--num-workers", "1", *CT]
    limit = (200_000, 200_000)
    done = subprocess.run(
        [*SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "large.nii.gz: cannot be written (File too large)" in done.stderr
    folder = raw.parent / "data" / "Thorax" / "native"
    assert not list(folder.rglob("*.tmp"))
    assert run(raw, *CT) == 0
    assert len(times(folder)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--validation", 0.6, "--held-out", 0.5), "leave something to train on"),
        (("--subject-pattern", "patient"), "finds no subject in 'p1/a.nii.gz'"),
    ],
)
def test_a_split_that_cannot_be_drawn_is_said_before_any_work(raw, options, message):
    assert message in error_of(run, raw, *CT, *options)
    assert not list((raw.parent / "data").rglob("*.nii.gz"))

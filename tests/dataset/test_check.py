"""The check of a data set as a command: table, problems, report, picture and exit status."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.check import main
from dataset.checking import report as check
from dataset.checking.examine import examine_volume
from dataset.checking.report import choose_pictures, find_subjects, summarise
from dataset.volumes.volume_io import write_latent, write_volume

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--num-workers", "0", "--num-pictures", "0"]


def save(path: Path, seed: int = 0, shape: tuple[int, ...] = (8, 8, 8), low: float = -1.0, affine=None) -> Path:
    data = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (1 - low) + low
    data[:2] = low
    write_volume(path, data, np.eye(4) if affine is None else affine)
    return path


def save_json(path: Path, *names: str) -> Path:
    path.write_text(json.dumps({name: name for name in names}))
    return path


@pytest.fixture
def sound(tmp_path) -> Path:
    """Two names of three and two sound volumes."""
    for name, count in (("CT", 3), ("MR", 2)):
        for i in range(count):
            save(tmp_path / name / f"sub-{i}.nii.gz", seed=10 * count + i)
    return save_json(tmp_path / "set.json", "CT", "MR")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dataset" / "check.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


# The command


def test_sound_data(sound):
    done = run(sound, "--num-workers", "2", "--patch-size", "8", "--subject-pattern", r"sub-\d")
    assert done.returncode == 0, done.stderr
    assert "no problems" in done.stdout
    assert "PROBLEM" not in done.stdout
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "8×8×8" in line]
    assert [row[1:6] for row in rows] == [["CT", "3", "3", "8×8×8", "1×1×1"], ["MR", "2", "2", "8×8×8", "1×1×1"]]
    picture = sound.with_name("set_check.png")
    assert f"picture: {picture}" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(sound.parent.glob("*.tmp"))


def test_problems(sound):
    """Seven unreadable files: five are named on the screen, all in the report; the rest is still checked."""
    for i in range(7):
        (sound.parent / "CT" / f"x [b]{i}.nii.gz").write_bytes(b"no image")
    save(sound.parent / "MR" / "turned.nii.gz", 5, affine=np.diag([-1.0, 1, 1, 1]))
    report = sound.parent / "out" / "report.json"
    done = run(sound, "--num-workers", "1", "--report", report, "--num-pictures", "2")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("PROBLEM unreadable or no volume"))
    assert ": 7. What to do: copy or make the files again" in lines[start]
    assert lines[start + 1] == f"    {sound.parent}/CT/x [b]0.nii.gz: not a NIfTI image"
    assert lines[start + 6] == "    … and 2 more; --report FILE.json names all"
    assert "PROBLEM mixed orientations: 1." in done.stdout
    assert "MR: 2 RAS, 1 LAS" in done.stdout
    assert "9 problems" in lines

    written = json.loads(report.read_text())
    unreadable = written["problems"]["unreadable or no volume of one channel"]
    assert [Path(found["file"]).name for found in unreadable["found"]] == [f"x [b]{i}.nii.gz" for i in range(7)]
    assert written["problems"]["mixed orientations"]["found"] == [{"file": None, "found": "MR: 2 RAS, 1 LAS"}]
    assert written["names"]["CT"]["files"] == 10
    assert written["names"]["CT"]["sizes"] == {"8×8×8": 3}
    assert written["names"]["MR"]["lowest"] == -1
    assert written["intensity_range"] == [-1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.json"], "none.json: no such dataset JSON"),
        (["{json}", "--patch-size", "0"], "patch_size must be at least 1, got 0"),
        (["{json}", "--patch-size", "x"], "option patch_size: patch_size must be a whole number, got 'x'"),
        (["{json}", "--nothing"], "unknown flag --nothing"),
        (
            ["{json}", "--intensity-range", "1", "0"],
            "must be two numbers, the lower one first, got [1.0, 0.0]",
        ),
        (
            ["{json}", "--subject-pattern", "("],
            "subject_pattern must be a regular expression that Python can",
        ),
        ([], "the following arguments are required: JSON"),
    ],
)
def test_wrong_commands_end_in_one_line(sound, arguments, message):
    done = run(*(argument.format(json=sound, folder=sound.parent) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# What it finds


def output_of(capsys, *arguments: str | Path) -> tuple[int, str]:
    status = main([*map(str, arguments), *QUICK])
    return status, capsys.readouterr().out


def test_a_set_read_with_the_wrong_range(tmp_path, capsys):
    for i in range(2):
        save(tmp_path / "A" / f"{i}.nii.gz", seed=i, low=0.0)
    path = save_json(tmp_path / "set.json", "A")
    status, out = output_of(capsys, path)
    assert status == 1
    assert "PROBLEM only the upper half of the declared range: 1." in out
    assert "dataset.intensity_range=[0,1]" in out
    status, out = output_of(capsys, path, "--intensity-range", "0", "1")
    assert status == 0
    assert "no problems" in out


def test_notes_are_no_problems(sound, capsys):
    save(sound.parent / "CT" / "sub-9.nii.gz", 77, (8, 8, 12), affine=np.diag([2.0, 2, 2, 1]))
    status, out = output_of(capsys, sound, "--patch-size", "8")
    assert status == 0
    assert "note: CT: 1 do not divide into patches of 8" in out
    assert "note: CT: 2 sizes" in out
    assert "8×8×8 (3)" in out
    assert "note: MR" not in out


def test_notes_know_the_size_of_patches(sound, capsys):
    published = "patch of 64 (the published size; --patch-size says another): padded with background"
    assert f"note: CT: 3 smaller than a {published}" in output_of(capsys, sound)[1].replace("\n", " ")
    record = sound.parent / "CT_latents" / "latents.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"patch_size": 3}))
    out = output_of(capsys, sound)[1].replace("\n", "")
    assert f"note: CT: 3 do not divide into patches of 3 (those of {record.parent}): padded" in out
    assert "note: CT: 3 do not divide into patches of 5: padded" in output_of(capsys, sound, "--patch-size", "5")[1]


def test_copies_across_names(sound, capsys):
    (sound.parent / "MR" / "copy.nii.gz").write_bytes((sound.parent / "CT" / "sub-0.nii.gz").read_bytes())
    status, out = output_of(capsys, sound)
    assert status == 1
    assert f"MR/copy.nii.gz: the same voxels as {sound.parent}/CT/sub-0.nii.gz, one under CT, one under MR" in out


def test_files_without_a_subject(sound, capsys):
    save(sound.parent / "CT" / "other.nii.gz", 5)
    status, out = output_of(capsys, sound, "--subject-pattern", r"sub-(\d+)")
    assert status == 1
    assert "PROBLEM no subject: 1." in out
    assert "CT/other.nii.gz: 'sub-(\\\\d+)' finds nothing in 'other.nii.gz'" in out


def test_subjects_are_counted(tmp_path):
    for name in ("a1", "a2", "b1"):
        save(tmp_path / "A" / name / "x.nii.gz")
    counts, problems = find_subjects({"A": [tmp_path / "A"]}, r"^(\w)\d/")
    assert (counts, problems) == ({"A": 2}, [])
    assert find_subjects({"A": [tmp_path / "A"]}, None) == ({}, [])


def test_class_ids_and_several_folders(sound, capsys):
    path = sound.parent / "classes.json"
    path.write_text(json.dumps({"0": ["CT", "MR"]}))
    status, out = output_of(capsys, path, "--patch-size", "8")
    assert status == 0
    assert "│ 0    │     5 │" in out


@pytest.fixture
def latents(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        write_latent(tmp_path / "A_latents" / f"{i}.nii.gz", 2 * torch.rand(4, 4, 4, 2, generator=generator) - 1)
    (tmp_path / "set.json").write_text(json.dumps({"0": "A_latents"}))
    return tmp_path / "set.json"


def test_latents(latents, capsys):
    status, out = output_of(capsys, latents)
    assert status == 0
    assert "4×4×4×2" in out
    assert "spacing" not in out
    write_latent(latents.parent / "A_latents" / "3.nii.gz", torch.rand(8, 4, 4, 2))
    write_latent(latents.parent / "A_latents" / "4.nii.gz", torch.zeros(4, 4, 4, 2))
    status, out = output_of(capsys, latents)
    assert status == 1
    assert "3.nii.gz: channels 8, most have 4" in out
    assert "4.nii.gz: every value is 0" in out


def test_latents_of_sizes_that_are_made_on_purpose(tmp_path, capsys):
    """Each size in its folder is no problem, another one within a folder is."""
    for i, (folder, size) in enumerate({"32x32x32_latents": (4, 4, 4), "64x32x32_latents": (4, 4, 8)}.items()):
        for j in range(2):
            latent = torch.rand(2, *size, generator=torch.Generator().manual_seed(2 * i + j))
            write_latent(tmp_path / "A" / folder / f"{j}.nii.gz", latent)
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"0": ["A/32x32x32_latents", "A/64x32x32_latents"]}))
    status, out = output_of(capsys, path)
    assert (status, "note: latents of 4×4×4, 4×4×8: train on one, with a JSON" in out) == (0, True)
    write_latent(tmp_path / "A" / "32x32x32_latents" / "odd.nii.gz", torch.rand(2, 4, 4, 8))
    status, out = output_of(capsys, path)
    assert status == 1
    assert "odd.nii.gz: size 4×4×8, most have 4×4×4" in out


def test_latents_of_one_channel_are_known_by_their_record(tmp_path, capsys):
    write_volume(tmp_path / "A_latents" / "a.nii.gz", torch.rand(4, 4, 4), np.eye(4))
    path = save_json(tmp_path / "set.json", "A_latents")
    assert "spacing mm" in output_of(capsys, path)[1]
    (tmp_path / "A_latents" / "latents.json").write_text("{}")
    assert "size C×d×h×w" in output_of(capsys, path)[1]


# Figures and pictures


def test_figures_of_a_name(tmp_path):
    volumes = [save(tmp_path / f"{i}.nii.gz", i, shape) for i, shape in enumerate([(4, 4, 4), (4, 4, 5), (4, 4, 4)])]
    (tmp_path / "x.nii.gz").write_bytes(b"x")
    facts = [examine_volume(path, (-1, 1)) for path in [*volumes, tmp_path / "x.nii.gz"]]
    summary = summarise(facts, is_latents=False)
    assert summary["files"] == 4
    assert summary["sizes"] == {"4×4×4": 2, "4×5×4": 1}  # X×Y×Z of (D, H, W)
    assert summary["median_of_means"] == sorted(file.mean for file in facts[:3])[1]
    assert summary["highest"] == max(file.high for file in facts[:3])
    assert 0.4 < summary["foreground"]["median"] <= 0.5
    assert summarise(facts[3:], is_latents=False) == {"files": 1, "sizes": {}, "spacings_mm": {}}


def test_some_of_each_name_are_drawn_the_same_for_a_seed():
    files = {name: [Path(f"{name}{i}") for i in range(count)] for name, count in (("a", 50), ("b", 1), ("c", 9))}
    chosen = choose_pictures(files, 6, seed=0)
    assert [name for name, _ in chosen] == list("aaabcc")
    assert all(path.name[0] == name for name, path in chosen)
    assert len(set(chosen)) == 6
    assert choose_pictures(files, 6, seed=0) == chosen
    assert choose_pictures(files, 6, seed=1) != chosen
    assert len(choose_pictures(files, 100, seed=0)) == 60
    assert choose_pictures(files, 0, seed=0) == []


def test_only_sound_files_are_drawn(sound, monkeypatch):
    save(sound.parent / "CT" / "turned.nii.gz", 5, affine=np.diag([-1.0, 1, 1, 1]))
    rows = []
    monkeypatch.setattr(check, "save_slice_grid", lambda path, drawn, **options: rows.append((path, drawn, options)))
    assert main([str(sound), "--num-workers", "0", "--picture", "here.png"]) == 1
    path, drawn, options = rows[0]
    assert path == Path("here.png")
    assert [label for label, _ in drawn].count("turned.nii.gz") == 0
    assert len(drawn) == 5
    assert all(len(pictures) == 3 for _, pictures in drawn)
    assert options["labels_above"]
    assert options["columns"] == ("axial", "coronal", "sagittal")
    assert "right is right" in options["title"]


def test_pictures_name_subjects_and_have_the_right_proportions(sound, monkeypatch):
    for path in sound.parent.glob("*/*.nii.gz"):
        path.unlink()
    save(sound.parent / "CT" / "sub-7" / "ct.nii.gz", 5, shape=(4, 8, 8), affine=np.diag([1.0, 1, 2, 1]))
    save(sound.parent / "MR" / "sub-8" / "mr.nii.gz", 6)
    rows = []
    monkeypatch.setattr(check, "save_slice_grid", lambda path, drawn, **options: rows.append(drawn))
    main([str(sound), "--num-workers", "0", "--subject-pattern", r"sub-\d"])
    main([str(sound), "--num-workers", "0"])
    assert [label for label, _ in rows[0]] == [
        "CT · subject sub-7 · sub-7/ct.nii.gz",
        "MR · subject sub-8 · sub-8/mr.nii.gz",
    ]
    assert [label for label, _ in rows[1]] == ["CT · sub-7/ct.nii.gz", "MR · sub-8/mr.nii.gz"]
    assert [picture.shape for picture in rows[0][0][1]] == [(8, 8)] * 3


@pytest.mark.parametrize("values", [[-1, 1], [0, 1], [-1, 0, 1], np.linspace(-1, 1, 20)])
def test_masks_are_warned_of_and_drawn(sound, capsys, monkeypatch, values):
    """One mask among many images of the same name."""
    for i in range(3, 12):
        save(sound.parent / "CT" / f"sub-{i}.nii.gz", seed=90 + i)
    mask = sound.parent / "CT" / "sub-5.nii.gz"
    voxels = np.random.default_rng(0).choice(np.float32(values), (8, 8, 8))
    write_volume(mask, torch.from_numpy(voxels), np.eye(4))
    rows = []
    monkeypatch.setattr(check, "save_slice_grid", lambda path, drawn, **options: rows.append(drawn))
    report = sound.parent / "report.json"
    options = ["--num-workers", "0", "--patch-size", "8", "--num-pictures", "4", "--report", str(report)]
    assert main([str(sound), *options]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert f"CT: 1 of 12 files have few distinct values, e.g. {mask}: {len(values)} distinct" in line
    assert json.loads(report.read_text())["warnings"] == [line.removeprefix("warning: ")]
    assert len(rows[0]) == 4
    (drawn,) = [label for label, _ in rows[0] if "sub-5" in label]
    assert "a label map or mask" in drawn


def test_images_are_not_taken_for_masks(sound, capsys):
    assert "warning" not in output_of(capsys, sound, "--patch-size", "8")[1]


def test_nothing_to_draw(tmp_path, capsys):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "a.nii.gz").write_bytes(b"no image")
    path = save_json(tmp_path / "set.json", "A")
    assert main([str(path), "--num-workers", "0"]) == 1
    assert "picture" not in capsys.readouterr().out
    assert list(tmp_path.glob("*.png")) == []


def test_latents_are_drawn(latents):
    assert main([str(latents), "--num-workers", "0", "--num-pictures", "2"]) == 0
    assert latents.with_name("set_check.png").is_file()


def test_what_training_refuses_or_passes_over(sound, capsys, monkeypatch):
    """A folder that can't be listed, and images of other kinds: problems, and all else is still read."""
    for name in ("a.nii", "b.mgz"):
        (sound.parent / "CT" / name).touch()
    closed = sound.parent / "MR" / "closed"
    save(closed / "x.nii.gz", 5)
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, out = output_of(capsys, sound, "--patch-size", "8", "--subject-pattern", "sub")
    assert status == 1
    assert "PROBLEM folders that cannot be entered: 1. What to do: their files are missing here and in training" in out
    assert f"    {closed}: Permission denied\n" in out
    assert "PROBLEM image files that training passes over: 1." in out
    others = f"2 image file(s) of another kind or name, e.g. {sound.parent}/CT/a.nii"
    assert f"    {sound.parent}/CT: {others}\n" in out
    assert "\n2 problems\n" in out
    assert [line.split("│")[2].strip() for line in out.splitlines() if "8×8×8" in line] == ["3", "2"]


def test_names_that_are_no_text(sound):
    """In Latin-1: shown with the bytes replaced on the screen and in the picture; the report reads back to the file."""
    latin = save(sound.parent / "CT" / os.fsdecode(b"M\xfcller.nii.gz"), 5, affine=np.diag([-1.0, 1, 1, 1]))
    save(sound.parent / "MR" / os.fsdecode(b"M\xfcller.nii.gz"), 6)
    done = run(sound, "--num-workers", "1", "--num-pictures", "20", "--report", sound.parent / "report.json")
    assert done.returncode == 1, done.stderr
    assert f"    {sound.parent}/CT/M?ller.nii.gz: its axes are LAS" in done.stdout
    assert sound.with_name("set_check.png").is_file()
    written = json.loads((sound.parent / "report.json").read_text())
    assert [found["file"] for found in written["problems"]["axes not in the order RAS"]["found"]] == [str(latin)]


@pytest.mark.parametrize(
    ("option", "message"), [("--report", "out: cannot be written"), ("--picture", "out: the picture cannot be written")]
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_places_that_cannot_be_written_are_refused_before_reading(sound, monkeypatch, option, message, is_folder):
    place = sound.parent / "file" / "out"
    place.mkdir(parents=True) if is_folder else place.parent.touch()
    monkeypatch.setattr(check, "read_all", None)  # is not called
    with pytest.raises(UserError, match=message):
        main([str(sound), "--num-workers", "0", option, str(place)])


def test_without_a_place_for_the_picture_the_check_counts(sound, capsys):
    """As in a folder that is for reading only."""
    sound.with_name("set_check.png").mkdir()
    assert main([str(sound), "--num-workers", "0", "--patch-size", "8"]) == 0
    assert f"no picture: {sound.parent}/set_check.png: the picture cannot be written" in capsys.readouterr().out
    (sound.parent / "CT" / "x.nii.gz").touch()
    assert main([str(sound), "--num-workers", "0"]) == 1
    there = sound.parent / "pictures" / "a.png"
    assert main([str(sound), "--num-workers", "0", "--picture", str(there)]) == 1
    assert [path.name for path in there.parent.iterdir()] == ["a.png"]

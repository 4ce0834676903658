"""One split for all stages: drawn by subject, kept when data come, and the same for volumes, sizes and latents."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from preprocessing_runs import add_nifti, ct
from user_errors import error_of

from common.errors import UserError
from dataset import split as split_script
from dataset.order.data_split import (
    HELD_OUT,
    SIDES,
    SPLIT_NAME,
    TRAINING,
    VALIDATION,
    Shares,
    files_of_side,
    find_split,
    parse_side,
    read_split,
    sides_of,
)
from dataset.order.draw_split import draw_split
from dataset.order.split import keep_split
from dataset.order.subjects import find_subjects
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.volume_io import write_latent
from dataset.vqgan import VQGANDataset
from train.autoencoder.batches import split_files
from train.latents import encoding

PATIENT = "^[^/]+"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def make_set(folder: Path, patients: int = 20, sizes=("8x8x8", "16x16x8"), scans: int = 2) -> Path:
    """Scans of patients in two sizes, by name and by class id; empty files, of which only the names are read."""
    for size in sizes:
        touch(folder / "CT" / size, *[f"p{p:02d}/scan{s}.nii.gz" for p in range(patients) for s in range(scans)])
    places = [f"CT/{size}" for size in sizes]
    (folder / "PatchVolume_data.json").write_text(json.dumps({"CT": places}))
    (folder / "Singleres_dataset.json").write_text(json.dumps({"0": places}))
    return folder / "PatchVolume_data.json"


def draw(path: Path, *options: object) -> None:
    split_script.main([str(path), *map(str, options)])


def sides(path: Path) -> dict[str, str]:
    return json.loads(path.with_name(SPLIT_NAME).read_text())["subjects"]


def test_names_of_any_bytes_are_drawn_and_read_back(tmp_path, capsys):
    """In Latin-1, with a character that a terminal obeys, with a new line: the split knows the files by them."""
    names = [os.fsdecode(name) for name in (b"M\xfcller.nii.gz", b"\x1b[31mred.nii.gz", b"a\nb.nii.gz", b"c.nii.gz")]
    touch(tmp_path / os.fsdecode(b"Kn\xf6chel"), *names)
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"A": os.fsdecode(b"Kn\xf6chel")}))
    draw(path, "--validation", 0.25, "--held-out", 0.25)
    before = sides(path)
    assert set(before) == {f"{os.fsdecode(b'Kn')}\udcf6chel/{name.removesuffix('.nii.gz')}" for name in names}
    draw(path)
    assert sides(path) == before
    assert {file.name for of in find_split(path).by_side(path).values() for file in of["A"]} == set(names)


def count(path: Path) -> dict[str, int]:
    return {side: list(sides(path).values()).count(side) for side in SIDES}


@pytest.mark.parametrize(
    ("validation", "held_out", "expected"),
    [(0.1, 0.1, (16, 2, 2)), (0.25, 0.5, (5, 5, 10)), (0, 0.1, (18, 0, 2)), (0.2, 0, (16, 4, 0)), (0, 0, (20, 0, 0))],
)
def test_every_patient_is_on_one_side(tmp_path, validation, held_out, expected):
    path = make_set(tmp_path)
    draw(path, "--subject-pattern", PATIENT, "--validation", validation, "--held-out", held_out)
    assert tuple(count(path).values()) == expected
    assert set(sides(path)) == {f"p{p:02d}" for p in range(20)}


def test_without_a_pattern_every_file_is_a_subject_in_all_its_sizes(tmp_path):
    path = make_set(tmp_path, patients=10)
    draw(path)
    assert set(sides(path)) == {f"CT/p{p:02d}/scan{s}" for p in range(10) for s in (0, 1)}
    held_out = [file.relative_to(tmp_path / "CT") for file in files_of_side(path, HELD_OUT)["CT"]]
    assert {file.parts[1:] for file in held_out if file.parts[0] == "8x8x8"} == {
        file.parts[1:] for file in held_out if file.parts[0] == "16x16x8"
    }
    assert len(held_out) == 2 * 2


def test_new_files_go_to_their_subject_and_new_subjects_leave_the_others(tmp_path):
    path = make_set(tmp_path)
    draw(path, "--subject-pattern", PATIENT)
    before = sides(path)
    make_set(tmp_path, patients=40, scans=3)
    new = tmp_path / "CT" / "8x8x8" / "p39" / "scan2.nii.gz"
    with pytest.raises(
        UserError, match="p39 is not in .*split.json: give it a side.*dataset/split.py with the dataset JSON"
    ):
        find_split(path).side_of(new, tmp_path / "CT" / "8x8x8")
    draw(path)  # with the values that it has
    after = sides(path)
    assert {subject: after[subject] for subject in before} == before
    assert tuple(count(path).values()) == (32, 4, 4)
    for side in SIDES:
        assert {file.parts[-2] for file in files_of_side(path, side)["CT"]} == {
            s for s, of in after.items() if of == side
        }
    (tmp_path / "CT" / "8x8x8" / "p00").rename(tmp_path / "gone")
    draw(path)
    assert sides(path) == after


@pytest.mark.parametrize(
    "options", [("--subject-pattern", "^p"), ("--held-out", "0.3"), ("--validation", "0"), ("--seed", "1")]
)
def test_other_values_are_refused_unless_it_is_drawn_anew(tmp_path, capsys, options):
    path = make_set(tmp_path)
    draw(path, "--subject-pattern", PATIENT)
    before = sides(path)
    with pytest.raises(UserError, match="split.json: was drawn with .*leave it out, or draw anew .*--anew"):
        draw(path, *options)
    assert sides(path) == before
    draw(path, *options, "--anew")
    assert sides(path) != before
    kept = json.loads(path.with_name(SPLIT_NAME).read_text())
    assert options[0] == "--subject-pattern" or kept["subject_pattern"] == PATIENT


@pytest.mark.parametrize(
    ("validation", "held_out"), [(0.5, 0.5), (0.9, 0.2), (-0.1, 0.1)]
)  # fmt: skip
def test_shares_that_leave_nothing(tmp_path, validation, held_out):
    with pytest.raises(UserError, match="shares from 0 on are needed that leave something to train on"):
        draw_split(make_set(tmp_path), Shares(None, validation, held_out, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "not a JSON file"),
        ("[]", "a JSON object .* is needed"),
        ("no seed", "it has no seed"),
        ("no name", "dataset is ''"),
        ("text", "validation is '0.1'"),
        ('{"files": {}}', "it has no dataset, files_sha256"),
        ("other side", "a side 'test', expected training, validation, held_out"),
    ],
)
def test_files_that_are_no_split(tmp_path, content, message):
    path = make_set(tmp_path)
    draw(path)
    changed = {
        "other side": ('"training"', '"test"'),
        "no seed": ('"seed"', '"sead"'),
        "no name": ('"PatchVolume_data.json"', '""'),
        "text": ('"validation": 0.1', '"validation": "0.1"'),
    }
    text = path.with_name(SPLIT_NAME).read_text()
    path.with_name(SPLIT_NAME).write_text(text.replace(*changed[content]) if content in changed else content)
    with pytest.raises(UserError, match=message):
        find_split(path)
    draw(path, "--anew")
    assert find_split(path) is not None


# What keeps to it


@pytest.fixture
def real(tmp_path) -> Path:
    """Volumes of eight patients, with a split of two held out and two for validation."""
    for p in range(8):
        add_nifti(tmp_path / "CT" / "12x10x8" / f"p{p}" / "scan.nii.gz", ct(p) / 1200)
    (tmp_path / "PatchVolume_data.json").write_text('{"CT": "CT/12x10x8"}')
    (tmp_path / "Singleres_dataset.json").write_text('{"0": "CT/12x10x8"}')
    draw(tmp_path / "PatchVolume_data.json", "--subject-pattern", PATIENT, "--validation", 0.25, "--held-out", 0.25)
    return tmp_path


def patients(files) -> set[str]:
    return {Path(file).parent.name for file in files}


def of_side(folder: Path, side: str) -> set[str]:
    return {subject for subject, found in sides(folder / "PatchVolume_data.json").items() if found == side}


def test_autoencoder_data_keep_to_it(real):
    path = real / "PatchVolume_data.json"
    assert len(of_side(real, HELD_OUT)) == len(of_side(real, VALIDATION)) == 2
    for split, side in (("train", TRAINING), ("val", VALIDATION)):
        assert patients(VQGANDataset(path, split=split, check=False).files) == of_side(real, side)
    own = sides_of(path, "none", 0.5, 0, None)
    assert patients([*own.training["CT"], *own.validation["CT"]]) == {f"p{p}" for p in range(8)}
    assert (own.source, sides_of(path, None, 0.5, 0, PATIENT).source) == (None, real / SPLIT_NAME)
    assert "was drawn with '^[^/]+': leave it out, draw the split anew" in error_of(sides_of, path, None, 0.1, 0, "^p")


@pytest.mark.parametrize("was_own", [True, False])
def test_a_run_that_drew_its_own_split_goes_on_with_it(real, was_own):
    json_file, root = real / "PatchVolume_data.json", real / "run"
    options = {"val_fraction": 0.1, "split_seed": 0, "subject_pattern": None}
    keep_split(root, json_file, sides_of(json_file, "none" if was_own else None, *options.values()), options, False)
    data = {"root_dir": str(json_file), "split": None, **options}
    cfg = OmegaConf.create({"dataset": data, "model": {"default_root_dir": str(root)}})
    assert split_files(cfg).source == real / SPLIT_NAME  # no checkpoint: it begins only now
    touch(root / "checkpoints", "last.ckpt")
    split = split_files(cfg)
    assert split.source == (None if was_own else real / SPLIT_NAME)
    keep_split(root, json_file, split, options, True)  # else a UserError


def test_no_validation_is_none(real):
    draw(real / "PatchVolume_data.json", "--anew", "--validation", 0)
    assert len(VQGANDataset(real / "PatchVolume_data.json", split="val", check=False)) == 0


def test_latents_carry_it_wherever_they_go(real, tmp_path_factory):
    volumes = Singleres_dataset(real / "Singleres_dataset.json", generate_latents=True, check=False)
    assert patients(volumes.files) == {f"p{p}" for p in range(8)}  # all are encoded
    folder = real / "CT" / "12x10x8_latents"
    for path in volumes.latent_paths:
        write_latent(path, np.zeros((2, 8, 8, 8), np.float32))
    encoding.copy_split(real / "Singleres_dataset.json", volumes, encoding.get_logger(0))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder.rename(elsewhere / "chests_latents")
    (elsewhere / "latents.json").write_text('{"0": "chests_latents"}')
    split = find_split(elsewhere / "latents.json")
    latents = Singleres_dataset(elsewhere / "latents.json", (8, 8, 8), split=split)
    assert patients(latents.files) == of_side(real, TRAINING)

    touch(elsewhere / "more_latents", "p0/scan.nii.gz")
    (elsewhere / "latents.json").write_text('{"0": ["chests_latents", "more_latents"]}')
    assert "more_latents: the folders of" in error_of(find_split, elsewhere / "latents.json")


def test_sets_of_one_side(real):
    json_file = real / "PatchVolume_data.json"
    for text in (f"{real / SPLIT_NAME}:held_out", f"{json_file}:held_out", f"{real}/Singleres_dataset.json:held_out"):
        path, side = parse_side(text)
        (files,) = files_of_side(path, side).values()
        assert patients(files) == of_side(real, HELD_OUT)
    assert parse_side("a:b/held_out") == ("a:b/held_out", None)
    (real / SPLIT_NAME).rename(real / "old.json")
    assert "has no split.json, so that held_out is nothing" in error_of(files_of_side, json_file, HELD_OUT)
    assert read_split(real / "old.json").dataset == "PatchVolume_data.json"


def test_a_json_elsewhere_keeps_to_the_split_of_its_folders(real, tmp_path_factory):
    place = tmp_path_factory.mktemp("config")
    (place / "volumes.json").write_text(json.dumps({"mine": str(real / "CT" / "12x10x8")}))
    assert patients(VQGANDataset(place / "volumes.json", check=False).files) == of_side(real, TRAINING)
    touch(place / "other", "p9/scan.nii.gz")
    (place / "volumes.json").write_text(json.dumps({"mine": str(real / "CT" / "12x10x8"), "other": "other"}))
    assert "other: the folders of" in error_of(find_split, place / "volumes.json")


def test_latents_without_a_pattern_are_known_under_any_name(real, tmp_path_factory):
    draw(real / "PatchVolume_data.json", "--anew", "--subject-pattern", "(.+)")
    record = json.loads((real / SPLIT_NAME).read_text()) | {"subject_pattern": None}
    record["subjects"] = {f"CT/{name.removesuffix('.nii.gz')}": side for name, side in record["subjects"].items()}
    (real / SPLIT_NAME).write_text(json.dumps(record))
    place = tmp_path_factory.mktemp("fast")
    find_split(real / "PatchVolume_data.json").write(place / "chests", "CT")
    touch(place / "chests", *[f"p{p}/scan.nii.gz" for p in range(8)])
    (place / "latents.json").write_text('{"0": "chests"}')
    for wanted in (None, str(real / SPLIT_NAME)):  # a run that goes on names its split
        found = find_split(place / "latents.json", wanted).select(place / "chests", TRAINING)
        assert {f"CT/{path.parent.name}/scan" for path in found} == of_side(real, TRAINING)


def test_a_class_keeps_someone_to_train_on(tmp_path):
    path = make_set(tmp_path, patients=2, sizes=("8x8x8",))
    draw(path, "--subject-pattern", PATIENT, "--validation", 0.5, "--held-out", 0)
    (both,) = [subject for subject, side in sides(path).items() if side == VALIDATION]
    touch(tmp_path / "MR", f"{both}/a.nii.gz", "p77/a.nii.gz")
    path.write_text(json.dumps({"CT": "CT/8x8x8", "MR": "MR"}))
    split = draw_split(path, Shares(PATIENT, 0.3, 0.3, 0), find_split(path))
    assert split.subjects["p77"] == TRAINING


def test_nobody_to_train_on(real):
    record = json.loads((real / SPLIT_NAME).read_text())
    record["subjects"] = dict.fromkeys(record["subjects"], HELD_OUT)
    (real / SPLIT_NAME).write_text(json.dumps(record))
    for data in (VQGANDataset, lambda path: Singleres_dataset(path, split=find_split(path))):
        assert "no subject of" in error_of(data, real / "Singleres_dataset.json")


@pytest.mark.parametrize("training", ["PatchVolume_data.json", "CT", "CT/12x10x8", "split.json:validation"])
def test_a_subject_in_two_sets_is_refused(real, training):
    side = VALIDATION if "validation" in training else HELD_OUT
    files = [path for path in (real / "CT").rglob("*.nii.gz") if patients([path]) <= of_side(real, side)]
    sets = {
        "real": (f"{real / SPLIT_NAME}:{side}", files_of_side(real / SPLIT_NAME, side)["CT"]),
        "training": (str(real / training), files),
    }
    assert f"training: {files[0]} is of subject" in error_of(find_subjects, sets, None)
    sets["training"] = (str(real / training), files_of_side(real / SPLIT_NAME, TRAINING)["CT"])
    find_subjects(sets, None)


@pytest.mark.parametrize("place", ["JSON elsewhere", "folder below", "record of a run above"])
def test_the_split_of_one_set_tells_the_subjects_of_both(real, tmp_path_factory, place):
    held_out = files_of_side(real / SPLIT_NAME, HELD_OUT)["CT"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    text = held_out[0].parent if place == "folder below" else elsewhere / "own.json"
    (elsewhere / "own.json").write_text(json.dumps({"mine": str(held_out[0].parent)}))
    if place == "record of a run above":
        text = elsewhere / "volumes"
        text.mkdir()
        (elsewhere / SPLIT_NAME).write_text('{"files": {}}')
    sets = {"real": (f"{real / SPLIT_NAME}:held_out", held_out), "training": (str(text), held_out[:1])}
    assert f"training: {held_out[0]} is of subject" in error_of(find_subjects, sets, None)

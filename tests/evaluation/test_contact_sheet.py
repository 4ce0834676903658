"""The picture of a folder of generated volumes: what it shows, in which grey values, and what it leaves out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from generation_models import CUBE, config, prepared, row, save_models, voxels

from dataset.preparation.manifest import Intensity
from evaluation.generation import contact_sheet
from evaluation.generation.run import generate


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def drawn(monkeypatch) -> list:
    """What is given to the drawing: (sheet, rows, title) of each sheet."""
    seen = []
    draw = contact_sheet.save_slice_grid

    def save(path, rows, **options):
        seen.append((path, rows, options["title"]))
        return draw(path, rows, **options)

    monkeypatch.setattr(contact_sheet, "save_slice_grid", save)
    return seen


def test_contact_sheet_shows_at_most_eight_of_a_kind(models, tmp_path, monkeypatch):
    seen = drawn(monkeypatch)
    generate(config(models, tmp_path, [row(0, "Chest", CUBE)], num_samples=10, batch_size=10, ddim_steps=1))
    generate(config(models, tmp_path, [row(1, "Head", CUBE, spacing=(1.0, 1.0, 2.5))], ddim_steps=1))
    (sheet, rows, _), (again, more, title) = seen
    assert sheet == again == tmp_path / "seed_0" / "contact_sheet.png"
    assert [label for label, _ in rows] == ["Chest_32x32x32_0\n(8 of 10)"] + [
        f"Chest_32x32x32_{i}" for i in range(1, 8)
    ]
    assert [label for label, _ in more][8:] == ["Head_32x32x32"]
    assert title == "seed_0: 9 of 11 volumes"
    assert [picture.shape for picture in more[8][1]] == [(32, 32), (80, 32), (80, 32)]  # z is 2.5 times as long
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_contact_sheet_is_grey_over_the_range_of_each_class(models, tmp_path, monkeypatch):
    seen = drawn(monkeypatch)
    plain = [voxels(path) for path in generate(config(models, tmp_path / "a"))]
    data = prepared(
        tmp_path, Chest=[Intensity("window", -1000.0, 1000.0, "HU")], Head=[Intensity("percentiles", 3, 70)]
    )
    generate(config(models, tmp_path / "b", denormalize=str(data)))
    for (_, pictures), (_, in_units) in zip(seen[0][1], seen[1][1], strict=True):
        for picture, other in zip(pictures, in_units, strict=True):
            assert np.allclose(picture, other, atol=1e-4)
    assert np.array_equal(seen[0][1][0][1][1], plain[0][0, :, :, 16].numpy()[::-1])  # coronal, head up


def test_contact_sheet_is_drawn_when_a_volume_is_newer(models, tmp_path, monkeypatch):
    seen = drawn(monkeypatch)
    cfg = config(models, tmp_path)
    first, _ = generate(cfg)
    generate(cfg)
    assert len(seen) == 1
    os.utime(first)
    generate(cfg)
    assert len(seen) == 2
    (tmp_path / "seed_0" / "contact_sheet.png").unlink()
    generate(cfg)
    assert len(seen) == 3


@pytest.mark.parametrize("denormalize", [False, True])
@pytest.mark.parametrize("output_dtype", ["float32", "int16"])
def test_contact_sheet_of_new_volumes_is_that_of_their_files(models, tmp_path, monkeypatch, output_dtype, denormalize):
    """The slices are those in memory. HU are whole numbers in int16, percentiles are [0, 1]."""
    seen = drawn(monkeypatch)
    classes = [row(0, "Chest", CUBE, spacing=(0.7, 1.3, 2.1)), row(1, "Head", CUBE)]
    values = {"output_dtype": output_dtype, "ddim_steps": 1, "num_samples": 2}
    if denormalize:
        kinds = {"Chest": [Intensity("window", -150.0, 250.0, "HU")], "Head": [Intensity("percentiles", 3, 70)]}
        values["denormalize"] = str(prepared(tmp_path, **kinds))
    read = contact_sheet.read_volume
    monkeypatch.setattr(contact_sheet, "read_volume", lambda path: pytest.fail("reads what it has just written"))
    generate(config(models, tmp_path / "out", classes, **values))
    sheet = tmp_path / "out" / "seed_0" / "contact_sheet.png"
    of_memory = sheet.read_bytes()
    sheet.unlink()
    monkeypatch.setattr(contact_sheet, "read_volume", read)
    generate(config(models, tmp_path / "out", classes, **values))
    assert sheet.read_bytes() == of_memory
    (_, rows, _), (_, again, _) = seen
    for (label, pictures), (other, of_files) in zip(rows, again, strict=True):
        assert label == other
        assert all(map(np.array_equal, pictures, of_files))


@pytest.mark.parametrize(
    "changed",
    [
        {"voxels": 3},
        {"class_id": "a"},
        {"sample": None},
        {"class_name": [1]},
        {"intensity": 5},
        {"intensity": {"low": 2}},
    ]
    + [{"intensity": {"low": 5, "high": 1}}, {"intensity": {"low": 5, "high": 6}}, None],
)
def test_contact_sheet_leaves_out_what_is_not_sound(models, tmp_path, capsys, changed):
    """Records of another making, values beyond those of the record, and (None) a damaged volume."""
    chest = [row(0, "Chest", CUBE)]
    generate(config(models, tmp_path, chest))
    folder = tmp_path / "seed_0"
    content = (folder / "Chest_32x32x32.nii.gz").read_bytes()
    (folder / "Z.nii.gz").write_bytes(content if changed is not None else content[:-10])
    record = json.loads((folder / "Chest_32x32x32.json").read_text())
    (folder / "Z.json").write_text(json.dumps({**record, **(changed or {})}))
    (folder / "contact_sheet.png").unlink()
    generate(config(models, tmp_path, chest))
    assert (folder / "contact_sheet.png").is_file()
    has_sound_record = changed in (None, {"intensity": {"low": 5, "high": 6}})
    assert ("contact_sheet.png leaves out a volume: " in capsys.readouterr().err) == has_sound_record


@pytest.mark.parametrize("name", ["$_$", "a$b$", "Ünï cødé"])
def test_names_are_no_formulas(models, tmp_path, name):
    (path,) = generate(config(models, tmp_path, [row(0, name, CUBE)]))
    assert path.with_name("contact_sheet.png").is_file()

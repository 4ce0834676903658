"""The preprocessing script: from a folder of mixed files to volumes, manifest and dataset JSONs, and going on again."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from nifti_files import write_nifti
from preprocessing_runs import CT, SCRIPT, add_nifti, ct, make_raw, run, times

from config.loading import CONFIG_FOLDER, load_config
from config.schema.data import PreprocessConfig
from config.schema.diffusion import GenerationConfig
from dataset.preparation import prepared_folder
from dataset.preparation.manifest import MANIFEST_NAME, read_manifest
from dataset.preparation.preprocessing import resolve_target
from dataset.preparation.sources import find_sources
from dataset.volumes.index import read_class_json, read_dataset_json
from dataset.volumes.volume_io import nifti_to_tensor, read_model_volume, read_volume


@pytest.fixture
def raw(tmp_path) -> Path:
    return make_raw(tmp_path / "raw")


def in_window(seed: int) -> np.ndarray:
    return np.clip(ct(seed), -1000, 1000)


# What it makes


def test_mixed_folder(raw, capsys):
    assert run(raw, *CT) == 0
    folder = raw.parent / "data" / "Thorax" / "native"
    names = sorted(times(folder))
    assert names[:2] == ["p1/a.nii.gz", "p2/a.nii.gz"]
    assert names[2].startswith("p3/dicom/series004_")
    assert len(names) == 3
    for name, hu in zip(names[:2], (in_window(0), in_window(1)), strict=True):
        volume = read_model_volume(folder / name, (-1, 1))
        assert volume.data.shape == (1, 8, 12, 12)  # (z, x, y), padded to multiples of 4
        np.testing.assert_allclose(volume.data[0, :, :, 1:11].numpy(), nifti_to_tensor(hu) / 1000, atol=1e-6)
    dicom = read_volume(folder / names[2])
    turned = in_window(2).transpose(1, 0, 2)[::-1, ::-1] / 1000  # (columns, rows, slices), LPS to RAS
    np.testing.assert_allclose(dicom.data[0, :, 1:11, :].numpy(), nifti_to_tensor(turned), atol=1e-6)
    said = capsys.readouterr().err
    for words in ("a localiser", "modality MR", "prepared"):
        assert words in said


def test_dataset_jsons_are_those_of_both_training_parts(raw):
    assert run(raw, *CT) == 0
    assert run(raw, "--name", "Abdomen", "--modality", "MR", "--multiple", 4, "--select", "t2") == 0
    data = raw.parent / "data"
    assert {name: len(files) for name, files in read_dataset_json(data / "PatchVolume_data.json").items()} == {
        "Abdomen": 1, "Thorax": 3,
    }  # fmt: skip
    classes = read_class_json(data / "Singleres_dataset.json")
    assert {class_id: len(files) for class_id, files in classes.items()} == {0: 3, 1: 1}
    assert json.loads((data / "Singleres_latents.json").read_text()) == {
        "0": "Thorax/native_latents", "1": "Abdomen/native_latents",
    }  # fmt: skip


def test_manifest_says_what_was_done(raw):
    assert run(raw, *CT, "--spacing", 1, 1, 1) == 0
    entries = read_manifest(raw.parent / "data" / "Thorax" / "native")
    entry = entries["p1/a.nii.gz"]
    low, high = ct(0).min(), ct(0).max()
    assert entry["original"] == {
        "size": [12, 10, 8], "spacing_mm": [1, 1, 2], "orientation": "RAS", "range": [low, high],
    }  # fmt: skip
    assert (entry["size"], entry["spacing_mm"]) == ([12, 12, 16], [1, 1, 1])
    assert entry["intensity"] == {"method": "window", "low": -1000, "high": 1000, "unit": "HU"}
    assert entry["steps"][1] == "resampled from 1 x 1 x 2 mm to 1 x 1 x 1 mm (linear)"
    assert entry["source"] == "p1/a"
    assert entry["input"] == str(raw)
    assert len(entry["sha256"]) == 64
    assert set(entry["versions"]) == {"numpy", "nibabel", "pydicom", "dcm2niix", "SimpleITK", "torchio"}
    series = next(e for file, e in entries.items() if file.startswith("p3"))
    assert series["num_files"] == 8
    assert series["steps"][1] == "reoriented LPS to RAS"


def test_mr_is_scaled_by_percentiles(raw):
    assert run(raw, "--name", "MR", "--modality", "MR", "--select", "p1|t2") == 0
    entries = read_manifest(raw.parent / "data" / "MR" / "native")
    assert len(entries) == 2
    low, high = np.percentile(ct(0), (0.5, 99.5))
    assert entries["p1/a.nii.gz"]["intensity"] == {
        "method": "percentiles", "low": pytest.approx(low), "high": pytest.approx(high), "unit": None,
    }  # fmt: skip


def test_dry_run_lists_and_writes_nothing(raw, capsys):
    before = sorted(raw.parent.rglob("*"))
    assert run(raw, "--dry-run", "--modality", "CT") == 0
    assert sorted(raw.parent.rglob("*")) == before
    said = " ".join(capsys.readouterr().out.split())
    for words in ("p1/a", "Thorax 2.0", "a localiser", "modality MR", "1 other files"):
        assert words in said


def test_the_command_itself_with_processes(raw):
    words = ["--input", raw, "--output-dir", raw.parent / "data", "--num-workers", "2", *CT]
    done = subprocess.run([*SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run(raw, *CT, output="again") == 0
    for name in times(raw.parent / "data" / "Thorax" / "native"):
        one, two = (raw.parent / output / "Thorax" / "native" / name for output in ("data", "again"))
        assert one.read_bytes() == two.read_bytes()


# Going on


def test_what_is_done_is_kept(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    before, manifest = times(folder), (folder / MANIFEST_NAME).read_text()
    add_nifti(raw / "p4" / "a.nii.gz", ct(3))
    assert run(raw, *CT) == 0
    after = times(folder)
    assert set(after) - set(before) == {"p4/a.nii.gz"}
    assert {name: after[name] for name in before} == before
    assert set(manifest.splitlines()) < set((folder / MANIFEST_NAME).read_text().splitlines())


def test_touched_sources_are_kept_and_changed_ones_made_again(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    before = times(folder)
    (raw / "p1" / "a.nii.gz").touch()
    add_nifti(raw / "p2" / "a.nii.gz", ct(7))
    assert run(raw, *CT) == 0
    changed = {name for name, when in times(folder).items() if when != before[name]}
    assert changed == {"p2/a.nii.gz"}
    stat = (raw / "p1" / "a.nii.gz").stat()
    assert read_manifest(folder)["p1/a.nii.gz"]["mtime_ns"] == stat.st_mtime_ns


def test_other_options_make_everything_again(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    before = times(folder)
    assert run(raw, *CT, "--window", -150, 250) == 0
    assert all(when != before[name] for name, when in times(folder).items())
    assert {entry["intensity"]["high"] for entry in read_manifest(folder).values()} == {250}


def test_damaged_results_are_made_again(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    whole = {name: (folder / name).read_bytes() for name in times(folder)}
    one, two, _ = whole
    (folder / one).write_bytes(whole[one][:-10])
    (folder / two).unlink()
    assert run(raw, *CT) == 0
    assert {name: (folder / name).read_bytes() for name in times(folder)} == whole


def test_entries_of_volumes_that_are_gone_go(raw):
    folder = raw.parent / "data" / "Thorax" / "native"
    assert run(raw, *CT) == 0
    (folder / "p2" / "a.nii.gz").unlink()
    assert run(raw, *CT, "--select", "P1|p3") == 0
    assert set(read_manifest(folder)) == set(times(folder))
    assert len(times(folder)) == 2


def test_a_killed_run_goes_on(raw):
    for i in range(12):
        add_nifti(raw / "more" / f"{i:02d}.nii.gz", ct(10 + i, (64, 64, 64)))
    folder = raw.parent / "data" / "Thorax" / "native"
    words = ["--input", raw, "--output-dir", raw.parent / "data", "--num-workers", "1", *CT]
    process = subprocess.Popen([*SCRIPT, *map(str, words)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_manifest(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_manifest(folder)
    assert 3 <= len(done) < 15
    with (folder / MANIFEST_NAME).open("a") as file:
        file.write('{"file": "half')
    (folder / ".left.nii.gz.1.tmp").write_bytes(b"half")
    before = times(folder)
    assert run(raw, *CT) == 0
    after = times(folder)
    assert len(after) == 15
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    assert set(read_manifest(folder)) == set(after)
    assert not list(folder.rglob("*.tmp"))


def test_a_run_killed_twice_loses_nothing(raw):
    assert run(raw, *CT, "--select", "p1") == 0
    folder = raw.parent / "data" / "Thorax" / "native"
    with (folder / MANIFEST_NAME).open("a") as file:
        file.write('{"file": "half')
    recipe = resolve_target(load_config(PreprocessConfig, None, ["name=Thorax", "modality=CT", "multiple=4"])).recipe
    prepared = prepared_folder.PreparedFolder(folder, raw, recipe, folder)
    outcomes = prepared.prepare(prepared.plan(find_sources(raw).sources[:2]), 0)
    next(outcomes)
    outcomes.close()  # killed after the first volume
    assert sorted(read_manifest(folder)) == ["p1/a.nii.gz", "p2/a.nii.gz"]


def test_volumes_that_are_not_wanted_any_more_are_named(raw, capsys):
    assert run(raw, *CT) == 0
    capsys.readouterr()
    assert run(raw, *CT, "--select", "p1") == 0
    assert "2 volume(s) of earlier runs come from sources" in capsys.readouterr().err


def test_options_without_effect_make_nothing_again(raw):
    assert run(raw, *CT, "--size", 12, 12, 12) == 0
    before = times(raw.parent / "data")
    assert run(raw, "--name", "Thorax", "--modality", "CT", "--multiple", 8, "--size", 12, 12, 12) == 0
    assert times(raw.parent / "data") == before


def test_dry_run_says_what_headers_rule_out(raw, capsys):
    write_nifti(raw / "odd" / "codes.nii.gz", codes=(0, 0))
    write_nifti(raw / "odd" / "unit.nii.gz", header={"xyzt_units": 5})
    assert run(raw, "--dry-run", "--modality", "CT", "--select", "odd") == 0
    said = capsys.readouterr().out
    assert "no orientation" in said
    assert said.count("yes") == 1


def test_dry_run_says_what_would_become_the_same_volume(raw, capsys):
    write_nifti(raw / "p1" / "a.nii")
    assert run(raw, "--dry-run", "--modality", "CT", "--select", "p1|p2") == 0
    said = capsys.readouterr().out
    assert said.count("yes") == 2
    assert "no: would become the same volume as" in said


def test_volumes_of_other_inputs_stay(raw):
    assert run(raw, *CT) == 0
    other = raw.parent / "second"
    add_nifti(other / "x.nii.gz", ct(5))
    assert run(other, *CT) == 0
    folder = raw.parent / "data" / "Thorax" / "native"
    assert len(times(folder)) == len(read_manifest(folder)) == 4


# Presets


def test_presets_are_the_classes_of_generation():
    """Every size of every class, in voxels as generation names its files."""
    classes = load_config(GenerationConfig, CONFIG_FOLDER / "generation_8x.yaml").classes
    for row in classes:
        for i, (grid, spacing) in enumerate(zip(row.grids, row.spacings_mm, strict=True)):
            z, x, y = (8 * extent for extent in grid)
            for preset in [f"{row.name}_{x}x{y}x{z}", *([row.name] if i == 0 else [])]:
                cfg = load_config(PreprocessConfig, CONFIG_FOLDER / "preprocess.yaml", [f"preset={preset}"])
                target = resolve_target(cfg)
                assert (target.name, target.class_id, target.modality) == (row.name, row.id, row.name[:2])
                assert target.recipe.size == (x, y, z)
                assert target.recipe.spacing_mm == tuple(spacing)
                is_ct = row.name.startswith("CT")
                assert target.recipe.window == ((-1000, 1000) if is_ct else None)
                assert target.recipe.percentiles == (None if is_ct else (0.5, 99.5))
                assert target.recipe.unit == ("HU" if is_ct else None)


def test_presets_of_the_paper():
    overrides = ["preset=CTLegs_256x256x512", "num_workers=0"]
    recipe = resolve_target(load_config(PreprocessConfig, CONFIG_FOLDER / "preprocess.yaml", overrides)).recipe
    assert (recipe.size, recipe.spacing_mm) == ((256, 256, 512), (1.25, 1.25, 1.25))
    recipe = resolve_target(load_config(PreprocessConfig, CONFIG_FOLDER / "preprocess.yaml", ["preset=MRKnee"])).recipe
    assert (recipe.size, recipe.spacing_mm, recipe.percentiles) == ((320, 320, 64), (1, 1, 1), (0.5, 99.5))


def test_what_a_preset_sets_can_be_changed():
    overrides = ["preset=CTLegs", "spacing=[2,2,2]", "size=[64,64,64]", "percentiles=[1,99]", "name=Legs"]
    target = resolve_target(load_config(PreprocessConfig, CONFIG_FOLDER / "preprocess.yaml", overrides))
    assert (target.name, target.class_id, target.modality) == ("Legs", None, "CT")
    recipe = target.recipe
    assert (recipe.window, recipe.percentiles, recipe.unit) == (None, (1, 99), None)
    assert (recipe.spacing_mm, recipe.size) == ((2, 2, 2), (64, 64, 64))


def test_classes_of_ones_own(raw, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "defaults: [preprocess, _self_]\n"
        "classes: [{id: 5, name: Hip, modality: CT, grids: [[8, 16, 8]], spacings_mm: [[1, 1, 2]]}]\n"
    )
    assert run(raw, "--config", config, "--preset", "Hip", "--select", "p1") == 0
    (volume,) = (raw.parent / "data" / "Hip").rglob("*.nii.gz")
    assert read_volume(volume).data.shape == (1, 64, 128, 64)
    assert json.loads((raw.parent / "data" / "Singleres_dataset.json").read_text()) == {"5": "Hip/128x64x64"}


def test_exclude_beside_select(tmp_path, capsys):
    raw = tmp_path / "raw"
    for name in ("p1/FLAIR", "p1/regtoFLAIR_T1", "p2/FLAIR", "p2/T2"):
        add_nifti(raw / f"{name}.nii.gz", ct(len(name)))
    assert run(raw, *CT, "--select", "flair", "--exclude", "REGTO") == 0
    found = sorted(
        path.relative_to(tmp_path / "data" / "Thorax").as_posix() for path in tmp_path.rglob("Thorax/*/*/*.gz")
    )
    assert found == ["native/p1/FLAIR.nii.gz", "native/p2/FLAIR.nii.gz"]
    assert "excluded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "hint"),
    [((), "without a size"), ((64, 64, 65), "size 64x64x65: not all are multiples of 64"), ((64, 64, 128), None)],
)
def test_sizes_that_no_diffusion_model_takes_are_hinted_at(tmp_path, capsys, size, hint):
    add_nifti(tmp_path / "raw" / "scan.nii.gz", ct())
    assert run(tmp_path / "raw", *CT, *(["--size", *size] if size else [])) == 0
    said = capsys.readouterr().err
    assert (hint is None) == ("good for the autoencoder" not in said)
    assert hint is None or hint in said


def test_what_is_no_image_is_left_out_by_name(tmp_path, capsys):
    raw = tmp_path / "raw"
    add_nifti(raw / "scan.nii.gz", ct())
    add_nifti(raw / "scan_seg.nii.gz", (ct() > -500) * 3.0)
    (raw / "more.zip").write_bytes(b"PK")
    assert run(raw, *CT) == 0
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "left out 1 2 distinct whole values: a label map or mask, not an image, e.g. scan_seg" in shown
    assert "left out 1 archive: unpack it if it holds volumes" in shown
    assert [path.name for path in sorted((tmp_path / "data").rglob("*.nii.gz"))] == ["scan.nii.gz"]

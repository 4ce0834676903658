"""The script that measures generated volumes, on small sets: results, resuming, processes, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import blob, write_json, write_record, write_set

from config.errors import UserError
from config.script import run_script
from dataset.geometry import affine_from_spacing
from dataset.volume_io import read_volume, write_volume
from evaluation import feature_extraction, pair_similarity
from evaluation.feature_networks import build_networks
from evaluation.generation_metrics import main
from evaluation.metrics.distances import frechet_distance
from evaluation.metrics.reconstruction import ms_ssim
from evaluation.results import read_results

ROOT = Path(__file__).parents[1]
FAST = "--num-workers 0 --device cpu --num-resamples 20 --num-halvings 2 --slices 2 --num-pairs 6".split()


@pytest.fixture
def sets(tmp_path):
    """Folders real and generated, as metrics_config expects, and training."""
    write_set(tmp_path / "real", range(8))
    write_set(tmp_path / "generated", range(20, 26))
    write_set(tmp_path / "training", range(40, 47))
    return tmp_path


def run(tmp_path: Path, *more: str) -> dict:
    words = ["--real", tmp_path / "real", "--generated", tmp_path / "generated", "--output-dir", tmp_path / "out"]
    main([*map(str, words), *FAST, *map(str, more)])
    return read_results(tmp_path / "out" / "generation.json")


def value_of(results: dict, metric: str, network: str | None = None) -> float:
    (value,) = {f["value"] for f in results["figures"] if f["metric"] == metric and network in (None, f["network"])}
    return value


def test_everything_is_measured(sets):
    results = run(sets, "--training", sets / "training", "--neighbours", "3")
    metrics = [(f["metric"], f["network"]) for f in results["figures"]]
    of_volumes = ["FID-3D", "MMD", "precision", "recall", "density", "coverage"]
    of_slices = ["FID-2.5D", "FID-2.5D axial", "FID-2.5D coronal", "FID-2.5D sagittal"]
    pairs = ["MS-SSIM of generated pairs", "MS-SSIM of real pairs", "diversity gap"]
    memorisation = ["nearer than held-out", "nearest distance ratio"]
    assert sorted(metrics) == sorted(
        [(m, "random_3d") for m in of_volumes + memorisation]
        + [(m, "random_2d") for m in of_slices]
        + [(m, "") for m in pairs]
    )
    for figure in results["figures"]:
        assert figure["group"] == "real"
        low, high = figure["interval"]
        assert low <= figure["value"] <= high or figure["metric"] in ("precision", "recall")
        assert figure["num"]
    assert {name.split()[0] for name in results["definitions"]} >= {"FID-3D", "MMD", "floor", "interval"}
    assert all(
        f["metric"].removesuffix(" axial").removesuffix(" coronal").removesuffix(" sagittal") in results["definitions"]
        for f in results["figures"]
    )
    assert results["settings"]["num_resamples"] == 20
    assert "random weights" in results["settings"]["feature_networks"]["random_3d"]["is"]
    assert any("random_3d is an untrained network" in warning for warning in results["warnings"])
    for picture in results["pictures"]:
        assert (sets / "out" / picture["file"]).read_bytes().startswith(b"\x89PNG")
    assert len(results["pictures"]) == 2
    with (sets / "out" / "generation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [f["value"] for f in results["figures"]]
    assert rows[0]["num"] == "real=8 generated=6"
    assert float(rows[0]["floor"]) == results["figures"][0]["floor"]["value"]


def test_values_are_those_of_the_metrics_on_the_features(sets):
    results = run(sets)
    of_volumes, of_slices = build_networks(["random_3d", "random_2d"], None, 2, torch.device("cpu"))
    real, made = (
        torch.stack([read_volume(path).data for path in sorted((sets / name).glob("*.nii.gz"))])
        for name in ("real", "generated")
    )
    with torch.inference_mode():
        expected = frechet_distance(of_volumes(real)["volume"][:, 0], of_volumes(made)["volume"][:, 0])
        coronal = [of_slices(x)["coronal"].flatten(0, 1) for x in (real, made)]
    assert value_of(results, "FID-3D") == pytest.approx(expected, rel=1e-4)
    assert value_of(results, "FID-2.5D coronal") == pytest.approx(frechet_distance(*coronal), rel=1e-4)


def test_diversity_is_the_mean_of_all_pairs_where_they_are_few(sets):
    results = run(sets, "--num-pairs", "100")
    made = [read_volume(path).data for path in sorted((sets / "generated").glob("*.nii.gz"))]
    expected = np.mean([ms_ssim(made[i], made[j]) for i in range(6) for j in range(i)])
    assert value_of(results, "MS-SSIM of generated pairs") == pytest.approx(expected)


def test_classes_are_measured_alone_and_together(sets):
    real = write_json(sets / "real.json", **{"0": sets / "real", "1": write_set(sets / "b", range(60, 68), blur=1.0)})
    made = sets / "generated"
    for i, path in enumerate(sorted(made.glob("*.nii.gz"))):
        write_record(path, i % 2, ("<CT>", "MR")[i % 2])
    results = run(sets, "--real", real, "--neighbours", "2")
    groups = {f["group"] for f in results["figures"]}
    assert groups == {"<CT>", "MR", "all classes"}
    num = {f["group"]: f["num"] for f in results["figures"] if f["metric"] == "FID-3D"}
    assert num["all classes"] == {"real": 16, "generated": 6}
    assert num["MR"] == {"real": 8, "generated": 3}
    assert not [f for f in results["figures"] if f["group"] == "all classes" and "MS-SSIM" in f["metric"]]
    assert any("precision" in f["metric"] for f in results["figures"])
    assert sorted(p["file"] for p in results["pictures"]) == [
        "pictures/real_generated_MR.png",
        "pictures/real_generated__CT_.png",
    ]


def test_unequal_shares_of_the_classes_are_noticed(sets):
    real = write_json(sets / "r.json", a=sets / "real", b=write_set(sets / "b", range(60, 68)))
    made = write_json(sets / "g.json", a=sets / "generated", b=write_set(sets / "c", range(70, 73)))
    results = run(sets, "--real", real, "--generated", made)
    assert sum("the classes' shares differ" in warning for warning in results["warnings"]) == 1
    assert any(
        "precision, recall, density and coverage need more than neighbours=5" in warning
        for warning in results["warnings"]
    )


def test_a_copied_training_set_and_a_collapsed_generator_are_noticed(sets):
    for path in (sets / "generated").iterdir():
        path.unlink()
    for i in range(6):
        shutil.copy(sets / "training" / "v041.nii.gz", sets / "generated" / f"{i}.nii.gz")
    results = run(sets, "--training", sets / "training", "--num-pairs", "100")
    warnings = " ".join(results["warnings"])
    assert "6 of 6 generated volumes are copies of training volumes" in warnings
    assert "the generator has collapsed" in warnings
    assert value_of(results, "nearer than held-out") == 1
    assert value_of(results, "nearest distance ratio") == 0
    with (sets / "out" / "memorisation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["nearest_training"]).name for row in rows] == ["v041.nii.gz"] * 6
    assert {float(row["distance"]) for row in rows} == {0.0}
    assert [table["title"] for table in results["tables"]] == ["Closest pairs (all: memorisation.csv)"]


def test_honest_volumes_give_no_such_warning(sets):
    results = run(sets, "--training", sets / "training", "--num-pairs", "100")
    assert not [w for w in results["warnings"] if "copies" in w or "collapsed" in w]


# Resuming and processes ---------------------------------------------------------------------------------------------


def counted(monkeypatch) -> list[int]:
    """Numbers of volumes or pairs that networks and MS-SSIM were given."""
    sizes = []
    for module, name in ((feature_extraction, "compute_features"), (pair_similarity, "_compare_pairs")):
        original = getattr(module, name)

        def count(*args, original=original):
            sizes.append(len(args[-1]))
            return original(*args)

        monkeypatch.setattr(module, name, count)
    return sizes


def without_times(results: dict) -> dict:
    return {name: value for name, value in results.items() if name not in ("created_utc", "command")}


def test_the_same_command_again_computes_nothing_and_finds_the_same(sets, monkeypatch):
    sizes = counted(monkeypatch)
    first = run(sets)
    assert sum(sizes) == 2 * (8 + 6) + 6 + 6
    sizes.clear()
    assert without_times(run(sets)) == without_times(first)
    assert sizes == []
    write_set(sets / "generated", [30])
    run(sets)
    assert sizes[:2] == [1, 1]


def test_training_volumes_go_through_networks_of_volumes_alone(sets, monkeypatch):
    sizes = counted(monkeypatch)
    run(sets, "--training", sets / "training")
    assert sum(sizes) == 2 * (8 + 6) + 7 + 6 + 6  # two networks; training volumes; pairs


def test_a_killed_run_goes_on(sets, monkeypatch):
    original, calls = feature_extraction.compute_features, []

    def interrupted(*args):
        calls.append(len(args[-1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(feature_extraction, "compute_features", interrupted)
    assert run_script(lambda argv: run(sets)) == 130
    calls.clear()
    monkeypatch.setattr(feature_extraction, "compute_features", lambda *args: calls.append(0) or original(*args))
    run(sets)
    assert len(calls) == 2 * (2 + 2) - 2  # batches of four volumes, two networks, two batches were done


def test_two_processes_find_what_one_finds(sets, tmp_path):
    alone = run(sets, "--training", sets / "training")
    options = ["--real", "real", "--generated", "generated", "--training", "training", "--output-dir", "two", *FAST]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / "evaluation" / "generation_metrics.py"), *options],
        cwd=sets,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together = read_results(sets / "two" / "generation.json")
    assert len(together["figures"]) == len(alone["figures"])
    for one, other in zip(together["figures"], alone["figures"], strict=True):
        assert one["metric"] == other["metric"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-5, abs=1e-7)
    assert done.stderr.count("figures in") == 1


# Bad input ----------------------------------------------------------------------------------------------------------


def spoil(sets: Path, case: str) -> None:
    path = sets / "generated" / "v021.nii.gz"
    data = blob(21)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "no image":
        path.write_bytes(b"nothing")
    elif case == "nan":
        data[3, 3, 3] = np.nan
        write_volume(path, data, affine_from_spacing((1, 1, 1)))
    elif case == "outside":
        write_volume(path, 1000 * data, affine_from_spacing((1, 1, 1)))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "v021.nii.gz: the file is truncated"),
        ("no image", "v021.nii.gz: not a NIfTI image"),
        ("nan", "v021.nii.gz: 1 NaN or infinite voxels"),
        ("outside", r"v021.nii.gz: intensities from -1000 to .* outside the declared range"),
    ],
)
def test_files_that_cannot_be_read_are_named_or_left_out(sets, case, message):
    spoil(sets, case)
    with pytest.raises(UserError, match=f"1 .*can't be read: .*{message}.*--exclude-unreadable"):
        run(sets)
    assert not (sets / "out" / "generation.json").exists()
    results = run(sets, "--exclude-unreadable")
    (excluded,) = results["excluded"]
    assert excluded["file"].endswith("v021.nii.gz")
    assert results["figures"][0]["num"] == {"real": 8, "generated": 5}
    assert "1 volumes were left out (excluded): the figures are those of the rest" in results["warnings"]


def test_the_sound_volumes_are_kept_when_others_turn_out_damaged(sets, monkeypatch):
    spoil(sets, "truncated")
    with pytest.raises(UserError):
        run(sets)
    sizes = counted(monkeypatch)
    write_set(sets / "generated", [21])
    run(sets)
    assert sizes[0] == 1  # of the first network nothing but the volume that was damaged


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"real": None}, "required but not set: real"),
        ({"networks": ["vgg"]}, "networks must be auto, or some of medicalnet_resnet50"),
        ({"networks": ["medicalnet_resnet50"]}, "medicalnet_resnet50 needs resnet_50.pth"),
        ({"real_range": [1, 0]}, "real_range must be two numbers"),
        ({"resample": True, "ignore_spacing": True}, "resample and ignore_spacing exclude each other"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
    ],
)
def test_wrong_options(sets, monkeypatch, values, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(sets / "hub"))
    words = [f"{name}={'null' if v is None else json.dumps(v)}" for name, v in values.items()]
    options = ["--generated", str(sets / "generated"), "--output-dir", str(sets / "out"), *FAST]
    options += [] if "real" in values else ["--real", str(sets / "real")]
    with pytest.raises(UserError, match=message):
        main([*options, *words])
    assert not (sets / "out").exists()


def test_volumes_too_small_for_the_similarity_are_refused_first(tmp_path):
    for name, seeds in (("real", [0, 1]), ("generated", [2, 3])):
        write_set(tmp_path / name, seeds, size=10)
    with pytest.raises(UserError, match="11"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_scales_are_refused(sets):
    for path in (sets / "generated").iterdir():
        write_volume(path, (read_volume(path).data + 1) / 2, affine_from_spacing((1, 1, 1)))
    with pytest.raises(UserError, match=r"their scales differ.*generated_range=\[0,1\]"):
        run(sets)
    run(sets, "--generated-range", "0", "1")


def test_memorisation_without_a_network_of_volumes_is_refused(sets):
    with pytest.raises(UserError, match="memorisation check needs a network of whole volumes"):
        run(sets, "--training", sets / "training", "--networks", "random_2d")


def test_volumes_that_say_nothing_are_warned_of(sets):
    shutil.copy(sets / "real" / "v001.nii.gz", sets / "real" / "again.nii.gz")
    write_volume(sets / "generated" / "v020.nii.gz", read_volume(sets / "real" / "v002.nii.gz").data, np.eye(4))
    write_volume(sets / "generated" / "v021.nii.gz", np.full((16, 16, 16), -1, np.float32), np.eye(4))
    text = "\n".join(run(sets)["warnings"])
    assert "1 of 9 real volumes are copies of others of the set" in text
    assert "1 of 6 generated volumes have one value everywhere" in text
    assert "1 of 9 real volumes are among the generated ones" in text
    assert "generated volumes are copies" not in text


def test_too_few_volumes_for_intervals_are_said(sets):
    text = "\n".join(run(sets)["warnings"])
    assert "precision, recall, density, coverage without interval" in text
    assert "FID" not in text.split("without interval")[0].splitlines()[-1]


def test_sides_with_fewer_slices_than_asked_for(tmp_path):
    for name, seeds in (("a", range(4)), ("b", range(4, 8)), ("ga", range(8, 12)), ("gb", range(12, 16))):
        for seed in seeds:
            write_volume(tmp_path / name / f"{seed}.nii.gz", blob(seed, 24)[:17], affine_from_spacing((1, 1, 1)))
    real = write_json(tmp_path / "r.json", a=tmp_path / "a", b=tmp_path / "b")
    made = write_json(tmp_path / "g.json", a=tmp_path / "ga", b=tmp_path / "gb")
    results = run(tmp_path, "--real", real, "--generated", made, "--networks", "random_2d", "--slices", "20")
    found = {f["metric"]: f["num"]["slices of each"] for f in results["figures"] if f["group"] == "all classes"}
    assert found == {"FID-2.5D": 57, "FID-2.5D axial": 17, "FID-2.5D coronal": 20, "FID-2.5D sagittal": 20}


@pytest.mark.parametrize("name", ["generation.json", "generation.csv"])
def test_a_folder_in_the_place_of_a_result_is_refused_first(sets, name, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is a folder: remove it"):
        run(sets)
    assert sizes == []


@pytest.mark.parametrize(("file", "option"), [("out/pictures", "output_dir"), ("cache", "cache_dir")])
def test_a_file_in_the_place_of_a_folder_is_refused_first(sets, file, option, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out").mkdir()
    (sets / file).write_text("")
    with pytest.raises(UserError, match=f"{option}: .*{file} can't be written to"):
        run(sets, "--cache-dir", sets / "cache")
    assert sizes == []


def test_a_table_of_an_earlier_run_does_not_stay(sets):
    run(sets, "--training", sets / "training")
    run(sets)
    assert not (sets / "out" / "memorisation.csv").exists()


def test_a_place_that_cannot_be_written_to_is_refused_first(sets, monkeypatch):
    sizes = counted(monkeypatch)
    (sets / "out").write_text("a file")
    with pytest.raises(UserError, match="output_dir: .* can't be written to"):
        run(sets)
    assert sizes == []


def test_two_volumes_each_are_enough(tmp_path):
    write_set(tmp_path / "real", [0, 1])
    write_set(tmp_path / "generated", [2, 3])
    results = run(tmp_path)
    assert {f["metric"] for f in results["figures"]} >= {"FID-3D", "MMD", "diversity gap"}
    assert all(f["floor"] is None for f in results["figures"])
    assert any("neighbours=5" in warning for warning in results["warnings"])


def test_sizes_are_resampled_when_asked_for(sets):
    write_set(sets / "fine", range(20, 26), (0.5, 0.5, 0.5), 32)
    with pytest.raises(UserError, match="--resample"):
        run(sets, "--generated", sets / "fine")
    results = run(sets, "--generated", sets / "fine", "--resample")
    assert results["figures"][0]["num"] == {"real": 8, "generated": 6}


def test_without_pictures(sets):
    results = run(sets, "--training", sets / "training", "--num-pictures", "0")
    assert results["pictures"] == []
    assert not (sets / "out" / "pictures").exists()

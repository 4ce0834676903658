"""The script that measures generated volumes, on small sets: results, resuming, processes, and what it refuses."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import FAST, counted, write_json, write_record, write_set, write_three
from evaluation_sets import run_metrics as run

from common.errors import UserError
from common.script import run_script
from dataset.volumes.volume_io import read_volume
from evaluation.comparison import features as feature_extraction
from evaluation.comparison.networks import build_networks
from evaluation.metrics.distances import frechet_distance
from evaluation.metrics.reconstruction import ms_ssim
from evaluation.results.results import read_results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sets(tmp_path):
    return write_three(tmp_path)


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
    assert any("are too few for the 481 features of random_3d" in warning for warning in results["warnings"])
    for picture in results["pictures"]:
        assert (sets / "out" / picture["file"]).read_bytes().startswith(b"\x89PNG")
    assert len(results["pictures"]) == 2
    assert [panel["role"] for panel in results["volumes"][0]["volumes"]] == ["real", "generated"]
    assert all(Path(panel["file"]).is_file() for entry in results["volumes"] for panel in entry["volumes"])
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


# Subjects -----------------------------------------------------------------------------------------------------------


def with_scans(sets: Path, folder: str, first: int, num: int) -> Path:
    """The volumes of a folder named as scans of `num` subjects, from number `first`, in turn."""
    for i, path in enumerate(sorted((sets / folder).glob("*.nii.gz"))):
        path.rename(path.with_name(f"sub-{first + i % num:02d}_scan-{i}.nii.gz"))
    return sets / folder


def test_subjects_are_counted_resampled_and_paired(sets):
    with_scans(sets, "real", 0, 4)
    training = with_scans(sets, "training", 10, 3)
    options = ("--training", training, "--num-pairs", "100", "--networks", "random_3d", "--neighbours", "2")
    alone, told = run(sets, *options), run(sets, *options, "--subject-pattern", r"sub-\d+")
    (warning,) = [text for text in alone["warnings"] if "--subject-pattern" in text]
    assert warning.startswith("subjects: 15 files have 7 names, ")
    assert not [text for text in told["warnings"] if "--subject-pattern" in text]
    before, after = ({figure["metric"]: figure for figure in of["figures"]} for of in (alone, told))
    assert before["FID-3D"]["num"] == {"real": 8, "generated": 6}
    assert after["FID-3D"]["num"] == {"real": 8, "real subjects": 4, "generated": 6}
    assert after["FID-3D"]["value"] == before["FID-3D"]["value"]
    assert (before["FID-3D"]["floor"]["num"], after["FID-3D"]["floor"]["num"]) == (4, 2)
    assert [of["MS-SSIM of real pairs"]["num"]["pairs"] for of in (before, after)] == [28, 24]
    assert after["MS-SSIM of generated pairs"] == before["MS-SSIM of generated pairs"]
    assert after["nearer than held-out"]["num"]["real subjects"] == 4
    assert after["nearer than held-out"]["value"] == before["nearer than held-out"]["value"]
    assert "subjects" in told["definitions"]


def test_a_training_subject_among_the_real_ones_is_refused(sets):
    real, training = with_scans(sets, "real", 0, 4), with_scans(sets, "training", 3, 3)
    message = (
        f"training: {training}/sub-03_scan-0.nii.gz is of subject sub-03, as {real}/sub-03_scan-3.nii.gz of real is: "
        "give sets without common subjects"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        run(sets, "--training", training, "--subject-pattern", r"sub-\d+")


def test_one_real_subject_is_no_set(sets):
    with_scans(sets, "real", 0, 1)
    with pytest.raises(UserError, match="real: 8 real volumes are of one subject, 2 or more are needed"):
        run(sets, "--subject-pattern", r"sub-\d+")


# Resuming and processes ---------------------------------------------------------------------------------------------


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

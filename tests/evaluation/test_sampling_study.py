"""The sampling study on a made-up demo: tiny random models, eight phantoms."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from generation_models import CUBE, TIMESTEPS, config, row, save_models

from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from config.loading import save_config
from dataset import phantoms
from dataset.order.data_split import HELD_OUT
from evaluation.demonstration.figures import features, load_generated, load_side
from evaluation.generation import sampling_study
from evaluation.generation.run import generate
from evaluation.generation.sampling_study import Run, planned_runs, table
from evaluation.metrics.distances import frechet_distance, median_bandwidth, mmd_rbf
from evaluation.sampling_study import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What evaluation/demo.py leaves, as far as the study reads it: 32³ voxels, latents of 8³."""
    folder = tmp_path_factory.mktemp("study") / "demo"
    phantoms.main(
        [
            "--output-dir",
            f"{folder / 'phantoms'}",
            "--num-per-class",
            "4",
            "--num-validation",
            "0",
            "--num-held-out",
            "2",
            "--size",
            "32",
        ]
    )
    models = save_models(folder)
    for name, place in (("ae.ckpt", "stage2/checkpoints/last.ckpt"), ("flow.pt", "biflownet/checkpoints/flow.pt")):
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(models / name, folder / place)
    cfg = config(models, folder / "generated", [row(0, "CTChest", CUBE), row(1, "MRBrain", CUBE)])
    save_config(cfg, folder / "generated" / "seed_0")
    return folder


def run(demo: Path, output: Path, *more: str) -> dict:
    main(["--demo", f"{demo}", "--output-dir", f"{output}", "--num-samples", "2", "--device", "cpu", *more])
    return json.loads((output / "sampling.json").read_text())


SMALL = ["--strategies", "ddim", "unipc", "--steps", "2", "--seeds", "0", "1"]


@pytest.fixture(scope="module")
def study(demo, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    run(demo, output, *SMALL)
    return output


def test_every_combination_is_measured_once(study):
    content = json.loads((study / "sampling.json").read_text())
    found = {(entry["strategy"], entry["steps"], entry["seed"]) for entry in content["runs"]}
    assert found == {(strategy, 2, seed) for strategy in ("ddim", "unipc") for seed in (0, 1)}
    assert len(content["runs"]) == 4
    assert len(content["real"]) == 2  # four training phantoms per class in sets of two
    assert (study / "sampling.png").read_bytes().startswith(b"\x89PNG")


def test_the_distance_is_that_of_the_demos_report(demo, study, tmp_path):
    content = json.loads((study / "sampling.json").read_text())
    (entry,) = [entry for entry in content["runs"] if (entry["strategy"], entry["seed"]) == ("ddim", 1)]
    classes = [row(0, "CTChest", CUBE), row(1, "MRBrain", CUBE)]
    generate(config(demo, tmp_path, classes, ddim_steps=2, seed=1, num_samples=2, batch_size=4))
    made = features(load_generated(tmp_path / "seed_1", ["CTChest", "MRBrain"]))
    real = features(load_side(demo / "phantoms" / "PatchVolume_data.json", HELD_OUT))
    assert list(real) == list(made) == [("CTChest", "32x32x32"), ("MRBrain", "32x32x32")]
    # Latents on the border between two codes may round to either, see tests/evaluation/test_generation.py.
    expected = [frechet_distance(real[kind], made[kind]) for kind in real]
    real, made = (torch.cat(list(of.values())) for of in (real, made))
    assert entry["fid"] == pytest.approx(sum(expected) / 2, rel=0.02)
    assert entry["mmd"] == pytest.approx(mmd_rbf(real, made, bandwidth=median_bandwidth(*real.chunk(2))), abs=2e-3)


def test_a_second_run_does_only_what_is_new(demo, study, tmp_path, monkeypatch):
    output = tmp_path / "copy"
    shutil.copytree(study, output)
    before = json.loads((output / "sampling.json").read_text())["runs"]
    sampled = []
    original = sampling_study.sample_latents

    def sample(cfg, *rest):
        sampled.append((cfg.sampling_strategy, cfg.ddim_steps, cfg.seed))
        return original(cfg, *rest)

    monkeypatch.setattr(sampling_study, "sample_latents", sample)
    content = run(demo, output, "--strategies", "ddim", "ddpm", "--steps", "2", "--seeds", "0", "1")
    assert [(strategy, seed) for strategy, _, seed in sampled] == [("ddpm", 0), ("ddpm", 1)]
    assert [entry for entry in content["runs"] if entry["strategy"] != "ddpm"] == before
    assert {entry["steps"] for entry in content["runs"] if entry["strategy"] == "ddpm"} == {TIMESTEPS}


def test_an_interrupted_run_keeps_what_was_finished(demo, tmp_path, monkeypatch):
    original = sampling_study.Study.measure

    def measure(self, run, bar):
        if run.seed == 1:
            raise KeyboardInterrupt
        return original(self, run, bar)

    monkeypatch.setattr(sampling_study.Study, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(demo, tmp_path, *SMALL)
    content = json.loads((tmp_path / "sampling.json").read_text())
    assert [(entry["strategy"], entry["seed"]) for entry in content["runs"]] == [("ddim", 0), ("unipc", 0)]
    assert "| 2 | " in (tmp_path / "sampling_table.md").read_text()


@pytest.mark.parametrize("option", [["--num-samples", "3"], ["--demo", "other"]])
def test_results_of_other_settings_are_not_mixed(demo, study, tmp_path, option):
    if option[0] == "--demo":  # the same models, other phantoms
        shutil.copytree(demo, tmp_path / "other")
        shutil.rmtree(tmp_path / "other" / "phantoms")
        phantoms.main(
            ["--output-dir", f"{tmp_path / 'other' / 'phantoms'}", "--seed", "1"]
            + ["--num-per-class", "4", "--num-validation", "0", "--num-held-out", "2", "--size", "32"]
        )
        option = ["--demo", f"{tmp_path / 'other'}"]
    with pytest.raises(UserError, match=r"other settings \((num_samples|held_out_sha256)\): choose another"):
        run(demo, study, *SMALL, *option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--demo", "nowhere"], "nowhere: no finished demo here"),
        (["--num-samples", "1"], "num_samples must be at least 2, got 1"),
        (["--num-samples", "5"], "--num-samples 5: the demo has fewer training phantoms"),
        (["--steps", "13"], "--steps 13: each has to lie between 1 and the 12 timesteps"),
        (["--seeds", "-1", "--steps", "2"], "seeds must be one or more, each at least 0, got [-1]"),
        (["--device", "tpu"], "device must be one of auto | cpu | cuda, got 'tpu'"),
    ],
)
def test_mistakes_are_one_line(demo, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(demo, tmp_path, *options)
    assert not (tmp_path / "sampling.json").exists()


def test_a_foreign_file_is_not_overwritten(demo, tmp_path):
    (tmp_path / "sampling.json").write_text("[]")
    with pytest.raises(UserError, match="not a result of this script"):
        run(demo, tmp_path, *SMALL)
    assert (tmp_path / "sampling.json").read_text() == "[]"


def test_a_flow_has_its_own_samplers(demo, tmp_path):
    """And a diffusion not those of a flow."""
    with pytest.raises(UserError, match="--strategies euler: .* process diffusion: choose among ddpm ddim dpm"):
        run(demo, tmp_path / "study", "--strategies", "euler", "--steps", "2")
    flow = tmp_path / "flow"
    shutil.copytree(demo, flow)
    path = flow / "biflownet" / "checkpoints" / "flow.pt"
    checkpoint = load_checkpoint(path)
    checkpoint["args"].process = "flow"
    save_checkpoint(checkpoint, path)
    classes = [row(0, "CTChest", CUBE), row(1, "MRBrain", CUBE)]
    cfg = config(flow, flow / "generated", classes, process="flow", sampling_strategy="euler")
    save_config(cfg, flow / "generated" / "seed_0")
    content = run(flow, tmp_path / "study", "--steps", "3", "--seeds", "0")  # all of a flow's samplers
    assert [(entry["strategy"], entry["steps"]) for entry in content["runs"]] == [("euler", 3)]
    assert "| steps | euler |" in (tmp_path / "study" / "sampling_table.md").read_text()


def test_runs_are_planned_cheapest_first():
    runs = planned_runs(["ddpm", "unipc"], [10, 5], [1, 0], 1000)
    assert [(run.strategy, run.steps, run.seed) for run in runs] == [
        ("unipc", 5, 0),
        ("unipc", 5, 1),
        ("unipc", 10, 0),
        ("unipc", 10, 1),
        ("ddpm", 1000, 0),
        ("ddpm", 1000, 1),
    ]


def test_the_table_has_means_and_spreads():
    results = {
        Run(5, 0, "ddim"): {"mmd": 0.1, "fid": 0.3},
        Run(5, 1, "ddim"): {"mmd": 0.3, "fid": 0.3},
        Run(1000, 0, "ddpm"): {"mmd": -0.01, "fid": 0.2},
    }
    lines = table(results, [{"mmd": 0.0, "fid": 0.04}, {"mmd": 0.02, "fid": 0.04}]).splitlines()
    assert "| steps | ddpm | ddim |" in lines
    assert "| 5 |  | 0.2000 ± 0.1414 |" in lines
    assert "| 1000 | -0.0100 |  |" in lines
    assert "Training phantoms in 2 sets of the same size: 0.0100 ± 0.0141" in lines

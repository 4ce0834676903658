"""Recipe studies from the study file to tables: tiny trainings on eight phantoms."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_runs import autoencoder_study_file, make_demo, run, study_file

from common.errors import UserError
from common.script import run_script
from config.loading import load_config
from config.schema.diffusion import GenerationConfig
from config.schema.evaluation import RecipeStudyConfig
from dataset.volumes.index import latent_folder
from dataset.volumes.volume_io import read_volume, write_volume
from evaluation.demonstration.stages import DemoPaths
from evaluation.study import running
from evaluation.study.recipes import read_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("study"))


@pytest.fixture
def children(monkeypatch) -> list[str]:
    """Lets scripts run in this process, where libraries are loaded; their names."""
    ran = []

    def in_this_process(command, processes=1, output=None):
        ran.append(Path(command[0]).stem)
        main = importlib.import_module(command[0].removesuffix(".py").replace("/", ".")).main
        with output.open("a") as said, contextlib.redirect_stderr(said):
            return run_script(main, command[1:])

    monkeypatch.setattr(running, "run_child", in_this_process)
    return ran


def by_variant(content: dict) -> dict[str, list[dict]]:
    return {name: [r for r in content["runs"] if r["variant"] == name] for name in ("as is", "fast", "slow")}


@pytest.mark.slow
def test_a_study_is_killed_and_goes_on(demo, tmp_path):
    """As a process of its own, with the real scripts as its children."""
    file, output = study_file(demo, tmp_path), tmp_path / "out"
    command = [sys.executable, "evaluation/recipe_study.py", "--config", str(file), "--output-dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as first:
        while first.poll() is None and not list(output.glob("runs/fast/seed_0-*/output.txt")):
            time.sleep(0.1)
        first.terminate()
        assert first.wait() == 128 + signal.SIGTERM, first.stderr.read()
    before = json.loads((output / "study.json").read_text())["runs"]
    assert [(r["variant"], r["seed"]) for r in before] == [("as is", 0)]
    assert "| 1 of 2 |" in (output / "study.md").read_text()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    content = json.loads((output / "study.json").read_text())
    assert content["runs"][0] == before[0]
    assert [(r["variant"], r["seed"]) for r in content["runs"]] == [(v, s) for s in (0, 1) for v in ("as is", "fast")]
    assert {(r["status"], r["steps"]) for r in content["runs"]} == {("done", 2)}
    figures = content["runs"][0]["figures"]
    assert {"FID-3D", "FID-2.5D", "MMD", "precision", "recall", "coverage", "diversity gap"} <= figures.keys()
    assert all(len(one["held_out"]) == len(one["generated"]) == 20 for one in figures.values())
    text = (output / "study.md").read_text()
    assert re.search(r"\| as is \| 2 of 2 \| 2 \| [\d.]+ \| .*\| baseline \|", text)
    assert re.search(r"\| fast \| 2 of 2 \| 2 \| ", text)
    assert re.search(r"\| \*floor\* .*\n\| \*ceiling\* ", text)
    assert "8 comparisons" in text
    assert (output / "study.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_depends_on_a_change_is_done_again(demo, tmp_path, children):
    output, one = tmp_path / "out", {"seeds": [3]}
    first = run(study_file(demo, tmp_path, **one), output)
    assert children == ["train_BiFlowNet_SingleRes", "class_conditional_generation"] * 2
    assert "nothing is called better" in (output / "study.md").read_text()
    children.clear()
    again = run(study_file(demo, tmp_path, **one, num_resamples=30), output)  # judged otherwise: trainings are finished
    assert len(again["runs"]) == 4
    assert first["runs"] == again["runs"][:2]
    values = [[r["figures"]["FID-3D"]["value"] for r in again["runs"][i : i + 2]] for i in (0, 2)]
    assert values[0] == values[1]
    assert [r["judged"] for r in again["runs"][2:]] == [r["judged"] for r in first["runs"]]
    children.clear()
    variants = [{"name": "as is"}, {"name": "fast", "training": ["lr=0.1"], "generation": ["sampling_strategy=unipc"]}]
    changed = run(study_file(demo, tmp_path, **one, variants=variants), output)
    assert len(changed["runs"]) == 5
    assert len(children) == 2
    assert changed["runs"][4]["folder"] == first["runs"][1]["folder"]
    assert changed["runs"][4]["judged"] != first["runs"][1]["judged"]
    children.clear()
    run(study_file(demo, tmp_path, **one), output)
    assert children == []


def test_a_variant_that_diverges_is_a_row(demo, tmp_path, children):
    variants = [{"name": "as is"}, {"name": "fast", "training": ["lr=1e30"]}]
    content = run(study_file(demo, tmp_path, variants=variants), tmp_path / "out")
    found = by_variant(content)
    assert [r["status"] for r in found["as is"] + found["fast"]] == ["done", "done", "failed", "failed"]
    assert "not finite" in found["fast"][0]["reason"]
    assert re.search(
        r"\| fast \| 0 of 2 \|.* failed: seed 0: .*not finite", (tmp_path / "out" / "study.md").read_text()
    )


def test_seconds_become_steps(demo, tmp_path, children, monkeypatch):
    speeds = iter([2.0, 1.0, 2.2, 0.9, 1.8, 1.1])  # in turns: as is, fast, …
    monkeypatch.setattr(running, "logged_intervals", lambda folder: [(1, 100.0), (1, next(speeds, 4.0))])
    really, warm_ups = running.train, []

    def train(recipe, cfg, folder):  # what a warm-up trains isn't looked at
        if folder.name != "speed":
            return really(recipe, cfg, folder)
        warm_ups.append(cfg.max_steps)
        return folder, None

    monkeypatch.setattr(running, "train", train)
    file = study_file(demo, tmp_path, budget={"seconds": 2, "warm_up": 2}, seeds=[0])
    content = run(file, tmp_path / "out")
    assert list(content["speeds"].values()) == [[2.0, 2.2, 1.8], [1.0, 0.9, 1.1]]
    assert [(r["variant"], r["steps"]) for r in content["runs"]] == [("as is", 4), ("fast", 2)]
    assert (children.count("train_BiFlowNet_SingleRes"), warm_ups) == (2, [2] * 6)
    children.clear()
    run(file, tmp_path / "out")
    assert children == []


@pytest.mark.slow
def test_autoencoders_are_judged_by_reconstruction(demo, tmp_path, children):
    output = tmp_path / "out"
    content = run(autoencoder_study_file(demo, tmp_path), output)
    assert children == ["train_PatchVolume"] * 4
    figures = content["runs"][0]["figures"]
    expected = {"PSNR", "MS-SSIM", "seam index ratio", "codebook usage", "codebook perplexity"}
    assert figures.keys() == expected
    assert 0 < figures["PSNR"]["value"] < 60
    assert len(set(figures["PSNR"]["held_out"])) > 10
    assert "seam index ratio → 1" in (output / "study.md").read_text()
    for name in ("study.png", "curves.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


TWO = [{"name": "as is"}, {"name": "b"}]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": []}, "unknown key variant, did you mean variants?"),
        ({"variants": [{"name": "a", "trainings": []}, {"name": "b"}]}, "unknown key variants[0].trainings, did you"),
        ({"variants": TWO[:1]}, "variants must be two or more with different names"),
        ({"variants": [TWO[0], TWO[0]]}, "variants must be two or more with different names"),
        ({"variants": [*TWO, {"name": "a/b"}]}, "variants[2]: name must be a name that a folder can have"),
        ({"variants": [*TWO, {"name": "c", "training": ["lrr=1"]}]}, "variant c: override 'lrr=1': unknown key lrr"),
        ({"variants": [*TWO, {"name": "c", "training": ["lr=-1"]}]}, "variant c: lr must be above 0, got -1"),
        (
            {"variants": [*TWO, {"name": "c", "training": ["global_seed=1"]}]},
            "variant c: global_seed: set by the study",
        ),
        ({"variants": [*TWO, {"name": "c", "generation": ["seed=1"]}]}, "variant c: seed: set by the study itself"),
        ({"variants": [*TWO, {"name": "c", "generation": ["eta=2"]}]}, "variant c: eta must be between 0 and 1"),
        ({"budget": {}}, "budget must have either steps or seconds"),
        ({"budget": {"steps": 1, "seconds": 1}}, "budget must have either steps or seconds"),
        (
            {"budget": {"seconds": 1}, "variants": [*TWO, {"name": "c", "training": ["max_steps=9"]}]},
            "variant c: max_steps: found by the study from budget.seconds",
        ),
        ({"seeds": []}, "seeds must be one or more"),
        ({"seeds": [1, 1]}, "seeds must be all different"),
        ({"stage": "both"}, "stage must be one of diffusion | autoencoder, got 'both'"),
        ({"num_samples": 2}, "num_samples must be at least 3 with neighbours 1, got 2"),
        ({"num_samples": 5}, "num_samples is 5, but CTChest has 4 training volumes"),
        ({"num_samples": 5, "neighbours": 3}, "CTChest has 4 held-out subjects, neighbours=3 needs 5"),
        ({"generation": None}, "required but not set: generation"),
        ({"base": "nowhere.yaml"}, "variant as is: nowhere.yaml: no such config file"),
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"autoencoder": "nowhere.ckpt"}, "nowhere.ckpt: no such file"),
        ({"volumes": "nowhere/split.json"}, "volumes: nowhere/split.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(demo, tmp_path, children, changed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(study_file(demo, tmp_path, **changed), tmp_path / "out")
    assert children == []
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generation": "some.yaml"}, "generation is for stage diffusion"),
        ({"variants": [*TWO, {"name": "c", "training": ["model.stage=2"]}]}, "variant c: autoencoder: required for"),
        ({"variants": [*TWO, {"name": "c", "training": ["model.seed=2"]}]}, "variant c: model.seed: set by the study"),
    ],
)
def test_mistakes_with_autoencoders(demo, tmp_path, children, changed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(autoencoder_study_file(demo, tmp_path, **changed), tmp_path / "out")
    assert children == []


@pytest.mark.parametrize("file", sorted((ROOT / "config" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_variants_of_shipped_studies_compose(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(RecipeStudyConfig, file)
    assert [recipe.name for recipe in read_recipes(cfg)] == [row.name for row in cfg.variants]


def test_generated_volumes_have_to_fit_the_held_out_ones(demo, tmp_path, children):
    classes = "classes=[{id: 0, name: CTChest, grids: [[8, 8, 16]], spacings_mm: [[1, 1, 1]]}]"
    variants = [{"name": "as is", "generation": [classes]}, {"name": "b"}]
    with pytest.raises(UserError, match=r"makes CTChest in .*64.* voxels; its held-out volumes have \(32, 32, 32\)"):
        run(study_file(demo, tmp_path, variants=variants), tmp_path / "out")


def test_a_class_in_two_sizes(demo, tmp_path, children):
    """As the demo's data, of which its study names one size."""
    volumes = demo / "phantoms"
    for path in sorted((volumes / "CTChest").glob("*.nii.gz")):
        volume = read_volume(path)
        write_volume(tmp_path / "CTChest" / "32x32x16" / path.name, volume.data[:, :16].contiguous(), volume.affine)
    both = {"0": [str(volumes / "CTChest"), str(tmp_path / "CTChest" / "32x32x16")], "1": str(volumes / "MRBrain")}
    (tmp_path / "both.json").write_text(json.dumps(both))
    shutil.copy(volumes / "split.json", tmp_path)
    with pytest.raises(UserError, match="CTChest has 32x32x16 and 32x32x32: a study compares one size"):
        run(study_file(demo, tmp_path, volumes=str(tmp_path / "both.json")), tmp_path / "out")
    cfg = load_config(RecipeStudyConfig, ROOT / "config" / "studies" / "diffusion_demo.yaml")
    named = [json.loads((ROOT / file).read_text()) for file in (cfg.volumes, cfg.data)]
    paths = DemoPaths(Path("demo"))
    assert named[0] == {"0": str(paths.phantoms / "CTChest" / "64x64x64"), "1": str(paths.phantoms / "MRBrain")}
    assert named[1] == {name: str(latent_folder(folder)) for name, folder in named[0].items()}
    made = load_config(GenerationConfig, ROOT / cfg.generation)
    assert [len(row.grids) for row in made.classes] == [1, 1]


def test_a_foreign_file_is_not_overwritten(demo, tmp_path, children):
    output = tmp_path / "out"
    output.mkdir()
    (output / "study.json").write_text("[]")
    with pytest.raises(UserError, match="not a result of this script"):
        run(study_file(demo, tmp_path), output)
    assert (output / "study.json").read_text() == "[]"
    shutil.rmtree(output)


def test_a_script_that_breaks_ends_the_study(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run_child", lambda *args: 1)
    with pytest.raises(UserError, match=r"train_BiFlowNet_SingleRes.py ended with exit status 1, see .*output.txt"):
        run(study_file(demo, tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "study.json").read_text())["runs"] == []

"""What of a run may change when it goes on: one rule for both trainings."""

import os
import re
import shlex
import shutil
from pathlib import Path

import autoencoder_runs
import biflownet_runs as runs
import pytest
from biflownet_runs import assert_same_training, checkpoint
from user_errors import error_of

from common import checkpoint_files
from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.cli import parse_command_line
from config.schema.autoencoder import AutoencoderConfig
from config.schema.diffusion import BiFlowNetConfig
from dataset.order.draw_split import keep_or_draw
from train.autoencoder.training import train as train_autoencoder
from train.diffusion import run_folder
from train.loop.continuing import changes, config_of_other, news_of, read_config
from train.train_BiFlowNet_SingleRes import train


@pytest.fixture(scope="module")
def biflownet(latents, tmp_path_factory) -> Path:
    """A results folder with one run of two steps."""
    results = tmp_path_factory.mktemp("biflownet")
    train(runs.config(latents, results, max_steps=2))
    return results


@pytest.fixture(scope="module")
def stage_1(volumes, tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    train_autoencoder(autoencoder_runs.config(volumes, folder, "model.max_steps=2"), stage=1)
    return folder


# ------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("schema", "before", "now", "found"),
    [
        (BiFlowNetConfig, {}, {}, []),
        (BiFlowNetConfig, {"num_workers": 1, "AE_ckpt": None}, {"num_workers": 2, "AE_ckpt": "a"}, []),
        (BiFlowNetConfig, {"lr": 1.0}, {"lr": 2.0}, ["lr: 1.0 -> 2.0 CHANGES"]),
        (BiFlowNetConfig, {}, {"max_steps": 5}, ["max_steps: None -> 5 EXTENDS"]),
        (BiFlowNetConfig, {"dim_mults": [1]}, {"dim_mults": [1, 2]}, ["dim_mults: [1] -> [1, 2] IDENTITY"]),
        (BiFlowNetConfig, {"ckpt": "a.pt"}, {"ckpt": "b.pt"}, ["ckpt: a.pt -> b.pt BEGINNING"]),
        (BiFlowNetConfig, {"data_path": "a/../x.json"}, {"data_path": f"{os.getcwd()}/x.json"}, []),
        (AutoencoderConfig, {"model": {"lr": 1.0}}, {"model": {"lr": 1.0}, "dataset": {"imgtype": "MR"}}, []),
        (AutoencoderConfig, {"dataset": {}}, {"dataset": {"patch_size": 8}}, ["dataset.patch_size: 64 -> 8 IDENTITY"]),
        (AutoencoderConfig, {"model": {"gpus": 1}}, {"model": {"gpus": 2}}, ["model.gpus: 1 -> 2 EXTENDS"]),
    ],
)
def test_changes(schema, before, now, found):
    """What a configuration lacks, being older, was as the default says."""
    assert [f"{change} {change.resume.name}" for change in changes(schema, before, now)] == found


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"max_steps": 5}, "changed: max_steps: None -> 5"),
        (
            {"max_steps": 5, "lr_schedule": "cosine", "batch_size": 2},
            "changed: max_steps: None -> 5, batch_size: 16 -> 2, lr_schedule: constant -> cosine; "
            "a step has another number of samples, so the order of the data changes; the cosine has another length",
        ),
    ],
)
def test_what_the_log_says_of_changes(now, line):
    assert news_of(changes(BiFlowNetConfig, {}, now), now) == [line]


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"a: [", b"a: &a [*a]", b"\0"])
def test_a_damaged_configuration(tmp_path, content):
    """Of the run that was named it is an error; others are passed over."""
    assert read_config(tmp_path / "none") is None
    (tmp_path / "config.yaml").write_bytes(content)
    assert "config.yaml: cannot be read as the configuration of the run" in error_of(read_config, tmp_path)
    assert config_of_other(tmp_path) is None


# ------------------------------------------------------------------------------------------------------- BiFlowNet


def copy_of(biflownet: Path, tmp_path: Path) -> tuple[Path, Path]:
    results = shutil.copytree(biflownet, tmp_path / "results")
    return results, results / "000-BiFlowNet"


@pytest.mark.parametrize("way", ["same command", "run_name", "continue_from"])
def test_more_steps_just_go_on(latents, biflownet, tmp_path, way, capfd):
    results, run = copy_of(biflownet, tmp_path)
    values = {"same command": {}, "run_name": {"run_name": run.name}, "continue_from": {"continue_from": str(run)}}[way]
    assert train(runs.config(latents, results, max_steps=4, **values))["folder"] == run
    assert f"{run}: changed: max_steps: 2 -> 4" in (run / "log.txt").read_text()
    assert [path.name for path in results.iterdir()] == [run.name]
    straight = train(runs.config(latents, tmp_path / "straight", max_steps=4))["folder"]
    assert_same_training(checkpoint(run, 4), checkpoint(straight, 4))


def test_a_split_that_came_later_begins_another_run_and_says_so(tmp_path):
    data, results = runs.make_latents(tmp_path / "latents"), tmp_path / "results"
    train(runs.config(data, results, max_steps=1))
    keep_or_draw(data, {"validation": 0.2, "held_out": 0.2})
    run = train(runs.config(data, results, max_steps=1))["folder"]
    log = (run / "log.txt").read_text()
    assert run.name == "001-BiFlowNet"
    assert f"there are {results}/000-BiFlowNet (split: None -> {data.parent}/split.json): to go on" in log
    assert checkpoint(run, 1)["num_samples"] == 6  # of ten, two for validation and two held out
    assert train(runs.config(data, results, max_steps=2))["folder"] == run
    first = results / "000-BiFlowNet"
    assert train(runs.config(data, results, max_steps=2, split="none"))["folder"] == first
    assert train(runs.config(data, results, max_steps=3, continue_from=str(first)))["folder"] == first
    assert checkpoint(first, 3)["num_samples"] == 10
    keep_or_draw(data, {"seed": 1}, anew=True)
    assert "on another side" in error_of(train, runs.config(data, results, max_steps=3, run_name=run.name))


@pytest.mark.parametrize("way", ["run_name", "continue_from"])
def test_a_new_learning_rate_needs_a_word_and_is_listed(latents, biflownet, tmp_path, way):
    results, run = copy_of(biflownet, tmp_path)
    values = {"max_steps": 3, "lr": 0.01, "batch_size": 5}
    values |= {"run_name": run.name} if way == "run_name" else {"continue_from": str(run)}
    message = error_of(train, runs.config(latents, results, **values))
    assert f"{run} holds a run with other options: batch_size: 2 -> 5, lr: 0.0001 -> 0.01; add --set-anew" in message
    train(runs.config(latents, results, set_anew=True, **values))
    ended = checkpoint(run, 3)
    assert (ended["opt"]["param_groups"][0]["lr"], ended["global_batch"]) == (0.01, 5)
    log = (run / "log.txt").read_text()
    assert "changed: max_steps: 2 -> 3, batch_size: 2 -> 5, lr: 0.0001 -> 0.01; a step has another" in log
    del values["run_name" if way == "run_name" else "continue_from"]
    assert train(runs.config(latents, results, **values))["folder"] == run  # what it is now


def test_without_a_word_it_is_another_run_and_the_log_says_how_to_go_on(latents, biflownet, tmp_path):
    results, run = copy_of(biflownet, tmp_path)
    other = train(runs.config(latents, results, max_steps=1, lr=0.01))["folder"]
    assert other.name == "001-BiFlowNet"
    assert (
        f"{other}: a new run, from step 0; of the same data and networks there are {run} (max_steps: 2 -> 1, "
        f"lr: 0.0001 -> 0.01): to go on, add --continue-from {run} --set-anew"
    ) in (other / "log.txt").read_text()
    third = train(runs.config(latents, results, max_steps=1, model_dim=48))["folder"]
    assert "a new run" not in (third / "log.txt").read_text()  # other networks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_dim": 48}, "holds another run: model_dim: 24 -> 48; take these back, or for a new run"),
        ({"vq_size": 32, "lr": 1.0, "set_anew": True}, "holds another run: vq_size: 64 -> 32; take"),
        ({"ckpt": "{other}"}, "holds another run: ckpt: None -> {other}; take"),
    ],
)
def test_data_and_networks_make_another_run(latents, biflownet, tmp_path, values, message):
    results, run = copy_of(biflownet, tmp_path)
    other = shutil.copy(run_folder.checkpoint_path(run, 2), tmp_path / "other.pt")
    values = {key: value.format(other=other) if isinstance(value, str) else value for key, value in values.items()}
    refusal = error_of(train, runs.config(latents, results, continue_from=str(run), **values))
    assert f"{run} {message.format(other=other)}" in refusal
    assert refusal.endswith("leave --continue-from out")
    assert runs.logged_steps(run) == [1, 2]


def test_a_checkpoint_begins_another_run(latents, biflownet, tmp_path):
    """As `--ckpt` does; what differs is listed."""
    source = run_folder.checkpoint_path(biflownet / "000-BiFlowNet", 2)
    cfg = runs.config(latents, tmp_path, continue_from=str(source), max_steps=3, lr=0.01)
    run = train(cfg)["folder"]
    assert runs.logged_steps(run) == [3]
    assert (
        f"{source} was trained with other values; changed: max_steps: 2 -> 3, lr: 0.0001"
        in (run / "log.txt").read_text()
    )
    assert train(runs.config(latents, tmp_path, ckpt=str(source), max_steps=4, lr=0.01))["folder"] == run
    named = runs.config(latents, tmp_path, run_name=run.name, max_steps=5, lr=0.01)
    assert train(named)["folder"] == run  # where it began is past


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no such run folder or checkpoint file"), (".", "not the folder of a run: it has no checkpoints/")],
)
def test_what_is_no_run(latents, volumes, tmp_path, source, message):
    cfg = runs.config(latents, tmp_path, continue_from=str(tmp_path / source))
    assert f"continue_from: {tmp_path / source}: {message}" in error_of(train, cfg)
    cfg = autoencoder_runs.config(volumes, tmp_path / "run", f"model.continue_from={tmp_path / source}")
    assert message in error_of(train_autoencoder, cfg, 1)


def test_set_anew_needs_a_run(latents, biflownet):
    assert "say which, with --continue-from RUN" in error_of(train, runs.config(latents, biflownet, set_anew=True))


def test_the_command_alone_goes_on_with_a_runs_options(latents, biflownet, tmp_path):
    results, run = copy_of(biflownet, tmp_path)
    command = ["--continue-from", str(run), "--max-steps", "3"]
    train(parse_command_line(command, BiFlowNetConfig, "BiFlowNet_8x.yaml", ""))
    straight = train(runs.config(latents, tmp_path / "straight", max_steps=3))["folder"]
    assert_same_training(checkpoint(run, 3), checkpoint(straight, 3))


@pytest.mark.parametrize("damage", ["truncated", "inverted"])
def test_unreadable_checkpoints_are_no_reason_to_start_anew(latents, biflownet, tmp_path, damage):
    results, run = copy_of(biflownet, tmp_path)
    path = run_folder.checkpoint_path(run, 2)
    content = path.read_bytes()
    middle = len(content) // 2
    inverted = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content[:middle] + (inverted + content[middle + 64 :] if damage == "inverted" else b""))
    message = error_of(train, runs.config(latents, results, max_steps=4))
    assert f"{run / 'checkpoints'}: none of its checkpoints can be read: move the folder away to start anew" in message
    assert runs.logged_steps(run) == [1, 2]


DAMAGED = {
    "step": ("7", "step is '7', expected a whole number"),
    "epoch": (float("nan"), "epoch is nan, expected a whole number"),
    "samples_seen": ([1], "samples_seen is .1., expected a whole number"),
    "opt": ({"state": {0: {"exp_avg": 1}}, "param_groups": []}, "its optimiser state .opt. is damaged"),
    "rng": ({"cpu": [1]}, "its states of random numbers .rng. are damaged"),
}


def test_a_checkpoint_whose_parts_are_damaged(latents, biflownet, tmp_path):
    results, run = copy_of(biflownet, tmp_path)
    path = run_folder.checkpoint_path(run, 2)
    whole = load_checkpoint(path)
    for name, (value, message) in DAMAGED.items():
        save_checkpoint({**whole, name: value}, path)
        assert re.search(f"{path}: {message}", error_of(train, runs.config(latents, results, max_steps=4))), name


def test_latents_of_another_autoencoder_are_other_data(tmp_path):
    data = runs.make_latents(tmp_path)
    runs.write_records(data, "first")
    run = train(runs.config(data, tmp_path / "results", max_steps=2))["folder"]
    runs.write_records(data, "second")
    message = error_of(train, runs.config(data, tmp_path / "results", max_steps=4))
    assert "BiFlowNet_0000002.pt was trained on latents of another autoencoder than those of now" in message
    source = str(run_folder.checkpoint_path(run, 2))
    assert train(runs.config(data, tmp_path / "other", max_steps=3, ckpt=source))["step"] == 3


# ----------------------------------------------------------------------------------------------------- autoencoder


def test_the_autoencoder_goes_by_the_same_rule(volumes, stage_1, tmp_path, capsys):
    run = shutil.copytree(stage_1, tmp_path / "run")

    def options(*overrides: str):
        return autoencoder_runs.config(volumes, run, *overrides)

    message = error_of(train_autoencoder, options("model.adam_betas=[0.4,0.9]", "model.max_steps=3"), 1)
    assert "other options: model.adam_betas: [0.9, 0.99] -> [0.4, 0.9]; add --set-anew" in message
    message = error_of(train_autoencoder, options("model.n_codes=16", "model.set_anew=true"), 1)
    assert (
        "holds another run: model.n_codes: 32 -> 16; take these back, or for a new run name another model." in message
    )
    capsys.readouterr()
    train_autoencoder(options("model.adam_betas=[0.4,0.9]", "model.max_steps=3", "model.set_anew=true"), 1)
    assert f"{run}: changed: model.adam_betas: [0.9, 0.99] -> [0.4, 0.9], model.max_steps: 2 -> 3" in (
        capsys.readouterr().err
    )
    ended = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert [state["param_groups"][0]["betas"] for state in ended["optimizer_states"]] == [(0.4, 0.9)] * 2
    train_autoencoder(options("model.adam_betas=[0.4,0.9]", "model.max_steps=4"), 1)  # it is remembered


def test_an_autoencoders_checkpoint_whose_parts_are_damaged(volumes, stage_1, tmp_path):
    run = shutil.copytree(stage_1, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    whole = load_checkpoint(path)
    for other in set(path.parent.iterdir()) - {path}:
        other.unlink()
    loops = {"fit_loop": {"epoch_progress": {"total": {"ready": "1"}}}}
    damaged = {"global_step": ("2", "global_step is '2', expected a whole"), "loops": (loops, "its loops are damaged")}
    damaged["optimizer_states"] = ([{"state": {0: 1}, "param_groups": []}], "its optimizer_states are damaged")
    for name, (value, message) in damaged.items():
        save_checkpoint({**whole, name: value}, path)
        assert f"{path}: {message}" in error_of(
            train_autoencoder, autoencoder_runs.config(volumes, run, "model.max_steps=3"), 1
        )


def test_another_autoencoder_beside_is_told_of(volumes, stage_1, tmp_path, capsys):
    run = stage_1.parent / "other"
    train_autoencoder(autoencoder_runs.config(volumes, run, "model.max_steps=1", "model.seed=5"), 1)
    shutil.rmtree(run)
    assert (
        f"{run}: a new run, from step 0; of the same data and networks there are {stage_1} (model.max_steps: 2 -> 1, "
        f"model.seed: 0 -> 5): to go on, add --continue-from {stage_1} --set-anew"
    ) in capsys.readouterr().err


def test_continue_from_for_the_autoencoder(volumes, stage_1, tmp_path):
    """A folder to go on in, or a checkpoint for a new run, also of stage 2, which then needs no other."""
    run = shutil.copytree(stage_1, tmp_path / "run")
    command = [f"--continue-from={run}", "model.max_steps=3"]
    train_autoencoder(parse_command_line(command, AutoencoderConfig, None, ""), 1)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3

    last = run / "checkpoints" / "last.ckpt"
    small = ("model.batch_size=1", "model.val_every=100")
    stage_2 = autoencoder_runs.config(
        volumes, tmp_path / "two", *small, "model.max_steps=2", f"model.resume_from_checkpoint={last}", stage=2
    )
    train_autoencoder(stage_2, 2)
    source = tmp_path / "two" / "checkpoints" / "last.ckpt"
    branch = (*small, "model.max_steps=3", f"model.continue_from={source}")
    train_autoencoder(autoencoder_runs.config(volumes, tmp_path / "branch", *branch, stage=2), 2)
    last.unlink()  # stage 1 may go once stage 2 has begun
    train_autoencoder(autoencoder_runs.config(volumes, tmp_path / "two", *small, "model.max_steps=3", stage=2), 2)
    found = [autoencoder_runs.weights(tmp_path / name) for name in ("branch", "two")]
    autoencoder_runs.assert_same_weights(*found)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The names of the files that are loaded whole."""
    names, read = [], checkpoint_files._read

    def note(path: Path, mmap: bool) -> dict:
        names.extend([] if mmap else [Path(path).name])
        return read(path, mmap)

    monkeypatch.setattr(checkpoint_files, "_read", note)
    return names


def test_a_checkpoint_is_loaded_once(volumes, latents, biflownet, stage_1, tmp_path, loaded):
    """Where a run goes on in its folder, and where another begins from it: it may be gigabytes, on each rank."""
    run = shutil.copytree(stage_1, tmp_path / "run")
    for path in (run / "checkpoints").glob("[!l]*"):
        path.unlink()
    source = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "source.ckpt")
    train_autoencoder(autoencoder_runs.config(volumes, run, "model.max_steps=3"), stage=1)
    more = ("model.max_steps=3", f"model.continue_from={source}")
    train_autoencoder(autoencoder_runs.config(volumes, tmp_path / "branch", *more), stage=1)
    autoencoder_runs.assert_same_weights(*map(autoencoder_runs.weights, (run, tmp_path / "branch")))
    assert loaded[:2] == ["last.ckpt", "source.ckpt"]
    assert loaded[2:] == ["last.ckpt"] * 2  # by this test

    loaded.clear()
    results = shutil.copytree(biflownet, tmp_path / "results")
    source = shutil.copy(run_folder.list_checkpoints(results / "000-BiFlowNet")[-1], tmp_path / "source.pt")
    train(runs.config(latents, results, max_steps=3))
    train(runs.config(latents, tmp_path / "others", max_steps=3, ckpt=source))
    assert loaded == ["BiFlowNet_0000002.pt", "source.pt"]


def test_another_beginning_is_another_run(volumes, stage_1, tmp_path):
    run = shutil.copytree(stage_1, tmp_path / "run")
    own, other = run / "checkpoints" / "step-0000002.ckpt", stage_1 / "checkpoints" / "last.ckpt"
    more = "model.max_steps=3"
    message = error_of(
        train_autoencoder, autoencoder_runs.config(volumes, run, more, f"model.resume_from_checkpoint={other}"), 1
    )
    assert f"holds another run: model.resume_from_checkpoint: None -> {other}; take" in message
    train_autoencoder(autoencoder_runs.config(volumes, run, more, f"model.resume_from_checkpoint={own}"), 1)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_commands_of_the_documentation_are_understood():
    text = (runs.ROOT / "docs" / "training.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^python (train/.* --continue-from .*)$", text, re.MULTILINE)]
    read = []
    for script, *words in commands:
        schema = AutoencoderConfig if "PatchVolume" in script else BiFlowNetConfig
        cfg = parse_command_line(words, schema, None, "")
        cfg = cfg.model if schema is AutoencoderConfig else cfg
        read.append((script, cfg.continue_from, cfg.max_steps, cfg.set_anew, cfg.lr))
    assert read == [
        ("train/train_BiFlowNet_SingleRes.py", "results/000-BiFlowNet", 800000, False, 1e-4),
        ("train/train_BiFlowNet_SingleRes.py", "results/000-BiFlowNet", None, True, 5e-5),
        ("train/train_PatchVolume.py", "results/PatchVolume_8x", 1_000_000, True, 1e-4),
    ]

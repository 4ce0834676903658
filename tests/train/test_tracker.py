"""The option `logger`: MLflow with a store of files, and a stand-in for wandb, which note what both trainings log."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import autoencoder_runs
import biflownet_runs
import mlflow
import pytest
from mlflow.tracking import MlflowClient
from pytorch_lightning.loggers import wandb as lightning_wandb
from user_errors import error_of

from train.autoencoder.training import train as train_autoencoder
from train.loop import tracker
from train.train_BiFlowNet_SingleRes import train as train_biflownet


@pytest.fixture
def store(tmp_path, monkeypatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")  # MLFLOW_TRACKING_URI counts once a process
    return MlflowClient()


def one_class(folder: Path) -> Path:
    """Latents of one class: MLflow's store of files can't hold loss beside loss/class_0, its others can."""
    data = biflownet_runs.make_latents(folder / "latents")
    data.write_text('{"0": "class0_latents"}')
    return data


def logged(folder: Path, prefix: str = "") -> dict[str, dict[int, float]]:
    """What metrics.jsonl has: by name and step."""
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            found.setdefault(prefix + name, {})[record["step"]] = value
    del found[f"{prefix}step"]
    return found


def tracked(store: MlflowClient) -> tuple[str, dict[str, dict[int, float]]]:
    """Status and figures of the only run."""
    (experiment,) = [one for one in store.search_experiments() if one.name == tracker.PROJECT]
    (run,) = store.search_runs([experiment.experiment_id])
    histories = {name: store.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return run.info.status, {name: {one.step: one.value for one in of} for name, of in histories.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, of_step in expected.items():
        assert found[name] == pytest.approx(of_step, rel=1e-6), name


def test_biflownet_at_mlflow(store, tmp_path, monkeypatch):
    """A run that goes on is the same one there, with TensorBoard's names; a server that fails is a warning."""
    data = one_class(tmp_path)
    for steps in (2, 3):
        folder = train_biflownet(biflownet_runs.config(data, tmp_path, max_steps=steps, logger="mlflow"))["folder"]
    status, found = tracked(store)
    assert status == "FINISHED"
    assert found["train/loss"].keys() == {1, 2, 3}
    assert_same(found, logged(folder, "train/"))

    def fail(*_):
        raise ConnectionError("no route to\nhost")

    monkeypatch.setattr(tracker.MLFlowLogger, "log_metrics", fail)
    train_biflownet(biflownet_runs.config(data, tmp_path, max_steps=5, logger="mlflow"))
    warnings = [line for line in (folder / "log.txt").read_text().splitlines() if "warning: logger" in line]
    assert [line.split("warning: ")[1] for line in warnings] == [
        "logger: mlflow gets no more of this run: no route to host"
    ]


def test_the_autoencoder_at_mlflow(store, tmp_path):
    data = autoencoder_runs.make_data(tmp_path)
    for steps in (2, 3):
        options = ("model.logger=mlflow", f"model.max_steps={steps}", "model.perceptual_weight=0")
        train_autoencoder(autoencoder_runs.config(data, tmp_path / "run", *options), 1)
    _, found = tracked(store)
    assert found["train/recon_loss"].keys() == {1, 2, 3}
    assert_same(found, logged(tmp_path / "run"))


def test_biflownet_at_wandb(tmp_path, monkeypatch):
    begun, noted, ended = [], [], []

    class Run:
        def __init__(self, **options) -> None:
            begun.append(options)
            self.id, self.config = options["id"], SimpleNamespace(update=lambda *_, **__: None)
            self.log, self.finish = noted.append, lambda exit_code: ended.append(exit_code)

        def define_metric(self, *_, **__) -> None:
            pass

    modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
    modules["wandb"].init, modules["wandb"].run = Run, None
    modules["wandb.sdk.lib"].RunDisabled, modules["wandb.wandb_run"].Run = type("RunDisabled", (), {}), Run
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setattr(tracker, "find_spec", lambda name: name)
    data = biflownet_runs.make_latents(tmp_path / "latents")
    for steps in (2, 3):
        folder = train_biflownet(biflownet_runs.config(data, tmp_path, max_steps=steps, logger="wandb"))["folder"]
    first, second = begun
    assert (first["project"], first["name"], first["resume"]) == (tracker.PROJECT, "000-BiFlowNet", "allow")
    assert first["id"] == second["id"] == json.loads((folder / tracker.RECORD).read_text())["wandb"]
    by_step = {record["trainer/global_step"]: record["train/loss"] for record in noted}
    assert by_step == pytest.approx(logged(folder)["loss"], rel=1e-6)
    assert ended == [0, 0]


def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch):
    data = biflownet_runs.make_latents(tmp_path / "latents")
    mlflow.set_tracking_uri("nowhere://server")
    found = error_of(train_biflownet, biflownet_runs.config(data, tmp_path, logger="mlflow"))
    assert found.startswith("logger: mlflow can't begin: ")
    assert "nowhere" in found
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    cfg = autoencoder_runs.config(autoencoder_runs.make_data(tmp_path), tmp_path / "run", "model.logger=wandb")
    found = error_of(lambda: train_autoencoder(cfg, 1))
    assert found == "logger: wandb is not installed here: pip install wandb, or leave logger at tensorboard"
    assert not (tmp_path / "run").exists()

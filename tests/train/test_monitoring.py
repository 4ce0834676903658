"""What a training run reports besides its losses: speed, waiting, memory, use of the codebook, early warnings."""

import gc
import json
import re
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import biflownet_runs as runs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from AutoEncoder.model.codebook import Codebook, codebook_usage, perplexity
from common.memory import resident_memory_gb
from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.volume_io import write_volume
from dataset.vqgan_4x import VQGANDataset_4x
from train import train_BiFlowNet_SingleRes as biflownet
from train.autoencoder import training as autoencoder_training
from train.loop import meter as meter_module
from train.loop.early_warnings import DATA_BOUND, CodebookCollapse, DataBound, DiscriminatorWins, Onset
from train.loop.meter import LoopMeter
from train.loop.metrics_file import JsonLines, MetricsWriter

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = (
    "model.n_codes=32 model.lr_schedule=constant model.disc_channels=4 model.batch_size=2 model.num_workers=0 "
    "model.codebook_init_step=0 model.discriminator_iter_start=2 model.checkpoint_every=1000 model.log_volume_every=0 "
    "dataset.patch_size=8 dataset.cache=none"
).split()


# ---------------------------------------------------------------------------------------------------------- the meter


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(meter_module.time, "perf_counter", lambda: self.now)

    def slow(self, items, seconds: float):
        for item in items:
            self.now += seconds
            yield item


def test_rates_and_waiting_by_hand(monkeypatch):
    clock = Clock(monkeypatch)
    meter = LoopMeter()
    for _ in meter.timed(clock.slow(range(4), 0.5)):
        clock.now += 2.0  # the step
        meter.count(6)
    clock.now += 6.0  # a validation
    scalars = meter.read(CPU)
    assert scalars["steps_per_s"] == 4 / 16
    assert scalars["samples_per_s"] == 24 / 16
    assert scalars["data_wait"] == 2 / 16

    clock.now += 5.0  # the next interval knows nothing of the first
    meter.count(10)
    scalars = meter.read(CPU)
    assert (scalars["steps_per_s"], scalars["samples_per_s"], scalars["data_wait"]) == (0.2, 2.0, 0.0)
    assert "gpu_memory_gb" not in scalars


def test_of_all_ranks_the_one_that_waits_longest_and_needs_most_counts(monkeypatch):
    clock = Clock(monkeypatch)
    meter = LoopMeter()
    clock.now += 4.0
    given = []

    def maximum(values):
        given.append(values.tolist())
        return torch.tensor([0.75, 123.0])

    scalars = meter.read(CPU, maximum)
    assert (scalars["data_wait"], scalars["memory_gb"]) == (0.75, 123.0)
    assert given[0][0] == 0.0
    assert 0.01 < given[0][1] < 100


def test_timed_batches_are_the_same_and_can_be_repeated_but_not_kept():
    batches = LoopMeter().timed([torch.ones(1), torch.ones(2)])
    assert len(batches) == 2
    assert [len(batch) for batch in batches] == [len(batch) for batch in batches] == [1, 2]

    iterator = iter(LoopMeter().timed(torch.ones(index) for index in range(3)))
    batch = weakref.ref(next(iterator))
    assert batch() is None


def test_memory_is_that_of_the_process(monkeypatch):
    before = resident_memory_gb()
    block = np.ones(25_000_000)
    assert resident_memory_gb() - before == pytest.approx(block.nbytes / 1e9, rel=0.1)
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: _raise(FileNotFoundError))
    assert resident_memory_gb() is None
    assert "memory_gb" not in LoopMeter().read(CPU)


def _raise(error: type) -> None:
    raise error


# ----------------------------------------------------------------------------------------------------- early warnings


@pytest.mark.parametrize(
    ("patience", "readings", "begins"),
    [
        (1, "0110100", "0100100"),
        (2, "0101011", "0000001"),
        (2, "1110111", "0100000"),  # one reading does not end the state
        (2, "1100110", "0100010"),
        (3, "1111111", "0010000"),
    ],
)
def test_a_state_begins_once(patience, readings, begins):
    onset = Onset(patience)
    assert "".join(str(int(onset.begins(reading == "1"))) for reading in readings) == begins


def test_data_bound_after_three_intervals():
    check = DataBound("raise model.num_workers (now 2)").check
    found = [check(wait) for wait in (0.9, 0.2, 0.5, 0.31, 0.46, 0.9, 0.9)]
    assert [message is not None for message in found] == [False] * 4 + [True] + [False] * 2
    assert found[4] == (
        "data bound: training waits for its next batch in 46% of the time, and over 30% in 3 logged steps in a row: "
        "raise model.num_workers (now 2)"
    )
    assert [DataBound("").check(0.3) for _ in range(5)] == [None] * 5


def test_codebook_collapse_after_enough_tokens():
    collapse = CodebookCollapse()
    counts = torch.zeros(100)
    counts[:4] = 100.0
    found = [collapse.check(counts) for _ in range(9)]  # judged at each 1,000 tokens, so at every third; two in a row
    assert [message is not None for message in found] == [False] * 5 + [True] + [False] * 3
    assert "the last 1200 tokens used 4.0% of its 100 codes (perplexity 4)" in found[5]
    assert "model.no_random_restart=false" in found[5]

    healthy = CodebookCollapse()
    counts[4] = 1.0  # 5 %
    assert [healthy.check(counts) for _ in range(9)] == [None] * 9
    background = torch.ones(100)
    background[0] = 1e6  # a perplexity near 1, and yet every code is in use
    assert CodebookCollapse().check(background) is None


@pytest.mark.parametrize(
    ("loss_type", "won", "balanced"),
    [("hinge", 0.099, 0.101), ("vanilla", 0.069, 0.070)],  # a tenth of 1 and of ln 2
)
def test_discriminator_wins_after_five_readings(loss_type, won, balanced):
    check = DiscriminatorWins(loss_type).check
    found = [check(loss, 1.5, -1.25) for loss in (won, won, won, balanced, *[won] * 7)]
    assert [message is not None for message in found] == [False] * 8 + [True] + [False] * 2
    assert f"its loss is {won:.3g} (below" in found[8]
    assert "mean logits 1.5 for volumes and -1.25 for reconstructions" in found[8]
    assert "model.volume_gan_weight" in found[8]
    assert [check(balanced, 1.5, -1.25) for _ in range(9)] == [None] * 9


# -------------------------------------------------------------------------------------------------------- autoencoder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Five volumes of 16³, as a dataset JSON: four for training, so two batches an epoch."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for i in range(5):
        volume = torch.rand(1, 16, 16, 16, generator=generator) * 1.8 - 0.9
        write_volume(root / "box" / f"{i}.nii.gz", volume, np.eye(4))
    (root / "data.json").write_text(json.dumps({"box": "box"}))
    return root / "data.json"


def autoencoder_config(volumes: Path, folder: Path, *overrides: str) -> DictConfig:
    paths = [f"dataset.root_dir={volumes}", f"model.default_root_dir={folder}"]
    return load_config(AutoencoderConfig, ROOT / "config" / "demo" / "PatchVolume.yaml", [*TINY, *paths, *overrides])


def train_autoencoder(monkeypatch, cfg: DictConfig, callback: pl.Callback | None = None) -> dict:
    original = autoencoder_training.build_trainer

    def with_callback(*args):
        trainer = original(*args)
        trainer.callbacks.append(callback)
        return trainer

    with monkeypatch.context() as patch:
        if callback is not None:
            patch.setattr(autoencoder_training, "build_trainer", with_callback)
        return autoencoder_training.train(cfg, stage=1)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Witness(pl.Callback):
    """Measures what is logged by itself."""

    def __init__(self) -> None:
        self.norms: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(tuple(_gradient_norm(optimizer) for optimizer in trainer.optimizers))


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item() if gradients else 0.0


def test_autoencoder_logs_to_json_lines_what_tensorboard_gets(volumes, tmp_path, monkeypatch):
    counts, update = [], Codebook._update

    def spy(self, vectors, codes, of_batch):
        counts.append(of_batch.clone())
        update(self, vectors, codes, of_batch)

    monkeypatch.setattr(Codebook, "_update", spy)
    witness = Witness()
    cfg = autoencoder_config(volumes, tmp_path, "model.max_steps=6", "model.log_every=2", "model.val_every=3")
    metrics = train_autoencoder(monkeypatch, cfg, witness)
    lines = lines_of(tmp_path)
    trained = [line for line in lines if "train/recon_loss" in line]
    validated = [line for line in lines if "val/recon_loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 6]
    assert [line["step"] for line in validated] == [3, 6]
    assert len(lines) == 5
    assert validated[-1]["val/recon_loss"] == pytest.approx(metrics["val/recon_loss"], rel=1e-6)

    board = EventAccumulator(str(tmp_path / "logs")).Reload()
    names = {name for line in lines for name in line} - {"step"}
    assert names == set(board.Tags()["scalars"]) - {"hp_metric"}
    for name in names:
        expected = [(line["step"] - 1, line[name]) for line in lines if name in line]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)

    expected_names = "recon_loss grad_norm_generator steps_per_s samples_per_s data_wait memory_gb lr codebook_usage"
    for line in trained:
        assert {f"train/{name}" for name in expected_names.split()} <= line.keys()
        assert line["train/samples_per_s"] == pytest.approx(2 * line["train/steps_per_s"], rel=1e-5)
        assert 0 < line["train/data_wait"] < 1
        assert line["train/lr"] == pytest.approx(cfg.model.lr)
        seen = counts[line["step"] - 2] + counts[line["step"] - 1]
        assert line["train/codebook_usage"] == pytest.approx(codebook_usage(seen), rel=1e-6)
        assert line["train/codebook_perplexity"] == pytest.approx(perplexity(seen), rel=1e-6)
    # the discriminator's turns are steps 4 and 6, the generator's last ones before them 3 and 5
    assert "train/grad_norm_discriminator" not in trained[0]
    for line in trained[1:]:
        assert line["train/grad_norm_generator"] == pytest.approx(witness.norms[line["step"] - 2][0], rel=1e-5)
        assert line["train/grad_norm_discriminator"] == pytest.approx(witness.norms[line["step"] - 1][1], rel=1e-5)


def test_a_resumed_autoencoder_logs_each_step_once(volumes, tmp_path, monkeypatch):
    """Lines after the last checkpoint are those of lost steps."""
    options = ["model.log_every=1", "model.val_every=2"]
    train_autoencoder(monkeypatch, autoencoder_config(volumes, tmp_path, "model.max_steps=2", *options))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/recon_loss": 1.0}\n{"step": 4, "tr')
    before = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]]
    train_autoencoder(monkeypatch, autoencoder_config(volumes, tmp_path, "model.max_steps=4", *options))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 2, 3, 4, 4]
    assert lines_of(tmp_path)[:3] == before
    assert lines_of(tmp_path)[3]["train/recon_loss"] != 1.0


SLEEP_S = 0.15


def test_waiting_for_a_slow_data_set_is_measured_and_warned_of(volumes, tmp_path, monkeypatch, capsys):
    """Two items of 0.15 s a batch, and validations of one item of 0.3 s, which are no waiting."""
    read = VQGANDataset_4x.__getitem__

    def slow(self, key):
        time.sleep(SLEEP_S if self.training else 2 * SLEEP_S)
        return read(self, key)

    monkeypatch.setattr(VQGANDataset_4x, "__getitem__", slow)
    cfg = autoencoder_config(volumes, tmp_path, "model.max_steps=8", "model.log_every=1", "model.val_every=1")
    train_autoencoder(monkeypatch, cfg)
    lines = [line for line in lines_of(tmp_path) if "train/lr" in line]
    waiting = [line["train/data_wait"] / line["train/steps_per_s"] for line in lines]
    assert len(waiting) == 8
    assert min(waiting) > 2 * SLEEP_S * 0.999
    assert np.median(waiting) < 4 * SLEEP_S
    text = capsys.readouterr().err
    # a busy machine computes for longer than it waits in some steps: the third bound one in a row is what warns
    bound = [line["train/data_wait"] > DATA_BOUND for line in lines]
    third = next(step for step in range(3, 9) if all(bound[step - 3 : step]))
    assert text.count(f"warning: step {third}: data bound: training waits") == text.count("data bound") == 1
    assert "raise model.num_workers (now 0), keep the volumes in a cache (dataset.cache, now none)" in text


class CountTensors(pl.Callback):
    """Living tensors and Python objects after some steps."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 10 == 0:
            self.counts.append(living_tensors())


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_accumulates_in_the_autoencoders_training(volumes, tmp_path, monkeypatch):
    witness = CountTensors()
    options = ["model.max_steps=30", "model.log_every=2", "model.val_every=5", "model.discriminator_iter_start=4"]
    train_autoencoder(monkeypatch, autoencoder_config(volumes, tmp_path, *options), witness)
    # at 10 there are no three best checkpoints yet; counts of codes are kept until there are enough of them
    assert abs(witness.counts[1] - witness.counts[2]) <= 1, witness.counts


# ---------------------------------------------------------------------------------------------------------- BiFlowNet


def test_biflownet_logs_its_speed_and_nothing_accumulates(latents, tmp_path, monkeypatch, capfd):
    counts, write = [], MetricsWriter.write

    def count(self, step, scalars):
        write(self, step, scalars)
        counts.append(living_tensors())

    monkeypatch.setattr(MetricsWriter, "write", count)
    folder = biflownet.train(runs.config(latents, tmp_path, max_steps=15, log_every=5, ckpt_every=15))["folder"]
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == [5, 10, 15]
    for line in lines:
        names = {"step", "loss", "lr", "grad_norm", "steps_per_s", "samples_per_s", "data_wait", "memory_gb"}
        assert line.keys() == names | {"loss/class_0", "loss/class_1"}
        assert line["samples_per_s"] == pytest.approx(2 * line["steps_per_s"])
        assert 0 < line["data_wait"] < 1
        assert 0.01 < line["memory_gb"] < 100
    assert re.search(r"step 0000015 epoch 2 loss .* data_wait 0\.\d+ memory_gb", capfd.readouterr().err)
    assert counts[1] == counts[2], counts


def test_biflownet_warns_of_waiting(latents, tmp_path, monkeypatch, capfd):
    read = Singleres_dataset.__getitem__

    def slow(self, key):
        time.sleep(0.3)
        return read(self, key)

    monkeypatch.setattr(Singleres_dataset, "__getitem__", slow)
    biflownet.train(runs.config(latents, tmp_path, max_steps=4, cache="none"))
    text = capfd.readouterr().err
    assert text.count("warning: step 3: data bound: training waits for its next batch in ") == 1
    assert text.count("data bound") == 1
    assert "raise num_workers (now 0), or set cache=float32 (now none)" in text


@pytest.mark.parametrize(("gpu_is_done", "expected"), [(None, 0.05), (True, 0.05), (False, 0.0)])
def test_waiting_while_a_gpu_still_works_loses_nothing(monkeypatch, gpu_is_done, expected):
    event = None if gpu_is_done is None else SimpleNamespace(query=lambda: gpu_is_done)
    monkeypatch.setattr(meter_module, "work_given_to_gpu", lambda **_: event)
    loop = LoopMeter()
    waited = []
    monkeypatch.setattr(loop, "add_waiting", waited.append)
    list(loop.timed(slowly(1, 0.05)))
    assert sum(waited) >= expected
    assert bool(waited) == (expected > 0)


def slowly(count: int, seconds: float):
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_what_is_not_finite_is_null_in_json(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(1, {"grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5})
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": null, "lr": 0.5}\n'

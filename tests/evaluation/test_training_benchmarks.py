"""The benchmarks of training, of the codebook and of writing: they run, compare first, and count what they say."""

import json
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from AutoEncoder.model.codebook import Codebook
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.errors import UserError
from evaluation.benchmark import main
from evaluation.benchmarks import autoencoder, biflownet, codebook, measuring, scaling, write
from evaluation.benchmarks import running as benchmark
from evaluation.benchmarks.measuring import count_flops, kept_gb, matmul_rate, relative_error
from train import train_BiFlowNet_SingleRes, train_PatchVolume

STEP_WAYS = ["plain", "float32", "float32 channels last", "bf16", "bf16 channels last"]


def run(tmp_path, *words: str) -> dict:
    main([*words, "--size", "tiny", "--repetitions", "1", "--json", str(tmp_path / "r.json")])
    return json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize(
    ("part", "ways"),
    [
        ("biflownet", [*STEP_WAYS, "bf16 checkpointing"]),
        ("autoencoder", [*STEP_WAYS, "bf16 channels last checkpointing"]),
    ],
)
def test_training_steps(tmp_path, monkeypatch, part, ways):
    monkeypatch.setattr(measuring, "matmul_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(measuring, "copy_rate", lambda device: 1e15)
    words = ["--no-perceptual"] if part == "autoencoder" else []
    found = run(tmp_path, part, "--device", "cpu", "--batch-size", "2", *words)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ways
    assert rows["plain"]["difference"] == 0
    assert all(
        row["difference"] < (2e-3 if "float32" in name else 0.3) for name, row in rows.items() if name != "plain"
    )
    assert rows["bf16"]["difference"] > 1e-3  # so it is in half precision
    flops = float(found["floating point operations"])
    assert rows["plain"]["limit_share"] == pytest.approx(flops / rows["plain"]["seconds"][0] / 1e12, rel=1e-2)
    kept = found["kept for backward, GB a sample"]
    assert kept[ways[-1]] < kept["bf16"] < kept["plain"]


@pytest.mark.parametrize("part", ["biflownet", "autoencoder"])
def test_no_step_is_timed_where_gradients_differ(monkeypatch, part):
    module, name = {"biflownet": (biflownet, "gradients"), "autoencoder": (autoencoder, "gradients")}[part]
    calls, right = [], module.gradients

    def wrong_the_second_time(*modules: nn.Module) -> torch.Tensor:
        calls.append(1)
        found = right(*modules)
        return found if len(calls) <= {"biflownet": 1, "autoencoder": 2}[part] else found.flip(0)

    monkeypatch.setattr(module, name, wrong_the_second_time)
    monkeypatch.setattr(measuring, "in_turn", None)
    with pytest.raises(UserError, match="float32: differs from the plain way by .*nothing was timed"):
        main([part, "--size", "tiny", "--device", "cpu", *(["--no-perceptual"] if part == "autoencoder" else [])])


@pytest.mark.parametrize("loss", ["_generator_loss", "_discriminator_loss"])
def test_the_autoencoders_parity_sees_a_loss_of_another_weight(monkeypatch, loss):
    right = getattr(patchvolumeAE, loss)
    monkeypatch.setattr(patchvolumeAE, loss, lambda model, x: 1.1 * right(model, x))
    monkeypatch.setattr(measuring, "in_turn", None)
    with pytest.raises(UserError, match="float32: differs from the plain way by 0.07"):
        main(["autoencoder", "--size", "tiny", "--device", "cpu", "--no-perceptual"])


def test_codebook(tmp_path):
    found = run(tmp_path, "codebook", "--device", "cpu")
    plain, ours = found["rows"]
    assert (plain["name"], ours["name"], ours["tokens"]) == ("plain", "ours", 128)
    assert 0 <= ours["difference"] < 1e-3


def test_no_codebook_is_timed_where_the_codes_differ(monkeypatch):
    monkeypatch.setattr(Codebook, "nearest", lambda self, vectors: torch.zeros(len(vectors), dtype=torch.long))
    monkeypatch.setattr(codebook, "in_turn", None)
    with pytest.raises(UserError, match="ours: differs from the plain way"):
        main(["codebook", "--size", "tiny", "--device", "cpu"])


def test_convolution(tmp_path):
    plain, ours = run(tmp_path, "convolution")["rows"]
    assert (plain["name"], ours["name"]) == ("patches of 16³, torch", "patches of 16³, ours")
    assert 0 < ours["difference"] < 1e-4  # another kernel than torch's, the same gradients


def test_write(tmp_path):
    rows = run(tmp_path, "write", "--folder", str(tmp_path))["rows"]
    assert [row["name"] for row in rows] == ["plain", "float32", "int16"]
    assert [row["difference"] for row in rows[:2]] == [0, 0]
    assert 0 < rows[2]["difference"] < 1.6e-5
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_no_write_is_timed_where_voxels_differ(monkeypatch):
    right = write.write_volume
    monkeypatch.setattr(write, "write_volume", lambda path, volume, *rest: right(path, volume.flip(1), *rest))
    monkeypatch.setattr(write, "in_turn", None)
    with pytest.raises(UserError, match="voxels differ by up to .*nothing was timed"):
        main(["write", "--size", "tiny"])


@pytest.mark.parametrize(
    ("loop", "script"), [("biflownet", train_BiFlowNet_SingleRes), ("autoencoder", train_PatchVolume)]
)
def test_scaling(tmp_path, monkeypatch, loop, script):
    """The commands are those of the training scripts: run here, by one process, as starting more takes long.

    The demo's configs with smaller grids and batches.
    """
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "BiFlowNet.yaml").write_text(
        "defaults: [/demo/BiFlowNet, _self_]\nresolution: [8, 8, 8]\nbatch_size: 1\n"
    )
    (tmp_path / "demo" / "PatchVolume.yaml").write_text(
        "defaults: [/demo/PatchVolume, _self_]\nmodel: {batch_size: 1, num_workers: 0, n_codes: 32}\n"
    )
    monkeypatch.setattr(scaling, "CONFIG_FOLDER", tmp_path)
    asked, turn = [], threading.Lock()

    def run_here(command, **options):
        launcher, (path, *words) = command[:6], command[6:]
        assert Path(script.__file__) == scaling.ROOT / path
        with turn:
            asked.append(launcher[-1])
            script.main(words)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(scaling.subprocess, "run", run_here)
    found = run(tmp_path, "scaling", "--device", "cpu", "--loop", loop, "--processes", "2")
    assert asked == ["1", "2", "1", "1"]
    one, several, runs = found["rows"]
    assert (one["name"], several["name"], runs["name"]) == ("1 process", "2 processes", "2 runs")
    assert found["share of the ideal"] == pytest.approx(one["seconds"][0] / several["seconds"][0] / 2, abs=1e-3)
    expected = runs["seconds"][0] / several["seconds"][0]
    assert found["share of runs that exchange nothing"] == pytest.approx(expected, abs=1e-3)


def test_rates_of_runs_add_up(tmp_path, monkeypatch):
    def write_rate(command, **options):
        folder = tmp_path / command[-1]
        folder.mkdir()
        lines = [{"step": 4, "a": 1}, {"step": 8, "train/samples_per_s": 3.0 if folder.name == "run0" else 5.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(scaling.subprocess, "run", write_rate)
    assert scaling._seconds_per_sample(["script.py", "{run}"], tmp_path, 4, 2, 1) == pytest.approx(1 / 8)


def test_a_script_that_fails_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"train_nothing.py: failed with 1 processes: .*No such file"):
        scaling._seconds_per_sample(["train/train_nothing.py"], tmp_path, 4, 1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["biflownet", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["biflownet", "--grid", "8", "8", "12"], r"--grid \(8, 8, 12\): multiples of \(8, 8, 8\) are needed"),
        (["autoencoder", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["scaling", "--processes", "1"], "processes must be at least 2, got 1"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserError, match=message):
        main([words[0], "--size", "tiny", "--device", "cpu", *words[1:]])


def test_operations_are_counted():
    layer = nn.Conv3d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 4, 4, 4)
    forward = 2 * 2 * 3 * 27 * 64
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * forward  # x needs no gradient


def test_kept_memory():
    """What relu keeps is the second layer's input too, and counts once; weights don't."""
    first, second = nn.Linear(8, 1000), nn.Linear(1000, 4)
    weights = [*first.parameters(), *second.parameters()]
    x = torch.randn(16, 8)
    expected = (16 * 1000 + 16 * 8) * 4 / 1e9
    assert kept_gb(lambda: second(torch.relu(first(x))).sum().backward(), weights) == pytest.approx(expected, rel=1e-6)


def test_rate_of_a_matrix_product(monkeypatch):
    seconds = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(measuring, "timed", lambda way, device: way() is not None and next(seconds))
    assert matmul_rate(torch.device("cpu")) == 2 * 2048**3 / 2


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_columns_that_nothing_fills_are_not_shown(capsys):
    rows = [measuring.Row("plain", [1.0], 1), measuring.Row("ours", [0.5], 1, limit_share=0.25)]
    benchmark._show(measuring.Report("", "items", "plain", rows))
    shown = capsys.readouterr().out
    assert "of limit" in shown
    assert "0.25" in shown
    assert "peak GB" not in shown

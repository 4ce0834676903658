"""Evaluation of autoencoders: its numbers, going on after an interruption, several processes."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reconstruction_runs import (
    NAMES,
    NUM_SCALES,
    NUM_VOLUMES,
    PATCH,
    SIZES,
    config,
    figures,
    made_up,
    save_data,
    save_stages,
    table,
    write,
)

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.codebook import codebook_usage, perplexity
from dataset.volumes.intensity import foreground
from dataset.volumes.volume_io import read_volume
from evaluation.autoencoding import reconstruction
from evaluation.autoencoding.measures import COUNTS, VOLUME_METRICS, measure, reconstruct, summarise
from evaluation.autoencoding.reconstruction import evaluate
from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.reconstruction import l1, ms_ssim, psnr, ssim
from evaluation.metrics.seams import seam_index
from evaluation.metrics.units import Units

ROOT = Path(__file__).parents[2]
LITTLE = 8_000_000  # bytes: enough for small blocks only


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    return save_stages(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(data, checkpoints, tmp_path_factory) -> Path:
    """The folder of an evaluation of both checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(config(data, checkpoints, folder))
    return folder


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def expected(path: Path, checkpoint: str, num_scales: int) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of a volume, and counts of its codes, from the autoencoder's own way to reconstruct."""
    autoencoder = load_autoencoder(checkpoint)
    x = read_volume(path).data
    y = autoencoder.reconstruct(x[None])[0].clamp(-1, 1)
    mask = foreground(x)
    codes = autoencoder.patch_encode(x[None], quantize=True)[0]
    codes = codes[tuple(slice(-(-extent // 4)) for extent in x.shape[1:])]
    counts = torch.bincount(codes.flatten(), minlength=32)
    return {
        "psnr": psnr(x, y),
        "psnr_foreground": psnr(x[mask], y[mask]),
        "l1": l1(x, y),
        "l1_foreground": l1(x[mask], y[mask]),
        "ssim": ssim(x, y),
        "ms_ssim": ms_ssim(x, y, num_scales=num_scales),
        "seam_ratio": seam_index(y, PATCH) / seam_index(x, PATCH),
        "volume_perplexity": perplexity(counts),
    }, counts


# ------------------------------------------------------------------------------------------------------------- numbers


def test_volumes_and_figures_are_those_of_the_autoencoder(data, checkpoints, finished):
    rows, found = table(finished), figures(finished)
    assert len(rows) == 2 * NUM_VOLUMES
    for group, sizes in SIZES.items():
        values: dict[str, dict[str, list[float]]] = {}
        for model, checkpoint in zip(("stage1", "stage2"), checkpoints, strict=True):
            total = torch.zeros(32)
            for i in range(len(sizes)):
                path = data.parent / group / f"scan_{i}.nii.gz"
                (row,) = [r for r in rows if r["file"] == str(path) and r["model"] == model]
                wanted, counts = expected(path, checkpoint, num_scales=NUM_SCALES[group])
                total += counts
                assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
                assert (row["group"], row["lpips"]) == (group, "")
                for name, value in wanted.items():
                    values.setdefault(name, {}).setdefault(model, []).append(value)
            for name, of_model in values.items():
                figure = found[group, name, model]
                numbers = torch.tensor(of_model[model], dtype=torch.float64)
                assert figure["value"] == pytest.approx(numbers.mean().item(), rel=1e-4, abs=1e-6)
                assert figure["std"] == pytest.approx(numbers.std().item(), rel=1e-3, abs=1e-5)
                assert figure["num"] == {"volumes": len(sizes)}
                if len(sizes) < 3:
                    assert (figure["interval"], figure["no_interval"]) == (None, "n too small")
                    continue
                interval = bootstrap_interval(lambda i, n=numbers: n[i].mean().item(), [len(sizes)], num_resamples=20)
                assert figure["interval"] == pytest.approx(interval, rel=1e-3, abs=1e-5)
            assert found[group, "codebook_usage", model]["value"] == codebook_usage(total)
            assert found[group, "codebook_perplexity", model]["value"] == pytest.approx(perplexity(total))
        for name, of_model in values.items():
            difference = found[group, name, "stage2 minus stage1"]
            paired = torch.tensor(of_model["stage2"], dtype=torch.float64) - torch.tensor(of_model["stage1"])
            assert difference["value"] == pytest.approx(paired.mean().item(), abs=1e-4)
            assert difference["std"] == pytest.approx(paired.std().item(), abs=1e-4)
    assert abs(found["Head", "psnr", "stage2 minus stage1"]["value"]) > 1e-3  # the decoders differ
    assert found["Chest", "codebook_usage", "stage2 minus stage1"]["interval"] == [0, 0]  # the encoders don't


@pytest.mark.parametrize("size", [(24, 24, 24), (32, 24, 36)])
def test_reconstruction_in_little_memory_is_that_of_one_pass(checkpoints, size, monkeypatch):
    autoencoder = load_autoencoder(checkpoints[0])
    volume = made_up(size, 3)
    batches = []
    encode = autoencoder.encode
    monkeypatch.setattr(autoencoder, "encode", lambda x, **k: batches.append(len(x)) or encode(x, **k))
    found, codes = reconstruct(autoencoder, volume, max_bytes=LITTLE)
    monkeypatch.undo()
    whole = autoencoder.reconstruct(volume[None])[0]
    assert found.shape == volume.shape
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert list(codes.shape) == [-(-extent // 4) for extent in size]
    assert max(batches) <= 8
    with pytest.raises(ValueError, match="smallest blocks"):
        reconstruct(autoencoder, volume, max_bytes=1000)


def test_what_cannot_be_measured_is_left_out():
    x = made_up((12, 12, 12), 0)
    metrics = measure(x, x + 0.01, torch.ones(4), PATCH, None, None)
    assert {name for name, value in metrics.items() if math.isnan(value)} == {"ssim", "ms_ssim", "lpips", "seam_ratio"}
    assert math.isnan(measure(x, torch.zeros_like(x), torch.ones(4), 4, None, None)["seam_ratio"])  # constant
    smooth = torch.tensor([-1.0, 1.0, -1.0, -1.0]).repeat(3).expand(1, 12, 12, 12)  # no difference at any border of 4
    assert math.isnan(measure(smooth, x, torch.ones(4), 4, None, None)["seam_ratio"])
    beyond = measure(x, x.sign() * 5, torch.ones(4), 4, None, None)
    assert beyond["l1"] == pytest.approx(measure(x, x.sign(), torch.ones(4), 4, None, None)["l1"])  # clipped


def arrays(psnr_value: float, seam: float = 1.0) -> dict[str, np.ndarray]:
    values = dict.fromkeys(VOLUME_METRICS, 1.0) | {"psnr": psnr_value, "lpips": math.nan, "seam_ratio": seam}
    return {**{name: np.asarray(value) for name, value in values.items()}, COUNTS: np.array([1, 3])}


def test_a_volume_reproduced_exactly_has_no_interval():
    results = {"A": [arrays(math.inf), arrays(30, seam=math.nan)], "B": [arrays(math.inf), arrays(32)]}
    found, notes = summarise("Chest", results, Units.own(2), 20, 0)
    by_name = {(NAMES[figure.metric], figure.model): figure for figure in found}
    infinite, difference = by_name["psnr", "A"], by_name["psnr", "B minus A"]
    assert (infinite.value, infinite.interval, infinite.std) == (math.inf, None, None)
    assert math.isnan(difference.value)
    assert difference.interval is None
    assert [by_name["seam_ratio", model].num["volumes"] for model in ("A", "B", "B minus A")] == [1, 2, 1]
    assert notes == [
        "Chest: seam index ratio of A leaves out 1 of 2 volumes: no larger than a patch, or constant but at borders"
    ]
    assert not [name for name, _ in by_name if name == "lpips"]


def test_use_of_the_codebook_is_that_of_a_resample_together():
    counts = {
        "A": torch.tensor([[4, 0, 0], [1, 1, 0], [0, 5, 2]]),
        "B": torch.tensor([[4, 4, 0], [2, 0, 0], [3, 0, 0]]),
    }
    results = {
        model: [arrays(30) | {COUNTS: of_volume.numpy()} for of_volume in of_model]
        for model, of_model in counts.items()
    }
    found = {
        (NAMES[figure.metric], figure.model): figure for figure in summarise("Chest", results, Units.own(3), 20, 3)[0]
    }
    for name, function in (("codebook_usage", codebook_usage), ("codebook_perplexity", perplexity)):

        def difference(chosen, function=function):
            return function(counts["B"][chosen].sum(0)) - function(counts["A"][chosen].sum(0))

        figure = found[name, "B minus A"]
        assert figure.value == pytest.approx(difference(torch.arange(3)))
        assert figure.interval == pytest.approx(bootstrap_interval(difference, [3], num_resamples=20, seed=3))
        assert figure.interval[1] > figure.interval[0]
        assert found[name, "A"].value == pytest.approx(function(torch.tensor([5, 6, 2])))


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What was reconstructed, by the model's name of each call."""
    done = []
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *args: done.append("volume") or reconstruct(*args))
    return done


def test_the_same_command_computes_nothing(data, checkpoints, finished, tmp_path, calls, monkeypatch):
    shutil.copytree(finished / "cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "load_autoencoder", None)
        evaluate(config(data, checkpoints, tmp_path))
    assert calls == []
    assert figures(tmp_path) == figures(finished)
    shutil.copy(checkpoints[0], tmp_path / "copy.ckpt")  # the content counts
    evaluate(config(data, [str(tmp_path / "copy.ckpt")], tmp_path))
    assert calls == []
    write(tmp_path / "more" / "a.nii.gz", made_up((24, 24, 24), 77))  # a new volume is measured alone
    shutil.copy(data.parent / "Head" / "scan_0.nii.gz", tmp_path / "more")
    evaluate(config(tmp_path / "more", checkpoints[:1], tmp_path))
    assert len(calls) == 1
    write(tmp_path / "more" / "a.nii.gz", made_up((24, 16, 24), 78))  # allows fewer scales, so both are
    evaluate(config(tmp_path / "more", checkpoints[:1], tmp_path))
    assert len(calls) == 3


def test_a_killed_run_goes_on(data, checkpoints, finished, tmp_path, monkeypatch, calls):
    def stop(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append("volume")
        return reconstruct(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "reconstruct", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(data, checkpoints, tmp_path))
    assert not (tmp_path / "reconstruction.json").exists()
    evaluate(config(data, checkpoints, tmp_path))
    assert len(calls) == 2 * NUM_VOLUMES
    assert figures(tmp_path) == figures(finished)


def test_two_processes_find_what_one_does(data, checkpoints, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "evaluation" / "reconstruction.py"), "--data", str(data), "--AE-ckpt", *checkpoints]
    command += ["--output-dir", str(tmp_path), "--device", "cpu", "--lpips", "off", "num_resamples=20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("figures in") == 1  # one of them writes
    assert figures(tmp_path) == figures(finished)

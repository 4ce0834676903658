"""What the parts of the benchmark share: which ways are measured, batches that don't fit, limits of the hardware."""

import json
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from common.compilation import CompiledDenoiser
from common.errors import UserError
from evaluation.benchmark import main
from evaluation.benchmarks import biflownet, generate, measuring, sample
from evaluation.benchmarks.hardware import describe
from evaluation.benchmarks.measuring import Limits, Report, Row, chosen, fitting


def run(tmp_path, *words: str) -> dict:
    main([*words, "--size", "tiny", "--repetitions", "1", "--device", "cpu", "--json", str(tmp_path / "r.json")])
    return json.loads((tmp_path / "r.json").read_text())


def test_ways_are_built_where_they_are_wanted():
    built = []
    builders = {
        name: lambda name=name: built.append(name) or name.upper() for name in ("plain", "bf16", "bf16 compiled")
    }
    assert chosen(builders, None) == {"plain": "PLAIN", "bf16": "BF16"}
    assert list(chosen(builders, None, compiles=True)) == list(builders)
    built.clear()
    assert list(chosen(builders, "bf16 compiled, plain")) == built == ["bf16 compiled", "plain"]
    with pytest.raises(UserError, match="--ways: there is no 'fast': choose from plain, bf16, bf16 compiled"):
        chosen(builders, "plain,fast")


def test_the_first_way_is_the_baseline(tmp_path):
    found = run(tmp_path, "codebook", "--ways", "ours,plain")
    assert (found["baseline"], [row["name"] for row in found["rows"]]) == ("ours", ["ours", "plain"])
    assert found["rows"][0]["ratio"] == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch, error):
    tried, right = [], biflownet._batch

    def batch(network, batch_size, *rest):
        tried.append(batch_size)
        if batch_size > 2:
            raise error
        return right(network, batch_size, *rest)

    monkeypatch.setattr(biflownet, "_batch", batch)
    found = run(tmp_path, "biflownet", "--batch-size", "9", "--ways", "plain")
    assert tried == [9, 4, 2]
    assert (found["batch size"], found["does not fit, batch size"], found["rows"][0]["samples"]) == (2, 4, 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel image")])
def test_other_errors_and_a_batch_of_one_are_not_tried_again(error):
    tried = []

    def measure(batch_size: int) -> Report:
        tried.append(batch_size)
        raise error

    with pytest.raises(RuntimeError, match=str(error)):
        fitting(measure, 2)
    assert tried == ([2, 1] if isinstance(error, torch.OutOfMemoryError) else [2])


def test_what_fits_says_nothing():
    report = fitting(lambda batch_size: Report("", "samples", "plain", [Row("plain", [1.0], batch_size)]), 3)
    assert report.notes == {"batch size": 3}


def test_limits():
    """Operations or bytes, whichever take longer."""
    limits = Limits({torch.float32: 1e12, torch.bfloat16: 4e12}, copy=1e10)
    assert limits.seconds(8e12, 1e10, torch.float32) == 8
    assert limits.seconds(8e12, 1e10, torch.bfloat16) == 2
    assert limits.seconds(8e12, 5e10, torch.bfloat16) == 5


def test_a_type_that_a_cpu_emulates_is_measured_by_a_small_product(monkeypatch):
    sizes = [measuring.Product(torch.device("cpu"), torch.float32).flops]
    monkeypatch.setattr(measuring, "SLOW_PRODUCT_S", 0)
    sizes.append(measuring.Product(torch.device("cpu"), torch.float32).flops)
    assert sizes == [2 * 2048**3, 2 * 256**3]


def test_a_product_leaves_the_settings_as_they_were():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    product = measuring.Product(torch.device("cpu"), torch.bfloat16, tf32=True)
    seen = []
    product._a = type("Matrix", (), {"__matmul__": lambda *_: seen.append(settings.fp32_precision)})()
    assert len(product.times(2)) == 2
    assert set(seen) == {"tf32"}
    assert settings.fp32_precision == before


def test_hardware(tmp_path):
    found = run(tmp_path, "hardware")
    assert [row["name"] for row in found["rows"]] == ["copy", "product float32", "product bf16"]
    assert all(row["per_second"] > 1e6 for row in found["rows"])
    assert (found["device"], found["devices"]) == (describe(torch.device("cpu"))["device"], 1)


def test_generate(tmp_path):
    begin = time.perf_counter()
    found = run(tmp_path, "generate", "--steps", "2", "--ways", "plain", "--folder", str(tmp_path))
    (row,) = found["rows"]
    stages = [found[f"{stage}, seconds"]["plain"] for stage in generate.STAGES]
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) == pytest.approx(row["median_seconds"], rel=0.02)
    assert sum(stages) < time.perf_counter() - begin
    assert (found["steps"], [path.name for path in tmp_path.iterdir()]) == (2, ["r.json"])


def test_no_generation_is_timed_where_the_file_differs(tmp_path, monkeypatch):
    right = generate.write_volume
    monkeypatch.setattr(generate, "write_volume", lambda path, volume, *rest: right(path, volume.flip(1), *rest))
    monkeypatch.setattr(generate, "in_turn", None)
    with pytest.raises(UserError, match="read back, voxels differ by up to .*nothing was timed"):
        run(tmp_path, "generate", "--steps", "1", "--ways", "plain")


def test_a_sampling_runs_what_the_comparison_has_compiled():
    """Compiling takes minutes, and a step that compiles is no step to be timed."""
    device, counter = torch.device("cpu"), CompileCounter()
    network = sample.random_network(sample.SCALES["tiny"], device)
    denoiser = CompiledDenoiser(network)
    denoiser._compiled = torch.compile(network, dynamic=False, backend=counter)
    way = sample.build_way(denoiser, (8, 8, 8), device)
    way.predict()
    compiled = counter.frame_count
    way.sample()
    assert counter.frame_count == compiled > 0

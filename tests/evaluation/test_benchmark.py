"""The benchmark runs and writes what it measured; how fast things are is no matter of tests."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation_models import save_models

from AutoEncoder.model import autoencoder
from common.errors import UserError
from common.script import run_script
from dataset.cache.latents import LatentCache
from dataset.cache.volumes import VolumeCache
from dataset.order.epochs import SampleKey
from dataset.volumes.volume_io import read_latent, write_latent
from evaluation.benchmark import main
from evaluation.benchmarks import data, decode, sample
from evaluation.benchmarks.measuring import Report, Row, in_turn, largest_difference, with_peak_memory

ROOT = Path(__file__).parents[2]
# All but one: half precision takes long on processors that emulate it.
DECODE_WAYS = "plain,exact in 0.008 GB,blended tiles,tiles,channels last,bf16,bf16 channels last,bf16 exact in 0.008 GB"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "evaluation/benchmark.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_data(tmp_path):
    words = ["data", "--size", "tiny", "--repetitions", "2", "--json", str(tmp_path / "data.json")]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "16³ patches of 64³ volumes, 2 loading processes" in done.stdout
    found = json.loads((tmp_path / "data.json").read_text())
    assert (found["part"], found["size"], found["baseline"]) == ("data", "tiny", "plain")
    assert found["command"] == " ".join(["python evaluation/benchmark.py", *words])
    assert found["versions"].keys() == {"python", "torch", "numpy", "nibabel", "isal", "SimpleITK"}
    assert found["cores"] >= 1
    assert [row["name"] for row in found["rows"]] == ["cache int16", "cache float32", "plain"]
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["per_second"] == pytest.approx(row["patches"] / row["median_seconds"])
    assert found["rows"][2]["ratio"] == 1
    assert found["largest_difference"]["float32"] == 0
    assert 0 < found["largest_difference"]["int16"] < 2e-5
    assert found["cache_megabytes"]["int16"] == pytest.approx(4 * 64**3 * 2 / 1e6, rel=0.02)
    assert found["build_seconds"].keys() == {"int16", "float32"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "--size", "huge"], "size must be one of paper | tiny, got 'huge'"),
        (["data", "--size", "tiny", "--num-workers", "0"], "error: num_workers must be at least 1, got 0"),
        (["data", "--repetitions", "0"], "repetitions must be at least 1, got 0"),
        (
            ["nothing"],
            "part must be one of hardware | data | codebook | convolution | autoencoder | biflownet | sample | decode",
        ),
    ],
)
def test_mistakes(words, message, capsys):
    assert run_script(main, words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "change"), [("float32", 1e-6), ("int16", 1e-4)])
def test_nothing_is_timed_where_the_ways_differ(tmp_path, monkeypatch, dtype, change):
    opened = VolumeCache.open

    def changed(cache, path):
        volume = opened(cache, path)
        if cache.dtype == dtype:
            crop = volume.crop
            volume.crop = lambda *args: crop(*args) + change
        return volume

    monkeypatch.setattr(VolumeCache, "open", changed)
    monkeypatch.setattr(data, "in_turn", None)
    with pytest.raises(UserError, match="differ from uncached ones by up to .*nothing was timed"):
        main(["data", "--size", "tiny", "--folder", str(tmp_path)])


def test_latents(tmp_path):
    words = ["data", "--items", "latents", "--size", "tiny", "--repetitions", "2", "--folder", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "r.json")]) is None
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["unit"], found["baseline"], found["latents"]) == ("latents", "plain", 8)
    assert [row["name"] for row in found["rows"]] == ["cache float32", "uncached", "plain"]
    assert [row["latents"] for row in found["rows"]] == [2 * 4 * 4, 2 * 2 * 4, 2 * 2 * 4]
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["per_second"] == pytest.approx(row["latents"] / row["median_seconds"])
    assert found["cache_megabytes"]["float32"] == pytest.approx(8 * 4 * 8**3 * 4 / 1e6, rel=0.1)
    plain = data.PlainLatents(sorted(tmp_path.rglob("*.nii.gz")))
    assert len(plain) == 8
    latent = plain[SampleKey(0, 3)]
    assert torch.equal(latent, read_latent(plain.files[3]))
    assert 0.25 < latent.std() < 0.35
    assert latent.abs().max() <= 1


def test_no_latents_are_timed_where_the_cached_ones_differ(tmp_path, monkeypatch):
    read = LatentCache.read_into

    def changed(cache, path, latent):
        read(cache, path, latent)
        if path.name == "005.nii.gz":
            latent[0, 0, 0, 0] *= 1 + 1e-6
        return latent

    monkeypatch.setattr(LatentCache, "read_into", changed)
    monkeypatch.setattr(data, "in_turn", None)
    with pytest.raises(UserError, match=r"005\.nii\.gz: the cached latent differs from the file: nothing was timed"):
        main(["data", "--items", "latents", "--size", "tiny", "--folder", str(tmp_path)])


def test_rates_are_those_of_the_median_repetition():
    fast, slow = Row("fast", [1.0, 4.0, 2.0], 10), Row("slow", [5.0, 5.0, 7.0], 5)
    report = Report("", "items", "slow", [fast, slow])
    assert (fast.rate, slow.rate, report.ratio(fast)) == (5, 1, 5)


def test_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert in_turn(ways, 2) == {"a": [1, 3], "b": [2, 4]}
    assert calls == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("part", "words", "ways"),
    [
        ("sample", [], ["plain", "channels last", "batch 4", "bf16", "bf16 channels last"]),
        (
            "decode",
            ["--max-memory", "0.008", "--ways", DECODE_WAYS],
            ["plain", "exact in 0.008 GB", "blended tiles", "tiles", "channels last"]
            + ["bf16", "bf16 channels last", "bf16 exact in 0.008 GB"],
        ),
    ],
)
def test_generation_parts(tmp_path, part, words, ways):
    words = [
        part,
        "--size",
        "tiny",
        "--repetitions",
        "1",
        "--device",
        "cpu",
        *words,
        "--json",
        f"{tmp_path / 'r.json'}",
    ]
    assert main(words) is None
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ways
    assert rows[0]["difference"] == 0
    for row in rows[1:]:
        assert 0 < row["difference"]
        assert "tiles" in row["name"] or row["difference"] < (0.5 if "bf16" in row["name"] else 1e-3)
    assert all(0 <= row["peak_gb"] < 10 for row in rows)


@pytest.mark.slow
def test_seams_of_a_trained_autoencoder(tmp_path):
    save_models(tmp_path)
    write_latent(tmp_path / "latents" / "a.nii.gz", torch.rand(4, 8, 8, 8) * 2 - 1)
    files = [
        "--AE-ckpt",
        f"{tmp_path / 'ae.ckpt'}",
        "--latents",
        f"{tmp_path / 'latents'}",
        "--tile",
        "16",
        "--max-memory",
        "0.008",
    ]
    main(["decode", "--size", "tiny", "--repetitions", "1", *files, "--json", f"{tmp_path / 'r.json'}"])
    seams = json.loads((tmp_path / "r.json").read_text())["seam_index_times_one_pass"]
    assert seams["plain"] == 1
    assert seams["exact in 0.008 GB"] == pytest.approx(1, abs=1e-3)
    assert abs(seams["tiles"] - 1) > 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--grid", "8", "8", "12"], r"--grid \(8, 8, 12\): multiples of \(8, 8, 8\) are needed"),
        (["sample", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["sample", "--ways", "plain,fast"], "--ways: there is no 'fast': choose from plain, channels last, batch 4, "),
        (["decode", "--tile", "6"], "--tile 6: a multiple of the compression 4"),
        (["decode", "--latents", "x"], "--AE-ckpt and --latents belong together"),
        (["decode", "--latents", "x", "--AE-ckpt", "y", "--grid", "8", "8", "8"], "--grid is for random latents"),
        (["decode", "--max-memory", "0"], "raise max_memory"),
        (["decode", "--max-memory", "0.0001"], "raise max_memory"),
    ],
)
def test_mistakes_of_the_generation_parts(words, message):
    with pytest.raises(UserError, match=message):
        main([words[0], "--size", "tiny", "--device", "cpu", *words[1:]])


@pytest.mark.parametrize(("part", "name"), [(decode, "decode_exactly"), (sample, "CompiledDenoiser")])
def test_nothing_is_timed_where_a_way_is_wrong(monkeypatch, part, name):
    if part is decode:
        original = autoencoder.decode_exactly
        wrong = lambda decoder, z, limit: original(decoder, z, limit) * (1 if limit > 10**9 else 1.1)  # noqa: E731
        monkeypatch.setattr(autoencoder, name, wrong)
    else:
        monkeypatch.setattr(sample, name, lambda network: copy.deepcopy(network).requires_grad_(False).apply(_shift))
    monkeypatch.setattr(part, "in_turn", None)
    words = ["decode", "--max-memory", "0.008"] if part is decode else ["sample", "--compile"]
    with pytest.raises(UserError, match="nothing was timed"):
        main([words[0], "--size", "tiny", "--device", "cpu", *words[1:]])


def _shift(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Conv3d):
        module.weight.mul_(1.2)


def test_peak_memory():
    """What is taken and freed within counts; what was there before doesn't, nor an earlier peak."""
    torch.ones(200_000_000).sum()
    kept = torch.ones(30_000_000)
    result, peak_gb = with_peak_memory(lambda: torch.ones(50_000_000).mul(2)[:3].clone(), torch.device("cpu"))
    assert result.tolist() == [2, 2, 2]
    assert 0.35 < peak_gb < 0.55
    assert kept.numel() == 30_000_000


def test_largest_difference_is_in_standard_deviations():
    expected = torch.tensor([0.0, 2.0, 4.0])
    assert largest_difference(expected + torch.tensor([0.0, -1.0, 0.5]), expected) == pytest.approx(0.5)

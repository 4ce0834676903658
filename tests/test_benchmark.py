"""The benchmark runs and writes what it measured; how fast things are is no matter of tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import UserError
from dataset.cache import VolumeCache
from evaluation.benchmark import main
from evaluation.benchmarks import data
from evaluation.benchmarks.measuring import Report, Row, in_turn

ROOT = Path(__file__).parents[1]


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
    assert found["versions"].keys() == {"python", "torch", "numpy", "nibabel"}
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
        (["data", "--size", "huge"], "invalid choice: 'huge'"),
        (["data", "--size", "tiny", "--num-workers", "0"], "error: --num-workers 0: at least 1 is needed"),
        (["data", "--repetitions", "0"], "--repetitions 0: at least 1 is needed"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_mistakes(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr


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


def test_rates_are_those_of_the_median_repetition():
    fast, slow = Row("fast", [1.0, 4.0, 2.0], 10), Row("slow", [5.0, 5.0, 7.0], 5)
    report = Report("", "items", "slow", [fast, slow])
    assert (fast.rate, slow.rate, report.ratio(fast)) == (5, 1, 5)


def test_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert in_turn(ways, 2) == {"a": [1, 3], "b": [2, 4]}
    assert calls == ["a", "b", "a", "b"]

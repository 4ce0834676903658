"""The check of a GPU, emulated where there is none: bounded steps, what is left out and why, and a true rehearsal."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.script import run_script
from config.loading import load_config
from config.schema.benchmark import GpuCheckConfig
from evaluation.benchmark import main as benchmark
from evaluation.benchmarks import gpu_check
from evaluation.benchmarks.bounded import Ended, run_bounded
from evaluation.gpu_check import main

ROOT = Path(__file__).parents[2]
IMAGING = ("nibabel", "SimpleITK", "monai", "scipy", "matplotlib", "isal", "pydicom", "torchio", "diffusers", "rich")
NO_GPU = "error: device: cuda is demanded and this machine has no usable GPU; use device=cpu or device=auto"
HARDWARE = {"device": "GPU 1", "devices": 1, "rows": [{"name": "copy", "per_second": 4e12}]}


def without(folder: Path, *modules: str) -> dict[str, str]:
    """The environment of a Python that lacks these modules."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_rehearsal_without_the_imaging_libraries(tmp_path):
    """As on a machine that was made for training alone. Through the true processes, with few of the steps."""
    words = "--device cpu --size tiny --only codebook write --json".split()
    command = [sys.executable, "evaluation/gpu_check.py", *words, str(tmp_path / "r.json")]
    environment = without(tmp_path, *IMAGING)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    steps = {step["step"]: step for step in found["steps"]}
    assert {name: step["state"] for name, step in steps.items()} == {
        **dict.fromkeys(("hardware", "codebook"), "done"),
        "write": "left out",
    }
    assert steps["write"]["why"] == "needs SimpleITK"
    assert "* write, left out: needs SimpleITK" in done.stdout
    assert len(steps["codebook"]["figures"]["rows"][0]["seconds"]) == 1  # every repetition
    lines = {line["what"]: line for line in found["table"]}
    ours = lines["codebook step, 8192 codes, 32,768 tokens"]
    assert (ours["way"], ours["target"], ours["met"]) == ("ours", "≥ 15 times plain", "-")  # tiny: it means nothing
    assert 0 < float(ours["of the limit"])
    assert found["machine"]["versions"]["nibabel"] is not None  # installed, but not to be imported
    assert found["command"].startswith("python evaluation/gpu_check.py --device cpu")


def test_parts_for_a_gpu_are_imported_without_the_imaging_libraries():
    """After Lightning, which imports some of them where they are installed."""
    names = ("hardware", "codebook", "autoencoder", "biflownet", "sample", "decode", "gpu_check")
    code = f"import sys, pytorch_lightning\nsys.modules.update(dict.fromkeys({IMAGING}))\n"
    code += "".join(f"import evaluation.benchmarks.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_python_without_the_package_of_options_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "config.cli", None)
    assert run_script(main, []) == 2
    assert capsys.readouterr().err.startswith(f"error: {sys.executable} lacks config.cli, which all options are read")


# ------------------------------------------------------------------------------------------------------- emulated


def answer(monkeypatch, **answers) -> list[list[str]]:
    """Takes the place of all processes: by the part, an Ended, an exception, or the figures that the part writes.

    A list has one for each attempt. Returns the commands.
    """
    commands = []

    def run(command, limit_s, folder):
        commands.append(command)
        found = answers["pytest" if "pytest" in command else command[2]]
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, Ended):
            return found
        Path(command[command.index("--json") + 1]).write_text(json.dumps(found))
        return Ended(0, 1.0, "", "")

    monkeypatch.setattr(gpu_check, "run_bounded", run)
    return commands


def figures(*rows: tuple, **more) -> dict:
    """Of ways (name, seconds, ratio)."""
    keys = ("name", "median_seconds", "ratio")
    rest = {"peak_gb": 15.0, "limit_share": 0.5}
    made = [dict(zip(keys, row, strict=True)) | rest | {"per_second": 1 / row[1]} for row in rows]
    return {"baseline": rows[0][0], "rows": made, **more}


def failed(text: str, status: int | None = 1) -> Ended:
    return Ended(status, 3.0, "", f"Traceback ...\n{text}\n")


def checked(tmp_path, *words: str) -> tuple[int, dict[str, dict], dict[str, dict]]:
    """Exit status, steps, and lines of the table by (what, kind of target)."""
    status = run_script(main, [*words, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    steps = {step["step"]: step for step in found["steps"]}
    return status, steps, {(line["what"].split(",")[0], line["target"]): line for line in found["table"]}


def test_targets(tmp_path, monkeypatch, capsys):
    """The best way beside the baseline counts; where a batch did not fit, its milliseconds are those of other work."""
    smaller = {"batch size": 12, "does not fit, batch size": 24}
    commands = answer(
        monkeypatch,
        hardware=HARDWARE,
        biflownet=[
            figures(("plain", 0.3, 1), ("float32", 0.2, 1.5), ("bf16", 0.12, 2.5)),
            figures(("plain", 0.05, 1), ("bf16 compiled", 0.1, 0.5), **smaller),
        ],
        autoencoder=figures(("plain", 0.3, 1), ("bf16", 0.11, 2.7), **smaller),
        generate=figures(("bf16", 1.4, 1), steps=20, **{"sampling, seconds": {"bf16": 0.3}}),
    )
    status, steps, table = checked(tmp_path, "--only", "training", "training-compiled", "pair", "generate")
    assert status == 0
    found = json.loads((tmp_path / "r.json").read_text())["table"]
    lines = [line for line in found if line["what"].startswith("training step")]
    assert [(line["way"], line["measured"], line["met"], line["of the limit"]) for line in lines] == [
        ("bf16", "120 ms", "yes", "0.5"),
        ("bf16", "2.5 times plain", "yes", "0.5"),
        ("bf16 compiled", "100 ms", "-", "0.5"),
        ("bf16 compiled", "0.5 times plain", "no", "0.5"),
    ]
    pair = table["generator and discriminator step", "≥ 3 times plain"]
    assert (pair["measured"], pair["met"]) == ("2.7 times plain", "no")
    assert pair["what"].endswith("but 12 of them: no more fitted")
    assert table["seed to file", "≤ 10 ms"]["measured"] == "15 ms"
    assert table["seed to file", "≤ 10 ms"]["met"] == "no"
    assert table["seed to file", "≤ 1.5 s"]["met"] == "yes"
    assert all(command[-2:] == ["--device", "cuda"] for command in commands)
    assert "copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "state", "why", "status"),
    [
        (failed("ModuleNotFoundError: No module named 'timm'"), "left out", "needs timm", 0),
        (
            failed("ModuleNotFoundError: import of nibabel.x halted; None in sys.modules"),
            "left out",
            "needs nibabel",
            0,
        ),
        (failed("torch.OutOfMemoryError: CUDA out of memory. Tried"), "left out", "out of memory: torch.OutOfMem", 0),
        (failed("", None), "killed", "killed after 60 s", 0),
        (failed("error: ours: differs: nothing was timed", 2), "failed", "ours: differs: nothing was timed", 1),
        (failed("", -9), "failed", "ended by SIGKILL", 1),
    ],
)
def test_what_stops_one_step_leaves_the_others(tmp_path, monkeypatch, ended, state, why, status):
    answer(monkeypatch, hardware=HARDWARE, codebook=ended, write=figures(("plain", 2, 1), ("int16", 1, 2)))
    found, steps, table = checked(tmp_path, "--only", "codebook", "write")
    assert found == status
    assert steps["codebook"]["state"] == state
    assert steps["codebook"]["why"].startswith(why)
    assert table["codebook step", "≥ 15 times the baseline"]["measured"] == state
    assert table["writing of 256³", "-"]["measured"] == "2 times plain"


def test_where_compiling_fails_the_rest_is_measured(tmp_path, monkeypatch):
    measured = figures(("plain", 2, 1), ("ours", 0.1, 20))
    commands = answer(monkeypatch, hardware=HARDWARE, codebook=[failed("error: no compiler", 2), measured])
    status, steps, table = checked(tmp_path, "--only", "codebook")
    assert status == 0
    assert (steps["codebook"]["state"], steps["codebook"]["why"]) == ("done", "measured otherwise, as no compiler")
    assert ["compile" in " ".join(command) for command in commands[1:]] == [True, False]
    assert table["codebook step", "≥ 15 times plain"]["met"] == "yes"


def test_time_is_shared(monkeypatch):
    """A step gets its own limit or what is left; with too little left it is not begun."""
    limits = []
    monkeypatch.setattr(gpu_check, "run_bounded", lambda command, limit_s, root: limits.append(limit_s) or failed(""))
    cfg = load_config(GpuCheckConfig, None)
    for seconds_left in (200, 50, 19):
        outcome = gpu_check._run(cfg, "write", seconds_left, {})
    assert limits == [60, pytest.approx(50, abs=0.5)]
    assert (outcome.state, outcome.why) == ("left out", "19 s were left")
    assert gpu_check._run(cfg, "scaling", 200, {"devices": 1}).why == "needs two GPUs"


def test_an_interruption_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    answer(monkeypatch, hardware=HARDWARE, codebook=figures(("plain", 2, 1)), write=KeyboardInterrupt())
    status, steps, _ = checked(tmp_path, "--only", "codebook", "write", "data")
    assert status == 130
    states = {name: step["state"] for name, step in steps.items()}
    assert states == {"hardware": "done", "codebook": "done", "write": "left out", "data": "left out"}
    assert steps["data"]["why"] == "the run ended before"
    assert "| codebook step" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as caught:
        benchmark(["hardware", "--device", "cuda"])
    answer(monkeypatch, hardware=Ended(2, 1.0, "", f"error: {caught.value}\n"))
    monkeypatch.chdir(tmp_path)
    assert run_script(main, []) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith(
        f"error: --device cuda: {sys.executable} sees no GPU that torch can use"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing"], "only must be some of hardware tests training"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--json", "nowhere/r.json"], "--json nowhere/r.json: there is no folder nowhere"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


# ------------------------------------------------------------------------------------------------------ processes

GPU_TESTS = """
    import pytest

    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("words", ["a b", "c"])
    def test_good(words): pass

    def test_bad(): assert words == 1

    @pytest.mark.skip(reason="one GPU")
    def test_two(): pass
"""


def run_tests(root: Path, monkeypatch, **files: str) -> gpu_check.Outcome:
    (root / "tests" / "gpu").mkdir(parents=True)
    (root / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = -ra\n")
    for name, text in files.items():
        (root / "tests" / "gpu" / f"test_{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(gpu_check, "ROOT", root)
    return gpu_check._run(load_config(GpuCheckConfig, None), "tests", 60, {})


def test_gpu_tests_are_counted(tmp_path, monkeypatch):
    outcome = run_tests(tmp_path, monkeypatch, a=GPU_TESTS, b="import no_such_library")
    assert outcome.figures == {
        "counts": {"passed": 2, "failed": 1, "skipped": 1},
        "failed": ["tests/gpu/test_a.py::test_bad"],
        "skipped": {"one GPU": 1},
        "not collected": ["tests/gpu/test_b.py"],
    }
    assert (outcome.state, outcome.why) == ("failed", "1 failed: tests/gpu/test_a.py::test_bad")


def test_gpu_tests_that_need_a_library(tmp_path, monkeypatch):
    outcome = run_tests(tmp_path, monkeypatch, a="import no_such_library")
    assert (outcome.state, outcome.why) == ("left out", "needs no_such_library")


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) < 3:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"], start_new_session=True)
else:
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
print("begun", flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("ends_by", ["limit", "Ctrl-C"])
def test_a_command_ends_with_all_that_it_started(tmp_path, monkeypatch, ends_by):
    """Also with what has a session of its own and does not listen."""
    monkeypatch.setattr("evaluation.benchmarks.bounded.GRACE_S", 0.3)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    command = [sys.executable, str(tmp_path / "stubborn.py"), str(tmp_path / "pid")]
    begin = time.monotonic()
    if ends_by == "limit":
        ended = run_bounded(command, 1.5, tmp_path)
        assert (ended.status, ended.output) == (None, "begun\nbegun\n")
    else:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_bounded(command, 30, tmp_path)
        finally:
            signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begin < 10
    pid = int((tmp_path / "pid").read_text())
    for _ in range(20):
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_command_that_ends_by_itself(tmp_path):
    code = "import sys; print('out'); sys.stderr.write('err'); sys.exit(3)"
    ended = run_bounded([sys.executable, "-c", code], 30, tmp_path)
    assert (ended.status, ended.output, ended.errors) == (3, "out\n", "err")


@pytest.mark.parametrize("sees_a_gpu", [True, False])
def test_make_takes_the_python_whose_torch_sees_a_gpu(tmp_path, sees_a_gpu):
    """Else .venv, here one that says its words."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"class cuda: is_available = staticmethod(lambda: {sees_a_gpu})\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".ready").touch()
    words = ["gpu-check", f"PYTHON={sys.executable}", f"VENV={tmp_path}", "OPTIONS=--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["make", "-s", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: gpu_check.py") == sees_a_gpu
    assert ("evaluation/gpu_check.py --help" in done.stdout.splitlines()) == (not sees_a_gpu)

"""Processes that one torchrun started: how they end, and what is said of it. Real launchers, a tiny program."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
from pathlib import Path
from common.errors import UserError
from common.script import run_script

def main(argv):
    what, rank, ready = sys.argv[1], os.environ["RANK"], Path(sys.argv[2])
    if what == "all":
        raise UserError("data.json: no such file: give one")
    if what == "one":
        import torch
        from common.processes import joined
        with joined("cpu") as place:
            place.barrier()
            if rank == "1":
                raise UserError("3.nii.gz: is odd: remove it")
            place.maximum(torch.zeros(1))
    if what == "fault" and rank == "0":
        raise ZeroDivisionError("of ours")
    if what in ("fault", "wait"):
        ready.with_name(rank).touch()
        time.sleep(60)

raise SystemExit(run_script(main))
"""
TORCHRUN = ["-m", "torch.distributed.run"]
OURS = [str(ROOT / "train" / "launch.py")]
OPTIONS = ["--standalone", "--nproc-per-node", "2"]


def start(launcher: list[str], folder: Path, what: str) -> subprocess.Popen:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, *launcher, *OPTIONS, str(program), what, str(folder / "ready")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_no_more_processes_than_cores_unless_asked(tmp_path):
    words = ["--standalone", "--nproc-per-node", "9999", "program.py"]
    done = subprocess.run([sys.executable, *OURS, *words], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"error: --nproc-per-node is 9999, but \d+ core.* say --oversubscribe first\n", done.stderr)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("what", "said"),
    [("all", "error: data.json: no such file: give one"), ("one", "error: 3.nii.gz: is odd: remove it")],
)
def test_a_users_mistake_is_one_line(tmp_path, what, said):
    launched = start(OURS, tmp_path, what)
    text = launched.communicate(timeout=120)[1]
    assert launched.returncode == 2, text
    assert [line for line in text.splitlines() if "OMP_NUM_THREADS" not in line and "****" not in line] == [said]


def test_torchrun_itself_reports_one_process(tmp_path):
    launched = start(TORCHRUN, tmp_path, "all")
    text = launched.communicate(timeout=120)[1]
    assert launched.returncode == 1
    assert text.count("error: data.json: no such file: give one") == 1
    assert text.count("exitcode  : ") == 1
    assert text.count("Traceback") == 1  # torchrun's own, which it can't be kept from


def test_a_fault_of_ours_is_reported_in_full(tmp_path):
    launched = start(OURS, tmp_path, "fault")
    text = launched.communicate(timeout=120)[1]
    assert launched.returncode == 1
    assert "ZeroDivisionError: of ours" in text
    assert "ChildFailedError" in text


@pytest.mark.parametrize("to_all", [False, True])  # a terminal sends it to all, and the launcher passes its own on
def test_ctrl_c_ends_without_a_traceback(tmp_path, to_all):
    launched = start(OURS, tmp_path, "wait")
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert launched.poll() is None, launched.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(launched.pid, signal.SIGINT)
    text = launched.communicate(timeout=120)[1]
    assert launched.returncode == 130, text
    assert text.count("interrupted\n") == 1
    assert "Traceback" not in text


def test_without_a_program_it_says_how_it_is_called():
    done = subprocess.run([sys.executable, *OURS], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: launch.py [torchrun's options] SCRIPT")

"""How programs end: exit status, what is said, and what a second process or a second signal finds."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import launched
from common.errors import UserError
from common.script import run_script
from train.loop import signals
from train.loop.signals import StopRequest

ROOT = Path(__file__).parents[2]


def refuse(argv) -> None:
    raise UserError("a.nii.gz: is\nodd")


def interrupt(argv) -> None:
    signal.raise_signal(signal.SIGINT)


def break_off(argv) -> None:
    raise RuntimeError("Connection closed by peer")


@pytest.fixture(autouse=True)
def heed_ctrl_c():
    """Whatever started the tests: a shell's background job ignores Ctrl-C, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def torchrun(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    (tmp_path / "attempt_0" / "1").mkdir(parents=True)
    monkeypatch.setattr(launched, "PATIENCE_S", 0.0)
    monkeypatch.setattr(launched, "LINGER_S", 0.0)


@pytest.mark.parametrize(
    ("main", "status", "said"), [(refuse, 2, "error: a.nii.gz: is odd\n"), (interrupt, 130, "interrupted\n")]
)
def test_the_first_of_several_processes_says_why(torchrun, capsys, main, status, said):
    assert run_script(main) == status
    assert [run_script(other) for other in (main, refuse, interrupt, break_off)] == [0, 0, 0, 0]
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error_file", ["", "/dev/null", "error.json"])
def test_processes_that_nobody_started_together_speak_for_themselves(monkeypatch, capsys, error_file):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
    assert [run_script(refuse), run_script(refuse)] == [2, 2]
    assert capsys.readouterr().err == "error: a.nii.gz: is odd\n" * 2


def test_a_fault_of_ours_keeps_its_traceback(torchrun):
    with pytest.raises(RuntimeError, match="Connection closed"):
        run_script(break_off)


def test_ctrl_c_acts_as_before_once_a_program_has_ended():
    assert run_script(lambda argv: None) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_what_still_closes():
    code = (
        "import sys, time\nfrom common import script\n"
        "script.SAME_ORDER_S = float(sys.argv[1])\n"
        "def main(argv):\n"
        "    try:\n        sys.stdout.write('ready\\n'); sys.stdout.flush(); time.sleep(60)\n"
        "    finally:\n        sys.stdout.write('closing\\n'); sys.stdout.flush(); time.sleep(1)\n"
        "raise SystemExit(script.run_script(main))"
    )
    for same_order_s, said in ((0.0, "interrupted again: ending at once\n"), (30.0, "interrupted\n")):
        command = [sys.executable, "-c", code, str(same_order_s)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in ("ready\n", "closing\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == said
        assert process.returncode == 130


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_training_is_asked_once_and_stopped_at_once_by_a_second_signal(monkeypatch, capfd, number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun passes on what the terminal has sent to all
        assert stop.received == number
        monkeypatch.setattr(signals, "SAME_ORDER_S", -1.0)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == before  # a third one acts as usual
    assert ended.value.code == 128 + number
    first, second = capfd.readouterr().err.splitlines()
    assert f"{number.name}: stopping after the next step, with a checkpoint" in first
    assert f"{number.name} again: stopping at once" in second


def test_other_ranks_and_those_that_another_has_left_are_asked_in_silence(torchrun, monkeypatch, capfd):
    for rank, has_left in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        if has_left:
            assert launched.is_first_to_leave()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_other_threads_leave_signals_alone():
    found = []
    before = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))
        found.append(run_script(lambda argv: None))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, 0]

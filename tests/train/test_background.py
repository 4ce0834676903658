"""Work beside training, and flags that come one step late."""

import threading

import pytest
import torch

from common.errors import UserError
from train.loop.background import BackgroundWork, snapshot
from train.loop.step_flags import StepFlags


def test_work_is_done_in_order_and_beside_the_caller():
    done, may_go_on = [], threading.Event()
    with BackgroundWork() as background:
        background.submit(lambda: (may_go_on.wait(10), done.append(threading.current_thread().name)))
        assert not done
        may_go_on.set()
        background.submit(done.append, 2)
    assert done[0].startswith("background")
    assert done[1:] == [2]


def fail(message: str) -> None:
    raise UserError(message)


def test_an_error_is_raised_at_the_next_work_once():
    done = []
    with BackgroundWork() as background:
        background.submit(fail, "disk full")
        with pytest.raises(UserError, match="disk full"):
            background.submit(done.append, 1)
        assert not done
        background.submit(done.append, 2)
    assert done == [2]


def test_an_error_of_the_last_work_is_raised_at_the_end():
    background = BackgroundWork()
    with pytest.raises(UserError, match="disk full"), background:
        background.submit(fail, "disk full")


def test_the_callers_error_counts_and_the_work_is_finished():
    done, may_go_on = [], threading.Event()

    def train() -> None:
        with BackgroundWork() as background:
            background.submit(lambda: (may_go_on.wait(10), done.append(1), fail("disk full")))
            may_go_on.set()
            raise ValueError("caller")

    with pytest.raises(ValueError, match="caller"):
        train()
    assert done == [1]


def test_a_snapshot_does_not_change_with_the_state():
    weights = torch.ones(3)
    state = {"model": {"weight": weights}, "steps": [1, {"mean": weights * 2}], "name": "a"}
    kept = snapshot(state)
    weights.zero_()
    assert kept["model"]["weight"].tolist() == [1, 1, 1]
    assert kept["steps"] == [1, {"mean": kept["steps"][1]["mean"]}]
    assert kept["steps"][1]["mean"].tolist() == [2, 2, 2]
    assert kept["name"] == "a"


def test_flags_come_at_once_on_a_cpu_and_one_step_late_on_a_gpu():
    at_once = StepFlags(torch.device("cpu"))
    assert at_once.exchange(1, torch.tensor([0, 1])) == (1, [0, 1])
    assert at_once.flush() is None

    late = StepFlags(torch.device("cuda"))
    assert late.exchange(1, torch.tensor([1, 0])) is None
    assert late.exchange(2, torch.tensor([0, 0])) == (1, [1, 0])
    assert late.flush() == (2, [0, 0])
    assert late.flush() is None


def test_late_flags_are_those_of_their_step():
    late, flags = StepFlags(torch.device("cpu"), is_late=True), torch.tensor([7])
    late.exchange(1, flags)
    flags.zero_()
    assert late.flush() == (1, [7])

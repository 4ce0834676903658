"""Work in several processes: every result once, errors in one line, nothing left behind."""

import os
import signal
import time

import pytest
import torch

from common.errors import UserError
from common.parallel import map_in_processes, num_cores
from common.processes import Distributed


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def slow_first(number: int) -> int:
    time.sleep(0.5 if number == 0 else 0)
    return number


def refuse(number: int) -> int:
    if number == 3:
        raise UserError("3.nii.gz: is odd: remove it")
    return number


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 2, 50])
def test_every_result_comes_once(num_workers):
    results = dict(map_in_processes(square, range(10), num_workers, "squares"))
    assert {index: value for index, (value, _) in results.items()} == {n: n * n for n in range(10)}
    processes = {pid for _, pid in results.values()}
    assert (os.getpid() in processes) == (num_workers == 0)
    assert len(processes) <= max(1, min(num_workers, num_cores()))


def test_no_items():
    assert list(map_in_processes(square, [], 2, "squares")) == []


def test_results_come_as_they_are_finished():
    if num_cores() < 2:
        pytest.skip("needs two cores: there is one process per core")
    assert [index for index, _ in map_in_processes(slow_first, range(4), 2, "waiting")][-1] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_users_mistake_is_one_line(num_workers):
    with pytest.raises(UserError) as caught:
        list(map_in_processes(refuse, range(6), num_workers, "looking"))
    assert str(caught.value) == "3.nii.gz: is odd: remove it"


def test_a_killed_process_is_named():
    with pytest.raises(UserError, match="adding: a process was killed, perhaps for want of memory"):
        list(map_in_processes(die, range(6), 2, "adding"))


def test_a_mistake_on_any_rank_is_raised_on_all(monkeypatch):
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    assert alone.on_all(lambda: 5) == [5]

    def fail() -> None:
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        alone.on_all(fail)
    first = Distributed(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(Distributed, "gather", lambda self, item: [item, (6, None)])
    assert first.on_all(lambda: 5) == [5, 6]
    monkeypatch.setattr(Distributed, "gather", lambda self, item: [item, (None, "no space on the other")])
    with pytest.raises(UserError, match="no space on the other"):
        first.on_all(lambda: 5)

"""Work done once per volume: kept, continued, shared out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import PLACE

from common.errors import UserError
from evaluation.results.work import ResultCache, Work, do_work


class Numbers:
    """Doubles numbers and remembers which; item 3 can't be read when asked for, batch with 5 fails when asked for."""

    def __init__(self, folder: Path, batch_size: int = 2, refuse: int | None = None, fail: int | None = None) -> None:
        self.computed: list[list[float]] = []
        self.refuse, self.fail = refuse, fail
        cache = ResultCache(folder, "double", {"version": 1})
        self.work = Work("double", str, self.read, self.compute, cache, batch_size)

    def read(self, item: int) -> torch.Tensor:
        if item == self.refuse:
            raise UserError(f"{item}: truncated")
        return torch.full((item % 2 + 1,), float(item))

    def compute(self, batch: torch.Tensor) -> list[dict[str, np.ndarray]]:
        if self.fail in batch.flatten().tolist():
            raise KeyboardInterrupt
        self.computed.append(batch[:, 0].tolist())
        return [{"double": (2 * one).numpy()} for one in batch]

    def run(self, items):
        results, refused = do_work(self.work, items, PLACE, 0)
        return [None if one is None else float(one["double"][0]) for one in results], refused


def test_results_come_in_the_order_of_the_items_in_batches_of_one_shape(tmp_path):
    numbers = Numbers(tmp_path)
    assert numbers.run([2, 4, 6, 1, 3]) == ([4, 8, 12, 2, 6], {})
    assert numbers.computed == [[2, 4], [6], [1, 3]]


def test_what_is_there_is_not_computed_again(tmp_path):
    Numbers(tmp_path).run([2, 4])
    again = Numbers(tmp_path)
    assert again.run([2, 4, 6])[0] == [4, 8, 12]
    assert again.computed == [[6]]


def test_the_same_item_twice_is_computed_once(tmp_path):
    numbers = Numbers(tmp_path, batch_size=4)
    assert numbers.run([2, 2, 4])[0] == [4, 4, 8]
    assert numbers.computed == [[2, 4]]


def test_an_interrupted_run_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Numbers(tmp_path, fail=6).run([2, 4, 6, 8])
    again = Numbers(tmp_path)
    again.run([2, 4, 6, 8])
    assert again.computed == [[6, 8]]


def test_items_that_cannot_be_read_are_named_and_the_others_done(tmp_path):
    results, refused = Numbers(tmp_path, refuse=3).run([2, 3, 4])
    assert results == [4, None, 8]
    assert refused == {3: "3: truncated"}


@pytest.mark.parametrize("place", [0, 40, 60, 100, -3])
def test_damaged_results_are_made_again(tmp_path, place):
    numbers = Numbers(tmp_path)
    numbers.run([2])
    path = next(tmp_path.rglob("*.arrays"))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert numbers.run([2])[0] == [4]
    assert numbers.computed == [[2], [2]]


def test_results_cut_off_are_made_again(tmp_path):
    numbers = Numbers(tmp_path)
    for length in (0, 10, 32, 50):
        numbers.run([2])
        path = next(tmp_path.rglob("*.arrays"))
        path.write_bytes(path.read_bytes()[:length])
    assert numbers.run([2])[0] == [4]
    assert numbers.computed == [[2]] * 5


def test_other_settings_have_other_results(tmp_path):
    caches = [ResultCache(tmp_path, "x", settings) for settings in ({"a": 1}, {"a": 2}, {"a": 1})]
    caches[0].put("key", {"v": np.ones(2)})
    assert [cache.get("key") is None for cache in caches] == [False, True, False]
    assert '"a": 1' in (caches[0].folder / "settings.json").read_text()


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Numbers(tmp_path / "file").run([2])


SCRIPT = """
import os, sys, pathlib
sys.path[:0] = [{root!r}, {root!r} + "/tests", {folder_of_tests!r}]
from test_result_cache import Numbers
from evaluation.results.work import do_work
from common.processes import joined
refuse = 3 if "refuse" in sys.argv else None
numbers = Numbers(pathlib.Path({folder!r}), refuse=refuse, fail=None)
with joined("cpu") as place:
    results, refused = do_work(numbers.work, [2, 4, 6, 8, 3], place, 0)
    line = [place.rank, sorted(sum(numbers.computed, [])), [r and float(r["double"][0]) for r in results], len(refused)]
    os.write(1, (repr(line) + "\\n").encode())
"""


def test_processes_share_the_work_and_the_first_has_all_results(tmp_path):
    script = tmp_path / "script.py"
    root = Path(__file__).parents[2]
    script.write_text(
        SCRIPT.format(root=str(root), folder_of_tests=str(Path(__file__).parent), folder=str(tmp_path / "cache"))
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "refuse"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.splitlines())
    assert said == [
        "[0, [2.0, 6.0], [4.0, 8.0, 12.0, 16.0, None], 1]",
        "[1, [4.0, 8.0], [None, None, None, None, None], 1]",
    ]

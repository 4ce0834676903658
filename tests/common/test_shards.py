"""Work shared out by `--shard I/N`: who does what, and who may be in a folder with whom."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import UserError
from common.shards import SHARDS, folder_shared_out, shard_of
from config.loading import load_config
from config.schema.autoencoder import LatentConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_shards_are_disjoint_and_together_everything(count):
    parts = [shard_of(range(10), f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(sum(parts, [])) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard_of(range(10), None) == list(range(10))


@pytest.mark.parametrize("value", ["0/8", "9/8", "3", "-1/8", "3/8/2", "a/b"])
def test_a_shard_that_is_none(value):
    with pytest.raises(UserError, match=f"shard must be I/N with I from 1 to N, e.g. 3/8, got '{value}'"):
        load_config(LatentConfig, None, values={"shard": value})


def held_elsewhere(folder: Path, shard: str | None, closing: ExitStack) -> subprocess.Popen:
    """Another process that holds the folder so until its input is closed."""
    code = (
        "import sys; from pathlib import Path; from common.shards import folder_shared_out\n"
        f"with folder_shared_out(Path({str(folder)!r}), {shard!r}, 'working'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = closing.enter_context(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes))
    assert process.stdout.readline() == "held\n"
    return process


def test_who_may_be_in_a_folder_with_whom(tmp_path):
    with ExitStack() as closing:
        other = held_elsewhere(tmp_path, "1/2", closing)
        with folder_shared_out(tmp_path, "2/2", "working") as own:
            (own / "mine").touch()
        for shard in ("1/2", None):
            with pytest.raises(UserError, match="is here in this folder"), folder_shared_out(tmp_path, shard, "here"):
                pass
        other.communicate()
    assert (own / "mine").exists()  # until the call that completes the folder has read it
    with ExitStack() as closing:
        whole = held_elsewhere(tmp_path, None, closing)
        with pytest.raises(UserError, match="is here in this folder"), folder_shared_out(tmp_path, None, "here"):
            pass
        whole.communicate()
    assert not (tmp_path / SHARDS).exists()

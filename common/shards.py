"""Work shared out to jobs that know nothing of each other, as those of a Slurm array: `--shard I/N`.

Each job does its items alone. What is made of all items (a manifest, a picture, figures) is made by a last call without
`--shard`, which finds the items done and does those that are not.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from common.files import folder_locked

Item = TypeVar("Item")
SHARDS = ".shards"  # in a folder that shards write into

logger = logging.getLogger(__name__)


def shard_of(items: Sequence[Item], shard: str | None) -> list[Item]:
    """The items of shard I/N, I = 1 ... N: every N-th from the I-th on. None: all.

    items: the same ones in the same order in every shard, whatever of them is done already.
    """
    if shard is None:
        return list(items)
    number, count = map(int, shard.split("/"))
    return list(items[number - 1 :: count])


def shard_folders(folder: Path) -> list[Path]:
    """Where the shards that a folder was shared out to keep what is theirs alone."""
    return sorted((folder / SHARDS).glob("*-of-*"))


@contextmanager
def folder_shared_out(
    folder: Path, shard: str | None, doing: str, begin: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Holds a folder for one shard beside others, or without a shard against everybody.

    Yields where this call writes what it writes alone: the shard's own folder, which lasts until a call without a shard
    has ended well, or `folder`. begin: called while no other one begins. UserError: the same shard, or one that this
    call is to complete, is still running. A shard waits for the end of a call without.
    """

    def say() -> None:
        logger.warning("%s: waiting for another process that is %s there", folder, doing)

    with ExitStack() as closing:
        with ExitStack() as beginning:
            beginning.enter_context(folder_locked(folder, doing, on_wait=None if shard is None else say))
            own = folder if shard is None else folder / SHARDS / shard.replace("/", "-of-")
            for held in shard_folders(folder) if shard is None else [own]:
                closing.enter_context(folder_locked(held, doing))
            begin()
            if shard is None:
                closing.push(beginning.pop_all())
        yield own
        if shard is None:
            shutil.rmtree(folder / SHARDS, ignore_errors=True)

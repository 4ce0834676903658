"""Files written beside their place and renamed, folders held against a second process, hashes of files."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.hub import local_file
from common.places import exists

LONG_NAME = 100  # bytes; file systems stop at 255, encrypted ones at 143
LOCK_NAME = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # of file systems
LEFTOVERS = ".*.tmp"  # what `replacing` names its files
RUN_LEFTOVERS = ".*.tmp*"  # in runs of earlier versions the process stood at the end


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, open for writing, that takes its place once it is whole and on the disk.

    After an error inside, `path` is what it was before. The folder is made if needed.
    Raises OSError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # e.g. where its folder is a file
            temporary.unlink(missing_ok=True)


def _temporary_name(name: str) -> str:
    """`.NAME.PROCESS.tmp`; where NAME is long, a hash stands for it: the file system may allow no longer one."""
    name_bytes = os.fsencode(name)
    kept = name if len(name_bytes) <= LONG_NAME else hashlib.sha256(name_bytes).hexdigest()[:16]
    return f".{kept}.{os.getpid()}.tmp"


def write_atomically(path: str | Path, *parts: bytes | memoryview) -> None:
    """Writes the parts of a file so that nothing partial is ever seen under its name.

    UserError, with the OSError as its cause, if it cannot be written.
    """
    try:
        with replacing(path) as file:
            file.writelines(parts)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_writable(path: str | Path, what: str = "") -> None:
    """To be called before long work whose result goes there; the folder is made if needed.

    UserError if no file can be written at `path`. what: comes before "cannot be written".
    """
    path = Path(path)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path}: {what}cannot be written ({error.strerror or error})") from error


def check_still_there(files: Sequence[Path], noun: str, what_now: str) -> None:
    """UserError where files that were there at the start are not any more. noun: what they are, in the plural."""
    gone = [path for path in files if not exists(path)]
    if gone:
        raise UserError(f"{gone[0]}: vanished meanwhile, {len(gone)} of {len(files)} {noun} are gone; {what_now}")


def remove_leftovers(folder: Path, pattern: str = LEFTOVERS) -> None:
    """Deletes what killed processes left half written below a folder, in which no other one may be writing."""
    for file in folder.rglob(pattern):
        file.unlink(missing_ok=True)


def lock(path: Path, on_wait: Callable[[], None] | None = None) -> contextlib.AbstractContextManager | None:
    """Holds a file, which is made if needed, until what is returned is left; the lock also ends with the process.

    None on a file system without locks: nothing is held there. The file says who holds it.

    on_wait: called before waiting for a process that holds it; without, `filelock.Timeout` is raised at once.
    Raises OSError where the file cannot be written.
    """
    from filelock import FileLock, Timeout  # here, since importing it takes a tenth of a second

    # No fallback to the existence of a file, which outlives a killed process.
    held = FileLock(path, fallback_to_soft=False, thread_local=False, on_acquired=_sign)
    try:
        return held.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            raise
        on_wait()
        return held.acquire(poll_interval=0.2)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)


def lock_folder(
    folder: Path, doing: str, on_wait: Callable[[], None] | None = None
) -> contextlib.AbstractContextManager:
    """Hold a folder, which exists, as `lock` does its file.

    doing: what a process that holds it does there, for the message. on_wait: as of `lock`.
    UserError: another process holds it, for instance one that a killed launcher left behind; not with `on_wait`.
    """
    from filelock import Timeout

    path = folder / LOCK_NAME
    try:
        return lock(path, on_wait) or contextlib.nullcontext()
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "unknown"
        raise UserError(
            f"{folder}: another process ({owner}) is {doing} in this folder; wait for it or end it"
        ) from None


@contextlib.contextmanager
def folder_locked(folder: Path, doing: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a folder, which is made if needed, as `lock_folder`, and leaves no file behind.

    Where none can be written the folder is not held: what can't be written can't be spoilt by another process either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_folder(folder, doing, on_wait)
    except OSError:
        yield
        return
    with held:
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, which may lie on the hub. UserError where it cannot be read."""
    try:
        with local_file(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

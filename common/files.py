"""Files written beside their place and renamed, folders held against a second process, hashes of files."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.hub import local_file

LONG_NAME = 100  # bytes; file systems stop at 255, encrypted ones at 143
LOCK_NAME = ".lock"
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
    gone = [path for path in files if not path.exists()]
    if gone:
        raise UserError(f"{gone[0]}: vanished meanwhile, {len(gone)} of {len(files)} {noun} are gone; {what_now}")


def remove_leftovers(folder: Path, pattern: str = LEFTOVERS) -> None:
    """Deletes what killed processes left half written below a folder, in which no other one may be writing."""
    for file in folder.rglob(pattern):
        file.unlink(missing_ok=True)


def lock(file: IO, on_wait: Callable[[], None] | None = None) -> bool:
    """Hold an open file until it is closed or the process ends. False on a file system without locks.

    on_wait: called before waiting for a process that holds it; without, BlockingIOError is raised at once.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if on_wait is None:
            raise BlockingIOError from None
        on_wait()
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def folder_locked(folder: Path, doing: str) -> Iterator[None]:
    """Holds a folder, which is made if needed, as `lock_folder`, and leaves no file behind.

    Where none can be written the folder is not held: what can't be written can't be spoilt by another process either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock_folder(folder, doing)
    except OSError:
        yield
        return
    with file:
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)


def lock_folder(folder: Path, doing: str) -> IO:
    """Hold a folder, which exists, until the returned file is closed; the lock also ends with the process.

    doing: what a process that holds it does there, for the message.

    Raises:
        UserError: another process holds it, for instance one that a killed launcher left behind.
    """
    path = folder / LOCK_NAME
    file = path.open("a+")
    try:
        is_locked = lock(file)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{folder}: another process ({owner}) is {doing} in this folder; wait for it or end it"
        ) from None
    if is_locked and not _is_at(file, path):  # whoever held it has just removed it
        file.close()
        return lock_folder(folder, doing)
    if is_locked:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
    return file


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, which may lie on the hub. UserError where it cannot be read."""
    try:
        with local_file(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

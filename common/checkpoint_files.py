"""Checkpoint files: the only place that reads or writes them, and checks that weights fit a model.

Loading executes no code: files are unpickled with `weights_only=True` and an allow-list of the plain types that
published checkpoints hold (an OmegaConf config in Lightning's `hyper_parameters`, `argparse.Namespace` in BiFlowNet's
`args`). No damaged byte passes for a weight: checksums are compared. Saving never leaves half a file: a temporary file
beside the target takes its place only once it is whole.

NAME.safetensors holds the same as a pickled file: an entry's tensors as ENTRY.NAME, all other entries as JSON beside
them. What is read may lie on the hub (`common/hub.py`).
"""

import glob
import hashlib
import logging
import pickle
import re
import shutil
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch import nn

from common.checkpoint_contents import check_archive, check_contents
from common.errors import UserError
from common.files import replacing
from common.hub import local_file
from common.places import is_file, is_folder
from common.tensor_files import CHECKPOINT, SUFFIX, read_tensor_file, tensor_file

# What a pickled DictConfig of plain values consists of, and argparse's Namespace; nothing here can run code.
OF_OMEGACONF = (DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata)
SAFE_TYPES = (*OF_OMEGACONF, Any, defaultdict, dict, list, int, Namespace)

logger = logging.getLogger(__name__)


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without executing any code from it.

    Args:
        path: file, or one on the hub, written by `save_checkpoint`, Lightning or the official release.
        mmap: map tensors instead of reading them, for a look at small entries.

    Raises:
        UserError: missing file, truncated file, another kind of file, one that holds a type that is not allowed, one
            that is larger unpacked than it is (`common/checkpoint_contents.py`), or one whose content is no longer what
            was saved.
    """
    checkpoint = _read(path, mmap)
    check_sums(path)
    return checkpoint


def _read(path: str | Path, mmap: bool) -> dict[str, Any]:
    """As `load_checkpoint`, but for the checksums of pickled files."""
    file = local_file(path)
    if not is_file(file):
        raise UserError(f"{path}: no such checkpoint file{', it is a folder' if is_folder(file) else ''}")
    checkpoint = _read_tensors(path) if file.suffix == SUFFIX else load_plain(path, mmap)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: not a checkpoint: holds a {type(checkpoint).__name__}, expected a dict")
    check_contents(path, checkpoint)
    return checkpoint


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """What a file of `torch.save` holds, weights of other projects among them, on the CPU. UserError: unreadable."""
    file = local_file(path)
    try:
        check_archive(file, path)
        with only_safe_types():
            is_mappable = mmap and zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mappable)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise UserError(f"{path}: {_why_unreadable(file, error)}") from error


def _read_tensors(path: str | Path) -> dict[str, Any]:
    tensors, about = read_tensor_file(path, CHECKPOINT)
    if fingerprint(tensors) != about.get("fingerprint"):
        raise UserError(f"{path}: damaged: its weights are no longer what was saved; copy or download it again")
    try:
        checkpoint = {**about["entries"]}
        for name, value in tensors.items():
            entry, _, name = name.partition(".")
            checkpoint.setdefault(entry, {})[name] = value
        return {**checkpoint, "args": Namespace(**checkpoint["args"])} if "args" in checkpoint else checkpoint
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its description is damaged: copy or download it again") from error


def _as_tensors(obj: Mapping[str, Any]) -> bytes:
    """A checkpoint as safetensors; what JSON can't hold is an error of ours."""
    groups = {name: value for name, value in obj.items() if _holds_tensors(value)}
    tensors = {f"{entry}.{name}": tensor for entry, group in groups.items() for name, tensor in group.items()}
    entries = {name: _plain(value) for name, value in obj.items() if name not in groups}
    return tensor_file(tensors, CHECKPOINT, {"fingerprint": fingerprint(tensors), "entries": entries})


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, torch.Tensor) for item in value.values()) and bool(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return vars(value)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_sums(path: str | Path) -> None:
    """Compares the checksums of a file of `torch.save`, which torch itself passes over; once while it stays the same.

    Older files, and those saved without, have none. UserError for a file whose content is no longer what was saved.
    """
    file = local_file(path)
    state = file.stat()
    if damaged := _damaged_record(str(file), state.st_ino, state.st_size, state.st_mtime_ns):
        raise UserError(f"{path}: damaged: {damaged} is no longer what was saved; copy or download it again")


@lru_cache(maxsize=256)
def _damaged_record(path: str, *state: int) -> str | None:
    """The first record whose checksum differs, if there is one. state: what a file of other content differs in."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if not record.CRC:  # as of `torch.serialization.set_crc32_options(False)`
                continue
            try:
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass
            except Exception:  # damage may show itself in any way
                return record.filename
    return None


@contextmanager
def only_safe_types() -> Iterator[None]:
    """The process-wide allow-list, to which any imported library may have added, is ours alone for a while."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(list(SAFE_TYPES)):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
        return (
            f"refused: it asks for {found[1]}, and loading that could run code; "
            "expected only tensors, plain values, an OmegaConf config or an argparse.Namespace"
        )
    with path.open("rb") as file:
        start = file.read(16)
    if isinstance(error, MemoryError):
        return f"{path.stat().st_size / 1e9:.3g} GB of memory are needed and not free"
    if start[:2] == b"PK":
        is_whole = zipfile.is_zipfile(path)
        found = "damaged checkpoint (its parts do not fit together)" if is_whole else "truncated checkpoint (no end)"
        return f"{found}; copy or download it again"
    if start[:1] == b"\x80":  # a pickle, as of torch before 1.6
        return "not a readable checkpoint: an old or bare pickle that ends too early or is damaged; copy it again"
    return f"not a readable checkpoint: {f'it begins with {start!r}' if start else 'an empty file'}; give one of torch"


def save_checkpoint(obj: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint so that `path` is at any moment the old file or the whole new one.

    NAME.safetensors is one of tensors and JSON, everything else pickled.

    Raises:
        UserError: the file could not be written, e.g. on a full disk; the old file is still there.
    """
    path = Path(path)
    _write(path, lambda file: file.write(_as_tensors(obj)) if path.suffix == SUFFIX else torch.save(obj, file))


def copy_checkpoint(source: Path, path: Path) -> None:
    """As `save_checkpoint` with the content of another file."""
    with source.open("rb") as content:
        _write(path, lambda file: shutil.copyfileobj(content, file))


def _write(path: Path, fill: Callable[[IO[bytes]], None]) -> None:
    try:
        with replacing(path) as file:
            fill(file)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*tmp*"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch reports a failed write of its archive as RuntimeError
        reason = _os_reason(error)
        if reason is None:
            raise
        kept = "; the previous file is kept" if path.exists() else ""
        raise UserError(
            f"{path}: the checkpoint could not be written ({reason}){kept}; make space and start again"
        ) from error


def _os_reason(error: BaseException) -> str | None:
    """What the operating system said, found along the chain of exceptions; None if this is no failed write."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link.strerror or str(link)
        link = link.__cause__ or link.__context__
    from_writer = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return "write failed, is the disk full?" if from_writer else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The readable checkpoint with the highest step in a folder, or None; the step is read from the file.

    Temporary files are left aside; a file that cannot be read is skipped with a warning.
    """
    steps = []
    for path in checkpoints_in(folder):
        try:
            checkpoint = _read(path, mmap=True)
        except UserError as error:
            logger.warning("skipped: %s", error)
            continue
        step = checkpoint.get("step", checkpoint.get("global_step", -1))
        steps.append((step if isinstance(step, int) else -1, path.stat().st_mtime_ns, path))
    for *_, path in sorted(steps, reverse=True):
        try:
            check_sums(path)  # of as few as possible: it takes reading them whole
            return path
        except UserError as error:
            logger.warning("skipped: %s", error)
    return None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoint files of a folder by their names, temporary ones left aside."""
    return [p for p in sorted(Path(folder).glob("*")) if p.suffix in (".pt", ".ckpt") and not p.name.startswith(".")]


def numbered_checkpoints(folder: str | Path, prefix: str) -> list[Path]:
    """The checkpoint files of a folder that are named `prefix` and their step in digits, the lowest step first."""
    names = re.compile(rf"{re.escape(prefix)}(\d+)")
    found = [(int(match[1]), path) for path in checkpoints_in(folder) if (match := names.fullmatch(path.stem))]
    return [path for _, path in sorted(found)]


def remove_older(written: Path, prefix: str, keep: int) -> None:
    """Deletes all but the `keep` newest of the numbered checkpoints up to the one just written; 0 keeps all.

    What is deleted is found on disk. Those of later steps, which a run that went on from an earlier one has left behind
    (unreadable ones among them), push nothing out. Nothing happens where `written` is not a numbered one itself.
    """
    files = numbered_checkpoints(written.parent, prefix)
    if keep and written in files:
        for file in files[: files.index(written) + 1][:-keep]:
            file.unlink(missing_ok=True)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path, target: str) -> None:
    """Loads a state dict whose names, shapes and kinds of numbers must fit; the error names the first that does not."""
    check_fits(model, state, path, target)
    model.load_state_dict(state)


def check_fits(model: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path, target: str) -> None:
    """As `load_weights`, and nothing is loaded: for a model on the meta device, which takes no memory."""
    problems = list(_misfits(model.state_dict(), state))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: the weights do not fit {target}: {problems[0]}{more}")


def _misfits(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, value in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif not isinstance(found[name], torch.Tensor):
            yield f"{name} is a {type(found[name]).__name__}, expected a tensor"
        elif found[name].shape != value.shape:
            yield f"{name} has shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        elif value.is_floating_point() and not found[name].is_floating_point():  # torch would convert without a word
            yield f"{name} holds {str(found[name].dtype).removeprefix('torch.')} values, expected floating-point ones"
    yield from (f"{name} is not part of the model" for name in found if name not in expected)

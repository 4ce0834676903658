"""Finds, fetches and checks MedicalNet's weight files.

A file is looked for in the folder that the user names, in `medicalnet/` of this repository and in torch hub's cache,
and otherwise fetched from the authors' mirror on Hugging Face. A `SHA256SUMS` file (as `sha256sum` writes it) beside
the weights, or in `medicalnet/`, is binding for the files that it lists.
"""

import hashlib
import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "medicalnet"
MIRROR = "https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet{depth}/resolve/main/{file}"
SUMS_FILE = "SHA256SUMS"
PREFIX = "module."  # the published networks were saved inside DataParallel
HEADS = ("conv_seg.", "fc.")  # of the tasks they were trained on; not part of the feature extractor
TIMEOUT_S = 20.0
LONGEST_REASON = 120  # characters; torch explains at length

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def load_weights(
    net: nn.Module, depth: int, file: str, weights_dir: str | Path | None = None, progress: bool = True
) -> None:
    """Load `file` (e.g. `resnet_10_23dataset.pth`) into `net`.

    Raises:
        ValueError: the file is nowhere and can't be fetched, fails its hash, holds more than tensors, or belongs to
            another network.
    """
    folders = search_folders(weights_dir)
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        path = download(depth, file, folders, progress)
    else:
        check_hash(path)
    state = read_state_dict(path)
    expected = net.state_dict()
    # Files from before PyTorch 0.4.1 have no `num_batches_tracked`, which eval mode never reads.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in expected]
    shapes = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    for problem, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path} {problem} {names[0]}{more}: it is not MedicalNet's ResNet-{depth}")
    net.load_state_dict(state, strict=False)


def search_folders(weights_dir: str | Path | None) -> list[Path]:
    """The folders to look in, the user's first; ValueError when that one doesn't exist."""
    folders = [DEFAULT_FOLDER, Path(torch.hub.get_dir()) / "checkpoints"]
    if weights_dir is None or str(weights_dir) == "":
        return folders
    try:
        folder = Path(weights_dir).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # one that may not be entered; no such user
        raise ValueError(f"the weights folder {weights_dir} cannot be looked at ({error})") from error
    if not is_folder:
        raise ValueError(f"the weights folder {folder} does not exist")
    return [folder, *folders]


def download(depth: int, file: str, folders: list[Path], progress: bool) -> Path:
    """Fetch `file` into the first folder that can be written to: beside its place, checked, then renamed."""
    url = MIRROR.format(depth=depth, file=file)
    folder = next((f for f in folders if os.access(f, os.W_OK)), folders[-1])
    partial = folder / f".{file}.{os.getpid()}.partial"
    logger.info("fetching %s into %s", url, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with socket_timeout(TIMEOUT_S):
            torch.hub.download_url_to_file(url, str(partial), progress=progress)
        check_hash(partial, file)
        read_state_dict(partial)  # a download cut short must not take the file's place
        partial.replace(folder / file)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the MedicalNet weights {file} were not found in {', '.join(map(str, folders))} and could not be fetched "
            f"from {url} ({error}): download the file elsewhere (also linked on https://github.com/Tencent/MedicalNet) "
            f"and put it in {folders[0]}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return folder / file


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """A network that swallows packets must give an error soon; torch.hub sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_hash(path: Path, file: str | None = None) -> None:
    """ValueError when the SHA-256 of `path` isn't the one listed for `file` (default: its own name)."""
    file = file or path.name
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    listed = {**read_sums(DEFAULT_FOLDER), **read_sums(path.parent)}
    if file not in listed:
        if digest not in _logged:
            _logged.add(digest)
            logger.info("%s has SHA-256 %s (not listed in %s, so not checked)", file, digest, SUMS_FILE)
    elif digest != listed[file]:
        raise ValueError(
            f"{path.parent / file} has SHA-256 {digest}, but {SUMS_FILE} lists {listed[file]}: fetch the file again"
        )


def read_sums(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} of the folder's `SHA256SUMS`, {} without one. Lines: `<64 digits>  <name>`, or `# …`."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip() and line[0] != "#")
    sums = {parts[-1].strip().lstrip("*"): parts[0].lower() for parts in lines}
    for name, digest in sums.items():
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{path}: the entry of {name} has no SHA-256 of 64 hexadecimal digits before it")
    return sums


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The `state_dict` of a published file, without `module.` prefix and heads; nothing in it is executed.

    Raises:
        ValueError: the file can't be read, holds more than plain tensors, or has no state_dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = refusal_reason(error)
        raise ValueError(f"{path} is no readable file of plain weights ({reason}): fetch it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict of tensors: it is not a MedicalNet weight file")
    named = ((name.removeprefix(PREFIX), value) for name, value in state.items())
    return {name: value for name, value in named if not name.startswith(HEADS)}


def refusal_reason(error: Exception) -> str:
    """The one telling line of torch's long message about a file that holds more than tensors."""
    lines = str(error).splitlines() or [type(error).__name__]
    telling = next((line.strip() for line in lines if "Unsupported" in line), lines[0].strip())
    return telling if len(telling) <= LONGEST_REASON else f"{telling[: LONGEST_REASON - 3]}..."

"""Finds, fetches and checks the two weight files of LPIPS: the VGG-16 backbone and the linear heads.

| file | names inside | looked for in |
|---|---|---|
| `vgg16-397923af.pth` (torchvision) | `features.N.weight` … | the user's folder, torch hub's cache, then downloaded |
| `vgg.pth` (LPIPS v0.1) | `lin0.model.1.weight` … | the user's folder, then the PyPI package `lpips` |
"""

import importlib.util
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint_contents import check_contents
from common.checkpoint_files import load_plain
from common.files import file_sha256
from common.places import home_expanded, is_file, is_folder

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
VGG_HASH = "397923af"  # torchvision puts the first eight digits of the SHA-256 in the name
HEADS_FILE = "vgg.pth"
TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)


def load_vgg_weights(lpips: nn.Module, weights_dir: str | Path | None) -> dict[str, Tensor]:
    """The backbone's parameters under LPIPS' names (`net.slice1.0.weight` …).

    Raises:
        ValueError: the file is nowhere and can't be fetched, or is unreadable, or is another network's.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [*user_folder(weights_dir), cache]
    path = first_existing(folders, VGG_FILE)
    if path is None:
        weights, path = download_vgg(folders), cache / VGG_FILE
    else:
        digest = file_sha256(path)
        if not digest.startswith(VGG_HASH):  # no error: it may be the user's own VGG-16
            logger.warning("%s is not torchvision's file: its SHA-256 is %s, not %s…", path, digest, VGG_HASH)
        weights = read_weights(path)
    wanted = [name for name in lpips.state_dict() if name.startswith("net.")]
    return select(lpips, {name: re.sub(r"^net\.slice\d+", "features", name) for name in wanted}, weights, path)


def load_head_weights(lpips: nn.Module, weights_dir: str | Path | None) -> dict[str, Tensor]:
    """The five linear heads (`lin0.model.1.weight` …).

    Raises:
        ValueError: the file is nowhere, unreadable or another network's.
    """
    folders = user_folder(weights_dir) + package_folder()
    path = first_existing(folders, HEADS_FILE)
    if path is None:
        place = f"put it in {folders[0]}" if folders else "name a folder that holds it in model.perceptual_weights"
        raise ValueError(
            f"the LPIPS v0.1 heads for VGG-16 ({HEADS_FILE}) were not found in {list_folders(folders)}: "
            f"run `pip install lpips`, which carries them (lpips/weights/v0.1/{HEADS_FILE}), or {place}"
        )
    wanted = [name for name in lpips.state_dict() if name.startswith("lin")]
    return select(lpips, {name: name for name in wanted}, read_weights(path), path)


def user_folder(weights_dir: str | Path | None) -> list[Path]:
    """[the folder], or [] without one; ValueError when it doesn't exist."""
    if weights_dir is None or str(weights_dir) == "":
        return []
    folder = home_expanded(weights_dir)
    if not is_folder(folder):
        raise ValueError(f"model.perceptual_weights names {folder}, which is not a folder")
    return [folder]


def package_folder() -> list[Path]:
    """Where the package `lpips` keeps its heads. It is only looked up: importing it would import torchvision."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "weights" / "v0.1"]


def first_existing(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if is_file(folder / name)), None)


def list_folders(folders: list[Path]) -> str:
    return ", ".join(map(str, folders)) or "any folder (none was named)"


def download_vgg(searched: list[Path]) -> dict[str, Tensor]:
    """Fetch torchvision's file into torch hub's cache, with its hash checked, and read it."""
    logger.info("fetching %s (528 MB) into %s", VGG_URL, searched[-1])
    try:
        with socket_timeout(TIMEOUT_S):
            return torch.hub.load_state_dict_from_url(VGG_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise ValueError(
            f"the VGG-16 weights {VGG_FILE} were not found in {list_folders(searched)} and could not be fetched from "
            f"{VGG_URL} ({error}): download that file elsewhere and put it in {searched[0]}, or name a folder that "
            "holds it in model.perceptual_weights, or set model.perceptual_weight=0"
        ) from error


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """A network that swallows packets must give an error soon; torch.hub sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of plain tensors; nothing in it is executed. ValueError for anything else."""
    weights = load_plain(path)
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not a dictionary of weights: fetch it again")
    check_contents(path, weights)
    return weights


def select(model: nn.Module, names: dict[str, str], weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """{our name: name in the file} -> {our name: tensor}; ValueError for a missing name or another shape."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    chosen = {}
    for ours, theirs in names.items():
        if theirs not in weights:
            raise ValueError(f"{path} has no {theirs}: it is not the weight file that LPIPS on VGG-16 needs")
        if tuple(weights[theirs].shape) != shapes[ours]:
            raise ValueError(f"{path}: {theirs} has shape {tuple(weights[theirs].shape)}, needed is {shapes[ours]}")
        chosen[ours] = weights[theirs]
    return chosen

"""A short look at what the diffusion model makes of one class, during training.

Rank 0 samples one latent with a few DDIM steps, in a thread beside training. The next checkpoint waits for it, and then
the other ranks wait for rank 0. So a preview has a time limit, far below the process groups' time-outs (nccl: 10
minutes, gloo: 30).
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from AutoEncoder.decoding import decode
from common.errors import UserError
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.pictures import central_slices, save_slice_grid
from dataset.volumes.volume_io import write_volume

TIME_LIMIT_S = 120.0  # for sampling; decoding one volume comes on top
FREE_SHARE = 0.5  # of a GPU's memory that training hasn't taken: it may take more while a volume is decoded


class PreviewTimeout(Exception):
    """Sampling took longer than the limit."""


class NotEnoughMemory(Exception):
    """The memory that there is doesn't do for decoding."""


class PreviewStopped(Exception):
    """Training is to stop, and nobody waits for a preview then."""


class Previews:
    """Previews of a run, class after class, from checkpoints' weights and beside training.

    The networks are its own, on the CPU between previews. On a GPU all work is given to a stream of its own, so that
    nothing waits for training or makes it wait, and no memory passes from one to the other.

    Args:
        folder: gets the files, see `write_preview`.
        classes: class ids that previews take turns at.
        grid: latent grid (d, h, w).
        steps: DDIM steps.
        model: the denoiser; a copy of it is made.
        diffusion: on `device`; only read.
        autoencoder: decodes.
        device: where previews are computed.
        is_stopping: whether training is to stop.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[int],
        grid: tuple[int, int, int],
        steps: int,
        model: nn.Module,
        diffusion: nn.Module,
        autoencoder: nn.Module,
        device: torch.device,
        logger: logging.Logger,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._folder, self._classes, self._grid, self._steps = folder, classes, grid, steps
        self._model = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
        self._diffusion, self._autoencoder = diffusion, autoencoder
        self._device, self._logger, self._is_stopping = device, logger, is_stopping
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, step: int, turn: int, weights: dict[str, Tensor]) -> None:
        """Preview of the `turn`-th class at `step` with these weights, on the CPU and no longer changing."""
        self._model.load_state_dict(weights)
        class_id = self._classes[turn % len(self._classes)]
        # A thread has a current GPU and stream of its own; this sets both.
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            write_preview(
                self._folder, step, class_id, self._grid, self._steps, self._model, self._diffusion,
                self._autoencoder, self._logger, self._device, is_stopping=self._is_stopping,
            )  # fmt: skip


@torch.no_grad()
def write_preview(
    folder: Path,
    step: int,
    class_id: int,
    grid: tuple[int, int, int],
    steps: int,
    model: nn.Module,
    diffusion: nn.Module,
    autoencoder: nn.Module,
    logger: logging.Logger,
    device: torch.device,
    time_limit_s: float = TIME_LIMIT_S,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Sample one latent, decode it and write NIfTI and a PNG of its central slices. No global generator is used.

    Args:
        folder: gets `step_SSSSSSS_class_C.nii.gz` and `.png`.
        class_id: the class to sample.
        grid: latent grid (d, h, w).
        steps: DDIM steps.
        model: the denoiser, with averaged weights, in eval mode.
        autoencoder: decodes.
        device: where both networks are moved to in turn, and back again.
        is_stopping: asked after each step whether to give up.

    Returns:
        The NIfTI file, or None, with a warning, where the time limit was hit, training stops, memory ran out or the
        disk is full.
    """
    deadline = time.monotonic() + time_limit_s

    def check(done: int, total: int) -> None:
        if is_stopping():
            raise PreviewStopped
        if time.monotonic() > deadline:
            raise PreviewTimeout

    try:
        with _moved(model, device):
            latent = _sample(model, diffusion, class_id, grid, steps, device, check)
        with _moved(autoencoder, device):
            volume = _decode(autoencoder, latent)
    except PreviewTimeout:
        logger.warning("preview of step %d: given up after %g s; lower preview_steps", step, time_limit_s)
        return None
    except PreviewStopped:
        logger.warning("preview of step %d: given up, as training is to stop", step)
        return None
    except (torch.OutOfMemoryError, NotEnoughMemory):
        logger.warning("preview of step %d: not enough GPU memory; say preview=false", step)
        return None
    path = folder / f"step_{step:07d}_class_{class_id}.nii.gz"
    picture = path.with_name(path.name.replace(".nii.gz", ".png"))
    try:
        write_volume(path, volume, affine_from_spacing((1.0, 1.0, 1.0)))
        save_slice_grid(picture, [(f"class {class_id}", list(central_slices(volume).values()))])
    except UserError as error:  # a preview is not worth a training run
        logger.warning("preview of step %d: %s", step, error)
        return None
    return path


def _sample(
    model: nn.Module,
    diffusion: nn.Module,
    class_id: int,
    grid: tuple[int, int, int],
    steps: int,
    device: torch.device,
    check: Callable[[int, int], None],
) -> Tensor:
    generator = torch.Generator().manual_seed(class_id)  # the same noise each time, so that previews can be compared
    z = torch.randn((1, diffusion.channels, *grid), generator=generator).to(device)  # (1, C, d, h, w)
    y = torch.tensor([class_id], device=device)
    res = torch.tensor([grid], device=device) / model.vq_size  # (1, 3)
    return diffusion.sample(
        model, z, y=y, res=res, strategy="ddim", ddim_steps=steps, generator=generator, progress=check
    )


@contextlib.contextmanager
def _moved(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The network on `device`, and then where it was."""
    home = next(network.parameters()).device
    try:
        network.to(device)
        yield
    finally:
        network.to(home)


def _decode(autoencoder: nn.Module, latent: Tensor) -> Tensor:
    """Normalised latent (1, C, d, h, w) -> volume (1, D, H, W) on the CPU."""
    max_bytes = None
    if latent.device.type == "cuda":
        max_bytes = int(FREE_SHARE * torch.cuda.mem_get_info(latent.device)[0])
    try:
        return decode(autoencoder, latent[0], max_bytes=max_bytes)
    except UserError as error:  # the smallest blocks don't fit
        raise NotEnoughMemory from error

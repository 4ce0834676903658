"""A short look at what the diffusion model makes of one class, during training.

Rank 0 samples one latent with a few steps of DDIM or Euler, in a thread beside training. The next checkpoint waits for
it, and then the other ranks wait for rank 0. So a preview has a time limit, far below the process groups' time-outs
(nccl: 10 minutes, gloo: 30).
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from AutoEncoder.decoding import decode
from common.errors import UserError
from dataset.Multires_dataset import Grid
from dataset.volumes.geometry import centred_affine
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import write_volume
from ddpm.frozen_base import part_of
from train.loop.deletion import check_not_deleted
from train.loop.previews import GivenUp, attempt

FREE_SHARE = 0.5  # of a GPU's memory that training hasn't taken: it may take more while a volume is decoded
INSTEAD = "say preview=false"


@dataclass
class Previews:
    """Previews of a run, class after class and size after size, from checkpoints' weights and beside training.

    The networks are its own, on the CPU between previews. On a GPU all work is given to a stream of its own, so that
    nothing waits for training or makes it wait, and no memory passes from one to the other.
    """

    folder: Path  # in the run's; gets `step_SSSSSSS_class_C.nii.gz` and `.png`
    kinds: Sequence[tuple[int, Grid]]  # class ids and latent grids that previews take turns at
    steps: int  # of the process's fast sampler
    model: nn.Module  # the denoiser; a copy of it is made
    diffusion: nn.Module  # on `device`; only read
    autoencoder: nn.Module
    device: torch.device  # where both networks are moved to in turn, and back again
    logger: logging.Logger
    hint_of: Callable[[int, Grid], Tensor | None] = lambda class_id, grid: None  # (1, H, d, h, w) of a class and size
    is_stopping: Callable[[], bool] = lambda: False  # asked after each step whether to give up
    time_limit_s: float = 120.0  # for sampling; decoding one volume comes on top

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).to("cpu").eval().requires_grad_(False)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def exists(self, step: int) -> bool:
        """Whether there is a preview of that step."""
        return any(self.folder.glob(f"step_{step:07d}_class_*.nii.gz"))

    def write(self, step: int, turn: int, weights: dict[str, Tensor]) -> Path | None:
        """Sample and decode a latent of the `turn`-th kind with these weights, on the CPU and no longer changing.

        Writes NIfTI and a PNG of the central slices; no global generator is used. Returns the NIfTI file, or None, with
        a warning, where the time limit was hit, training stops, or anything went wrong (`attempt`).
        """
        what = f"preview of step {step}"
        return attempt(lambda: self._write(step, turn, weights), what, self.folder.parent, self.logger, INSTEAD)

    @torch.no_grad()
    def _write(self, step: int, turn: int, weights: dict[str, Tensor]) -> Path:
        part_of(self.model).load_state_dict(weights)
        class_id, grid = self.kinds[turn % len(self.kinds)]
        path = self.folder / f"step_{step:07d}_class_{class_id}.nii.gz"
        # A thread has a current GPU and stream of its own; this sets both.
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            volume = self._decode(self._sample(class_id, grid))
        check_not_deleted(self.folder.parent)
        write_volume(path, volume, centred_affine((1.0, 1.0, 1.0), volume.shape[-3:]))
        picture = path.with_name(path.name.replace(".nii.gz", ".png"))
        save_slice_grid(picture, [(f"class {class_id}", list(central_slices(volume).values()))], columns=PLANES)
        return path

    def _sample(self, class_id: int, grid: Grid) -> Tensor:
        """A normalised latent (1, C, d, h, w)."""
        deadline = time.monotonic() + self.time_limit_s

        def check(done: int, total: int) -> None:
            if self.is_stopping():
                raise GivenUp("given up, as training is to stop")
            if time.monotonic() > deadline:
                raise GivenUp(f"given up after {self.time_limit_s:g} s; lower preview_steps")

        generator = torch.Generator().manual_seed(class_id)  # the same noise each time, for previews to be compared
        z = torch.randn((1, self.diffusion.channels, *grid), generator=generator).to(self.device)
        conditions = {"y": torch.tensor([class_id], device=self.device)}
        conditions["res"] = torch.tensor([grid], device=self.device) / self.model.vq_size  # (1, 3)
        if (hint := self.hint_of(class_id, grid)) is not None:
            conditions["hint"] = hint.to(self.device)
        options = dict(ddim_steps=self.steps, generator=generator, progress=check)
        with _moved(self.model, self.device):
            strategy = self.diffusion.fast_strategy
            return self.diffusion.sample(self.model, z, strategy=strategy, conditions=conditions, **options)

    def _decode(self, latent: Tensor) -> Tensor:
        """Volume (1, D, H, W) on the CPU."""
        max_bytes = None
        if self.device.type == "cuda":
            max_bytes = int(FREE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        try:
            with _moved(self.autoencoder, self.device):
                return decode(self.autoencoder, latent[0], max_bytes=max_bytes)
        except UserError as error:  # the smallest blocks don't fit
            raise GivenUp(f"not enough memory; {INSTEAD}") from error


@contextlib.contextmanager
def _moved(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The network on `device`, and then where it was."""
    home = next(network.parameters()).device
    try:
        network.to(device)
        yield
    finally:
        network.to(home)

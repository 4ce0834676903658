"""The held-out loss: of latents that are not trained on, with the same noise and timesteps every time.

It says which checkpoint to take (docs/training.md): the training's own loss keeps falling while samples are learned by
heart, and its noise hides small differences.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from common.precision import autocast
from common.progress import tracked
from dataset.Multires_dataset import Multires_dataset
from dataset.volumes.geometry import size_text
from ddpm.latent_process import LatentProcess
from train.diffusion.batches import apart
from train.loop.session import Session

RANGES = 4  # of timesteps, evenly spaced from data to noise; each latent is measured once in each


class HeldOutLoss:
    """Losses of a data set's latents, shared out to the ranks; the same whatever their number, rounding aside.

    Args:
        dataset: of the split's validation side.
        most: latents of each class and size that are measured, evenly chosen.
        precision: as the training's.
    """

    def __init__(
        self, dataset: Multires_dataset, process: LatentProcess, most: int, precision: str, here: Session
    ) -> None:
        self._dataset, self._process, self._precision, self._here = dataset, process, precision, here
        of_kind: dict[tuple, list[int]] = defaultdict(list)
        for index, (label, shape) in enumerate(zip(dataset.labels, dataset.shapes, strict=True)):
            of_kind[label, shape].append(index)
        self.indices = sorted(i for kind in of_kind.values() for i in kind[:: math.ceil(len(kind) / most)])

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """`val_loss` of a model in eval mode, and by class, size and range of timesteps. On all ranks, in one step."""
        ranks = self._here.distributed
        mine = tracked(self.indices[ranks.rank :: ranks.world_size], "held-out loss", "latent", transient=True)
        shares = ranks.on_all(lambda: {index: self._losses(model, index) for index in mine})
        found = {index: losses for share in shares for index, losses in share.items()}
        groups: dict[str, list[float]] = defaultdict(list)
        for index in self.indices:
            label, grid = self._dataset.labels[index], size_text(self._dataset.shapes[index][1:])
            for place, loss in enumerate(found[index]):
                low, high = place / RANGES, (place + 1) / RANGES
                for name in ("", f"/class_{label}", f"/{grid}", f"/t_{low:g}-{high:g}"):
                    groups[f"val_loss{name}"].append(loss)
        return {name: math.fsum(losses) / len(losses) for name, losses in groups.items()}

    def _losses(self, model: nn.Module, index: int) -> list[float]:
        """Of one latent in each range of timesteps."""
        device = self._here.device
        generator = torch.Generator().manual_seed(index)  # on the CPU: the same on every device
        places = torch.rand(RANGES, generator=generator, dtype=torch.float64)  # float32 would round some sums up to 1
        fractions = (torch.arange(RANGES) + places) / RANGES  # (R,)
        items = self._dataset[index][0].expand(RANGES, -1, -1, -1, -1)
        latents, conditions = apart(self._dataset, items, self._dataset.conditions([index] * RANGES))
        noise = torch.randn(latents.shape, generator=generator)  # (R, C, d, h, w)
        with autocast(device, self._precision):
            losses: Tensor = self._process.p_losses(
                model,
                latents.to(device),
                self._process.timesteps_at(fractions.to(device)),
                noise=noise.to(device),
                conditions={name: values.to(device) for name, values in conditions.items()},
                reduction="none",
            )
        return losses.tolist()

"""Losses of the steps since the last logged one: their mean, and by class and by size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.processes import Distributed
from dataset.Multires_dataset import Grid
from dataset.volumes.geometry import size_text
from train.diffusion.batches import Batch


class LossesByKind:
    """Sums of samples' losses, kept on the device, so that nothing waits for it.

    kinds: class ids and sizes that there are; of a lone class or size nothing is told apart.
    """

    def __init__(self, kinds: Sequence[tuple[int, Grid]], device: torch.device) -> None:
        classes, grids = sorted({label for label, _ in kinds}), sorted({grid for _, grid in kinds})
        names = {1 + place: f"loss/class_{label}" for place, label in enumerate(classes) if len(classes) > 1}
        first = 1 + len(classes)  # row of the first size; row 0 is the mean of the steps
        self._row_of_grid = {grid: first + place for place, grid in enumerate(grids)}
        self._names = names | {row: f"loss/{size_text(g)}" for g, row in self._row_of_grid.items() if len(grids) > 1}
        self._row_of_class = torch.zeros(max(classes) + 1, dtype=torch.int64, device=device)
        self._row_of_class[classes] = torch.arange(1, first, device=device)
        self._sums = torch.zeros(first + len(grids), 2, device=device)  # of losses, and how many they are

    def add(self, losses: Tensor, batch: Batch) -> None:
        """One step: losses (B,) of this rank's share of the batch."""
        losses, labels = losses.float(), batch.conditions["y"].to(losses.device, non_blocking=True)
        counted = torch.stack([losses, torch.ones_like(losses)], dim=1)  # (B, 2)
        self._sums[0] += torch.stack([losses.mean(), torch.ones_like(losses[0])])
        self._sums[self._row_of_grid[batch.grid]] += counted.sum(0)
        self._sums.index_add_(0, self._row_of_class[labels], counted)

    def read(self, ranks: Distributed) -> dict[str, float]:
        """`loss`, the mean of the steps, and those by class and size that there was a sample of; begins anew."""
        sums = ranks.mean(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        means = {name: sums[row][0] / sums[row][1] for row, name in self._names.items() if sums[row][1]}
        return {"loss": sums[0][0] / sums[0][1], **means}

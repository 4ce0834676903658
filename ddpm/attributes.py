"""Attributes of a volume as a condition of the denoiser: numbers such as age or spacing, and categories such as sex."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOLUME = "volume"  # the source that is the volumes themselves
OF_VOLUMES = {f"{what}_{axis}": (what, place) for what in ("spacing", "size") for place, axis in enumerate("xyz")}
NUM_WAVES = 4  # of a scalar's features; the shortest is half as long as its range


@dataclass(frozen=True)
class AttributeSpec:
    """What a network knows of an attribute: the lowest and highest value of a number, or the categories.

    of_volume: what of a volume itself it is, e.g. "spacing_x"; None: nothing.
    """

    name: str
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    of_volume: str | None = None

    def encoded(self, value: float | str | None) -> float:
        """What the network is given: a number's range is -1 to 1, a category its place, unknown NaN."""
        if value is None:
            return math.nan
        if self.range is None:
            return float(self.categories.index(value))
        low, high = self.range
        return 2 * (float(value) - low) / (high - low) - 1


class AttributeEmbedding(nn.Module):
    """Attributes (B, A), as `AttributeSpec.encoded` has them -> their sum as a condition (B, width).

    It starts as zero for any attributes, so a network that gets one later gives what it gave before. An unknown value
    (NaN) has an embedding of its own, which is also what guidance compares with.

    Raises:
        ValueError: a name that a module of torch cannot have.
    """

    def __init__(self, specs: tuple[AttributeSpec, ...], width: int) -> None:
        super().__init__()
        self.specs = specs
        try:
            self.of = nn.ModuleDict(
                {spec.name: _Scalar(width) if spec.range else _Category(len(spec.categories), width) for spec in specs}
            )
        except KeyError as error:
            raise ValueError(f"attribute with a name that torch has taken ({error}): choose another") from error

    def forward(self, attributes: Tensor) -> Tensor:
        return sum(embed(attributes[:, place]) for place, embed in enumerate(self.of.values()))

    def reset_to_zero(self) -> None:
        """Let every attribute add nothing."""
        for embed in self.of.values():
            embed.reset_to_zero()

    def check_shape(self, attributes: Tensor, batch: int) -> None:
        """ValueError unless they are (batch, A)."""
        if tuple(attributes.shape) != (batch, len(self.specs)):
            raise ValueError(f"attributes have shape {tuple(attributes.shape)}: expected ({batch}, {len(self.specs)}).")

    def check(self, attributes: Tensor) -> None:
        """ValueError for categories that there are not. Reads values: not for compiled graphs."""
        for place, spec in enumerate(self.specs):
            known = attributes[:, place][~attributes[:, place].isnan()]
            if spec.range is None and len(known) and not 0 <= known.min() <= known.max() < len(spec.categories):
                found = sorted(set(known.tolist()))
                raise ValueError(f"attribute {spec.name}: {found}, expected 0 to {len(spec.categories) - 1}.")


class _Scalar(nn.Module):
    """A number (B,), mostly in [-1, 1] -> (B, width), by a small network over its waves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1 + 2 * NUM_WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.unknown = nn.Parameter(torch.empty(width))

    def forward(self, value: Tensor) -> Tensor:
        is_unknown, value = value.isnan()[:, None], value.nan_to_num()[:, None].to(self.unknown.dtype)  # (B, 1)
        angles = value * math.pi / 2 * torch.arange(1, NUM_WAVES + 1, device=value.device)  # (B, NUM_WAVES)
        features = torch.cat([value, angles.sin(), angles.cos()], dim=1)  # (B, 1 + 2 · NUM_WAVES)
        return torch.where(is_unknown, self.unknown, self.mlp(features))

    def reset_to_zero(self) -> None:
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        nn.init.zeros_(self.unknown)


class _Category(nn.Module):
    """A category's place (B,) -> (B, width); the last row of the table is for unknown ones."""

    def __init__(self, num_categories: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_categories + 1, width)

    def forward(self, value: Tensor) -> Tensor:
        return self.table(value.nan_to_num(self.table.num_embeddings - 1).long())

    def reset_to_zero(self) -> None:
        nn.init.zeros_(self.table.weight)


def of_volume(name: str, spacing_mm: Sequence[float], size: Sequence[int]) -> float:
    """One of `OF_VOLUMES`, of a volume of this spacing (x, y, z) and size in voxels (X, Y, Z)."""
    what, place = OF_VOLUMES[name]
    return float((spacing_mm if what == "spacing" else size)[place])


def specs_of(rows: list[Mapping]) -> tuple[AttributeSpec, ...]:
    """Those of the rows of a config's `attributes`."""
    return tuple(
        AttributeSpec(
            row["name"],
            tuple(row["range"]) if row["range"] else None,
            tuple(row["categories"]),
            (row["column"] or row["name"]) if row["source"] == VOLUME else None,
        )
        for row in rows
    )

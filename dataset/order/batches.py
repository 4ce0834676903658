"""Batches of things that can be stacked."""

from collections.abc import Hashable, Sequence


def batches_of_one_shape(items: Sequence, shapes: Sequence[Hashable], batch_size: int) -> list[list]:
    """The items in batches of at most `batch_size`, each of one shape; in their order as far as that allows.

    shapes: of each item. The batches depend on these alone: given all items, an interrupted run has the same again.
    """
    by_shape: dict[Hashable, list] = {}
    for item, shape in zip(items, shapes, strict=True):
        by_shape.setdefault(shape, []).append(item)
    return [same[i : i + batch_size] for same in by_shape.values() for i in range(0, len(same), batch_size)]

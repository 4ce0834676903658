"""How evenly a codebook is used. Pure functions of how often each code occurred, computed in float64."""

from torch import Tensor


def codebook_usage(counts: Tensor) -> float:
    """Share of the codes that occurred at least once, in [0, 1].

    counts: (n_codes,). Raises ValueError for other shapes, negative or infinite counts, or none at all.
    """
    return (_frequencies(counts) > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """Exponential of the entropy of the codes' frequencies: 1 for one code alone, n_codes for all equally often.

    counts: (n_codes,). Raises ValueError for other shapes, negative or infinite counts, or none at all.
    """
    frequencies = _frequencies(counts)
    frequencies = frequencies[frequencies > 0]  # 0·log 0 = 0
    return (-(frequencies * frequencies.log()).sum()).exp().item()


def _frequencies(counts: Tensor) -> Tensor:
    """(n_codes,) counts -> (n_codes,) shares in float64."""
    counts = counts.double()
    if counts.ndim != 1 or not (counts.isfinite().all() and (counts >= 0).all() and counts.sum() > 0):
        raise ValueError(f"expected counts (n_codes,) of codes that occurred, got {_summary(counts)}")
    return counts / counts.sum()


def _summary(counts: Tensor) -> str:
    if counts.ndim != 1 or len(counts) == 0:
        return f"shape {tuple(counts.shape)}"
    return f"{counts.min().item():g} to {counts.max().item():g}"

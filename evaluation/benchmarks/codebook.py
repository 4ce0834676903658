"""A training step of the codebook: nearest codes, loss, perplexity and moving averages, beside the one-hot form.

The one-hot form is what papers write down: all distances at once, a one-hot matrix (tokens, codes), and its products
with the vectors. Both go without the restart of idle codes, which draws at random. Compared first: the codes after a
step agree within 1e-3 of their norm, since a token between two codes may go to either. Peak memory is that of the step
beside its inputs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from AutoEncoder.model.codebook import Codebook
from common.processes import choose_device
from evaluation.benchmarks.measuring import Limits, Report, Row, chosen, compared, in_turn, relative_error, timed

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scale:
    """Codes, their length, and the grid of latents (B, d, h, w) whose cells are the tokens."""

    n_codes: int
    embedding_dim: int
    grid: tuple[int, int, int, int]


SCALES = {"paper": Scale(8192, 8, (64, 8, 8, 8)), "tiny": Scale(64, 4, (2, 4, 4, 4))}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if the ways differ."""
    scale, device = SCALES[cfg.size], choose_device(cfg.device)
    torch.manual_seed(0)
    batch, *grid = scale.grid
    z = torch.randn(batch, scale.embedding_dim, *grid, device=device)  # (B, E, d, h, w)
    started = Codebook(scale.n_codes, scale.embedding_dim, no_random_restart=True).to(device)
    started(z)
    ways = chosen(
        {
            "plain": lambda: partial(_plain_step, copy.deepcopy(started), z),
            "ours": lambda: partial(_step, copy.deepcopy(started), z),
            "ours compiled": lambda: partial(_step, torch.compile(copy.deepcopy(started)), z),
        },
        cfg.ways,
    )
    results = {name: (way, TOLERANCE) for name, way in ways.items()}
    figures = {name: found for name, _, *found in compared(results, device, relative_error)}  # memory, difference
    seconds = in_turn({name: partial(timed, way, device) for name, way in ways.items()}, cfg.repetitions)
    num_tokens = z.numel() // scale.embedding_dim
    flops = 2 * num_tokens * scale.n_codes * scale.embedding_dim  # of the distances, which none goes without
    least = Limits.measured(device, [torch.float32]).seconds(flops, 2 * z.nbytes, torch.float32)
    rows = [
        Row(name, seconds[name], num_tokens, *figures[name], limit_share=least / median(seconds[name])) for name in ways
    ]
    title = f"codebook step, {scale.n_codes} codes of {scale.embedding_dim}, {num_tokens} tokens, {device}"
    notes = {"threads": torch.get_num_threads()}
    if rows[0].peak_gb and rows[-1].peak_gb is not None:
        notes[f"memory, {rows[0].name} over {rows[-1].name}"] = round(rows[0].peak_gb / max(rows[-1].peak_gb, 1e-9), 1)
    return Report(title, "tokens", rows[0].name, rows, notes)


def _step(codebook: Callable[[Tensor], dict], z: Tensor) -> Tensor:
    codebook(z)
    return codebook.embeddings.clone()


def _plain_step(codebook: Codebook, z: Tensor) -> Tensor:
    one_hot_step(codebook, z)
    return codebook.embeddings.clone()


@torch.no_grad()
def one_hot_step(codebook: Codebook, z: Tensor) -> Tensor:
    """The straightforward training step, by a one-hot matrix: z (B, E, d, h, w) -> its codes (B, E, d, h, w)."""
    vectors = z.movedim(1, -1).flatten(0, -2)  # (tokens, E)
    codes = codebook.embeddings
    distances = (vectors**2).sum(1, keepdim=True) - 2 * vectors @ codes.t() + (codes.t() ** 2).sum(0, keepdim=True)
    nearest = distances.argmin(dim=1)  # (tokens,)
    one_hot = F.one_hot(nearest, codebook.n_codes).type_as(vectors)  # (tokens, n_codes)
    quantised = F.embedding(nearest, codes)  # (tokens, E)
    frequencies = one_hot.mean(dim=0)
    torch.exp(-(frequencies * torch.log(frequencies + 1e-7)).sum())
    counts, sums = one_hot.sum(dim=0), one_hot.t() @ vectors  # (n_codes,), (n_codes, E)
    codebook.N.mul_(codebook.decay).add_(counts, alpha=1 - codebook.decay)
    codebook.z_avg.mul_(codebook.decay).add_(sums, alpha=1 - codebook.decay)
    total = codebook.N.sum()
    weights = (codebook.N + 1e-7) / (total + codebook.n_codes * 1e-7) * total
    codebook.embeddings.copy_(codebook.z_avg / weights.unsqueeze(1))
    return quantised.unflatten(0, (z.shape[0], *z.shape[2:])).movedim(-1, 1)

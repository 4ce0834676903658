"""The codebook: vector quantisation with moving-average updates (paper, section III-A; van den Oord et al., 2017)."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Distances (tokens × codes) computed at a time, in float32: 2 MiB, which stay in a core's cache, or 64 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


class Codebook(nn.Module):
    """Nearest-code quantisation; the codes follow the encoder by exponential moving averages, not by gradients.

    Buffers: `embeddings` (n_codes, E) the codes, `N` (n_codes,) moving average of each code's use, `z_avg` (n_codes, E)
    moving average of the sum of its vectors. `N` is zero everywhere exactly until the codes have been started from
    data; that is how "initialised" survives checkpoints, official ones included. Not in checkpoints: `recent_counts`
    (n_codes,), each code's use in training, over all ranks, since it was last set to zero (float32, exact up to 2^24).

    Args:
        n_codes: number of codes.
        embedding_dim: E, length of a code.
        no_random_restart: True leaves codes alone that are hardly used.
        restart_thres: a code whose `N` (uses a batch) is below takes the value of a random encoder output.
        decay: of the moving averages, 0.99 in the official release.
    """

    def __init__(self, n_codes: int, embedding_dim: int, no_random_restart=False, restart_thres=1.0, decay=0.99):
        super().__init__()
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.register_buffer("recent_counts", torch.zeros(n_codes), persistent=False)
        self.n_codes = n_codes
        self.embedding_dim = embedding_dim
        self.no_random_restart = no_random_restart
        self.restart_thres = restart_thres
        self.decay = decay
        self._known_initialised = False

    @property
    def initialised(self) -> bool:
        """Whether the codes were ever started from data. Read from `N` until true, then remembered."""
        if not self._known_initialised:
            self._known_initialised = bool(self.N.any())
        return self._known_initialised

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialised = False

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Quantise `z`, encoder outputs (B, E, D, H, W), and in training mode update the codes.

        Returns:
            `embeddings`: quantised z with the straight-through gradient, (B, E, D, H, W), in the type of z;
            `encodings`: code indices, int64, (B, D, H, W);
            `commitment_loss`: 0.25·mean((z − sg[e])²), a scalar;
            `perplexity`: exp(−Σ p·ln(p + 1e-7)) of this batch's code frequencies, a scalar.

        Raises:
            ValueError: z has another number of channels than the codes.
        """
        if z.ndim != 5 or z.shape[1] != self.embedding_dim:
            raise ValueError(f"the codebook quantises (B, {self.embedding_dim}, D, H, W), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z32 = z.float()
            vectors = rearrange(z32.detach(), "b e d h w -> (b d h w) e")
            if self.training and not self.initialised:
                self._start_from(vectors)

            codes = self.nearest(vectors)  # (tokens,)
            encodings = rearrange(codes, "(b d h w) -> b d h w", b=z.shape[0], d=z.shape[2], h=z.shape[3])
            quantised = self.lookup(encodings)  # (B, E, D, H, W)
            commitment_loss = 0.25 * F.mse_loss(z32, quantised)
            counts = self._counts(codes)  # (n_codes,)
            frequencies = counts / counts.sum()
            perplexity = torch.exp(-(frequencies * torch.log(frequencies + 1e-7)).sum())

            if self.training:
                self._update(vectors, codes, counts)
        return {
            "embeddings": z + (quantised.to(z.dtype) - z).detach(),
            "encodings": encodings,
            "commitment_loss": commitment_loss,
            "perplexity": perplexity,
        }

    def lookup(self, encodings: Tensor) -> Tensor:
        """Code indices (B, D, H, W) -> their vectors (B, E, D, H, W)."""
        return rearrange(F.embedding(encodings, self.embeddings), "b d h w e -> b e d h w")

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code in Euclidean distance, (tokens, E) -> (tokens,), in chunks of bounded memory."""
        squared_norms = self.embeddings.square().sum(dim=1)  # (n_codes,)
        elements = CHUNK_ELEMENTS["cpu" if vectors.device.type == "cpu" else "cuda"]
        chunks = vectors.split(max(1, elements // self.n_codes))
        distances = vectors.new_empty(len(chunks[0]), self.n_codes)  # one place for all chunks
        nearest = []
        for chunk in chunks:
            # |z − e|² without |z|², which does not change the order; on CPUs `min` is faster than `argmin`
            out = distances[: len(chunk)]
            torch.addmm(squared_norms, chunk, self.embeddings.t(), alpha=-2, out=out)
            nearest.append(out.min(dim=1).indices)
        return torch.cat(nearest)

    def _counts(self, codes: Tensor) -> Tensor:
        """How often each code is in (tokens,): (n_codes,). Not by `bincount`, which makes a GPU wait."""
        ones = torch.ones_like(codes, dtype=torch.float32)
        return torch.zeros(self.n_codes, device=codes.device).index_add_(0, codes, ones)

    @torch.no_grad()
    def _start_from(self, vectors: Tensor) -> None:
        start = self._random_vectors(vectors)
        self.embeddings.copy_(start)
        self.z_avg.copy_(start)
        self.N.fill_(1.0)

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor, counts: Tensor) -> None:
        """One step of the moving averages, summed over all ranks, and the restart of codes that are hardly used."""
        sums = torch.zeros_like(self.z_avg).index_add_(0, codes, vectors)  # (n_codes, E)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.recent_counts += counts
        self.N.lerp_(counts, 1 - self.decay)
        self.z_avg.lerp_(sums, 1 - self.decay)
        total = self.N.sum()
        weights = (self.N + 1e-7) / (total + self.n_codes * 1e-7) * total
        self.embeddings.copy_(self.z_avg / weights.unsqueeze(1))
        if not self.no_random_restart:
            unused = (self.N < self.restart_thres).unsqueeze(1)
            self.embeddings.copy_(torch.where(unused, self._random_vectors(vectors), self.embeddings))

    def _random_vectors(self, vectors: Tensor) -> Tensor:
        """Encoder outputs of this batch at random, (n_codes, E), the same on all ranks (those of rank 0).

        A batch with fewer vectors than codes is repeated with a little noise, so that no two codes are equal.
        """
        if len(vectors) < self.n_codes:
            repeats = -(-self.n_codes // len(vectors))
            vectors = vectors.repeat(repeats, 1)
            vectors = vectors + torch.randn_like(vectors) * (0.01 / math.sqrt(self.embedding_dim))
        chosen = vectors[torch.randperm(len(vectors), device=vectors.device)[: self.n_codes]].contiguous()
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(chosen, src=0)
        return chosen


# How evenly a codebook is used: pure functions of how often each code occurred, (n_codes,), computed in float64.
# ValueError for other shapes, negative or infinite counts, or none at all.


def codebook_usage(counts: Tensor) -> float:
    """Share of the codes that occurred at least once, in [0, 1]."""
    return (_frequencies(counts) > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """Exponential of the entropy of the codes' frequencies: 1 for one code alone, n_codes for all equally often."""
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

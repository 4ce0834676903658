"""Raw and normalised latents.

Raw latents come out of the encoder. The diffusion model sees only normalised ones, scaled by the range of the whole
codebook; latent files hold those too. This is the one place that converts between them.
"""

from torch import Tensor


def codebook_range(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of the whole codebook, (n_codes, E) -> two scalars.

    Raises:
        ValueError: all entries are equal (or not finite), so that nothing can be scaled by their range.
    """
    low, high = embeddings.min(), embeddings.max()
    if not high > low:
        raise ValueError(
            f"the codebook's entries span no range (smallest {low.item():.4g}, largest {high.item():.4g}): "
            "the autoencoder was not trained"
        )
    return low, high


def normalise_latents(latents: Tensor, embeddings: Tensor) -> Tensor:
    """Raw -> normalised latents, 2·(z − m)/(M − m) − 1, any shape; `embeddings` is the codebook (n_codes, E)."""
    low, high = codebook_range(embeddings)
    return 2 * (latents - low) / (high - low) - 1


def denormalise_latents(latents: Tensor, embeddings: Tensor) -> Tensor:
    """Normalised -> raw latents: the inverse of `normalise_latents`."""
    low, high = codebook_range(embeddings)
    return (latents + 1) / 2 * (high - low) + low

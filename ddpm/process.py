"""The diffusion process that a config means: one place for training, previews, generation and studies."""

from omegaconf import DictConfig

from common.errors import UserError
from ddpm.diffusion import GaussianDiffusion


def build_process(cfg: DictConfig) -> GaussianDiffusion:
    """The process of a training or generation config; what it refuses becomes a UserError."""
    try:
        return GaussianDiffusion(cfg.volume_channels, cfg.timesteps, cfg.loss_type)
    except ValueError as error:
        raise UserError(f"diffusion config: {error}") from error

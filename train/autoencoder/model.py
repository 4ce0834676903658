"""The autoencoder that is trained, and what is said where it cannot be built."""

from omegaconf import DictConfig

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.errors import UserError


def build_autoencoder(cfg: DictConfig) -> patchvolumeAE:
    """A new autoencoder; what the model refuses in its config becomes a UserError."""
    try:
        return patchvolumeAE(cfg)
    except ValueError as error:
        raise UserError(f"autoencoder config: {error}") from error


def prepare_for_training(model: patchvolumeAE) -> None:
    """Builds the perceptual network, before long work; a weight file that is missing or wrong becomes a UserError."""
    try:
        model.setup("fit")
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; or set model.perceptual_weight=0 to train without it") from error

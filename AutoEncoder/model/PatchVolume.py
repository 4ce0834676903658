"""The Patch-Volume autoencoder in training (Wang et al., IEEE TMI 2025, section III-A).

Stage 1 trains on patches, each decoded alone. Stage 2 freezes encoder and codebook, stitches the latents of all patches
of a whole volume and trains the decoder to decode them in one pass: that is what removes the seams.
"""

import io
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import BaseFinetuning
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn

from AutoEncoder.checkpoint import check_autoencoder
from AutoEncoder.model.adversarial_training import AdversarialTraining
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.model.discriminator import DISCRIMINATOR_LOSSES, NLayerDiscriminator3D
from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.model.MedicalNetPerceptual import MedicalNetPerceptual
from AutoEncoder.model.networks import ResBlock
from common.checkpoint_files import load_checkpoint, only_safe_types
from common.hub import local_file
from common.tensor_files import SUFFIX


class patchvolumeAE(Autoencoder, AdversarialTraining):  # noqa: N801 - the public name
    """The autoencoder as a LightningModule that trains one of its two stages; config and errors as of `Autoencoder`."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        model = self.cfg.model
        self.volume_discriminator = NLayerDiscriminator3D(
            self.cfg.dataset.image_channels, model.disc_channels, model.disc_layers
        )
        # Held in a list so that it is no sub-module: its weights stay out of state dict, optimisers and checkpoints.
        self._perceptual: list[nn.Module] = []
        self.train(self.training)

    @Autoencoder.cfg.setter
    def cfg(self, cfg: DictConfig) -> None:
        Autoencoder.cfg.fset(self, cfg)
        if (loss := self.cfg.model.disc_loss_type) not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"model.disc_loss_type is {loss!r}, expected one of {', '.join(DISCRIMINATOR_LOSSES)}")
        self.save_hyperparameters({"cfg": self.cfg})
        if self._modules:  # not yet where the constructor sets it
            self.train(self.training)

    def train(self, mode: bool = True) -> "patchvolumeAE":
        """Training mode, except that in stage 2 the frozen parts stay in eval: no codebook update, no restart."""
        super().train(mode)
        if self.stage == 2:
            for part in self.frozen_in_stage_2():
                part.eval()
        return self

    def frozen_in_stage_2(self) -> list[nn.Module]:
        """What stage 2 does not train: encoder, pre_vq_conv and codebook, i.e. all that latents depend on."""
        return [self.encoder, self.pre_vq_conv, self.codebook]

    @_restricted_classmethod  # as Lightning's own: on an instance, which it would leave as it is, it is an error
    def load_from_checkpoint(cls, checkpoint_path, *args, **options) -> "patchvolumeAE":
        """As in Lightning, which by itself refuses the config in a file or, with `weights_only=False`, runs code.

        Also of exported files, and of those on the hub.

        Raises:
            UserError: a file that can't be read, is damaged, or would run code.
        """
        try:
            source = checkpoint_path
            if not hasattr(source, "read"):
                checkpoint = load_checkpoint(checkpoint_path, mmap=True)
                if checkpoint.get("hyper_parameters") and "cfg" not in options and options.get("strict") is not False:
                    check_autoencoder(checkpoint_path, checkpoint)
                source = local_file(checkpoint_path)
                source = _pickled(checkpoint) if source.suffix == SUFFIX else source
            with only_safe_types():
                return super().load_from_checkpoint(source, *args, **options)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            load_checkpoint(checkpoint_path)  # says what is wrong with it; torch advises to let it run code
            raise

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch; the perceptual network that official checkpoints carry is passed over."""
        own = {name: value for name, value in state_dict.items() if not name.startswith("perceptual_loss.")}
        return super().load_state_dict(own, strict=strict, assign=assign)

    def setup(self, stage: str) -> None:
        """Lightning hook before training or validating: builds the perceptual network, if its weight is positive.

        Before training, the networks get the form that the options for speed and memory ask for.
        """
        if stage in ("fit", "validate") and self.cfg.model.perceptual_weight > 0 and not self._perceptual:
            self._perceptual.append(build_perceptual(self.cfg.model.perceptual_3d, self.cfg.model.perceptual_weights))
        if stage == "fit":
            self._prepare_networks()

    def _prepare_networks(self) -> None:
        """Applies `channels_last`, `gradient_checkpointing` and `compile`; names and state dict stay as they are."""
        networks = (self.encoder, self.decoder, self.volume_discriminator)
        for network in networks:
            if self.cfg.model.channels_last:
                network.to(memory_format=torch.channels_last_3d)
            for part in network.modules():
                if isinstance(part, ResBlock):
                    part.recomputes = self.cfg.model.gradient_checkpointing
            if self.cfg.model.compile:
                network.compile()

    def _eagerly(self) -> AbstractContextManager[None]:
        """Uncompiled inside: whole volumes come in many shapes, and each would be compiled for itself."""
        return torch.compiler.set_stance("force_eager") if self.cfg.model.compile else nullcontext()

    def quantise_volume(self, x: Tensor) -> dict[str, Tensor]:
        """As in `Autoencoder`; stage 2 computes no gradients here."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            return self._quantise(self.patch_encode(x))

    def forward_patches(self, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Patches (B, C, p, p, p), each encoded and decoded alone (stage-1 training); returns as `forward`."""
        quantised = self._quantise(self.encode(patches, quantize=False))
        return self.decoder(self.post_vq_conv(quantised["embeddings"])), quantised

    def _quantise(self, latent: Tensor) -> dict[str, Tensor]:
        """The codebook's mapping, or the latent as it is while the codebook's start is put off."""
        if self.codebook.initialised or (self.training and self.global_step >= self.cfg.model.codebook_init_step):
            return self.codebook(latent)
        zero = latent.new_zeros(())
        return {"embeddings": latent, "commitment_loss": zero, "perplexity": zero}

    def reconstruct(self, x: Tensor) -> Tensor:
        """As in `Autoencoder`, uncompiled."""
        with self._eagerly():
            return super().reconstruct(x)

    def log_volumes(self, batch: dict[str, Tensor], split: str = "train") -> dict[str, Tensor]:
        """What a callback shows of a batch: `inputs` and their `reconstructions` as whole volumes, (B, C, D, H, W).

        split: "train" or "val", as the official callback says; changes nothing.
        """
        return {"inputs": batch["data"], "reconstructions": self.reconstruct(batch["data"])}


def build_perceptual(perceptual_3d: bool, weights_dir: str | None = None) -> nn.Module:
    """A frozen network with `loss = net(reconstruction, target)`: (B, C, D, H, W) twice, in [-1, 1] -> scalar.

    Args:
        perceptual_3d: True: MedicalNet ResNet-10 features; False: LPIPS on slices across the three axes.
        weights_dir: folder with the weight files (`model.perceptual_weights`); None: see the two modules.

    Raises:
        ValueError: a weight file is missing and can't be fetched, is unreadable, or is another network's.
    """
    return MedicalNetPerceptual(weights_dir) if perceptual_3d else TriplanarLPIPS(weights_dir)


def _pickled(checkpoint: Mapping[str, Any]) -> io.BytesIO:
    """An exported checkpoint as Lightning reads one."""
    stored = {name: OmegaConf.create(value) for name, value in checkpoint.get("hyper_parameters", {}).items()}
    content = io.BytesIO()
    torch.save({**checkpoint, "hyper_parameters": stored}, content)
    content.seek(0)
    return content


class AE_finetuning(BaseFinetuning):  # noqa: N801 - the public name
    """Stage 2: no gradients for encoder, pre_vq_conv and codebook; `patchvolumeAE.train` keeps them in eval."""

    def freeze_before_training(self, pl_module: patchvolumeAE) -> None:
        self.freeze(pl_module.frozen_in_stage_2(), train_bn=False)

    def finetune_function(self, pl_module: patchvolumeAE, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is unfrozen later."""

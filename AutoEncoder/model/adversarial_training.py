"""How the autoencoder is trained: generator and discriminator by turns (Wang et al., IEEE TMI 2025, section III-A)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AutoEncoder.model.discriminator import DISCRIMINATOR_LOSSES, feature_matching_loss, generator_loss
from common.optimiser import build_adam, learning_rate_factor


class AdversarialTraining(pl.LightningModule):
    """The training half of `patchvolumeAE`, which has the networks and `forward`; volumes are (B, C, D, H, W).

    A step takes nothing back from the device, so that a GPU is never waited for. What could have gone wrong lies in
    `watched`, for a callback to read (`train/autoencoder/step_watch.py`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.passes = self.own_passes()
        # What has to be finite in the step just done, on the device: reading it here would make a GPU wait.
        self.watched: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None  # of the step just done, before clipping
        # Sums of what training steps logged and how often, until `take_means`, on the device too.
        self._recent: dict[str, tuple[Tensor, int]] = {}

    def own_passes(self) -> dict[str, Callable]:
        """What gradients are computed through. `passes` has others in training on several processes, which average.

        A dict, since modules that are attributes would be sub-modules.
        """
        return {"generator": self.generator_pass, "discriminator": self.discriminator_pass}

    def generator_pass(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the present stage trains on, (B, C, D, H, W): patches by themselves (1) or whole volumes (2)."""
        if self.cfg.model.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.forward_patches(x) if self.stage == 1 else self(x)

    def discriminator_pass(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of real and of reconstructed images, both (B, C, D, H, W), before one backward pass."""
        return self.volume_discriminator(x)[0], self.volume_discriminator(x_hat)[0]

    def configure_optimizers(self):
        """Two Adam optimisers of equal learning rate: generator (stage 2: decoder only) and discriminator.

        Fused but in fp16: Lightning leaves it to a fused optimiser to undo the loss scale, which is too late to clip.
        """
        parts = [self.decoder, self.post_vq_conv]
        if self.stage == 1:
            parts = [self.encoder, self.decoder, self.pre_vq_conv, self.post_vq_conv]
        options = dict(lr=self.cfg.model.lr, betas=tuple(self.cfg.model.adam_betas), fused=not self._is_fp16)
        generator = build_adam(chain.from_iterable(part.parameters() for part in parts), **options)
        return [generator, build_adam(self.volume_discriminator.parameters(), **options)]

    @property
    def _is_fp16(self) -> bool:
        return str(self.cfg.model.precision) == "16"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimiser step: generator and discriminator take turns once the discriminator has started.

        Every batch is one optimiser step, so the turn is the parity of `global_step`: that of the batch number counted
        over the whole run, also where epochs have an odd number of batches. With `volume_gan_weight` 0 there is no
        discriminator to train and every step is the generator's.
        """
        generator, discriminator = self.optimizers()
        weights = self.cfg.model
        adversarial = weights.volume_gan_weight > 0 and self.global_step >= weights.discriminator_iter_start
        if not adversarial or self.global_step % 2 == 0:
            with requires_grad(self.volume_discriminator, False):
                loss = self._generator_loss(batch["data"])
                self._optimise("generator", generator, loss)
        else:
            self._optimise("discriminator", discriminator, self._discriminator_loss(batch["data"]))

    def _generator_loss(self, x: Tensor) -> Tensor:
        weights = self.cfg.model
        x_hat, quantised = self.passes["generator"](x)
        l1, recon_loss, perceptual_loss = self._reconstruction_losses(x_hat, x)
        adversarial_loss = feature_loss = x_hat.new_zeros(())
        if self.global_step > weights.discriminator_iter_start and weights.volume_gan_weight > 0:
            logits_fake, features_fake = self.volume_discriminator(x_hat)
            with torch.no_grad():
                _, features_real = self.volume_discriminator(x)
            adversarial_loss = weights.volume_gan_weight * generator_loss(logits_fake)
            feature_loss = weights.gan_feat_weight * feature_matching_loss(features_fake, features_real)
        self._log(
            "train",
            l1=l1,
            recon_loss=recon_loss,
            perceptual_loss=perceptual_loss,
            aeloss=adversarial_loss,
            gan_feat_loss=feature_loss,
            commitment_loss=quantised["commitment_loss"],
            perplexity=quantised["perplexity"],
        )
        loss = recon_loss + perceptual_loss + adversarial_loss + feature_loss
        return loss + quantised["commitment_loss"] if self.stage == 1 else loss

    def _discriminator_loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x_hat, _ = self.generator_pass(x)
        logits_real, logits_fake = self.passes["discriminator"](x, x_hat)
        volume_loss = DISCRIMINATOR_LOSSES[self.cfg.model.disc_loss_type](logits_real, logits_fake)
        loss = self.cfg.model.volume_gan_weight * volume_loss
        self._log(
            "train",
            discloss=loss,
            d_volume_loss=volume_loss,
            logits_volume_real=logits_real.mean(),
            logits_volume_fake=logits_fake.mean(),
        )
        return loss

    def _reconstruction_losses(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L1, weighted L1 and weighted perceptual loss, three scalars."""
        l1 = F.l1_loss(x_hat, x)
        recon_loss = self.cfg.model.l1_weight * l1
        if not self._perceptual:
            return l1, recon_loss, x.new_zeros(())
        return l1, recon_loss, self.cfg.model.perceptual_weight * self._perceptual[0].to(x.device)(x_hat, x)

    def _optimise(self, name: str, optimizer, loss: Tensor) -> None:
        weights = self.cfg.model
        factor = learning_rate_factor(weights.lr_schedule, self.global_step + 1, weights.lr_warmup, weights.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = weights.lr * factor
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.watched = {"loss": loss.detach()}
        optimizer.step()
        self.log(f"train/grad_norm_{name}", self.gradient_norm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lightning hook between backward (gradients no longer scaled) and step: clips.

        Where loss or gradient is not finite, the step is left out: weights and Adam's averages stay what they are. To
        end the training is left to whoever reads `watched`. Under fp16 a gradient that is not finite is usual, and the
        gradient scaler leaves that step out.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.gradient_norm = norm
        if self.cfg.model.gradient_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.model.gradient_clip, norm)
        if not self._is_fp16:
            self.watched["gradient"] = norm
            optimizer.found_inf = 1 - torch.isfinite(norm + self.watched["loss"]).float()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Reconstruction of whole volumes; the three best checkpoints are chosen by val/recon_loss.

        val/psnr is of reconstructions limited to [-1, 1], volume by volume, data range 2.
        """
        x = batch["data"]
        with self._eagerly():
            x_hat, quantised = self(x)
        l1, recon_loss, perceptual_loss = self._reconstruction_losses(x_hat, x)
        errors = (x_hat.float().clamp(-1, 1) - x).square().flatten(1).mean(1)  # (B,)
        self._log(
            "val",
            batch_size=len(x_hat),
            psnr=(10 * torch.log10(2**2 / errors)).mean(),
            l1=l1,
            recon_loss=recon_loss,
            perceptual_loss=perceptual_loss,
            perplexity=quantised["perplexity"],
            commitment_loss=quantised["commitment_loss"],
        )

    def _log(self, prefix: str, batch_size: int | None = None, **values: Tensor) -> None:
        scalars = {f"{prefix}/{name}": value.detach() for name, value in values.items()}
        self.log_dict(scalars, batch_size=batch_size, sync_dist=prefix == "val")
        if prefix == "train":
            for name, value in scalars.items():
                total, count = self._recent.get(name, (0.0, 0))
                self._recent[name] = total + value, count + 1

    def take_means(self) -> dict[str, Tensor]:
        """Means over the training steps since the last call, by the name in the log, each over those that had it."""
        means = {name: total / count for name, (total, count) in self._recent.items()}
        self._recent = {}
        return means


@contextmanager
def requires_grad(module: nn.Module, value: bool) -> Iterator[None]:
    """The module's parameters have `requires_grad == value` inside, and what they had before afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(value)
    try:
        yield
    finally:
        for parameter, had in before:
            parameter.requires_grad_(had)

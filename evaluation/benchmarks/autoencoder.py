"""Stage 1's generator step and discriminator step, a pair, on patches: plain beside what the options do.

Plain is the same networks in float32 with x·sigmoid(x), a one-hot codebook, the discriminator's gradients computed in
the generator's step, the generator's graph built in the discriminator's, and a loop over parameters in Adam. Weights
and patches are random, also those of the perceptual network, which is part of each generator step. Compared first: the
gradients of one pair of batches, by the norm of their difference.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from AutoEncoder.model.adversarial_training import requires_grad
from AutoEncoder.model.discriminator import feature_matching_loss, generator_loss, hinge_d_loss
from AutoEncoder.model.lpips import TriplanarLPIPS
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.optimiser import build_adam
from common.precision import autocast
from common.processes import choose_device
from config.loading import CONFIG_FOLDER, load_config
from config.schema.autoencoder import AutoencoderConfig
from evaluation.benchmarks.codebook import one_hot_step
from evaluation.benchmarks.measuring import Report, chosen, fitting
from evaluation.benchmarks.training import Way, compare_and_time, gradients

LR, BETAS = 3e-4, (0.5, 0.9)
# Of the gradients, relative. Rounding turns the signs that L1 losses have for gradients where a difference is near
# zero. In half precision about one vector in twenty gets another code; gradients of unlike steps would be 1.4 apart.
TOLERANCE, HALF_TOLERANCE = 2e-2, 0.6


@dataclass(frozen=True)
class Scale:
    """Config of the autoencoder with overrides, and the edge of a patch in voxels."""

    config: str
    overrides: tuple[str, ...]
    patch: int


LAST = "model.channels_last=true"
# Restarted codes are drawn at random, and none would be the same in two ways.
COMMON = ("model.no_random_restart=true", "model.discriminator_iter_start=0")
TINY = ("model.n_hiddens=8", "model.num_groups=4", "model.n_codes=32", "model.embedding_dim=4", "model.disc_channels=4")
SCALES = {"paper": Scale("PatchVolume_8x.yaml", COMMON, 64), "tiny": Scale("PatchVolume_4x.yaml", (*COMMON, *TINY), 16)}


def measure(cfg: DictConfig) -> Report:
    """Compare, then time. UserError if the ways differ."""
    return fitting(partial(_measure, cfg), cfg.batch_size)


def _measure(cfg: DictConfig, batch_size: int) -> Report:
    scale, device = SCALES[cfg.size], choose_device(cfg.device)
    torch.manual_seed(0)
    patches = torch.rand(batch_size, 1, *(scale.patch,) * 3, device=device) * 2 - 1
    perceptual = [] if cfg.no_perceptual else [_random_perceptual().to(device)]

    norms: dict[str, float] = {}

    def pair(precision: str = "32", *extra: str) -> Way:
        return Pair(_build(scale, extra, perceptual, device, patches), patches, norms, precision).way

    ways = chosen(
        {
            "plain": lambda: PlainPair(_build(scale, (), perceptual, device, patches), patches, norms).way,
            "float32": pair,
            "float32 channels last": lambda: pair("32", LAST),
            "bf16": lambda: pair("bf16"),
            "bf16 channels last": lambda: pair("bf16", LAST),
            "bf16 channels last checkpointing": lambda: pair("bf16", LAST, "model.gradient_checkpointing=true"),
            "32 compiled": lambda: pair("32", "model.compile=true"),
            "bf16 compiled": lambda: pair("bf16", "model.compile=true"),
        },
        cfg.ways,
        cfg.compile,
    )
    title = f"generator and discriminator step, {batch_size} patches of {scale.patch}³, {device}"
    return compare_and_time(title, ways, batch_size, device, cfg.repetitions)


def _random_perceptual() -> TriplanarLPIPS:
    """Random weights under which signals neither fade nor grow, as in a trained network."""
    perceptual = TriplanarLPIPS(pretrained=False)
    for module in perceptual.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return perceptual


def _build(scale: Scale, extra: tuple, perceptual: list, device: torch.device, patches: Tensor) -> patchvolumeAE:
    """An autoencoder in training, the same at every call.

    Its codes are spread like the latents. Started from so few patches they would lie in clusters as narrow as rounding,
    and which of them is nearest would differ from way to way.
    """
    torch.manual_seed(0)
    overrides = ["model.perceptual_weight=0", *scale.overrides, *extra]
    cfg = load_config(AutoencoderConfig, CONFIG_FOLDER / scale.config, overrides)
    model = patchvolumeAE(OmegaConf.create(OmegaConf.to_container(cfg))).to(device)
    model.setup("fit")
    model.cfg.model.discriminator_iter_start = -1  # there is no trainer that counts steps
    model.cfg.model.perceptual_weight = 2.0
    model._perceptual = perceptual
    model._log = lambda *args, **values: None
    with torch.no_grad():
        spread = model.encode(patches, quantize=False).std().item()
    codes = torch.randn(model.codebook.embeddings.shape, generator=torch.Generator().manual_seed(0)) * spread
    model.codebook.embeddings.copy_(codes)
    model.codebook.z_avg.copy_(codes)
    model.codebook.N.fill_(1.0)
    return model


class Pair:
    """The steps of training, as `patchvolumeAE` does them."""

    is_fused = True

    def __init__(self, model: patchvolumeAE, patches: Tensor, norms: dict[str, float], precision: str = "32") -> None:
        self.model = model
        self.norms = norms  # of the gradients of the way that is compared first
        self.patches = patches
        self.precision = precision
        self.codes = copy.deepcopy(model.codebook.state_dict())
        generator = [*model.encoder.parameters(), *model.decoder.parameters()]
        generator += [*model.pre_vq_conv.parameters(), *model.post_vq_conv.parameters()]
        networks = (generator, list(model.volume_discriminator.parameters()))
        self.optimisers = [build_adam(parameters, LR, BETAS, self.is_fused) for parameters in networks]

    @property
    def way(self) -> Way:
        networks = [self.model, *self.model._perceptual]
        weights = [parameter for network in networks for parameter in network.parameters()]
        kind = (TOLERANCE, torch.float32) if self.precision == "32" else (HALF_TOLERANCE, torch.bfloat16)
        return Way(self.gradient, self.step, weights, *kind)

    def generator_backward(self) -> None:
        with requires_grad(self.model.volume_discriminator, False):
            with autocast(self.patches.device, self.precision):
                loss = self.model._generator_loss(self.patches)
            loss.backward()

    def discriminator_backward(self) -> None:
        with autocast(self.patches.device, self.precision):
            loss = self.model._discriminator_loss(self.patches)
        loss.backward()

    def step(self) -> None:
        """Both steps."""
        backwards = (self.generator_backward, self.discriminator_backward)
        for optimiser, backward in zip(self.optimisers, backwards, strict=True):
            optimiser.zero_grad(set_to_none=True)
            backward()
            optimiser.step()

    def gradient(self) -> Tensor:
        """Gradients of both, each at the weights that the benchmark began with, and over the norm of the plain ones."""
        model = self.model
        torch.manual_seed(0)  # the perceptual network draws slices
        found = []
        generator = (model.encoder, model.decoder, model.pre_vq_conv, model.post_vq_conv)
        for name, backward, parts in (
            ("generator", self.generator_backward, generator),
            ("discriminator", self.discriminator_backward, (model.volume_discriminator,)),
        ):
            model.zero_grad(set_to_none=True)
            backward()
            model.codebook.load_state_dict(self.codes)
            gradient = gradients(*parts)
            found.append(gradient / self.norms.setdefault(name, gradient.norm().item()))
        model.zero_grad(set_to_none=True)
        return torch.cat(found)


class PlainPair(Pair):
    """The straightforward way."""

    is_fused = False

    def generator_backward(self) -> None:
        with PlainSiLU():
            model, x, weights = self.model, self.patches, self.model.cfg.model
            x_hat, commitment_loss = self.forward()
            loss = weights.l1_weight * F.l1_loss(x_hat, x) + commitment_loss
            if model._perceptual:
                loss = loss + weights.perceptual_weight * model._perceptual[0](x_hat, x)
            logits_fake, features_fake = model.volume_discriminator(x_hat)
            _, features_real = model.volume_discriminator(x)
            loss = loss + weights.volume_gan_weight * generator_loss(logits_fake)
            loss = loss + weights.gan_feat_weight * feature_matching_loss(features_fake, features_real)
        loss.backward()

    def discriminator_backward(self) -> None:
        with PlainSiLU():
            x_hat, _ = self.forward()
            logits_real, _ = self.model.volume_discriminator(self.patches)
            logits_fake, _ = self.model.volume_discriminator(x_hat.detach())
        (self.model.cfg.model.volume_gan_weight * hinge_d_loss(logits_real, logits_fake)).backward()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Reconstruction and commitment loss."""
        model = self.model
        latent = model.pre_vq_conv(model.encoder(self.patches))
        quantised = one_hot_step(model.codebook, latent.detach())
        loss = 0.25 * F.mse_loss(latent, quantised)
        return model.decoder(model.post_vq_conv(latent + (quantised - latent).detach())), loss


class PlainSiLU(TorchFunctionMode):
    """SiLU written as x·sigmoid(x) within a `with` block."""

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        if function is F.silu:
            return args[0] * torch.sigmoid(args[0])
        return function(*args, **(kwargs or {}))

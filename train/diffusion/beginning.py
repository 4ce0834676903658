"""What a run's network begins as: fresh weights, or those of a checkpoint, all or a part of which then trains."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from common.checkpoint_files import fingerprint, load_checkpoint
from common.errors import UserError
from dataset.hints import hints_of
from ddpm.attributes import specs_of
from ddpm.BiFlowNet import BiFlowNet
from ddpm.checkpoint import (
    ATTRIBUTES,
    TABLE,
    biflownet_weights,
    build_biflownet,
    check_options,
    count_classes,
    load_biflownet,
)
from ddpm.controlled import beside_controlnet
from ddpm.ControlNet import ControlledBiFlowNet
from ddpm.latent_process import LatentProcess
from ddpm.lora import AdaptedBiFlowNet, Adapter
from ddpm.process import OFFICIAL, SCALING, take_scaling
from ddpm.trained import trained_attributes
from ddpm.transfer import ClassMap, parse_class_map, starts_of, transfer
from train.diffusion.batches import Origin
from train.loop.session import Session


def begin_biflownet(cfg: DictConfig, process: LatentProcess) -> tuple[nn.Module, "Beginning | None"]:
    """The denoiser of a run, the same on every rank, and where it comes from, if `init_from` says so.

    The process gets the checkpoint's scale of latents.

    Raises:
        UserError: a config that BiFlowNet refuses; a file that is no BiFlowNet checkpoint, or one whose network,
            process or scale of latents is another than the config's.
    """
    torch.manual_seed(cfg.global_seed)  # the same weights on every rank
    if not cfg.init_from:
        return build_biflownet(cfg), None
    checkpoint = load_checkpoint(cfg.init_from)
    beginning = Beginning(cfg.init_from, checkpoint, cfg.num_classes, parse_class_map(cfg.class_map))
    _check_process(cfg, cfg.init_from, checkpoint)
    model = build_biflownet(cfg, beginning.null_label(cfg))
    notes = transfer(model, cfg.init_from, checkpoint, beginning.class_map)
    take_scaling(process.scaling, cfg.init_from, checkpoint)
    if cfg.trainable == "lora":
        model = _adapted(cfg, model, checkpoint)
    elif cfg.trainable == "conditions":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == TABLE or name.startswith(ATTRIBUTES))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    beginning.notes = [f"begins as {cfg.init_from}; {count} of {whole} parameters train ({cfg.trainable})", *notes]
    return model, beginning


def begin_controlnet(cfg: DictConfig, process: LatentProcess) -> tuple[ControlledBiFlowNet, "Beginning"]:
    """A frozen BiFlowNet, that of `base_ckpt`, with a ControlNet that begins as it.

    Raises:
        UserError: as of `load_controlled_base`; a process or scale of latents that are not the base's; attributes that
            it doesn't have.
    """
    torch.manual_seed(cfg.global_seed)
    checkpoint = load_checkpoint(cfg.base_ckpt)
    beginning = Beginning(cfg.base_ckpt, checkpoint, cfg.num_classes)
    _check_process(cfg, cfg.base_ckpt, checkpoint)
    known = trained_attributes(cfg.base_ckpt, checkpoint)
    if cfg.attributes and specs_of(cfg.attributes) != known:
        raise UserError(f"attributes: base_ckpt has {[spec.name for spec in known]}: give these as trained, or none")
    take_scaling(process.scaling, cfg.base_ckpt, checkpoint)
    base = load_biflownet(cfg, cfg.base_ckpt, checkpoint=checkpoint)
    hints = hints_of(cfg.hints, cfg.volume_channels)
    model = beside_controlnet(cfg, base, hints, process, cfg.control_scale)
    count = sum(parameter.numel() for parameter in model.part.parameters())
    channels = ", ".join(f"{hint.name} {hint.channels}" for hint in hints)
    beginning.notes = [f"beside {cfg.base_ckpt}, frozen; {count} parameters train; channels of hints: {channels}"]
    return model, beginning


class Beginning:
    """A checkpoint that a run begins with, or beside.

    base: fingerprint of its averaged weights. known_classes: classes of the run that are classes of it, by their ids.
    notes: lines for the run's log.
    """

    def __init__(
        self, path: str, checkpoint: Mapping[str, Any], num_classes: int, class_map: ClassMap | None = None
    ) -> None:
        self.path = path
        weights = biflownet_weights(path, checkpoint, use_ema=True)
        self.base = fingerprint(weights)
        self.class_map = class_map or {}
        self._num_classes, self._has_null_label = count_classes(checkpoint, weights[TABLE])
        starts = starts_of(num_classes, self._num_classes, self.class_map)
        self.known_classes = {class_id: start.source for class_id, start in starts.items() if not start.is_new}
        self.notes: list[str] = []
        self._autoencoder = checkpoint.get("autoencoder")

    def null_label(self, cfg: DictConfig) -> bool:
        """Whether the network has the row; an adapter's network has what the checkpoint has."""
        if cfg.trainable != "lora":
            return cfg.label_dropout > 0
        if cfg.label_dropout > 0 and not self._has_null_label:
            raise UserError(
                f"label_dropout is {cfg.label_dropout}, but {self.path} has no null label, which an adapter can't add: "
                "leave it at 0, or give trainable=all"
            )
        return self._has_null_label

    def check_latents(self, origin: Origin, here: Session) -> None:
        """UserError where the latents are of another autoencoder than those that the checkpoint was trained on."""
        if self._autoencoder is None or origin.fingerprint is None:
            of = self.path if self._autoencoder is None else "the latents"
            here.logger.warning(
                "it is not known which autoencoder %s come from: with another one than the other's, fine-tuning would "
                "learn a new scale of all latents without a word", of,
            )  # fmt: skip
        elif self._autoencoder != origin.fingerprint:
            raise UserError(
                f"{self.path} was trained on latents of another autoencoder than these: encode the volumes "
                "with the one that it belongs to (train/generate_training_latent.py), or begin with another"
            )


def _check_process(cfg: DictConfig, path: str, checkpoint: Mapping[str, Any]) -> None:
    for name, official in OFFICIAL.items():
        trained = getattr(checkpoint.get("args"), name, official)
        if cfg[name] != trained:
            raise UserError(f"{name} is {cfg[name]}, but {path} was trained with {trained}: give {name}={trained}")
    trained = "unit" if checkpoint.get(SCALING) else "range"
    if cfg.latent_scaling != trained:
        raise UserError(
            f"latent_scaling is {cfg.latent_scaling}, but {path} was trained with {trained}: give "
            f"latent_scaling={trained}"
        )
    check_options(cfg, path, checkpoint)


def _adapted(cfg: DictConfig, model: BiFlowNet, checkpoint: Mapping[str, Any]) -> AdaptedBiFlowNet:
    known = trained_attributes(cfg.init_from, checkpoint)
    if specs_of(cfg.attributes) != known:
        raise UserError(
            f"attributes: an adapter has those of init_from, {[spec.name for spec in known]} as trained: give "
            "these, or trainable=conditions or all to learn others"
        )
    try:
        return AdaptedBiFlowNet(model, Adapter(model, cfg.lora_rank, cfg.lora_alpha, tuple(cfg.lora_blocks)))
    except ValueError as error:
        raise UserError(f"lora_blocks: {error}") from error

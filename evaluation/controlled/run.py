"""Controlled generation: condition -> hint -> latent -> volume, brought to agree with what was measured."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from AutoEncoder.checkpoint import latent_fingerprint, load_autoencoder
from AutoEncoder.decoding import check_memory
from AutoEncoder.encoding import encode
from AutoEncoder.model.autoencoder import Autoencoder
from AutoEncoder.patches import padded_size
from common.checkpoint_files import load_checkpoint
from common.documents import read_json
from common.errors import UserError
from common.files import file_sha256, write_atomically
from common.log import get_logger
from common.processes import PATIENCE, Distributed, joined
from common.progress import tracked
from common.shards import shard_of
from config.loading import load_config, require, save_config
from config.schema.control import ControlledGenerationConfig
from dataset.hints import HintReader, MaskHint, hints_of
from dataset.order.batches import batches_of_one_shape
from dataset.volumes.index import VOLUME_SUFFIX
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import (
    is_whole_volume,
    read_model_volume,
    read_volume,
    write_volume,
)
from ddpm.checkpoint import check_options
from ddpm.controlled import load_controlled
from ddpm.latent_process import LatentProcess
from ddpm.process import build_process, take_process
from evaluation.controlled.conditions import Condition, list_conditions
from evaluation.controlled.consistency import agreeing, agreeing_latents, decoded, measurement_of
from evaluation.controlled.nnunet import plan_nnunet, write_nnunet
from evaluation.generation.record import record_path
from evaluation.report_page.view import VIEW_NAME, write_view
from evaluation.results.results import Beside, Panel

MOST_CHANNELS = 4096  # of all hints
Job = tuple[Condition, int]  # and the number of the sample


def generate(cfg: DictConfig) -> list[Path]:
    """Generates what is not there yet; returns the files of all volumes, or the shard's. Torchrun shares them out too.

    Raises:
        UserError: before anything is sampled, for whatever is wrong with options, checkpoints or conditions.
    """
    require(cfg, "data", "AE_ckpt", "base_ckpt", "model_ckpt", "output_dir")
    with joined(cfg.device, PATIENCE, cfg.arithmetic) as place:
        logger = get_logger(place.rank)
        control = load_checkpoint(cfg.model_ckpt)
        hints = hints_of_checkpoint(cfg, control)
        conditions = place.on_main(lambda: list_conditions(cfg.data, [hint.name for hint in hints]))
        autoencoder = load_autoencoder(cfg.AE_ckpt, place.device, downsample=cfg.downsample)
        model, process = load_models(cfg, hints, control, autoencoder, place.device)
        check_conditions(cfg, conditions, model, autoencoder, place)
        settings = place.on_main(lambda: settings_of(cfg))
        jobs = [(condition, sample) for condition in conditions for sample in range(cfg.num_samples)]
        planned = [(path_of(cfg, *job), job[0]) for job in jobs]  # of all shards
        cases = place.on_main(lambda: plan_nnunet(cfg.nnunet, hints, planned, cfg.output_dir) if cfg.nnunet else None)
        jobs = shard_of(jobs, cfg.shard)
        todo = place.on_main(lambda: [job for job in jobs if not is_done(cfg, job, settings)])
        place.on_main(lambda: check_hints([job[0] for job in todo], hints, autoencoder), share=False)
        logger.info("%d volumes of %d conditions -> %s", len(jobs), len(conditions), cfg.output_dir)
        same = OmegaConf.merge(cfg, {"shard": None})  # in all shards
        place.on_main(lambda: save_config(same, cfg.output_dir), share=False)
        batches = batches_of_one_shape(todo, [grid_of(job[0], autoencoder) for job in todo], cfg.batch_size)
        for batch in tracked(batches[place.rank :: place.world_size], "generating", "batch"):
            for job, volume in zip(
                batch, volumes_of(cfg, batch, hints, model, process, autoencoder, place), strict=True
            ):
                path = path_of(cfg, *job)
                write_atomically(record_path(path), (json.dumps(record_of(job, settings), indent=2) + "\n").encode())
                write_volume(path, volume, job[0].header.affine)
        place.barrier()
        if cfg.shard is None:
            place.on_main(lambda: summarise(cfg, conditions), share=False)
            if cases is not None:
                place.on_main(lambda: write_nnunet(cfg.nnunet, hints, cases), share=False)
        return [path_of(cfg, *job) for job in jobs]


# -------------------------------------------------------------------------------------------------------------- checks


def hints_of_checkpoint(cfg: DictConfig, control: dict[str, Any]) -> list[HintReader]:
    """Those that a ControlNet was trained with; of files that don't say, those of the config, which gets them."""
    rows = getattr(control.get("args"), "hints", None) or OmegaConf.to_container(cfg.hints)
    try:
        cfg.hints = load_config(ControlledGenerationConfig, None, values={"hints": rows}).hints
    except UserError as error:
        raise UserError(f"{cfg.model_ckpt}: its args: {error}") from error
    if not rows:
        raise UserError(f"{cfg.model_ckpt} doesn't say which hints it was trained with: give them as hints=[...]")
    hints = hints_of(cfg.hints, cfg.volume_channels)
    if (channels := sum(hint.channels for hint in hints)) > MOST_CHANNELS:
        raise UserError(f"{cfg.model_ckpt}: its hints have {channels} channels, at most {MOST_CHANNELS} are believed")
    return hints


def load_models(
    cfg: DictConfig,
    hints: list[HintReader],
    control: dict[str, Any],
    autoencoder: Autoencoder,
    device: torch.device,
) -> tuple[nn.Module, LatentProcess]:
    """The controlled network and its process, after the checks that all files belong together."""
    base = load_checkpoint(cfg.base_ckpt)
    take_process(cfg, cfg.base_ckpt, base)
    check_options(cfg, cfg.base_ckpt, base)
    if cfg.guidance_scale != 1 and getattr(control.get("args"), "hint_dropout", None) == 0:
        raise UserError(
            f"guidance_scale is {cfg.guidance_scale}, but {cfg.model_ckpt} was trained without hint_dropout: use 1"
        )
    process = build_process(cfg, base)
    pair = (cfg.base_ckpt, base), (cfg.model_ckpt, control)
    model = load_controlled(cfg, hints, process, *pair, device)
    fingerprint = latent_fingerprint(autoencoder)
    for path, checkpoint in pair:
        if checkpoint.get("autoencoder") not in (None, fingerprint):
            raise UserError(f"{cfg.AE_ckpt}: not the autoencoder whose latents {path} was trained on: give that one")
    return model, process.to(device)


def check_conditions(
    cfg: DictConfig, conditions: list[Condition], model: nn.Module, autoencoder: Autoencoder, place: Distributed
) -> None:
    """Class ids, grids, memory and measurements; else UserError."""
    for condition in conditions:
        if condition.class_id >= cfg.num_classes:
            raise UserError(f"{cfg.data}: class id {condition.class_id}, num_classes is {cfg.num_classes}")
        grid = grid_of(condition, autoencoder)
        if any(size % multiple for size, multiple in zip(grid, model.grid_multiple, strict=True)):
            raise UserError(
                f"{condition.first}: its latent grid {list(grid)} is no multiple of {list(model.grid_multiple)}: crop "
                "or pad the volumes (dataset/preprocess.py --size)"
            )
        if cfg.data_consistency:
            measurement_of(condition)
    for condition in {grid_of(c, autoencoder): c for c in conditions}.values():
        check_memory(autoencoder, grid_of(condition, autoencoder), None, place.device, where=f"{condition.first}: ")


def check_hints(conditions: list[Condition], hints: list[HintReader], autoencoder: Autoencoder) -> None:
    """Read the files before the first volume is sampled. UserError for one that can't be what its hint is."""
    for condition in tracked(list({c.first: c for c in conditions}.values()), "checking conditions", "condition"):
        for hint in hints:
            read_hint(condition, hint, grid_of(condition, autoencoder))


def grid_of(condition: Condition, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """The latent grid (d, h, w), of the volume padded to whole patches."""
    padded = padded_size(condition.header.tensor_shape, autoencoder.patch_size)
    return tuple(extent // autoencoder.downsample_factor for extent in padded)


# ------------------------------------------------------------------------------------------------------------- volumes


@torch.inference_mode()
def volumes_of(
    cfg: DictConfig,
    batch: list[Job],
    hints: list[HintReader],
    model: nn.Module,
    process: LatentProcess,
    autoencoder: Autoencoder,
    place: Distributed,
) -> list[Tensor]:
    """(1, D, H, W) in [-1, 1] of each condition and sample, which all have one latent grid."""
    grid = grid_of(batch[0][0], autoencoder)
    generators = [noise_of(cfg, *job, grid) for job in batch]
    z = torch.stack([torch.randn((cfg.volume_channels, *grid), generator=generator) for generator in generators])
    hint = torch.stack([hint_of(condition, hints, grid, autoencoder) for condition, _ in batch])  # (B, H, d, h, w)
    conditions = {"y": torch.tensor([condition.class_id for condition, _ in batch]), "hint": hint}
    conditions["res"] = torch.tensor(grid) / model.vq_size
    of_jobs = [condition for condition, _ in batch]
    measurements = [measurement_of(condition) for condition in of_jobs] if cfg.data_consistency else []
    latents = process.sample(
        model,
        z.to(place.device),
        conditions={name: value.to(place.device) for name, value in conditions.items()},
        cond_scale=cfg.guidance_scale,
        strategy=cfg.sampling_strategy,
        eta=cfg.eta,
        ddim_steps=cfg.ddim_steps,
        generator=generators,
        correct=agreeing_latents(autoencoder, of_jobs, measurements) if cfg.consistency_steps else None,
        correct_last=cfg.consistency_steps,
    )
    volumes = [decoded(autoencoder, latent, condition) for latent, condition in zip(latents, of_jobs, strict=True)]
    return list(map(agreeing, volumes, measurements)) if cfg.data_consistency else volumes


def hint_of(
    condition: Condition, hints: list[HintReader], grid: tuple[int, int, int], autoencoder: Autoencoder
) -> Tensor:
    """(H, d, h, w) of the condition's files: images are encoded, masks shared out, latents read."""
    parts = [(hint.is_image, read_hint(condition, hint, grid)) for hint in hints]
    return torch.cat([encode(autoencoder, part).cpu() if is_image else part for is_image, part in parts])


def read_hint(condition: Condition, hint: HintReader, grid: tuple[int, int, int]) -> Tensor:
    """An image as a volume (1, D, H, W), other hints as they are told, (channels, d, h, w)."""
    path = condition.hints[hint.name]
    if hint.is_image:
        return read_model_volume(path, MODEL_RANGE).data
    hint.check(path, grid)
    return hint.read(path, grid)


def noise_of(cfg: DictConfig, condition: Condition, sample: int, grid: tuple[int, int, int]) -> torch.Generator:
    """The source of all noise of a volume, on the CPU so that it is the same on every device."""
    key = (cfg.seed, condition.class_id, zlib.crc32(os.fsencode(condition.name)), sample, *grid)
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


# --------------------------------------------------------------------------------------------------------------- files


def path_of(cfg: DictConfig, condition: Condition, sample: int | str) -> Path:
    """OUT/CLASS_ID/NAME.nii.gz, with several samples NAME_I.nii.gz."""
    number = f"_{sample}" if cfg.num_samples > 1 or isinstance(sample, str) else ""
    return Path(cfg.output_dir) / str(condition.class_id) / f"{condition.name}{number}{VOLUME_SUFFIX}"


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """What all volumes of a run depend on."""
    names = ("control_scale", "guidance_scale", "sampling_strategy", "ddim_steps", "eta", "seed")
    names += ("data_consistency", "consistency_steps")
    files = {name: file_sha256(cfg[name]) for name in ("AE_ckpt", "base_ckpt", "model_ckpt")}
    return {**{name: cfg[name] for name in names}, **files}


def record_of(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    condition, sample = job
    hints = {name: {"file": str(path), "sha256": file_sha256(path)} for name, path in condition.hints.items()}
    return {"class_id": condition.class_id, "condition": condition.name, "sample": sample, "hints": hints, **settings}


def is_done(cfg: DictConfig, job: Job, settings: dict[str, Any]) -> bool:
    """Whether the volume is there, whole and of the same settings. UserError: of others."""
    path = path_of(cfg, *job)
    if not is_whole_volume(path):
        return False
    try:
        found = read_json(record_path(path))
    except (OSError, ValueError):
        return False
    now = record_of(job, settings)
    if found != now:
        different = sorted(key for key in now.keys() | found.keys() if found.get(key) != now.get(key))
        raise UserError(
            f"{path}: was generated otherwise ({', '.join(different)}): choose another output_dir, or remove it"
        )
    return True


def summarise(cfg: DictConfig, conditions: list[Condition]) -> None:
    """Mean and standard deviation of several samples, the contact sheet and view.html."""
    if cfg.num_samples > 1:
        for condition in conditions:
            samples = torch.stack([read_volume(path_of(cfg, condition, i)).data for i in range(cfg.num_samples)])
            for name, values in (("mean", samples.mean(0)), ("std", samples.std(0))):
                write_volume(path_of(cfg, condition, name), values, condition.header.affine)
    rows = []
    for condition in conditions[: cfg.num_pictures]:
        shown = {"condition": condition.first, "generated": path_of(cfg, condition, 0), "truth": condition.truth}
        for what, path in shown.items():
            if path is not None:
                slices = central_slices(read_volume(path).data, condition.header.spacing_mm)
                rows.append((f"{condition.name}\n{what}", list(slices.values())))
    if rows:
        save_slice_grid(Path(cfg.output_dir) / "contact_sheet.png", rows, columns=PLANES)
    write_view(Path(cfg.output_dir) / VIEW_NAME, [beside(cfg, condition) for condition in conditions], "Controlled")


def beside(cfg: DictConfig, condition: Condition) -> Beside:
    """What view.html has of a condition: all hints that are volumes, what was generated, the truth."""
    output = Path(cfg.output_dir)
    panels = []
    for hint in hints_of(cfg.hints, cfg.volume_channels):
        if hint.is_image or isinstance(hint, MaskHint):
            file = condition.hints[hint.name].absolute()
            panels.append(Panel(f"condition: {hint.name}", str(file), MODEL_RANGE if hint.is_image else None))
    for sample in range(cfg.num_samples):
        generated = path_of(cfg, condition, sample).relative_to(output).as_posix()
        panels.append(Panel("generated", generated, MODEL_RANGE))
    truth = [] if condition.truth is None else [Panel("truth", str(condition.truth.absolute()), MODEL_RANGE)]
    return Beside(f"{condition.class_id}/{condition.name}", [*panels, *truth])

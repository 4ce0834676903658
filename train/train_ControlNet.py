r"""Trains a ControlNet beside a frozen BiFlowNet: generation that follows images or masks (docs/controlled.md).

    torchrun --nproc-per-node 8 train/train_ControlNet.py --config config/ControlNet_8x.yaml --base-ckpt BiFlowNet.pt \
        --data-path control_latents.json --AE-ckpt autoencoder.ckpt --results-dir results

The JSON names for each class {"images": FOLDER_latents, "hints": {NAME: FOLDER}}. Without torchrun it is a single
process. The same command again goes on where it stopped; SIGTERM or Ctrl-C saves a checkpoint first.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig  # noqa: E402

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.control import ControlNetConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, ControlNetConfig, "ControlNet_8x.yaml", __doc__)
    stopped_by = train(cfg)["stopped_by"]
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def train(cfg: DictConfig) -> dict:
    """Train on the latents of `cfg` until they are done or a signal asks to stop; returns and raises as `fit`."""
    from config.loading import require
    from dataset.Control_dataset import Control_dataset
    from dataset.hints import hints_of
    from train.diffusion.beginning import begin_controlnet
    from train.diffusion.start import batch_sizes_by_voxels, start_training

    require(cfg, "data_path", "base_ckpt", "hints")
    open_dataset = partial(Control_dataset, hints=hints_of(cfg.hints, cfg.volume_channels))
    order = {"order": cfg.bucket_order, "temperature": cfg.bucket_temperature}
    sizes = partial(batch_sizes_by_voxels, cfg)
    return start_training(cfg, ControlNetConfig, open_dataset, sizes, begin_controlnet, **order)


if __name__ == "__main__":
    raise SystemExit(run_script(main))

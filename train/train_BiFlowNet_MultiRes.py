r"""Trains the latent diffusion model BiFlowNet on latents of several sizes at once (Wang et al., IEEE TMI 2025).

    torchrun --nproc-per-node 8 train/train_BiFlowNet_MultiRes.py --config config/BiFlowNet_multires_8x.yaml \
        --data-path config/Singleres_latents.json --AE-ckpt autoencoder.ckpt --results-dir results

Each step takes a batch of one size, on all ranks the same; the sizes are read from the latents (docs/training.md).
Without torchrun it is a single process. The same command again goes on with its run folder where it stopped; SIGTERM or
Ctrl-C saves a checkpoint first. Several nodes need `--results-dir` on a file system they share.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig  # noqa: E402

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.diffusion import BiFlowNetMultiresConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, BiFlowNetMultiresConfig, "BiFlowNet_multires_8x.yaml", __doc__)
    stopped_by = train(cfg)["stopped_by"]
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def train(cfg: DictConfig) -> dict:
    """Train on the latents of `cfg` until they are done or a signal asks to stop; returns and raises as `fit`."""
    from dataset.Multires_dataset import Multires_dataset
    from train.diffusion.start import batch_sizes_by_voxels, start_training

    order = {"order": cfg.bucket_order, "temperature": cfg.bucket_temperature}
    find_batch_sizes = partial(batch_sizes_by_voxels, cfg)
    return start_training(cfg, BiFlowNetMultiresConfig, Multires_dataset, find_batch_sizes, **order)


if __name__ == "__main__":
    raise SystemExit(run_script(main))

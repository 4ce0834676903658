r"""Trains the latent diffusion model BiFlowNet on latents of one size (Wang et al., IEEE TMI 2025, section III-B).

    torchrun --nproc-per-node 8 train/train_BiFlowNet_SingleRes.py --config config/BiFlowNet_8x.yaml \
        --data-path config/Singleres_latents.json --AE-ckpt autoencoder.ckpt --results-dir results

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
from config.schema.diffusion import BiFlowNetConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, BiFlowNetConfig, "BiFlowNet_8x.yaml", __doc__)
    stopped_by = train(cfg)["stopped_by"]
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def train(cfg: DictConfig) -> dict:
    """Train on the latents of `cfg` until they are done or a signal asks to stop; returns and raises as `fit`."""
    from dataset.Singleres_dataset import Singleres_dataset
    from train.diffusion.start import start_training

    open_dataset = partial(Singleres_dataset, resolution=cfg.resolution)
    return start_training(
        cfg, BiFlowNetConfig, open_dataset, lambda dataset: dict.fromkeys(dataset.buckets, cfg.batch_size)
    )


if __name__ == "__main__":
    raise SystemExit(run_script(main))

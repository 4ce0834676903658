r"""Trains the latent diffusion model BiFlowNet on latents of one size (Wang et al., IEEE TMI 2025, section III-B).

    torchrun --nproc-per-node 8 train/train_BiFlowNet_SingleRes.py --config config/BiFlowNet_8x.yaml \
        --data-path config/Singleres_latents.json --AE-ckpt autoencoder.ckpt --results-dir results

Without torchrun it is a single process. The same command again goes on with its run folder where it stopped; SIGTERM or
Ctrl-C saves a checkpoint first. Several nodes need `--results-dir` on a file system they share.
"""

import sys
from collections.abc import Sequence
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
    import torch

    from dataset.Singleres_dataset import Singleres_dataset
    from ddpm.checkpoint import build_biflownet
    from ddpm.process import build_process
    from train.diffusion import checks
    from train.diffusion.batches import LatentBatches, make_cache
    from train.diffusion.state import Origin
    from train.diffusion.training import fit
    from train.loop.session import session

    with session(cfg.device, cfg.arithmetic) as here:
        checks.check_options(cfg, here)
        process = build_process(cfg)
        cache = make_cache(cfg, here.logger)
        split = checks.find_training_split(cfg)
        dataset = Singleres_dataset(cfg.data_path, cfg.resolution, vq_size=cfg.vq_size, split=split, cache=cache)
        checks.check_data(cfg, dataset, here)
        if process.scaling is not None:
            checks.set_scaling(process.scaling, dataset, here)
        batches = LatentBatches(dataset, cfg.batch_size, cfg.global_seed, cfg.num_workers, here)
        origin = here.distributed.on_main(lambda: checks.find_autoencoder(cfg, dataset, here.logger), share=False)
        torch.manual_seed(cfg.global_seed)  # the same weights on every rank
        model = build_biflownet(cfg)
        checks.check_grid(cfg, model)
        return fit(cfg, here, model, model, batches, process, origin or Origin())


if __name__ == "__main__":
    raise SystemExit(run_script(main))

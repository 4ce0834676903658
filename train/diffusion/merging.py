"""A BiFlowNet and adapters as one checkpoint."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from common.checkpoint_files import load_checkpoint, save_checkpoint
from common.errors import UserError
from common.files import check_writable
from common.log import get_logger
from common.places import exists
from common.tensor_files import SUFFIX
from config.loading import load_config, require
from config.schema.diffusion import BiFlowNetConfig
from ddpm.adapter_files import parse_adapters, read_adapter
from ddpm.adapting import load_adapted
from ddpm.checkpoint import SHAPE_FLAGS, WITHOUT_SHAPE, averaged_checkpoint, trained_options

ARCHITECTURE = (*SHAPE_FLAGS, *WITHOUT_SHAPE, "attn_heads", "label_dropout")  # what the network is built by


def merge_adapters(cfg: DictConfig) -> Path:
    """Write the checkpoint and return its path.

    Raises:
        UserError: files that are missing or do not belong together, an output that is there or can't be written.
    """
    require(cfg, "model_ckpt", "adapters", "output")
    output = Path(cfg.output)
    if exists(output):
        raise UserError(f"{output}: is there already: remove it, or name another output")
    check_writable(output)
    adapters = parse_adapters(cfg.adapters)
    checkpoint = load_checkpoint(cfg.model_ckpt)
    about = {**OmegaConf.to_container(OmegaConf.structured(BiFlowNetConfig)), **trained_options(checkpoint)}
    about["num_classes"] = read_adapter(adapters[0][0]).num_classes
    architecture = {name: about[name] for name in ARCHITECTURE if name in about}
    try:
        described = load_config(BiFlowNetConfig, None, values=architecture)
    except UserError as error:
        raise UserError(f"{cfg.model_ckpt}: its args: {error}") from error
    model = load_adapted(described, cfg.model_ckpt, checkpoint=checkpoint, adapters=adapters)
    weights = model.merged().state_dict()
    content = averaged_checkpoint(weights, about, checkpoint)
    save_checkpoint(content if output.suffix == SUFFIX else {"model": weights, **content}, output)
    get_logger().info("%s: %s with %s", output, cfg.model_ckpt, ", ".join(cfg.adapters))
    return output

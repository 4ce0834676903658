"""Options of publishing trained networks (train/export.py)."""

from dataclasses import dataclass

from config.schema.data import VolumeClass, class_table_flag
from config.schema.option import flag, key
from config.schema.rules import Rule, one_of

licence = Rule(lambda value: value == value.strip().lower() and value != "", "the hub's word for it, as cc-by-4.0")


@dataclass
class ExportConfig:
    """Checkpoints as safetensors, with a model card."""

    ckpt: list[str] = flag([], "checkpoints: an autoencoder, a BiFlowNet, a ControlNet, or some of these; required")
    output_dir: str | None = flag(
        None, "new folder that gets autoencoder.safetensors, biflownet.safetensors, … and README.md; required"
    )
    licence: str | None = flag(None, "of the weights, as the hub calls it, e.g. cc-by-4.0 or other; required", licence)
    title: str | None = flag(None, "name of the model; null = that of the folder")
    data: str | None = flag(None, "for the card: what it was trained on, whose it is, in a sentence or two")
    results: list[str] = flag([], "for the card: generation.json, reconstruction.json, … of evaluation")
    class_table: str | None = class_table_flag()
    downsample: int = key(8, "compression that the class table is for: 8 | 4", one_of(8, 4))
    classes: list[VolumeClass] = key([], "for the card: names and sizes of the classes")

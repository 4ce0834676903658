"""What rank 0 writes at a checkpoint, while all ranks train on."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from common.checkpoint_files import remove_older, save_checkpoint
from ddpm.adapter_files import ADAPTER_NAME, write_adapter
from train.diffusion import run_folder
from train.diffusion.batches import LatentBatches, Origin
from train.diffusion.preview import Previews
from train.loop.background import BackgroundWork, snapshot
from train.loop.deletion import check_not_deleted
from train.loop.session import Session


class Saving(BackgroundWork):
    """A run's checkpoints and previews, written in order beside training; `previews` None: none are made.

    keep: newest checkpoints kept; 0: all. name: what their files' names begin with.
    export: writes averaged weights into a folder in another form.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        previews: Previews | None,
        logger: logging.Logger,
        name: str = "BiFlowNet",
        export: Callable[[Path, dict[str, Tensor]], None] | None = None,
    ) -> None:
        super().__init__()
        self._folder, self._keep, self._previews, self._logger = folder, keep, previews, logger
        self._name = name
        self._export = export or (lambda folder, weights: None)

    def save(
        self, step: int, content: dict[str, Any], preview_turn: int | None, is_kept: bool = True, is_best: bool = False
    ) -> None:
        """Take a checkpoint's content as it is now, and have it and then a preview of its averaged weights written.

        Waits for what was given before. preview_turn: whose turn it is among the classes; None: no preview. is_kept:
        among the run's newest; is_best: as that with the least held-out loss, in place of the one before.

        Raises:
            UserError: the checkpoint before could not be written; this one is tried all the same.
        """
        try:
            self.wait()  # first: two copies of all weights and averages would be many GB
        finally:
            self.submit(self._write, step, snapshot(content), preview_turn, is_kept, is_best)

    def make_up(self, step: int, preview_turn: int, averages: dict[str, Tensor]) -> None:
        """Have the preview made that was due at the run's newest checkpoint, where it was stopped before.

        averages: the checkpoint's averaged weights.
        """
        if self._previews is not None and self._is_own(step) and not self._previews.exists(step):
            self.submit(self._previews.write, step, preview_turn, snapshot(averages))

    def _is_own(self, step: int) -> bool:
        return run_folder.checkpoint_path(self._folder, step, self._name).exists()

    def _write(
        self, step: int, content: dict[str, Any], preview_turn: int | None, is_kept: bool, is_best: bool
    ) -> None:
        check_not_deleted(self._folder)
        if is_kept:
            path = run_folder.checkpoint_path(self._folder, step, self._name)
            save_checkpoint(content, path)
            remove_older(path, f"{self._name}_", self._keep)
            self._export(self._folder, content["ema"])
            self._logger.info("saved %s", path)
        if is_best:
            path = run_folder.best_path(self._folder, step, self._name)
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(content, path)
            self._export(path.parent, content["ema"])
            for other in set(path.parent.glob("*.pt")) - {path}:
                other.unlink()
            self._logger.info("saved %s, the best so far", path)
        if self._previews is not None and preview_turn is not None:
            self._previews.write(step, preview_turn, content["ema"])


def open_saving(
    cfg: DictConfig,
    folder: Path,
    model: nn.Module,
    batches: LatentBatches,
    process: nn.Module,
    origin: Origin,
    here: Session,
    base: str | None = None,
) -> Saving:
    """Checkpoints into `folder`, and previews where they are wanted and there is an autoencoder (on rank 0 alone).

    model: the averaged one, of which previews take a copy. here: at its end all is written. base: of an adapter, which
    is also written as a file of its own.
    """
    previews = None
    if cfg.preview and origin.autoencoder is not None:
        previews = Previews(
            folder / "samples", batches.kinds, cfg.preview_steps, model, process,
            origin.autoencoder, here.device, here.logger, batches.hint_of, is_stopping=lambda: here.stop.received > 0,
        )  # fmt: skip
    export = None
    if cfg.get("trainable") == "lora":
        export = partial(_export_adapter, cfg=cfg, base=base)
    return here.closing.enter_context(Saving(folder, cfg.keep_checkpoints, previews, here.logger, cfg.model, export))


def _export_adapter(folder: Path, weights: dict[str, Tensor], cfg: DictConfig, base: str) -> None:
    write_adapter(folder / ADAPTER_NAME, weights, cfg, base)

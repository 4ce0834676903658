"""Numbers of a training run: metrics.jsonl, TensorBoard beside it, and a tracker (`train/loop/tracker.py`)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from common.documents import json_lines
from common.errors import UserError
from common.files import write_atomically
from common.progress import Progress
from config.schema.option import TENSORBOARD
from train.loop.deletion import check_not_deleted
from train.loop.early_warnings import DataBound
from train.loop.session import Session


class JsonLines:
    """A file with one line of JSON for each logged step.

    What it holds is kept, up to `start_step`, the optimiser step the run goes on from, so that each step occurs once;
    what is logged of that step itself and is there already is passed over.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self._path, self._start_step, self._known = path, start_step, _drop_steps_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`; what is not finite becomes null, as JSON has no word for it.

        UserError where the file was deleted, which would be written to without a word.
        """
        check_not_deleted(self._path.parent, self._path)
        if step == self._start_step and scalars.keys() <= self._known:
            return
        known = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Scalars of a run, as JSON lines (`metrics.jsonl`), for TensorBoard and the tracker of `config`. For rank 0 only.

    config: of the run; `logger` names its tracker.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.lines = JsonLines(folder / "metrics.jsonl", start_step)
        self.board = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self.tracker = None
        if config["logger"] != TENSORBOARD:
            from train.loop.tracker import Tracker  # brings Lightning

            self.tracker = Tracker(config["logger"], folder, config)
            self.tracker.log_hyperparams()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.lines.write(step, scalars)
        for name, value in scalars.items():
            self.board.add_scalar(f"train/{name}", value, step)
        if self.tracker is not None:
            self.tracker.write(step, {f"train/{name}": value for name, value in scalars.items()})

    def close(self, is_failed: bool = False) -> None:
        self.lines.close()
        self.board.close()
        if self.tracker is not None:
            self.tracker.finalize("failed" if is_failed else "success")


class RunLog:
    """What a training loop tells of its steps: how far it is, and of those that are logged numbers to the files, a line
    to the log, a warning of waiting.

    On rank 0 alone; elsewhere nothing is told. To be used in a `with` block.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        start_step: int,
        last_step: int,
        here: Session,
        remedy_for_waiting: str,
    ) -> None:
        self._writer = MetricsWriter(folder, config, start_step) if here.is_main else None
        self._progress = Progress("training", last_step, "step", start_step, show=here.is_main)
        self._logger = here.logger
        self._redirected = logging_redirect_tqdm([here.logger])  # lines of the log above the bar
        self._data_bound = DataBound(remedy_for_waiting)

    def __enter__(self) -> "RunLog":
        self._redirected.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()
        self._redirected.__exit__(*error)
        if self._writer is not None:
            self._writer.close(is_failed=error[0] is not None)

    def tick(self, step: int, loss: Tensor) -> None:
        """Optimiser step `step`, which isn't logged, is done; `loss` () is read where a line of progress is due."""
        self._progress.reach(step, f"loss {loss.item():.4g}" if self._progress.is_due else "")

    def write_held_out(self, step: int, scalars: dict[str, float], note: str) -> None:
        """Record held-out losses of optimiser step `step`, with a note for the log."""
        if self._writer is not None:
            self._writer.write(step, scalars)
            self._logger.info("step %07d %s%s", step, _shown(scalars), note)

    def write(self, step: int, epoch: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`; `data_wait` is among them."""
        if self._writer is None:
            return
        self._writer.write(step, scalars)
        self._progress.reach(step, line=False)
        self._logger.info("step %07d epoch %d %s, %s", step, epoch, _shown(scalars), self._progress.left)
        if warning := self._data_bound.check(scalars["data_wait"]):
            self._logger.warning("step %d: %s", step, warning)


def _shown(scalars: dict[str, float]) -> str:
    """Those for the log: what is told apart by kind stands in the file."""
    return " ".join(f"{name} {value:.4g}" for name, value in scalars.items() if "/" not in name)


def _drop_steps_after(path: Path, step: int) -> set[str]:
    """Rewrite a JSON lines file without the steps after `step` and without a half-written last line.

    Returns the names of what it holds of that step. UserError where it is damaged.
    """
    kept, known = [], set()
    try:
        for line, record in json_lines(path):
            if record["step"] <= step:
                kept.append(line)
                known |= record.keys() if record["step"] == step else set()
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the numbers of a run ({error}): move it away, and the run goes on") from error
    write_atomically(path, "".join(kept).encode())
    return known

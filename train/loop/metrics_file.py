"""Numbers of a training run: metrics.jsonl, and TensorBoard beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from common.files import write_atomically


class JsonLines:
    """A file with one line of JSON for each logged step.

    Args:
        path: the file; what it holds is kept.
        start_step: the optimiser step the run goes on from. What an interrupted run logged after it is dropped, so
            that each step occurs once.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        _drop_steps_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`; what is not finite becomes null, as JSON has no word for it."""
        known = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Scalars of a run, once as JSON lines (`metrics.jsonl`) and once for TensorBoard. For rank 0 only.

    Args:
        folder: the run folder.
        start_step: as of `JsonLines`.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.lines = JsonLines(folder / "metrics.jsonl", start_step)
        self.board = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` of optimiser step `step`."""
        self.lines.write(step, scalars)
        for name, value in scalars.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.lines.close()
        self.board.close()


def _drop_steps_after(path: Path, step: int) -> None:
    """Rewrite a JSON lines file without the steps after `step` and without a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept).encode())

"""A training's figures at Weights & Biases or MLflow, beside TensorBoard and metrics.jsonl: Lightning's loggers.

Neither library has to be there unless the option `logger` asks for it. To which server the figures go, and as whose,
the libraries read from their own environment variables.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from common.documents import read_json
from common.errors import UserError
from common.files import write_atomically
from common.log import LOGGER_NAME

RECORD = "logger.json"  # in the run's folder: the tracker's name for the run, so that the same one goes on
PROJECT = "3D-MedDiffusion"


def check_installed(name: str) -> None:
    """UserError where the library of this tracker is missing."""
    if find_spec(name) is None:
        raise UserError(f"logger: {name} is not installed here: pip install {name}, or leave logger at tensorboard")


class Tracker(Logger):
    """A run at a tracker; on ranks other than 0 nothing.

    name: "wandb" or "mlflow". folder: the run's, whose name is the run's there. config: what is noted of it.

    Once it has begun nothing that goes wrong there ends the training: it is a warning, once.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._name, self._folder, self._config = name, folder, config
        self._logger: Logger | None = None  # None before the beginning, and after something went wrong

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """What Lightning calls first: begins the run there, or goes on with it. UserError: that can't be done.

        params: not needed, `config` has them.
        """
        path = self._folder / RECORD
        try:
            known = read_json(path).get(self._name) if path.exists() else None
            made = self._make(known)
            if known is None:  # MLflow allows no changes
                made.log_hyperparams(self._config)
            run = made.run_id if self._name == "mlflow" else made.experiment.id
        except Exception as error:  # of libraries that reach out to other machines
            which = f"; {path} names the run there: remove it to begin another" if path.exists() else ""
            raise UserError(f"logger: {self._name} can't begin: {_reason(error)}{which}") from error
        write_atomically(path, json.dumps({self._name: run}).encode())
        self._logger = made

    def _make(self, known: str | None) -> Logger:
        """known: the tracker's name for the run, if it has one."""
        if self._name == "wandb":
            project, run = os.environ.get("WANDB_PROJECT", PROJECT), known or uuid.uuid4().hex[:8]
            return WandbLogger(name=self._folder.name, project=project, id=run, save_dir=self._folder)
        from mlflow import get_tracking_uri

        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        return MLFlowLogger(project, self._folder.name, tracking_uri=get_tracking_uri(), run_id=known)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record `scalars` of optimiser step `step`."""
        self._attempt(lambda logger: logger.log_metrics(scalars, step))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """As Lightning calls it, whose steps are one less."""
        self.write(step + 1, metrics)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """status: "success" or "failed"."""
        self._attempt(lambda logger: logger.finalize(status))
        if self._name == "wandb":  # not left to the interpreter's end, which a process of several may not reach
            self._attempt(lambda logger: logger.experiment.finish(exit_code=int(status != "success")))
        self._logger = None

    def _attempt(self, act: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            act(self._logger)
        except Exception as error:
            self._logger = None
            message = "logger: %s gets no more of this run: %s"
            logging.getLogger(LOGGER_NAME).warning(message, self._name, _reason(error))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

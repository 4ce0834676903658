"""Data that the modules of this folder train on; a module with data of its own has a fixture of the same name."""

from pathlib import Path

import autoencoder_runs
import biflownet_runs
import pytest


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    return autoencoder_runs.make_data(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return biflownet_runs.make_latents(tmp_path_factory.mktemp("latents"))

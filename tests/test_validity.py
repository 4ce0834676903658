"""The harness on volumes whose faults are known: phantoms, and features that can't see anything."""

import pytest
import torch
from evaluation_sets import PLACE, validity_config, write_json, write_set
from generation_models import save_models

from config.errors import UserError
from dataset.phantoms import make_phantoms
from dataset.volume_io import read_volume
from evaluation import validity
from evaluation.feature_networks import RandomFeatures, VolumeFeatures
from evaluation.results import read_results
from evaluation.validity import Degraded, evaluate, main
from evaluation.volume_sets import SetVolume

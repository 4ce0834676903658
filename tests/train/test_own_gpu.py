"""Each process computes on a GPU of its own, whether it sees all of its node or that one alone. None is needed here."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as torch_distributed
from autoencoder_runs import config
from pytorch_lightning.utilities import rank_zero_only
from user_errors import error_of

from common.errors import UserError
from common.processes import check_own_gpu, choose_device
from train.autoencoder import training
from train.autoencoder.resume import Start
from train.autoencoder.strategy import TwoPassDDPStrategy
from train.autoencoder.trainer import build_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch see so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(("count", "local_rank", "index"), [(1, 0, 0), (1, 3, 0), (4, 3, 3)])
def test_a_lone_visible_gpu_is_the_processes_own(gpus, count, local_rank, index):
    gpus(count)
    assert choose_device("cuda", local_rank) == torch.device("cuda", index)


def test_among_several_visible_gpus_the_place_on_the_node_counts(gpus):
    gpus(2)
    assert "process 2 of this node has no GPU, the node has 2" in error_of(choose_device, "auto", 2)


@pytest.mark.parametrize(
    ("uuids", "shared"), [("ab", None), ("aa", "0 and 1 share one GPU (node, GPU a)"), ("abcbb", "1 and 3 and 4 share")]
)
def test_processes_on_one_gpu_are_refused_on_all_ranks(monkeypatch, uuids, shared):
    monkeypatch.setattr("platform.node", lambda: "node")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=uuids[d.index]))
    store, said = torch_distributed.HashStore(), {}

    def check(rank: int) -> None:
        try:
            check_own_gpu(store, torch.device("cuda", rank), rank, len(uuids))
        except UserError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(len(uuids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == (len(uuids) if shared else 0)
    assert all(shared in text and "\n" not in text for text in said.values())


PROGRAM = """
import os, sys
from types import SimpleNamespace
import torch
from common import processes
from common.script import run_script

way, shared = sys.argv[1:]
uuid = "GPU-0" if shared == "shared" else os.environ["RANK"]
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda device: None
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuid)
join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **options: join("gloo", **options)

def main(argv):
    if way == "joined":
        with processes.joined("auto") as place:
            assert str(place.device) == "cuda:0"
            torch.distributed.barrier()
    else:
        with processes.own_gpu(torch.device("cuda", 0)):
            join("gloo")  # the server of the store is there already
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

raise SystemExit(run_script(main))
"""


@pytest.mark.parametrize("way", ["joined", "own_gpu"])
@pytest.mark.parametrize("shared", ["shared", "own"])
def test_two_processes_without_a_launchers_store(tmp_path, way, shared):
    """Rank 0 serves it, and leaves only after rank 1 has read what it needs."""
    (tmp_path / "program.py").write_text(PROGRAM)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 1000)}
    pair = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), way, shared],
            env={**os.environ, **world, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=120)[1] for process in pair]
    if shared == "own":
        assert [process.returncode for process in pair] == [0, 0], texts
        return
    assert [process.returncode for process in pair] == [2, 2], texts
    assert all(text.startswith("error: processes 0 and 1 share one GPU") for text in texts), texts
    assert not any("Traceback" in text for text in texts)


@pytest.mark.parametrize(("count", "index"), [(1, 0), (2, 1), (0, None)])
def test_a_launched_process_is_a_node_with_one_device_to_lightning(gpus, monkeypatch, tmp_path, count, index):
    """The second of two processes; without GPUs too."""
    gpus(count)
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launched, "SLURM_NTASKS": "7", "SLURM_PROCID": "5", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which the trainer sets for good
    cfg = config(tmp_path / "data.json", tmp_path, "model.accelerator=auto")
    trainer = build_trainer(cfg, tmp_path, Start(), pl.Callback(), pl.Callback(), None)
    assert isinstance(trainer.strategy, TwoPassDDPStrategy)
    assert trainer.strategy.root_device == (torch.device("cpu") if index is None else torch.device("cuda", index))
    assert (trainer.global_rank, trainer.world_size, trainer.is_global_zero) == (1, 2, False)
    trainer.strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)


def test_more_processes_than_gpus_that_lightning_is_to_start(gpus, tmp_path):
    gpus(1)
    cfg = config(tmp_path / "data.json", tmp_path, "model.accelerator=auto", "model.gpus=2")
    message = "model.gpus is 2, but 1 GPU(s) were found: start as many processes, or set model.accelerator=cpu"
    assert error_of(training._check_options, cfg, 1) == message


def test_more_processes_than_cores_that_lightning_is_to_start(tmp_path):
    words = ["model.accelerator=cpu", "model.gpus=9999"]
    message = error_of(training._check_options, config(tmp_path / "data.json", tmp_path, *words), 1)
    assert message.endswith("may be used: take as many, or set model.oversubscribe=true")
    training._check_options(config(tmp_path / "data.json", tmp_path, *words, "model.oversubscribe=true"), 1)

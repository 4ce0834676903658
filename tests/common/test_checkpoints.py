"""Checkpoint files: safe loading, atomic saving, and models built from official and our own files."""

import argparse
import builtins
import errno
import logging
import os
import pickle
import resource
import signal
import subprocess
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common.checkpoint_files import (
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    numbered_checkpoints,
    remove_older,
    save_checkpoint,
)
from common.errors import UserError


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- safe loading


def test_plain_values_configs_and_namespaces_come_back(tmp_path):
    cfg = OmegaConf.create({"model": {"downsample": [4, 4, 4], "nested": [[1, None], {"a": [0.5]}], "none": None}})
    saved = {"hyper_parameters": {"cfg": cfg}, "bare": cfg, "hparams_type": type(cfg), "tuple": (1, "a", None, True)}
    saved |= {"args": argparse.Namespace(a=[1, 2], b=None), "tensor": torch.arange(3), "bytes": b"x"}
    save_checkpoint(saved, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded["bare"] == loaded["hyper_parameters"]["cfg"] == cfg
    assert loaded["bare"].model.nested[1].a[0] == 0.5
    assert (loaded["args"], loaded["tuple"], loaded["hparams_type"]) == (saved["args"], saved["tuple"], DictConfig)
    assert torch.equal(loaded["tensor"], saved["tensor"])


class Plain:
    """A class that some library might register as safe."""


class Attack:
    """Unpickles into a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(marker: Path):
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Attack(os.system, f"touch {marker}"), r"asks for posix\.system"),
        "exec": (Attack(builtins.exec, touch), r"asks for (builtins\.)?exec"),
        "subprocess": (Attack(subprocess.Popen, ["touch", str(marker)]), r"asks for \w+\.Popen"),
        "numpy scalar": (np.float64(1.0), r"asks for numpy\.\S*scalar"),
        "own class": (UserError("x"), r"asks for common\.errors\.UserError"),
    }


@pytest.mark.parametrize("write", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("name", ["os.system", "exec", "subprocess", "numpy scalar", "own class"])
def test_anything_else_is_refused_and_not_run(tmp_path, name, write):
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    payload, reason = attacks(marker)[name]
    checkpoint = {"state_dict": {"a": torch.zeros(1)}, "callbacks": payload}
    if write == "bare pickle":
        path.write_bytes(pickle.dumps({"callbacks": payload}, protocol=2))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=write == "zip")
    if name in ("os.system", "exec"):  # the attack works where it is let through
        torch.load(path, weights_only=False) if write != "bare pickle" else pickle.loads(path.read_bytes())
        assert marker.exists()
        marker.unlink()
    message = message_of(load_checkpoint, path)
    assert not marker.exists()
    with pytest.raises(UserError, match=rf"evil\.ckpt: refused: it {reason}, and loading that could run code"):
        load_checkpoint(path)
    assert "expected only tensors" in message


def test_allow_list_is_ours_alone_and_only_while_loading(tmp_path):
    """What other libraries registered is refused all the same, and is registered again afterwards."""
    before = set(torch.serialization.get_safe_globals())
    torch.save({"x": Plain()}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([Plain]):
        torch.load(tmp_path / "a.pt", weights_only=True)
        assert "Plain, and loading that could run code" in message_of(load_checkpoint, tmp_path / "a.pt")
        assert set(torch.serialization.get_safe_globals()) == before | {Plain}
    assert set(torch.serialization.get_safe_globals()) == before


def truncated(path: Path) -> None:
    save_checkpoint({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such checkpoint file"),
        (Path.mkdir, "no such checkpoint file"),
        (truncated, "truncated checkpoint"),
        (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
        (lambda path: path.write_text("hello world, this is text"), "not a readable checkpoint"),
        (lambda path: path.write_bytes(bytes(range(256)) * 10), "not a readable checkpoint"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "truncated checkpoint"),
        (lambda path: torch.save(torch.zeros(2), path), "holds a Tensor, expected a dict"),
        (lambda path: torch.save([1, 2], path), "holds a list, expected a dict"),
    ],
    ids=["missing", "folder", "truncated", "empty", "text", "bytes", "zip head", "tensor", "list"],
)
def test_files_that_are_no_checkpoints(tmp_path, make, message, mmap):
    path = tmp_path / "x.ckpt"
    make(path)
    with pytest.raises(UserError, match=rf"x\.ckpt: .*{message}"):
        load_checkpoint(path, mmap=mmap)
    message_of(load_checkpoint, path)


def invert(path: Path, start: int, count: int = 64) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(255 - byte for byte in data[start : start + count])
    path.write_bytes(data)


@pytest.mark.parametrize("mmap", [False, True])
def test_inverted_bytes_are_noticed(tmp_path, mmap):
    """Torch loads them: all values are still numbers."""
    path = tmp_path / "x.ckpt"
    save_checkpoint({"step": 7, "weights": torch.zeros(1000)}, path)
    assert load_checkpoint(path, mmap=mmap)["step"] == 7
    invert(path, path.read_bytes().index(bytes(3000)) + 1000)
    assert int(torch.load(path, weights_only=True)["weights"].count_nonzero()) in (16, 17)
    message = message_of(load_checkpoint, path, mmap=mmap)
    assert "x.ckpt: damaged: archive/data/0 is no longer what was saved; copy or download it again" in message


def test_checksums_are_compared_once_while_the_file_stays_the_same(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(zipfile, "ZipFile", lambda path, real=zipfile.ZipFile: opened.append(path) or real(path))
    for step in (1, 2):
        save_checkpoint({"step": step}, tmp_path / "a.pt")
        assert [load_checkpoint(tmp_path / "a.pt", mmap=mmap)["step"] for mmap in (False, True)] == [step] * 2
        assert len(opened) == 2 * step  # the checksums, and what the entries say of themselves


@pytest.mark.parametrize("form", ["without checksums", "old"])
def test_files_without_checksums_load(tmp_path, form):
    path = tmp_path / "a.pt"
    try:
        torch.serialization.set_crc32_options(form == "old")
        torch.save({"weights": torch.ones(5)}, path, _use_new_zipfile_serialization=form != "old")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path)["weights"].sum() == 5


@pytest.mark.parametrize(
    ("dtype", "fits"),
    [(torch.float16, True), (torch.float64, True), (torch.complex64, False), (torch.int32, False), (torch.bool, False)],
)
def test_weights_are_floating_point_numbers(dtype, fits):
    model = nn.BatchNorm1d(3)  # has a counter too, which is none
    state = {**model.state_dict(), "weight": torch.ones(3, dtype=dtype)}
    if fits:
        load_weights(model, state, "x.ckpt", "the model")
        assert model.weight.tolist() == [1, 1, 1]
        return
    message = message_of(load_weights, model, state, "x.ckpt", "the model")
    assert f"weight holds {str(dtype)[6:]} values, expected floating-point ones" in message


# -------------------------------------------------------------------------------------------- atomic saving


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.pt"
    save_checkpoint({"step": 1}, path)
    path.with_name(".a.pt.tmp-1").write_bytes(b"of a killed process")
    path.with_name(".b.pt.tmp-1").write_bytes(b"of another file")
    save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 2}
    assert files_in(path.parent) == [".b.pt.tmp-1", "a.pt"]


def no_space(obj, file):
    file.write(b"half a file")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_zip(obj, file):
    file.write(b"half a file")
    raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("failing", "reason"), [(no_space, "No space left on device"), (no_space_in_zip, "write failed, is the disk full?")]
)
def test_full_disk_loses_nothing(tmp_path, monkeypatch, failing, reason):
    path = tmp_path / "a.pt"
    save_checkpoint({"step": 1}, path)
    monkeypatch.setattr(torch, "save", failing)
    message = message_of(save_checkpoint, {"step": 2}, path)
    assert f"a.pt: the checkpoint could not be written ({reason}" in message
    assert "previous file is kept" in message
    assert load_checkpoint(path) == {"step": 1}
    assert files_in(tmp_path) == ["a.pt"]


@contextmanager
def largest_file(size: int):
    """The operating system refuses to let files grow beyond `size` bytes: a real write that fails half way."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("numel", [1_000, 3_000_000])
def test_write_that_really_fails_half_way(tmp_path, numel):
    path = tmp_path / "a.pt"
    save_checkpoint({"step": 1}, path)
    with largest_file(3_000):
        message = message_of(save_checkpoint, {"weights": torch.zeros(numel)}, path)
    assert "could not be written (File too large)" in message
    assert load_checkpoint(path) == {"step": 1}
    assert files_in(tmp_path) == ["a.pt"]


def test_other_failures_keep_the_old_file_and_their_traceback(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"step": lambda: None}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert files_in(tmp_path) == ["a.pt"]


def test_save_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not be written" in message_of(save_checkpoint, {}, tmp_path / "file" / "a.pt")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sigkill_while_saving_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint({"step": 1}, path)
    child = os.fork()
    if child == 0:
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(path) == {"step": 1}
    assert newest_checkpoint(tmp_path) == path
    assert len(files_in(tmp_path)) == 2  # the leftover ...
    save_checkpoint({"step": 3}, path)
    assert files_in(tmp_path) == ["a.pt"]  # ... is removed by the next save


# -------------------------------------------------------------------------------------------------- newest


def test_newest_goes_by_the_step_in_the_file(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint({"step": 453500}, tmp_path / "BiFlowNet_0453500.pt")
    save_checkpoint({"global_step": 453501}, tmp_path / "last.ckpt")
    save_checkpoint({"step": 7}, tmp_path / "BiFlowNet_9999999.pt")
    save_checkpoint({"step": 10**9}, tmp_path / ".BiFlowNet_1000000.pt.tmp-5")
    save_checkpoint({"step": 10**9}, tmp_path / ".hidden.pt")
    truncated(tmp_path / "BiFlowNet_0500000.pt")
    save_checkpoint({"step": 500001, "weights": torch.zeros(1000)}, tmp_path / "damaged.pt")
    invert(tmp_path / "damaged.pt", 2000)
    (tmp_path / "log.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    assert "BiFlowNet_0500000.pt: truncated" in caplog.text
    assert "damaged.pt: damaged: archive/data/0" in caplog.text


# -------------------------------------------------------------------------------------------------- the newest few


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 4, 10, 12]), (1, [10, 12]), (2, [4, 10, 12]), (9, [2, 4, 10, 12])])
def test_older_ones_go(tmp_path, keep, left):
    """By the number, not its spelling; what is later or named otherwise is left alone and pushes nothing out."""
    others = ["last.ckpt", "best-0000001-0.1234.ckpt", "step-0000003-v1.ckpt", ".step-0000001.ckpt.7.tmp", "step-1.txt"]
    for name in (*(f"step-{step}.ckpt" for step in (2, 4, 10, 12)), *others):
        (tmp_path / name).touch()
    remove_older(tmp_path / "step-10.ckpt", "step-", keep)
    assert numbered_checkpoints(tmp_path, "step-") == [tmp_path / f"step-{step}.ckpt" for step in left]
    assert all((tmp_path / name).exists() for name in others)


def test_nothing_goes_for_a_checkpoint_of_another_name(tmp_path):
    for name in ("step-1.ckpt", "step-2.ckpt", "last.ckpt", "best-0000001-0.1234.ckpt"):
        (tmp_path / name).touch()
    for name in ("last.ckpt", "best-0000001-0.1234.ckpt"):
        remove_older(tmp_path / name, "step-", 1)
    assert len(list(tmp_path.iterdir())) == 4

"""BiFlowNet training waits for nothing: flags one step late, checkpoints and previews beside the loop."""

import functools
import logging
import threading
import time
from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from common import precision
from common.errors import UserError
from config.schema.diffusion import BiFlowNetConfig
from dataset.Singleres_dataset import Singleres_dataset
from ddpm import latent_process
from ddpm.BiFlowNet import BiFlowNet
from ddpm.diffusion import GaussianDiffusion
from train.diffusion import agreement, gradients, run_folder, saving
from train.diffusion.preview import Previews
from train.diffusion.saving import Saving
from train.diffusion.state import TrainingState
from train.loop import session
from train.loop.continuing import changes
from train.loop.metrics_file import MetricsWriter
from train.loop.session import Session
from train.loop.step_flags import StepFlags
from train.train_BiFlowNet_SingleRes import train

LATE = functools.partial(StepFlags, is_late=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.make_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def ae_ckpt(tmp_path_factory) -> Path:
    return runs.save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "ae.ckpt")


@pytest.fixture
def late_flags(monkeypatch) -> None:
    """Flags one step late, as on a GPU."""
    monkeypatch.setattr(agreement, "StepFlags", LATE)


# ------------------------------------------------------------------------------------------------ one step late


def poison_step(monkeypatch, step: int) -> None:
    """Let the loss of one step be NaN."""
    losses, calls = GaussianDiffusion.p_losses, []

    def p_losses(*arguments, **options):
        calls.append(1)
        return losses(*arguments, **options) * (torch.nan if len(calls) == step else 1)

    monkeypatch.setattr(GaussianDiffusion, "p_losses", p_losses)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_bad_step_is_named_one_step_late_and_nothing_is_saved_of_it(
    data, tmp_path, monkeypatch, late_flags, log_every
):
    """The files are those of step 3, which changed no weight."""
    batches, models = [], []
    parallel = Session.parallel
    monkeypatch.setattr(Session, "parallel", lambda self, model: models.append(model) or parallel(self, model))
    exchange = agreement.Agreement.exchange
    monkeypatch.setattr(
        agreement.Agreement,
        "exchange",
        lambda self, step, loss, norm, indices: (batches.append(indices), exchange(self, step, loss, norm, indices))[1],
    )
    poison_step(monkeypatch, 3)
    with pytest.raises(UserError, match="step 3: the loss is not finite, .*rank 0: loss nan, files ") as refused:
        train(runs.config(data, tmp_path, log_every=log_every))
    assert len(batches) == (3 if log_every == 1 else 4)  # logging waits for the flags
    files = Singleres_dataset(data, list(runs.GRID)).files
    assert all(str(files[index]) in str(refused.value) for index in batches[2].tolist())
    run = tmp_path / "000-BiFlowNet"
    assert [run_folder.step_of(path) for path in run_folder.list_checkpoints(run)] == [2]
    saved = checkpoint(run, 2)["model"]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_a_bad_last_step_is_not_saved(data, tmp_path, monkeypatch, late_flags):
    poison_step(monkeypatch, 6)
    with pytest.raises(UserError, match="step 6: the loss is not finite"):
        train(runs.config(data, tmp_path, log_every=100))
    saved = run_folder.list_checkpoints(tmp_path / "000-BiFlowNet")
    assert [run_folder.step_of(path) for path in saved] == [2, 4]


def test_late_flags_train_the_same(data, tmp_path, monkeypatch):
    at_once = train(runs.config(data, tmp_path / "a", max_steps=3, ckpt_every=3))
    monkeypatch.setattr(agreement, "StepFlags", LATE)
    late = train(runs.config(data, tmp_path / "b", max_steps=3, log_every=2, ckpt_every=3))
    assert_same_training(checkpoint(at_once["folder"], 3), checkpoint(late["folder"], 3))


def test_a_signal_stops_one_step_later(data, tmp_path, monkeypatch, late_flags):
    advance, stops = TrainingState.advance, []
    request = session.StopRequest
    monkeypatch.setattr(session, "StopRequest", lambda: stops.append(request()) or stops[0])

    def advance_and_ask(self, *arguments) -> None:
        advance(self, *arguments)
        if self.step == 2:
            stops[0].received = 15

    monkeypatch.setattr(TrainingState, "advance", advance_and_ask)
    result = train(runs.config(data, tmp_path, log_every=100, ckpt_every=100))
    assert (result["step"], result["stopped_by"]) == (4, 15)  # at once it would be 3
    assert [run_folder.step_of(path) for path in run_folder.list_checkpoints(result["folder"])] == [4]


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value is read, which makes a GPU wait."""

    READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(self.READS), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"enable_amp": True, "amp_dtype": "fp16", "grad_clip": 0.5}])
def test_steps_read_no_value(data, tmp_path, monkeypatch, late_flags, options):
    """From the second step's batch to the third's; StepFlags itself may read, as its copy is done by then."""
    monkeypatch.setitem(precision.PRECISIONS, "fp16", torch.bfloat16)
    monkeypatch.setattr(latent_process, "check_conditions", lambda *_: None)  # not on a GPU
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self, read=torch.Tensor.tolist: outside(lambda: read(self)))
    mode, steps = NoReading(), []

    def outside(function):
        with torch.utils._python_dispatch._disable_current_modes():
            return function()

    draw = gradients.sample_generators

    def draw_and_watch(seed, step, *arguments):
        if step == 2:
            mode.__enter__()
        if step == 4:
            mode.__exit__(None, None, None)
        steps.append(step)
        return draw(seed, step, *arguments)

    monkeypatch.setattr(gradients, "sample_generators", draw_and_watch)
    train(runs.config(data, tmp_path, log_every=100, ckpt_every=100, max_steps=4, label_dropout=0.5, **options))
    assert steps == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- beside training


def test_training_goes_on_while_a_checkpoint_and_a_preview_are_written(data, ae_ckpt, tmp_path, monkeypatch):
    """The preview of step 2 waits until step 3 is logged, and still shows the averaged weights of step 2."""
    third_step, seen = threading.Event(), {}
    write, write_preview = MetricsWriter.write, Previews.write

    def note(self, step: int, scalars: dict) -> None:
        write(self, step, scalars)
        if step == 3:
            third_step.set()

    def wait(self, step: int, turn: int, weights: dict):
        assert third_step.wait(60)
        path = write_preview(self, step, turn, weights)
        seen[step] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return path

    monkeypatch.setattr(MetricsWriter, "write", note)
    monkeypatch.setattr(Previews, "write", wait)
    options = {"preview": True, "AE_ckpt": str(ae_ckpt), "preview_steps": 1, "max_steps": 4, "lr": 1e-2}
    folder = train(runs.config(data, tmp_path, **options))["folder"]
    for step in (2, 4):
        saved = checkpoint(folder, step)["ema"]
        assert all(torch.equal(value, saved[name]) for name, value in seen[step].items())
    assert any(not torch.equal(value, seen[4][name]) for name, value in seen[2].items())
    assert len(list((folder / "samples").glob("*.nii.gz"))) == 2


def test_a_full_disk_ends_the_run_soon(data, tmp_path, monkeypatch):
    def fail(content, path) -> None:
        raise UserError(f"{path}: the checkpoint could not be written (No space left on device)")

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    advance = TrainingState.advance
    monkeypatch.setattr(TrainingState, "advance", lambda *args: time.sleep(0.2) or advance(*args))
    with pytest.raises(UserError, match="BiFlowNet_0000005.pt: the checkpoint could not be written"):
        train(runs.config(data, tmp_path, ckpt_every=5, max_steps=100))
    assert runs.logged_steps(tmp_path / "000-BiFlowNet")[-1] < 10  # not as late as the next checkpoint


def test_a_checkpoint_is_tried_though_the_one_before_failed(tmp_path, monkeypatch):
    """A signal's may find the disk with room again."""
    tried = []

    def fail_once(content, path) -> None:
        tried.append(path.name)
        if len(tried) == 1:
            raise UserError("disk full")

    monkeypatch.setattr(saving, "save_checkpoint", fail_once)
    monkeypatch.setattr(saving, "remove_older", lambda *_: None)

    def save_twice() -> None:
        with Saving(tmp_path, 1, None, logging.getLogger("test")) as saves:
            saves.save(5, {}, None)
            saves.save(8, {}, None)

    with pytest.raises(UserError, match="disk full"):
        save_twice()
    assert tried == ["BiFlowNet_0000005.pt", "BiFlowNet_0000008.pt"]


def test_a_full_disk_at_the_last_checkpoint_is_an_error_too(data, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_checkpoint", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        train(runs.config(data, tmp_path, max_steps=1))


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path):
    """Though the weights go on changing before it is written."""
    may_write, weight = threading.Event(), torch.ones(3)
    with Saving(tmp_path, 1, None, logging.getLogger("test")) as saves:
        saves.submit(may_write.wait, 10)
        wait, saves.wait = saves.wait, lambda: None  # the caller doesn't wait here
        saves.submit = lambda function, *args: saves._thread.submit(function, *args)
        saves.save(5, {"model": {"w": weight}}, None)
        weight.zero_()
        may_write.set()
        saves.wait = wait
    assert checkpoint(tmp_path, 5)["model"]["w"].tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------------------------------- options


def test_options_of_speed_change_nothing_but_rounding(data, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(BiFlowNet, "compile", lambda self, **options: compiled.append(options))
    speed = {"channels_last": True, "compile": True, "gradient_checkpointing": True}
    assert changes(BiFlowNetConfig, {}, speed) == []
    plain, fast = (train(runs.config(data, tmp_path / str(len(o)), max_steps=2, **o)) for o in ({}, speed))
    assert compiled == [{"dynamic": False}]
    expected, found = checkpoint(plain["folder"], 2)["model"], checkpoint(fast["folder"], 2)["model"]
    assert list(expected) == list(found)
    # Two steps of 1e-4 move weights by up to 2e-4; a few with gradients near zero may go the other way by rounding.
    moved = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
    assert (moved > 2e-5).double().mean() < 1e-3
    assert moved.max() < 5e-4


def test_training_without_a_compiler(data, tmp_path, monkeypatch):
    def refuse(*_, **__) -> None:
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler")

    monkeypatch.setattr(BiFlowNet, "compile", lambda self, dynamic: setattr(self, "_compiled_call_impl", refuse))
    message = r"compile: torch cannot compile on this machine \(no C\+\+ compiler\): leave --compile out"
    with pytest.raises(UserError, match=message):
        train(runs.config(data, tmp_path, compile=True))


@pytest.mark.slow  # compiles for a minute
def test_a_compiled_run_trains_as_a_plain_one(data, tmp_path):
    smaller = {"max_steps": 2, "dim_mults": [1], "use_attn": [0], "enable_amp": True, "amp_dtype": "bf16"}
    plain, compiled = (
        train(runs.config(data, tmp_path / str(on), compile=on, gradient_checkpointing=on, **smaller))
        for on in (False, True)
    )
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-2)
    assert list(checkpoint(plain["folder"], 2)["model"]) == list(checkpoint(compiled["folder"], 2)["model"])

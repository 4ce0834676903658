"""The parts of BiFlowNet training: run folders, random draws, order of the data, previews, logging."""

import contextlib
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import biflownet_runs as runs
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from user_errors import error_of

from AutoEncoder.checkpoint import load_autoencoder
from common.checkpoint_files import save_checkpoint
from common.errors import UserError
from common.files import lock_folder
from common.log import close_logger, get_logger
from common.processes import Distributed
from config.loading import save_config
from config.schema.diffusion import BiFlowNetConfig
from dataset.order.buckets import BucketOrder
from dataset.order.epochs import EpochSampler
from ddpm.diffusion import GaussianDiffusion
from ddpm.flow import RectifiedFlow
from train.diffusion import preview, run_folder
from train.diffusion.batches import GlobalBatchSampler
from train.diffusion.draws import _mix, draw_dropped, draw_noise, sample_generators
from train.diffusion.preview import Previews
from train.loop.metrics_file import MetricsWriter

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------ run folder


def make_config(results: Path, **values) -> dict:
    return {"results_dir": str(results), "run_name": None, "lr": 0.1, "num_workers": 1, **values}


def open_folder(config: dict) -> Path:
    with contextlib.ExitStack() as closing:
        return run_folder.open_run_folder(BiFlowNetConfig, config, closing)[0]


@pytest.mark.parametrize(
    ("change", "is_same_run"),
    [({}, True), ({"num_workers": 9}, True), ({"max_steps": 9}, True), ({"lr": 0.2}, False), ({"model_dim": 6}, False)],
)
def test_a_repeated_configuration_finds_its_folder(tmp_path, change, is_same_run):
    assert open_folder(make_config(tmp_path)).name == "000-BiFlowNet"
    second = open_folder(make_config(tmp_path, **change))
    assert second.name == ("000-BiFlowNet" if is_same_run else "001-BiFlowNet")


def test_a_run_that_just_goes_on_comes_before_one_that_would_be_extended(tmp_path):
    """Folders of before, when a longer run was another one."""
    for number, steps in enumerate((4, 6, 8)):
        save_config(OmegaConf.create(make_config(tmp_path, max_steps=steps)), tmp_path / f"{number:03d}-BiFlowNet")
    assert open_folder(make_config(tmp_path, max_steps=6)).name == "001-BiFlowNet"
    assert open_folder(make_config(tmp_path, max_steps=9)).name == "002-BiFlowNet"


def test_numbers_go_on_after_the_highest(tmp_path):
    (tmp_path / "007-Other").mkdir()
    (tmp_path / "notes").mkdir()
    assert open_folder(make_config(tmp_path)).name == "008-BiFlowNet"


def test_folder_of_a_run_killed_before_its_configuration_was_saved_is_left_alone(tmp_path):
    (tmp_path / "000-BiFlowNet").mkdir()
    (tmp_path / "000-BiFlowNet" / "config.yaml").write_text("lr: [")
    assert open_folder(make_config(tmp_path)).name == "001-BiFlowNet"


def test_results_folder_that_is_a_file(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="results: the run folder cannot be written"):
        open_folder(make_config(tmp_path / "results"))


def test_a_checkpoint_under_a_name_of_its_own_is_gone_on_from(tmp_path):
    """Which one is newest its content says; nothing beside it is damaged."""
    folder = tmp_path / "checkpoints"
    for name, step in (("BiFlowNet_0000003.pt", 3), ("copy.pt", 7)):
        save_checkpoint({"step": step}, folder / name)
    assert run_folder.find_checkpoint(tmp_path, None) == folder / "copy.pt"
    assert sorted(path.name for path in folder.iterdir()) == ["BiFlowNet_0000003.pt", "copy.pt"]


def test_locked_folder_is_refused_until_its_process_ends(tmp_path):
    """Held by another process, as a torchrun worker that outlived its launcher would."""
    code = "import sys, pathlib; from common.files import lock_folder as lock; "
    code += "held = lock(pathlib.Path(sys.argv[1]), 'training'); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=runs.ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another process \(process {holder.pid} on .*\) is training in this folder"):
        lock_folder(tmp_path, "training")
    holder.kill()
    holder.communicate()
    with lock_folder(tmp_path, "training"):
        pass


@pytest.mark.parametrize(
    ("name", "step"),
    [("BiFlowNet_0453500.pt", 453500), ("a/b2/BiFlowNet_0000000.pt", 0), ("v2_step10.pt", 10), ("best.pt", None)],
)
def test_step_in_a_file_name(name, step):
    assert run_folder.step_of(name) == step


def test_checkpoint_name_has_seven_digits(tmp_path):
    assert run_folder.checkpoint_path(tmp_path, 453500) == tmp_path / "checkpoints" / "BiFlowNet_0453500.pt"


# ----------------------------------------------------------------------------------------------- order and draws


@pytest.mark.parametrize("samples_seen", [0, 4, 8])
def test_two_ranks_see_the_global_batches_of_one(samples_seen):
    def batches(world_size: int, rank: int) -> tuple[list[list[int]], range]:
        sampler = GlobalBatchSampler(BucketOrder([range(11)], [4], seed=5), rank, world_size)
        sampler.start_at(epoch=3, samples_seen=samples_seen)
        return [[key.index for key in batch] for batch in sampler], range(rank, 4, world_size)

    whole, _ = batches(1, 0)
    order = EpochSampler(11, seed=5).order(3)  # the order that runs had before there were several sizes
    assert whole == [order[0:4], order[4:8]][samples_seen // 4 :]
    assert len(whole) == 2 - samples_seen // 4  # 11 samples make two batches of 4; three samples are left out
    for rank in range(2):
        share, positions = batches(2, rank)
        assert share == [[batch[position] for position in positions] for batch in whole]


def draw(seed, step, positions, shape, num_timesteps, dropout) -> SimpleNamespace:
    """As the loop draws."""
    generators = sample_generators(seed, step, positions, CPU)
    timesteps = GaussianDiffusion(1, num_timesteps).draw_timesteps(generators)
    is_dropped = draw_dropped(generators, dropout)
    return SimpleNamespace(timesteps=timesteps, is_dropped=is_dropped, noise=draw_noise(generators, shape))


def test_draws_depend_on_seed_step_and_position_only():
    whole = draw(3, 7, range(4), (2, 8, 8, 8), 1000, 0.5)
    part = draw(3, 7, [3, 1], (2, 8, 8, 8), 1000, 0.5)
    assert torch.equal(part.noise, whole.noise[[3, 1]])
    assert torch.equal(part.timesteps, whole.timesteps[[3, 1]])
    assert torch.equal(part.is_dropped, whole.is_dropped[[3, 1]])
    assert len({noise.sum().item() for noise in whole.noise}) == 4
    for other in ((4, 7), (3, 8), (-3, 7)):
        assert not torch.equal(draw(*other, range(4), (2, 8, 8, 8), 1000, 0.5).noise, whole.noise)


def test_draws_are_those_of_the_functions_of_torch():
    """Runs of before go on with the same values."""
    for shape in ((2, 8, 8, 8), (3,)):
        draws = draw(3, 7, [0, 5], shape, 1000, 0.5)
        for place, position in enumerate([0, 5]):
            generator = torch.Generator().manual_seed(_mix(3, 7, position))
            assert draws.timesteps[place] == torch.randint(1000, (), generator=generator)
            assert draws.is_dropped[place] == (torch.rand((), generator=generator) < 0.5)
            assert torch.equal(draws.noise[place], torch.randn(shape, generator=generator))


def test_draws_have_their_distributions():
    draws = draw(0, 1, range(2000), (8,), 10, 0.25)
    assert draws.noise.shape == (2000, 8)
    assert draws.noise.mean().item() == pytest.approx(0, abs=0.03)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.bincount(draws.timesteps, minlength=10).float().div(2000).sub(0.1).abs().max() < 0.03
    assert draws.is_dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert not draw(0, 1, range(100), (8,), 10, 0.0).is_dropped.any()


# --------------------------------------------------------------------------------------------------------- preview


class Denoiser(nn.Module):
    """Predicts no noise, and notes what it is given."""

    vq_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x, t, y, res):
        self.calls.append((y.tolist(), res.tolist()))
        return x * 0


@pytest.mark.parametrize("process", [GaussianDiffusion, RectifiedFlow])
@pytest.mark.parametrize(("time_limit_s", "num_calls"), [(60.0, 3), (-1.0, 1)])
def test_preview_is_bounded_and_leaves_the_global_generator(tmp_path, caplog, process, time_limit_s, num_calls):
    autoencoder = load_autoencoder(runs.save_autoencoder(tmp_path / "ae.ckpt"))
    model = Denoiser()
    before = torch.get_rng_state()
    grid, diffusion, logger = (8, 8, 16), process(4, 20), logging.getLogger("preview test")
    previews = Previews(
        tmp_path, [(0, grid), (1, grid)], 3, model, diffusion, autoencoder, CPU, logger, time_limit_s=time_limit_s
    )
    path = previews.write(12, 1, model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert previews.model.calls == [([1], [[0.25, 0.25, 0.5]])] * num_calls
    if time_limit_s > 0:
        assert path == tmp_path / "step_0000012_class_1.nii.gz"
        assert path.exists()
        assert path.with_name("step_0000012_class_1.png").exists()
    else:
        assert path is None
        assert list(tmp_path.glob("*.nii.gz")) == []
        assert "given up after -1 s; lower preview_steps" in caplog.text


def test_a_preview_without_memory_is_left_out(tmp_path, caplog, monkeypatch):
    """Where not even the smallest blocks fit into what training leaves."""
    autoencoder = load_autoencoder(runs.save_autoencoder(tmp_path / "ae.ckpt"))
    model, diffusion, logger = Denoiser(), GaussianDiffusion(4, 20), logging.getLogger("preview test")
    decode = preview.decode
    monkeypatch.setattr(preview, "decode", lambda *latent, max_bytes: decode(*latent, max_bytes=1000))
    previews = Previews(tmp_path, [(1, (8, 8, 8))], 3, model, diffusion, autoencoder, CPU, logger)
    assert previews.write(12, 0, model.state_dict()) is None
    assert "preview of step 12: not enough memory; say preview=false" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory; say preview=false"),
        (ValueError("very\nodd"), "failed, training goes on (ValueError: very odd); say preview=false"),
        (UserError("a.nii.gz: cannot be written (No space left)"), "a.nii.gz: cannot be written (No space left)"),
    ],
)
@pytest.mark.parametrize("where", ["_sample", "_decode", "write_volume", "load_state_dict"])
def test_whatever_fails_in_a_preview_is_said_in_a_line(tmp_path, caplog, monkeypatch, error, reason, where):
    def fail(*_) -> None:
        raise error

    model, diffusion, logger = Denoiser(), GaussianDiffusion(4, 20), logging.getLogger("preview test")
    previews = Previews(tmp_path / "samples", [(1, (8, 8, 8))], 3, model, diffusion, None, CPU, logger)
    monkeypatch.setattr(previews, "_decode", lambda latent: torch.zeros(1, 8, 8, 8))
    place = preview if where == "write_volume" else previews.model if where == "load_state_dict" else previews
    monkeypatch.setattr(place, where, fail)
    assert previews.write(12, 0, model.state_dict()) is None
    assert [record.getMessage() for record in caplog.records] == [f"preview of step 12: {reason}"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_preview_does_not_make_a_deleted_run_folder_again(tmp_path, monkeypatch, fails):
    model, diffusion = Denoiser(), GaussianDiffusion(4, 20)
    run = tmp_path / "run"
    previews = Previews(run / "samples", [(1, (8, 8, 8))], 3, model, diffusion, None, CPU, logging.getLogger())
    monkeypatch.setattr(previews, "_decode", lambda latent: 1 / 0 if fails else torch.zeros(1, 8, 8, 8))
    with pytest.raises(UserError, match=f"^{run}: the run folder was deleted during training, which ends here"):
        previews.write(12, 0, model.state_dict())
    assert not run.exists()


def test_a_preview_is_given_up_when_training_stops(tmp_path, caplog):
    """Within one step of sampling: schedulers grant little time after their signal."""
    model, diffusion, logger = Denoiser(), GaussianDiffusion(4, 20), logging.getLogger("preview test")
    arguments = (tmp_path, [(1, (8, 8, 8))], 3, model, diffusion, None, CPU, logger)
    previews = Previews(*arguments, is_stopping=lambda: True)
    assert previews.write(12, 0, model.state_dict()) is None
    assert len(previews.model.calls) == 1
    assert "preview of step 12: given up, as training is to stop" in caplog.text


# -------------------------------------------------------------------------------------------- logging and processes


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writer = MetricsWriter(tmp_path, {"logger": "tensorboard"}, start_step=2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1}',
        '{"step": 2}',
        '{"step": 3, "loss": 0.5}',
    ]


@pytest.mark.parametrize("damage", [b'{"step": 1\n{"step": 2}\n', b"\xff\n{}\n", b"[1]\n", b'{"a": 1}\n'])
def test_damaged_metrics_are_refused(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(damage)
    assert "metrics.jsonl: not the numbers of a run" in error_of(MetricsWriter, tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == damage


def test_only_rank_0_writes_information(tmp_path, capfd):
    for rank in (0, 1):
        logger = get_logger(rank, tmp_path / "log.txt")
        logger.info("hello from %d", rank)
        logger.warning("careful, %d", rank)
    close_logger()
    shown = capfd.readouterr().err
    text = (tmp_path / "log.txt").read_text()
    assert "hello from 0" in shown
    assert "hello from 0" in text
    assert "hello from 1" not in shown
    assert "] rank 1: warning: careful, 1" in shown
    assert "careful, 1" not in text


def test_on_main_passes_a_users_mistake_on():
    alone = Distributed(0, 0, 1, CPU)
    assert alone.on_main(lambda: 5) == 5

    def fail() -> None:
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        alone.on_main(fail)

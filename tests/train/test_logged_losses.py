"""What the autoencoder's training logs: means of losses since the last line, PSNR of validation."""

import json

import pytest
import pytorch_lightning as pl
from autoencoder_runs import config, make_data, with_callback

from AutoEncoder.model.adversarial_training import AdversarialTraining
from AutoEncoder.model.PatchVolume import patchvolumeAE
from evaluation.metrics.reconstruction import psnr
from train.autoencoder import training


class Validations(pl.Callback):
    """PSNR of whole volumes, measured by itself: the mean of each validation."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_validation_start(self, trainer, pl_module) -> None:
        self.found: list[float] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.found += [psnr(x, y.clamp(-1, 1)) for x, y in zip(batch["data"], pl_module(batch["data"])[0], strict=True)]

    def on_validation_end(self, trainer, pl_module) -> None:
        self.means.append(sum(self.found) / len(self.found))


def test_losses_in_the_log_are_means_since_the_last_line(tmp_path, monkeypatch, capsys):
    """Of nine steps with three a line the third, fifth, … are the generator's, from the third on."""
    logged, witness = [], Validations()
    log = AdversarialTraining._log

    def spy(self, prefix, batch_size=None, **values):
        if prefix == "train":
            logged.append((self.global_step + 1, {name: value.item() for name, value in values.items()}))
        log(self, prefix, batch_size, **values)

    monkeypatch.setattr(AdversarialTraining, "_log", spy)
    forward = patchvolumeAE.forward  # of whole volumes; what lies beyond [-1, 1] counts as its limits
    monkeypatch.setattr(patchvolumeAE, "forward", lambda self, x: (5 * forward(self, x)[0] + 1, forward(self, x)[1]))
    build = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: with_callback(build(*args), witness))
    cfg = config(make_data(tmp_path / "data"), tmp_path / "run", "model.max_steps=9", "model.log_every=3")
    training.train(cfg, stage=1)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if "train/lr" in line}
    assert list(trained) == [3, 6, 9]
    for last, line in trained.items():
        steps = [values for step, values in logged if last - 3 < step <= last]
        for name in {name for values in steps for name in values}:
            of_steps = [values[name] for values in steps if name in values]
            assert line[f"train/{name}"] == pytest.approx(sum(of_steps) / len(of_steps), rel=1e-5), name
        assert line["train/recon_loss"] == pytest.approx(cfg.model.l1_weight * line["train/l1"], rel=1e-5)
    assert "train/discloss" not in trained[3]
    of_generator = [values["l1"] for step, values in logged if 6 < step <= 9 and "l1" in values]
    assert len(of_generator) == 2
    assert abs(of_generator[0] - of_generator[1]) > 1e-4  # or a mean could not be told from one of them

    found = [line["val/psnr"] for line in lines if "val/psnr" in line]
    assert found == pytest.approx(witness.means, rel=1e-5)
    assert "losses in the log have their weights: recon_loss = 4 x l1, " in capsys.readouterr().err

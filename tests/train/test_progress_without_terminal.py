"""What Slurm's or nohup's file holds of work that lasts."""

import re

import autoencoder_runs
import biflownet_runs
import latent_runs
import pytest

from common import progress
from train.autoencoder.training import train as train_autoencoder
from train.latents.encoding import generate_latents
from train.train_BiFlowNet_SingleRes import train as train_biflownet


@pytest.mark.parametrize(("line_every_s", "expected"), [(30.0, [2, 4]), (0.0, [1, 2, 3, 4])])
def test_stage_1_tells_logged_steps_and_one_each_half_minute(
    volumes, tmp_path, monkeypatch, capfd, line_every_s, expected
):
    monkeypatch.setattr(progress, "LINE_EVERY_S", line_every_s)
    options = ["model.max_steps=4", "model.log_every=2", "model.val_every=2"]
    train_autoencoder(autoencoder_runs.config(volumes, tmp_path, *options), stage=1)
    text = capfd.readouterr().err
    steps = re.findall(r"\] stage 1: (\d+) of 4 steps, train/recon_loss \d.*? steps?(?:/s)?, \d\d:\d\d left\n", text)
    assert list(map(int, steps)) == expected
    assert ("validation: 1 of 1 volumes" in text) == (line_every_s == 0)
    assert re.search(r"stage 1: 4 of 4 steps, .*val/recon_loss", text)
    assert "\r" not in text


def test_biflownet_tells_the_time_left_and_of_slow_steps_between_logged_ones(latents, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    train_biflownet(biflownet_runs.config(latents, tmp_path, max_steps=4, log_every=2))
    text = capfd.readouterr().err
    assert re.findall(r"step 000000(\d) epoch \d loss \d.* memory_gb [\d.]+, \d\d:\d\d left\n", text) == ["2", "4"]
    between = r"\] training: (\d) of 4 steps, loss \d\.\d+, [\d.]+ (?:steps/s|s a step), \d\d:\d\d left\n"
    assert re.findall(between, text) == ["1", "3"]
    log = (tmp_path / "000-BiFlowNet" / "log.txt").read_text()
    assert "step 0000004" in log
    assert "training: " not in log
    assert "\r" not in text


def test_encoding_says_how_far_it_is(tmp_path, monkeypatch, capfd):
    data, autoencoder = latent_runs.make_dataset(tmp_path), latent_runs.save_autoencoder(tmp_path / "ae.ckpt")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    generate_latents(latent_runs.config(data, autoencoder))
    text = capfd.readouterr().err
    found = re.findall(r"\] encoding: (\d) of 5 volumes, (\S+)", text)
    assert [int(done) for done, _ in found][-1] == 5
    assert len(found) == 5  # four batches, and the line that says it is done
    assert found[-1][1] == "in"
    assert "\r" not in text

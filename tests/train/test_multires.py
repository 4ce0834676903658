"""Training at several resolutions, held-out losses, accumulation and attributes, through the real scripts."""

import json
import re
from pathlib import Path

import biflownet_runs as runs
import pytest
import torch
from biflownet_runs import assert_same_training, checkpoint, crash_at
from generation_models import row
from omegaconf import OmegaConf
from user_errors import error_of

from common.checkpoint_files import load_checkpoint
from config.cli import parse_command_line
from config.loading import load_config
from config.schema.diffusion import BiFlowNetMultiresConfig, GenerationConfig
from dataset.Multires_dataset import Multires_dataset
from dataset.order.draw_split import keep_or_draw
from dataset.volumes.geometry import centred_affine
from dataset.volumes.volume_io import write_latent, write_volume
from evaluation.generation.run import generate
from train.train_BiFlowNet_MultiRes import train
from train.train_BiFlowNet_SingleRes import train as train_single

CUBE, FLAT = (8, 8, 8), (8, 8, 16)
FLAGS = [flag for index, flag in enumerate(runs.FLAGS) if not 0 <= index - runs.FLAGS.index("--resolution") <= 3]
FLAGS = [flag for index, flag in enumerate(FLAGS) if not 0 <= index - FLAGS.index("--batch-size") <= 1]
SMALL_BUCKETS = [{"grid": list(CUBE), "batch_size": 2}, {"grid": list(FLAT), "batch_size": 1}]
ATTRIBUTES = [
    {"name": "spacing_x", "range": [0.5, 2.0]},
    {"name": "sex", "categories": ["F", "M"], "source": "TABLE"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Class 0 in two sizes (6 and 4 latents), class 1 in one (6), with the volumes that they could be of."""
    root = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    folders = {"0": [("chest/8x8x8", CUBE, 6), ("chest/8x16x8", FLAT, 4)], "1": [("head", CUBE, 6)]}
    table = ["subject,sex"]
    for of_class in folders.values():
        for folder, grid, count in of_class:
            for index in range(count):
                latent = torch.rand((4, *grid), generator=generator) * 2 - 1
                write_latent(root / f"{folder}_latents" / f"{index}.nii.gz", latent)
                affine = centred_affine((0.5 + index / 4, 1.0, 1.0), (8, 8, 8))
                write_volume(root / folder / f"{index}.nii.gz", torch.zeros(1, 8, 8, 8), affine)
    for name in ("chest", "head"):
        table += [f"{name}/{index},{'FM'[index % 2]}" for index in range(6)]
    (root / "table.csv").write_text("\n".join(table[:-1]) + "\n")  # of one subject nothing is known
    path = root / "latents.json"
    names = {label: [f"{folder}_latents" for folder, *_ in of_class] for label, of_class in folders.items()}
    path.write_text(json.dumps(names))
    return path


def config(data: Path, results: Path, **values):
    command = ["--data-path", str(data), "--results-dir", str(results), *FLAGS, *runs.OVERRIDES]
    cfg = parse_command_line(command, BiFlowNetMultiresConfig, "BiFlowNet_multires_8x.yaml", "")
    cfg.buckets = [{"grid": list(CUBE), "batch_size": 4}, {"grid": list(FLAT), "batch_size": 2}]
    for name, value in values.items():
        cfg[name] = value
    return cfg


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- several sizes


def test_buckets_are_all_latents_of_a_size(data):
    dataset = Multires_dataset(data)
    assert {grid: len(indices) for grid, indices in dataset.buckets.items()} == {CUBE: 12, FLAT: 4}
    latent, label, resolution = dataset[dataset.buckets[FLAT][0]]
    assert (tuple(latent.shape), label.item(), resolution.tolist()) == ((4, *FLAT), 0, [1 / 8, 1 / 8, 1 / 4])


@pytest.mark.parametrize("order", ["turns", "proportional"])
def test_an_interrupted_epoch_goes_on_exactly(data, tmp_path, monkeypatch, order):
    options = {"bucket_order": order, "bucket_temperature": 2.0, "label_dropout": 0.5, "class_weights": [1.0, 2.0]}
    straight = train(config(data, tmp_path / "straight", **options))["folder"]
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config(data, tmp_path / "cut", ckpt_every=1, **options))
    cut = train(config(data, tmp_path / "cut", ckpt_every=1, **options))["folder"]
    assert_same_training(checkpoint(straight, 6), checkpoint(cut, 6))
    assert checkpoint(straight, 6)["global_batch"] == {"8x8x8": 4, "8x8x16": 2}
    named = {name for line in lines_of(straight) for name in line}
    assert {"loss/8x8x8", "loss/8x8x16", "loss/class_0", "loss/class_1"} <= named


def test_speed_and_waiting_are_told_by_size(data, tmp_path):
    run = train(config(data, tmp_path, log_every=4, max_steps=4))["folder"]
    line = lines_of(run)[-1]
    steps = [line[f"steps_per_s/{size}"] for size in ("8x8x8", "8x8x16")]
    assert 2 / steps[0] + 2 / steps[1] == pytest.approx(4 / line["steps_per_s"], rel=0.2)
    assert all(0 <= line[f"data_wait/{size}"] < 1 for size in ("8x8x8", "8x8x16"))


def test_two_processes_train_as_one(data, tmp_path):
    alone = train(config(data, tmp_path / "one"))["folder"]
    script = runs.SCRIPT.with_name("train_BiFlowNet_MultiRes.py")
    buckets = f"buckets=[{{grid:{list(CUBE)},batch_size:2}},{{grid:{list(FLAT)},batch_size:1}}]".replace(" ", "")
    command = ["--data-path", str(data), "--results-dir", str(tmp_path / "two"), *FLAGS, *runs.OVERRIDES, buckets]
    command = [str(script) if word == str(runs.SCRIPT) else word for word in runs.torchrun(command)]
    process = runs.start(command)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    pair = checkpoint(tmp_path / "two" / "000-BiFlowNet", 6)
    for name, value in checkpoint(alone, 6)["model"].items():
        difference = (pair["model"][name] - value).abs().flatten().float()
        # Not the largest one: where a gradient is all but zero, rounding decides its sign, and Adam takes a whole step.
        assert difference.quantile(0.99) < 1e-5, name


def test_one_size_trains_as_the_script_for_one_resolution(tmp_path):
    data = runs.make_latents(tmp_path / "latents")
    single = train_single(runs.config(data, tmp_path / "single"))["folder"]
    several = train(config(data, tmp_path / "several", buckets=[{"grid": list(runs.GRID), "batch_size": 2}]))["folder"]
    assert_same_training(checkpoint(single, 6), checkpoint(several, 6))


def test_a_run_at_one_resolution_is_not_gone_on_with_at_several(tmp_path):
    data, buckets = runs.make_latents(tmp_path / "latents"), [{"grid": list(runs.GRID), "batch_size": 2}]
    named = train_single(runs.config(data, tmp_path / "results", max_steps=1, batch_size=2))["folder"]
    message = error_of(train, config(data, tmp_path / "results", buckets=buckets, run_name=named.name, max_steps=2))
    assert f"{named} holds another run: resolution: [8, 8, 8] -> several" in message
    assert train(config(data, tmp_path / "results", buckets=buckets, max_steps=1))["folder"] != named


@pytest.mark.parametrize(("batch_size", "of_cube"), [(64, 4096), (1, 64)])
def test_batch_sizes_follow_from_one_by_voxels(data, tmp_path, batch_size, of_cube):
    message = error_of(train, config(data, tmp_path, buckets=[], batch_size=batch_size))
    assert f"with batch_size {of_cube} take {of_cube} latents of size 8x8x8 a step" in message
    assert "use fewer processes or a lower batch_size of them in buckets" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "4"], r"batch_size 4 and buckets exclude each other: .* or say buckets=\[\]"),
        (["bucket_temperature=2"], "bucket_temperature must be 1 with bucket_order turns, got 2"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    found = error_of(parse_command_line, options, BiFlowNetMultiresConfig, "BiFlowNet_multires_8x.yaml", "")
    assert re.search(message, found), found


def test_a_batch_size_is_needed(data, tmp_path):
    assert "batch_size: none is given, nor buckets" in error_of(train, config(data, tmp_path, buckets=[]))


def test_a_size_without_a_row_is_named(data, tmp_path):
    message = error_of(train, config(data, tmp_path, buckets=[{"grid": list(CUBE), "batch_size": 2}]))
    assert "8x16x8_latents/0.nii.gz: a latent of size 8x8x16, for which buckets has no row; it has 8x8x8" in message
    assert not (tmp_path / "000-BiFlowNet").exists()


# ---------------------------------------------------------------------------------------------------- accumulation


def test_passes_give_the_same_step(data, tmp_path):
    whole = train(config(data, tmp_path / "whole", max_steps=2))["folder"]
    parts = train(config(data, tmp_path / "parts", max_steps=2, accumulate=3))["folder"]
    found, expected = (checkpoint(run, 2)["model"] for run in (parts, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


# --------------------------------------------------------------------------------------------------- held-out loss


@pytest.fixture(scope="module")
def split_data(data, tmp_path_factory) -> Path:
    keep_or_draw(data, {"validation": 0.3, "held_out": 0.0})
    return data


@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_the_checkpoint_with_the_least_held_out_loss_is_kept(split_data, tmp_path, process):
    options = {
        "buckets": SMALL_BUCKETS,
        "process": process,
        "ema_start": 0,
        "ema_every": 1,
        "ema_decay": 0.1,
        "lr": 0.003,
    }
    run = train(config(split_data, tmp_path, max_steps=5, val_every=2, **options))["folder"]
    measured = {line["step"]: line for line in lines_of(run) if "val_loss" in line}
    assert sorted(measured) == [2, 4, 5]
    best = min(measured, key=lambda step: measured[step]["val_loss"])
    assert [path.name for path in (run / "best").iterdir()] == [f"BiFlowNet_{best:07d}.pt"]
    kept = load_checkpoint(run / "best" / f"BiFlowNet_{best:07d}.pt")
    assert (kept["step"], kept["best_loss"]) == (best, pytest.approx(measured[best]["val_loss"], rel=1e-6))
    ranges = [value for name, value in measured[2].items() if "/t_" in name]
    assert len(ranges) == 4
    assert sum(ranges) / 4 == pytest.approx(measured[2]["val_loss"], rel=1e-6)


def test_the_held_out_loss_and_what_is_best_are_the_same_after_a_resume(split_data, tmp_path, monkeypatch):
    options = {"buckets": SMALL_BUCKETS, "val_every": 2}
    straight = train(config(split_data, tmp_path / "straight", **options))["folder"]
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config(split_data, tmp_path / "cut", ckpt_every=1, **options))
    cut = train(config(split_data, tmp_path / "cut", ckpt_every=1, **options))["folder"]
    found = [lines_of(run)[-1]["val_loss"] for run in (straight, cut)]
    assert found[0] == found[1]
    assert [path.name for path in (straight / "best").iterdir()] == [path.name for path in (cut / "best").iterdir()]


# ------------------------------------------------------------------------------------------------------ attributes


def with_attributes(data: Path, results: Path, rows: list[dict] | None = None, **values):
    rows = ATTRIBUTES if rows is None else rows
    rows = [{**row, "source": str(data.parent / "table.csv")} if row.get("source") == "TABLE" else row for row in rows]
    values = {"split": str(data.parent / "split.json"), **values}
    plain = OmegaConf.to_container(config(data, results, buckets=SMALL_BUCKETS, **values))
    return load_config(
        BiFlowNetMultiresConfig, None,
        values={**plain, "attributes": rows},
    )  # fmt: skip


@pytest.fixture(scope="module")
def conditioned_run(split_data, tmp_path_factory) -> Path:
    """Trained on attributes, with a learning rate that lets them have an effect at once."""
    results = tmp_path_factory.mktemp("conditioned")
    return train(with_attributes(split_data, results, lr=0.01, label_dropout=0.3, ema_start=100))["folder"]


def generation(run: Path, output: Path, **values):
    ae = run.parent / "ae.ckpt"
    if not ae.exists():
        runs.save_autoencoder(ae)
    keys = "volume_channels model_dim dim_mults use_attn patch_size num_classes resnet_groups dit_num_heads attn_heads"
    trained = checkpoint(run, 6)["args"]
    model = {name: getattr(trained, name) for name in keys.split()}
    values = {"AE_ckpt": str(ae), "model_ckpt": str(run / "checkpoints" / "BiFlowNet_0000006.pt"), **model, **values}
    values |= {
        "sampling_strategy": "ddim",
        "ddim_steps": 2,
        "downsample": 4,
        "device": "cpu",
        "output_dir": str(output),
    }
    return load_config(GenerationConfig, None, values={"classes": [row(0, "Chest", list(CUBE))], **values})


def test_generation_follows_attributes_and_the_volumes_own(conditioned_run, tmp_path):
    requests = tmp_path / "list.yaml"
    requests.write_text(
        "- {class: Chest, attributes: {sex: F}}\n- {class: Chest, attributes: {sex: M}}\n"
        "- {class: Chest, attributes: sex=F, spacing: 2 1 1, seed: 1}\n- {class: Chest, attributes: sex=F, seed: 1, "
        "spacing: 1 1 1, resolution: 32 32 64}\n"
    )
    paths = generate(generation(conditioned_run, tmp_path / "out", requests=str(requests), guidance_scale=2.0))
    assert [path.name for path in paths[:2]] == ["Chest_32x32x32_sex=F.nii.gz", "Chest_32x32x32_sex=M.nii.gz"]
    record = json.loads(paths[1].with_name("Chest_32x32x32_sex=M.json").read_text())
    assert record["attributes"] == [["sex", "M"]]
    assert paths[0].read_bytes() != paths[1].read_bytes()  # of the same noise
    other = generate(generation(conditioned_run, tmp_path / "wide", spacing=[2.0, 1.0, 1.0], attributes=["sex=F"]))
    unit = generate(generation(conditioned_run, tmp_path / "unit", attributes=["sex=F"]))
    assert other[0].read_bytes() != unit[0].read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attributes": ["age=3"]}, "attribute age: .* has sex, spacing_x: leave it out"),
        ({"attributes": ["sex=X"]}, r"attribute sex: 'X', the model knows F \| M"),
        ({"attributes": ["sex"]}, "attributes are given as age=63 sex=F, got 'sex'"),
        ({"attributes": ["sex=F", "sex=M"]}, "attribute sex is given twice, as 'F' and 'M'"),
        ({"attributes": ["spacing_x=many"]}, "attribute spacing_x: 'many' is no number"),
        ({"spacing": [3.0, 1.0, 1.0]}, r"spacing_x: 3 \(of Chest\) lies outside 0.5 to 2, .*add --extrapolate"),
    ],
)
def test_attributes_that_the_model_does_not_know_are_refused(conditioned_run, tmp_path, values, message):
    found = error_of(generate, generation(conditioned_run, tmp_path / "out", **values))
    assert re.search(message, found), found
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_scalar_outside_its_range_needs_a_word(conditioned_run, tmp_path):
    assert generate(generation(conditioned_run, tmp_path, spacing=[3.0, 1.0, 1.0], extrapolate=True))[0].exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"name": "age", "range": [0, 1], "source": "TABLE"}],
            "has no column age for attribute age: there are sex",
        ),
        ([{"name": "age", "range": [0, 1]}], "age: volumes have spacing_x, .*, not age: give a column"),
        ([{"name": "spacing_x", "range": [0.5, 1]}], r"is '1.25' in volume: expected 0.5 to 1: correct it, or widen"),
        (
            [{**ATTRIBUTES[1], "categories": ["F", "X"]}],
            r"is 'M' in .*table.csv: expected F \| X: correct it, or add it",
        ),
        ([{**ATTRIBUTES[1], "categories": ["F", "M", "X"]}], "no latent is X, so it could not be learned"),
        ([{"name": "spacing_x", "range": [0, 9], "source": "gone.csv"}], "gone.csv: cannot be read as a table"),
    ],
)
def test_attributes_that_do_not_fit_the_data_end_before_work(split_data, tmp_path, rows, message):
    found = error_of(train, with_attributes(split_data, tmp_path, rows))
    assert re.search(message, found), found
    assert not (tmp_path / "000-BiFlowNet").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,sex\nchest/0,F\n", r"sex: \d+ of 11 latents have none in .*incomplete.csv, e.g. .*: complete it"),
        ("subject,sex\na,F\na,M\n", "subject a is there twice"),
        ("name,sex\na,F\n", "has no column file or subject that each row fills"),
        ("[1]\n", "no CSV with a header or JSON lines|has no column"),
    ],
)
def test_tables_that_tell_too_little_are_refused(split_data, tmp_path, text, message):
    table = tmp_path / "incomplete.csv"
    table.write_text(text)
    rows = [{**ATTRIBUTES[1], "source": str(table)}]
    found = error_of(train, with_attributes(split_data, tmp_path / "results", rows))
    assert re.search(message, found), found


def test_a_run_without_attributes_is_a_beginning_for_one_with_them(split_data, conditioned_run, tmp_path):
    plain = train(with_attributes(split_data, tmp_path, [], max_steps=2))["folder"]
    start = str(plain / "checkpoints" / "BiFlowNet_0000002.pt")
    run = train(with_attributes(split_data, tmp_path, max_steps=3, ckpt=start))["folder"]
    assert run != plain
    assert "knows no spacing_x, sex: the model's own part for it stays as initialised" in (run / "log.txt").read_text()
    assert checkpoint(run, 3)["step"] == 3

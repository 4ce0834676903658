"""Every step that takes `--shard I/N`: its shards and a last call without one leave what one call alone leaves."""

from pathlib import Path

import evaluation_sets
import generation_models
import latent_runs
import preprocessing_runs
import pytest
import reconstruction_runs

from common.errors import UserError
from dataset.preparation.manifest import read_manifest
from evaluation.autoencoding.reconstruction import evaluate
from evaluation.generation.run import generate
from train.latents.encoding import generate_latents

SHARDED = ("1/3", "2/3", "3/3")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the dataset JSONs' lock, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}


def test_preprocessing(tmp_path):
    raw = preprocessing_runs.make_raw(tmp_path / "raw")
    preprocessing_runs.add_nifti(raw / "p4" / "flat.nii.gz", preprocessing_runs.ct(3) * 0)  # no image: it fails
    options = [*preprocessing_runs.CT, "--subject-pattern", "^[^/]+", "--held-out", 0.3]
    whole = preprocessing_runs.run(raw, *options)
    statuses = [preprocessing_runs.run(raw, *options, "--shard", shard, output="shared") for shard in SHARDED]
    assert max(statuses) == whole
    folder = tmp_path / "shared" / "Thorax" / "native"
    made = times(folder)
    assert len(made) == 3
    assert read_manifest(folder) == {}  # until the last call, which makes no volume again
    assert preprocessing_runs.run(raw, *options, output="shared") == whole
    assert times(folder) == made
    assert contents(tmp_path / "shared") == contents(tmp_path / "data")


def test_encoding(tmp_path):
    ckpt = latent_runs.save_autoencoder(tmp_path / "ae.ckpt")
    alone, shared = (latent_runs.make_dataset(tmp_path / name) for name in ("alone", "shared"))
    generate_latents(latent_runs.config(alone, ckpt))
    made = [generate_latents(latent_runs.config(shared, ckpt, shard=shard)) for shard in SHARDED]
    assert [len(latents) for latents in made] == [3, 1, 1]  # whole batches of one shape
    before = times(shared.parent)
    (made[1][0].parent / ".old.nii.gz.7.tmp").touch()  # of a killed shard
    generate_latents(latent_runs.config(shared, ckpt))
    assert times(shared.parent) == before
    assert contents(shared.parent) == contents(alone.parent)


def test_generation(tmp_path):
    models = generation_models.save_models(tmp_path)
    options = {"num_samples": 2, "seeds": "0,1"}
    alone = generate(generation_models.config(models, tmp_path / "alone", **options))
    parts = [generate(generation_models.config(models, tmp_path / "shared", shard=s, **options)) for s in SHARDED]
    assert sorted(path.name for part in parts for path in part) == sorted(path.name for path in alone)
    assert not list((tmp_path / "shared").rglob("*.png"))
    before = times(tmp_path / "shared")
    shared = generate(generation_models.config(models, tmp_path / "shared", **options))
    assert times(tmp_path / "shared") == before
    assert [path.read_bytes() for path in shared] == [path.read_bytes() for path in alone]
    assert len(list((tmp_path / "shared").rglob("contact_sheet.png"))) == 2
    for seed in ("seed_0", "seed_1"):
        configs = [(tmp_path / name / seed / "config.yaml").read_text() for name in ("shared", "alone")]
        assert configs[0].replace("/shared", "/alone") == configs[1]


def test_metrics(tmp_path, monkeypatch):
    evaluation_sets.write_three(tmp_path)
    words = ["--training", str(tmp_path / "training")]
    alone = evaluation_sets.run_metrics(tmp_path, *words)["figures"]
    (tmp_path / "out").rename(tmp_path / "alone")
    for shard in SHARDED:
        with pytest.raises(UserError, match="generation.json: no such file"):
            evaluation_sets.run_metrics(tmp_path, *words, "--shard", shard)
    sizes = evaluation_sets.counted(monkeypatch)
    assert evaluation_sets.run_metrics(tmp_path, *words)["figures"] == alone
    assert sizes == []  # nothing was computed again


def test_reconstruction(tmp_path):
    data = reconstruction_runs.save_data(tmp_path / "data")
    (checkpoint, _) = reconstruction_runs.save_stages(tmp_path)
    counts = []
    for shard in SHARDED:
        assert evaluate(reconstruction_runs.config(data, [checkpoint], tmp_path / "out", shard=shard)) is None
        counts.append(len(list((tmp_path / "out" / "cache").glob("reconstruction-*/*/*.arrays"))))
    assert counts == [2, 4, 5]  # of three chests and two heads
    assert not list((tmp_path / "out").glob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cache").rglob("*.arrays")}
    evaluate(reconstruction_runs.config(data, [checkpoint], tmp_path / "out"))
    evaluate(reconstruction_runs.config(data, [checkpoint], tmp_path / "alone"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(kept) == len(list((tmp_path / "out" / "cache").rglob("*.arrays")))
    assert reconstruction_runs.table(tmp_path / "out") == reconstruction_runs.table(tmp_path / "alone")

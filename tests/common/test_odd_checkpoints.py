"""Checkpoints from strangers: what takes more memory than the file has, what is no weight, what describes monsters."""

import argparse
import re
import time
import zipfile

import pytest
import torch
from checkpoint_makers import autoencoder_config, biflownet_config, biflownet_file, generation_config, lightning_file
from omegaconf import OmegaConf

from AutoEncoder.checkpoint import load_autoencoder
from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_contents import count_in
from common.checkpoint_files import load_checkpoint, newest_checkpoint
from common.errors import UserError
from ddpm.checkpoint import build_biflownet, load_biflownet
from ddpm.process import build_process, take_process
from train.autoencoder.training import build_autoencoder
from train.loop.rng import random_state, restore_random_state


@pytest.fixture(scope="module")
def autoencoder():
    model = build_autoencoder(autoencoder_config())
    model.codebook.N.fill_(2.0)
    return model


@pytest.fixture(scope="module")
def biflownet():
    return build_biflownet(biflownet_config())


def rewritten(path, change=lambda name, content: content, compression=zipfile.ZIP_STORED, twice=False):
    """A file of `torch.save` whose entries are written anew."""
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        if twice:  # a second entry that says it is where the first is
            archive.filelist += [entry for entry in archive.filelist if entry.filename.endswith("data/0")]


def larger(name, content):
    """The number of values, as the pickle says it."""
    number = b"J" + (100_000).to_bytes(4, "little")
    assert not name.endswith("data.pkl") or number in content
    return content.replace(number, b"J" + (2**31 - 1).to_bytes(4, "little")) if name.endswith("data.pkl") else content


def legacy(path):
    torch.save({"a": torch.zeros(100_000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(larger("data.pkl", path.read_bytes()))


def many_lists() -> list:
    found: list = []
    for _ in range(60):
        found = [found, found]
    return found


SECRET = {"model": {"downsample": [4, 4, 4], "x": "${oc.env:HOME}"}, "dataset": {}}
FILES = {
    "compressed": (lambda p: rewritten(p, compression=zipfile.ZIP_DEFLATED), "refused: its entry .* is compressed"),
    "one place twice": (lambda p: rewritten(p, twice=True), "refused: its entries say they are larger than the"),
    "more values than stored": (lambda p: rewritten(p, larger), "damaged checkpoint .its parts do not fit"),
    "the same of old": (legacy, "an old or bare pickle that ends too early or is damaged"),
    "sparse": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a is a tensor, sparse"),
    "meta": (lambda p: torch.save({"a": [torch.empty(10**12, device="meta")]}, p), "a.0 is a tensor, without values"),
    "quantised": (
        lambda p: torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, p),
        "a is a tensor, quantised",
    ),
    "one value for all": (lambda p: torch.save({"a": torch.zeros(1).expand(10**12)}, p), "a is a tensor, of size .10"),
    "entries without names": (lambda p: torch.save({1: 2}, p), "an entry is named 1, expected text"),
    "interpolation": (
        lambda p: torch.save({"hyper_parameters": OmegaConf.create(SECRET)}, p),
        r"hyper_parameters.model.x is '\$\{oc.env:HOME\}': interpolations in checkpoints are not resolved",
    ),
    "interpolation in args": (
        lambda p: torch.save({"args": argparse.Namespace(ckpt=["${oc.env:HOME}"])}, p),
        "args.ckpt.0 is .*interpolations",
    ),
    "tensor in args": (lambda p: torch.save({"args": argparse.Namespace(x=torch.ones(2))}, p), "args.x is a tensor"),
    "folder": (lambda p: p.mkdir(), "no such checkpoint file, it is a folder"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("case", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_files_that_no_checkpoint_is(tmp_path, case, mmap):
    make, message = FILES[case]
    make(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"^\S*x\.ckpt: .*{message}") as caught:
        load_checkpoint(tmp_path / "x.ckpt", mmap=mmap)
    assert "\n" not in str(caught.value)
    assert "truncated" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_odd_and_does_no_harm(tmp_path):
    """Lists of the same lists would take for ever to walk; a configuration is the same one wherever it is named."""
    shared = {"x": "${oc.env:HOME}"}
    torch.save({"a": many_lists(), "note": "${not a config}", "opt": {"state": {0: {}}}}, tmp_path / "a.pt")
    begin = time.process_time()
    assert load_checkpoint(tmp_path / "a.pt")["note"] == "${not a config}"
    assert time.process_time() - begin < 2
    torch.save({"a": shared, "hyper_parameters": shared}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="hyper_parameters.x is .*interpolations"):
        load_checkpoint(tmp_path / "b.pt")


def other(**values):
    """Sets values of the stored config, by section and name with two underscores between."""

    def change(cfg):
        for name, value in values.items():
            section, key = name.split("__")
            cfg[section][key] = value

    return change


MONSTERS = {
    "downsample 1024": (other(model__downsample=[1024] * 3), "downsample is .1024, 1024, 1024., expected three"),
    "downsample 64": (other(model__downsample=[64] * 3, dataset__patch_size=64), "weights do not fit an autoencoder"),
    "downsample 4 8 4": (other(model__downsample=[4, 8, 4]), "autoencoder config: downsample is"),
    "no width": (other(model__embedding_dim=-1), "model.embedding_dim is -1, expected a whole number from 1 to 4096"),
    "too wide": (other(model__embedding_dim=10**10), "model.embedding_dim is 10000000000, expected"),
    "wide": (other(model__n_hiddens=4096), "weights do not fit an autoencoder of its config .4x.: encoder"),
    "codes": (other(model__n_codes=10**11), "model.n_codes is 100000000000, expected"),
    "groups": (other(model__num_groups=0), "model.num_groups is 0, expected"),
    "number as text": (other(model__n_codes="32"), "model.n_codes is '32', expected"),
    "NaN": (other(model__n_hiddens=float("nan")), "model.n_hiddens is nan, expected"),
    "patch": (other(dataset__patch_size=[16]), "dataset.patch_size is .16., expected"),
    "range": (other(dataset__intensity_range=[1, float("inf")]), "dataset.intensity_range is .1, inf., expected two"),
    "no section": (lambda cfg: cfg.update({"model": 3}), "model and dataset are no sections"),
}


@pytest.mark.parametrize("case", MONSTERS)
def test_autoencoders_of_a_size_that_none_has(tmp_path, autoencoder, case):
    change, message = MONSTERS[case]
    cfg = OmegaConf.to_container(autoencoder_config())
    change(cfg)
    path = lightning_file(tmp_path / "ae.ckpt", autoencoder, {"cfg": OmegaConf.create(cfg)})
    for load in (load_autoencoder, patchvolumeAE.load_from_checkpoint):
        with pytest.raises(UserError, match=rf"^\S*ae\.ckpt: .*{message}"):
            load(path)


def args(**values):
    return {"args": argparse.Namespace(**values)}


ROW = {"name": "age", "source": "x.csv", "column": None, "range": [0, 1], "categories": []}
TRAINED = {
    "classes": (args(num_classes="3"), "num_classes was '3', expected a whole number from 1 to"),
    "no classes": (args(num_classes=float("nan")), "num_classes was nan"),
    "levels": (args(dim_mults=5), "dim_mults was 5, expected a list of numbers"),
    "process": (args(process=["flow"]), "process was .'flow'., expected text"),
    "unknown process": (args(process="x"), "trained with process 'x', expected diffusion or flow"),
    "attributes": (args(attributes=[3]), "attributes was .3., expected rows"),
    "range": (args(attributes=[ROW | {"range": [1, 0]}]), "attributes was .*, expected rows"),
    "category": (args(attributes=[ROW | {"range": None, "categories": [1]}]), "attributes was .*, expected rows"),
    "categories": (
        args(attributes=[ROW | {"range": None, "categories": ["x"] * 10**5 + ["y"]}]),
        "attributes was .*, expected rows",
    ),
    "names": ({"ema": {"cond_emb.weight": torch.zeros(3, 2), 3: torch.zeros(1)}}, "ema has a weight named 3, expected"),
    "values": ({"ema": {"cond_emb.weight": torch.zeros(3, 2), "x": 1}}, "ema: 'x' is a int, expected a tensor"),
    "table": ({"ema": {"cond_emb.weight": torch.tensor(1.0)}}, "cond_emb.weight is no table of classes"),
    "table of text": ({"ema": {"cond_emb.weight": "x"}}, "cond_emb.weight is no table of classes"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_a_biflownet_says_of_its_training(tmp_path, biflownet, case):
    more, message = TRAINED[case]
    path, cfg = biflownet_file(tmp_path / "bf.pt", biflownet, **more), generation_config()

    def load():
        load_biflownet(cfg, path)
        take_process(cfg, path, load_checkpoint(path))

    with pytest.raises(UserError, match=rf"^\S*bf\.pt: .*{message}"):
        load()


@pytest.mark.parametrize(
    "scale", [[1], {"mean": torch.zeros(4)}, {"mean": torch.zeros(4), "std": torch.zeros(4)}, {"mean": 1, "std": 2}]
)
def test_a_damaged_scale_of_latents(scale):
    cfg = generation_config("process=diffusion", "prediction=noise")
    with pytest.raises(UserError, match="diffusion config: the scale of latents"):
        build_process(cfg, {"latent_scaling": scale})


@pytest.mark.parametrize(
    "value", ["7", float("nan"), float("inf"), [7], -1, True, pytest.param(10**6000, id="long"), None]
)
def test_counts(value):
    with pytest.raises(UserError, match="^a.pt: step is .*, expected a whole number"):
        count_in("a.pt", {"step": value}, "step")
    assert count_in("a.pt", {"step": 7.0}, "step") == 7
    assert count_in("a.pt", {}, "step", None) is None


def test_steps_that_are_none_count_least(tmp_path):
    for name, step in {"a": "9", "b": 3, "c": [1], "d": float("nan")}.items():
        torch.save({"step": step}, tmp_path / f"{name}.pt")
    assert newest_checkpoint(tmp_path) == tmp_path / "b.pt"


@pytest.mark.parametrize("state", [None, [], {"cpu": 1, "cuda": []}, {"cpu": torch.zeros(3)}, {"cuda": []}])
def test_damaged_random_states(state):
    before = random_state()
    with pytest.raises(UserError, match=re.escape("a.pt: its states of random numbers (rng) are damaged")):
        restore_random_state(state, "a.pt")
    assert torch.equal(random_state()["cpu"], before["cpu"])

"""Whatever comes in by a checkpoint, the program ends soon with a UserError or a right result."""

from pathlib import Path

import torch
from fuzz.examples import look, values
from generation_models import config, save_models
from hypothesis import strategies as st

from AutoEncoder.checkpoint import load_autoencoder
from common.checkpoint_files import load_checkpoint, save_checkpoint
from ddpm.checkpoint import check_options, load_biflownet

monsters = st.one_of(values, st.sampled_from([1024, -1, 10**10, 10**11, [1024] * 3, torch.zeros(2), torch.zeros(0)]))
places = st.lists(st.integers(0, 200), max_size=4)  # which entry on each level, by its number
checkpoint_changes = st.one_of(
    st.tuples(st.booleans(), st.just("entry"), st.lists(st.tuples(places, monsters), min_size=1, max_size=3)),
    st.tuples(st.booleans(), st.just("remove"), st.lists(st.tuples(places, st.none()), min_size=1, max_size=3)),
    st.tuples(
        st.booleans(), st.just("bytes"), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)))
    ),
    st.tuples(st.booleans(), st.just("cut"), st.integers(0, 10**6)),
)


MONSTROUS = {
    "downsample": {"downsample": [1024] * 3},
    "negative": {"embedding_dim": -1},
    "channels": {"embedding_dim": 10**10},
    "codes": {"n_codes": 10**11},
    "groups": {"num_groups": 0},
    "environment": {"norm_type": "${oc.env:HOME}"},
}


def test_checkpoints(tmp_path):
    models = save_models(tmp_path)
    cfg = config(models, tmp_path)
    files = {True: (models / "ae.ckpt").read_bytes(), False: (models / "flow.pt").read_bytes()}

    def door(folder: Path, example) -> None:
        is_autoencoder, kind, change = example
        path = folder / "x.pt"
        content = bytearray(files[is_autoencoder])
        if kind == "config":
            found = load_checkpoint(models / "ae.ckpt")
            found["hyper_parameters"]["cfg"].model.update(change)
            save_checkpoint(found, path)
        elif kind in ("entry", "remove"):
            found = load_checkpoint(models / ("ae.ckpt" if is_autoencoder else "flow.pt"))
            for place, value in change:
                put(found, place, value, kind == "remove")
            save_checkpoint(found, path)
        elif kind == "cut":
            path.write_bytes(content[: change % len(content)])
        else:
            for place, new in change:
                content[place % len(content) : place % len(content) + len(new)] = new
            path.write_bytes(content)
        if is_autoencoder:
            load_autoencoder(path)
        else:
            checkpoint = load_checkpoint(path)
            load_biflownet(cfg, path, torch.device("cpu"), checkpoint)
            check_options(cfg, path, checkpoint)

    known = [(True, "config", change) for change in MONSTROUS.values()]
    look(door, checkpoint_changes, known)


def put(content, place, value, is_removed) -> None:
    """Changes an entry of nested mappings, or removes it."""
    for number, step in enumerate(place or [0]):
        try:
            names = list(content)
            name = names[step % len(names)]
            if number == len(place or [0]) - 1 or not hasattr(content[name], "keys"):
                if is_removed:
                    del content[name]
                else:
                    content[name] = value
                return
            content = content[name]
        except Exception:  # what OmegaConf refuses can't be in a file either
            return

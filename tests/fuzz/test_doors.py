"""Whatever comes in by a file, each of the four doors ends soon with a UserError or a right result.

`make fuzz` looks for longer. FUZZ_SECONDS: for each door; FUZZ_SEED: a number, or `random`; it is printed.
"""

import contextlib
import gzip
import json
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzz.limits import Limited
from generation_models import config, row, save_models
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nifti_files import write_nifti

from AutoEncoder.checkpoint import load_autoencoder
from common.checkpoint_files import load_checkpoint, save_checkpoint
from config.cli import parse_command_line
from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetMultiresConfig, GenerationConfig
from config.schema.option import options_of
from dataset.order.data_split import find_split, read_split
from dataset.volumes.index import read_class_folders, read_dataset_folders, read_hint_folders
from dataset.volumes.volume_io import read_header, read_volume
from ddpm.checkpoint import check_options, load_biflownet
from evaluation.generation.requests import list_requests

SECONDS = float(os.environ.get("FUZZ_SECONDS", 6))
SEED = os.environ.get("FUZZ_SEED", "0")
SCHEMAS = (AutoencoderConfig, BiFlowNetMultiresConfig, GenerationConfig, PreprocessConfig)

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from(
        [2**31, 2**32, 2**63, 2**64, 10**18, -(2**63), 10**90, 1e-9, 1e38, 1e308, 1e999, float("nan"), 0.5]
    ),
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "~nobody/x",
            "../x",
            "a",
            "null",
            "\0",
            "\n",
            "\x1b[2J",
            "\udce4",
            "\ud800",
            "x" * 5000,
            "9" * 400,
        ]
    ),
    st.sampled_from(
        ["${model.lr}", "${oc.env:HOME}", "${", "${a:b}", "???", "(" * 60, "1e400", "0x1f", "1:30", "=", "<<"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


class TimeIsUp(BaseException):
    """To Hypothesis, as Ctrl-C."""


def look(door, examples, known=()) -> None:
    """Gives the door what it must stand, then examples of a strategy until the time is over."""
    number = random.randrange(2**32) if SEED == "random" else int(SEED)
    print(f"FUZZ_SEED={number}")  # noqa: T201
    limited, count, has_failed, end = Limited(door), 0, False, 0.0

    @seed(number)
    @settings(
        max_examples=10**6, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(examples)
    def check(example) -> None:
        nonlocal count, has_failed
        if time.monotonic() > end and not has_failed:
            raise TimeIsUp
        count += 1
        try:
            limited(example)
        except AssertionError:
            has_failed = True
            raise

    try:
        for example in known:
            limited(example)
        end = time.monotonic() + SECONDS
        with contextlib.suppress(TimeIsUp):
            check()
    finally:
        limited.close()
    print(f"{count} examples")  # noqa: T201
    assert count > 20


# NIfTI

FIELDS = {  # of the header: place, form
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent": (68, "h"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    "units": (123, "B"), "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "6f"),
    "srow": (280, "12f"), "magic": (344, "4s"),
}  # fmt: skip
floats = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e30, 352.0, 348.0, 353.5])
shorts = st.integers(-(2**15), 2**15 - 1) | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, 512, 768, 2000, 32767])


def field_bytes(name: str) -> st.SearchStrategy:
    place, form = FIELDS[name]
    size, kind = struct.calcsize(f"<{form}"), form[-1]
    if kind in "Bs":
        return st.binary(min_size=size, max_size=size).map(lambda content: (place, content))
    count = int(form[:-1] or 1)
    single = {"i": st.integers(-(2**31), 2**31 - 1), "h": shorts, "f": floats}[kind]
    items = st.lists(single, min_size=count, max_size=count)
    return items.map(lambda found: (place, struct.pack(f"<{form}", *found)))


changes = st.lists(st.sampled_from(sorted(FIELDS)).flatmap(field_bytes), max_size=3)
nifti_files = st.tuples(changes, st.none() | st.integers(0, 3000), st.booleans(), st.binary(max_size=8))
ZEROS = gzip.compress(bytes(2**24))
NOT_YET_NIFTI = ("inflates", "inflates whole")


def nifti_content(example) -> bytes:
    overwritten, length, _, tail = example
    content = bytearray(BASE_NIFTI)
    for place, new in overwritten:
        content[place : place + len(new)] = new
    return bytes(content[:length]) + tail


def nifti_door(folder: Path, example) -> None:
    content = example if isinstance(example, bytes) else nifti_content(example)
    path = folder / "x.nii.gz"
    path.write_bytes(content if isinstance(example, bytes) else gzip.compress(content, 1) if example[2] else content)
    header = read_header(path)
    volume = read_volume(path).data
    assert volume.numel() == np.prod(header.shape)
    assert volume.isfinite().all()


def dims(*sizes: int) -> tuple:
    return [(40, struct.pack("<8h", len(sizes), *sizes, *[1] * (7 - len(sizes))))]


@pytest.fixture(scope="module")
def base_nifti(tmp_path_factory):
    global BASE_NIFTI
    BASE_NIFTI = write_nifti(tmp_path_factory.mktemp("nifti") / "x.nii").read_bytes()


def test_nifti_headers(base_nifti):
    known = {
        "large": (dims(2000, 2000, 2000), None, True, b""),
        "largest": (dims(32767, 32767, 32767), None, True, b""),
        "offset": ([(108, struct.pack("<f", 1e30))], None, True, b""),
        "inflates": gzip.compress(BASE_NIFTI) + ZEROS * 64,
        "inflates whole": gzip.compress(nifti_content((dims(2000, 2000, 2000), 352, True, b""))) + ZEROS * 64,
    }
    look(nifti_door, nifti_files, [example for name, example in known.items() if name not in NOT_YET_NIFTI])


# Checkpoints

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
NOT_YET_CHECKPOINTS = ("negative", "channels", "codes", "groups")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_checkpoints(models, tmp_path):
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

    known = [(True, "config", change) for name, change in MONSTROUS.items() if name not in NOT_YET_CHECKPOINTS]
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


# Dataset JSONs

json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
folders = st.sampled_from(["a", "b", "b/c", ".", "none", "\udce4", "\ud800", "x" * 300, "~nobody", "\0"])
datasets = st.dictionaries(
    st.sampled_from(["0", "1", "01", "²", "-1", "x", "\ud800", "9" * 400]),
    st.one_of(
        folders, st.lists(folders, max_size=3), st.fixed_dictionaries({"images": folders, "hints": json_values}), values
    ),
    max_size=3,
)
splits = st.fixed_dictionaries(
    {name: json_values for name in ("validation", "held_out", "seed", "files_sha256", "subject_pattern")}
    | {
        "dataset": texts,
        "subjects": st.dictionaries(texts, st.sampled_from(["training", "validation", "x"]), max_size=3),
    }
)
json_texts = st.one_of(
    st.tuples(datasets | splits | json_values, st.booleans()).map(
        lambda found: json.dumps(found[0], ensure_ascii=found[1])
    ),
    st.text(alphabet='[]{}",:0123456789eE+-.ntrufalse\\ \n', max_size=60),
).map(lambda text: text.encode(errors="surrogatepass"))
NOT_YET_TEXTS = (b"x" * 200, b"9" * 200, b"\\ud800", "\ud800".encode(errors="surrogatepass"))
NOT_YET_JSON = ("brackets", "levels", "digits", "names", "values", "half")
JSON_MONSTERS = {
    "brackets": b"[" * 100_000,
    "levels": b'{"0":' * 900 + b"1" + b"}" * 900,
    "digits": b'{"0": ' + b"9" * 5000 + b"}",
    "names": b"{" + b",".join(b'"%d": "a"' % number for number in range(20_000)) + b"}",
    "values": b'{"0": [' + b"[]," * 10_000_000 + b"[]]}",
    "half": b'{"0": "\\ud800"}',
}


def json_door(folder: Path, content: bytes) -> None:
    for name in ("a", "b/c"):
        (folder / name).mkdir(parents=True)
    path = folder / "x.json"
    path.write_bytes(content)
    readers = (read_dataset_folders, read_class_folders, read_hint_folders, read_split, find_split)
    read = readers[len(content) % 5]
    found = read(path)
    if read is read_dataset_folders:
        assert all(place.is_dir() for places in found.values() for place in places)


def test_dataset_jsons():
    known = [content for name, content in JSON_MONSTERS.items() if name not in NOT_YET_JSON]
    monsters = [content + b" " * (-len(content) % 5 + 1) for content in known]  # for read_class_folders
    look(json_door, json_texts.filter(lambda content: not any(odd in content for odd in NOT_YET_TEXTS)), monsters)


# Configs and requests

NOT_YET_KEYS = {"continue_from", "model.continue_from", "class_table"}
KEYS = {option.name for schema in SCHEMAS for option in options_of(schema)}
keys = st.sampled_from(sorted(KEYS - NOT_YET_KEYS))


def nested(found: dict) -> dict:
    content: dict = {}
    for name, value in found.items():
        section, _, last = name.rpartition(".")
        (content.setdefault(section, {}) if section else content)[last] = value
    return content


lines = st.dictionaries(keys, values, max_size=4).map(nested)
yaml_texts = st.one_of(
    (lines | values).map(lambda found: yaml.safe_dump(found, allow_unicode=True)),
    st.tuples(lines, st.sampled_from(["defaults: [x]", "defaults: [base_cfg, y]", "defaults: 3", "a: &a [*a]"])).map(
        lambda found: f"{found[1]}\n{yaml.safe_dump(found[0])}"
    ),
    st.text(alphabet="[]{}\"',:-?&*!|>%@`#abc019.~<=\n \t\\", max_size=80),
).map(lambda text: text.encode(errors="surrogatepass"))
entries = st.lists(
    st.dictionaries(
        st.sampled_from(["class", "seed", "num_samples", "resolution", "spacing", "attributes", "x"]),
        st.one_of(values, st.sampled_from(["Chest", "0", "0-9", "0-999", "64 64 64", "1 1 1", "a=1", {"a": "../x"}])),
        max_size=4,
    ).map(lambda entry: {"class": "Chest"} | entry),
    max_size=4,
)
request_texts = st.one_of(
    entries.map(lambda found: yaml.safe_dump(found, allow_unicode=True)).map(lambda text: ("r.yaml", text)),
    st.text(alphabet="class,seed;\t\"'0-9\n x.resolution", max_size=80).map(
        lambda text: ("r.csv", f"class,seed\n{text}")
    ),
    st.text(alphabet="[]{}\"',:-?&*!|>%@`#abc019.~<=\n \t\\", max_size=80).map(lambda text: ("r.yaml", text)),
).map(lambda found: (found[0], found[1].encode(errors="surrogatepass")))
override_words = st.tuples(keys, texts | values.map(str)).map(lambda found: f"{found[0]}={found[1]}")
config_files = st.one_of(
    st.tuples(st.just("x.yaml"), yaml_texts),
    request_texts,
    st.tuples(st.just("words"), st.lists(override_words, max_size=2)),
)
DOUBLED = "".join(f"b{i}: &b{i + 1} [*b{i}, *b{i}]\n" for i in range(60))
CONFIG_MONSTERS = [
    ("x.yaml", b"a: &b0 [1]\n" + DOUBLED.encode()),
    ("r.yaml", b"a: &b0 [1]\n" + DOUBLED.encode()),
    *(
        (name, content)
        for name in ("x.yaml", "r.yaml")
        for content in (b"[" * 100_000, b"a: " + b"9" * 5000, b"- " * 100_000)
    ),
    ("x.yaml", b"defaults: [x]"),
    ("x.yaml", ("model: {default_root_dir: '" + "${dataset.root_dir}" * 20 + "'}").encode()),
    ("r.csv", b"class,seed\n" + b"Chest,0-99999\n" * 300_000),
    ("r.csv", b"class,seed\n" + b"\n" * 4_000_000),
    ("r.csv", b"class,seed\nChest,0-9999\n"),
    ("words", ["model.seed=" + "9" * 5000]),
]


def test_configs_and_requests(models, tmp_path):
    base = config(models, tmp_path, [row(0, "Chest", [8, 8, 8]), row(1, "Head", [8, 8, 8])])

    def door(folder: Path, example) -> None:
        name, content = example
        if name == "words":
            parse_command_line(content, AutoencoderConfig, None, "")
            return
        path = folder / name
        path.write_bytes(content)
        if name == "x.yaml":
            load_config(SCHEMAS[len(content) % len(SCHEMAS)], path)
        else:
            base.requests = str(path)
            assert list_requests(base)

    look(door, config_files, CONFIG_MONSTERS)

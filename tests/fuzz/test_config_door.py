"""Whatever comes in by a config, an override or requests, the program ends soon with a UserError or a right result."""

from pathlib import Path

import yaml
from fuzz.examples import look, texts, values
from generation_models import config, row, save_models
from hypothesis import strategies as st

from config.cli import parse_command_line
from config.loading import load_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetMultiresConfig, GenerationConfig
from config.schema.option import options_of
from evaluation.generation.requests import list_requests

SCHEMAS = (AutoencoderConfig, BiFlowNetMultiresConfig, GenerationConfig, PreprocessConfig)
KEYS = {option.name for schema in SCHEMAS for option in options_of(schema)}
keys = st.sampled_from(sorted(KEYS))


def nested(found: dict) -> dict:
    content: dict = {}
    for name, value in found.items():
        section, _, last = name.rpartition(".")
        below = content.setdefault(section, {}) if section else content
        if isinstance(below, dict):  # else the section itself has been given a value
            below[last] = value
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


def test_configs_and_requests(tmp_path):
    base = config(save_models(tmp_path), tmp_path, [row(0, "Chest", [8, 8, 8]), row(1, "Head", [8, 8, 8])])

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

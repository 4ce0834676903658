"""Whatever comes in by a dataset JSON or split.json, the program ends soon with a UserError or a right result."""

import json
from pathlib import Path

from fuzz.examples import look, texts, values
from hypothesis import strategies as st

from dataset.order.data_split import find_split, read_split
from dataset.volumes.index import read_class_folders, read_dataset_folders, read_hint_folders

folders = st.sampled_from(["a", "b", "b/c", ".", "none", "\udce4", "\ud800", "x" * 300, "~nobody", "\0"])
datasets = st.dictionaries(
    st.sampled_from(["0", "1", "01", "²", "-1", "x", "\ud800", "9" * 400]),
    st.one_of(
        folders, st.lists(folders, max_size=3), st.fixed_dictionaries({"images": folders, "hints": values}), values
    ),
    max_size=3,
)
splits = st.fixed_dictionaries(
    {name: values for name in ("validation", "held_out", "seed", "files_sha256", "subject_pattern")}
    | {
        "dataset": texts,
        "subjects": st.dictionaries(texts, st.sampled_from(["training", "validation", "x"]), max_size=3),
    }
)
json_texts = st.one_of(
    st.tuples(datasets | splits | values, st.booleans()).map(lambda found: json.dumps(found[0], ensure_ascii=found[1])),
    st.text(alphabet='[]{}",:0123456789eE+-.ntrufalse\\ \n', max_size=60),
).map(lambda text: text.encode(errors="surrogatepass"))
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
    monsters = [
        content + b" " * (-len(content) % 5 + 1) for content in JSON_MONSTERS.values()
    ]  # for read_class_folders
    look(json_door, json_texts, monsters)

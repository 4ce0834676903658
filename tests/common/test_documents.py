"""JSON and YAML beyond the bounds: refused in a line, before anything large is made of them."""

import re

import pytest
import yaml

from common.documents import MOST_BYTES, TextLoader, json_lines, parse_json, parse_yaml, read_json
from common.text import shown

JSON = {
    "levels": ("[" * 101 + "]" * 101, "more than 100 levels of brackets"),
    "brackets": ("[" * 100_000, "more than 100 levels of brackets"),
    "values": ("[" + "1," * 1_000_000 + "1]", "more than 1,000,000 values"),
    "digits": ("[" + "9" * 5000 + "]", "a number of more than 100 digits"),
    "half": (r'{"\ud800": 1}', r"half a character in '\\ud800'"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', 'key "a" occurs twice'),
    "none": ("{", "Expecting property name"),
}
YAML = {
    "aliases": (
        "- &b0 [1]\n" + "".join(f"- &b{i + 1} [*b{i}, *b{i}]\n" for i in range(40)),
        "more than 200,000 values",
    ),
    "merges": ("- &b0 {k: 1}\n" + "".join(f"- &b{i + 1} {{<<: [*b{i}, *b{i}]}}\n" for i in range(40)), "more than 200"),
    "levels": ("- &b0 [1]\n" + "".join(f"- &b{i + 1} [*b{i}]\n" for i in range(200)), "more than 100 levels"),
    "loop": ("[&a 1, &a [*a]]", r"the alias \*a stands for nothing that ends before it"),
    "dashes": ("- " * 100_000, "more than 100 levels"),
    "digits": ("a: 0x" + "f" * 5000, "a number of more than 100 digits"),
    "values": ("[" + "1," * 200_000 + "]", "more than 200,000 values"),
    "none": ("a: [1", "did not find expected|expected ',' or"),
}


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
def test_json_beyond_the_bounds(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, unique=True)


@pytest.mark.parametrize("loader", [TextLoader, yaml.SafeLoader])
@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_yaml_beyond_the_bounds(text, message, loader):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, loader)
    assert "\n" not in str(caught.value)


def test_what_lies_within_the_bounds_is_read(tmp_path):
    deep = "[" * 100 + "]" * 100
    assert repr(parse_json(deep)) == deep
    assert parse_json('{"a": [1, -2.5e3, "\\udce4", "\\ud83d\\ude00"]}') == {"a": [1, -2500.0, "\udce4", "😀"]}
    assert parse_yaml("a: &x [1, 010]\nb: *x", TextLoader) == {"a": ["1", "010"], "b": ["1", "010"]}
    assert parse_yaml('"\\udce4"', yaml.SafeLoader) == "\udce4"  # as OmegaConf writes a file name in Latin-1
    (tmp_path / "x.json").write_text('{"ä": 1}', encoding="utf-16")
    assert read_json(tmp_path / "x.json") == {"ä": 1}
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="more than 32 MB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}\n\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}\n{"b', [{"a": 1}]),
        (b'{"a": 1}\n\0\0\0\xff', [{"a": 1}]),
        (b"", []),
        (b'{"a": 1}\n{"b\n{"c": 3}\n', "line 2: "),
        (b'{"a": 1}\n\xff\n{"c": 3}\n', "line 2: .*utf-8"),
        (b"[" * 1000 + b"]" * 1000 + b"\n{}\n", "line 1: more than 100 levels"),
    ],
)
def test_lines_of_json(tmp_path, content, found):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    if isinstance(found, list):
        assert [value for _, value in json_lines(path)] == found
    else:
        with pytest.raises(ValueError, match=found):
            list(json_lines(path))


def test_what_is_quoted_is_short():
    laughs: list = ["ha"]
    for _ in range(100):
        laughs = [laughs] * 100
    for value in (laughs, "x" * 10**6, {f"k{i}": i for i in range(10**5)}, [[1] * 100] * 100):
        assert len(shown(value)) <= 160
    assert re.fullmatch(r"'x+\.\.\.x+'", shown("x" * 100))
    assert shown([1, "a", {"b": None}]) == "[1, 'a', {'b': None}]"

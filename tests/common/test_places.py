"""Places that can't be looked at, and names that no file can have: one line, by whatever asks."""

import errno
import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import check_writable
from common.places import exists, home_expanded, is_file, is_folder, missing_folder
from common.script import run_script
from common.text import is_plain, printable, shown
from config.loading import load_config
from config.schema.data import CheckConfig, PreprocessConfig
from dataset.order.data_split import find_split
from dataset.volumes.index import list_volumes, read_dataset_json

LONG = "x" * 300


def test_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    kinds = {"file": (True, True, False), ".": (True, False, True), "file/x": (False,) * 3, "link": (False,) * 3}
    for name, expected in kinds.items():
        assert (exists(tmp_path / name), is_file(tmp_path / name), is_folder(tmp_path / name)) == expected
    assert missing_folder(tmp_path / "file") == "a file, a folder is needed"
    assert missing_folder(tmp_path / "x") == "no such folder"
    assert home_expanded("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    ("place", "reason", "of_json"),
    [
        (LONG, "cannot be looked at .File name too long.", None),
        ("~nobody-of-this-name/x", "there is no such user", None),
        ("a\0b", "a character that no file name can have", None),
        ("\ud800", "a character that no file name can have", "half a character in"),
        ("/", "the whole file system", None),
        ("set.json", "a file, a folder is needed", None),
    ],
)
def test_folders_of_a_dataset(tmp_path, place, reason, of_json, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set.json").write_text(json.dumps({"0": place}))
    with pytest.raises(UserError, match=of_json or reason):  # such a text is refused before it is a place
        read_dataset_json("set.json")
    if not place.startswith("~"):
        with pytest.raises(UserError, match=reason):
            list_volumes(place)
    with pytest.raises(UserError):
        find_split("set.json", "no.json")


def test_whatever_the_system_says_of_a_place_is_one_line(capsys):
    """Where a program opens what it has not asked for; a fault of another kind keeps its traceback."""
    assert run_script(lambda argv: Path(LONG).mkdir()) == 2
    assert capsys.readouterr().err == f"error: {LONG}: File name too long: choose another place, or change this\n"
    assert run_script(lambda argv: check_writable(LONG)) == 2

    def refuse(argv):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "\x1b[31mred")

    assert run_script(refuse) == 2
    assert capsys.readouterr().err.endswith(
        "error: \\x1b[31mred: Permission denied: choose another place, or change this\n"
    )
    with pytest.raises(FileNotFoundError):
        run_script(lambda argv: Path("nothing").read_bytes())


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2J", "a\nb", "\x85", "\ud800"])
def test_names_that_are_no_text(tmp_path, text):
    assert not is_plain(text)
    assert is_plain(os.fsdecode(b"M\xfcller"))
    assert is_plain("Knie ü")
    assert "\x1b" not in printable(text)
    printable(text).encode()
    with pytest.raises(UserError, match="picture has characters that are no text"):
        load_config(CheckConfig, None, values={"json": "x.json", "picture": text})
    (tmp_path / "set.json").write_bytes(repr({text: "set"}).replace("'", '"').replace("\\x", "\\u00").encode())
    reason = "half a character in" if text == "\ud800" else "key .* has characters that are no text"
    with pytest.raises(UserError, match=reason):
        read_dataset_json(tmp_path / "set.json")


@pytest.mark.parametrize("name", [".hidden", "..", "a/b", "a\x07", "\ud800", "ü" * 76])
def test_class_names_that_no_folder_should_have(name):
    with pytest.raises(UserError, match="name (must be a name that a folder can have|has characters)"):
        load_config(PreprocessConfig, None, values={"name": name})


def test_what_is_quoted_is_short():
    for value in (10**5000, ["x" * 1000] * 1000, {1: "\x1b"}, "y" * 500, "a\nb"):
        assert len(shown(value)) <= 160
        assert "\n" not in shown(value)
        assert "\x1b" not in shown(value)
    assert shown([8, 8, 8]) == "[8, 8, 8]"
    assert str(UserError(f"{'x' * 1795}: so")) == f"{'x' * 1795}: so"
    assert (
        str(UserError(f"a.json: {'x' * 5000}: write another")) == f"a.json: {'x' * 1192} … {'x' * 585}: write another"
    )

"""Names of temporary files, text of people's programs, and file names that are no text."""

import codecs
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import replacing, write_atomically
from common.log import close_logger, get_logger
from common.text import decode, printable

LATIN = os.fsdecode(b"M\xfcller.nii.gz")


@pytest.mark.parametrize("length", [6, 100, 101, 246, 255])
def test_temporary_names_fit_where_the_name_fits(tmp_path, length):
    """`.*.tmp`, what those look for who tidy up, and no longer than the name, or short at any rate."""
    path = tmp_path / ("ü" * (length // 2) + "x" * (length % 2))
    with replacing(path) as file:
        (temporary,) = tmp_path.glob(".*.tmp")
        assert str(os.getpid()) in temporary.name
        assert len(os.fsencode(temporary.name)) <= max(length, 143)
        file.write(b"whole")
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"whole")


def test_temporary_names_of_long_names_differ(tmp_path):
    with replacing(tmp_path / ("x" * 250 + "1")) as one, replacing(tmp_path / ("x" * 250 + "2")) as two:
        one.write(b"1")
        two.write(b"2")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"1", b"2"]


def test_names_in_other_encodings_can_be_written(tmp_path):
    write_atomically(tmp_path / LATIN, b"x")
    assert os.listdir(os.fsencode(tmp_path)) == [b"M\xfcller.nii.gz"]


@pytest.mark.parametrize("text", ['{"0": "Kniegelenk ü"}', "class,seed\nKnie ü,3\n"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "bom utf-16-be"]
)
def test_text_of_windows_programs(text, encoding):
    content = codecs.BOM_UTF16_BE + text.encode("utf-16-be") if encoding[:3] == "bom" else text.encode(encoding)
    assert decode(content) == text


def test_text_of_other_encodings_is_refused():
    with pytest.raises(UnicodeDecodeError):
        decode("Kniegelenk ü".encode("latin-1"))


def test_bytes_that_are_no_text_are_shown_as_question_marks(tmp_path, capsys):
    assert printable(f"Ä {LATIN}") == "Ä M?ller.nii.gz"
    get_logger(file=tmp_path / "log.txt").info("read %s", LATIN)
    close_logger()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("read M?ller.nii.gz\n")
    assert logging.getLogger("train").handlers == []


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "× M?ller.nii.gz"), ("ascii", "? M?ller.nii.gz")])
def test_scripts_print_names_that_are_no_text(encoding, shown):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from common.script import run_script\n"
        "def main(argv): print('×', os.fsdecode(b'M\\xfcller.nii.gz')); sys.stderr.write('×'); return 3\n"
        "raise SystemExit(run_script(main))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, check=False, env=env)
    assert (done.returncode, done.stdout.decode(encoding).strip()) == (3, shown), done.stderr

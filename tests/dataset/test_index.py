"""Dataset JSONs and the files that they name."""

import errno
import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from dataset.order.split import split_dataset
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.index import (
    latent_folder,
    latent_path,
    list_volumes,
    read_class_json,
    read_dataset_json,
    walk_files,
)


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def write_json(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_dataset_json(tmp_path):
    data = tmp_path / "data"
    touch(data, "A/z.nii.gz", "A/sub/a.nii.gz", "A/readme.txt", "A/.z.nii.gz.1.tmp", "A/._z.nii.gz", "B/b.nii.gz")
    path = write_json(data / "set.json", {"name": ["A", str(data / "B")], "again": "B"})
    expected = [data / "A/sub/a.nii.gz", data / "A/z.nii.gz", data / "B/b.nii.gz"]
    assert read_dataset_json(path) == {"name": expected, "again": expected[2:]}


def test_files_are_sorted_by_path(tmp_path):
    names = [f"{folder}/{i:02d}.nii.gz" for folder in "CAB" for i in (7, 1, 12, 3, 10)]
    paths = sorted(touch(tmp_path / "set", *names))
    assert list_volumes(tmp_path / "set") == paths
    assert read_dataset_json(write_json(tmp_path / "set.json", {"0": ["set/B", "set/A", "set/C"]})) == {"0": paths}


def test_linked_folders_are_walked_once(tmp_path):
    touch(tmp_path, "real/a.nii.gz")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "set")
    assert list_volumes(tmp_path / "set") == [tmp_path / "set/link/a.nii.gz"]


def test_copies_in_hidden_folders_do_not_count(tmp_path):
    touch(tmp_path, "set/a.nii.gz", "set/.ipynb_checkpoints/a-checkpoint.nii.gz", "set/.git/annex/objects/key.nii.gz")
    touch(tmp_path, "set/#recycle/old.nii.gz", "set/$RECYCLE.BIN/x/old.nii.gz", "set/@eaDir/a.nii.gz/thumb.nii.gz")
    (tmp_path / "set" / "b.nii.gz").symlink_to(".git/annex/objects/key.nii.gz")
    assert list_volumes(tmp_path / "set") == [tmp_path / "set/a.nii.gz", tmp_path / "set/b.nii.gz"]


def close(monkeypatch, call: str, closed: Path) -> None:
    """Lets calls of the operating system fail for a path, as they do for those who may not; root may."""
    original = getattr(os, call)

    def refuse(path, *args, **kwargs):
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refuse)


@pytest.mark.parametrize("call", ["scandir", "stat"])  # a folder that can't be listed, one that can't be entered
def test_a_closed_folder_is_named(tmp_path, monkeypatch, call):
    touch(tmp_path, "set/a.nii.gz", "set/closed/b.nii.gz")
    close(monkeypatch, call, tmp_path / ("set/closed" + "/b.nii.gz" * (call == "stat")))
    with pytest.raises(UserError, match="closed.*cannot be listed or entered .Permission denied.: its files"):
        list_volumes(tmp_path / "set")
    errors = []
    assert walk_files(tmp_path / "set", errors.append) == [tmp_path / "set/a.nii.gz"]
    assert len(errors) == 1


@pytest.mark.parametrize("read", [read_dataset_json, lambda path: split_dataset(path, 0.1, 0), Singleres_dataset])
@pytest.mark.parametrize("place", ["set", "set/closed"])
def test_training_and_encoding_refuse_a_closed_folder(tmp_path, monkeypatch, read, place):
    touch(tmp_path, "set/a.nii.gz", "set/closed/b.nii.gz")
    path = write_json(tmp_path / "set.json", {"0": "set"})
    close(monkeypatch, "scandir", tmp_path / place)
    with pytest.raises(
        UserError, match=f"{place}: cannot be listed or entered .Permission denied.: its files would be"
    ):
        read(path)


def test_a_folder_in_a_closed_one_is_not_called_missing(tmp_path, monkeypatch):
    touch(tmp_path, "closed/set/a.nii.gz")
    close(monkeypatch, "stat", tmp_path / "closed" / "set")
    for read in (list_volumes, lambda folder: read_dataset_json(write_json(tmp_path / "set.json", {"0": str(folder)}))):
        with pytest.raises(UserError, match="closed/set: cannot be looked at .Permission denied."):
            read(tmp_path / "closed" / "set")


OTHERS = ("b.nii", "B.NII.GZ", "c.mgz", "c.nii.bz2", "d.mha", "e.NRRD", "f.img", "sub/g.Nii.gz")


def test_image_files_that_are_passed_over_are_said(tmp_path, caplog):
    files = touch(tmp_path / "set", "a.nii.gz", "notes.txt", "a.json", "motion.par", "f.hdr", ".h.mgz", *OTHERS)
    assert list_volumes(tmp_path / "set") == files[:1]
    assert [record.getMessage() for record in caplog.records] == [
        f"8 image file(s) of another kind or name, e.g. {tmp_path}/set/B.NII.GZ: passed over, only *.nii.gz is read"
    ]
    files[0].unlink()
    with pytest.raises(
        UserError, match=r"no \*\.nii\.gz file, but 8 image file\(s\) of another kind or name, e\.g\. .*B\.NII"
    ):
        list_volumes(tmp_path / "set")


def test_nothing_is_said_of_other_files(tmp_path, caplog):
    touch(tmp_path / "set", "a.nii.gz", "b.json", "c.png", "latents.json", "manifest.jsonl", ".lock")
    list_volumes(tmp_path / "set")
    assert caplog.records == []


def test_folder_below_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path, "A/a.nii.gz")
    (tmp_path / "config").mkdir()
    path = write_json(tmp_path / "config" / "set.json", {"0": "A"})
    monkeypatch.chdir(tmp_path)
    assert read_class_json(path) == {0: [Path("A/a.nii.gz")]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such dataset JSON", id="missing"),
        pytest.param("{'0': 'A'}", "not a JSON file", id="other quotes"),
        (["A"], "a JSON object"),
        ({}, "names no folder"),
        ({"0": "missing"}, '"0": no such folder: .*missing'),
        ({"0": "empty"}, r"empty: the folder has no \*\.nii\.gz"),
        ({"0": []}, "a folder or a list of folders"),
        ({"0": 3}, "a folder or a list of folders"),
        ({"chest": "A"}, 'key "chest" is not a class id'),
        ({"-1": "A"}, 'key "-1" is not a class id'),
        ({"00": "A"}, 'key "00" is not a class id'),
        pytest.param('{"0": "A", "0": "A"}', 'key "0" occurs twice', id="twice"),
    ],
)
def test_unfit_dataset_json(tmp_path, content, message):
    touch(tmp_path, "A/a.nii.gz")
    (tmp_path / "empty").mkdir()
    if content is not None:
        write_json(tmp_path / "set.json", content)
    with pytest.raises(UserError, match=message) as caught:
        read_class_json(tmp_path / "set.json")
    assert "set.json" in str(caught.value) or "empty" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_json_of_windows_programs(tmp_path, encoding):
    (file,) = touch(tmp_path, "Ä/a.nii.gz")
    (tmp_path / "set.json").write_bytes(json.dumps({"0": "Ä"}, ensure_ascii=False).encode(encoding))
    assert read_class_json(tmp_path / "set.json") == {0: [file]}


def test_json_in_another_encoding(tmp_path):
    (tmp_path / "set.json").write_bytes('{"0": "Ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"set\.json: not text in UTF-8 or UTF-16: save it as UTF-8"):
        read_class_json(tmp_path / "set.json")


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"0": "A", "1": "A"}, "class 1 has the folder .*A, which is or lies in .*A of class 0"),
        ({"0": ["B", "A"], "1": "B/../A/"}, "class 1 has"),
        ({"0": "A", "7": "link"}, "class 7 has the folder .*link, which"),
        ({"0": "A", "1": "A/sub"}, "class 1 has the folder .*A/sub, which is or lies in .*A of class 0"),
        ({"0": "A/sub", "1": "A"}, "class 0 has the folder .*A/sub, which is or lies in .*A of class 1"),
        ({"0": "A", "1": "AB", "2": ["B", "B/sub"]}, None),
    ],
)
def test_a_folder_has_one_class(tmp_path, entries, found):
    touch(tmp_path, "A/sub/a.nii.gz", "B/sub/b.nii.gz", "AB/a.nii.gz")
    (tmp_path / "link").symlink_to("A")
    path = write_json(tmp_path / "set.json", entries)
    if found is None:
        assert list(read_class_json(path)) == [0, 1, 2]
        return
    with pytest.raises(UserError, match=f"set.json: {found}"):
        read_class_json(path)


def test_latent_path_renames_only_the_class_folder():
    folder = Path("/data/CT/study_CT/CT")
    assert latent_folder(folder) == Path("/data/CT/study_CT/CT_latents")
    assert latent_folder("/data/CT/") == Path("/data/CT_latents")
    assert latent_path(folder / "CT" / "CT.nii.gz", folder) == Path("/data/CT/study_CT/CT_latents/CT/CT.nii.gz")

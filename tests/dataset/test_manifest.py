"""The manifest of a class folder, the units it gives back, and the dataset JSONs beside the folders."""

import json

import pytest

from common.errors import UserError
from dataset.preparation.classes import add_classes, check_place, choose_class_id, class_ids
from dataset.preparation.manifest import (
    KEYS,
    MANIFEST_NAME,
    Intensity,
    append_entry,
    common_intensity,
    read_manifest,
    write_manifest,
)

WINDOW = Intensity("window", -1000.0, 1000.0, "HU")


def entry(file: str, intensity: Intensity = WINDOW, **values) -> dict:
    return {**dict.fromkeys(KEYS, 0), "file": file, "intensity": intensity.record(), **values}


def test_entries_are_read_back(tmp_path):
    assert read_manifest(tmp_path) == {}
    write_manifest(tmp_path, [entry("b"), entry("a")])
    append_entry(tmp_path, entry("c"))
    append_entry(tmp_path, entry("a", bytes=5))
    assert list(read_manifest(tmp_path)) == ["a", "b", "c"]
    assert read_manifest(tmp_path)["a"]["bytes"] == 5  # the last one counts


def test_half_a_last_line_is_passed_over(tmp_path):
    write_manifest(tmp_path, [entry("a"), entry("b")])
    path = tmp_path / MANIFEST_NAME
    path.write_text(path.read_text()[:-30])
    assert list(read_manifest(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "line", ["no json", "[1]", "{}", json.dumps({"file": "x"}), json.dumps({**dict.fromkeys(KEYS, 0), "intensity": {}})]
)
def test_other_damage_is_an_error(tmp_path, line):
    write_manifest(tmp_path, [entry("a")])
    path = tmp_path / MANIFEST_NAME
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UserError, match=rf"{MANIFEST_NAME}: line 1 is no entry"):
        read_manifest(tmp_path)


# Units


def test_a_common_window_gives_its_units_back(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, [entry("a"), entry("b")])
    assert common_intensity([tmp_path / "x", tmp_path / "y"]) == WINDOW


def test_percentiles_have_no_units(tmp_path):
    write_manifest(tmp_path, [entry(f"{i}", Intensity("percentiles", i, 100.0 + i)) for i in range(3)])
    assert common_intensity([tmp_path]) == Intensity("percentiles", 0.0, 1.0)


def test_different_windows_have_nothing_in_common(tmp_path):
    write_manifest(tmp_path, [entry("a"), entry("b", Intensity("window", 0.0, 400.0, "HU"))])
    with pytest.raises(UserError, match=r"prepared in different ways \(window -1000 to 1000 HU; window 0 to 400 HU\)"):
        common_intensity([tmp_path])


def test_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=rf"no {MANIFEST_NAME}, so its units are not known"):
        common_intensity([tmp_path])


# Dataset JSONs


def read(folder) -> list[dict]:
    names = ("PatchVolume_data", "Singleres_dataset", "Singleres_latents")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_classes_are_added_to_what_is_there(tmp_path):
    add_classes(tmp_path, {10: "B"})
    add_classes(tmp_path, {2: "A"})
    assert read(tmp_path) == [{"A": "A", "B": "B"}, {"2": "A", "10": "B"}, {"2": "A_latents", "10": "B_latents"}]
    assert list(read(tmp_path)[1]) == ["2", "10"]
    assert class_ids(tmp_path) == {"A": 2, "B": 10}


def test_a_taken_class_id_is_an_error(tmp_path):
    add_classes(tmp_path, {0: "A"})
    with pytest.raises(UserError, match="class id 0 is A: give B another class_id"):
        add_classes(tmp_path, {0: "B"})
    assert read(tmp_path)[0] == {"A": "A"}


def test_what_a_person_wrote_stays(tmp_path):
    (tmp_path / "PatchVolume_data.json").write_text('{"A": ["A", "/more"]}')
    add_classes(tmp_path, {0: "A"})
    assert read(tmp_path)[0] == {"A": ["A", "/more"]}


def test_choice_of_a_class_id(tmp_path):
    assert choose_class_id(tmp_path, "A", None) == 0
    assert choose_class_id(tmp_path, "A", 5) == 5
    add_classes(tmp_path, {5: "A"})
    assert choose_class_id(tmp_path, "A", None) == 5
    assert choose_class_id(tmp_path, "B", None) == 6
    with pytest.raises(UserError, match="class A has the id 5, not 6"):
        choose_class_id(tmp_path, "A", 6)
    with pytest.raises(UserError, match="class id 5 is A: give class B another class_id"):
        choose_class_id(tmp_path, "B", 5)


def test_folders_of_several_sizes(tmp_path):
    add_classes(tmp_path, {0: "A/8x8x4"})
    add_classes(tmp_path, {0: "A/16x12x8", 1: "B"})
    add_classes(tmp_path, {0: "A/8x8x4"})
    places = ["A/8x8x4", "A/16x12x8"]
    latents = [f"{place}_latents" for place in places]
    assert read(tmp_path) == [{"A": places, "B": "B"}, {"0": places, "1": "B"}, {"0": latents, "1": "B_latents"}]
    assert class_ids(tmp_path) == {"A": 0, "B": 1}
    assert choose_class_id(tmp_path, "A", None) == 0
    with pytest.raises(UserError, match="class id 0 is A: give B another class_id"):
        add_classes(tmp_path, {0: "B/8x8x4"})


def test_lists_that_a_person_wrote_are_extended_by_new_sizes_alone(tmp_path):
    (tmp_path / "Singleres_dataset.json").write_text('{"0": ["A/8x8x4", "/more"]}')
    (tmp_path / "PatchVolume_data.json").write_text('{"A": "/fast/A"}')
    add_classes(tmp_path, {0: "A/8x8x4"})
    assert read(tmp_path) == [{"A": "/fast/A"}, {"0": ["A/8x8x4", "/more"]}, {"0": "A/8x8x4_latents"}]
    add_classes(tmp_path, {0: "A/native"})
    assert read(tmp_path)[:2] == [{"A": ["/fast/A", "A/native"]}, {"0": ["A/8x8x4", "/more", "A/native"]}]
    assert choose_class_id(tmp_path, "A", None) == 0


def test_a_person_may_give_each_size_an_id_of_its_own(tmp_path):
    ids = {"0": "A/8x8x4", "1": "A/16x12x8"}
    (tmp_path / "Singleres_dataset.json").write_text(json.dumps(ids))
    add_classes(tmp_path, {choose_class_id(tmp_path, "A", None): "A/16x12x8"})
    assert read(tmp_path)[1] == ids


def test_a_folder_within_another_is_refused(tmp_path):
    (tmp_path / "PatchVolume_data.json").write_text('{"all": ["A"]}')
    check_place(tmp_path, "B/8x8x4")
    with pytest.raises(
        UserError, match='PatchVolume_data.json: "all" names A, and the volumes of this run go into A/8x8x4'
    ):
        check_place(tmp_path, "A/8x8x4")
    (tmp_path / "PatchVolume_data.json").write_text(json.dumps({"all": str(tmp_path / "A" / "8x8x4" / "p1")}))
    with pytest.raises(UserError, match="they would count twice"):
        check_place(tmp_path, "A/8x8x4")
    (tmp_path / "Singleres_dataset.json").write_text('{"0": "A/8x8x4"}')  # it is there, and a person chose a part
    check_place(tmp_path, "A/8x8x4")


@pytest.mark.parametrize("content", ['{"0": 3}', '{"0": ["A", 3]}', '{"chest": "A"}'])
def test_jsons_of_another_form_are_left_alone(tmp_path, content):
    (tmp_path / "Singleres_dataset.json").write_text(content)
    with pytest.raises(UserError, match="move the file away"):
        choose_class_id(tmp_path, "A", None)

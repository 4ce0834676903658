"""Which volumes are compared, and what is refused before anything is computed."""

import gzip
import json

import numpy as np
import pytest
import torch
from evaluation_sets import blob, write_json, write_record, write_set

from common.errors import UserError
from dataset.order.data_split import SIDES
from dataset.order.draw_split import keep_or_draw
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import read_volume, write_volume
from evaluation.comparison.ranges import check_ranges, sample_ranges
from evaluation.comparison.sets import (
    Grid,
    Group,
    SetVolume,
    group_volumes,
    groups_of_one_set,
    list_refused,
    on_one_grid,
    read_headers,
    without,
)

RANGE = (-1.0, 1.0)


def groups_of(real, generated, training=None, real_range=RANGE, generated_range=None):
    return group_volumes(str(real), str(generated), training and str(training), real_range, generated_range, None)


def on_grid(groups, **options):
    return on_one_grid(groups, read_headers(groups)[0], **{"resample": False, **options})


# Sets ---------------------------------------------------------------------------------------------------------------


def test_two_folders_are_one_group(tmp_path):
    (group,), notes = groups_of(write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3, 4]))
    assert group.name == "a"
    assert {role: len(volumes) for role, volumes in group.sets.items()} == {"real": 2, "generated": 3}
    assert notes == []


def test_generated_volumes_go_to_the_class_that_their_record_says(tmp_path):
    ct, mr = (write_set(tmp_path / name, seeds) for name, seeds in (("CT", [0, 1]), ("MR", [2, 3])))
    made = write_set(tmp_path / "made", range(10, 15))
    for i, path in enumerate(sorted(made.glob("*.nii.gz"))):
        write_record(path, i % 2, ("CT", "MR")[i % 2])
    for keys in ({"0": ct, "1": mr}, {"CT": ct, "MR": mr}):
        groups, notes = groups_of(write_json(tmp_path / "d.json", **keys), made)
        assert [group.name for group in groups] == ["CT", "MR"]
        assert [v.path.name for v in groups[1].sets["generated"]] == ["v011.nii.gz", "v013.nii.gz"]
        assert notes == []


def test_two_classes_of_one_name_stay_apart(tmp_path):
    folders = {str(i): write_set(tmp_path / f"real{i}", [2 * i, 2 * i + 1]) for i in range(2)}
    made = write_set(tmp_path / "made", range(10, 14))
    for i, path in enumerate(sorted(made.glob("*.nii.gz"))):
        write_record(path, i % 2, "CT")
    groups, _ = groups_of(write_json(tmp_path / "d.json", **folders), made)
    assert [group.name for group in groups] == ["CT", "CT (1)"]


@pytest.mark.parametrize("by", ["split.json", "PatchVolume_data.json", "Singleres_dataset.json"])
def test_one_side_of_the_split(tmp_path, by):
    """Groups have the names of classes, and a set of another side's subjects is refused as training set."""
    write_set(tmp_path / "CT" / "8x8x8", range(8))
    made = write_set(tmp_path / "made", range(10, 14))
    for path in made.glob("*.nii.gz"):
        write_record(path, 0, "CT")
    for name, key in (("PatchVolume_data.json", "CT"), ("Singleres_dataset.json", "0")):
        write_json(tmp_path / name, **{key: "CT/8x8x8"})
    split = keep_or_draw(tmp_path / "PatchVolume_data.json", {"validation": 0.25, "held_out": 0.25})
    sides = {side: f"{tmp_path / by}:{side}" for side in SIDES}
    ((group,), notes) = groups_of(sides["held_out"], made, sides["training"])
    assert (group.name, notes) == ("CT", [])
    for role, side in (("real", "held_out"), ("training", "training")):
        found = {f"CT/{volume.path.name.removesuffix('.nii.gz')}" for volume in group.sets[role]}
        assert found == {subject for subject, of in split.subjects.items() if of == side}
    ((alone,), notes) = groups_of_one_set(sides["held_out"], "data", "held-out", "?", RANGE, None)
    assert notes == []
    assert (alone.name, len(alone.sets["held-out"])) == ("CT", 2)
    if by != "split.json":
        everybody = tmp_path / by
        with pytest.raises(UserError, match="training: .* is of subject CT/.*, as .* of real is"):
            groups_of(sides["held_out"], made, everybody)


def test_classes_on_one_side_only_are_left_out_with_a_note(tmp_path):
    folders = {name: write_set(tmp_path / name, seeds) for name, seeds in (("a", [0, 1]), ("b", [2, 3]), ("c", [4, 5]))}
    real = write_json(tmp_path / "real.json", a=folders["a"], b=folders["b"])
    made = write_json(tmp_path / "made.json", a=folders["c"], z=folders["b"])
    (group,), notes = groups_of(real, made)
    assert group.name == "a"
    assert len(notes) == 2
    assert "class b: there are no generated volumes" in notes[0]
    assert '"z"' in notes[1]


@pytest.mark.parametrize("given", [None, (0, 100)])
def test_range_of_generated_volumes(tmp_path, given):
    real, made = write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3])
    write_record(made / "v002.nii.gz", 0, "a", intensity={"low": -1000, "high": 1000})
    write_record(made / "v003.nii.gz", 0, "a", intensity=None)
    (group,), _ = groups_of(real, made, generated_range=given)
    expected = [(-1000, 1000), RANGE] if given is None else [given] * 2
    assert [volume.intensity_range for volume in group.sets["generated"]] == expected
    assert {volume.intensity_range for volume in group.sets["real"]} == {RANGE}
    assert all(volume.is_range_stated for volume in group.sets["generated"])
    assert not any(volume.is_range_stated for volume in group.sets["real"])


def make_refused(tmp_path, case):
    real, made = write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3])
    training = None
    if case == "no folder":
        made = tmp_path / "nowhere"
    elif case == "empty folder":
        made = tmp_path / "empty"
        made.mkdir()
    elif case == "one volume":
        made = write_set(tmp_path / "one", [7])
    elif case == "other names":
        real, made = write_json(tmp_path / "r.json", a=real), write_json(tmp_path / "g.json", x=made)
    elif case == "no record":
        real = write_json(tmp_path / "r.json", a=real)
    elif case == "two classes in a folder":
        write_record(made / "v002.nii.gz", 0, "a")
        write_record(made / "v003.nii.gz", 1, "b")
    elif case == "training of other names":
        training = write_json(tmp_path / "t.json", a=write_set(tmp_path / "t", [8, 9]))
    elif case == "shared file":
        training = real
    return real, made, training


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no folder", "generated: .*nowhere: no such folder or dataset JSON"),
        ("empty folder", r"generated: .*empty: the folder has no \*.nii.gz file"),
        ("one volume", "a: 1 generated volume, at least 2 are needed"),
        ("other names", 'generated: .* has "x", real "a": no class is in both'),
        ("no record", "v002.nii.gz: of which class it is can't be told.*give generated as a dataset JSON"),
        ("two classes in a folder", "holds the classes a, b, real is one folder: give real .* as a dataset JSON"),
        ("training of other names", 'training: .* has "a", real one set without a name: give the same names'),
        ("shared file", "v000.nii.gz: is both a real and a training volume"),
    ],
)
def test_sets_that_are_refused(tmp_path, case, message):
    with pytest.raises(UserError, match=message):
        groups_of(*make_refused(tmp_path, case))


# Geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "fits", "fits_without_spacing"),
    [
        (Grid((4, 4, 4), (1.005, 1, 1), "RAS"), True, True),
        (Grid((4, 4, 4), (1.02, 1, 1), "RAS"), False, True),
        (Grid((4, 4, 5), (1, 1, 1), "RAS"), False, False),
        (Grid((4, 4, 4), (1, 1, 1), "LPS"), False, True),
        (Grid((4, 4, 4), (1, 1, 1), ""), True, True),
    ],
)
def test_grids_that_fit(other, fits, fits_without_spacing):
    grid = Grid((4, 4, 4), (1, 1, 1), "RAS")
    assert grid.fits(other) is other.fits(grid) is fits
    assert grid.fits(other, ignore_spacing=True) is fits_without_spacing


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"spacing": (1, 1, 2)}, r"most real volumes have 16×16×16 voxels of 1×1×1 mm RAS.* 2 generated of .*1×1×2 mm"),
        ({"size": 20}, "2 generated of 20×20×20 voxels .*--resample brings all to the grid of most real ones"),
    ],
)
def test_sets_on_other_grids_are_refused_with_what_differs(tmp_path, made, message):
    groups, _ = groups_of(write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3], **made))
    with pytest.raises(UserError, match=message):
        on_grid(groups)


def test_spacing_is_ignored_when_asked_for(tmp_path):
    groups, _ = groups_of(write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3], spacing=(1, 1, 2)))
    assert on_grid(groups, ignore_spacing=True) == groups


def test_a_real_volume_on_another_grid_than_most_is_named(tmp_path):
    real = write_set(write_set(tmp_path / "a", [0, 1, 2]), [5], spacing=(2, 2, 2))
    groups, _ = groups_of(real, write_set(tmp_path / "b", [3, 4]))
    with pytest.raises(UserError, match="there are 1 real of 16×16×16 voxels of 2×2×2 mm"):
        on_grid(groups)


def test_resampling_brings_all_to_the_grid_of_most_real_volumes(tmp_path):
    groups, _ = groups_of(write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3], (0.5, 0.5, 0.5), 32))
    (group,) = on_grid(groups, resample=True)
    for volumes in group.sets.values():
        for volume in volumes:
            data = volume.read()
            assert data.shape == (1, 16, 16, 16)
            assert data.min() == -1
    first = group.sets["real"][0]  # is on that grid already
    torch.testing.assert_close(first.read(), read_volume(first.path).data, atol=1e-6, rtol=0)
    # Half the resolution of the same scene: averages of 2³ voxels up to the filter.
    fine = read_volume(group.sets["generated"][0].path).data
    coarse = torch.nn.functional.avg_pool3d(fine, 2)
    assert (group.sets["generated"][0].read() - coarse).abs().mean() < 0.1 * (coarse - coarse.mean()).abs().mean()


def test_resampling_turns_the_axes_and_loses_nothing(tmp_path):
    """Real volumes with axes (front to back, right to left, head to feet): sides go with their axes."""
    data = np.full((17, 24, 33), -1, np.float32)  # (D, H, W)
    data[3:14, 4:19, 5:28] = np.arange(11 * 15 * 23).reshape(11, 15, 23) % 61 / 64  # as many values as images have
    affine = np.array([[0, -1.0, 0, 0], [-1.5, 0, 0, 0], [0, 0, -2, 0], [0, 0, 0, 1]])  # x to the back, y to the left
    for i in range(2):
        write_volume(tmp_path / "a" / f"{i}.nii.gz", data, affine)
        turned = data[::-1].transpose(0, 2, 1)[:, ::-1, ::-1]  # (D, H, W) with axes right, front, head
        write_volume(tmp_path / "b" / f"{i}.nii.gz", turned.copy(), affine_from_spacing((1, 1.5, 2)))
    groups, _ = groups_of(tmp_path / "a", tmp_path / "b")
    (group,) = on_grid(groups, resample=True)
    assert group.sets["real"][0].resample == Grid((33, 24, 17), (1, 1.5, 2), "RAS")
    for volumes in group.sets.values():
        assert torch.equal(volumes[0].read()[0], torch.from_numpy(turned.copy()))


def test_a_volume_keeps_its_key_as_long_as_it_gives_the_same_voxels(tmp_path):
    write_set(tmp_path, [0, 1])
    first = SetVolume(tmp_path / "v000.nii.gz")
    (tmp_path / "copy.nii.gz").write_bytes(first.path.read_bytes())
    assert SetVolume(tmp_path / "copy.nii.gz").key() == first.key()
    others = [
        SetVolume(tmp_path / "v001.nii.gz"),
        SetVolume(first.path, (0, 1)),
        SetVolume(first.path, resample=Grid((8, 8, 8), (2, 2, 2), "RAS")),
        SetVolume(first.path, resample=Grid((8, 8, 8), (2, 2, 3), "RAS")),
    ]
    assert len({volume.key() for volume in (first, *others)}) == 5


# Content ------------------------------------------------------------------------------------------------------------


def test_intensities_are_mapped_to_those_of_the_model(tmp_path):
    write_volume(tmp_path / "v.nii.gz", (blob(0) + 1) * 1000 - 1000, np.eye(4))
    data = SetVolume(tmp_path / "v.nii.gz", (-1000, 1000)).read()
    torch.testing.assert_close(data[0], torch.from_numpy(blob(0)), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="outside the declared range"):
        SetVolume(tmp_path / "v.nii.gz").read()


def test_headers_that_cannot_be_read_are_listed_and_left_out(tmp_path):
    real = write_set(tmp_path / "a", range(3))
    (real / "v000.nii.gz").write_bytes(gzip.compress(b"nothing"))
    groups, _ = groups_of(real, write_set(tmp_path / "b", [4, 5]))
    grids, problems = read_headers(groups)
    assert len(grids) == 4
    assert list(problems) == [real / "v000.nii.gz"]
    (group,) = without(groups, set(problems))
    assert len(group.sets["real"]) == 2
    with pytest.raises(UserError, match="a: 1 real volume, at least 2"):
        without(groups, {*problems, real / "v001.nii.gz"})


def test_other_scales_are_noticed_by_the_darkest_voxels(tmp_path):
    files = {role: (SetVolume(tmp_path / role),) * 2 for role in ("real", "generated")}
    group, stated = Group("a", files), Group("a", {**files, "generated": (SetVolume(tmp_path, is_range_stated=True),)})
    same = {"real": [(-1.0, 0.9)] * 3, "generated": [(-0.9, 0.5)] * 2}
    grey = {**same, "generated": [(0.0, 1.0)] * 2}
    assert check_ranges(group, same) == []
    with pytest.raises(UserError, match=r"darkest voxels of generated volumes are 0, .*generated_range=\[0,1\]"):
        check_ranges(group, grey)
    (warning,) = check_ranges(stated, grey)
    assert "the darkest voxels of generated volumes are 0, those of real ones -1" in warning
    (warning,) = check_ranges(group, {**same, "generated": [(-1.0, -0.2)] * 2})
    assert "the brightest voxels of real volumes are 0.9, those of generated ones -0.2" in warning
    with pytest.raises(UserError, match=r"darkest voxels of real volumes .*real_range=\[0,1\]"):
        check_ranges(stated, {**same, "real": [(0.0, 1.0)] * 2})


def test_sets_that_use_the_upper_half_alone_have_another_scale(tmp_path):
    group = Group("a", {role: (SetVolume(tmp_path / role),) * 2 for role in ("real", "generated")})
    with pytest.raises(UserError, match=r"real volumes have nothing in the lower half.*real_range=\[0,1\]"):
        check_ranges(group, {role: [(0.0, 0.9)] * 3 for role in ("real", "generated")})


def test_ranges_are_those_of_a_few_volumes_that_can_be_read(tmp_path):
    real, made = write_set(tmp_path / "a", range(30)), write_set(tmp_path / "b", [40, 41])
    for path in sorted(real.iterdir())[:4]:
        path.write_bytes(b"nothing")
    (group,), _ = groups_of(real, made)
    ranges = sample_ranges(group)
    assert {role: len(found) for role, found in ranges.items()} == {"real": 3, "generated": 2}
    data = read_volume(made / "v040.nii.gz").data
    assert ranges["generated"][0] == (data.min().item(), data.max().item())


def test_only_the_first_few_of_many_refused_files_are_named():
    refused = {f"f{i}": f"f{i}: truncated" for i in range(7)}
    assert list_refused(refused, "volumes").endswith("f4: truncated; and 2 more")
    assert "more" not in list_refused({"f0": "f0: truncated"}, "volumes")


def test_a_damaged_record_is_no_record(tmp_path):
    real, made = write_set(tmp_path / "a", [0, 1]), write_set(tmp_path / "b", [2, 3])
    (made / "v002.json").write_text(json.dumps({"intensity": {"low": "dark"}}))
    (made / "v003.json").write_text(json.dumps({"intensity": {"low": 1, "high": 0}}))
    (group,), _ = groups_of(real, made)
    assert {volume.intensity_range for volume in group.sets["generated"]} == {RANGE}

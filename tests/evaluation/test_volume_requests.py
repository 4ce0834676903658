"""What is asked for: classes, seeds, sizes, spacings and lists of requests, and every mistake in them."""

import re
from pathlib import Path

import pytest
from generation_models import CUBE, WIDE, config, row
from user_errors import error_of

from common.errors import UserError
from config.cli import parse_command_line
from config.loading import load_config
from config.schema.diffusion import GenerationConfig
from evaluation.generation.request_file import parse_seeds, read_request_file
from evaluation.generation.requests import list_requests
from evaluation.generation.run import generate

ROOT = Path(__file__).parents[2]
# Latent grids are (z, x, y) at 4x: 32³ voxels, and 64 x 96 x 32 (x y z).
TABLE = [
    row(0, "CT Chest", CUBE, spacing=(1.0, 2.0, 3.0)),
    {"id": 1, "name": "Head", "grids": [CUBE, WIDE], "spacings_mm": [[1, 1, 1], [0.5, 0.5, 2]]},
]


def asked(output_dir: Path = Path("out"), **values) -> list[str]:
    """Requests as SEED/NAME spacing."""
    requests = list_requests(config(Path("none"), output_dir, TABLE, **values))
    assert all(request.voxels[2] == 4 * request.grid[0] for request in requests)
    return [f"{r.path.relative_to(output_dir)} {'x'.join(f'{length:g}' for length in r.spacing_mm)}" for r in requests]


def requests_of(folder: Path, name: str, content: str | bytes, **values) -> list[str]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return asked(requests=str(path), **values)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {},
            [
                "seed_0/CT Chest_32x32x32.nii.gz 1x2x3",
                "seed_0/Head_32x32x32.nii.gz 1x1x1",
                "seed_0/Head_64x96x32.nii.gz 0.5x0.5x2",
            ],
        ),
        ({"class_names": ["CT Chest"], "seed": 4}, ["seed_4/CT Chest_32x32x32.nii.gz 1x2x3"]),
        ({"class_names": ["0"]}, ["seed_0/CT Chest_32x32x32.nii.gz 1x2x3"]),
        (  # z y x in voxels, and x y z in names
            {"class_names": ["0"], "resolution": [32, 64, 96]},
            ["seed_0/CT Chest_96x64x32.nii.gz 1x2x3"],
        ),
        (  # the table's spacing of that very grid
            {"class_names": ["1"], "resolution": [32, 96, 64]},
            ["seed_0/Head_64x96x32.nii.gz 0.5x0.5x2"],
        ),
        (
            {"class_names": ["Head"], "spacing": [2, 3, 4]},
            ["seed_0/Head_32x32x32.nii.gz 2x3x4", "seed_0/Head_64x96x32.nii.gz 2x3x4"],
        ),
        (
            {"class_names": ["Head"], "resolution": [64, 64, 64], "spacing": [2, 3, 4]},
            ["seed_0/Head_64x64x64.nii.gz 2x3x4"],
        ),
        (
            {"class_names": ["0"], "seeds": "8-9,2"},
            [f"seed_{seed}/CT Chest_32x32x32.nii.gz 1x2x3" for seed in (8, 9, 2)],
        ),
    ],
)
def test_options_choose_classes_seeds_and_sizes(values, expected):
    assert asked(**values) == expected


def test_flags_and_overrides_side_by_side():
    line = (
        "--AE-ckpt a --model-ckpt b --output-dir o --classes CTLegs 6 num_samples=2 --resolution 64 128 256 seeds=0-1"
    )
    line += " --spacing 1 1 2.5 --output-dtype int16"
    cfg = parse_command_line(line.split(), GenerationConfig, "generation_8x.yaml", "")
    assert (cfg.class_names, cfg.resolution, cfg.spacing) == (["CTLegs", "6"], [64, 128, 256], [1, 1, 2.5])
    assert (cfg.num_samples, cfg.seeds, cfg.output_dtype, len(cfg.classes)) == (2, "0-1", "int16", 7)
    requests = list_requests(cfg)
    assert [request.path.name for request in requests[::2]] == [
        "CTLegs_256x128x64_0.nii.gz",
        "MRKnee_256x128x64_0.nii.gz",
    ] * 2
    assert requests[0].grid == (8, 32, 16)  # (z, x, y)


def test_list_flag_without_values():
    with pytest.raises(UserError, match="argument --classes: expected at least one argument"):
        parse_command_line(["--classes", "seed=3"], GenerationConfig, None, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_names": ["Hed"]}, r"classes: no class 'Hed', did you mean Head\? .* knows CT Chest \(0\), Head \(1\)"),
        ({"class_names": ["2"]}, r"classes: no class '2'; the config knows"),
        ({"class_names": ["0", "CT Chest"]}, r"classes: CT Chest: asks for .*CT Chest_32x32x32.nii.gz a second time"),
        ({"seeds": "0-9", "seed": 3}, "seeds is 0-9 and seed is 3: give one of them"),
        ({"seeds": "1,0-2"}, r"asks for out/seed_1/CT Chest_32x32x32.nii.gz a second time"),
        ({"requests": "a.csv", "class_names": ["0"]}, "requests and --classes exclude each other: a.csv names"),
        (
            {"resolution": [32, 32, 64]},
            r"Head has several spacings \(1 1 1 or 0.5 0.5 2\) and none for 32 32 64: give --sp",
        ),
        (
            {"resolution": [30, 33, 100]},
            r"resolution 30 33 100 \(z y x\): .* multiples of 32 voxels up to 32736: the nearest is 32 32 96",
        ),
        ({"resolution": [1, 32, 32767]}, "the nearest is 32 32 32736"),
        (
            {"resolution": [32, 32]},
            r"resolution must be three whole numbers above 0 and up to 32,767, z y x in voxels, got \[32, 32\]",
        ),
        ({"resolution": [32, 32, -32]}, "resolution must be three whole numbers above 0"),
        ({"spacing": [1, 1, 0]}, "spacing must be three numbers above 0, x y z in mm"),
        ({"spacing": [1, 1, float("nan")]}, "spacing must be three numbers above 0"),
        ({"spacing": [1, 1, 1000]}, "spacing 1 1 1000: voxels have 0.05 to 20 mm"),
        ({"output_dtype": "int8"}, r"output_dtype must be one of float32 \| int16, got 'int8'"),
        ({"num_samples": 100_000}, "more than 100,000 volumes are asked for"),
    ],
)
def test_wrong_options(values, message):
    with pytest.raises(UserError, match=message) as caught:
        asked(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "seeds"), [("7", (7,)), ("0-2", (0, 1, 2)), ("3, 0 - 1", (3, 0, 1)), ("5-5", (5,))])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[
            (text, "whole numbers or ranges such as 7")
            for text in ("", "-1", "0-", "-", "1.5", "a", "1,,2", "0-1-2", "²")
        ],
        ("9-0", "the range of seeds 9-0 runs backwards: write 0-9"),
        ("0-1000000000", "'0-1000000000' are more than 100,000 seeds"),
        ("0-60000,70000-130000", "more than 100,000 seeds"),
    ],
)
def test_wrong_seeds(text, message):
    with pytest.raises(UserError, match=f"^seeds: .*{re.escape(message)}"):
        asked(seeds=text)


# Sizes of the network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "nearest"), [([8, 16, 16], [16, 16, 16]), ([40, 16, 24], [32, 16, 32]), ([16, 56, 16], [16, 64, 16])]
)
def test_grids_the_network_cannot_do(grid, nearest, tmp_path):
    """Six levels, of which two keep their width, halve the grid four times: multiples of 16. No checkpoint is read."""
    values = {"dim_mults": [1, 1, 2, 2, 2, 2], "use_attn": [0] * 6}
    with pytest.raises(UserError) as error:
        generate(config(tmp_path, tmp_path / "out", [row(0, "Chest", grid)], **values))
    assert str(error.value) == (
        f"classes: Chest: the network cannot do the latent grid {grid}, only multiples of 16: the nearest is {nearest}"
    )
    z, x, y = grid
    with pytest.raises(
        UserError, match=f"multiples of 64 voxels .* {' '.join(str(4 * nearest[i]) for i in (0, 2, 1))}$"
    ):
        generate(
            config(tmp_path, tmp_path / "out", [row(0, "Chest", CUBE)], resolution=[4 * z, 4 * y, 4 * x], **values)
        )


# Lists --------------------------------------------------------------------------------------------------------------

EXPECTED = [
    "seed_0/CT Chest_64x32x32_0.nii.gz 0.7x0.7x1",
    "seed_0/CT Chest_64x32x32_1.nii.gz 0.7x0.7x1",
    "seed_1/CT Chest_64x32x32_0.nii.gz 0.7x0.7x1",
    "seed_1/CT Chest_64x32x32_1.nii.gz 0.7x0.7x1",
    "seed_5/Head_32x32x32.nii.gz 1x1x1",
    "seed_5/Head_64x96x32.nii.gz 0.5x0.5x2",
]
CSV = "class,seed,num_samples,resolution,spacing\nCT Chest,0-1,2,32 32 64,0.7x0.7x1\n\n1,,,,\n"
YAML = """
- {class: CT Chest, seed: 0-1, num_samples: 2, resolution: [32, 32, 64], spacing: 0.7 0.7 1}
- class: 1
  num_samples: null
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.CSV", CSV.replace("\n", "\r\n")),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),  # as Excel saves "CSV UTF-8"
        ("a.csv", CSV.replace(",", ";")),  # as Excel does where the comma is the decimal point
        ("a.csv", CSV.replace(",", "\t").encode("utf-16")),  # as Excel saves "Unicode text"
        (
            "a.csv",
            CSV.replace(",,,,", "").replace("32 32 64", '"32 x 32X64"'.replace("X", "x")).replace("class", "Class"),
        ),
        ("a.yaml", YAML),
        ("a.yml", YAML.replace("[32, 32, 64]", "32x32x64").replace("0.7 0.7 1", "[0.7, 0.7, 1]")),
    ],
)
def test_lists_of_requests(tmp_path, name, content):
    assert requests_of(tmp_path, name, content, seed=5) == EXPECTED


def test_fields_that_are_not_given_come_from_the_options(tmp_path):
    options = {"num_samples": 2, "seeds": "3-4", "spacing": [2, 2, 2], "resolution": [64, 64, 64]}
    assert requests_of(tmp_path, "a.csv", "class,seed\nHead,7\nHead,\n", **options) == [
        f"seed_{seed}/Head_64x64x64_{i}.nii.gz 2x2x2" for seed in (7, 3, 4) for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: the list of requests is empty"),
        ("a.csv", "class,seed\n\n", "a.csv: the list of requests is empty"),
        ("a.yaml", "", "a.yaml: the list of requests is empty"),
        ("a.yaml", "[]", "a.yaml: the list of requests is empty"),
        ("a.txt", "class\nHead\n", r"a.txt: a list of requests has to be named \*.yaml, \*.yml or \*.csv"),
        ("a.csv", b"class\nK\xf6pfe\n", r"a.csv: not UTF-8 text"),
        ("a.csv", 'class\n"Head\n', "a.csv: line 2: cannot be read as CSV"),
        (
            "a.csv",
            "class,sed\nHead,1\n",
            r"line 1: unknown field 'sed', did you mean seed\? the fields are class, seed",
        ),
        ("a.csv", "class,,seed\nHead,,1\n", r"line 1: unknown field ''; the fields"),
        ("a.csv", "seed\n1\n", "line 1: the field class is missing"),
        ("a.csv", "class,class\nHead,Head\n", "line 1: the field class is there twice"),
        ("a.csv", "class,seed\n,3\n", "line 2: the field class is missing"),
        ("a.csv", "class,seed\nHead,1,2\n", "line 2: 3 cells under 2 columns"),
        ("a.csv", "class\nHead\n\nLeg\n", "line 4: no class 'Leg'"),
        ("a.csv", "class,seed\nHead,-1\n", "line 2: seeds have to be whole numbers"),
        ("a.csv", "class,seed\nHead,nan\n", "line 2: seeds have to be whole numbers"),
        ("a.csv", "class,num_samples\nHead,nan\n", "line 2: num_samples has to be a whole number above 0, got 'nan'"),
        ("a.csv", "class,num_samples\nHead,0\n", "line 2: num_samples has to be a whole number above 0, got '0'"),
        ("a.csv", "class,resolution\nHead,32 32\n", "line 2: resolution has to be three whole numbers"),
        ("a.csv", "class,resolution\nHead,32 32 33.5\n", "line 2: resolution has to be three whole numbers"),
        ("a.csv", "class,resolution\nHead,32 32 72\n", r"line 2: resolution 32 32 72 .* the nearest is 32 32 64"),
        ("a.csv", "class,spacing\nHead,1 1 nan\n", "line 2: spacing has to be three numbers above 0"),
        ("a.csv", "class,spacing\nHead,1 1 0\n", "line 2: spacing has to be three numbers above 0"),
        ("a.csv", "class;spacing\nHead;0,7 0,7 1\n", "line 2: spacing has to be three numbers .* decimal points"),
        ("a.csv", "class,spacing\nHead,1 1 300\n", "line 2: spacing 1 1 300: voxels have"),
        (
            "a.csv",
            "class\nHead\n0\nHead\n",
            "line 4: asks for .*Head_32x32x32.nii.gz a second time, after .*line 2: give",
        ),
        (  # under another name
            "a.csv",
            "class,num_samples\nHead,1\nHead,2\n",
            "line 3: asks for .*Head_32x32x32_0.nii.gz a second time, after .*line 2: give",
        ),
        ("a.yaml", "class: Head", "a list of entries is needed"),
        ("a.yaml", "- Head", "entry 1: has to be fields"),
        ("a.yaml", "- [", "cannot be read as YAML"),
        ("a.yaml", "- {class: Head}\n- {clas: Head}", r"entry 2: unknown field 'clas', did you mean class\?"),
        ("a.yaml", "- {class: null}", "entry 1: the field class is missing"),
        ("a.yaml", "- {class: true}", "entry 1: no class 'true'"),
        ("a.yaml", "- {class: [Head]}", "entry 1: class has to be a name or an id"),
        ("a.yaml", "- {class: Head, class: Head}", "the field class is there twice"),
        ("a.yaml", "- {class: Head, seed: 1:30}", "entry 1: seeds have to be whole numbers"),
        ("a.yaml", "- {class: Head, seed: 1.5}", "entry 1: seeds have to be whole numbers"),
        ("a.yaml", "- {class: Head, num_samples: true}", "entry 1: num_samples has to be a whole number"),
        ("a.yaml", "- {class: Head, spacing: [1, 1, .nan]}", "entry 1: spacing has to be three numbers"),
        ("a.yaml", "- {class: Head, resolution: {a: 1}}", "entry 1: resolution has to be three whole numbers"),
        ("a.yaml", "- {class: Head, attributes: {../x: 1}}", "entry 1: attributes are given as age=63"),
        (
            "a.yaml",
            f"- {{class: Head, attributes: {{a: {'1' * 90}}}}}",
            "entry 1: attributes of 93 characters",
        ),
        ("a.yaml", "- {class: Head, ? [a]: 1}", "cannot be read as YAML: .* unhashable"),
        (
            "a.yaml",
            f"- {{class: Head, resolution: {'x' * 1001}}}",
            "entry 1: resolution has more than 1,000 char",
        ),
        (
            "a.yaml",
            "- {class: Head, seed: 0-59999}\n- {class: Head, num_samples: 40001}",
            "entry 2: more than 100,000 v",
        ),
    ],
)
def test_wrong_lists(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        requests_of(tmp_path, name, content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_lists_that_explode(tmp_path):
    doubled = "".join(f"- &b{i + 1} [*b{i}, *b{i}]\n" for i in range(40))
    assert "more than 200,000 values" in error_of(requests_of, tmp_path, "a.yaml", "- &b0 [x]\n" + doubled)
    assert "more than 4 MB" in error_of(requests_of, tmp_path, "a.csv", "class\n" + "Head\n" * 10**6)


def test_lists_of_the_documentation(tmp_path):
    """Both forms ask for the same, of the classes of the paper; the table of one's own classes loads."""
    blocks = dict(
        re.findall(r"```(yaml|csv)\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), flags=re.DOTALL)
    )
    names = []
    for suffix, block in blocks.items():
        path = tmp_path / f"list.{suffix}"
        path.write_text(block)
        line = f"--AE-ckpt a --model-ckpt b --output-dir out --requests {path}"
        cfg = parse_command_line(line.split(), GenerationConfig, "generation_8x.yaml", "")
        names.append([request.path for request in list_requests(cfg)])
    assert names[0] == names[1]
    assert [len(names[0]), names[0][0].name] == [32, "CTLegs_256x256x512.nii.gz"]
    table = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), flags=re.DOTALL)[0]
    (tmp_path / "own.yaml").write_text(table)
    assert len(load_config(GenerationConfig, tmp_path / "own.yaml").classes) == 2


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none.csv: no such list of requests"):
        read_request_file(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder.csv: cannot be read"):
        read_request_file(tmp_path / "folder.csv")


def test_numbers_of_a_yaml_list_are_what_they_look_like(tmp_path):
    """YAML itself would read 010 as 8."""
    (tmp_path / "a.yaml").write_text("- {class: 0, seed: 010, num_samples: 012}\n")
    (entry,) = read_request_file(tmp_path / "a.yaml")
    assert (entry.class_key, entry.seeds, entry.num_samples) == ("0", (10,), 12)


@pytest.mark.parametrize("spacing", [[float("inf"), 1, 1], [100, 1, 1]])
def test_spacings_of_the_table_are_checked(tmp_path, spacing):
    with pytest.raises(UserError, match=r"classes: Head: spacing .* voxels have 0.05 to 20 mm"):
        list_requests(config(tmp_path, tmp_path, [row(0, "Head", CUBE, spacing=spacing)]))


def test_names_have_room_for_what_comes_to_them(tmp_path):
    with pytest.raises(UserError, match="a name that a file can have, of at most 150 bytes"):
        config(tmp_path, tmp_path, [row(0, "x" * 151, CUBE)])

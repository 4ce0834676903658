"""Composing, typing and saving configurations: shipped files, users' own, overrides."""

import logging
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from user_errors import error_of

from common.errors import UserError
from config.loading import CONFIG_FOLDER, load_config, save_config
from config.schema.autoencoder import AutoencoderConfig
from config.schema.control import ControlledGenerationConfig, ControlNetConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetConfig, BiFlowNetMultiresConfig, GenerationConfig
from config.schema.evaluation import RecipeStudyConfig
from config.write_base_files import BASE_FILES

SCHEMAS = {
    "ControlNet": ControlNetConfig,
    "controlled": ControlledGenerationConfig,
    "base_cfg": AutoencoderConfig,
    "PatchVolume": AutoencoderConfig,
}
SCHEMAS |= {"BiFlowNet_multires": BiFlowNetMultiresConfig, "BiFlowNet": BiFlowNetConfig}  # the first that fits
SCHEMAS |= {"diffusion_demo": RecipeStudyConfig, "autoencoder_demo": RecipeStudyConfig}
SCHEMAS |= {"generation": GenerationConfig, "classes": PreprocessConfig, "preprocess": PreprocessConfig}
SHIPPED = sorted(CONFIG_FOLDER.rglob("*.yaml"))

# All keys that published autoencoder configs have, without a defaults list.
OFFICIAL_YAML = """
model:
  seed: 1234
  batch_size: 2
  num_workers: 8
  gpus: 1
  max_steps: 1e6
  max_epochs: 10000
  lr: 3e-4
  default_root_dir: /runs/ae
  resume_from_checkpoint:
  precision: bf16
  discriminator_iter_start: 12000
  perceptual_3d: False
  embedding_dim: 8
  n_codes: 8192
  n_hiddens: 48
  downsample: [4, 4, 4]
  disc_channels: 32
  disc_layers: 3
  disc_loss_type: hinge
  volume_gan_weight: 2
  l1_weight: 4
  gan_feat_weight: 4
  perceptual_weight: 2
  i3d_feat: False
  restart_thres: 1.0
  no_random_restart: False
  norm_type: group
  num_groups: 24
  stage: 1
dataset:
  root_dir: /data/PatchVolume_data.json
  image_channels: 1
  imgtype: CT
  patch_size: 64
"""

# (file, batch_size, precision, lr, discriminator_iter_start, downsample, stage)
AUTOENCODER_VALUES = [
    ("PatchVolume_8x", 24, "32", 3e-4, 20000, 8, 1),
    ("PatchVolume_8x_s2", 1, "32", 3e-5, 0, 8, 2),
    ("PatchVolume_4x", 16, "bf16", 3e-4, 12000, 4, 1),
    ("PatchVolume_4x_s2", 1, "bf16", 3e-4, 0, 4, 2),
]

# id: (name, grids at 8x, spacings)
CLASS_TABLE = {
    0: ("CTHeadNeck", [[32, 32, 32], [16, 32, 32]], [[1, 1, 1], [1, 1, 1]]),
    1: ("CTChestAbdomen", [[32, 32, 32], [64, 64, 64]], [[1.25, 1.25, 1.25], [0.7, 0.7, 1]]),
    2: ("CTLegs", [[32, 32, 32], [64, 32, 32]], [[1.25, 1.25, 1.25], [1.25, 1.25, 1.25]]),
    3: ("MRT1Brain", [[24, 24, 24]], [[1, 1, 1]]),
    4: ("MRT2Brain", [[24, 24, 24]], [[1, 1, 1]]),
    5: ("MRAbdomen", [[16, 32, 32]], [[1.2, 1.2, 2]]),
    6: ("MRKnee", [[8, 40, 40]], [[1, 1, 1]]),
}


def schema_of(path: Path) -> type:
    return next(schema for start, schema in SCHEMAS.items() if path.stem.startswith(start))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# --------------------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIG_FOLDER)))
def test_every_shipped_config_composes_and_validates(path):
    cfg = load_config(schema_of(path), path)
    assert set(cfg) == set(load_config(schema_of(path), None))


@pytest.mark.parametrize("name", ["base_cfg", "BiFlowNet_base", "generation_base", "preprocess"])
def test_base_files_hold_every_key_with_its_default_and_a_comment(name):
    path = CONFIG_FOLDER / f"{name}.yaml"
    schema = schema_of(path)
    written, defaults = OmegaConf.load(path), load_config(schema, None)
    if schema is PreprocessConfig:  # its class table is that of generation
        written = OmegaConf.merge(OmegaConf.load(CONFIG_FOLDER / "classes_8x.yaml"), written)
        del written["defaults"]
        defaults = load_config(schema, CONFIG_FOLDER / "classes_8x.yaml")
    assert load_config(schema, path) == defaults
    for section in ("model", "dataset") if schema is AutoencoderConfig else ("",):
        pick = (lambda cfg, section=section: cfg[section]) if section else (lambda cfg: cfg)
        assert set(pick(written)) == set(pick(defaults))
    values = [line for line in path.read_text().splitlines() if ": " in line and not line.strip().startswith("#")]
    assert [line for line in values if "#" not in line] == []


@pytest.mark.parametrize("base", BASE_FILES, ids=lambda base: base.name)
def test_base_files_are_those_of_the_schema(base):
    written = (CONFIG_FOLDER / base.name).read_text()
    assert written == base.text(), "python -m config.write_base_files"
    assert max(map(len, written.splitlines())) <= 120


@pytest.mark.parametrize(("name", "batch_size", "precision", "lr", "start", "downsample", "stage"), AUTOENCODER_VALUES)
def test_autoencoder_values(name, batch_size, precision, lr, start, downsample, stage):
    model = load_config(AutoencoderConfig, CONFIG_FOLDER / f"{name}.yaml").model
    found = (model.batch_size, model.precision, model.lr, model.discriminator_iter_start, model.downsample, model.stage)
    assert found == (batch_size, precision, lr, start, [downsample] * 3, stage)


@pytest.mark.parametrize(("name", "patch_size", "edge"), [("BiFlowNet_8x", 1, 32), ("BiFlowNet_4x", 2, 64)])
def test_biflownet_values(name, patch_size, edge):
    cfg = load_config(BiFlowNetConfig, CONFIG_FOLDER / f"{name}.yaml")
    assert (cfg.patch_size, cfg.resolution) == (patch_size, [edge] * 3)
    assert (cfg.lr, cfg.ema_decay, cfg.ema_every, cfg.ema_start, cfg.keep_checkpoints) == (1e-4, 0.995, 10, 2000, 6)


@pytest.mark.parametrize(("name", "factor"), [("generation_8x", 1), ("generation_4x", 2)])
def test_class_table(name, factor):
    cfg = load_config(GenerationConfig, CONFIG_FOLDER / f"{name}.yaml")
    assert (cfg.patch_size, cfg.downsample, cfg.max_single_pass) == (factor, 8 // factor, 32 * factor)
    table = {row.id: (row.name, list(row.grids), list(row.spacings_mm)) for row in cfg.classes}
    assert all(row.modality == row.name[:2] for row in cfg.classes)
    scaled = {
        class_id: (label, [[size * factor for size in grid] for grid in grids], spacings)
        for class_id, (label, grids, spacings) in CLASS_TABLE.items()
    }
    assert table == scaled


# --------------------------------------------------------------------------------------------------- loading


TABLE = """
downsample: 4
classes:
  - {id: 0, name: MRHip, modality: MR, grids: [[32, 32, 32]], spacings_mm: [[1, 1, 1]]}
"""


@pytest.mark.parametrize(("schema", "base"), [(PreprocessConfig, "preprocess"), (GenerationConfig, "generation_8x")])
def test_one_class_table_serves_preprocessing_and_generation(tmp_path, schema, base):
    (tmp_path / "mine.yaml").write_text(TABLE)
    table = {"class_table": str(tmp_path / "mine.yaml")}
    cfg = load_config(schema, CONFIG_FOLDER / f"{base}.yaml", values=table)
    assert (cfg.downsample, [row.name for row in cfg.classes]) == (4, ["MRHip"])
    assert load_config(schema, CONFIG_FOLDER / f"{base}.yaml", ["downsample=8"], table).downsample == 8
    for text, message in (("downsample: 4", "there is no classes"), (TABLE + "seed: 1", "nothing else, found seed")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError, match=f"class_table: .*mine.yaml.*{message}"):
            load_config(schema, CONFIG_FOLDER / f"{base}.yaml", values=table)


def test_complete_official_yaml_loads(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load_config(
            AutoencoderConfig, write(tmp_path, "PatchVolume_4x.yaml", OFFICIAL_YAML), ["model.batch_size=3"]
        )
    assert "model.i3d_feat" in caplog.text
    assert "i3d_feat" not in cfg.model
    assert (cfg.model.max_steps, cfg.model.precision, cfg.model.batch_size) == (1_000_000, "bf16", 3)
    assert cfg.model.resume_from_checkpoint is None
    assert cfg.model.adam_betas == [0.5, 0.9]  # a key that official files do not have


def test_user_file_anywhere_builds_on_ours(tmp_path):
    write(tmp_path, "mine.yaml", "defaults: [PatchVolume_4x, _self_]\nmodel: {lr: 1e-3}\n")
    deep = write(tmp_path, "a b/odd=name.yaml", "defaults: [/PatchVolume_4x_s2, _self_]\nmodel: {batch_size: 5}\n")
    mine = load_config(AutoencoderConfig, tmp_path / "mine.yaml").model
    assert (mine.lr, mine.downsample, mine.discriminator_iter_start) == (1e-3, [4, 4, 4], 12000)
    model = load_config(AutoencoderConfig, deep).model
    assert (model.batch_size, model.stage) == (5, 2)


def test_folders_may_have_any_name_and_files_may_be_links(tmp_path, monkeypatch):
    ours = tmp_path / "o'b c, [x]=$y" / "config"
    shutil.copytree(CONFIG_FOLDER, ours)
    monkeypatch.setattr("config.loading.CONFIG_FOLDER", ours)
    write(tmp_path, "other.yaml", "defaults: [PatchVolume_4x, _self_]\n")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.yaml").symlink_to("../other.yaml")
    assert load_config(AutoencoderConfig, tmp_path / "links" / "link.yaml").model.batch_size == 16


def test_result_is_closed_plain_and_resolved(tmp_path):
    text = "dataset: {root_dir: '${model.default_root_dir}/x.json'}\nmodel: {default_root_dir: /d}\n"
    cfg = load_config(AutoencoderConfig, write(tmp_path, "x.yaml", text))
    assert OmegaConf.to_container(cfg, resolve=False)["dataset"]["root_dir"] == "/d/x.json"
    assert OmegaConf.get_type(cfg.model) is dict  # so that checkpoints hold no type of ours
    with pytest.raises(AttributeError):
        cfg.model.batchsize = 1


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.lr=1e-5", "model.lr", 1e-5),
        ("model.max_steps=2e3", "model.max_steps", 2000),
        ("+model.val_every=10", "model.val_every", 10),
        ("model.val_every=null", "model.val_every", None),
        ("model.downsample=[4,4,4]", "model.downsample", [4, 4, 4]),
        ("dataset.augmentation=false", "dataset.augmentation", False),
        ("model.precision=16", "model.precision", "16"),
        ("dataset.cache=none", "dataset.cache", "none"),
        (
            "model.resume_from_checkpoint=a b/epoch=3-step=5.ckpt",
            "model.resume_from_checkpoint",
            "a b/epoch=3-step=5.ckpt",
        ),
        ("dataset.root_dir=a,b.json", "dataset.root_dir", "a,b.json"),
        ("dataset.root_dir=1e3", "dataset.root_dir", "1e3"),
        ("dataset.root_dir='a b'", "dataset.root_dir", "a b"),
        ('dataset.root_dir="[a]"', "dataset.root_dir", "[a]"),
        (r"dataset.root_dir=epoch\=3\,5.json", "dataset.root_dir", "epoch=3,5.json"),  # as Hydra's grammar wants it
        ("dataset.root_dir=${model.norm_type}.json", "dataset.root_dir", "group.json"),
        ("dataset.subject_pattern=[0-9]", "dataset.subject_pattern", "[0-9]"),
        (r"dataset.subject_pattern=\[", "dataset.subject_pattern", r"\["),
        (r"dataset.subject_pattern=sub\(\d+\)", "dataset.subject_pattern", r"sub\(\d+\)"),
        ("dataset.subject_pattern= s.b ", "dataset.subject_pattern", " s.b "),
        (r"dataset.subject_pattern=\\=", "dataset.subject_pattern", r"\\="),
        ("dataset.subject_pattern='a'|'b'", "dataset.subject_pattern", "'a'|'b'"),
        ("dataset.subject_pattern=", "dataset.subject_pattern", ""),
        ("dataset.subject_pattern=null", "dataset.subject_pattern", None),
        ("dataset.subject_pattern='null'", "dataset.subject_pattern", "null"),
    ],
)
def test_overrides(override, key, value):
    assert OmegaConf.select(load_config(AutoencoderConfig, CONFIG_FOLDER / "base_cfg.yaml", [override]), key) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_hidens: 8, lrr: 1}", r"x.yaml: unknown key model.n_hidens, did you mean model.n_hiddens\?; .*lrr"),
        ("lr: 1", r"unknown key lr, did you mean model.lr\?"),
        ("model: {patch_size: 64}", r"unknown key model.patch_size, did you mean dataset.patch_size\?"),
        ("datset: {}", r"unknown key datset, did you mean dataset\?"),
        ("zzz: 1", r"unknown key zzz$"),
        ("model: {batch_size: many}", r"model.batch_size must be a whole number, got 'many'"),
        ("model: {batch_size: 1.5}", r"model.batch_size must be a whole number, got 1.5"),
        ("model: {downsample: 8}", r"model.downsample must be a list, each item a whole number, got 8"),
        ("model: {val_every: x}", r"model.val_every must be a whole number or null, got 'x'"),
        ("dataset: {augmentation: maybe}", r"dataset.augmentation must be true or false, got 'maybe'"),
        ("dataset: 3", r"dataset must be a section with keys, got 3"),
        ("- 1", r"x.yaml: cannot be read as a config: .*"),
        ("model: [1", r"x.yaml: cannot be read as a config: .*"),
        ("defaults: [nowhere, _self_]", r"x.yaml: defaults: there is no nowhere.yaml in "),
        ("defaults: [x]", r"x.yaml: defaults: x is named a second time, or names this file"),
        ("defaults: [base_cfg, PatchVolume_4x]", r"PatchVolume_4x.yaml: defaults: base_cfg is named a second time"),
        ("defaults: {group: x}", r"x.yaml: defaults must be a list of names of config files and _self_, found {'gr"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = write(tmp_path, "x.yaml", text)
    with pytest.raises(UserError, match=message):
        load_config(AutoencoderConfig, path)
    error_of(load_config, AutoencoderConfig, path)


EXPLODING = {
    "aliases": (
        "a: &b0 [1]\n" + "".join(f"b{i}: &b{i + 1} [*b{i}, *b{i}]\n" for i in range(40)),
        "more than 20,000 val",
    ),
    "merges": (
        "a: &b0 {k: 1}\n" + "".join(f"b{i}: &b{i + 1} {{<<: [*b{i}, *b{i}]}}\n" for i in range(40)),
        "more than 20,",
    ),
    "loop": ("a: &a [*a]", r"the alias \*a stands for nothing that ends before it"),
    "levels": ("a: &b0 [1]\n" + "".join(f"b{i}: &b{i + 1} [*b{i}]\n" for i in range(200)), "more than 100 levels"),
    "brackets": ("[" * 100_000, "more than 100 levels"),
    "digits": ("model: {seed: " + "9" * 5000 + "}", "a number of more than 100 digits"),
    "characters": (
        "model: {imgtype: " + "x" * 10_001 + "}",
        "a value of 10,001 characters, expected at most 10,000: 'x",
    ),
    "bytes": ("#" * 2**20 + "\n", "more than 1 MB"),
    "half": ('model: {imgtype: "\\ud800"}', r"half a character in '\\ud800'"),
    "interpolations": ("a: '" + "${b}" * 21 + "'", "has 21 interpolations .*, at most 20"),
    "text": ("'0'", "expected keys with values, found a single text"),
    "keys": ("{" + ",".join(f"k{i}: 1" for i in range(9999)) + "}", "unknown key k0; .*k7; …$"),
}


@pytest.mark.parametrize(("text", "message"), EXPLODING.values(), ids=EXPLODING)
def test_exploding_files(tmp_path, text, message):
    found = error_of(load_config, AutoencoderConfig, write(tmp_path, "x.yaml", text))
    assert re.search(rf"x.yaml: (cannot be read as a config: )?{message}", found)
    assert len(found) < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lrr=1", r"unknown key model.lrr, did you mean model.lr\?"),
        ("model.lr=" + "9" * 400, "model.lr must be a number, got 9"),
        ("dataset.intensity_range=${model.lr}", "interpolations: dataset.intensity_range must be a list"),
        ("model.lr=fast", r"model.lr must be a number, got 'fast'"),
        ("model.lr", r"expected key=value"),
        ("~model.lr", r"expected key=value"),
        ("model.downsample=[8", r"override 'model.downsample=\[8': expected key=value"),
        ("model.batch_size=1,2", r"several values at once are not supported"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(UserError, match=message):
        load_config(AutoencoderConfig, None, [override])
    error_of(load_config, AutoencoderConfig, None, [override])


def test_files_in_other_encodings(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes("model: {batch_size: 7}  # ü".encode("utf-8-sig"))
    assert load_config(AutoencoderConfig, path).model.batch_size == 7
    path.write_bytes("model: {batch_size: 7}  # ü".encode("utf-16"))
    assert load_config(AutoencoderConfig, path).model.batch_size == 7
    path.write_bytes("model: {batch_size: 7}  # ü".encode("latin-1"))
    assert "x.yaml: cannot be read as a config: not text in UTF-8: save it as UTF-8" in error_of(
        load_config, AutoencoderConfig, path
    )


def test_missing_and_misnamed_files(tmp_path):
    assert "no such config file; config/ has" in error_of(load_config, AutoencoderConfig, tmp_path / "none.yaml")
    assert "must be named *.yaml" in error_of(load_config, AutoencoderConfig, write(tmp_path, "x.txt", "model: {}"))


# ---------------------------------------------------------------------------------------------------- saving


def test_saved_config_loads_again(tmp_path):
    cfg = load_config(AutoencoderConfig, CONFIG_FOLDER / "PatchVolume_4x_s2.yaml", ["model.lr=1e-5"])
    path = save_config(cfg, tmp_path / "run")
    assert (path, [file.name for file in path.parent.iterdir()]) == (tmp_path / "run/config.yaml", ["config.yaml"])
    assert load_config(AutoencoderConfig, path) == cfg


def test_saving_where_no_folder_can_be(tmp_path):
    assert "cannot be saved" in error_of(save_config, OmegaConf.create({}), write(tmp_path, "file", ""))

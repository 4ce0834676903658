"""Every command in the README and docs/{evaluation,data}.md runs as written, in a copy of the tree, on made-up data.

What the test adds: overrides at the end that make models, volumes and runs tiny. What it
changes on the way is listed in `adapted`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series
from hub_cache import put_into_cache

from dataset.preparation.manifest import read_manifest
from train.export import main as export

ROOT = Path(__file__).parents[1]
TINY_AUTOENCODER = (
    "model.n_hiddens=8 model.num_groups=4 model.embedding_dim=4 model.n_codes=32 model.disc_channels=4 "
    "model.batch_size=2 model.num_workers=0 model.max_steps=2 model.val_every=2 model.perceptual_weight=0 "
    "dataset.patch_size=16"
).split()
TINY_DIFFUSION = (
    "volume_channels=4 model_dim=24 dim_mults=[1,1,2] use_attn=[0,0,0] resnet_groups=8 dit_num_heads=4"
).split()
EVALUATION = "--num-workers 0 --device cpu --num-resamples 20 --num-halvings 2".split()
# script -> what makes it tiny
ADDED = {
    "reconstruction.py": EVALUATION[:6],
    "generation_metrics.py": [*EVALUATION, "--slices", "2", "--num-pairs", "3", "--ignore-spacing"],
    "validity.py": [*EVALUATION, "--slices", "2", "--num-pairs", "3"],
    "report.py": [],
    "preprocess.py": "--size 64 64 64 --spacing 2 2 2 --validation 0.1 --held-out 0.6".split(),
    "split.py": "--validation 0.1 --held-out 0.6".split(),
    "check.py": [],
    "phantoms.py": ["--num-held-out", "6", "--size", "64"],
    "train_PatchVolume.py": TINY_AUTOENCODER,
    "train_PatchVolume_stage2.py": [*TINY_AUTOENCODER, "model.batch_size=1"],
    "generate_training_latent.py": ["--num-workers", "0", "--device", "cpu"],
    "train_BiFlowNet_SingleRes.py": [*TINY_DIFFUSION, "batch_size=1", "max_steps=2", "num_workers=0", "device=cpu"],
    "class_conditional_generation.py": [
        *TINY_DIFFUSION,
        "device=cpu",
        "classes=[{id: 1, name: CTChestAbdomen, grids: [[8, 8, 8]], spacings_mm: [[1, 1, 1]]}]",
    ],
}


def commands_of(document: str) -> list[str]:
    """The lines of all bash blocks, continuation lines joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [command for command in commands if command]


def adapted(command: str) -> list[str]:
    """The command's words for this machine: its interpreter, two processes, fewer phantoms, the grid of 64³ at 8x."""
    if command.startswith("echo "):
        return ["sh", "-c", command.replace("192x192x192", "64x64x64")]
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
        words[words.index("--nproc-per-node") + 1] = "2"
        if "--resolution" in words:
            position = words.index("--resolution")
            words[position + 1 : position + 4] = ["8", "8", "8"]
    elif "--resolution" in words:
        position = words.index("--resolution")
        words[position + 1 : position + 4] = ["64", "64", "64"]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1-2"
    if "--num-per-class" in words:
        words[words.index("--num-per-class") + 1] = "3"
    if "--ddim_steps" in words:
        words[words.index("--ddim_steps") + 1] = "2"
    words = [re.sub(r"BiFlowNet_\d{7}\.pt", "BiFlowNet_0000002.pt", word) for word in words]
    script = next(Path(word).name for word in words if word.endswith(".py"))
    return [sys.executable, *words[1:], *ADDED[script]]


def run_all(commands: list[str], tree: Path, allowed: frozenset[int] = frozenset()) -> dict[str, str]:
    """Runs the commands one after the other and returns what each said. allowed: exit statuses besides 0."""
    said = {}
    for command in commands:
        done = subprocess.run(
            adapted(command),
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        said[command] = done.stdout + done.stderr
        assert done.returncode in {0, *allowed}, f"{command}\n{said[command]}"
    return said


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the project with raw/ct and raw/mr of the same ten patients, as scanners export them."""
    for name in ("AutoEncoder", "common", "config", "dataset", "ddpm", "evaluation", "train"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 44)] * 3, indexing="ij"))
    for i in range(10):
        rng = np.random.default_rng(i)
        body = (grid[0] ** 2 + grid[1] ** 2 / 0.6 + grid[2] ** 2 / 2 < 0.7) * 1.0
        ct = np.round(1050 * body - 1000 + rng.normal(size=body.shape) * 8).clip(-1024)
        mr = np.round(300 * body + 100 * body * grid[1] + rng.uniform(0, 20, body.shape))
        folder = tmp_path / "raw" / "ct" / f"patient{i}"
        write_series(folder, ct, spacing_mm=(3, 3, 2.5), number=2, description="Thorax 2.5 B30f")
        write_series(folder, ct[..., :1], number=1, description="Topogram", prefix="t")
        folder = tmp_path / "raw" / "mr" / f"patient{i}"
        write_series(
            folder, mr, modality="MR", intercept=0, number=3, description="t1_mprage_sag", spacing_mm=(3, 3, 3)
        )
        write_series(folder, 400 - mr, modality="MR", intercept=0, number=4, description="t2_tse", prefix="t2")
    return tmp_path


def test_the_readme_runs_from_top_to_bottom(tree, monkeypatch):
    published, *commands = [command for command in commands_of("README.md") if not command.startswith("make ")]
    assert len(commands) == 12
    run_all(commands, tree)
    assert published.count("hf://OWNER/NAME/") == 2  # here what has just been trained, as a cache has it
    trained = ["PatchVolume_8x_s2/checkpoints/last.ckpt", "000-BiFlowNet/checkpoints/BiFlowNet_0000002.pt"]
    files = [str(tree / "results" / name) for name in trained]
    export(["--ckpt", *files, "--output-dir", str(tree / "exported"), "--licence", "cc0-1.0"])
    put_into_cache(tree / "hub", "OWNER/NAME", *(tree / "exported").glob("*.safetensors"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tree / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_all([published], tree)
    assert list((tree / "volumes").rglob("CTChestAbdomen*.nii.gz"))
    (library,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", library], cwd=tree, check=True)
    assert (tree / "decoded.nii.gz").is_file()  # its voxels: tests/AutoEncoder/test_encoding.py
    assert len(read_manifest(tree / "data" / "CTChestAbdomen" / "64x64x64")) == 10
    made = sorted(str(path.relative_to(tree / "generated")) for path in (tree / "generated").rglob("*.nii.gz"))
    assert made == ["seed_0/CTChestAbdomen_64x64x64.nii.gz"] + [
        f"seed_{seed}/CTChestAbdomen_64x64x64_{i}.nii.gz" for seed in (1, 2) for i in (0, 1)
    ]
    page = (tree / "evaluated" / "report.html").read_text()
    assert all(part in page for part in ("FID-3D", "PSNR", "nearer than held-out", "CTChestAbdomen"))

    commands = commands_of("docs/evaluation.md")
    assert len(commands) == 2
    said = run_all(commands, tree, allowed={1})  # an autoencoder of two steps fails a check of validity.py
    assert "other is farther" not in said[commands[0]]
    assert "more noise is farther" in said[commands[0]]
    assert "figures in evaluated/generation.json" in said[commands[1]]


def test_the_worked_example_runs_from_dicom_to_training(tree):
    commands = commands_of("docs/data.md")
    assert len(commands) == 12
    said = run_all(commands, tree)
    assert "t1_mprage_sag" in said[commands[1]]
    for name, scale in (("CTChestAbdomen", (-1000, 1000)), ("MRT1Brain", None)):
        entries = read_manifest(tree / "data" / name / "64x64x64").values()
        assert len(entries) == 10
        for entry in entries:
            assert entry["size"] == [64, 64, 64]
            assert (entry["intensity"]["low"], entry["intensity"]["high"]) == scale or scale is None
    assert (tree / "data" / "PatchVolume_data_check.png").is_file()
    split = json.loads((tree / "results" / "PatchVolume_8x" / "split.json").read_text())["files"]
    sides = {side: {file.split("/")[0] for name in split for file in split[name][side]} for side in split["MRT1Brain"]}
    subjects = json.loads((tree / "data" / "split.json").read_text())["subjects"]
    assert sorted(subjects.values()) == ["held_out"] * 6 + ["training"] * 3 + ["validation"]
    assert sides == {side: {s for s, of in subjects.items() if of == side} for side in ("training", "validation")}
    assert list((tree / "results").glob("000-BiFlowNet/checkpoints/BiFlowNet_0000002.pt"))


def test_make_targets_of_the_readme_exist():
    targets = [command.split()[1] for command in commands_of("README.md") if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in [*targets, "help", "demo-short", "test-slow", "lint", "format", "setup"]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) > 6
    assert all(f"make {target}" in shown for target in targets)

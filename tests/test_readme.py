"""Every command in the README runs as written, in a copy of the tree, on phantoms.

What the test adds: overrides at the end that make models and runs tiny, and fewer processes than eight. What it changes
on the way is listed in `adapted`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY_AUTOENCODER = (
    "model.n_hiddens=8 model.num_groups=4 model.embedding_dim=4 model.n_codes=32 model.disc_channels=4 "
    "model.batch_size=2 model.num_workers=0 model.max_steps=2 model.val_every=2 model.perceptual_weight=0 "
    "dataset.patch_size=16"
).split()
TINY_DIFFUSION = (
    "volume_channels=4 model_dim=24 dim_mults=[1,1,2] use_attn=[0,0,0] resnet_groups=8 dit_num_heads=4 num_classes=2"
).split()
# script -> what makes it tiny
ADDED = {
    "phantoms.py": ["--num-held-out", "1", "--size", "64"],
    "train_PatchVolume.py": TINY_AUTOENCODER,
    "train_PatchVolume_stage2.py": [*TINY_AUTOENCODER, "model.batch_size=1"],
    "generate_training_latent.py": ["--num-workers", "0", "--device", "cpu"],
    "train_BiFlowNet_SingleRes.py": [*TINY_DIFFUSION, "batch_size=1", "max_steps=2", "num_workers=0", "device=cpu"],
    "class_conditional_generation.py": [
        *TINY_DIFFUSION,
        "device=cpu",
        "classes=[{id: 0, name: CTChest, grids: [[8, 8, 8]], spacings_mm: [[1, 1, 1]]}]",
    ],
}


def readme_commands() -> list[str]:
    """The lines of all bash blocks, continuation lines joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [command for command in commands if command]


def adapted(command: str) -> list[str]:
    """The command's words for this machine: its interpreter, two processes, fewer phantoms, the grid of 64³ at 8x."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
        words[words.index("--nproc-per-node") + 1] = "2"
        position = words.index("--resolution")
        words[position + 1 : position + 4] = ["8", "8", "8"]
    if "--num-per-class" in words:
        words[words.index("--num-per-class") + 1] = "3"
    if "--ddim_steps" in words:
        words[words.index("--ddim_steps") + 1] = "2"
    words = [re.sub(r"BiFlowNet_\d{7}\.pt", "BiFlowNet_0000002.pt", word) for word in words]
    script = next(Path(word).name for word in words if word.endswith(".py"))
    return [sys.executable, *words[1:], *ADDED[script]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project in which the JSON files of the examples name the phantoms."""
    tree = tmp_path_factory.mktemp("readme")
    for name in ("AutoEncoder", "config", "dataset", "ddpm", "evaluation", "train"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tree / "data" / "phantoms"
    contents = {
        "PatchVolume_data.json": {name: f"{folder / name}" for name in ("CTChest", "MRBrain")},
        "Singleres_dataset.json": {"0": f"{folder / 'CTChest'}", "1": f"{folder / 'MRBrain'}"},
        "Singleres_latents.json": {"0": f"{folder / 'CTChest_latents'}", "1": f"{folder / 'MRBrain_latents'}"},
    }
    for name, content in contents.items():
        (tree / "config" / name).write_text(json.dumps(content))
    return tree


def test_the_readme_runs_from_top_to_bottom(tree):
    commands = [command for command in readme_commands() if not command.startswith("make ")]
    assert len(commands) == 6
    for command in commands:
        done = subprocess.run(
            adapted(command),
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (volume,) = (tree / "generated" / "seed_0").glob("*.nii.gz")
    assert volume.name == "CTChest_64x64x64.nii.gz"


def test_make_targets_of_the_readme_exist():
    targets = [command.split()[1] for command in readme_commands() if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in [*targets, "help", "demo-short", "test-slow", "lint", "format", "setup"]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) > 6
    assert all(f"make {target}" in shown for target in targets)

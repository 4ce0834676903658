"""The tree itself: which package may import which, what importing does, and what the documents say."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"AutoEncoder", "common", "config", "dataset", "ddpm", "evaluation", "train"}
MODEL_LIBRARIES = {"torch", "einops", "timm", "omegaconf", "pytorch_lightning", "numpy"}
MAY_IMPORT = {
    "common": {"common"},
    "AutoEncoder": {"AutoEncoder", "common"},
    "ddpm": {"common", "ddpm"},
    "config": {"common", "config"},
    "dataset": {"common", "config", "dataset"},  # config: see test_data_sets_know_nothing_of_config
    "train": OURS - {"evaluation"},
    "evaluation": OURS - {"train"},
    "evaluation/benchmarks": OURS,  # they time what training does
}
SCRIPTS = sorted(
    path
    for package in ("dataset", "train", "evaluation")
    for path in (ROOT / package).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """First parts of the names of all modules that a file imports; optionally those at module level alone."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    rooms = [room for room in MAY_IMPORT if room.startswith(f"{package}/")]  # with rules of their own
    for path in sources(package):
        if not any(path.is_relative_to(ROOT / room) for room in rooms):
            assert imported(path) & OURS <= MAY_IMPORT[package], path


def test_data_sets_know_nothing_of_config():
    """The scripts among them have a command line."""
    for path in sources("dataset"):
        modules = re.findall(r"^from (config[\w.]*) import", path.read_text(), flags=re.MULTILINE)
        command_line = {"config.cli", "config.loading", "config.schema.data"} if path in SCRIPTS else set()
        assert set(modules) <= command_line, path


@pytest.mark.parametrize("package", ["AutoEncoder", "ddpm"])
def test_models_import_without_the_imaging_libraries(package):
    allowed = MODEL_LIBRARIES | MAY_IMPORT[package] | set(sys.stdlib_module_names)
    for path in sources(package):
        assert imported(path, top_level_only=True) <= allowed, path


def test_every_library_imported_is_pinned():
    """One that is here only because another brought it, or by hand, is missing on the next machine."""
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    distributions = packages_distributions()
    for path in [path for package in (*OURS, "tests") for path in sources(package)]:
        local = OURS | {other.stem for other in (ROOT / "tests").iterdir()}
        for library in imported(path) - local - set(sys.stdlib_module_names):
            names = {name.lower() for name in distributions.get(library, [library])}
            assert names & {name.lower() for name in pinned}, f"{path.relative_to(ROOT)} imports {library}"


def test_the_training_loop_is_put_together_from_few_parts():
    """What a loop imports of ours is what one has to know before changing it."""
    tree = ast.parse((ROOT / "train" / "diffusion" / "training.py").read_text())
    modules = set()
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        files = {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()}
        modules |= files or {node.module}
    assert len([module for module in modules if module.split(".")[0] in OURS]) <= 12


def test_no_file_is_longer_than_400_lines():
    paths = [path for folder in (*OURS, "tests", "warvito_MedicalNet-models_main") for path in sources(folder)]
    assert [str(path) for path in paths if len(path.read_text().splitlines()) > 400] == []


def test_only_scripts_touch_the_module_path():
    for package in OURS:
        for path in sources(package):
            assert ("sys.path" in path.read_text()) == (path in SCRIPTS), path


def test_one_place_leaves_the_process_group():
    """A group that is destroyed after an error waits for peers that never come."""
    for package in OURS:
        for path in sources(package):
            if "destroy_process_group" in path.read_text():
                assert path == ROOT / "common" / "processes.py"


def test_importing_only_defines_things_and_public_names_are_where_they_were_published():
    """In one process, which takes long to start."""
    code = (
        "import importlib, os, torch, pytorch_lightning, torchio, matplotlib, tqdm  # what libraries do is not ours\n"
        "state = lambda: (dict(os.environ), torch.get_rng_state().tolist(), torch.backends.cuda.matmul.allow_tf32)\n"
        "for module in ('ddpm.BiFlowNet', 'AutoEncoder.model.PatchVolume', 'dataset.vqgan',\n"
        "               'train.autoencoder.training', 'evaluation.comparison.generation_metrics',\n"
        "               'evaluation.autoencoding.reconstruction', 'evaluation.report_page.report'):\n"
        "    before = state()\n"
        "    importlib.import_module(module)\n"
        "    assert {k for k in state()[0] if state()[0][k] != before[0].get(k)} == set(), module\n"
        "    assert state()[1:] == before[1:], module\n"
        "from AutoEncoder.model.PatchVolume import patchvolumeAE, AE_finetuning\n"
        "from AutoEncoder.model.codebook import Codebook\n"
        "from AutoEncoder.model.MedicalNetPerceptual import MedicalNetPerceptual\n"
        "from ddpm.BiFlowNet import BiFlowNet, GaussianDiffusion, PatchEmbed_Voxel\n"
        "from dataset.vqgan import VQGANDataset\nfrom dataset.vqgan_4x import VQGANDataset_4x\n"
        "from dataset.Singleres_dataset import Singleres_dataset\n"
        "from dataset.tr_generate import GenerateTrData_dataset\n"
        "from train.callbacks import VolumeLogger\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}  # set by monai
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_imports_nothing_heavy(script):
    """So that it takes a fraction of a second: scripts parse first and import the work afterwards."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        "sys.stderr.write(' '.join({'torch', 'hydra', 'monai', 'pytorch_lightning'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"usage: {script.name}")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "code",
    [
        "import sys, AutoEncoder.checkpoint, AutoEncoder.decoding; assert 'timm' not in sys.modules\n"
        "import ddpm.checkpoint, train.latents.encoding, evaluation.generation.run\n"
        "assert 'pytorch_lightning' not in sys.modules",
        "import sys, train.autoencoder.training; assert 'ddpm' not in sys.modules",
    ],
)
def test_what_is_not_needed_is_not_loaded(code):
    """Lightning costs seconds at every start."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_there_are_no_bare_prints():
    for package in OURS:
        for path in sources(package):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_links_in_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(documents) >= 4
    for document in documents:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


FILES_IN_README = re.findall(
    r"\b(?:train|evaluation|dataset|config)/[\w/]+\.(?:py|yaml|json)\b", (ROOT / "README.md").read_text()
)


@pytest.mark.parametrize("name", sorted(set(FILES_IN_README)))
def test_files_named_in_the_readme_exist(name):
    assert (ROOT / name).exists()


def test_the_map_names_what_there_is():
    text = (ROOT / "docs" / "map.md").read_text()
    named = re.findall(r"`((?:AutoEncoder|common|config|dataset|ddpm|evaluation|tests|train)/[\w./]*)[`:]", text)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []

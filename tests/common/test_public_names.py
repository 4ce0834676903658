"""What packages export: a package made for the purpose in this process, and ours in fresh ones."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {"Both": "Both", "Other": "Both", "Plain": "inner.plain"}
IMPORTS = (
    "from {0} import Both",
    "from {0}.Both import Other\nfrom {0} import Both",
    "from {0}.Both import internal\nfrom {0} import Other\nfrom {0} import Both",
    "import {0}.Both\nBoth = {0}.Both",
    "import {0}.Both as Both",
    "from {0} import *",
)


@pytest.fixture
def package(request, tmp_path, monkeypatch) -> str:
    name = f"exporting_{abs(hash(request.node.name))}"  # imported packages stay, so each test has its own
    (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / name / "inner" / "__init__.py").touch()
    (tmp_path / name / "inner" / "plain.py").write_text("class Plain: pass")
    (tmp_path / name / "Both.py").write_text("class Both: pass\nclass Other: pass\ninternal = 3\n")
    (tmp_path / name / "__init__.py").write_text(
        f"from common.public_names import export\nexport(__name__, {HOMES})\nown = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return name


@pytest.mark.parametrize("code", IMPORTS)
def test_a_class_wins_over_its_module_whatever_is_imported_first(package, code):
    names = {}
    exec(code.format(package), names)
    module = sys.modules[f"{package}.Both"]
    assert names["Both"] is module.Both
    assert isinstance(names["Both"](), module.Both)
    assert (names["Both"].Both, names["Both"].Other) == (module.Both, module.Other)  # who means the module
    exec(f"from {package}.Both import Both, Other, internal", names)
    assert (names["Both"], names["Other"], names["internal"]) == (module.Both, module.Other, 3)


def test_names_are_imported_when_they_are_asked_for(package):
    module = importlib.import_module(package)
    loaded = lambda: {name for name in sys.modules if name.startswith(f"{package}.")}  # noqa: E731
    assert {"own", *HOMES} <= set(dir(module))
    assert (module.own, loaded()) == (5, set())
    assert module.Plain.__module__ == f"{package}.inner.plain"
    assert loaded() == {f"{package}.inner", f"{package}.inner.plain"}
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'Missing'"):
        module.Missing  # noqa: B018
    module.Both = "replaced"  # as a test does
    assert module.Both == "replaced"


LIGHT = (
    "import sys, ddpm, dataset, AutoEncoder, AutoEncoder.model\n"
    "assert not {'torch', 'numpy', 'omegaconf'} & sys.modules.keys()\n"
)
MODULES_FIRST = (
    "from ddpm.BiFlowNet import GaussianDiffusion\nimport dataset.Singleres_dataset\n"
    "from AutoEncoder.model.MedicalNetPerceptual import MedicalNetPerceptual\n"
)
OURS = (
    "from ddpm import BiFlowNet, GaussianDiffusion, PatchEmbed_Voxel\n"
    "from dataset import GenerateTrData_dataset, Singleres_dataset, VQGANDataset, VQGANDataset_4x\n"
    "from AutoEncoder.model import AE_finetuning, Codebook, MedicalNetPerceptual, patchvolumeAE\n"
    "import AutoEncoder\n"
    "assert AutoEncoder.patchvolumeAE is patchvolumeAE and AutoEncoder.Codebook is Codebook\n"
    "assert all(isinstance(value, type) for value in (BiFlowNet, Singleres_dataset, MedicalNetPerceptual))\n"
    "import ddpm.BiFlowNet\n"
    "assert ddpm.BiFlowNet.GaussianDiffusion is GaussianDiffusion\n"
    "assert BiFlowNet(24, dim_mults=(1,), use_sparse_linear_attn=(0,)).channels == 3\n"
)


@pytest.mark.parametrize("code", [LIGHT + OURS, MODULES_FIRST + OURS], ids=["names first", "modules first"])
def test_our_packages_export_the_public_names(code):
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

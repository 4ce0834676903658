"""What the hardware itself does: a copy within the device's memory, and products of matrices in each type.

These are the limits that the other parts are held against. The notes describe the device.
"""

import subprocess
from pathlib import Path

import torch
from omegaconf import DictConfig

from common.processes import choose_device, device_name
from evaluation.benchmarks.measuring import Copy, Product, Report, Row

PRODUCTS = {"product float32": (torch.float32, False), "product bf16": (torch.bfloat16, False)}
TF32 = {"product TF32": (torch.float32, True)}  # GPUs alone have it
DRIVER = Path("/proc/driver/nvidia/version")


def measure(cfg: DictConfig) -> Report:
    """UserError where a GPU is demanded and there is none."""
    device = choose_device(cfg.device)
    copy = Copy(device)
    rows = [Row("copy", copy.times(cfg.repetitions), copy.num_bytes)]
    del copy
    for name, (dtype, tf32) in (PRODUCTS | (TF32 if device.type == "cuda" else {})).items():
        product = Product(device, dtype, tf32)
        rows.append(Row(name, product.times(cfg.repetitions), product.flops))
    title = f"bytes of a copy and operations of a product, {device_name(device)}"
    return Report(title, "bytes or operations", "product float32", rows, describe(device))


def describe(device: torch.device) -> dict:
    """What figures of this device depend on, beside the versions of packages."""
    if device.type == "cpu":
        return {"device": device_name(device), "devices": 1}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "memory, GB": round(properties.total_memory / 1e9, 1),
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return found[0] if found else None
    except (OSError, subprocess.SubprocessError):  # containers may lack the program
        return DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else None

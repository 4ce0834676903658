"""The Hugging Face hub as tests have it: a cache folder laid out by hand, offline."""

import shutil
from pathlib import Path

import huggingface_hub.constants as hub
import pytest

from common import hub as ours

COMMIT = "0" * 40


def offline_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Only what lies in `cache` is there."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    ours._fetched.cache_clear()


def put_into_cache(cache: Path, repository: str, *files: Path, revision: str = "main") -> None:
    """As if they had been fetched, all at the same commit."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for file in files:
        target = folder / "snapshots" / COMMIT / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)

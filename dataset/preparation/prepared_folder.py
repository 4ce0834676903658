"""The folder of one class's prepared volumes: what is in it, what is left to do, and doing it for one source."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from common.errors import UserError
from common.parallel import map_in_processes
from dataset.preparation.dicom_series import NotAVolume
from dataset.preparation.manifest import MANIFEST_NAME, append_entry, read_manifest, write_manifest
from dataset.preparation.recipe import Recipe, describe, prepare
from dataset.preparation.sources import Source, fingerprint, read_source, source_sha256
from dataset.volumes.index import VOLUME_SUFFIX
from dataset.volumes.volume_io import write_nifti

LIBRARIES = ("numpy", "nibabel", "pydicom", "dcm2niix", "SimpleITK", "torchio")


@dataclass(frozen=True)
class Outcome:
    """What became of a source: its entry for the manifest, or why there is none."""

    source: Source
    entry: dict[str, Any] | None = None
    reason: str = ""  # without the source's name
    is_fault: bool = True  # False: the images are no volume, and nobody would take them for one

    @property
    def status(self) -> str:
        return "prepared" if self.entry else "failed" if self.is_fault else "left out"


@dataclass
class PreparedFolder:
    """The prepared volumes of one class."""

    folder: Path
    input: Path  # the folder that sources are found in
    recipe: Recipe
    entries: dict[str, dict[str, Any]] = field(init=False)  # of the manifest, by file

    def __post_init__(self) -> None:
        self.entries = read_manifest(self.folder)

    def plan(self, sources: Sequence[Source]) -> list[Source]:
        """The sources that are not done yet: new or changed ones, and all after a change of options.

        UserError, before anything is written: two sources, or one and another input's, would write the same file; or
        the folder has volumes of other options that this run would leave as they are.
        """
        self._check_names(sources)
        todo = [source for source in sources if not self._is_done(source)]
        names = {file_name(source) for source in sources}
        record = self.recipe.record()
        strangers = [e for file, e in self.entries.items() if file not in names and e["recipe"] != record]
        if strangers:
            other = strangers[0]
            keys = [key for key in record if other["recipe"].get(key) != record[key]]
            raise UserError(
                f"{self.folder}: holds {len(strangers)} volume(s) made with other options from sources that this run "
                f"doesn't have, e.g. {other['file']} ({keys[0]} was {other['recipe'].get(keys[0])}, is "
                f"{record[keys[0]]}): give the same options, another name, or move the folder away"
            )
        return todo

    def prepare(self, todo: Sequence[Source], num_workers: int) -> Iterator[Outcome]:
        """Prepares and writes volumes, with a progress bar, and notes each in the manifest as soon as it is there.

        What an earlier run made of a source that can't be used any more is removed. UserError where nothing can be
        written or a process is killed.
        """
        self.tidy()  # a half-written last line would swallow the first new one
        threads = max(1, (os.cpu_count() or 1) // max(1, num_workers))
        job = partial(_prepare_source, self.folder, self.input, self.recipe, threads)
        for _, outcome in map_in_processes(job, todo, num_workers, "preparing"):
            if outcome.entry is not None:
                self.entries[outcome.entry["file"]] = outcome.entry
                append_entry(self.folder, outcome.entry)
            elif self.entries.pop(file_name(outcome.source), None) is not None:
                (self.folder / file_name(outcome.source)).unlink(missing_ok=True)
                write_manifest(self.folder, self.entries.values())
            yield outcome

    def unwanted(self, sources: Sequence[Source]) -> list[str]:
        """The volumes made from this input by earlier runs whose sources are not among these."""
        names = {file_name(source) for source in sources}
        return [file for file, e in self.entries.items() if file not in names and e["input"] == str(self.input)]

    def tidy(self) -> None:
        """Sorts the manifest and takes out entries whose volume is gone, and files that a killed run left half."""
        for temporary in self.folder.rglob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        self.entries = {file: e for file, e in self.entries.items() if (self.folder / file).is_file()}
        if self.entries or (self.folder / MANIFEST_NAME).exists():
            write_manifest(self.folder, self.entries.values())

    def _check_names(self, sources: Sequence[Source]) -> None:
        seen: dict[str, Source] = {}
        for source in sources:
            name = file_name(source)
            if name in seen:
                raise UserError(
                    f"{source.label} and {seen[name].label} would both become {self.folder / name}: rename or move one"
                )
            seen[name] = source
            entry = self.entries.get(name)
            if entry and entry["input"] != str(self.input) and entry["sha256"] != source_sha256(source):
                raise UserError(
                    f"{self.folder / name}: was made from {Path(entry['input']) / entry['source']}, and {source.label} "
                    "would overwrite it: give another name, or put both sources below one input folder"
                )

    def _is_done(self, source: Source) -> bool:
        name = file_name(source)
        entry, path = self.entries.get(name), self.folder / name
        if entry is None or entry["recipe"] != self.recipe.record() or not path.is_file():
            return False
        if path.stat().st_size != entry["file_bytes"]:
            return False
        found = fingerprint(source)
        if all(entry[key] == found[key] for key in found):
            return True
        if entry["sha256"] != source_sha256(source):
            return False
        entry.update(found)  # copied or touched only
        return True


def _prepare_source(folder: Path, input_folder: Path, recipe: Recipe, threads: int, source: Source) -> Outcome:
    """Prepares one source; what the processes run. A fault of the source is an outcome, a full disk an error.

    threads: of SimpleITK, in each process.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    try:
        scan = read_source(source, recipe.assume_orientation)
        prepared = prepare(scan, recipe)
        identity = {"sha256": source_sha256(source), **fingerprint(source)}
    except NotAVolume as error:
        return Outcome(source, reason=_without_label(error, source), is_fault=False)
    except UserError as error:
        return Outcome(source, reason=_without_label(error, source))
    except Exception as error:  # one odd file must not end a night's work, whatever a library says of it
        return Outcome(source, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
    path = folder / file_name(source)
    write_nifti(path, prepared.data, prepared.affine)
    after = describe(prepared.data, prepared.affine)
    entry = {
        "file": file_name(source),
        "file_bytes": path.stat().st_size,
        "source": source.name,
        "input": str(input_folder),
        **identity,
        "original": describe(scan.data, scan.affine),
        "size": after["size"],
        "spacing_mm": after["spacing_mm"],
        "steps": prepared.steps,
        "foreground_lost": round(prepared.foreground_lost, 4),
        "intensity": prepared.intensity.record(),
        "recipe": recipe.record(),
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return Outcome(source, entry)


def file_name(source: Source) -> str:
    """Where the volume of a source lies below the class folder."""
    return source.name + VOLUME_SUFFIX


def _without_label(error: UserError, source: Source) -> str:
    return str(error).removeprefix(f"{source.label}: ")

"""The folder of a class's prepared volumes of one size: what is in it, what is left to do, and doing it."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from common.errors import UserError
from common.files import remove_leftovers
from common.parallel import map_in_processes
from common.places import exists, is_file
from common.shards import shard_folders
from dataset.preparation.manifest import MANIFEST_NAME, append_entry, read_manifest, write_manifest
from dataset.preparation.measured import NotAVolume, check_is_image
from dataset.preparation.recipe import Recipe, describe, prepare
from dataset.preparation.sources import Source, fingerprint, read_source, source_sha256
from dataset.volumes.index import VOLUME_SUFFIX
from dataset.volumes.volume_io import write_nifti

# Of a name that the file system doesn't take: too long, not in its encoding, a folder's where a file is or the reverse.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
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
    """The prepared volumes of one class and size."""

    folder: Path
    input: Path  # the folder that sources are found in
    recipe: Recipe
    own: Path  # where the manifest lies that this call writes: `folder`, or its shard's (`common/shards.py`)
    entries: dict[str, dict[str, Any]] = field(init=False)  # of all manifests, by file

    def __post_init__(self) -> None:
        self.entries = read_manifest(self.folder)
        for shard in shard_folders(self.folder):
            self.entries |= read_manifest(shard)

    def without_collisions(self, sources: Sequence[Source], num_workers: int = 0) -> tuple[list[Source], list[Outcome]]:
        """The sources whose volumes can have their names, and what to say of all others.

        Of several with the same name (`ct.nii`, `ct.nii.gz`) the one counts that the volume there was made from, else
        the first. A volume made from another input is never overwritten, unless the source is the same file.
        """
        by_name: dict[str, list[Source]] = {}
        for source in sources:
            by_name.setdefault(file_name(source), []).append(source)
        foreign = {name for name in by_name if name in self.entries and self.entries[name]["input"] != str(self.input)}
        doubtful = [s for name, rivals in by_name.items() if name in foreign or len(rivals) > 1 for s in rivals]
        made_from = self._made_from(doubtful, num_workers)
        fitting, refused = [], []
        for name, rivals in by_name.items():
            chosen = next((s for s in rivals if id(s) in made_from), None if name in foreign else rivals[0])
            if chosen is None:
                made = Path(self.entries[name]["input"]) / self.entries[name]["source"]
                reason = (
                    f"would overwrite {self.folder / name}, which was made from {made}: give another name, or put both "
                    "below one input folder"
                )
            else:
                reason = f"would become {self.folder / name} as {chosen.label} does: rename or move one"
                fitting.append(chosen)
                if name in foreign:
                    self.entries[name]["input"] = str(self.input)  # moved or copied: it isn't read again next time
            refused += [Outcome(source, reason=reason) for source in rivals if source is not chosen]
        return fitting, refused

    def plan(self, sources: Sequence[Source], num_workers: int = 0) -> list[Source]:
        """The sources that are not done yet: new or changed ones, and all after a change of options.

        sources: without collisions. UserError, before anything is written, where the folder has volumes of other
        options that this run would leave as they are.
        """
        there = [source for source in sources if self._is_there(source)]
        touched = [source for source in there if not self._is_untouched(source)]
        same = self._made_from(touched, num_workers)
        for source in touched:
            if id(source) in same:
                self.entries[file_name(source)].update(fingerprint(source))  # copied or touched only
        done = {id(source) for source in there} - {id(source) for source in touched} | same
        todo = [source for source in sources if id(source) not in done]
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
                append_entry(self.own, outcome.entry)
            elif self.entries.pop(file_name(outcome.source), None) is not None:
                (self.folder / file_name(outcome.source)).unlink(missing_ok=True)  # `tidy` writes the manifest
            yield outcome

    def unwanted(self, sources: Sequence[Source]) -> list[str]:
        """The volumes made from this input by earlier runs whose sources are not among these."""
        names = {file_name(source) for source in sources}
        return [file for file, e in self.entries.items() if file not in names and e["input"] == str(self.input)]

    def tidy(self) -> None:
        """Sorts the manifest and takes out entries whose volume is gone, and files that a killed run left half.

        A shard does so with its own entries alone, and leaves half files, which may be being written, to the last call.
        """
        self.entries = {file: e for file, e in self.entries.items() if is_file(self.folder / file)}
        written = self.entries
        if self.own == self.folder:
            remove_leftovers(self.folder)
        else:
            written = {file: self.entries[file] for file in read_manifest(self.own) if file in self.entries}
        if written or exists(self.own / MANIFEST_NAME):
            write_manifest(self.own, written.values())

    def _is_there(self, source: Source) -> bool:
        """Whether there is a volume of a source's name, whole and made with these options."""
        entry, path = self.entries.get(file_name(source)), self.folder / file_name(source)
        if entry is None or entry["recipe"] != self.recipe.record():
            return False
        return is_file(path) and path.stat().st_size == entry["file_bytes"]

    def _is_untouched(self, source: Source) -> bool:
        entry = self.entries[file_name(source)]
        try:
            return all(entry[key] == value for key, value in fingerprint(source).items())
        except OSError:  # whoever reads it says what is wrong
            return False

    def _made_from(self, sources: Sequence[Source], num_workers: int) -> set[int]:
        """`id` of those that have the content which the volume of their name was made from; they are read whole."""
        sources = [source for source in sources if file_name(source) in self.entries]
        show = len(sources) > 0  # no bar of nothing
        digests = map_in_processes(_sha256, sources, num_workers, "comparing", "source", show)
        return {id(sources[i]) for i, found in digests if found == self.entries[file_name(sources[i])]["sha256"]}


def _prepare_source(folder: Path, input_folder: Path, recipe: Recipe, threads: int, source: Source) -> Outcome:
    """Prepares one source; what the processes run. A fault of the source is an outcome, a full disk an error.

    threads: of SimpleITK, in each process.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    try:
        scan = read_source(source, recipe.assume_orientation)
        check_is_image(scan.data)
        prepared = prepare(scan, recipe)
        identity = {"sha256": source_sha256(source), **fingerprint(source)}
    except NotAVolume as error:
        return Outcome(source, reason=_without_label(error, source), is_fault=False)
    except UserError as error:
        return Outcome(source, reason=_without_label(error, source))
    except Exception as error:  # one odd file must not end a night's work, whatever a library says of it
        return Outcome(source, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
    path = folder / file_name(source)
    try:
        write_nifti(path, prepared.data, prepared.affine)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in NAME_ERRORS:
            raise
        return Outcome(source, reason=f"its volume can't be called {path.name} ({cause.strerror}): rename the source")
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
        "notes": list(scan.notes),
        "steps": prepared.steps,
        "foreground_lost": round(prepared.foreground_lost, 4),
        "intensity": prepared.intensity.record(),
        "recipe": recipe.record(),
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return Outcome(source, entry)


def _sha256(source: Source) -> str | None:
    """None of a source that can't be read: whoever prepares it says so."""
    try:
        return source_sha256(source)
    except UserError:
        return None


def file_name(source: Source) -> str:
    """Where the volume of a source lies below the folder."""
    return source.name + VOLUME_SUFFIX


def _without_label(error: UserError, source: Source) -> str:
    return str(error).removeprefix(f"{source.label}: ")

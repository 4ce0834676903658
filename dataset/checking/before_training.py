"""A few files of a data set, read whole before a run costs time; `dataset/check.py` reads all of them.

Headers tell nothing of NaN, wrong scales or empty volumes. Reading eight files costs what eight training volumes cost:
seconds, for the largest CT about a minute.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from common.errors import UserError
from common.places import is_file
from common.progress import tracked
from dataset.checking import examine
from dataset.checking.examine import FileFacts, Problem, examine_latent, examine_volume
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.volume_io import Header

SAMPLE_SIZE = 8
VOLUME_KINDS = (examine.UNREADABLE, examine.NOT_FINITE, examine.OUTSIDE_RANGE, examine.EMPTY, examine.UPPER_HALF)
LATENT_KINDS = (examine.UNREADABLE, examine.NOT_FINITE, examine.EMPTY)


def check_volumes(
    root_dir: str | Path,
    files: Mapping[Hashable, Sequence[Path]],
    headers: Collection[Header],
    intensity_range: Sequence[float],
    logger: logging.Logger,
) -> None:
    """Reads a sample of volumes, spread over the names and always the same; looks at all headers.

    Headers that are odd end in one warning, since training takes the voxels as they are. The data sets call it;
    programs of several processes let one of them do so.

    Arguments:
        root_dir: dataset JSON or plain folder, for messages. files: name -> volumes. headers: those of all volumes.
        intensity_range: lowest and highest intensity of the files.

    Raises:
        UserError: a volume of the sample that cannot be trained on, or a name whose volumes use only the upper half of
            the range.
    """
    low, high = intensity_range
    command = f"python dataset/check.py {root_dir if is_file(root_dir) else 'JSON'}"
    command += "" if (low, high) == MODEL_RANGE else f" --intensity-range {low:g} {high:g}"
    _warn_of_headers(headers, command, logger)
    facts = _read(files, lambda path: _examine_once(path, (low, high), _version(path)), logger)
    problems = examine.file_problems(facts) + examine.volume_set_problems(facts, intensity_range)
    _raise_first(problems, VOLUME_KINDS, root_dir, command)


def check_latents(root_dir: str | Path, files: Mapping[Hashable, Sequence[Path]], logger: logging.Logger) -> None:
    """As `check_volumes` for latents: those of the sample are readable, finite and not constant."""
    problems = examine.file_problems(_read(files, examine_latent, logger))
    _raise_first(problems, LATENT_KINDS, root_dir, f"python dataset/check.py {root_dir}")


@lru_cache(maxsize=8 * SAMPLE_SIZE)  # both sides of a split have the same sample
def _examine_once(path: Path, intensity_range: tuple[float, float], version: tuple[int, ...]) -> FileFacts:
    """version: of the file, so that one that was corrected is read again."""
    return examine_volume(path, intensity_range)


def _version(path: Path) -> tuple[int, ...]:
    with suppress(OSError):  # left to who reads the file
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size, status.st_ino
    return ()


def _read(
    files: Mapping[Hashable, Sequence[Path]], function: Callable[[Path], FileFacts], logger: logging.Logger
) -> dict[Hashable, list[FileFacts]]:
    """The facts of the sample, by name."""
    begin = time.monotonic()
    facts: dict[Hashable, list[FileFacts]] = {}
    sample = list(examine.choose_sample(files, SAMPLE_SIZE))
    for name, path in tracked(sample, "checking", "file", transient=True):
        facts.setdefault(name, []).append(function(path))
    count, total = sum(map(len, facts.values())), sum(map(len, files.values()))
    logger.info("read %d of %d files whole as a check (%.1f s)", count, total, time.monotonic() - begin)
    return facts


def _raise_first(problems: Sequence[Problem], kinds: Collection[str], root_dir: str | Path, command: str) -> None:
    """UserError with the first of the problems that are of these kinds."""
    found = [problem for problem in problems if problem.kind in kinds]
    if found:
        more = f"; {len(found) - 1} more in the sample" if len(found) > 1 else ""
        where = f"{root_dir}: " if found[0].path is None else ""
        raise UserError(f"{where}{found[0]}: {examine.REMEDIES[found[0].kind]}{more}; `{command}` reads all files")


def _warn_of_headers(headers: Collection[Header], command: str, logger: logging.Logger) -> None:
    problems = [problem for header in headers for problem in examine.header_problems(header)]
    if not problems:
        return
    kinds = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{kind}: {kinds[kind]}" for kind in examine.HEADER_KINDS if kind in kinds)
    codes = Counter(header.orientation for header in headers if header.is_oriented)
    mixed = f" (axes mixed: {', '.join(f'{n} {code}' for code, n in codes.most_common())})" if len(codes) > 1 else ""
    logger.warning(
        "%d of %d files have odd headers, %s%s, e.g. %s; training takes the voxels as they are stored; `%s` names all",
        *(len({problem.path for problem in problems}), len(headers), counts, mixed, problems[0], command),
    )

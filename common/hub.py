"""Files by name: `hf://OWNER/NAME/FILE[@REVISION]` is a file of a model repository on the Hugging Face hub.

It is fetched once into the hub's cache (`HF_HOME`, `HF_HUB_CACHE`), with its progress bar; `HF_HUB_OFFLINE=1` takes
what is there. A revision is a branch, a tag or a commit. What opens a checkpoint asks `local_file` for its path, and
messages and records have the name as it was given.
"""

import re
from functools import lru_cache
from pathlib import Path

from common.errors import UserError

PREFIX = "hf://"
NAME = re.compile(rf"{PREFIX}(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[^@]*[^@/])(?:@(?P<revision>[^@]+))?")
LOG_IN = "then log in with `hf auth login`, or set HF_TOKEN"


def is_on_hub(name: str | Path) -> bool:
    return str(name).startswith(PREFIX)


def absolute_name(name: str) -> str:
    """A path made absolute, for a process that runs in another folder; names on the hub as they are."""
    return name if is_on_hub(name) else str(Path(name).absolute())


def local_file(name: str | Path) -> Path:
    """The path of a file, which is fetched first where the name is one on the hub. Other paths are not looked at.

    UserError: a name of another form; no such repository, file or revision; gated; neither cached nor to be had.
    """
    return _fetched(str(name)) if is_on_hub(name) else Path(name)


@lru_cache  # a branch may move between two readings of what has to be one file
def _fetched(name: str) -> Path:
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name}: expected hf://OWNER/NAME/FILE or hf://OWNER/NAME/FILE@REVISION")
    import huggingface_hub  # takes a while, and few need it
    from huggingface_hub import errors

    repository, file, revision = match.groups()
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise UserError(f"{name}: a gated repository: accept its terms on {page}, {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name}: no such repository, or a private one: correct its name, or {LOG_IN[5:]}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the repository has no revision {revision or 'main'}: name another") from error
    except errors.LocalEntryNotFoundError as error:
        cache = huggingface_hub.constants.HF_HUB_CACHE
        is_offline = huggingface_hub.constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if is_offline else "the hub can't be reached"
        advice = "fetch it where there is a network and copy that folder, or give a path"
        raise UserError(f"{name}: not in the cache {cache}, and {why}: {advice}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{name}: the repository has no file {file}: correct the name") from error
    except Exception as error:  # of the network, the hub or the disk, in many types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: could not be fetched ({reason:.200}): try again, or give a path") from error

"""From what the user typed to a folder: a path, or a Hub id through huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Files a download fetches: weights, configs, tokenizers. Never pickles, never code."""


def resolve(source: str) -> Path:
    """The folder of a source.

    Args:
        source: a path, or ``owner/name`` with an optional ``@revision``. An existing path wins. The Hub's own
            settings hold, ``HF_HUB_OFFLINE`` and the login store among them.

    Raises:
        InputError: neither a folder nor an id, or the download failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source}: is a file; give the checkpoint's folder")
    if not _ID.fullmatch(source) or source.startswith((".", "/", "~")):
        raise InputError(
            f"{source}: no such folder",
            hint="give a folder with config.json and safetensors files, or a Hub id owner/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
        )
    except GatedRepoError as error:
        raise InputError(
            f"{source}: the Hub gates this model",
            hint="accept its terms there, then `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{source}: no such folder here, and no such model on the Hub",
            hint="check the spelling; a private model needs `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{source}: no such folder here, not in the Hub cache, and the Hub cannot be reached",
            hint="download it where there is a network, or check the path",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: the Hub could not deliver it ({error})") from error

"""Text to calibrate and to evaluate with, in named domains.

A domain is a file the user gave, or one of two that need no download: the standard library's own
sources and Python's help topics. Statistics are kept per domain because methods rank differently on
code and on prose.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import InputError, UsageError


@dataclass(frozen=True)
class Domain:
    """Documents of one kind.

    Attributes:
        name: how statistics and reports call it.
        documents: the texts, in their order in the source.
    """

    name: str
    documents: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the documents, each preceded by its length so that no two splits agree."""
        state = hashlib.sha256()
        for document in self.documents:
            data = document.encode("utf-8", "surrogatepass")
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
        return state.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Domains in the order they were given."""

    domains: tuple[Domain, ...]


def read_corpus(files: Sequence[Path]) -> Corpus:
    """One domain a file, named after its stem; the built-in domains when there is no file.

    A ``.jsonl`` file has one document a line: ``text``, or the contents of ``messages`` joined by
    newlines, or ``prompt`` followed by ``completion``. Any other file is one document.

    Raises:
        UsageError: two files have one stem.
        InputError: a file cannot be read, is not UTF-8, is empty, or has a record of no known form.
    """
    if not files:
        return default_corpus()
    by_stem: dict[str, Path] = {}
    for file in files:
        if file.stem in by_stem:
            raise UsageError(
                f"--data: {by_stem[file.stem]} and {file} would both be the domain {file.stem!r}",
                hint="rename one of them, or join them into one file",
            )
        by_stem[file.stem] = file
    return Corpus(tuple(_read_domain(stem, file) for stem, file in by_stem.items()))


def default_corpus() -> Corpus:
    """``python``: the standard library's public top-level modules; ``english``: Python's help
    topics.

    Both in alphabetical order. The texts differ between Python versions; the digests record which
    were used.

    Raises:
        InputError: this Python comes without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(
        path for path in folder.glob("*.py") if path.is_file() and not path.name.startswith("_")
    )
    if not sources:
        raise InputError(
            f"{folder}: holds no Python sources to use as the default text",
            hint="give text with --data FILE",
        )
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python comes without pydoc_data, the default English text",
            hint="give text with --data FILE",
        ) from None
    python = Domain("python", tuple(_text(path) for path in sources))
    english = Domain("english", tuple(str(topics[name]) for name in sorted(topics)))
    return Corpus((python, english))


def _read_domain(name: str, file: Path) -> Domain:
    text = _text(file)
    documents = _records(file, text) if file.suffix == ".jsonl" else (text,)
    if not any(document.strip() for document in documents):
        raise InputError(f"{file}: holds no text")
    return Domain(name, documents)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: is not UTF-8 text (byte {error.start})",
            hint="give plain text or JSON lines; convert other formats first",
        ) from None


def _records(file: Path, text: str) -> tuple[str, ...]:
    # split("\n") and not splitlines(): JSON text may hold U+2028, which is no line end in JSON
    # lines.
    lines = text.split("\n")
    return tuple(
        _record(f"{file}: line {number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )


def _record(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        contents = [item.get("content") if isinstance(item, dict) else None for item in messages]
        if all(isinstance(content, str) for content in contents):
            return "\n".join(map(str, contents))
        raise InputError(f"{where}: a message has no text as its content")
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    raise InputError(
        f"{where}: expected the key text, messages, or prompt and completion, "
        f"found {', '.join(map(repr, record)) or 'no key'}"
    )

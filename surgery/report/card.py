"""The model card: the record in words, with the front matter the Hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_RELATION = {"merge": "merge"}
"""The Hub knows adapter, merge, quantized and finetune; upcycling one model is nearest to the last."""


def licence_of(folder: Path) -> str | None:
    """The licence a source's card declares, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    matter = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(r"^license:\s*(\S+)\s*$", matter.group(1), re.M) if matter else None
    return found.group(1) if found else None


def common_licence(folders: Sequence[Path]) -> str | None:
    """The licence of all sources that declare one.

    Raises:
        InputError: two of them declare different ones, and which terms the output has is not for a tool to say.
    """
    declared = {folder: licence_of(folder) for folder in folders}
    named = {folder: licence for folder, licence in declared.items() if licence is not None}
    for folder, licence in named.items():
        other, first = next(iter(named.items()))
        if licence != first:
            raise InputError(
                f"{folder}: its licence is {licence}, that of {other} is {first}",
                hint="settle the terms first, then declare the licence in the sources' README.md",
            )
    return next(iter(named.values()), None)


_LOADS = {
    "adapter": "PEFT adapter",
    "model and adapter": "a stock model in `base`, with the PEFT adapter in `adapter`",
    "pack": "a pack, out of which `moesurg revert` takes each input",
}


def card(
    record: Mapping[str, Any],
    sources: Sequence[str],
    licence: str | None,
    *,
    base: str | None = None,
) -> bytes:
    """The card as ``README.md``.

    Args:
        record: the run's record.
        sources: what the user gave; Hub ids become ``base_model``.
        licence: carried over from the sources, or None.
        base: for an adapter, the model it adapts.
    """
    adapter = record["format"] in ("adapter", "adapters")
    matter = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if licence:
        matter.append(f"license: {licence}")
    named = [base] if adapter and base else sources
    bases = [name for name in named if _HUB_ID.fullmatch(name) and not Path(name).exists()]
    if bases:
        matter.append("base_model:")
        matter.extend(f"- {source}" for source in bases)
        several = "merge" if len(bases) > 1 else "finetune"
        relation = "adapter" if adapter else _RELATION.get(record["operation"], several)
        matter.append(f"base_model_relation: {relation}")
    kind = "lora" if adapter else "moe"
    matter.extend(["tags:", f"- {kind}", "- moesurg", f"- {record['operation']}", "---"])
    parameters, exactness = record["parameters"], record["exactness"]
    names = ", ".join(f"`{Path(source).name}`" for source in sources)
    lines = [
        *matter,
        "",
        f"# {names}, {record['operation']} by {record['method']}",
        "",
        f"Made by moesurg {record['moesurg']} with",
        "",
        "```",
        shlex.join(record["command"]),
        "```",
        "",
        f"* parameters: {parameters['before']:,} before, {parameters['after']:,} after",
        f"* relation to the source: {exactness['kind']} ({exactness['reason']})",
        f"* loads as: {_LOADS.get(record['format'], record['tier'])}",
        f"* tensors copied unchanged: {record['unchanged']}",
    ]
    if record["statistics"]:
        domains = ", ".join(record["statistics"]["domains"])
        lines.append(f"* calibrated on {record['statistics']['tokens']:,} tokens ({domains})")
    lines.extend(f"* {note}" for note in record["notes"])
    lines.extend(
        [
            "",
            "`report.json` holds the digests of every input and output file and what was measured on each "
            "layer; `moesurg verify` checks this folder against it.",
            "",
        ]
    )
    return "\n".join(lines).encode()

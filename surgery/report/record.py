"""The record of a run, written as ``report.json``.

The record holds what decides the output and what was measured on it, and nothing that differs between two runs
of the same command: no times, no host, no worker count. So a rerun writes the same bytes.

Schema, version 1:

* ``schema_version``, ``moesurg`` (version), ``libraries`` (versions)
* ``command``: the arguments that make this output; ``operation``, ``method``, ``options``, ``seed``
* ``fingerprint``: SHA-256 of what decides the output, also the key of ``--resume``
* ``sources``: for each input ``path``, ``model_type`` and ``files`` (SHA-256 by name)
* ``statistics``: digest and description of the calibration, or null
* ``format`` of the output (``model``, ``adapter``, ``pack``, or a shelf, see `checkpoint/formats.py`)
* ``tier``, ``exactness`` (``kind``, ``reason``, ``tolerance``), ``notes``
* ``output``: ``files`` (``sha256`` and ``bytes`` by name), ``tensors``, ``bytes``, ``parameters``
* ``parameters``: ``before`` and ``after``
* ``decisions``: what the method decided, by layer
* ``digest``: SHA-256 of this record without this key
* ``units``: metrics by unit; ``unchanged``: how many tensors were copied byte for byte
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

from .. import __version__
from ..checkpoint.region import Region
from ..methods import spelt
from ..plan import Plan
from ..sources import Source

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "scikit-learn")


def libraries() -> dict[str, str]:
    """Versions of what computes the output, without importing any of it."""
    found = {"python": platform.python_version()}
    return found | {name: version for name in LIBRARIES if (version := _version(name))}


@cache
def _version(name: str) -> str | None:
    """Of an installed distribution; looking it up takes milliseconds."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def self_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of the record without its own ``digest``, as canonical JSON."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def dump(record: Mapping[str, Any]) -> bytes:
    """The record as it is written: with its digest, stable order, readable, ending in a newline."""
    # Digested as it will be read back: text keys, lists for tuples.
    read_back = json.loads(json.dumps(record))
    record = {**read_back, "digest": self_digest(read_back)}
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def command_line(
    command: str,
    method: str,
    sources: Sequence[str],
    options: Mapping[str, object],
    seed: int,
    statistics: Sequence[str],
) -> list[str]:
    """The arguments that repeat the run, without those that do not change its output."""
    words = ["moesurg", *spelt(command, method, sources)]
    for key, value in options.items():
        if value is None:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + key.replace("_", "-"))
        else:
            words.extend([flag, str(value)])
    return [*words, *statistics, "--seed", str(seed)]


def base_record(command: str, method: str) -> dict[str, Any]:
    """The part that every report begins with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "moesurg": __version__,
        "libraries": libraries(),
        "operation": command,
        "method": method,
    }


def parameters(sources: Sequence[Source], plan: Plan) -> dict[str, int]:
    """Stored numbers of all sources together, and of the output."""
    before = sum(
        Region(name, info.shape).count
        for source in sources
        for name, info in source.checkpoint.tensors.items()
    )
    after = sum(Region(spec.name, spec.shape).count for spec in plan.tensors)
    return {"before": before, "after": after}

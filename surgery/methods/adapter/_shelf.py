"""Outputs of several adapters: the tensors of each below its folder, its config, and the list of folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.output import Written, config
from ...checkpoint.formats import ADAPTER
from ...checkpoint.layout import TensorSpec
from ...outputs import config_bytes


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter of the output.

    Attributes:
        folder: its name.
        written: its modules.
        facts: what the list of folders says of it, JSON values.
    """

    folder: str
    written: Sequence[Written]
    facts: Mapping[str, Any]


def place(entry: Written, folder: str) -> Written:
    """A module whose tensors are planned below a folder."""
    module = entry.module
    down = dataclasses.replace(module.down, tensor=f"{folder}/{module.down.tensor}")
    up = dataclasses.replace(module.up, tensor=f"{folder}/{module.up.tensor}")
    return dataclasses.replace(entry, module=dataclasses.replace(module, down=down, up=up))


def specs(members: Sequence[Member]) -> list[TensorSpec]:
    """All tensors, under their names in the plan."""
    return [
        spec
        for member in members
        for entry in member.written
        for spec in place(entry, member.folder).specs
    ]


def files(members: Sequence[Member], adapters: Sequence[Any]) -> dict[str, bytes]:
    """Every member's config."""
    return {
        f"{member.folder}/{ADAPTER.config}": config_bytes(config(adapters, member.written))
        for member in members
    }


def listing(members: Sequence[Member], **facts: object) -> dict[str, object]:
    """The contents of ``shelf.json``."""
    return {
        "schema_version": 1,
        "members": {member.folder: json.loads(json.dumps(member.facts)) for member in members},
        **facts,
    }

"""Numbers of kept experts that follow a schedule over the layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import custom, operate, stock, tensors

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(
    ("method", "family", "tier"),
    [
        ("aimer", "mixtral", "custom"),
        ("reap", "olmoe", "custom"),
        ("random", "minimax_m2", "padded"),
    ],
)
def test_layers_keep_what_the_schedule_says(
    method: str, family: str, tier: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """And each layer keeps what the same method keeps of it under one number for all layers."""
    source, out = checkpoint(family), tmp_path / "out"
    result = operate("prune", method, source, out, experts=6, schedule="descending:2-6")
    assert result["tier"] == tier
    decided = json.loads((out / "report.json").read_text())["decisions"]
    assert [len(decided[str(layer)]["kept"]) for layer in range(3)] == [6, 4, 2]
    operate("prune", method, source, tmp_path / "four", experts=4)
    same = json.loads((tmp_path / "four" / "report.json").read_text())["decisions"]
    assert decided["1"]["kept"] == same["1"]["kept"]
    (custom if tier == "custom" else stock)(out)


def test_a_level_schedule_is_no_schedule(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("prune", "aimer", source, tmp_path / "a", experts=4, schedule="mola:444")
    operate("prune", "aimer", source, tmp_path / "b", experts=4)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_schedules_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    with pytest.raises(UsageError, match="at most, --experts says 4"):
        operate("prune", "aimer", source, tmp_path / "out", experts=4, schedule="mola:642")
    with pytest.raises(InputError, match="cannot have 1 experts"):
        operate("prune", "aimer", source, tmp_path / "out", experts=4, schedule="ascending:1-4")
    with pytest.raises(UsageError, match="is no schedule"):
        operate("prune", "random", source, tmp_path / "out", experts=4, schedule="up")


def test_layers_of_several_sizes_are_reconstructed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = checkpoint("mixtral"), tmp_path / "out"
    options = {"experts": 6, "schedule": "6,4,2", "reconstruct": True, "sample": 256}
    operate("prune", "reap", source, out, **options)
    custom(out)

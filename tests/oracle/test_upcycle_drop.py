"""Drop-Upcycling: what is kept is the parent's, what is redrawn has its moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import PAIRS, drift, operate, stock, tensors

Checkpoint = Callable[..., Path]
PREFIX = "model.layers.1."
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def expert(found: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One Mixtral expert as neurons by row."""
    rows = {
        role: found[f"{PREFIX}block_sparse_moe.experts.{number}.{name}.weight"]
        for role, name in NAMES.items()
    }
    return rows | {"down": rows["down"].T}


def parent(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = {role: found[f"{PREFIX}mlp.{role}_proj.weight"] for role in NAMES}
    return rows | {"down": rows["down"].T}


def origin(rows: torch.Tensor, of: torch.Tensor) -> list[int]:
    """Which row of ``of`` each row is, -1 for none."""
    same = (rows[:, None, :] == of[None, :, :]).all(dim=2)
    return [int(row.nonzero()[0]) if row.any() else -1 for row in same]


@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_without_redrawing_it_is_a_permuted_exact_copy(
    checkpoint: Checkpoint, tmp_path: Path, family: str, target: str
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    result = operate("upcycle", "drop", source, output, experts=3, reinit=0.0, target=target)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    if target == "mixtral":
        found = origin(expert(tensors(output), 1)["gate"], parent(tensors(source))["gate"])
        assert sorted(found) == list(range(48))
        assert found != list(range(48))


def test_the_same_neurons_of_all_matrices_are_redrawn(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    result = operate("upcycle", "drop", source, output, experts=2, reinit=0.3)
    assert result["exactness"]["kind"] == "approximate"
    dense, moe = parent(tensors(source)), tensors(output)
    sets = []
    for number in range(2):
        found = {role: origin(rows, dense[role]) for role, rows in expert(moe, number).items()}
        assert found["gate"] == found["up"] == found["down"]
        assert found["gate"].count(-1) == int(48 * 0.3)
        sets.append(found["gate"])
    assert sets[0] != sets[1]


def test_a_set_per_matrix_leaves_fewer_neurons_intact(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate("upcycle", "drop", source, output, experts=1, top_k=1, index_set="per-projection")
    dense, moe = parent(tensors(source)), expert(tensors(output), 0)
    found = {role: origin(rows, dense[role]) for role, rows in moe.items()}
    assert all(rows.count(-1) == 24 for rows in found.values())
    intact = [rows for rows in zip(*found.values(), strict=True) if -1 not in rows]
    assert 0 < len(intact) < 15


def test_redrawn_blocks_have_the_moments_of_what_they_replace(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate("upcycle", "drop", source, output, experts=2, reinit=1.0)
    dense, moe = parent(tensors(source)), expert(tensors(output), 1)
    for role, rows in moe.items():
        count = rows.numel()
        mean, std = float(dense[role].mean()), float(dense[role].std())
        assert float(rows.mean()) == pytest.approx(mean, abs=5 * std / count**0.5)
        assert float(rows.std()) == pytest.approx(std, rel=5 / (2 * count) ** 0.5)


def test_the_qwen_partition_cuts_shuffled_copies_laid_end_to_end(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    options: dict[str, Any] = {"experts": 5, "expert_width": 20, "preset": "qwen", "reinit": 0.0}
    operate("upcycle", "drop", source, output, **options)
    dense, moe = parent(tensors(source)), tensors(output)
    row = [n for e in range(5) for n in origin(expert(moe, e)["up"], dense["up"])]
    # 100 neurons of copies of 48: two whole copies, and four neurons of a third.
    assert sorted(row[:48]) == sorted(row[48:96]) == list(range(48))
    assert len(set(row[96:])) == 4
    stock(output)


def test_a_shared_expert_is_built_the_same_way(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("qwen2"), tmp_path / "moe"
    options: dict[str, Any] = {"experts": 6, "expert_width": 16, "shared_width": 64, "reinit": 0.25}
    operate("upcycle", "drop", source, output, preset="qwen", **options)
    dense, moe = parent(tensors(source)), tensors(output)
    gate = moe[f"{PREFIX}mlp.shared_expert.gate_proj.weight"]
    assert gate.shape == (64, 32)
    found = origin(gate, dense["gate"])
    assert found.count(-1) == 16
    assert bool(moe[f"{PREFIX}mlp.shared_expert_gate.weight"].any())
    stock(output)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reinit": 1.5}, UsageError),
        ({"preset": "qwen"}, UsageError),
        ({"expert_width": 0}, UsageError),
        ({"expert_width": 49}, InputError),
        ({"preset": "qwen", "expert_width": 48}, InputError),
        ({"shared_width": 8, "target": "mixtral"}, InputError),
    ],
)
def test_what_cannot_be_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        operate("upcycle", "drop", checkpoint("llama"), tmp_path / "moe", experts=2, **options)

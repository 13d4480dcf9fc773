"""MC-SMoE without training: nothing compressed is M-SMoE, and what is lost is what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.errors import UsageError
from tests.oracle.helpers import operate, tensors

Checkpoint = Callable[..., Path]


def test_without_loss_it_is_m_smoe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("merge", "m-smoe", source, tmp_path / "merged", experts=4)
    merged = tensors(tmp_path / "merged")
    for name, options in (("rank", {"rank": 999}), ("rows", {"rank": 1, "keep_rows": 1.0})):
        operate("merge", "mc-smoe", source, tmp_path / name, experts=4, **options)
        found = tensors(tmp_path / name)
        assert all(torch.equal(found[key], merged[key]) for key in merged)


def test_what_is_lost_is_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("merge", "m-smoe", source, tmp_path / "merged", experts=4)
    options = {"rank": 4, "keep_rows": 0.2}
    operate("merge", "mc-smoe", source, tmp_path / "out", experts=4, **options)
    merged, found = tensors(tmp_path / "merged"), tensors(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "as factors and rows an expert of" in " ".join(report["notes"])
    for name in merged:
        if "experts." not in name:
            assert torch.equal(found[name], merged[name])
            continue
        layer, slot, part = name.split(".")[2], name.split(".")[5], name.split(".")[6]
        told = report["units"][f"layer.{layer}.expert.{slot}"][f"group.{slot}"]["factors"]
        lost = float((found[name] - merged[name]).norm() / merged[name].norm())
        assert lost == pytest.approx(told[part.removesuffix("_proj")], rel=1e-4)
        exact = (found[name] == merged[name]).all(dim=1)
        assert int(exact.sum()) == int(0.2 * len(exact))
        assert torch.linalg.matrix_rank(found[name][~exact].double(), atol=1e-5) == 4


@pytest.mark.parametrize("options", [{"rank": -1}, {"keep_rows": 2.0}, {"refits": -1}])
def test_senseless_numbers(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, float]
) -> None:
    with pytest.raises(UsageError, match="should"):
        operate("merge", "mc-smoe", checkpoint("qwen3_moe"), tmp_path / "x", experts=4, **options)

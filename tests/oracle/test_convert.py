"""Layouts of experts against those that stock transformers writes, there and back."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures import families
from moesurg.surgery.errors import InputError
from moesurg.surgery.methods.convert.layout import LAYOUTS
from tests.oracle.helpers import drift, operate, rewrite, tensors

Checkpoint = Callable[..., Path]
BOTH = sorted(
    name
    for name, family in families().items()
    if family.moe is not None and {layout.kind for layout in family.moe.layouts} == set(LAYOUTS)
)
ONE = sorted(
    name for name, family in families().items() if family.moe is not None and name not in BOTH
)


def assert_same_bytes(first: Path, second: Path) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", BOTH)
def test_each_layout_becomes_the_one_that_stock_writes(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Both ways, every tensor of the whole model by name, type and value; so there and back is the identity."""
    apart, together = checkpoint(family), checkpoint(family, layout="fused")
    operate("convert", "layout", apart, tmp_path / "fused", layout="fused")
    assert_same_bytes(tmp_path / "fused", together)
    operate("convert", "layout", together, tmp_path / "apart", layout="per-expert")
    assert_same_bytes(tmp_path / "apart", apart)
    operate("convert", "layout", tmp_path / "fused", tmp_path / "back", layout="per-expert")
    assert_same_bytes(tmp_path / "back", apart)
    # The same numbers at other addresses: sums of a product may round differently, no more.
    assert drift(tmp_path / "fused", apart) < 1e-5
    for folder in ("fused", "back"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert written == json.loads((apart / "config.json").read_text())


@pytest.mark.parametrize("family", ONE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_family_of_one_layout_is_refused(
    family: str, layout: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reason = "already" if layout == "fused" else "fused only"
    with pytest.raises(InputError, match=reason):
        operate("convert", "layout", checkpoint(family), tmp_path / "out", layout=layout)


def test_experts_of_several_types_are_not_fused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("olmoe")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    mixed = rewrite(folder, tmp_path / "mixed", {name: tensors(folder)[name].bfloat16()})
    with pytest.raises(InputError, match=r"layers\.1\..*BF16.*gate_up_proj.*F32"):
        operate("convert", "layout", mixed, tmp_path / "out", layout="fused")


def test_a_dense_model_has_no_layout(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no experts to convert"):
        operate("convert", "layout", checkpoint("llama"), tmp_path / "out", layout="fused")


def test_the_command_line_and_its_report(
    checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The command in the report repeats the run; the option is the method."""
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    out = tmp_path / "out"
    assert call_cli("convert", source, "--layout", "fused", "-o", out).code == 0
    words = json.loads((out / "report.json").read_text())["command"]
    assert shlex.join(words) == f"moesurg convert {source} --layout fused --seed 0"
    again = call_cli(*words[1:], "-o", tmp_path / "again")
    assert again.code == 0
    assert (out / "report.json").read_bytes() == (tmp_path / "again" / "report.json").read_bytes()
    assert call_cli("verify", out).code == 0
    shown = call_cli("convert", source, "--layout", "stacked", "-o", tmp_path / "no")
    assert (shown.code, "stacked" in shown.err) == (2, True)
    shown = call_cli("convert", source, "-o", tmp_path / "no")
    assert (shown.code, "--layout" in shown.err) == (2, True)

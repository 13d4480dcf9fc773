"""MoTE's starting point: ternary experts beside the whole feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError
from tests.oracle.helpers import (
    assert_generates,
    custom,
    custom_logits,
    drift,
    logits,
    operate,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
PARENTS = ["llama", "qwen2", "ernie4_5", "hunyuan_v1_dense", "cohere2"]


@pytest.mark.parametrize("parent", PARENTS)
def test_packed_and_dense_are_one_function(
    parent: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(parent, dtype="bfloat16")
    ids = token_ids(source)
    options = {"experts": 3, "activations": "full"}
    for form in ("packed", "dense"):
        operate("upcycle", "ternary", source, tmp_path / form, form=form, **options)
    found, wanted = custom_logits(tmp_path / "packed", ids), logits(tmp_path / "dense", ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert float((wanted - logits(source, ids)).abs().max()) > 1e-2


@pytest.mark.parametrize("parent", ["llama", "ernie4_5"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_silent_experts_leave_the_function(
    parent: str, form: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(parent)
    result = operate(
        "upcycle", "ternary", source, tmp_path / "out", experts=3, form=form, start="zero"
    )
    assert result["exactness"]["kind"] == "exact"
    if form == "dense":
        assert drift(source, tmp_path / "out") < 1e-4
    ids = token_ids(source)
    read = logits if form == "dense" else custom_logits
    assert float((read(tmp_path / "out", ids) - logits(source, ids)).abs().max()) < 1e-4


def test_a_layer_is_the_formula(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Shared expert plus weight times the ternary one, with 8-bit activations, written out in float64."""
    source = checkpoint("llama")
    operate("upcycle", "ternary", source, tmp_path / "out", experts=3)
    model = custom(tmp_path / "out")
    mlp = model.model.layers[1].mlp
    dense = {
        part: tensors(source)[f"model.layers.1.mlp.{part}_proj.weight"].double()
        for part in ("gate", "up", "down")
    }

    def ternary(matrix: torch.Tensor) -> torch.Tensor:
        alpha = matrix.abs().mean().float().double()
        return alpha * (matrix / alpha).round().clamp(-1, 1)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = 127 / x.abs().max()
        return (x * scale).round().clamp(-128, 127) / scale

    def forward(x: torch.Tensor, change: Any, cut: Any) -> torch.Tensor:
        gate, up, down = (change(dense[part]) for part in ("gate", "up", "down"))
        given = cut(x)
        return down @ cut(torch.nn.functional.silu(gate @ given) * (up @ given))

    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = mlp(x_TD[None])
    found = (found[0] if isinstance(found, tuple) else found)[0].double()
    close = 0
    p_TE = (x_TD @ mlp.gate.weight.detach().T).double().softmax(-1)
    assert float(p_TE.amax()) < 0.9
    for x, y, p in zip(x_TD.double(), found, p_TE.amax(-1), strict=True):
        wanted = forward(x, lambda m: m, lambda v: v) + p * forward(x, ternary, rounded)
        close += bool((y - wanted).abs().max() < 1e-3)
    # A rounding of activations may fall on the other side in float32.
    assert close >= 36


def test_four_codes_take_a_byte(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    operate("upcycle", "ternary", source, tmp_path / "out", experts=5)
    found = tensors(tmp_path / "out")
    codes = [value for name, value in found.items() if name.endswith("_codes")]
    assert sum(value.numel() for value in codes) == 3 * 5 * 3 * 32 * 48 // 4
    assert all(value.dtype == torch.uint8 for value in codes)


def test_it_generates_with_a_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen2", dtype="bfloat16")
    operate("upcycle", "ternary", source, tmp_path / "out", experts=3)
    assert_generates(custom(tmp_path / "out"), token_ids(source, rows=2))


def test_families_without_a_shared_expert_are_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="with a shared expert"):
        operate("upcycle", "ternary", checkpoint("qwen3"), tmp_path / "out", experts=3)
    with pytest.raises(InputError, match="has no shared expert"):
        operate(
            "upcycle", "ternary", checkpoint("llama"), tmp_path / "out", experts=3, target="mixtral"
        )
    with pytest.raises(InputError, match="is a mixture already"):
        operate("upcycle", "ternary", checkpoint("mixtral"), tmp_path / "out", experts=3)


def test_expanding_gives_the_dense_form(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    for form, activations in (("packed", "full"), ("dense", "full")):
        out = tmp_path / form
        operate("upcycle", "ternary", source, out, experts=2, form=form, activations=activations)
    operate("convert", "expand", tmp_path / "packed", tmp_path / "stock")
    assert drift(tmp_path / "dense", tmp_path / "stock") < 1e-6
    operate("upcycle", "ternary", source, tmp_path / "int8", experts=2)
    with pytest.raises(InputError, match="to 8 bits"):
        operate("convert", "expand", tmp_path / "int8", tmp_path / "no")

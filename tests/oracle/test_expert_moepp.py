"""MoE++'s router: two layers and a residual from the mixture before, against the equations and the linear router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import assert_generates, custom, logits, operate, tensors, token_ids

Checkpoint = Callable[..., Path]
KINDS = {"zero": 2, "copy": 1, "constant": 2}
BOTH = {"router": "two-layer", "gating_residual": True}


def run(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = custom(folder)(input_ids=ids).logits
    return found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("options", [{"gating_residual": True}, BOTH])
def test_it_begins_as_the_linear_router(
    family: str, options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The same new rows are drawn, so that the outputs are those of a linear router, up to the tanh."""
    source = checkpoint(family)
    operate("expert", "null", source, tmp_path / "plain", **KINDS, top_k=3)
    operate("expert", "null", source, tmp_path / "out", **KINDS, top_k=3, **options)
    ids = token_ids(source)
    before, after = run(tmp_path / "plain", ids), run(tmp_path / "out", ids)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 if options != BOTH else 2e-3)
    found = verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())
    assert found["verified"]


@pytest.mark.parametrize("family", ["minimax_m2", "glm4_moe"])
def test_barred_experts_and_a_residual_change_nothing(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    options: dict[str, Any] = {"barred": True, "gating_residual": True}
    result = operate("expert", "null", source, tmp_path / "out", **KINDS, **options)
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source)
    torch.testing.assert_close(run(tmp_path / "out", ids), logits(source, ids), rtol=0, atol=1e-4)


def test_logits_are_what_the_equation_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With trained values in place of the start: each layer's logits, from its inputs and the logits before."""
    source, output = checkpoint("qwen3_moe"), tmp_path / "out"
    operate("expert", "null", source, output, **KINDS, top_k=3, **BOTH)
    generator = torch.Generator().manual_seed(0)
    found = tensors(output)
    for name in found:
        if ".mlp.gate." in name:
            found[name] = 0.3 * torch.randn(found[name].shape, generator=generator)
    save_file(found, output / "model.safetensors", metadata={"format": "pt"})
    model = custom(output)
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        layer.mlp.gate.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    ids = token_ids(source)
    with torch.no_grad():
        model(input_ids=ids)
    before = None
    for layer, x, shown in zip(model.model.layers, given, seen, strict=True):
        gate = layer.mlp.gate
        assert gate.first.shape == (8 * 13, 32)
        outer, residual = gate.weight[:, : 8 * 13], gate.weight[:, 8 * 13 :]
        wanted = torch.tanh(x.reshape(-1, 32) @ gate.first.T) @ outer.T
        if before is not None:
            wanted = wanted + before @ residual.T
        else:
            assert residual.shape[1] == 0
        torch.testing.assert_close(shown, wanted, rtol=1e-4, atol=1e-4)
        before = wanted
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    last = model.model.layers[2].mlp.gate
    assert float(last.weight.grad[:, 8 * 13 :].abs().max()) > 0
    assert float(last.first.grad.abs().max()) > 0


def test_it_generates_with_a_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral", dtype="bfloat16")
    operate("expert", "null", source, tmp_path / "out", **KINDS, top_k=3, std=0.3, **BOTH)
    assert_generates(custom(tmp_path / "out"), token_ids(source, rows=2))


def test_what_cannot_have_it_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options: dict[str, Any] = {"zero": 1, "form": "stock", "gating_residual": True}
    with pytest.raises(UsageError, match="need model code"):
        operate("expert", "null", checkpoint("olmoe"), tmp_path / "out", **options)
    with pytest.raises(InputError):
        operate("expert", "null", checkpoint("gpt_oss"), tmp_path / "out", zero=1, **BOTH)

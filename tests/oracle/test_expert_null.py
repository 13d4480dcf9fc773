"""Experts that cost nothing, against the mixture written out token by token in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import assert_generates, custom, drift, logits, operate, stock, token_ids

Checkpoint = Callable[..., Path]
KINDS = {"zero": 2, "copy": 1, "constant": 2}


def written_out(mlp: Any, x_TD: torch.Tensor, top_k: int, *, renormalise: bool) -> torch.Tensor:
    """The mixture of 8 SwiGLU experts, 2 constant, 1 copy and 2 zero ones, by its definition."""
    experts = mlp.experts
    x_TD = x_TD.double()
    output = torch.zeros_like(x_TD)
    p_TE = (x_TD @ mlp.gate.weight.double().T).softmax(-1)
    assert p_TE.shape[1] == 13
    for token, x in enumerate(x_TD):
        chosen = sorted(range(13), key=lambda e, t=token: -float(p_TE[t, e]))[:top_k]
        weight = {e: p_TE[token, e] for e in chosen if e < 11 or not renormalise}
        total = sum(weight.values()) if renormalise else 1.0
        for expert, mass in weight.items():
            if expert < 8:
                gate, up = experts.gate_up_proj[expert].double().chunk(2)
                hidden = torch.nn.functional.silu(gate @ x) * (up @ x)
                value = experts.down_proj[expert].double() @ hidden
            elif expert < 10:
                a = (experts.constant_gates[expert - 8].double() @ x).softmax(-1)
                value = a[0] * x + a[1] * experts.constant_values[expert - 8].double()
            else:
                value = x if expert == 10 else torch.zeros_like(x)
            output[token] += mass / total * value
    return output


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_the_mixture_is_what_its_definition_says(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Mixtral and this Qwen3 renormalise, OLMoE does not."""
    source = checkpoint(family)
    operate("expert", "null", source, tmp_path / "out", **KINDS, std=0.4, top_k=4)
    model = custom(tmp_path / "out")
    x_TD = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        found = mlp(x_TD[None])
        wanted = written_out(mlp, x_TD, 4, renormalise=family != "olmoe")
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=1e-4)
    # Every kind was selected, so that every branch was compared.
    chosen = (x_TD @ mlp.gate.weight.T).topk(4).indices
    assert all(bool((chosen == expert).any()) for expert in range(13))


def test_zero_experts_of_a_stock_class_are_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("olmoe")
    ids = token_ids(source)
    for form in ("stock", "custom"):
        operate("expert", "null", source, tmp_path / form, zero=3, top_k=3, std=0.3, form=form)
    with torch.no_grad():
        found = custom(tmp_path / "custom")(input_ids=ids).logits
    torch.testing.assert_close(found, logits(tmp_path / "stock", ids), rtol=0, atol=1e-5)
    assert drift(source, tmp_path / "stock") > 1e-2
    with pytest.raises(InputError, match="renormalises the weights"):
        operate("expert", "null", checkpoint("mixtral"), tmp_path / "no", zero=1, form="stock")
    with pytest.raises(InputError, match="need model code"):
        operate("expert", "null", source, tmp_path / "no", copy=1, form="stock")


@pytest.mark.parametrize("family", ["minimax_m2", "glm4_moe"])
def test_barred_ones_change_nothing(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(family)
    result = operate("expert", "null", source, tmp_path / "out", **KINDS, barred=True)
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source)
    with torch.no_grad():
        found = custom(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, logits(source, ids), rtol=0, atol=1e-4)


def test_it_generates_with_a_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral", dtype="bfloat16")
    operate("expert", "null", source, tmp_path / "out", **KINDS, top_k=4, std=0.3)
    assert_generates(custom(tmp_path / "out"), token_ids(source, rows=2))


def test_what_makes_no_sense_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    with pytest.raises(UsageError, match="nothing to add"):
        operate("expert", "null", source, tmp_path / "out")
    with pytest.raises(InputError, match="--top-k 11"):
        operate("expert", "null", source, tmp_path / "out", zero=2, top_k=11)
    with pytest.raises(InputError, match="cannot be barred"):
        operate("expert", "null", source, tmp_path / "out", zero=2, barred=True)
    grouped = checkpoint("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(InputError, match="groups"):
        operate("expert", "null", grouped, tmp_path / "out", zero=2)
    with pytest.raises(InputError, match="has no experts"):
        operate("expert", "null", checkpoint("llama"), tmp_path / "out", zero=2)
    stock(source)

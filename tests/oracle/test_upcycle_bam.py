"""Fixed-gate BAM: one stock attention with N times the heads is the weighted sum of N attentions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import drift, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
PAIRS = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
]


@pytest.mark.parametrize(("family", "target"), PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"kv": "shared"}, {"gates": "0.7,0.2,0.1", "kv": "shared"}]
)
def test_equal_models_are_one_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, target: str, options: dict[str, Any]
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    result = operate(
        "upcycle", "bam", [source] * 3, output, target=target, **options, fold_gates=True
    )
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    assert stock(output).config.num_key_value_heads == (2 if options.get("kv") else 6)


def attention(folder: Path, hidden: torch.Tensor) -> torch.Tensor:
    """Output of the first layer's attention in stock transformers for given inputs of it."""
    model = stock(folder)
    found: list[torch.Tensor] = []

    def swap(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, {**keywords, "hidden_states": hidden}

    inner = model.model.layers[0].self_attn
    inner.register_forward_pre_hook(swap, with_kwargs=True)
    inner.register_forward_hook(lambda module, arguments, output: found.append(output[0]))
    with torch.no_grad():
        model(input_ids=token_ids(folder, length=hidden.shape[1], rows=hidden.shape[0]))
    return found[0]


def test_it_is_the_weighted_sum_of_the_attentions(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sources = [checkpoint("qwen2", seed=seed) for seed in range(3)]
    gates = [0.5, 0.3, 0.2]
    operate("upcycle", "bam", sources, tmp_path / "moe", gates="0.5,0.3,0.2", fold_gates=True)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    expected = sum(
        gate * attention(source, hidden) for gate, source in zip(gates, sources, strict=True)
    )
    assert torch.allclose(attention(tmp_path / "moe", hidden), expected, atol=1e-5)


def test_with_shared_keys_only_queries_and_outputs_differ(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Models with the averaged keys and values in the place of their own, attended one by one."""
    from tests.oracle.helpers import rewrite

    sources = [checkpoint("qwen2", seed=seed) for seed in range(2)]
    operate("upcycle", "bam", sources, tmp_path / "moe", kv="shared", fold_gates=True)
    dense = [tensors(source) for source in sources]
    names = [name for name in dense[0] if ".k_proj." in name or ".v_proj." in name]
    means = {name: (dense[0][name] + dense[1][name]) / 2 for name in names}
    moe = tensors(tmp_path / "moe")
    assert all(torch.allclose(moe[name], means[name]) for name in names)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    parts = [
        attention(rewrite(source, tmp_path / f"shared-{number}", means), hidden)
        for number, source in enumerate(sources)
    ]
    assert torch.allclose(attention(tmp_path / "moe", hidden), (parts[0] + parts[1]) / 2, atol=1e-5)


def test_generation_with_a_cache_continues_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "moe"
    result = operate("upcycle", "bam", [source] * 2, output, kv="shared", fold_gates=True)
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source, rows=1)
    first, second = (
        stock(folder).generate(ids, max_new_tokens=12, do_sample=False)
        for folder in (source, output)
    )
    assert torch.equal(first, second)


def test_gates_that_round_promise_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    result = operate(
        "upcycle", "bam", [source] * 3, tmp_path / "moe", dry_run=True, fold_gates=True
    )
    assert result["exactness"]["kind"] == "approximate"


@pytest.mark.parametrize("gates", ["0.5", "0.5,0.4", "1.5,-0.5", "a,b", "nan,1"])
def test_impossible_gates_are_usage_errors(
    checkpoint: Checkpoint, tmp_path: Path, gates: str
) -> None:
    with pytest.raises(UsageError, match="--gates"):
        operate(
            "upcycle",
            "bam",
            [checkpoint("llama")] * 2,
            tmp_path / "moe",
            gates=gates,
            fold_gates=True,
        )


def test_norms_on_query_and_key_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="norms on query and key"):
        operate("upcycle", "bam", [checkpoint("qwen3")] * 2, tmp_path / "moe", fold_gates=True)

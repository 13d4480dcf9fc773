"""BAM in JetMoE's stock class: attentions around shared keys and values, and feed-forwards, all mixed softly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import drift, operate, rewrite, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
SHARED = {"kv": "shared", "target": "jetmoe"}


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("mistral", 3)])
def test_equal_models_are_one_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, count: int
) -> None:
    parent, output = checkpoint(family, rms_norm_eps=1e-6), tmp_path / "moe"
    result = operate("upcycle", "bam", [parent] * count, output, **SHARED)
    assert (result["exactness"]["kind"], result["tier"]) == ("exact", "stock")
    assert drift(parent, output) < 1e-4
    model = stock(output)
    assert type(model).__name__ == "JetMoeForCausalLM"
    assert model.config.num_attention_heads == count * 4
    assert Model.open(output).family.model_type == "jetmoe"
    found = verify(str(output), reference=None, device="cpu", progress=Silent())
    assert found["verified"]


def test_a_larger_epsilon_drifts_as_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The fixed epsilon scales what layers are given by no more than the report says; elsewhere nothing differs."""
    parent = checkpoint("llama", rms_norm_eps=1e-2)
    result = operate("upcycle", "bam", [parent] * 2, tmp_path / "moe", **SHARED)
    assert result["exactness"]["kind"] == "approximate"
    assert "0.005 / v" in result["exactness"]["reason"]
    dense, moe = stock(parent), stock(tmp_path / "moe")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (model.model.layers[0].input_layernorm(x) for model in (moe, dense))
    share = (ours / theirs).mean(dim=1) - 1
    assert torch.allclose(share, 0.005 / x.square().mean(dim=1), rtol=0.05)
    for layer in (*moe.model.layers,):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.variance_epsilon = 1e-2
    ids = token_ids(parent)
    with torch.no_grad():
        assert torch.allclose(moe(ids).logits, dense(ids).logits, atol=1e-4)


def test_it_is_the_soft_mixture_of_both(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The first layer, module by module, against the models' own with averaged keys and values."""
    sources = [checkpoint("llama", seed=seed, rms_norm_eps=1e-6) for seed in range(2)]
    operate("upcycle", "bam", sources, tmp_path / "moe", **SHARED, router_std=0.5)
    dense = [tensors(source) for source in sources]
    means = {
        name: (dense[0][name] + dense[1][name]) / 2
        for name in dense[0]
        if "layers" not in name or "norm" in name or ".k_proj." in name or ".v_proj." in name
    }
    moe = stock(tmp_path / "moe")
    parents = [
        stock(rewrite(source, tmp_path / f"m{n}", means)) for n, source in enumerate(sources)
    ]
    u = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    place = torch.arange(9)[None]

    def attended(model: Any, part: Any) -> torch.Tensor:
        turned = model.model.rotary_emb(u, place)
        found: torch.Tensor = part(
            hidden_states=u, position_embeddings=turned, attention_mask=None
        )[0]
        return found

    with torch.no_grad():
        layer = moe.model.layers[0]
        gates = torch.softmax(u @ layer.self_attention.experts.router.layer.weight.T, dim=-1)
        parts = [attended(parent, parent.model.layers[0].self_attn) for parent in parents]
        wanted = sum(gates[..., n, None] * part for n, part in enumerate(parts))
        assert torch.allclose(attended(moe, layer.self_attention), wanted, atol=1e-5)
        gates = torch.softmax(u @ layer.mlp.router.layer.weight.T, dim=-1)
        wanted = sum(
            gates[..., n, None] * parent.model.layers[0].mlp(u) for n, parent in enumerate(parents)
        )
        assert torch.allclose(layer.mlp(u), wanted, atol=1e-5)
        assert torch.equal(moe.model.embed_tokens.weight, means["model.embed_tokens.weight"])


def test_generation_with_a_cache_continues_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    parent = checkpoint("llama", rms_norm_eps=1e-6)
    operate("upcycle", "bam", [parent] * 2, tmp_path / "moe", **SHARED)
    ids = token_ids(parent, rows=1)
    found = [
        stock(folder).generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache)
        for folder, cache in ((parent, True), (tmp_path / "moe", True), (tmp_path / "moe", False))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("family", "settings", "options", "error", "sentence"),
    [
        ("llama", {}, {"kv": "expert"}, UsageError, "share keys and values"),
        ("llama", {}, {"top_k": 1}, UsageError, "as many feed-forwards as attentions"),
        ("llama", {}, {"fold_gates": True}, UsageError, "leave out --fold-gates"),
        ("qwen2", {}, {}, InputError, "blocks of qwen2 are not JetMoE's"),
        ("qwen3", {}, {}, InputError, "none on query and key"),
        ("mistral", {"sliding_window": 8}, {}, InputError, "sliding window"),
        ("llama", {"attention_bias": True}, {}, InputError, "it has biases"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        operate(
            "upcycle",
            "bam",
            [checkpoint(family, **settings)] * 2,
            tmp_path / "moe",
            **{**SHARED, **options},
        )

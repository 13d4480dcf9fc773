"""BAM with a router over attention experts: the mixture is the gated sum of the sources' attentions, and it runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import (
    assert_generates,
    custom,
    custom_logits,
    logits,
    operate,
    rewrite,
    stock,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "granite", "cohere2", "ernie4_5"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_equal_models_are_one_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, kv: str
) -> None:
    source, output = checkpoint(family, dtype="bfloat16"), tmp_path / "moe"
    result = operate("upcycle", "bam", [source] * 3, output, kv=kv, norm_topk=True)
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source)
    assert float((custom_logits(output, ids) - logits(source, ids)).abs().max()) < 1e-4


def attention_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Output of the second layer's attention for given inputs of it."""
    found: list[torch.Tensor] = []
    inner = model.model.layers[1].self_attn

    def swap(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, {**keywords, "hidden_states": hidden}

    inner.register_forward_pre_hook(swap, with_kwargs=True)
    inner.register_forward_hook(lambda module, arguments, output: found.append(output[0]))
    with torch.no_grad():
        model(input_ids=torch.ones(hidden.shape[:2], dtype=torch.long))
    return found[0]


@pytest.mark.parametrize(
    ("family", "arguments"),
    [("qwen2", {}), ("qwen3", {}), ("cohere2", {"attention_bias": True})],
)
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_it_is_the_gated_sum_of_the_attentions(
    checkpoint: Checkpoint, tmp_path: Path, family: str, arguments: dict[str, Any], kv: str
) -> None:
    """Every source attended by itself, under the gates of the formula; with shared keys, with the averaged ones."""
    sources = [checkpoint(family, seed=seed, **arguments) for seed in range(3)]
    dense = [tensors(source) for source in sources]
    # Output biases and head norms that differ between the sources, which random models have not.
    changes: list[dict[str, torch.Tensor]] = [{} for _ in sources]
    generator = torch.Generator().manual_seed(5)
    for name, value in dense[0].items():
        if name.endswith(("o_proj.bias", "q_norm.weight")):
            for change in changes:
                change[name] = value + torch.rand(value.shape, generator=generator)
    if changes[0]:
        sources = [
            rewrite(source, tmp_path / f"source-{number}", change)
            for number, (source, change) in enumerate(zip(sources, changes, strict=True))
        ]
    operate("upcycle", "bam", sources, tmp_path / "moe", kv=kv, router_std=0.3)
    moe = tensors(tmp_path / "moe")
    if kv == "shared":
        names = [n for n in dense[0] if any(f".{k}." in n for k in ("k_proj", "v_proj", "k_norm"))]
        means = {name: sum(t[name] for t in dense) / 3 for name in names}
        assert all(torch.allclose(moe[name], mean) for name, mean in means.items())
        sources = [
            rewrite(source, tmp_path / f"shared-{number}", means)
            for number, source in enumerate(sources)
        ]
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    gates = (hidden @ moe["model.layers.1.self_attn.expert_router.weight"].T).softmax(-1)
    assert float(gates.std(dim=-1).mean()) > 0.05
    expected = sum(
        gates[..., number, None] * attention_of(stock(source), hidden)
        for number, source in enumerate(sources)
    )
    found = attention_of(custom(tmp_path / "moe"), hidden)
    assert torch.allclose(found, expected, atol=1e-5)


def test_feed_forwards_keep_their_share_of_the_softmax(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    sources = [checkpoint("llama", seed=seed) for seed in range(3)]
    operate("upcycle", "bam", sources, tmp_path / "moe", router_std=0.3)
    mlp = custom(tmp_path / "moe").model.layers[1].mlp
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    share, index = (x @ mlp.gate.weight.detach().T).softmax(-1).max(-1)
    experts = [stock(source).model.layers[1].mlp for source in sources]
    with torch.no_grad():
        found = mlp(x[None])
        wanted = [p * experts[int(e)](row) for row, p, e in zip(x, share, index, strict=True)]
    found = found[0] if isinstance(found, tuple) else found
    assert len(set(index.tolist())) == 3
    assert torch.allclose(found.reshape(40, 32), torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_constant_gates_fold(checkpoint: Checkpoint, tmp_path: Path, family: str, kv: str) -> None:
    sources = [checkpoint(family, seed=seed) for seed in range(3)]
    options = {"kv": kv, "top_k": 2, "router_std": 0.3}
    operate("upcycle", "bam", sources, tmp_path / "free", norm_topk=True, **options)
    operate("upcycle", "bam", sources, tmp_path / "folded", fold_gates=True, **options)
    zeros = {
        name: torch.zeros_like(value)
        for name, value in tensors(tmp_path / "free").items()
        if "expert_router" in name
    }
    assert len(zeros) == 3
    ids = token_ids(sources[0])
    free = rewrite(tmp_path / "free", tmp_path / "uniform", zeros)
    found, folded = custom_logits(free, ids), logits(tmp_path / "folded", ids)
    torch.testing.assert_close(found, folded, rtol=1e-4, atol=1e-5)
    assert float((custom_logits(tmp_path / "free", ids) - folded).abs().max()) > 1e-3


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_changes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, kv: str, attention: str
) -> None:
    sources = [checkpoint("llama", seed=seed) for seed in range(2)]
    operate("upcycle", "bam", sources, tmp_path / "moe", kv=kv, router_std=0.3)
    model = custom(tmp_path / "moe")
    model.set_attn_implementation(attention)
    ids = token_ids(sources[0], rows=2, length=12)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        start = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=start.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-5)
    assert_generates(model, ids)
    keys = start.past_key_values.layers[0].keys
    heads = stock(sources[0]).config.num_key_value_heads
    assert keys.shape[1] == heads * (2 if kv == "expert" else 1)


def test_gradients_reach_both_routers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sources = [checkpoint("llama", seed=seed) for seed in range(2)]
    operate("upcycle", "bam", sources, tmp_path / "moe")
    model = custom(tmp_path / "moe").train()
    ids = token_ids(sources[0], rows=2)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[0]
    for router in (layer.self_attn.expert_router, layer.mlp.gate):
        assert float(router.weight.grad.abs().max()) > 0


def hollow(folder: Path) -> Path:
    """The paper's dense model of 590 million parameters as headers and a config; its weights are a hole."""
    hidden, width, layers, vocabulary, heads = 1024, 2048, 6, 256_000, 8
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        place = f"model.layers.{layer}."
        shapes[place + "input_layernorm.weight"] = (hidden,)
        for name in "qkvo":
            shapes[f"{place}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden))):
            shapes[f"{place}mlp.{name}_proj.weight"] = shape
        shapes[place + "mlp.down_proj.weight"] = (hidden, width)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sorted(shapes.items()):
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert end == 2 * 587_209_728
    return folder


@pytest.mark.parametrize(("kv", "count"), [("expert", 776_002_560), ("shared", 738_253_824)])
def test_parameters_are_the_papers(tmp_path: Path, kv: str, count: int) -> None:
    from moesurg.surgery.architectures.model import Model
    from moesurg.surgery.methods import load

    model = Model.open(hollow(tmp_path / "seed"))
    bam = load("upcycle", "bam")
    draft = bam.plan([model] * 4, bam.parse({"kv": kv}))
    total = 0
    for tensor in draft.tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        total += elements
    assert total == count


def test_what_cannot_be_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    llama, output = [checkpoint("llama")] * 2, tmp_path / "out"
    with pytest.raises(UsageError, match="only --fold-gates"):
        operate("upcycle", "bam", llama, output, gates="0.5,0.5")
    for family in ("olmo2", "hunyuan_v1_dense"):
        with pytest.raises(InputError, match="norms query and key"):
            operate("upcycle", "bam", [checkpoint(family)] * 2, output)
    with pytest.raises(InputError, match="two or more"):
        operate("upcycle", "bam", llama[:1], output)
    assert not output.exists()

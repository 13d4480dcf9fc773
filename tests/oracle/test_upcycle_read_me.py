"""Read-ME: masks and router against explicit computations in the stock model, generation with and without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.linalg.logistic import fit
from moesurg.surgery.modeling.moesurg_read_me import trailing
from tests.oracle.helpers import TEXTS, custom, logits, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]


def sequences_of(folder: Path, files: tuple[Path, ...]) -> Any:
    from moesurg.surgery.calibration.corpus import read_corpus
    from moesurg.surgery.calibration.sequences import tokenise

    return tokenise(read_corpus(files), folder, tokens=600, seq_len=64)


def masks_of(folder: Path, files: tuple[Path, ...], width: int) -> list[torch.Tensor]:
    """Masks of every layer, bool [C, F], from the stock model's neurons on every sequence by itself."""
    sequences, model = sequences_of(folder, files), stock(folder)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, found in zip(model.model.layers, seen, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, found=found: found.append(args[0][0].double().abs())
        )
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    masks = []
    for found in seen:
        mean_CF = torch.stack(
            [
                torch.cat(
                    [x for x, of in zip(found, sequences.domain_of, strict=True) if of == d]
                ).mean(dim=0)
                for d in range(len(files))
            ]
        )
        mask_CF = torch.zeros(mean_CF.shape, dtype=torch.bool)
        masks.append(mask_CF.scatter(1, mean_CF.topk(width, dim=1).indices, True))
    return masks


def choices(evidence_VC: torch.Tensor, half_life: float, ids_BT: torch.Tensor) -> torch.Tensor:
    """Every token's expert, by the recursion z_t = lambda z_(t-1) + u(x_t)."""
    factor = 0.5 ** (1 / half_life) if half_life else 0.0
    z_BC = torch.zeros(len(ids_BT), evidence_VC.shape[1], dtype=torch.float64)
    found = []
    for ids_B in ids_BT.T:
        z_BC = factor * z_BC + evidence_VC[ids_B].double()
        found.append(z_BC.argmax(dim=-1))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("residual", ["shared", "fused"])
@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_it_is_the_dense_model_under_the_masks_of_its_choices(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...], family: str, residual: str
) -> None:
    source, output = checkpoint(family), tmp_path / "out"
    options = {"experts": 3, "fraction": 0.6, "residual": residual, "half_life": 4}
    operate("upcycle", "read-me", source, output, data=texts, **options)
    model, dense = custom(output), stock(source)
    neurons = dense.model.layers[0].mlp.down_proj.in_features
    width = round(0.6 * neurons)
    masks = masks_of(source, texts, width)
    ids_BT = token_ids(source)
    ids_BT[1] = torch.from_numpy(sequences_of(source, texts).ids[0])[: ids_BT.shape[1]]
    choice_BT = choices(model.model.pre_router.evidence, 4, ids_BT)
    assert len(torch.unique(choice_BT)) == 3
    for layer, mask_CF in zip(dense.model.layers, masks, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, mask_CF=mask_CF: (args[0] * mask_CF[choice_BT],)
        )
    with torch.no_grad():
        wanted, found = dense(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert float((logits(source, ids_BT) - found).abs().max()) > 1e-3
    report = json.loads((output / "report.json").read_text())
    shared = [int(mask_CF.all(dim=0).sum()) for mask_CF in masks]
    assert [report["decisions"][str(index)]["shared"] for index in range(len(masks))] == shared
    assert any("untrained" in note for note in report["notes"])
    sizes = [
        0 if layer.mlp.shared is None else layer.mlp.shared.gate_proj.out_features
        for layer in model.model.layers
    ]
    assert sizes == (shared if residual == "shared" else [0] * len(masks))
    assert min(shared) > 0


@pytest.mark.parametrize(
    ("family", "residual"),
    [
        ("llama", "fused"),
        ("qwen2", "shared"),
        ("qwen3", "shared"),
        ("mistral", "shared"),
        ("granite", "fused"),
        ("olmo2", "shared"),
        ("ernie4_5", "shared"),
        ("hunyuan_v1_dense", "shared"),
    ],
)
def test_full_masks_are_the_dense_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, residual: str
) -> None:
    source, output = checkpoint(family), tmp_path / "out"
    result = operate(
        "upcycle", "read-me", source, output, experts=2, fraction=1.0, residual=residual
    )
    assert result["exactness"]["kind"] == "exact"
    ids_BT = token_ids(source)
    with torch.no_grad():
        found = custom(output)(input_ids=ids_BT).logits
    torch.testing.assert_close(found, logits(source, ids_BT), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def routed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of four narrow experts, whose choices change along a text."""
    folder = tmp_path_factory.mktemp("read-me")
    files = []
    for number, text in enumerate([*TEXTS.values(), "zebra? yes! quick: jumping foxes; " * 40]):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(text)
    options = {"experts": 4, "fraction": 0.3, "half_life": 8}
    source = checkpoint("llama", seed=5)
    operate("upcycle", "read-me", source, folder / "out", data=tuple(files), **options)
    return custom(folder / "out")


def test_generation_with_a_cache_is_generation_without(routed: Any) -> None:
    """Greedy and by beams, one prompt padded on the left."""
    ids_BT = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :5] = 0
    given = {"input_ids": ids_BT, "attention_mask": mask_BT, "max_new_tokens": 16}
    for more in ({}, {"num_beams": 3}):
        found = [
            routed.generate(**given, **more, do_sample=False, use_cache=use, pad_token_id=0)
            for use in (True, False)
        ]
        assert torch.equal(*found)
    padded = routed.generate(**given, do_sample=False, pad_token_id=0)[1]
    given = {"input_ids": ids_BT[1:2, 5:], "max_new_tokens": 16}
    alone = routed.generate(**given, do_sample=False, pad_token_id=0)[0]
    assert torch.equal(padded[5:], alone)


def test_pieces_of_a_text_give_the_logits_of_the_whole(routed: Any) -> None:
    """With a cache of the config's layers, one that makes its layers when used, and after a crop."""
    from transformers import DynamicCache

    ids_BT = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = routed(input_ids=ids_BT, use_cache=False).logits
        assert len(torch.unique(routed.model.layers[0].mlp.choice_BT)) > 1
        for cache in (None, DynamicCache(), DynamicCache(config=routed.config)):
            pieces = []
            for start, stop in ((0, 7), (7, 8), (8, 30)):
                out = routed(input_ids=ids_BT[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-4)
            cache.crop(-10)
            again = routed(input_ids=ids_BT[:, 20:], past_key_values=cache).logits
            torch.testing.assert_close(again, whole[:, 20:], atol=1e-5, rtol=1e-4)


def test_ids_are_needed_and_strange_masks_refused(routed: Any) -> None:
    ids_BT = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids"):
        routed(inputs_embeds=torch.zeros(1, 4, routed.config.hidden_size))
    with pytest.raises(ValueError, match="two axes"):
        routed(input_ids=ids_BT, attention_mask=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="use a dynamic one"):
        routed.generate(ids_BT, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    with pytest.raises(RuntimeError, match="outside of its model"):
        routed.model.layers[0].mlp(torch.zeros(2, 9, routed.config.hidden_size))


def test_sums_over_blocks_are_the_recursion() -> None:
    u_BTC = torch.randn(2, 700, 3, generator=torch.Generator().manual_seed(0)).double()
    for factor in (0.0, 0.5, 0.99):
        z_BC, wanted = torch.zeros(2, 3).double(), []
        for u_BC in u_BTC.unbind(dim=1):
            z_BC = factor * z_BC + u_BC
            wanted.append(z_BC)
        for past in (0, 1, 300):
            found = trailing(u_BTC, factor, past)
            torch.testing.assert_close(found, torch.stack(wanted, dim=1)[:, past:])


def test_evidence_is_the_logistic_fit_to_decayed_means_of_embeddings(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]
) -> None:
    source, output = checkpoint("llama"), tmp_path / "out"
    operate("upcycle", "read-me", source, output, data=texts, experts=3, router_l2=0.05)
    report = json.loads((output / "report.json").read_text())["units"]["router"]
    tried = {int(name): found for name, found in report["accuracy_held_out"].items()}
    assert sorted(tried) == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    best = report["half_life"]
    assert tried[best] == max(tried.values())
    assert report["accuracy"] > 0.7  # chance is a third
    embedding_VD = tensors(source)["model.embed_tokens.weight"].double()
    factor, sequences, rows = 0.5 ** (1 / best) if best else 0.0, sequences_of(source, texts), []
    for ids in sequences.ids:
        sum_D, weight = torch.zeros(embedding_VD.shape[1]).double(), 0.0
        for token in ids.tolist():
            sum_D, weight = factor * sum_D + embedding_VD[token], factor * weight + 1
            rows.append(sum_D / weight)
    label_N = torch.cat(
        [torch.full((len(x),), d) for x, d in zip(sequences.ids, sequences.domain_of, strict=True)]
    )
    rows_CD = fit(torch.stack(rows), label_N, 3, l2=0.05)
    wanted_VC = embedding_VD @ rows_CD.T
    found = tensors(output)
    torch.testing.assert_close(
        found["model.pre_router.evidence"].double(), wanted_VC, atol=1e-4, rtol=1e-4
    )
    assert found["model.pre_router.half_life"].tolist() == [best]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"experts": 3}, InputError, "2 texts are built in, this router needs 3"),
        ({"experts": 0}, UsageError, "--experts"),
        ({"experts": 2, "fraction": 0.0}, UsageError, "--fraction"),
        ({"experts": 2, "half_life": 3}, UsageError, "--half-life 3"),
        ({"experts": 2, "router_l2": 0.0}, UsageError, "--router-l2"),
    ],
)
def test_impossible_options_are_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        operate("upcycle", "read-me", checkpoint("llama"), tmp_path / "out", **options)


def test_biases_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without biases"):
        operate(
            "upcycle", "read-me", checkpoint("llama", mlp_bias=True), tmp_path / "out", experts=2
        )

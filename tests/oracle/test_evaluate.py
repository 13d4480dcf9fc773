"""Perplexity, divergence and drift against the full stock models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moesurg.surgery import evaluate as module
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.sequences import Sequences
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError
from moesurg.surgery.evaluate import drift, evaluate, evaluate_sources
from moesurg.surgery.progress import Silent

LENGTHS = (12, 5, 1, 12, 3)
DOMAIN_OF = (0, 1, 0, 1, 0)


def text() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(256, (n,), generator=generator).numpy() for n in LENGTHS)
    return Sequences(ids, DOMAIN_OF, ("code", "prose"), ("", ""), 12, sum(LENGTHS), "")


def run(folder: Path, reference: Path | None = None) -> dict[str, Any]:
    model = Model.open(folder)
    with TensorReader(model.checkpoint) as reader:
        if reference is None:
            return evaluate(model, reader, text())
        other = Model.open(reference)
        with TensorReader(other.checkpoint) as weights:
            return evaluate(model, reader, text(), reference=(other, weights))


def stock(folder: Path) -> list[tuple[float, torch.Tensor]]:
    """Stock loss (nan for a single token) and logits of every sequence."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    found = []
    with torch.no_grad():
        for ids in text().ids:
            row = torch.from_numpy(ids)[None]
            out = model(row, labels=row)
            found.append((float(out.loss), out.logits[0].double()))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen2_moe"])
def test_perplexity_is_the_stock_loss(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    found, expected = run(folder), stock(folder)
    for names in (("code",), ("prose",), ("code", "prose")):
        members = [i for i, of in enumerate(DOMAIN_OF) if ("code", "prose")[of] in names]
        predicted = sum(LENGTHS[i] - 1 for i in members)
        loss = sum(expected[i][0] * (LENGTHS[i] - 1) for i in members if LENGTHS[i] > 1)
        part = found["domains"][names[0]] if len(names) == 1 else found["overall"]
        assert part["predicted"] == predicted
        assert part["tokens"] == sum(LENGTHS[i] for i in members)
        assert part["loss"] == pytest.approx(loss / predicted, rel=1e-5)
        assert part["perplexity"] == pytest.approx(math.exp(loss / predicted), rel=1e-4)


@pytest.mark.parametrize("block", [1, 259 * 3, 1 << 23])
def test_comparison_is_the_stock_comparison(
    block: int, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", block)
    folder, reference = checkpoint("mixtral"), checkpoint("llama")
    overall = run(folder, reference)["overall"]
    ours = torch.cat([logits for _, logits in stock(folder)])
    theirs = torch.cat([logits for _, logits in stock(reference)])
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert overall["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert overall["top1_agreement"] == pytest.approx(float(agreed))
    difference = float((ours - theirs).abs().max())
    assert overall["max_logit_difference"] == pytest.approx(difference, rel=1e-5)
    alone = run(reference)["overall"]
    assert overall["reference_perplexity"] == pytest.approx(alone["perplexity"], rel=1e-9)


def test_a_model_is_no_distance_from_itself(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    for part in (run(folder, folder)["overall"], *run(folder, folder)["domains"].values()):
        assert part["kl"] == 0
        assert part["top1_agreement"] == 1
        assert part["max_logit_difference"] == 0


def test_layouts_are_one_model(checkpoint: Callable[..., Path]) -> None:
    found = run(checkpoint("olmoe"), checkpoint("olmoe", layout="fused"))["overall"]
    assert found["max_logit_difference"] == 0


def test_overall_is_the_sum_of_domains(checkpoint: Callable[..., Path]) -> None:
    found = run(checkpoint("qwen3_moe"), checkpoint("qwen3"))
    parts, overall = found["domains"].values(), found["overall"]
    tokens = np.array([part["tokens"] for part in parts])
    kl = np.array([part["kl"] for part in parts])
    assert overall["tokens"] == tokens.sum()
    assert overall["kl"] == pytest.approx(float(kl @ tokens / tokens.sum()))


def test_nothing_to_predict_is_none(checkpoint: Callable[..., Path]) -> None:
    model = Model.open(checkpoint("llama"))
    with TensorReader(model.checkpoint) as reader:
        overall: Any = evaluate(model, reader, Sequences.from_ids([[1], [2]]))["overall"]
    assert overall == {"tokens": 2, "predicted": 0, "loss": None, "perplexity": None}


def test_vocabularies_must_agree(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="has a vocabulary of 259"):
        run(checkpoint("llama"), checkpoint("llama", vocab_size=300))


def test_drift(checkpoint: Callable[..., Path]) -> None:
    one, other = Model.open(checkpoint("qwen3_moe")), Model.open(checkpoint("qwen3"))
    ids = [item.tolist() for item in text().ids]
    assert drift(one, one, ids) == 0
    ours = torch.cat([logits for _, logits in stock(one.folder)])
    theirs = torch.cat([logits for _, logits in stock(other.folder)])
    assert drift(one, other, ids) == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)


def test_sources_are_opened_tokenised_and_compared(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "prose.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    record = evaluate_sources(
        str(checkpoint("qwen3_moe")),
        reference=str(checkpoint("qwen3")),
        data=(data,),
        tokens=100,
        seq_len=32,
        device="cpu",
        progress=Silent(),
    )
    assert record["domains"] == {"prose": record["overall"]}
    assert record["overall"]["tokens"] == record["text"]["tokens"] == 100
    assert record["overall"]["kl"] > 0

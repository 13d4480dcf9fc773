"""A real language model through the whole chain: dense, mixture, merged mixture, the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.oracle.helpers import operate, stock

PROMPT = "The capital of France is Paris. It is known for"


@pytest.mark.slow
def test_smollm2_survives_upcycling_and_merging(smollm2: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    upcycled, merged = tmp_path / "moe", tmp_path / "merged"
    operate("upcycle", "sparse", smollm2, upcycled, experts=3, top_k=2, target="mixtral")
    operate("merge", "sub-moe", upcycled, merged, experts=2, tokens=64, seq_len=32)
    ids = torch.tensor([Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(PROMPT).ids])
    with torch.no_grad():
        dense = stock(smollm2)
        expected = dense(input_ids=ids).logits
        words = dense.generate(ids, max_new_tokens=8, do_sample=False)
        for folder in (upcycled, merged):
            model = stock(folder)
            assert float((model(input_ids=ids).logits - expected).abs().max()) <= 1e-3
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), words)

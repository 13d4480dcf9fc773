"""Experts of mixtures stored matrix by matrix: model code against the stock class with the matrices these stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.checkpoint.reader import open_checkpoint
from moesurg.surgery.errors import InputError
from tests.oracle.helpers import custom, operate, rewrite, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "pivot": ("svd", {"form": "pivot"}),
    "factors": ("svd", {"form": "factors", "ratio": 0.5}),
    "columns": ("lost", {"form": "parts", "exact": 0.1}),
    "rows": ("mc-smoe", {"form": "parts", "lowrank": "factors", "ratio": 0.5}),
    "cosine": ("dct", {"form": "parts"}),
    "quantised": ("residual", {"form": "parts", "rank": 3, "group": 16}),
}
"""Every form of a single matrix, with a method that writes it."""
FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "cohere2_moe",
]
OTHERS = ["gpt_oss", "jetmoe", "llama4_text"]
"""Families whose experts have biases, or are not called by index."""


def expand(folder: Path, output: Path) -> Path:
    assert operate("convert", "expand", folder, output)["tier"] == "stock"
    return output


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("form", RUNS)
def test_every_form_computes_what_its_matrices_do(
    form: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    method, options = RUNS[form]
    options = {"ratio": 0.25, **options}
    operate("compress", method, source, tmp_path / "small", **options)
    small, ids = custom(tmp_path / "small"), token_ids(source)
    found = logits(small, ids)
    whole = stock(expand(tmp_path / "small", tmp_path / "whole"))
    assert float((found - logits(whole, ids)).abs().max()) < 1e-4
    assert float((found - logits(stock(source), ids)).abs().max()) > 1e-3
    texts = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (small, whole)]
    assert torch.equal(*texts)
    before, after = experts_bytes(source), experts_bytes(tmp_path / "small")
    assert after <= (1 - options["ratio"]) * before


def experts_bytes(folder: Path) -> int:
    """Bytes of the experts; indices of pivots aside, which ``--ratio`` counts as one number each."""
    held = open_checkpoint(folder).tensors
    return sum(
        info.nbytes
        for name, info in held.items()
        if ".experts." in name and not name.endswith("pivot_index")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_called_by_index_takes_the_pivot_form(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    for form in ("pivot", "dense"):
        operate("compress", "svd", source, tmp_path / form, ratio=0.3, form=form)
    ids = token_ids(source)
    found, wanted = logits(custom(tmp_path / "pivot"), ids), logits(stock(tmp_path / "dense"), ids)
    assert float((found - wanted).abs().max()) < 2e-4
    assert float((wanted - logits(stock(source), ids)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_keep_their_experts(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    with pytest.raises(InputError, match=r"without biases|transposed or interleaved"):
        operate("compress", "svd", source, tmp_path / "out", ratio=0.3)
    for form in ("factors", "dense"):
        operate(
            "compress", "svd", source, tmp_path / form, ratio=0.6, form=form, targets="attention"
        )
    ids = token_ids(source)
    found = logits(custom(tmp_path / "factors"), ids)
    assert logits(stock(tmp_path / "dense"), ids).shape == found.shape
    whole = stock(expand(tmp_path / "factors", tmp_path / "whole"))
    assert float((found - logits(whole, ids)).abs().max()) < 1e-4


def test_experts_of_a_layer_share_a_rank_whatever_allocates_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plain, change = checkpoint("qwen3_moe"), {}
    for name, tensor in tensors(plain).items():
        head, found, rest = name.partition(".experts.")
        if found:
            # Every expert's spectrum has another shape, and every layer's.
            strength = float(rest.partition(".")[0]) * (1 + ("layers.0" in head))
            change[name] = tensor + strength * tensor[:, :1] @ tensor[:1]
    source = rewrite(plain, tmp_path / "uneven", change)
    runs = {"welore": ("welore", {}), "waterfill": ("svd", {"allocate": "waterfill"})}
    for name, (method, options) in runs.items():
        operate("compress", method, source, tmp_path / name, ratio=0.3, **options)
        custom(tmp_path / name)
        table = json.loads((tmp_path / name / "rank_plan.json").read_text())["matrices"]
        ranks: dict[tuple[str, str], set[int]] = {}
        for matrix, entry in table.items():
            head, found, rest = matrix.partition(".experts.")
            if found:
                ranks.setdefault((head, rest.split(".")[1]), set()).add(entry["rank"])
        assert all(len(found) == 1 for found in ranks.values())
        assert len({rank for found in ranks.values() for rank in found}) > 1
    # A table of ranks that is not so fits only matrices that are stored one by one.
    first = next(matrix for matrix in table if ".experts.0." in matrix)
    table[first]["rank"] -= 1
    (tmp_path / "plan.json").write_text(json.dumps({"matrices": table}))
    given: dict[str, Any] = {"rank_plan": str(tmp_path / "plan.json")}
    with pytest.raises(InputError, match="all of them need one rank"):
        operate("compress", "svd", source, tmp_path / "out", **given)
    operate("compress", "svd", source, tmp_path / "out", form="dense", **given)


def test_weights_loaded_after_a_forward_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Model code works out the order of outputs once; it has to forget it."""
    ids = token_ids(checkpoint("qwen3_moe"))
    models = []
    for seed in (0, 1):
        operate(
            "compress", "svd", checkpoint("qwen3_moe", seed=seed), tmp_path / f"{seed}", ratio=0.3
        )
        models.append(custom(tmp_path / f"{seed}"))
    first, second = (logits(model, ids) for model in models)
    assert float((first - second).abs().max()) > 1e-3
    models[0].load_state_dict(models[1].state_dict())
    assert torch.equal(logits(models[0], ids), second)

"""Pruning families beyond the first four: selection biases, groups, expert biases, packed storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError
from tests.oracle.helpers import drift, logits, operate, rewrite, stock, tensors, token_ids
from tests.oracle.test_families import BOTH, FAMILIES, GROUPED

Checkpoint = Callable[..., Path]
BIASED = ["deepseek_v3", "dots1", "glm4_moe", "minimax_m2", "gpt_oss"]
"""Families in which a large negative bias is an exact mask: it moves the selection and no weight."""


def silenced(source: Path, pruned: Path, target: Path) -> Path:
    """The original with the dropped experts' bias so low that they are never chosen."""
    model, change = Model.open(source), {}
    decisions = json.loads((pruned / "report.json").read_text())["decisions"]
    stored = tensors(source)
    for layer in model.moe_layers:
        assert layer.experts is not None
        bias = layer.experts.correction or layer.experts.router_bias
        assert bias is not None
        kept = decisions[str(layer.index)]["kept"]
        dropped = [expert for expert in range(model.experts) if expert not in kept]
        values = stored[bias.tensor].clone()
        values.view(-1)[dropped] = -1e9
        change[bias.tensor] = values
    return rewrite(source, target, change)


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_pruned_models_load_and_compute(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    operate("prune", "aimer", source, tmp_path / "out", experts=4)
    assert Model.open(tmp_path / "out").experts == 4
    assert logits(tmp_path / "out", token_ids(source, length=8, rows=1)).isfinite().all()


@pytest.mark.parametrize("family", BIASED)
def test_pruning_is_never_choosing_the_dropped(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    operate("prune", "reap", source, tmp_path / "out", experts=4, tokens=128)
    masked = silenced(source, tmp_path / "out", tmp_path / "masked")
    assert drift(masked, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_groups_lose_the_same_number_each(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    overrides = {**GROUPED[family], "n_group": 2, "topk_group": 1}
    source = checkpoint(family, **overrides)
    operate("prune", "reap", source, tmp_path / "out", experts=6, tokens=128)
    for decided in json.loads((tmp_path / "out" / "report.json").read_text())["decisions"].values():
        assert sum(expert < 4 for expert in decided["kept"]) == 3
    masked = silenced(source, tmp_path / "out", tmp_path / "masked")
    assert drift(masked, tmp_path / "out") < 1e-5
    with pytest.raises(InputError, match="groups"):
        operate("prune", "reap", source, tmp_path / "odd", experts=5, tokens=128)


@pytest.mark.parametrize("family", BOTH)
def test_the_fused_layout_is_pruned_alike(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = []
    for layout in ("per-expert", "fused"):
        operate("prune", "aimer", checkpoint(family, layout=layout), tmp_path / layout, experts=4)
        folders.append(tmp_path / layout)
    first, second = (Model.open(folder) for folder in folders)
    with TensorReader(first.checkpoint) as one, TensorReader(second.checkpoint) as two:
        for a, b in zip(first.moe_layers, second.moe_layers, strict=True):
            assert a.experts is not None
            assert b.experts is not None
            for expert in range(4):
                for part, region in a.experts.regions(expert).items():
                    assert torch.equal(one.read(region), two.read(b.experts.region(expert, part)))


@pytest.mark.parametrize(
    ("command", "method", "options"),
    [
        ("prune", "naee", {"experts": 6}),
        ("prune", "reap", {"experts": 4, "reconstruct": True}),
        ("merge", "mergemoe", {"experts": 4}),
        ("merge", "m-smoe", {"experts": 4, "reconstruct": True}),
        ("merge", "ream", {"experts": 4}),
    ],
)
def test_what_recomputes_experts_refuses_those_with_biases(
    command: str,
    method: str,
    options: dict[str, object],
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="experts of gpt_oss have biases"):
        operate(command, method, checkpoint("gpt_oss"), tmp_path / "out", dry_run=True, **options)
    assert not list(tmp_path.iterdir())


def test_naee_refuses_routers_with_biases(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="naee searches without them"):
        operate("prune", "naee", checkpoint("deepseek_v3"), tmp_path / "out", experts=6)


def test_a_pruned_mixture_generates(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("gpt_oss")
    operate("prune", "frequency", source, tmp_path / "out", experts=4, tokens=128)
    generated = stock(tmp_path / "out").generate(
        token_ids(source, rows=1), min_new_tokens=2, max_new_tokens=2, do_sample=False
    )
    assert generated.shape[1] == 26

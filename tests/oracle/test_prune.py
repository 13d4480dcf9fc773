"""Pruning experts: the pruned model is the stock model with masked logits, whoever chose the experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.statistics import Statistics
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods import names
from moesurg.surgery.methods.prune import hope
from moesurg.surgery.methods.prune._keep import candidates, subsets
from tests.oracle.helpers import (
    calibrated,
    decisions,
    drift,
    operate,
    rewrite,
    stock,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
METHODS = names("prune")
DATA_FREE = ("aimer", "random")


def statistics(source: Path, output: Path, tokens: int = 600, inputs: int = 0) -> Statistics:
    calibrated(source, output, tokens=tokens, inputs=inputs)
    return Statistics.open(output)


def mask(gate: Any, dropped: list[int]) -> None:
    """Make a stock router see minus infinity for some experts, before whatever it does to logits."""
    original, linear = gate.forward, torch.nn.functional.linear

    def masked(*args: Any) -> torch.Tensor:
        logits = linear(*args)
        logits[..., dropped] = float("-inf")
        return logits

    def forward(*args: Any) -> Any:
        with mock.patch("torch.nn.functional.linear", side_effect=masked) as called:
            found = original(*args)
        assert called.call_count == 1
        return found

    gate.forward = forward


def masked_logits(source: Path, kept: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    model = stock(source)
    for index, decided in kept.items():
        gate = model.model.layers[int(index)].mlp.gate
        rows = range(len(gate.weight))
        mask(gate, [expert for expert in rows if expert not in decided["kept"]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_a_pruned_model_is_the_original_with_masked_logits(
    checkpoint: Checkpoint, tmp_path: Path, family: str, layout: str
) -> None:
    source = checkpoint(family, layout=layout)
    for method, experts in (("random", 5), ("reap", 2)):
        output = tmp_path / method
        operate("prune", method, source, output, experts=experts)
        ids = token_ids(source)
        with torch.no_grad():
            found = stock(output)(input_ids=ids).logits
        expected = masked_logits(source, decisions(output), ids)
        assert float((found - expected).abs().max()) < 1e-5
        assert drift(source, output) > 1e-2


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kept_experts_and_their_rows_are_the_original_s_bytes(
    checkpoint: Checkpoint, tmp_path: Path, family: str, layout: str, dtype: str
) -> None:
    source = checkpoint(family, layout=layout, dtype=dtype)
    operate("prune", "random", source, tmp_path / "out", experts=3, seed=2)
    before, after = Model.open(source), Model.open(tmp_path / "out")
    old, new = tensors(source), tensors(tmp_path / "out")
    kept = {index: decided["kept"] for index, decided in decisions(tmp_path / "out").items()}
    assert len({tuple(experts) for experts in kept.values()}) > 1
    for first, second in zip(before.moe_layers, after.moe_layers, strict=True):
        assert first.experts is not None
        assert second.experts is not None
        assert second.experts.layout == first.experts.layout
        rows = old[first.experts.router.tensor][kept[str(first.index)]]
        assert torch.equal(new[second.experts.router.tensor], rows)
        for slot, expert in enumerate(kept[str(first.index)]):
            for projection, region in first.experts.regions(expert).items():
                there = second.experts.region(slot, projection)
                parts = [
                    found[where.tensor].flatten()[where.offset : where.offset + where.count]
                    for found, where in ((old, region), (new, there))
                ]
                assert torch.equal(*parts)
    inside = {name for layer in before.moe_layers for name in (layer.experts or layer).names}
    for name in set(old) - inside:
        assert torch.equal(old[name], new[name]), name
    changed = {
        key: value
        for key, value in json.loads((tmp_path / "out" / "config.json").read_text()).items()
        if before.config.raw.get(key) != value
    }
    assert set(changed) <= {"num_experts", "num_local_experts"}
    assert set(changed.values()) == {3}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "graft"])
def test_pruning_nothing_gives_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, method: str
) -> None:
    for family, layout in (("mixtral", "per-expert"), ("olmoe", "fused")):
        source, output = checkpoint(family, layout=layout), tmp_path / family
        result = operate("prune", method, source, output, experts=8)
        assert result["exactness"]["kind"] == "bitwise"
        before, after = tensors(source), tensors(output)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_generate_and_both_layouts_decide_alike(
    checkpoint: Checkpoint, tmp_path: Path, method: str
) -> None:
    for layout in ("per-expert", "fused"):
        source = checkpoint("qwen2_moe", layout=layout)
        operate("prune", method, source, tmp_path / layout, experts=5)
    assert decisions(tmp_path / "per-expert") == decisions(tmp_path / "fused")
    assert drift(tmp_path / "per-expert", tmp_path / "fused") < 1e-5
    model = stock(tmp_path / "fused")
    assert model.config.num_experts == 5
    generated = model.generate(token_ids(source, rows=1), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == 28


@pytest.mark.parametrize("method", DATA_FREE)
def test_data_free_methods_see_no_text(checkpoint: Checkpoint, tmp_path: Path, method: str) -> None:
    source = checkpoint("mixtral")
    with pytest.raises(UsageError, match="uses no statistics"):
        operate("prune", method, source, tmp_path / "out", experts=4, data=(tmp_path / "x.txt",))
    with mock.patch("moesurg.surgery.calibration.run.statistics_source") as calibration:
        result = operate("prune", method, source, tmp_path / "out", experts=4)
    assert not calibration.called
    assert result["output"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["statistics"] is None


@pytest.mark.parametrize("experts", [0, 1, 9])
def test_impossible_counts_are_refused_before_calibration(
    checkpoint: Checkpoint, tmp_path: Path, experts: int
) -> None:
    with (
        mock.patch("moesurg.surgery.calibration.run.statistics_source") as calibration,
        pytest.raises(InputError, match=f"--experts {experts}"),
    ):
        operate("prune", "reap", checkpoint("mixtral"), tmp_path / "x", experts=experts)
    assert not calibration.called
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_prune(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no experts to prune"):
        operate("prune", "aimer", checkpoint("llama"), tmp_path / "x", experts=4)


def test_dense_layers_of_a_mixture_pass_through(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe", mlp_only_layers=[1])
    operate("prune", "reap", source, tmp_path / "out", experts=4)
    assert set(decisions(tmp_path / "out")) == {"0", "2"}
    stock(tmp_path / "out")


# Scores


@pytest.mark.parametrize("family", MOE)
def test_reap_is_the_mean_of_what_the_stock_model_adds(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    """Selections and weights are the stock router's, and the weight is applied once."""
    source, found = checkpoint(family), tmp_path / "stats"
    # The statistics of exactly the rows that are kept: all tokens of the text.
    kept = statistics(source, found, tokens=200, inputs=200)
    model = stock(source)
    rows, _ = kept.inputs(0)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        _, weights, index = block.gate(torch.from_numpy(rows.copy()))
    dense = np.zeros((len(rows), 8))
    norms = np.zeros((len(rows), 8))
    for token, (chosen, given) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, coefficient in zip(chosen, given, strict=True):
            dense[token, expert] = coefficient
            x = torch.from_numpy(rows[token].copy())
            gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
            out = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            norms[token, expert] = float(out.detach().norm())
    assert len(rows) == int(kept.layer(0).tokens)
    operate("prune", "reap", source, tmp_path / "out", experts=4, calibration=found)
    scores = decisions(tmp_path / "out")["0"]["scores"]
    expected = (dense * norms).sum(0) / (norms > 0).sum(0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_every_data_method_keeps_the_highest_scores(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("olmoe")
    statistics(source, tmp_path / "stats")
    for method in ("frequency", "gate", "ean", "weighted-ean", "reap", "man", "msan"):
        output = tmp_path / method
        operate("prune", method, source, output, experts=5, calibration=tmp_path / "stats")
        for decided in decisions(output).values():
            scores, kept = decided["scores"], decided["kept"]
            dropped = [scores[expert] for expert in range(8) if expert not in kept]
            assert max(dropped) <= min(scores[expert] for expert in kept)


def test_weighted_ean_has_two_powers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("olmoe")
    found = statistics(source, tmp_path / "stats").layer(0)
    for power, field in ((1, found.gate_norm_E), (2, found.gate2_norm2_E)):
        output = tmp_path / str(power)
        given = {"power": power, "calibration": tmp_path / "stats"}
        operate("prune", "weighted-ean", source, output, experts=5, **given)
        np.testing.assert_allclose(decisions(output)["0"]["scores"], field)
    with pytest.raises(UsageError, match="--power should be 1 or 2"):
        operate("prune", "weighted-ean", source, tmp_path / "x", experts=5, power=3)


def unseen(source: Path, target: Path) -> Path:
    """A Mixtral whose inputs of layer 1 are nearly constant, and whose router never takes expert 3 there."""
    stored = tensors(source)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    rows = torch.randn(stored[router].shape, generator=torch.Generator().manual_seed(0))
    rows[3] = 0.0
    rows[4:6] = -rows[0:2]  # of each pair one logit is positive, so a row of zeros never wins
    rows[6:8] = -rows[1:3]
    return rewrite(source, target, {router: rows})


def test_unseen_experts_are_pruned_kept_or_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = unseen(checkpoint("mixtral"), tmp_path / "model")
    count = statistics(source, tmp_path / "stats").layer(1).count_E
    assert count[3] == 0
    assert (np.delete(count, 3) > 0).all()
    for method in ("reap", "frequency", "hope"):
        given = {"calibration": tmp_path / "stats"}
        for choice in ("prune", "keep"):
            output = tmp_path / f"{method}-{choice}"
            operate("prune", method, source, output, experts=7, unseen=choice, **given)
            decided = decisions(output)["1"]
            assert decided["unseen"] == [3]
            assert (3 in decided["kept"]) == (choice == "keep")
            assert decided["scores"][3] in (None, 0.0)
        with pytest.raises(InputError, match="layer 1: no calibration token selects the experts 3"):
            operate("prune", method, source, tmp_path / "x", experts=7, unseen="error", **given)


def test_a_super_expert_is_protected_whatever_its_sign(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The largest absolute output counts: the least used expert gets one large output, always negative."""
    source = checkpoint("mixtral")
    least = int(statistics(source, tmp_path / "before").layer(1).count_E.argmin())
    stored = tensors(source)
    prefix = f"model.layers.1.block_sparse_moe.experts.{least}."
    down = stored[f"{prefix}w2.weight"].clone()
    down[0] = -300.0 * down[0].abs()
    # With up = gate the hidden units are silu(x) x, which is never negative.
    change = {
        f"{prefix}w2.weight": down,
        f"{prefix}w3.weight": stored[f"{prefix}w1.weight"].clone(),
    }
    model = rewrite(source, tmp_path / "model", change)
    found = statistics(model, tmp_path / "stats")
    assert int(found.layer(1).max_abs_E.argmax()) == least
    given = {"experts": 2, "calibration": tmp_path / "stats"}
    operate("prune", "frequency", model, tmp_path / "free", **given)
    operate("prune", "frequency", model, tmp_path / "safe", protect="super", **given)
    assert least not in decisions(tmp_path / "free")["1"]["kept"]
    safe = decisions(tmp_path / "safe")["1"]
    assert safe["protected"] == [least]
    assert least in safe["kept"]
    assert len(safe["kept"]) == 2


# AIMER


def test_aimer_is_its_formula_however_the_weights_are_stored(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    sharded = checkpoint("qwen3_moe", dtype="bfloat16", max_shard_size="50KB")
    scaled, stored = {}, tensors(source)
    for name, value in stored.items():
        if ".experts." in name:
            scaled[name] = value * 4
    larger = rewrite(source, tmp_path / "larger", scaled)
    found = {}
    for name, folder in (("plain", source), ("sharded", sharded), ("larger", larger)):
        operate("prune", "aimer", folder, tmp_path / f"{name}-out", experts=3)
        found[name] = decisions(tmp_path / f"{name}-out")
    assert found["plain"] == found["sharded"] == found["larger"]
    for index, decided in found["plain"].items():
        expected = []
        for expert in range(8):
            prefix = f"model.layers.{index}.mlp.experts.{expert}."
            parts = [stored[f"{prefix}{p}_proj.weight"].double() for p in ("gate", "up", "down")]
            w = torch.cat([part.flatten() for part in parts])
            expected.append(float(w.abs().mean() / w.square().mean().sqrt()))
        np.testing.assert_allclose(decided["scores"], expected, rtol=1e-12)
        assert decided["kept"] == sorted(np.argsort(expected)[:3].tolist())


def test_aimer_does_not_see_the_order_of_neurons_and_reads_in_blocks(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral")
    change = {}
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors(source).items():
        if ".experts." in name:
            order = torch.randperm(48, generator=generator)
            change[name] = (value[:, order] if "w2" in name else value[order]).contiguous()
    shuffled = rewrite(source, tmp_path / "shuffled", change)
    with mock.patch("moesurg.surgery.weights.BLOCK", 100):
        operate("prune", "aimer", shuffled, tmp_path / "a", experts=4)
    operate("prune", "aimer", source, tmp_path / "b", experts=4)
    first, second = decisions(tmp_path / "a"), decisions(tmp_path / "b")
    for index in first:
        assert first[index]["kept"] == second[index]["kept"]
        np.testing.assert_allclose(first[index]["scores"], second[index]["scores"], rtol=1e-12)


def test_random_depends_on_the_seed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    for seed in (0, 1):
        operate("prune", "random", source, tmp_path / str(seed), experts=4, seed=seed)
    assert decisions(tmp_path / "0") != decisions(tmp_path / "1")


# HOPE


@pytest.mark.parametrize("mean", ["shared", "all"])
def test_hope_finds_the_best_set_of_the_statistics(
    checkpoint: Checkpoint, tmp_path: Path, mean: str
) -> None:
    source = checkpoint("qwen3_moe")
    found = statistics(source, tmp_path / "stats")
    given = {"calibration": tmp_path / "stats", "mean": mean}
    operate("prune", "hope", source, tmp_path / "out", experts=4, **given)
    for index, decided in decisions(tmp_path / "out").items():
        layer = found.layer(int(index))
        count, pairs = layer.count_E, layer.pair_count_EE
        # Of counted pairs, at most the rarer and at least what the pigeonhole leaves.
        assert (pairs <= np.minimum(count[:, None], count[None, :])).all()
        assert (pairs >= np.maximum(0, count[:, None] + count[None, :] - layer.tokens)).all()
        np.testing.assert_array_equal(pairs.diagonal(), count)
        matrix = hope.interaction(layer, shared=mean == "shared")
        values = {s: hope.objective(matrix, s) for s in subsets(candidates(8, 4))}
        dropped = tuple(expert for expert in range(8) if expert not in decided["kept"])
        assert decided["exact"]
        assert values[dropped] == pytest.approx(min(values.values()), rel=1e-9)
        assert decided["objective"] <= decided["diagonal_objective"]


# NAEE


@pytest.mark.parametrize("family", MOE)
def test_naee_agrees_with_trying_masked_stock_layers(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    source = checkpoint(family)
    found = statistics(source, tmp_path / "stats", tokens=160, inputs=160)
    given = {"calibration": tmp_path / "stats", "samples": 160}
    operate("prune", "naee", source, tmp_path / "out", experts=6, **given)
    decided = decisions(tmp_path / "out")["1"]
    rows = torch.from_numpy(found.inputs(1)[0].copy())
    parts = [part.tolist() for part in np.array_split(np.arange(len(rows)), 16)]
    assert len(rows) == decided["samples"]

    block = stock(source).model.layers[1].mlp

    def output(dropped: tuple[int, ...]) -> torch.Tensor:
        mask(block.gate, list(dropped))
        with torch.no_grad():
            answer: torch.Tensor = block(rows[None])
        del block.gate.forward  # what `mask` put before the class's own
        return answer[0].double()

    whole = output(())
    losses = {}
    for dropped in subsets(candidates(8, 6)):
        difference = output(dropped) - whole
        losses[dropped] = sum(float(difference[part].norm()) for part in parts)
    best = min(losses, key=losses.__getitem__)
    assert decided["searched"] == 28
    assert decided["kept"] == [expert for expert in range(8) if expert not in best]
    assert decided["loss"] == pytest.approx(losses[best], rel=1e-4)


def test_naee_drops_one_of_two_equal_experts_for_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral", num_experts_per_tok=1)
    stored, change = tensors(source), {}
    for layer in range(3):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        rows = stored[f"{prefix}gate.weight"].clone()
        rows[6] = rows[5]
        change[f"{prefix}gate.weight"] = rows
        for part in ("w1", "w2", "w3"):
            name = f"{prefix}experts.{{}}.{part}.weight"
            change[name.format(6)] = stored[name.format(5)].clone()
    twins = rewrite(source, tmp_path / "twins", change)
    operate("prune", "naee", twins, tmp_path / "out", experts=7)
    for decided in decisions(tmp_path / "out").values():
        assert decided["relative_loss"] < 1e-12
        assert decided["kept"] == [0, 1, 2, 3, 4, 6, 7]
    assert drift(twins, tmp_path / "out") < 1e-5


def test_naee_asks_for_inputs_and_refuses_what_it_cannot_search(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral")
    statistics(source, tmp_path / "stats")
    with pytest.raises(InputError, match="has no inputs") as caught:
        operate("prune", "naee", source, tmp_path / "x", experts=4, calibration=tmp_path / "stats")
    assert "--inputs" in (caught.value.hint or "")
    many = checkpoint("olmoe", num_experts=24)
    with pytest.raises(InputError, match="2,704,156 ways to keep 12 of 24"):
        operate("prune", "naee", many, tmp_path / "x", experts=12)
    with pytest.raises(UsageError, match="--samples"):
        operate("prune", "naee", source, tmp_path / "x", experts=4, samples=0)
    result = operate("prune", "naee", source, tmp_path / "few", experts=4, tokens=200)
    assert result["output"]
    assert decisions(tmp_path / "few")["0"]["samples"] == 200

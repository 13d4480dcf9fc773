"""Layers operated on one after the other, and numbers of experts by measured cost, held against stock modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.calibration.expert_sources import FreshStatistics
from moesurg.surgery.calibration.statistics import Statistics
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.executors.serial import SerialExecutor
from moesurg.surgery.methods.experts._reconstruct import NewExpert, reconstruct
from tests.faults.harness import digest
from tests.oracle.helpers import custom, decisions, operate, stock, tensors, units
from tests.oracle.test_reconstruct import block, rows_of

Checkpoint = Callable[..., Path]
Sampler = Callable[..., Path]
BLIND = {"group_by": "weights", "cluster": "hierarchical", "combine": "mean"}
TEXT = {"tokens": 512, "seq_len": 64}


@pytest.fixture
def kept_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics that a run from layer to layer took stay in its output."""
    monkeypatch.setattr(FreshStatistics, "files", ())


def mixture_inputs(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """What the mixture of a layer is given, [tokens, D]."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.usefixtures("kept_statistics")
@pytest.mark.parametrize(
    ("command", "method", "options"),
    [("prune", "reap", {}), ("prune", "graft", {}), ("merge", "ream", {"router": "tied"})],
)
def test_each_layer_sees_the_layers_before_it_as_they_are_written(
    checkpoint: Checkpoint, tmp_path: Path, command: str, method: str, options: dict[str, Any]
) -> None:
    """Inputs are those of the original with the output's layers before; targets and errors are the stock mixtures'."""
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    given = {"experts": 4, "sequential": True, "sample": 512, **TEXT, **options}
    if method != "graft":
        given["reconstruct"] = True
    operate(command, method, source, out, **given)
    statistics = Statistics.open(out)
    _, tokens = statistics.inputs(0)
    lengths = [64] * (len(tokens) // 64) + [len(tokens) % 64] * bool(len(tokens) % 64)
    original, hybrid, new = stock(source), stock(source), stock(out)
    for layer in range(3):
        rows, target = rows_of(out, layer), statistics.targets(layer)
        assert target is not None
        at = 0
        for length in lengths:
            ids = torch.from_numpy(tokens[at : at + length].copy())[None]
            expected = mixture_inputs(hybrid, layer, ids)
            torch.testing.assert_close(rows[at : at + length], expected, atol=1e-5, rtol=1e-4)
            whole = block(original, layer, mixture_inputs(original, layer, ids)).float()
            found = torch.from_numpy(target[at : at + length].copy())
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
            at += length
        told = units(out)[f"layer.{layer}.experts"]["reconstruction"]
        wanted = torch.from_numpy(target.copy()).double()
        error = float((block(new, layer, rows) - wanted).norm() / wanted.norm())
        assert error == pytest.approx(told["error_after"], rel=1e-4)
        assert told["error_after"] < told["error_before"]
        hybrid.model.layers[layer] = new.model.layers[layer]


def test_energies_are_those_of_the_stock_hidden_states(
    checkpoint: Checkpoint, sampled: Sampler
) -> None:
    source = checkpoint("qwen3_moe")
    statistics = Statistics.open(sampled(source))
    _, tokens = statistics.inputs(0)
    model, seen = stock(source), {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, args, output, index=index: seen.update({index: output[0]})
        )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens[:64].copy())[None])
    for index, states in seen.items():
        found = torch.from_numpy(statistics.energies(index)[:64].copy())
        torch.testing.assert_close(
            found, states.reshape(64, -1).double().square().sum(-1), rtol=1e-5, atol=1e-4
        )


def test_later_layers_are_decided_on_what_reaches_them(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The first layer is decided as ever; on the others, statistics are other ones."""
    source = checkpoint("mixtral")
    operate("prune", "reap", source, tmp_path / "a", experts=3, **TEXT)
    operate("prune", "reap", source, tmp_path / "b", experts=3, sequential=True, **TEXT)
    together, apart = decisions(tmp_path / "a"), decisions(tmp_path / "b")
    assert together["0"] == apart["0"]
    assert together["2"]["scores"] != pytest.approx(apart["2"]["scores"], rel=1e-3)


@pytest.mark.parametrize("family", ["deepseek_v3", "granitemoeshared", "minimax_m2", "olmoe"])
def test_nothing_dropped_changes_nothing_on_the_way(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Every layer as it was: whatever is measured behind them is what is measured in the original."""
    source = checkpoint(family)
    operate("prune", "reap", source, tmp_path / "a", experts=8, **TEXT)
    operate("prune", "reap", source, tmp_path / "b", experts=8, sequential=True, **TEXT)
    first, second = decisions(tmp_path / "a"), decisions(tmp_path / "b")
    for layer, decided in first.items():
        for before, after in zip(decided["scores"], second[layer]["scores"], strict=True):
            assert before == (None if after is None else pytest.approx(after, rel=1e-5))
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_of_several_sizes_and_mapped_routers_go_one_after_the_other(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    given: dict[str, Any] = {"sequential": True, "reconstruct": True, "sample": 256, **TEXT}
    operate("prune", "hope", source, tmp_path / "a", experts=6, schedule="6,4,2", **given)
    operate("merge", "ream", source, tmp_path / "b", experts=4, router="mapped", **given)
    assert [len(decisions(tmp_path / "a")[str(layer)]["kept"]) for layer in range(3)] == [6, 4, 2]
    custom(tmp_path / "a")
    custom(tmp_path / "b")


def test_bytes_depend_on_no_order(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    given = {"experts": 4, "sequential": True, "sample": 256, **TEXT}
    operate("prune", "graft", source, tmp_path / "one", **given)
    run = SerialExecutor.run
    monkeypatch.setattr(
        SerialExecutor,
        "run",
        lambda self, units, decision, done: run(self, list(reversed(units)), decision, done),
    )
    operate("prune", "graft", source, tmp_path / "other", **given)
    assert digest(tmp_path / "one") == digest(tmp_path / "other")


@pytest.mark.parametrize(
    ("command", "method", "options"),
    [
        ("prune", "reap", {}),
        ("prune", "aimer", {"reconstruct": True}),
        ("merge", "hc-smoe", {"reconstruct": True}),
        ("merge", "mc-smoe", {"rank": 2}),
    ],
)
def test_costs_are_the_stock_layers_errors_and_the_numbers_their_best(
    checkpoint: Checkpoint,
    sampled: Sampler,
    tmp_path: Path,
    command: str,
    method: str,
    options: dict[str, Any],
) -> None:
    source = checkpoint("qwen3_moe")
    given = {"sample": 600, "calibration": sampled(source), **options}
    arguments = {**given, "experts": 4, "budget": "global"}
    operate(command, method, source, tmp_path / "out", **arguments, budget_step=2)
    decided = decisions(tmp_path / "out")
    costs = {
        layer: {int(n): cost for n, cost in found["costs"].items()}
        for layer, found in decided.items()
    }
    original = stock(source)
    energies = [Statistics.open(given["calibration"]).energies(layer) for layer in range(3)]
    for count in (2, 4, 8):
        operate(command, method, source, tmp_path / str(count), **given, experts=count)
        tried = stock(tmp_path / str(count))
        for layer in range(3):
            rows = rows_of(given["calibration"], layer)
            wanted = block(original, layer, rows)
            lost = (block(tried, layer, rows) - wanted).square().sum(1)
            error = float((lost / torch.from_numpy(energies[layer].copy())).mean())
            assert costs[str(layer)][count] == pytest.approx(error, rel=1e-3, abs=1e-9)
    chosen = {layer: found["experts"] for layer, found in decided.items()}
    assert sum(chosen.values()) == 12
    best = min(
        sum(costs[layer][n] for layer, n in zip(costs, numbers, strict=True))
        for numbers in itertools.product((2, 4, 6, 8), repeat=3)
        if sum(numbers) == 12
    )
    assert sum(costs[layer][n] for layer, n in chosen.items()) == pytest.approx(best)
    schedule = ",".join(str(chosen[str(layer)]) for layer in range(3))
    most = max(chosen.values())
    operate(command, method, source, tmp_path / "same", **given, experts=most, schedule=schedule)
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "same")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("command", "method", "options", "kind", "message"),
    [
        ("prune", "aimer", {"sequential": True}, UsageError, "sees no text"),
        ("merge", "compose", {"sequential": True, **BLIND}, UsageError, "no text"),
        ("prune", "reap", {"sequential": True, "budget": "global"}, UsageError, "--sequential and"),
        ("prune", "reap", {"schedule": "4,4,2", "budget": "global"}, UsageError, "--schedule and"),
        ("prune", "reap", {"budget_step": 2}, UsageError, "belongs to --budget"),
        ("prune", "reap", {"budget": "global", "budget_step": 0}, UsageError, "at least 1"),
        ("prune", "reap", {"budget": "global", "budget_step": 9}, UsageError, "only 4 of"),
        ("prune", "reap", {"sequential": True, "protect": "super"}, UsageError, "--protect super"),
        (
            "merge",
            "sub-moe",
            {"allocation": "global", "sequential": True},
            UsageError,
            "allocation",
        ),
        (
            "merge",
            "sub-moe",
            {"allocation": "global", "budget": "global"},
            UsageError,
            "allocation",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    command: str,
    method: str,
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    source = checkpoint("qwen3_moe")
    with pytest.raises(kind, match=message):
        operate(command, method, source, tmp_path / "out", experts=4, **options)
    assert not (tmp_path / "out").exists()


def test_no_folder_holds_what_lies_behind_new_layers(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    given = {"experts": 4, "sequential": True, "calibration": sampled(source)}
    with pytest.raises(UsageError, match="no folder holds them"):
        operate("prune", "reap", source, tmp_path / "out", **given)
    source = checkpoint("jetmoe")
    with pytest.raises(InputError, match="model code of its own"):
        operate("prune", "reap", source, tmp_path / "out", experts=4, sequential=True, **TEXT)


def test_a_row_that_counts_twice_is_two_rows() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, target = draw(40, 6), draw(40, 6).double()
    gates = draw(40, 2).double().abs()
    experts = [NewExpert(draw(4, 6), draw(4, 6), draw(6, 4)) for _ in range(2)]
    given: dict[str, Any] = {"act": torch.nn.functional.silu, "sweeps": 2, "ridge": 0.1}
    weights = torch.ones(40, dtype=torch.float64)
    weights[:5] = 2
    found, told = reconstruct(rows, target, gates, experts, weights_N=weights, **given)
    twice = [torch.cat([part, part[:5]]) for part in (rows, target, gates)]
    wanted, expected = reconstruct(*twice, experts, **given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert told["error_after"] == pytest.approx(expected["error_after"], rel=1e-6)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.usefixtures("kept_statistics")
def test_rows_weighed_by_their_state_are_told_by_those_weights(
    checkpoint: Checkpoint, tmp_path: Path, sequential: bool
) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    given = {"reconstruct": True, "weigh": "state", "sample": 256, "sequential": sequential, **TEXT}
    operate("prune", "reap", source, out, experts=4, **given)
    statistics, original, new = Statistics.open(out), stock(source), stock(out)
    for layer in range(3):
        rows, target = rows_of(out, layer), statistics.targets(layer)
        assert (target is not None) == sequential
        wanted = block(original, layer, rows) if target is None else torch.from_numpy(target.copy())
        weights = 1 / torch.from_numpy(statistics.energies(layer).copy())
        lost = (block(new, layer, rows) - wanted).square().sum(1) * weights
        error = float(lost.sum() / (wanted.double().square().sum(1) * weights).sum()) ** 0.5
        told = units(out)[f"layer.{layer}.experts"]["reconstruction"]
        assert error == pytest.approx(told["error_after"], rel=1e-4)

"""Reconstruction and MergeMoE's fit, measured with the stock modules and solved another way in float64."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesurg.surgery.errors import InputError, Interrupted, UsageError
from moesurg.surgery.methods.experts._reconstruct import NewExpert, reconstruct
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.faults.harness import digest
from tests.oracle.helpers import decisions, drift, operate, stock, tensors, units
from tests.oracle.test_merge import name, shuffled_copies

Checkpoint = Callable[..., Path]
METHODS = ["hc-smoe", "m-smoe", "mergemoe", "ream", "sub-moe"]
SILU = torch.nn.functional.silu


def rows_of(statistics: Path, layer: int) -> torch.Tensor:
    return load_file(statistics / "statistics.safetensors")[f"inputs.{layer}"]


def block(model: Any, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """What the stock mixture of a layer gives."""
    with torch.no_grad():
        found = model.model.layers[layer].mlp(rows[None])
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output.reshape(rows.shape).double()


def assert_as_told(source: Path, plain: Path, new: Path, calibration: Path) -> None:
    """Stock layers are as far from the source's as the new output's report says, and only down projections differ."""
    models = stock(source), stock(plain), stock(new)
    for layer in range(3):
        rows = rows_of(calibration, layer)
        told = units(new)[f"layer.{layer}.experts"]["reconstruction"]
        target, *outputs = (block(model, layer, rows) for model in models)
        for output, key in zip(outputs, ("error_before", "error_after"), strict=True):
            error = float((output - target).norm() / target.norm())
            assert error == pytest.approx(told[key], rel=1e-4)
        assert told["error_after"] < told["error_before"]
    before, after = tensors(plain), tensors(new)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("down_proj" in key for key in changed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("router", ["keep", "tied"])
def test_the_stock_layer_is_as_close_as_the_report_says_and_never_farther_than_before(
    checkpoint: Checkpoint,
    sampled: Callable[..., Path],
    tmp_path: Path,
    method: str,
    router: str,
) -> None:
    source = checkpoint("qwen3_moe")
    calibration = sampled(source)
    arguments: dict[str, Any] = {"experts": 4, "router": router, "calibration": calibration}
    operate("merge", method, source, tmp_path / "plain", **arguments, sample=600)
    operate("merge", method, source, tmp_path / "new", **arguments, sample=600, reconstruct=True)
    assert_as_told(source, tmp_path / "plain", tmp_path / "new", calibration)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_every_family_and_layout(
    checkpoint: Checkpoint,
    sampled: Callable[..., Path],
    tmp_path: Path,
    family: str,
    layout: str,
) -> None:
    source = checkpoint(family, layout=layout)
    calibration = sampled(source)
    for method, arguments in (("hc-smoe", {"reconstruct": True}), ("mergemoe", {})):
        output = tmp_path / method
        options = {"experts": 4, "sample": 600, "calibration": calibration, **arguments}
        operate("merge", method, source, output, **options)
        stock(output)
    for found in units(tmp_path / "hc-smoe").values():
        if "reconstruction" in found:
            told = found["reconstruction"]
            assert told["error_after"] < told["error_before"]


def test_both_layouts_give_the_same_function(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for layout in ("per-expert", "fused"):
        source = checkpoint("mixtral", layout=layout)
        for method in ("mergemoe", "ream", "hc-smoe"):
            output = tmp_path / f"{method}-{layout}"
            operate("merge", method, source, output, experts=4, reconstruct=method == "hc-smoe")
    for method in ("mergemoe", "ream", "hc-smoe"):
        assert drift(tmp_path / f"{method}-per-expert", tmp_path / f"{method}-fused") < 1e-4


def test_with_nothing_merged_the_down_projections_come_back(
    checkpoint: Checkpoint, sampled: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    result = operate(
        "merge",
        "hc-smoe",
        source,
        tmp_path / "same",
        experts=8,
        reconstruct=True,
        sample=600,
        calibration=sampled(source),
    )
    assert result["exactness"]["kind"] == "exact"
    before, after = tensors(source), tensors(tmp_path / "same")
    for key, tensor in before.items():
        assert float((after[key] - tensor).norm()) < 1e-5 * float(tensor.norm())
    for found in units(tmp_path / "same").values():
        assert found["reconstruction"]["error_after"] < 1e-6
    assert drift(source, tmp_path / "same") < 1e-4


@pytest.mark.parametrize("method", ["hc-smoe", "mergemoe", "ream"])
def test_merging_nothing_gives_the_same_bytes(
    checkpoint: Checkpoint, sampled: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    source = checkpoint("mixtral")
    arguments = {"experts": 8, "sample": 600, "calibration": sampled(source)}
    result = operate("merge", method, source, tmp_path / "same", **arguments)
    assert result["exactness"]["kind"] == "bitwise"
    before, after = tensors(source), tensors(tmp_path / "same")
    assert all(torch.equal(before[key], after[key]) for key in before)


def experts_of(seed: int, count: int, width: int = 6, hidden: int = 5) -> list[NewExpert]:
    generator = torch.Generator().manual_seed(seed)
    return [
        NewExpert(
            torch.randn(width, hidden, generator=generator),
            torch.randn(width, hidden, generator=generator),
            torch.randn(hidden, width, generator=generator),
        )
        for _ in range(count)
    ]


def designs(
    experts: list[NewExpert], rows: torch.Tensor, gates: torch.Tensor
) -> list[torch.Tensor]:
    found = []
    for slot, expert in enumerate(experts):
        hidden = SILU(rows.double() @ expert.gate.double().T) * (
            rows.double() @ expert.up.double().T
        )
        found.append(gates[:, slot, None] * hidden)
    return found


def test_one_expert_and_no_ridge_is_plain_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 5, generator=generator)
    target = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    gates = torch.rand(80, 1, generator=generator, dtype=torch.float64) + 0.1
    experts = experts_of(1, 1)
    (found,), told = reconstruct(rows, target, gates, experts, SILU, sweeps=1, ridge=1e-12)
    (design,) = designs(experts, rows, gates)
    expected = torch.linalg.lstsq(design, target).solution.T
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    error = float((target - design @ expected.T).norm() / target.norm())
    assert told["error_after"] == pytest.approx(error, rel=1e-6)


def test_sweeps_converge_to_the_joint_solution_and_never_raise_the_error() -> None:
    """Against one dense system of all experts at once."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(60, 5, generator=generator)
    target = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    gates = torch.rand(60, 4, generator=generator, dtype=torch.float64)
    gates = gates * (torch.rand(60, 4, generator=generator) < 0.5)
    gates[:, 3] = 0.0
    experts = experts_of(3, 4)
    found, told = reconstruct(rows, target, gates, experts, SILU, sweeps=400, ridge=0.05)
    used = designs(experts, rows, gates)[:3]
    residual = target - sum(
        design @ expert.down.double().T for design, expert in zip(used, experts, strict=False)
    )
    ridges = [0.05 * float(design.square().sum()) / 6 for design in used]
    penalty = torch.diag(torch.tensor([r**0.5 for r in ridges for _ in range(6)]).double())
    joint = torch.cat([torch.cat(used, dim=1), penalty])
    padded = torch.cat([residual, torch.zeros(18, 5, dtype=torch.float64)])
    change = torch.linalg.lstsq(joint, padded).solution.T
    for slot in range(3):
        expected = experts[slot].down.double() + change[:, 6 * slot : 6 * slot + 6]
        assert torch.allclose(found[slot], expected, atol=1e-5)
    assert torch.equal(found[3], experts[3].down.double())
    assert told["unselected"] == [3]
    errors: Any = told["errors"]
    assert max(errors) <= float(str(told["error_before"]))


def merged_outputs(
    stored: dict[str, torch.Tensor], rows: torch.Tensor, layer: int, group: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden activations and down projections of a group's members, float64."""
    hidden, down = [], []
    for expert in group:
        gate, up = (
            stored[name("mixtral", layer, expert, part)].double() for part in ("gate", "up")
        )
        hidden.append(SILU(rows @ gate.T) * (rows @ up.T))
        down.append(stored[name("mixtral", layer, expert, "down")].double())
    return hidden, down


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_mergemoe_is_the_papers_formula_with_its_stacked_members(
    checkpoint: Checkpoint, sampled: Callable[..., Path], tmp_path: Path, ridge: float
) -> None:
    """D' = [B_1 D_1 ...] Q P⁺ by an explicit pseudo-inverse, and never farther than the average."""
    source, output = checkpoint("mixtral"), tmp_path / "merged"
    calibration = sampled(source)
    operate(
        "merge",
        "mergemoe",
        source,
        output,
        experts=4,
        merge_ridge=ridge,
        sample=600,
        calibration=calibration,
    )
    stored, merged = tensors(source), tensors(output)
    checked = 0
    for layer in range(3):
        decided = decisions(output)[str(layer)]
        rows = rows_of(calibration, layer).double()
        logits = rows @ stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double().T
        chosen = logits.topk(2, dim=1).indices
        for slot, (group, weights) in enumerate(
            zip(decided["groups"], decided["weights"], strict=True)
        ):
            if len(group) == 1:
                continue
            used = torch.stack([(chosen == expert).any(1) for expert in group]).any(0)
            hidden, down = merged_outputs(stored, rows[used], layer, group)
            new, _ = merged_outputs(merged, rows[used], layer, [slot])
            stacked = torch.cat([b * d for b, d in zip(weights, down, strict=True)], dim=1)
            outputs = torch.cat(hidden, dim=1) @ stacked.T
            expected = (torch.linalg.pinv(new[0]) @ outputs).T
            found = merged[name("mixtral", layer, slot, "down")].double()
            mean = sum(b * d for b, d in zip(weights, down, strict=True))
            error, before = (float((new[0] @ d.T - outputs).norm()) for d in (found, mean))
            told = units(output)[f"layer.{layer}.expert.{slot}"][f"group.{slot}"]["least_squares"]
            assert told["rows"] == int(used.sum())
            assert told["error_after"] == pytest.approx(error / float(outputs.norm()), rel=1e-4)
            assert told["error_before"] == pytest.approx(before / float(outputs.norm()), rel=1e-4)
            assert error < before
            if ridge == 0:
                assert float((found - expected).norm() / expected.norm()) < 1e-3
            checked += 1
    assert checked > 2


def test_mergemoe_without_a_ridge_refuses_too_few_inputs(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral")
    with pytest.raises(InputError, match="singular"):
        operate("merge", "mergemoe", source, tmp_path / "x", experts=4, merge_ridge=0.0, sample=8)


@pytest.mark.parametrize("method", ["hc-smoe", "mergemoe", "ream"])
def test_identical_experts_are_reproduced(
    checkpoint: Checkpoint, tmp_path: Path, method: str
) -> None:
    dense = checkpoint("llama", dtype="bfloat16")
    operate("upcycle", "sparse", dense, tmp_path / "moe", experts=4)
    for reconstruct_too in (False, True):
        output = tmp_path / f"two-{reconstruct_too}"
        operate("merge", method, tmp_path / "moe", output, experts=2, reconstruct=reconstruct_too)
        assert drift(dense, output) < 1e-4
        before, after = tensors(dense), tensors(output)
        for expert in range(2):
            for part in ("gate", "up", "down"):
                merged = after[name("mixtral", 0, expert, part)]
                assert torch.equal(merged, before[f"model.layers.0.mlp.{part}_proj.weight"])


@pytest.mark.parametrize("align", ["both", "weight", "activation"])
def test_ream_merges_permuted_copies_to_the_original(
    checkpoint: Checkpoint, tmp_path: Path, align: str
) -> None:
    """With activations too: all experts see the same sampled inputs."""
    source = shuffled_copies(checkpoint("mixtral"), tmp_path / "copies")
    operate("merge", "ream", source, tmp_path / "aligned", experts=2, align=align)
    assert drift(source, tmp_path / "aligned") < 1e-4


def test_inputs_reach_workers_and_a_resumed_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    arguments: dict[str, Any] = {"experts": 4, "reconstruct": True, "sample": 200}
    for label, workers in (("one", 1), ("two", 2)):
        operate("merge", "ream", source, tmp_path / label, workers=workers, **arguments)

    class StopsAt(Silent):
        """Ctrl-C once a layer has been written."""

        def __init__(self) -> None:
            self.merging = False

        def stage(self, name: str, total: int) -> None:
            self.merging = name == "ream"

        def advance(self, count: int = 1) -> None:
            if self.merging and count:
                os.kill(os.getpid(), signal.SIGINT)

    fields: dict[str, Any] = {"tokens": 600, "seq_len": 64}
    where = (str(source),), tmp_path / "resumed"
    with pytest.raises(Interrupted):
        run(Request("merge", "ream", *where, arguments, **fields), StopsAt())
    assert not where[1].exists()
    run(Request("merge", "ream", *where, arguments, resume=True, **fields), Silent())
    assert len({digest(tmp_path / label) for label in ("one", "two", "resumed")}) == 1


def test_layers_of_unequal_counts_are_reconstructed_behind_a_tied_router(
    checkpoint: Checkpoint, sampled: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    operate(
        "merge",
        "sub-moe",
        source,
        tmp_path / "out",
        experts=4,
        router="tied",
        allocation="global",
        reconstruct=True,
        sample=600,
        calibration=sampled(source),
    )
    original, new = stock(source), stock(tmp_path / "out")
    for layer in range(3):
        rows = rows_of(sampled(source), layer)
        target = block(original, layer, rows)
        told = units(tmp_path / "out")[f"layer.{layer}.experts"]["reconstruction"]
        error = float((block(new, layer, rows) - target).norm() / target.norm())
        assert error == pytest.approx(told["error_after"], rel=1e-4)


def test_a_rank_and_reconstruction_are_refused_together(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--rank"):
        operate(
            "merge",
            "sub-moe",
            checkpoint("mixtral"),
            tmp_path / "x",
            experts=4,
            rank=3,
            reconstruct=True,
        )


def test_statistics_without_enough_inputs_are_refused(
    checkpoint: Checkpoint, sampled: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    for rows, sentence in ((0, "has no inputs"), (100, "holds 100 sampled inputs")):
        folder = sampled(source, rows)
        with pytest.raises(InputError, match=sentence):
            operate("merge", "mergemoe", source, tmp_path / "x", experts=4, calibration=folder)
    arguments: dict[str, Any] = {"experts": 4, "calibration": sampled(source, 100)}
    operate("merge", "mergemoe", source, tmp_path / "y", sample=100, **arguments)
    operate("merge", "hc-smoe", source, tmp_path / "z", **arguments)


def test_the_planned_memory_grows_with_the_sample(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    plans = [
        operate("merge", "hc-smoe", source, tmp_path / "x", experts=4, dry_run=True, **arguments)
        for arguments in (
            {},
            {"reconstruct": True, "sample": 1000},
            {"reconstruct": True, "sample": 9000},
        )
    ]
    memory = [plan["plan"]["memory"] for plan in plans]
    assert memory == sorted(memory)
    assert memory[2] - memory[1] > 8000 * 32 * 8
    assert sum("experts" in unit for unit in plans[1]["plan"]["units"]) == 3

"""What ``inspect --calibration`` tells of experts, against plain formulas on stock tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moesurg.surgery.analysis import load, mergeability
from moesurg.surgery.analysis.similarity import cosines, pairs, router_cosines, weight_cosines
from moesurg.surgery.analysis.stability import overlap, rank_correlation, scores
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.collect import collect
from moesurg.surgery.calibration.layer_statistics import HALVES
from moesurg.surgery.calibration.sequences import Sequences
from moesurg.surgery.calibration.statistics import Statistics
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError
from moesurg.surgery.progress import Silent, Stop
from moesurg.surgery.weights import Weights

Checkpoint = Callable[..., Path]


def text(count: int = 9) -> Sequences:
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, 259, 20 + 3 * (number % 4)).tolist() for number in range(count)]
    return Sequences.from_ids(ids)


def statistics_of(folder: Path, target: Path, sequences: Sequences, **options: Any) -> Statistics:
    model = Model.open(folder)
    with TensorReader(model.checkpoint) as reader:
        found = collect(model, reader, sequences, **options)
    target.mkdir()
    for name, data in found.files({"model_sha256": ""}).items():
        (target / name).write_bytes(data)
    return Statistics.open(target)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", "per-expert"),
        ("qwen3_moe", "fused"),
        ("gpt_oss", "fused"),
        ("jetmoe", "fused"),
    ],
)
def test_similarities_of_rows_and_weights(
    family: str, layout: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts that do not divide an expert, as flat vectors of every projection."""
    monkeypatch.setattr("moesurg.surgery.analysis.similarity.CHUNK", 8 * 100)
    model = Model.open(checkpoint(family, layout=layout))
    experts = model.moe_layers[1].experts
    assert experts is not None
    with Weights([model], Silent(), Stop()) as weights:
        found, rows = weight_cosines(weights, experts), router_cosines(weights, experts)
        flat = torch.stack(
            [
                torch.cat(
                    [
                        weights.read(experts.region(e, part)).flatten()
                        for part in ("gate", "up", "down")
                    ]
                )
                for e in range(8)
            ]
        ).double()
        router = weights.read(experts.router).double()
    for ours, vectors in ((found, flat), (rows, router)):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        np.testing.assert_allclose(ours, (unit @ unit.T).numpy(), atol=1e-6)


def test_cosines_of_a_zero_vector_are_zero() -> None:
    assert cosines(np.array([[4.0, 0.0], [0.0, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_pairs_are_sorted_and_leave_out_what_is_unknown() -> None:
    matrix = np.array([[1.0, 0.2, np.nan], [0.2, 1.0, 0.9], [np.nan, 0.9, 1.0]])
    assert [pair["experts"] for pair in pairs(matrix)] == [[1, 2], [0, 1]]
    assert [pair["experts"] for pair in pairs(matrix, largest=False, count=1)] == [[0, 1]]


def test_halves_add_up_to_the_whole_and_are_the_statistics_of_their_sequences(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, sequences = checkpoint("qwen3_moe"), text()
    whole = statistics_of(folder, tmp_path / "all", sequences, mode="routed")
    assert whole.has_halves
    # Which sequences are taken depends on their order in batches, so find them by their number of tokens.
    first, second = whole.half(0, 0), whole.half(0, 1)
    assert first.tokens + second.tokens == sequences.total
    assert 0 < second.tokens < first.tokens
    for field in HALVES[1:]:
        np.testing.assert_allclose(
            getattr(first, field) + getattr(second, field), getattr(whole.layer(0), field)
        )
    assert np.isnan(first.logit_gram_EE).all()
    # One sequence alone is all of the first half.
    single = Sequences.from_ids([sequences.ids[0].tolist()])
    alone = statistics_of(folder, tmp_path / "one", single, mode="routed")
    assert alone.half(1, 1).tokens == 0
    np.testing.assert_array_equal(alone.half(1, 0).gate_E, alone.layer(1).gate_E)
    # Twice the same text: both halves are the same.
    double = Sequences.from_ids([sequences.ids[0].tolist()] * 2)
    twice = statistics_of(folder, tmp_path / "two", double, mode="routed")
    for field in HALVES[1:]:
        np.testing.assert_allclose(
            getattr(twice.half(1, 0), field), getattr(twice.half(1, 1), field), rtol=1e-6
        )


def test_old_folders_have_no_halves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    found = statistics_of(checkpoint("qwen3_moe"), tmp_path / "all", text(2), mode="routed")
    path = found.folder / "statistics.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("halves.")}
    save_file(kept, path)
    old = Statistics.open(found.folder)
    assert not old.has_halves
    with pytest.raises(InputError, match="half of the text"):
        old.half(0, 0)


def test_load_and_mergeability_by_hand(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = statistics_of(checkpoint("mixtral"), tmp_path / "all", text(40), mode="all")
    sums = found.layer(1)
    told = load(sums)
    share = sums.count_E / sums.count_E.sum()
    assert told["entropy"] == pytest.approx(-np.sum(share * np.log(share)) / np.log(8))
    assert told["largest_share"] == share.max()
    assert told["deviation"] == pytest.approx(np.std(sums.count_E / sums.tokens))
    assert sums.output_gram_EE is not None
    merged = mergeability(sums)
    pair = merged["best_pairs"][0]
    i, j = pair["experts"]
    gram = sums.output_gram_EE / sums.tokens
    count = sums.pair_count_EE[i, j]
    variance = sums.ratio2_EE[i, j] / count - (sums.ratio_EE[i, j] / count) ** 2
    assert count >= 16
    assert pair["value"] == pytest.approx(variance * (gram[i, i] + gram[j, j] - 2 * gram[i, j]))
    assert merged["mean"] > pair["value"] > 0


def test_rank_correlation_and_overlap() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 20).astype(float), rng.normal(size=20)
    expected = spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation(first, np.ones(20)) is None
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 3, 2]), 2) == 1 / 3
    assert overlap(np.array([1.0, 1, 1]), np.array([1.0, 1, 1]), 2) == 1.0


def test_every_score_of_sums_is_measured() -> None:
    assert {"ean", "frequency", "gate", "man", "msan", "reap", "weighted-ean"} <= set(scores())


def test_the_command_tells_it_all(
    checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    source, stats = checkpoint("qwen3_moe"), tmp_path / "stats"
    arguments = ("calibrate", source, "--tokens", 3000, "--seq-len", 100, "-o", stats)
    assert call_cli(*arguments, "--trace").code == 0
    shown = call_cli("inspect", source, "--calibration", stats, "--json")
    analysis = json.loads(shown.out)["analysis"]
    assert [row["layer"] for row in analysis["layers"]] == [0, 1, 2]
    for row in analysis["layers"]:
        assert 0 < row["load"]["entropy"] <= 1
        for name in ("router_rows", "router_logits", "weights", "outputs"):
            assert -1 <= row[name]["most_similar"][0]["value"] <= 1
    routing = analysis["routing"]
    assert set(routing["srp"]) == {"4", "16", "64"}  # no window of 256 in sequences of 100
    for entry in routing["srp"].values():
        low, high = entry["interval"]
        assert low <= entry["srp"] <= high
    assert routing["sch"]["1"] < routing["sch"]["2"] < routing["sch"]["4"] == 1.0
    for row in analysis["stability"]["scores"].values():
        assert row["halves"]["spearman"] > 0.5
        assert set(row["domains"]) == {"python", "english"}
    human = call_cli("inspect", source, "--calibration", stats)
    assert "SRP@16" in human.out
    assert "rank correlation" in human.out


def test_routed_statistics_without_a_trace_leave_out_what_they_lack(
    checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    source, stats = checkpoint("qwen3_moe"), tmp_path / "stats"
    arguments = ("calibrate", source, "--tokens", 500, "-o", stats, "--routed-only")
    assert call_cli(*arguments).code == 0
    analysis = json.loads(call_cli("inspect", source, "--calibration", stats, "--json").out)[
        "analysis"
    ]
    assert analysis["routing"] is None
    assert analysis["layers"][0]["outputs"] is None
    assert "--trace" in call_cli("inspect", source, "--calibration", stats).out
    other = call_cli("inspect", checkpoint("mixtral"), "--calibration", stats)
    assert (other.code, "another model" in other.err) == (3, True)
    dense = call_cli("inspect", checkpoint("llama"), "--calibration", stats)
    assert (dense.code, "no experts to analyse" in dense.err) == (3, True)

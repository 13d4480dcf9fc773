"""Collected statistics against a naive float64 computation with stock modules, and their laws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.random_models import build
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.collect import collect
from moesurg.surgery.calibration.layer_statistics import ALL_EXPERT, ROUTED
from moesurg.surgery.calibration.sequences import Sequences
from moesurg.surgery.calibration.statistics import Statistics, model_digest
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError, UsageError

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
LENGTHS = (12, 5, 9, 12, 3)
DOMAIN_OF = (0, 1, 0, 1, 0)


def text(*, domains: bool = True, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(256, (n,), generator=generator).tolist() for n in LENGTHS]
    arrays = tuple(np.asarray(item, np.int64) for item in ids)
    of = DOMAIN_OF if domains else (0,) * len(arrays)
    names = ("code", "prose") if domains else ("all",)
    return Sequences(arrays, of, names, ("",) * len(names), 12, sum(LENGTHS), "")


def run(folder: Path, sequences: Sequences, out: Path, **options: Any) -> Statistics:
    model = Model.open(folder)
    with TensorReader(model.checkpoint) as reader:
        collected = collect(model, reader, sequences, **options)
    files = collected.files({"model_sha256": model_digest(model.checkpoint)})
    out.mkdir()
    for name, data in files.items():
        (out / name).write_bytes(data)
    return Statistics.open(out)


def naive(folder: Path, sequences: Sequences) -> dict[int, dict[str, np.ndarray[Any, Any]]]:
    """Every field by loops over single tokens, from hooks in the full model without padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            seen[index] = []
            rows = seen[index]
            layer.mlp.gate.register_forward_hook(
                lambda module, args, out, rows=rows: rows.append((args[0], *out))
            )
    with torch.no_grad():
        for ids in sequences.ids:
            model(torch.from_numpy(ids)[None], use_cache=False)
    found = {}
    for index, calls in seen.items():
        experts = model.model.layers[index].mlp.experts
        gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
        count, hidden = len(gate_up), down.shape[1]
        sizes = {"E": count, "D": hidden}
        sums = {
            name: np.zeros([sizes[x] for x in name.rpartition("_")[2]] if "_" in name else [])
            for name in (*ROUTED, *ALL_EXPERT, "input_gram_DD")
        }
        for x_TD, logits_TE, weights_TK, index_TK in calls:
            for x, logits, weights, chosen in zip(
                x_TD.reshape(-1, hidden), logits_TE, weights_TK, index_TK, strict=True
            ):
                gate, up = (gate_up @ x.double()).chunk(2, -1)
                output_ED = (down @ (torch.nn.functional.silu(gate) * up)[..., None])[..., 0]
                g = dict(zip(chosen.tolist(), weights.tolist(), strict=True))
                add_token(sums, x, logits, g, output_ED)
        found[index] = sums
    return found


def add_token(
    sums: dict[str, Any],
    x: torch.Tensor,
    logits: torch.Tensor,
    g: dict[int, float],
    output_ED: torch.Tensor,
) -> None:
    f, ell, x64 = output_ED.numpy(), logits.detach().double().numpy(), x.double().numpy()
    n = np.linalg.norm(f, axis=1)
    sums["tokens"] += 1
    for i, gate in g.items():
        sums["count_E"][i] += 1
        sums["gate_E"][i] += gate
        sums["gate2_E"][i] += gate**2
        sums["norm_E"][i] += n[i]
        sums["norm2_E"][i] += n[i] ** 2
        sums["gate_norm_E"][i] += gate * n[i]
        sums["gate2_norm_E"][i] += gate**2 * n[i]
        sums["gate2_norm2_E"][i] += gate**2 * n[i] ** 2
        sums["max_abs_E"][i] = max(sums["max_abs_E"][i], np.abs(f[i]).max())
        sums["routed_output_ED"][i] += f[i]
        for j, other in g.items():
            sums["pair_count_EE"][i, j] += 1
            sums["pair_activation_EE"][i, j] += gate * n[i] * other * n[j]
            if i != j:
                sums["ratio_EE"][i, j] += gate / (gate + other)
                sums["ratio2_EE"][i, j] += (gate / (gate + other)) ** 2
    sums["logit_E"] += ell
    sums["logit_gram_EE"] += np.outer(ell, ell)
    sums["output_ED"] += f
    sums["output_gram_EE"] += f @ f.T
    sums["output_cosine_EE"] += f @ f.T / np.outer(n, n)
    sums["input_gram_DD"] += np.outer(x64, x64)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("family", MOE)
def test_fields_equal_loops_over_tokens(family: str, layout: Any, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model", layout=layout)
    sequences = text()
    statistics = run(folder, sequences, tmp_path / "stats", mode="all", gram=True)
    expected = naive(folder, sequences)
    assert statistics.layers == sorted(expected)
    for index, fields in expected.items():
        layer = statistics.layer(index)
        for name, value in fields.items():
            np.testing.assert_allclose(
                getattr(layer, name), value, rtol=2e-4, atol=2e-4, err_msg=f"{index} {name}"
            )


def test_only_moe_layers_are_collected(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path / "model", decoder_sparse_step=2, num_hidden_layers=5)
    statistics = run(folder, text(), tmp_path / "stats")
    assert statistics.layers == [1, 3]
    with pytest.raises(InputError, match="no statistics of layer 0"):
        statistics.layer(0)


def test_domains_add_up_to_the_whole(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model")
    split = run(folder, text(), tmp_path / "split", gram=True)
    whole = run(folder, text(domains=False), tmp_path / "whole", gram=True)
    for index in split.layers:
        parts = [split.layer(index, [name]) for name in split.domains]
        both, one = split.layer(index), whole.layer(index)
        for name in (*ROUTED, *ALL_EXPERT, "input_gram_DD"):
            values = [getattr(part, name) for part in parts]
            summed = np.maximum(*values) if name == "max_abs_E" else values[0] + values[1]
            np.testing.assert_array_equal(summed, getattr(both, name))
            np.testing.assert_allclose(summed, getattr(one, name), rtol=1e-4, atol=1e-4)


def test_padding_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("qwen2_moe", tmp_path / "model")
    padded = run(folder, text(), tmp_path / "padded")
    monkeypatch.setattr("moesurg.surgery.calibration.collect.LayerStream", _one_by_one())
    alone = run(folder, text(), tmp_path / "alone")
    for index in padded.layers:
        for name in (*ROUTED, *ALL_EXPERT):
            np.testing.assert_allclose(
                getattr(padded.layer(index), name),
                getattr(alone.layer(index), name),
                rtol=1e-4,
                atol=1e-4,
            )


def _one_by_one() -> Callable[..., Any]:
    from moesurg.surgery.calibration.forward import LayerStream

    return lambda *args, **kwargs: LayerStream(*args, batch_tokens=1, **kwargs)


def test_routed_mode_gives_the_same_routed_fields(tmp_path: Path) -> None:
    folder = build("olmoe", tmp_path / "model")
    full = run(folder, text(), tmp_path / "full", mode="all")
    cheap = run(folder, text(), tmp_path / "cheap", mode="routed")
    for index in full.layers:
        for name in ROUTED:
            np.testing.assert_array_equal(
                getattr(full.layer(index), name), getattr(cheap.layer(index), name)
            )
        assert cheap.layer(index).output_ED is None
        with pytest.raises(InputError, match="needs all-expert statistics") as caught:
            _ = cheap.layer(index).output_mean_ED
        assert caught.value.hint == "rerun calibrate without --routed-only"


def test_identical_experts_have_cosine_one(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path / "model", layout="fused")
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if ".experts." in name:
            value[:] = value[:1].clone()
    save_file(weights, file, {"format": "pt"})
    statistics = run(folder, text(), tmp_path / "stats")
    for index in statistics.layers:
        cosine = statistics.layer(index).output_cosine_mean_EE
        np.testing.assert_allclose(cosine, 1.0, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(np.diagonal(cosine), 1.0)


def test_silent_expert_has_cosine_zero_and_no_division_by_zero(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model", layout="fused")
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if name.endswith("down_proj"):
            value[3] = 0
    save_file(weights, file, {"format": "pt"})
    cosine = run(folder, text(), tmp_path / "stats").layer(0).output_cosine_mean_EE
    assert cosine[3, 3] == 1
    np.testing.assert_array_equal(np.delete(cosine[3], 3), 0)


def test_invariants(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model")
    statistics = run(folder, text(), tmp_path / "stats")
    for index in statistics.layers:
        layer = statistics.layer(index)
        assert layer.tokens == sum(LENGTHS)
        assert layer.count_E.sum() == 2 * layer.tokens
        np.testing.assert_allclose(layer.frequency_E.sum(), 1)
        np.testing.assert_allclose(layer.gate_E.sum(), layer.tokens)  # weights are renormalised
        np.testing.assert_array_equal(np.diagonal(layer.pair_count_EE), layer.count_E)
        np.testing.assert_allclose(np.diagonal(layer.pair_activation_EE), layer.gate2_norm2_E)
        off = layer.pair_count_EE - np.diag(layer.count_E)
        np.testing.assert_allclose(layer.ratio_EE + layer.ratio_EE.T, off, atol=1e-9)
        variance = layer.ratio_variance_EE
        np.testing.assert_allclose(variance, variance.T, atol=1e-9)
        assert (layer.norm_E**2 <= layer.norm2_E * np.maximum(layer.count_E, 1) + 1e-9).all()


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    model = Model.open(build("qwen3_moe", tmp_path / "model"))
    with TensorReader(model.checkpoint) as reader:
        first, second = (
            collect(model, reader, text(), inputs=4, gram=True, trace=True).files()
            for _ in range(2)
        )
    assert first == second


def test_inputs_and_trace(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model")
    sequences = text()
    statistics = run(folder, sequences, tmp_path / "stats", inputs=7, trace=True, mode="routed")
    every = run(folder, sequences, tmp_path / "every", inputs=sequences.total, mode="routed")
    for index in statistics.layers:
        ids, lengths, domains = statistics.trace(index)
        assert ids.shape == (sequences.total, 2)
        assert ids.dtype == np.uint8
        assert sorted(lengths) == sorted(LENGTHS)
        assert domains.tolist() == sorted(domains)
        layer = statistics.layer(index)
        np.testing.assert_array_equal(np.bincount(ids.ravel(), minlength=8), layer.count_E)
        rows, token_ids = statistics.inputs(index)
        assert rows.shape == (7, 32)
        assert rows.dtype == np.float32
        all_rows, all_ids = every.inputs(index)
        places = np.arange(7) * sequences.total // 7
        np.testing.assert_array_equal(rows, all_rows[places])
        np.testing.assert_array_equal(token_ids, all_ids[places])
    with pytest.raises(InputError, match=r"has no trace\.0"):
        every.trace(0)
    with pytest.raises(UsageError, match="--inputs"):
        run(folder, sequences, tmp_path / "many", inputs=sequences.total + 1)


def test_not_finite_outputs_name_layer_and_expert(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model", layout="fused")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.experts.down_proj"][5] = 3e38
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match="layer 1, expert 5"):
        run(folder, text(), tmp_path / "stats", mode="all")


def test_dense_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no experts to calibrate"):
        run(build("llama", tmp_path / "model"), text(), tmp_path / "stats")


def test_manifest_and_checks(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "model")
    statistics = run(folder, text(), tmp_path / "stats")
    model = Model.open(folder)
    digest = model_digest(model.checkpoint)
    assert statistics.manifest["model_sha256"] == digest
    statistics.check_model(model, digest)
    assert statistics.domains == ["code", "prose"]
    other = Model.open(build("mixtral", tmp_path / "other", seed=1))
    statistics.check_model(other)
    with pytest.raises(InputError, match="statistics of another model"):
        statistics.check_model(other, model_digest(other.checkpoint))
    with pytest.raises(InputError, match="has no domain 'maths'"):
        statistics.layer(0, ["maths"])
    with pytest.raises(InputError, match="no such folder"):
        Statistics.open(tmp_path / "nowhere")
    manifest = tmp_path / "stats" / "statistics.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "schema_version": 0}))
    with pytest.raises(InputError, match="schema_version 1, found 0"):
        Statistics.open(tmp_path / "stats")
    manifest.write_text(json.dumps({**data, "experts": 9}))
    with pytest.raises(InputError, match=r"expected 'layers\.0\.code\.count_E' as F64 \[9\]"):
        Statistics.open(tmp_path / "stats")

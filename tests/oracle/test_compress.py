"""Compressed outputs against stock transformers, and Gram matrices against its recorded inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.linears import expert_input, linears
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.gram_folder import Grams, calibrate_grams
from moesurg.surgery.checkpoint.reader import open_checkpoint
from moesurg.surgery.errors import InputError, UsageError, VerificationError
from moesurg.surgery.linalg.lowrank import truncate
from moesurg.surgery.linalg.pivot import Pivoted
from moesurg.surgery.linalg.whitening import truncate_whitened
from moesurg.surgery.methods.compress._ranks import stored, uniform_ranks
from moesurg.surgery.progress import Silent
from moesurg.surgery.verify_custom import verify_custom
from tests.faults.harness import digest
from tests.oracle.helpers import custom, grams_of, operate, rewrite, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
RATIO = 0.3


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The dense matrices that a custom output stands for, in float32."""
    held = tensors(folder)
    found = {}
    for name in json.loads((folder / "config.json").read_text())["moesurg_linears"]:
        module = f"model.{name}"
        if f"{module}.pivot_index" in held:
            parts = [
                held[f"{module}.{part}.weight"].float() for part in ("pivot_rows", "pivot_coef")
            ]
            matrix = Pivoted(*parts, held[f"{module}.pivot_index"]).unpack()
        else:
            left, right = (held[f"{module}.lowrank_{part}.weight"].float() for part in "BA")
            matrix = left @ right
        found[f"{module}.weight"] = matrix
    return found


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "pivot"), ("qwen2", "pivot"), ("qwen2", "factors")]
)
def test_a_custom_output_computes_what_its_matrices_do_in_the_stock_class(
    family: str, form: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    result = operate("compress", "svd", source, out, ratio=RATIO, form=form)
    assert result["tier"] == "custom"
    dense = rewrite(source, tmp_path / "dense", unpacked(out))
    one, other, ids = custom(out), stock(dense), token_ids(source)
    assert one.config._attn_implementation == "sdpa"
    with torch.no_grad():
        first, second = one(input_ids=ids).logits, other(input_ids=ids).logits
        assert float((first - second).abs().max()) < 1e-4
        # The cache and generation are the stock ones.
        texts = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (one, other)]
    assert torch.equal(*texts)


def test_half_precision_differs_from_the_dense_equivalent_by_rounding_only(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    operate("compress", "svd", source, tmp_path / "pivot", ratio=RATIO)
    operate("compress", "svd", source, tmp_path / "dense", ratio=RATIO, form="dense")
    ids = token_ids(source)
    with torch.no_grad():
        plain, dense, pivot = (
            model(input_ids=ids).logits
            for model in (
                stock(source),
                stock(tmp_path / "dense"),
                custom(tmp_path / "pivot"),
            )
        )
    rounding = float((pivot - dense).norm() / dense.norm())
    assert rounding < 0.05 < float((dense - plain).norm() / plain.norm())
    report = json.loads((tmp_path / "pivot" / "report.json").read_text())
    metrics = report["units"]["layer.0.mlp.up_proj"]
    assert metrics["rank"] == 16
    assert 0 < metrics["stored_error"] < 1e-2 < metrics["error"]
    held, original = unpacked(tmp_path / "pivot"), tensors(source)
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = truncate(original[name], 16).product()
    assert float((held[name] - wanted).norm() / wanted.norm()) == pytest.approx(
        metrics["stored_error"], rel=1e-3
    )


def test_it_loads_as_a_base_model_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModel

    operate("compress", "svd", checkpoint("qwen3"), tmp_path / "out", ratio=RATIO, targets="ffn")
    loader: Any = AutoModel
    _, found = loader.from_pretrained(
        tmp_path / "out",
        trust_remote_code=True,
        local_files_only=True,
        output_loading_info=True,
    )
    assert not found["missing_keys"]
    with pytest.raises(InputError, match="moesurg_qwen3"):
        Model.open(tmp_path / "out")


def test_nothing_is_stored_larger_and_the_ratio_holds(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    before = {name: info.nbytes for name, info in open_checkpoint(source).tensors.items()}
    for form in ("pivot", "factors"):
        out = tmp_path / form
        operate("compress", "svd", source, out, ratio=0.25, form=form, targets="q,k,down")
        after: dict[str, int] = {}
        for name, info in open_checkpoint(out).tensors.items():
            module = name.split(".pivot_")[0].split(".lowrank_")[0].removesuffix(".weight")
            after[module] = after.get(module, 0) + info.nbytes
        touched = {name for name in before if after[name.removesuffix(".weight")] != before[name]}
        assert {name.split(".")[4] for name in touched} == {"q_proj", "k_proj", "down_proj"}
        assert all(after[name.removesuffix(".weight")] < before[name] for name in touched)
        held = sum(after[name.removesuffix(".weight")] for name in touched)
        assert held <= 0.75 * sum(before[name] for name in touched)


@pytest.mark.parametrize("form", ["pivot", "factors", "dense"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.6])
def test_ranks_meet_the_ratio(form: str, ratio: float) -> None:
    counts = {
        (576, 576): 2,
        (192, 576): 2,
        (1536, 576): 2,
        (576, 1536): 1,
        (5, 4): 3,
        (1, 9): 1,
        (2048, 1024): 1,
    }
    found = uniform_ranks(counts, form, ratio, 16)
    assert found.after <= (1 - ratio) * found.before or (1, 9) not in found.ranks
    kept = {shape: count for shape, count in counts.items() if shape in found.ranks}
    large = sum(count * stored(form, shape, found.ranks[shape]) for shape, count in kept.items())
    assert large <= sum(count * shape[0] * shape[1] for shape, count in kept.items())
    for shape, rank in found.ranks.items():
        assert stored(form, shape, rank) < shape[0] * shape[1]
        assert rank % 16 == 0 or min(shape) < 1024
    assert (1, 9) not in found.ranks  # a single row cannot be stored with less


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_a_mixture_is_compressed_in_its_own_layout(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen2_moe", layout="fused")
    operate("compress", method, source, tmp_path / "out", ratio=RATIO, form="dense", targets="ffn")
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".", 3)[3] for name in changed} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
    }
    stock(tmp_path / "out")
    gate = after["model.layers.1.mlp.experts.gate_up_proj"][3, :24]
    rank = json.loads((tmp_path / "out" / "report.json").read_text())["units"][
        "layer.1.expert.3.gate"
    ]["rank"]
    assert int(torch.linalg.matrix_rank(gate.double(), rtol=1e-5)) == rank


# Gram matrices


def inputs_of(model: Any, ids: torch.Tensor) -> dict[str, list[Any]]:
    """What every linear layer and every block of experts is given in the stock forward."""
    seen: dict[str, list[Any]] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) or name.endswith("mlp.experts"):

            def see(_: Any, args: tuple[Any, ...], name: str = name) -> None:
                seen[name] = list(args)

            part.register_forward_pre_hook(see)
    with torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_gram_matrices_are_those_of_the_stock_inputs(
    family: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesurg.surgery.calibration import sequences

    source = checkpoint(family)
    ids = token_ids(source)
    fixed = sequences.Sequences.from_ids(ids.tolist())
    monkeypatch.setattr(sequences, "tokenise", lambda *_, **__: fixed)
    grams = calibrate_grams(
        Model.open(source),
        tmp_path / "grams",
        data=(),
        tokens=fixed.total,
        seq_len=32,
        device="cpu",
        force=False,
        resume=False,
        progress=Silent(),
    )
    model = stock(source)
    seen = inputs_of(model, ids)
    checked = set()
    for linear in linears(Model.open(source)):
        found, rows = grams.read(linear.layer, linear.module)
        prefix = f"model.layers.{linear.layer}."
        if linear.expert is None:
            given = seen[prefix + linear.module][0].flatten(0, -2)
        else:
            hidden, index, _ = seen[prefix + "mlp.experts"]
            given = hidden.flatten(0, -2)
            if linear.role == "down":
                experts = model.get_submodule(prefix + "mlp.experts")
                chosen = given[(index == linear.expert).any(-1)]
                gate, up = (chosen @ experts.gate_up_proj[linear.expert].T).chunk(2, -1)
                given = torch.nn.functional.silu(gate) * up
                assert linear.module == expert_input(linear.expert)
        wide = given.detach().double()
        wanted = wide.T @ wide
        assert rows == len(given)
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
        checked.add(linear.role)
    assert checked == {"q", "k", "v", "o", "gate", "up", "down"}
    source_of = grams.manifest["layers"]["0"]["source"]
    assert source_of["self_attn.k_proj"] == source_of["self_attn.v_proj"] == "self_attn.q_proj"
    with pytest.raises(InputError, match="Gram matrices of linear layers"):
        operate("merge", "m-smoe", checkpoint("qwen2_moe"), tmp_path / "x", experts=4,
                calibration=tmp_path / "grams")  # fmt: skip


def test_svd_llm_is_the_whitened_truncation_and_beats_svd(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    grams = Grams.open(grams_of(source))
    assert grams.layers == [0, 1, 2]
    arguments: dict[str, Any] = {"ratio": RATIO, "form": "dense"}
    given = {**arguments, "calibration": grams.folder}
    operate("compress", "svd-llm", source, tmp_path / "given", **given)
    operate("compress", "svd-llm", source, tmp_path / "fresh", **arguments)
    operate("compress", "svd", source, tmp_path / "plain", **arguments)
    files = {entry.name for entry in (tmp_path / "fresh").iterdir()}
    assert not {name for name in files if "gram" in name or "statistics" in name}
    before, given_, fresh, plain = (
        tensors(folder) for folder in (source, *(tmp_path / n for n in ("given", "fresh", "plain")))
    )
    report = json.loads((tmp_path / "given" / "report.json").read_text())
    for linear in linears(Model.open(source)):
        name, rank = linear.region.tensor, report["units"][linear.label]["rank"]
        assert torch.equal(given_[name], fresh[name])
        gram, _ = grams.read(linear.layer, linear.module)
        wanted = truncate_whitened(before[name], gram, rank, damping=1e-4).product().float()
        assert torch.equal(given_[name], wanted)
        lost = [
            float(((d := (before[name] - other[name]).double()) @ gram.double() * d).sum())
            for other in (given_, plain)
        ]
        assert lost[0] < lost[1]
    text = json.dumps(report["statistics"])
    assert "gram" in text
    with pytest.raises(InputError, match="another model"):
        operate("compress", "svd-llm", checkpoint("qwen3"), tmp_path / "no", **given)


def test_an_expert_that_no_token_chooses_is_truncated_plainly() -> None:
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = truncate_whitened(matrix, torch.zeros(5, 5), 2)
    assert (
        found.relative_error == 0
    )  # nothing is lost where nothing is seen: hence the plain truncation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "--ratio"),
        ({"ratio": 1.0}, "--ratio"),
        ({"ratio": 0.5, "targets": "attention,router"}, "'router' names no linear layer"),
        ({"ratio": 0.5, "targets": ","}, "names nothing"),
        ({"ratio": 0.5, "align": 0}, "--align"),
    ],
)
def test_options_out_of_range(
    options: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        operate("compress", "svd", checkpoint("llama"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_foreign_model_code_is_never_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    operate("compress", "svd", checkpoint("llama"), out, ratio=RATIO)
    report = json.loads((out / "report.json").read_text())
    code = out / "modeling_moesurg.py"
    code.write_bytes(code.read_bytes() + b"\nraise SystemExit('it was run')\n")
    with pytest.raises(VerificationError, match="is not the model code"):
        verify_custom(open_checkpoint(out), report, None, "cpu", Silent())


def test_an_interrupted_run_takes_its_gram_matrices_up_again(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesurg.surgery.methods.compress import svd_llm

    source, transform, done = checkpoint("llama"), svd_llm.transform, 0

    def stopping(work: Any) -> dict[str, object]:
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt
        return transform(work)

    arguments: dict[str, Any] = {"ratio": RATIO, "tokens": 200, "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(svd_llm, "transform", stopping)
        with pytest.raises(KeyboardInterrupt):
            operate("compress", "svd-llm", source, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
        operate("compress", "svd-llm", source, tmp_path / "out", resume=True, **arguments)
    operate("compress", "svd-llm", source, tmp_path / "whole", **arguments)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_table_of_ranks_repeats_a_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    operate("compress", "svd", source, tmp_path / "one", ratio=RATIO, allocate="waterfill")
    table = tmp_path / "one" / "rank_plan.json"
    entries = json.loads(table.read_text())["matrices"]
    layers = json.loads((tmp_path / "one" / "config.json").read_text())["moesurg_linears"]
    assert {name.removeprefix("model."): entry["rank"] for name, entry in entries.items()} == {
        name: entry["rank"] for name, entry in layers.items()
    }
    assert len({entry["rank"] for entry in entries.values()}) > 3
    assert all(entry["form"] == "pivot" and 0 < entry["error"] < 1 for entry in entries.values())
    operate("compress", "svd", source, tmp_path / "two", rank_plan=str(table))
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    # Plans of others list names and ranks; what is not listed stays whole.
    other = tmp_path / "other.json"
    name = "model.layers.1.mlp.up_proj"
    other.write_text(json.dumps({name: 7}))
    operate("compress", "svd", source, tmp_path / "three", rank_plan=str(other), form="factors")
    held, original = tensors(tmp_path / "three"), tensors(source)
    assert held[f"{name}.lowrank_A.weight"].shape[0] == 7
    assert held.keys() - original.keys() == {f"{name}.lowrank_{part}.weight" for part in "AB"}
    for text, message in (
        ('{"model.layers.9.mlp.up_proj": 7}', "no targeted matrix"),
        (json.dumps({name: 0}), "expected 1 to"),
        (json.dumps({"matrices": []}), "expected an object"),
    ):
        other.write_text(text)
        with pytest.raises(InputError, match=message):
            operate("compress", "svd", source, tmp_path / "four", rank_plan=str(other))
    with pytest.raises(UsageError, match="excludes"):
        operate("compress", "svd", source, tmp_path / "four", rank_plan=str(table), ratio=0.1)
    with pytest.raises(UsageError, match="--ratio or --rank-plan"):
        operate("compress", "svd", source, tmp_path / "four")


@pytest.mark.parametrize("method", ["svd", "svd-llm", "asvd"])
def test_experts_of_a_layer_share_the_ranks_that_spectra_decide(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe", tokenizer=True)
    given: dict[str, Any] = {}
    if method != "svd":
        text = tmp_path / "prose.txt"
        text.write_text("a line of text to be read\n" * 40)
        given = {"data": (text,), "tokens": 128, "seq_len": 32}
    out = tmp_path / "out"
    operate("compress", method, source, out, ratio=RATIO, form="dense", allocate="energy", **given)
    entries = json.loads((out / "rank_plan.json").read_text())["matrices"]
    ranks: dict[str, set[int]] = {}
    for name, entry in entries.items():
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            ranks.setdefault(f"{before}.{after.split('.')[1]}", set()).add(entry["rank"])
    assert ranks
    assert all(len(found) == 1 for found in ranks.values())
    assert len(set.union(*ranks.values())) > 1


def test_a_ratio_of_bytes_counts_the_index_as_it_is_stored() -> None:
    counts = {(96, 64): 4, (64, 64): 4}
    found = uniform_ranks(counts, "pivot", 0.3, 1, index=2.0)
    assert found.after <= 0.7 * found.before
    total = sum(
        count * stored("pivot", shape, found.ranks[shape], 2.0) for shape, count in counts.items()
    )
    assert total == found.after
    assert total > sum(
        count * stored("pivot", shape, found.ranks[shape]) for shape, count in counts.items()
    )


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_matrices_that_lie_between_others_are_refused(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="transposed or interleaved"):
        operate("compress", "svd", checkpoint(family), tmp_path / "out", ratio=0.3, form="dense")
    assert not list(tmp_path.iterdir())
    arguments: dict[str, Any] = {"ratio": 0.3, "form": "dense", "targets": "attention"}
    operate("compress", "svd", checkpoint(family), tmp_path / "out", **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["svd", "lost", "mc-smoe", "dct", "residual", "welore"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    method: str, bad: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = checkpoint("llama")
    spoilt = tensors(source)[name].clone()
    spoilt[3, 2] = bad
    folder = rewrite(source, tmp_path / "spoilt", {name: spoilt})
    with pytest.raises(InputError, match=re.escape(name)):
        operate("compress", method, folder, tmp_path / "out", ratio=RATIO)
    assert not (tmp_path / "out").exists()


def test_text_that_overflows_is_refused_before_anything_is_decided(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.input_layernorm.weight"
    source = checkpoint("llama")
    folder = rewrite(source, tmp_path / "spoilt", {name: tensors(source)[name] * 1e25})
    text = tmp_path / "text.txt"
    text.write_text("some words and more of them " * 40, encoding="utf-8")
    with pytest.raises(InputError, match=r"layer 0 .* not finite on this text"):
        operate("compress", "svd-llm", folder, tmp_path / "out", ratio=RATIO, data=[text])


def test_welore_with_another_rule_is_svd_and_takes_given_ranks(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    for method in ("svd", "welore"):
        operate(
            "compress", method, source, tmp_path / method, ratio=RATIO, align=1, allocate="energy"
        )
    given = {"rank_plan": str(tmp_path / "svd" / "rank_plan.json")}
    operate("compress", "welore", source, tmp_path / "given", **given)
    wanted = tensors(tmp_path / "svd")
    for name in ("welore", "given"):
        found = tensors(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
    with pytest.raises(UsageError, match="excludes"):
        operate("compress", "welore", source, tmp_path / "out", ratio=RATIO, **given)
    with pytest.raises(UsageError, match="give --ratio"):
        operate("compress", "welore", source, tmp_path / "out")

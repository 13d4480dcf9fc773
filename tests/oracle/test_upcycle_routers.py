"""How routers start: every way, in every method that grows a mixture, against stock models and explicit formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import TEXTS, custom, drift, operate, report_of, stock, tensors
from tests.oracle.test_upcycle_prompts import means_of

Checkpoint = Callable[..., Path]


def gate(folder: Path, layer: int = 1) -> torch.Tensor:
    """The router's rows as they are stored, float64 [E, D]."""
    found = [
        value
        for name, value in tensors(folder).items()
        if f"layers.{layer}." in name and name.endswith(("mlp.gate.weight", "moe.gate.weight"))
    ]
    assert len(found) == 1
    return found[0].double()


METHODS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "drop": {"target": "qwen2_moe"},
    "shared": {},
    "ternary": {"form": "dense"},
    "split": {"by": "coactivation", "rows": 200},
    "virtual-groups": {"granularity": 2, "experts": 6},
    "btx": {},
    "bam": {},
}
SHARING = {"shared", "ternary"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_rows_from_texts(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...], name: str
) -> None:
    several = name in {"btx", "bam"}
    source = checkpoint("qwen2" if name in {*SHARING, "drop"} else "llama")
    options = {**({} if several else {"experts": 3}), **METHODS[name]}
    output = tmp_path / "out"
    sources = [source] * 3 if several else source
    operate("upcycle", name, sources, output, data=texts, router_init="domains", **options)
    mean_CD = means_of(source, texts, 1)
    change_ED = mean_CD - mean_CD.mean(dim=0)
    along_D = mean_CD.mean(dim=0) / mean_CD.mean(dim=0).norm()
    change_ED = change_ED - torch.outer(change_ED @ along_D, along_D)
    wanted_ED = change_ED / change_ED.norm(dim=1, keepdim=True)
    if name == "virtual-groups":
        wanted_ED = wanted_ED.repeat_interleave(2, dim=0)
    torch.testing.assert_close(gate(output), wanted_ED, rtol=1e-3, atol=1e-3)
    found = report_of(output)
    assert found["decisions"]["1"]["texts"] == list(TEXTS)
    assert sum(found["decisions"]["1"]["load"]) == pytest.approx(1, abs=1e-3)
    if name != "bam":
        assert found["exactness"]["kind"] == (
            "approximate" if name in {"drop", "split", "ternary"} else "exact"
        )
        if found["exactness"]["kind"] == "exact":
            assert drift(source, output) < 1e-4
    else:
        assert custom(output).model.layers[0].self_attn.expert_router.weight.std() > 0.01


def test_prompts_count_equally_and_tokens_do_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A text of one short and one long prompt: each alone has its mean, both together the mean of those."""
    short, long = "12 + 30 = 42", "The river ran slowly past the old mill and on towards the sea."
    for name, text in (("short", short), ("long", long), ("both", f"{short}\n\n{long}\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (short, long))
    )
    from moesurg.surgery.architectures.model import Model
    from moesurg.surgery.calibration.means import FreshMeans
    from moesurg.surgery.checkpoint.commit import Staging
    from moesurg.surgery.progress import Silent, stoppable

    source = checkpoint("llama")
    files = [tmp_path / name for name in ("short.txt", "long.txt", "both.txt", "records.jsonl")]
    fresh = FreshMeans(Model.open(source), files, 4000, 64, "cpu", mode="prompts")
    with (
        stoppable(Silent()) as stop,
        Staging.open(tmp_path / "out", {}, force=False, resume=False, inputs=[]) as staging,
    ):
        found = fresh.load(staging, Silent(), stop)
        short_D, long_D, both_D, records_D = found.mean(1)
        samples, numbers = found.samples(1), found.sequences(1)
    torch.testing.assert_close(both_D, (short_D + long_D) / 2)
    torch.testing.assert_close(records_D, both_D)
    assert len(samples[0]) != len(samples[1])
    by_token_D = torch.cat(samples[:2]).double().mean(dim=0)
    assert float((by_token_D - both_D).norm()) > 1e-3 * float(both_D.norm())
    assert torch.unique(numbers[2]).tolist() == [0, 1]


def test_logistic_rows_are_the_fit_to_what_the_router_sees(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]
) -> None:
    """Scikit-learn on the stock model's own activations, all of which are sampled."""
    from sklearn.linear_model import LogisticRegression

    from moesurg.surgery.calibration.corpus import read_corpus
    from moesurg.surgery.calibration.sequences import tokenise

    source, output = checkpoint("llama"), tmp_path / "out"
    options = {"router_init": "logistic", "router_l2": 0.1, "temperature": 2.0, "experts": 3}
    operate("upcycle", "sparse", source, output, data=texts, **options)
    model, seen = stock(source), []
    model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0].double())
    )
    sequences = tokenise(read_corpus(texts), source, tokens=600, seq_len=64)
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    label_N = torch.cat(
        [torch.full((len(x),), d) for x, d in zip(seen, sequences.domain_of, strict=True)]
    )
    assert torch.bincount(label_N).tolist() == [200] * 3
    x_ND = torch.cat(seen)
    rms_D = x_ND.square().mean(dim=0).sqrt()
    wanted = LogisticRegression(C=1 / (0.1 * 600), fit_intercept=False, tol=1e-9, max_iter=5000)
    wanted.fit((x_ND / rms_D).numpy(), label_N.numpy())
    wanted_CD = torch.from_numpy(wanted.coef_) / rms_D / 2
    torch.testing.assert_close(gate(output), wanted_CD, rtol=1e-2, atol=2e-3)
    found = report_of(output)["units"]["layer.1.router"]
    right = (x_ND @ wanted_CD.T).argmax(dim=-1) == label_N
    assert found["accuracy"] == pytest.approx(float(right.double().mean()), abs=5e-3)
    assert 0 < found["accuracy_held_out"] <= 1
    selected = torch.tensor(found["selected"])
    assert float(selected.diagonal().mean()) == pytest.approx(found["accuracy"], abs=1e-3)
    assert drift(source, output) < 1e-4
    assert not list(output.glob("means.*"))
    # The load that was predicted is that of the stock router in the output.
    grown, first = stock(output), []
    grown.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, args, result: first.append(result[0].argmax(dim=-1))
    )
    with torch.no_grad():
        for ids in sequences.ids:
            grown(input_ids=torch.from_numpy(ids)[None])
    load = torch.bincount(torch.cat(first), minlength=3) / 600
    torch.testing.assert_close(load, torch.tensor(found["load"]), atol=5e-3, rtol=0)


def test_tied_experts_have_one_row_and_zero_ones_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    tied = {"router_init": "tied", "router_group": 2, "experts": 6, "top_k": 4}
    operate("upcycle", "sparse", source, tmp_path / "tied", **tied)
    rows_ED = gate(tmp_path / "tied")
    assert torch.equal(rows_ED[0::2], rows_ED[1::2])
    assert len(torch.unique(rows_ED, dim=0)) == 3
    # Random rows are those of a router with a row for each group.
    operate("upcycle", "sparse", source, tmp_path / "three", experts=3)
    assert torch.equal(rows_ED[0::2], gate(tmp_path / "three"))
    zero = {"router_init": "zero", "experts": 3, "top_k": 3}
    operate("upcycle", "sparse", source, tmp_path / "zero", **zero)
    assert not gate(tmp_path / "zero").any()
    for name in ("tied", "zero"):
        assert report_of(tmp_path / name)["exactness"]["kind"] == "exact"
        assert drift(source, tmp_path / name) < 1e-4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"router_init": "zero"}, InputError, "same experts"),
        ({"router_init": "tied", "top_k": 1}, InputError, "--top-k 1"),
        ({"router_init": "tied", "router_group": 4}, InputError, "--top-k 2"),
        ({"router_init": "tied", "router_group": 1}, UsageError, "--router-group"),
        ({"neutral": True}, UsageError, "--neutral"),
        ({"router_init": "logistic", "neutral": True}, UsageError, "--neutral"),
        ({"temperature": 2.0}, UsageError, "--temperature"),
        ({"router_init": "logistic", "router_l2": 0.0}, UsageError, "--router-l2"),
        ({"router_init": "logistic", "router_sample": 3}, UsageError, "--router-sample"),
        ({"router_init": "domains", "temperature": 0.0}, UsageError, "--temperature"),
    ],
)
def test_routers_that_select_nothing_sensible_are_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        operate("upcycle", "sparse", checkpoint("llama"), tmp_path / "out", experts=4, **options)


def test_groups_tie_their_own_rows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options: dict[str, Any] = {"experts": 4, "granularity": 2, "router_init": "tied"}
    with pytest.raises(UsageError, match="tied already"):
        operate("upcycle", "virtual-groups", checkpoint("llama"), tmp_path / "out", **options)


def test_there_is_a_text_for_every_expert(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]
) -> None:
    source, output = checkpoint("llama"), tmp_path / "out"
    with pytest.raises(InputError, match="3 texts are given, this router needs 4"):
        operate("upcycle", "sparse", source, output, data=texts, experts=4, router_init="logistic")
    with pytest.raises(UsageError, match="uses no statistics"):
        operate("upcycle", "sparse", source, output, data=texts, experts=3)


def test_parts_of_a_feed_forward_take_routers_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """All parts on with equal weights are the dense model; a router is chosen once."""
    source, output = checkpoint("llama"), tmp_path / "out"
    options: dict[str, Any] = {"experts": 2, "by": "random", "router_init": "zero"}
    result = operate("upcycle", "split", source, output, **options)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    with pytest.raises(UsageError, match="exclude each other"):
        operate("upcycle", "split", source, tmp_path / "two", router="random", **options)

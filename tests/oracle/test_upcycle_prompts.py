"""Routers from texts: rows are centred mean inputs of the feed-forward, and tokens of a text find its expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import TEXTS, drift, operate, rewrite, stock, tensors

Checkpoint = Callable[..., Path]


def means_of(folder: Path, files: tuple[Path, ...], layer: int) -> torch.Tensor:
    """Mean input of a layer's feed-forward in the stock model, every sequence by itself: float64 [C, D]."""
    from moesurg.surgery.calibration.corpus import read_corpus
    from moesurg.surgery.calibration.sequences import tokenise

    sequences = tokenise(read_corpus(files), folder, tokens=600, seq_len=64)
    model = stock(folder)
    seen: list[torch.Tensor] = []
    model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0].double())
    )
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    found = []
    for domain in range(len(files)):
        own = [x for x, d in zip(seen, sequences.domain_of, strict=True) if d == domain]
        found.append(torch.cat(own).mean(dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("neutral", [False, True])
def test_rows_are_centred_means_of_what_the_router_sees(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...], neutral: bool
) -> None:
    sources = [checkpoint("llama", seed=seed) for seed in range(2 if neutral else 3)]
    output = tmp_path / "out"
    options = {"neutral": neutral, "temperature": 0.5}
    operate("upcycle", "prompts", sources, output, data=texts, **options)
    mean_CD = means_of(sources[0], texts, 1)
    centre_D = mean_CD[-1] if neutral else mean_CD.mean(dim=0)
    rows_ED = (mean_CD[:-1] if neutral else mean_CD) - centre_D
    along_D = centre_D / centre_D.norm()
    rows_ED = rows_ED - torch.outer(rows_ED @ along_D, along_D)
    wanted = rows_ED / rows_ED.norm(dim=1, keepdim=True) / 0.5
    found = stock(output).model.layers[1].mlp.gate.weight.detach().double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert float((found @ centre_D).abs().max()) < 1e-4


@pytest.mark.parametrize("rest", ["base", "mean"])
def test_the_rest_is_the_first_models_or_the_mean(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...], rest: str
) -> None:
    sources = [checkpoint("llama", seed=seed) for seed in range(3)]
    operate("upcycle", "prompts", sources, tmp_path / "out", data=texts, rest=rest)
    found, dense = tensors(tmp_path / "out"), [tensors(source) for source in sources]
    for name, value in dense[0].items():
        if ".mlp." not in name:
            wanted = value if rest == "base" else sum(t[name].double() for t in dense) / 3
            torch.testing.assert_close(found[name].double(), torch.as_tensor(wanted).double())


def test_equal_models_are_one_model_and_the_load_is_told(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]
) -> None:
    source, output = checkpoint("llama"), tmp_path / "out"
    result = operate("upcycle", "prompts", [source] * 3, output, data=texts)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    report = json.loads((output / "report.json").read_text())
    first = report["decisions"]["0"]
    assert first["texts"] == list(TEXTS)
    assert sum(first["load"]) == pytest.approx(1, abs=1e-3)
    own = sum(first["selected"][number][number] for number in range(3)) / 3
    assert own > 0.45  # chance is a third
    assert not list(output.glob("means.*"))


def test_texts_have_to_fit(checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]) -> None:
    sources = [checkpoint("llama")] * 2
    with pytest.raises(InputError, match="3 texts are given, this router needs 2"):
        operate("upcycle", "prompts", sources, tmp_path / "out", data=texts)
    with pytest.raises(UsageError, match="--temperature"):
        operate("upcycle", "prompts", sources, tmp_path / "out", data=texts[:2], temperature=0.0)


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_contributors_become_experts_of_the_public_model(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...], family: str
) -> None:
    public = checkpoint(family)
    dense = tensors(public)
    generator = torch.Generator().manual_seed(4)
    others = [
        {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in dense.items()
            if ".mlp." in name
        }
        for _ in range(2)
    ]
    sources = [
        public,
        *(rewrite(public, tmp_path / f"own-{n}", change) for n, change in enumerate(others)),
    ]
    output = tmp_path / "out"
    operate("upcycle", "flex", sources, output, data=texts)
    model, found = stock(output), tensors(output)
    if family == "olmo2":
        assert model.config.model_type == "flex_olmo"
    for name, value in dense.items():
        if ".mlp." not in name:
            assert torch.equal(found[name], value)
    for number, change in enumerate([dense, *others]):
        down = model.model.layers[1].mlp.experts.down_proj[number]
        assert torch.equal(down, change["model.layers.1.mlp.down_proj.weight"])
    rows_ED = model.model.layers[1].mlp.gate.weight
    torch.testing.assert_close(rows_ED.norm(dim=1), torch.ones(3))


def test_contributors_that_changed_anything_else_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, texts: tuple[Path, ...]
) -> None:
    public = checkpoint("olmo2")
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = tensors(public)[name].clone()
    changed[0, 0] += 1
    other = rewrite(public, tmp_path / "other", {name: changed})
    with pytest.raises(InputError, match=r"q_proj\.weight differs from the public"):
        operate("upcycle", "flex", [public, other], tmp_path / "out", data=texts[:2])
    assert not (tmp_path / "out").exists()

"""Merging experts: identities, the papers' formulas computed another way, and both layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import (
    custom,
    decisions,
    drift,
    logits,
    operate,
    rewrite,
    stock,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
NAMES = {
    "mixtral": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w{projection}.weight",
    "other": "model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight",
}


def name(family: str, layer: int, expert: int, projection: str) -> str:
    if family == "mixtral":
        short = {"gate": "1", "up": "3", "down": "2"}[projection]
        return NAMES["mixtral"].format(layer=layer, expert=expert, projection=short)
    return NAMES["other"].format(layer=layer, expert=expert, projection=projection)


@pytest.mark.parametrize("method", ["m-smoe", "sub-moe"])
@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_merging_nothing_gives_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, method: str, family: str, layout: str
) -> None:
    source, output = checkpoint(family, layout=layout), tmp_path / "same"
    result = operate("merge", method, source, output, experts=8)
    assert result["exactness"]["kind"] == "bitwise"
    before, after = tensors(source), tensors(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", ["m-smoe", "sub-moe"])
@pytest.mark.parametrize("router", ["keep", "mean", "tied"])
@pytest.mark.parametrize("family", MOE)
def test_outputs_load_and_generate(
    checkpoint: Checkpoint, tmp_path: Path, method: str, router: str, family: str
) -> None:
    source, output = checkpoint(family), tmp_path / "merged"
    operate("merge", method, source, output, experts=4, router=router)
    model = stock(output)
    assert model.config.num_experts == (8 if router == "tied" else 4)
    generated = model.generate(token_ids(source, rows=1), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == 28


@pytest.mark.parametrize("family", MOE)
def test_both_layouts_give_the_same_function(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    for layout in ("per-expert", "fused"):
        operate("merge", "m-smoe", checkpoint(family, layout=layout), tmp_path / layout, experts=4)
    assert drift(tmp_path / "per-expert", tmp_path / "fused") < 1e-5


@pytest.mark.parametrize("method", ["m-smoe", "sub-moe"])
def test_identical_experts_are_reproduced_exactly(
    checkpoint: Checkpoint, tmp_path: Path, method: str
) -> None:
    dense = checkpoint("llama", dtype="bfloat16")
    operate("upcycle", "sparse", dense, tmp_path / "moe", experts=4)
    operate("merge", method, tmp_path / "moe", tmp_path / "two", experts=2)
    assert drift(dense, tmp_path / "two") < 1e-4
    before, after = tensors(dense), tensors(tmp_path / "two")
    for expert in range(2):
        merged = after[name("mixtral", 0, expert, "gate")]
        assert torch.equal(merged, before["model.layers.0.mlp.gate_proj.weight"])


def shuffled_copies(source: Path, target: Path) -> Path:
    """Every expert of a Mixtral is expert 0 with its neurons in another order."""
    stored, change = tensors(source), {}
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        first = {p: stored[name("mixtral", layer, 0, p)] for p in ("gate", "up", "down")}
        for expert in range(8):
            order = torch.randperm(first["gate"].shape[0], generator=generator)
            order = order.sort().values if expert == 0 else order
            change[name("mixtral", layer, expert, "gate")] = first["gate"][order].contiguous()
            change[name("mixtral", layer, expert, "up")] = first["up"][order].contiguous()
            change[name("mixtral", layer, expert, "down")] = first["down"][:, order].contiguous()
    return rewrite(source, target, change)


def test_permuted_copies_merge_to_the_original_with_alignment_only(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = shuffled_copies(checkpoint("mixtral"), tmp_path / "copies")
    operate("merge", "m-smoe", source, tmp_path / "aligned", experts=2, align="weight")
    operate("merge", "m-smoe", source, tmp_path / "plain", experts=2, align="none")
    assert drift(source, tmp_path / "aligned") < 1e-4
    assert drift(source, tmp_path / "plain") > 1e-2


@pytest.mark.parametrize("axis", [0, 1])
def test_sub_moe_is_its_joint_decomposition(
    checkpoint: Checkpoint, tmp_path: Path, axis: int
) -> None:
    """The paper's stage 2, by an explicit SVD of the concatenated matrices, on either axis."""
    source, output = checkpoint("qwen3_moe"), tmp_path / "merged"
    operate("merge", "sub-moe", source, output, experts=3)
    stored, merged = tensors(source), tensors(output)
    for layer, decided in decisions(output).items():
        for slot, (group, weights) in enumerate(
            zip(decided["groups"], decided["weights"], strict=True)
        ):
            for projection in ("gate", "up", "down"):
                members = [
                    stored[name("other", int(layer), expert, projection)].double()
                    for expert in group
                ]
                u, s, vt = torch.linalg.svd(torch.cat(members, dim=1 - axis), full_matrices=False)
                if axis == 0:
                    blocks = vt.split(members[0].shape[1], dim=1)
                    mixed = sum(w * v for w, v in zip(weights, blocks, strict=True))
                    expected = u @ torch.diag(s) @ mixed
                else:
                    blocks = u.split(members[0].shape[0], dim=0)
                    mixed = sum(w * v for w, v in zip(weights, blocks, strict=True))
                    expected = mixed @ torch.diag(s) @ vt
                found = merged[name("other", int(layer), slot, projection)].double()
                assert torch.allclose(found, expected, atol=1e-6)


def test_sub_moe_rank_is_a_projection_on_the_shared_subspace(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    operate("merge", "sub-moe", source, tmp_path / "full", experts=3)
    operate("merge", "sub-moe", source, tmp_path / "low", experts=3, rank=5, whiten=False)
    stored, full, low = tensors(source), tensors(tmp_path / "full"), tensors(tmp_path / "low")
    decided = decisions(tmp_path / "low")["0"]
    for slot, group in enumerate(decided["groups"]):
        members = [stored[name("other", 0, expert, "gate")].double() for expert in group]
        u, _, _ = torch.linalg.svd(torch.cat(members, dim=1), full_matrices=False)
        expected = u[:, :5] @ u[:, :5].T @ full[name("other", 0, slot, "gate")].double()
        found = low[name("other", 0, slot, "gate")].double()
        assert torch.allclose(found, expected, atol=1e-6)
        assert int(torch.linalg.matrix_rank(found, rtol=1e-5)) == 5


@pytest.mark.parametrize("family", MOE)
def test_a_tied_merge_is_the_summed_gate_of_the_papers(
    checkpoint: Checkpoint, tmp_path: Path, family: str
) -> None:
    """Every slot of a group holds the merged expert, so a token's weights on a group add up."""
    source, output = checkpoint(family), tmp_path / "tied"
    operate("merge", "m-smoe", source, output, experts=4, router="tied", align="none")
    stored, merged = tensors(source), tensors(output)
    for layer, decided in decisions(output).items():
        for group, weights in zip(decided["groups"], decided["weights"], strict=True):
            mean = sum(
                weight * stored[name(family, int(layer), expert, "up")].double()
                for expert, weight in zip(group, weights, strict=True)
            )
            for expert in group:
                found = merged[name(family, int(layer), expert, "up")].double()
                assert torch.allclose(found, mean, atol=1e-6)  # type: ignore[arg-type]
    routers = [key for key in stored if key.endswith("gate.weight")]
    assert routers
    assert all(torch.equal(stored[key], merged[key]) for key in routers)


def test_router_rows_follow_the_choice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    rows = tensors(source)["model.layers.1.mlp.gate.weight"]
    for router in ("keep", "mean"):
        operate("merge", "m-smoe", source, tmp_path / router, experts=4, router=router)
    decided = decisions(tmp_path / "keep")["1"]
    kept = tensors(tmp_path / "keep")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(kept, rows[decided["representatives"]])
    mean = tensors(tmp_path / "mean")["model.layers.1.mlp.gate.weight"]
    for slot, (group, weights) in enumerate(
        zip(decided["groups"], decided["weights"], strict=True)
    ):
        expected = torch.tensor(weights, dtype=torch.float64) @ rows[group].double()
        assert torch.allclose(mean[slot].double(), expected, atol=1e-6)


def test_global_allocation_keeps_the_total(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    for method in ("m-smoe", "sub-moe"):
        output = tmp_path / method
        operate("merge", method, source, output, experts=4, router="tied", allocation="global")
        sizes = [len(decided["groups"]) for decided in decisions(output).values()]
        assert sum(sizes) == 12
        assert logits(output, token_ids(source)).isfinite().all()


@pytest.mark.parametrize(
    ("method", "router"), [("m-smoe", "mapped"), ("sub-moe", "mapped"), ("sub-moe", "keep")]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_global_allocation_stores_what_it_decides(
    method: str, router: str, family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Padded or with model code for rows that are dropped; the function of the tied merge for rows that stay."""
    source, output = checkpoint(family), tmp_path / "out"
    options = {"experts": 4, "allocation": "global", "tokens": 128}
    planned = operate("merge", method, source, output, router=router, dry_run=True, **options)
    assert any("the text decides" in note for note in planned["notes"])
    result = operate("merge", method, source, output, router=router, **options)
    padded = family == "glm4_moe" and router == "keep"
    assert result["tier"] == ("padded" if padded else "custom")
    sizes = [len(decided["groups"]) for decided in decisions(output).values()]
    assert sum(sizes) == 4 * len(sizes)
    assert len(set(sizes)) > 1 or method == "m-smoe"
    assert verify(str(output), reference=None, device="cpu", progress=Silent())["verified"]
    ids = token_ids(source)
    with torch.no_grad():
        found = (stock if padded else custom)(output)(input_ids=ids).logits
    assert found.isfinite().all()
    if router == "mapped":
        operate("merge", method, source, tmp_path / "tied", router="tied", **options)
        wanted = logits(tmp_path / "tied", ids)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_global_allocation_needs_a_router_that_keeps_its_rows(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="fewer experts than a token selects"):
        operate(
            "merge", "m-smoe", checkpoint("mixtral"), tmp_path / "x", experts=4, allocation="global"
        )


@pytest.mark.parametrize(("experts", "sentence"), [(1, "fewer than the 2"), (9, "the model has 8")])
def test_impossible_counts_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, experts: int, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        operate("merge", "m-smoe", checkpoint("mixtral"), tmp_path / "x", experts=experts)
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_merge(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no experts to merge"):
        operate("merge", "m-smoe", checkpoint("llama"), tmp_path / "x", experts=4)


def test_dense_layers_of_a_mixture_pass_through(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe", mlp_only_layers=[1])
    operate("merge", "sub-moe", source, tmp_path / "merged", experts=4)
    before, after = tensors(source), tensors(tmp_path / "merged")
    dense = [key for key in before if key.startswith("model.layers.1.mlp.")]
    assert dense
    assert all(torch.equal(before[key], after[key]) for key in dense)
    stock(tmp_path / "merged")

"""Laws of merging adapters: known answers, identities, and independence of how products are split into factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.linalg import factors as products
from moesurg.surgery.linalg import gauge
from moesurg.surgery.linalg.core_space import core_space
from moesurg.surgery.linalg.factor_stack import Stack
from moesurg.surgery.methods.adapters import _rules as rules
from moesurg.surgery.methods.adapters import rtsvm
from moesurg.surgery.methods.adapters.knots import aligned
from moesurg.surgery.methods.adapters.lora_lego import lego
from moesurg.surgery.seeding import stream
from tests.oracle.helpers import operate, peft, token_ids
from tests.oracle.test_adapters import changes, distance, shelf, summed

Checkpoint = Callable[..., Path]
Pair = tuple[torch.Tensor, torch.Tensor]
LEGO: dict[str, Any] = {
    "seed": 0,
    "gauge": "balance",
    "features": "raw",
    "norm": "inf",
    "rescale": True,
    "rescale_output": True,
    "reference_rank": "mean",
}
EXACT_SUMS = {
    "cat": {},
    "core": {"rule": "sum"},
    "knots": {"rule": "sum"},
    "task-arithmetic": {},
    "svd": {"rank": 99},
    "ctm": {"rank": 99},
}


def pairs(
    seed: int = 0, ranks: tuple[int, ...] = (2, 3, 4), m: int = 12, n: int = 10
) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(rank, n), draw(m, rank)) for rank in ranks]


def product(pair: Pair) -> torch.Tensor:
    return pair[1] @ pair[0]


def rng(*path: str | int) -> Any:
    return stream(0, *path)


# Factors


def test_products_are_measured_without_being_formed() -> None:
    first, second = pairs(ranks=(3, 4))
    batched = [(down[None], up[None]) for down, up in (first, second)]
    assert products.norm(batched[0]) == pytest.approx(float(product(first).norm()))
    assert float(products.inner(*batched)) == pytest.approx(
        float((product(first) * product(second)).sum())
    )
    difference = float((product(first) - product(second)).norm() / product(second).norm())
    assert products.relative_error(*batched) == pytest.approx(difference)
    assert products.relative_error(batched[0], batched[0]) < 1e-15
    u, s, vt = products.svd(batched[1])
    torch.testing.assert_close((u * s[:, None]) @ vt, product(second)[None])
    expected = torch.linalg.svdvals(product(second))[:4]
    torch.testing.assert_close(s[0], expected)


def test_measures_hold_where_products_cancel() -> None:
    """Gram matrices lose half the digits there, so norms have to notice."""
    (first,) = pairs(ranks=(3,))
    pair = (first[0][None], first[1][None])
    mixing = torch.tensor([[1.0, 2, 0], [0, 1, 3], [0, 0, 1]], dtype=torch.float64)
    mixed = (mixing @ pair[0], pair[1] @ torch.linalg.inv(mixing))
    assert products.relative_error(mixed, pair) < 1e-13
    near = (pair[0], pair[1] * (1 + 1e-9))
    assert products.relative_error(near, pair) == pytest.approx(1e-9, rel=1e-4)
    rounded = (pair[0].float().double(), pair[1].float().double())
    lost = float((rounded[1] @ rounded[0] - product(first)).norm() / product(first).norm())
    assert products.rounding_error(pair, rounded) == pytest.approx(lost, rel=1e-6)


def test_angles_and_dead_ranks() -> None:
    first, second = ((down[None], up[None]) for down, up in pairs(ranks=(3, 4)))
    found = torch.tensor(Stack([first, second], [1.0, -2.0]).cosines())
    one, other = (up[0] @ down[0] for down, up in (first, second))
    expected = float((one * other).sum() / one.norm() / other.norm())
    torch.testing.assert_close(found, torch.tensor([[1.0, expected], [expected, 1.0]]))
    positive = torch.tensor(Stack([first, second], [1.0, 2.0]).cosines())
    torch.testing.assert_close(positive, found)
    zero = (first[0] * 0, first[1])
    assert Stack([first, zero], [1.0, 0.0]).cosines()[0][1] == 0.0
    second[1][0, :, 2] *= 1e-14
    several = (second, first, zero)
    assert [products.dead(pair) for pair in several] == [1, 0, 3]
    assert Stack(several, [1.0, -2.0, 3.0]).dead() == Stack(several, [1.0, 0.0, 1.0]).dead() == 4


@pytest.mark.parametrize("case", ["plain", "equal", "cancelled", "wide"])
def test_a_stack_measures_what_its_total_is(case: str) -> None:
    """Also where ranks repeat, where the sum is nearly nothing, and where there are more ranks than columns."""
    several = [(down[None], up[None]) for down, up in pairs(ranks=(3, 4))]
    weights = [0.5, -2.0]
    if case == "equal":
        several = [several[0], several[0]]
    elif case == "cancelled":
        several, weights = [several[0], several[0]], [1.0, 1e-6 - 1.0]
    elif case == "wide":
        several = [(down[None], up[None]) for down, up in pairs(ranks=(6, 7))]
    stack = Stack(several, weights)
    total = sum(w * up[0] @ down[0] for w, (down, up) in zip(weights, several, strict=True))
    torch.testing.assert_close((stack.total[1] @ stack.total[0])[0], torch.as_tensor(total))
    shares = torch.linalg.svdvals(torch.as_tensor(total))
    shares = shares / shares.sum()
    expected = float(torch.special.entr(shares).sum().exp())
    assert stack.effective_rank() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["plain", "cancelled", "tiny", "half", "kept"])
def test_a_stack_measures_what_a_cast_takes_from_it(case: str) -> None:
    """Also where ranks cancel, where squares leave the range of float32, and where only one factor is rounded."""
    several = [(down[None], up[None]) for down, up in pairs(ranks=(3, 4), m=40, n=30)]
    weights = [0.5, -2.0]
    if case == "cancelled":
        several, weights = [several[0], several[0]], [1.0, 1e-6 - 1.0]
    elif case == "tiny":
        several = [(down * 1e-20, up * 1e-12) for down, up in several]
    stack = Stack(several, weights)
    kind = torch.bfloat16 if case == "half" else torch.float32
    down, up = stack.total
    rounded = (down if case == "kept" else down.to(kind), up.to(kind))
    exact = up[0] @ down[0]
    lost = rounded[1][0].double() @ rounded[0][0].double() - exact
    expected = float(lost.norm() / exact.norm())
    assert stack.rounding_error(rounded) == pytest.approx(expected, rel=1e-5)
    assert Stack(several, weights).rounding_error(stack.total) == 0.0


def test_a_sum_of_nothing_has_no_relative_error() -> None:
    """Whatever its parts lose: two changes that cancel exactly, one of them rounded."""
    pair = torch.eye(3, dtype=torch.float64)[None, :1], torch.ones(1, 4, 1, dtype=torch.float64)
    stack = Stack([pair, pair], [1.0, -1.0])
    down, up = stack.total
    assert stack.norm == 0.0
    assert stack.rounding_error((down, up * torch.tensor([1.0, 1.001]))) == 0.0


def test_truncation_is_optimal() -> None:
    (pair,) = pairs(ranks=(6,))
    down, up = products.truncated((pair[0][None], pair[1][None]), 2)
    lost = float((up[0] @ down[0] - product(pair)).norm())
    assert lost == pytest.approx(float(torch.linalg.svdvals(product(pair))[2:].norm()))


def test_gauges_keep_the_product() -> None:
    (pair,) = pairs(ranks=(4,))
    for fixed in (gauge.balance(pair), gauge.fix_signs(pair), gauge.canonical(pair)):
        torch.testing.assert_close(product(fixed), product(pair))
    down, up = gauge.balance(pair)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    mixing = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = (mixing @ pair[0], pair[1] @ torch.linalg.inv(mixing))
    for mine, other in zip(gauge.canonical(pair), gauge.canonical(mixed), strict=True):
        torch.testing.assert_close(mine, other)
    rotation = torch.linalg.qr(mixing).Q
    back, found = gauge.procrustes((rotation @ pair[0], pair[1] @ rotation.T), pair)
    torch.testing.assert_close(back[0], pair[0])
    torch.testing.assert_close(back[1], pair[1])
    torch.testing.assert_close(found, rotation.T)


def test_core_space_loses_nothing() -> None:
    found = pairs()
    space = core_space(found)
    for pair, core in zip(found, space.cores, strict=True):
        torch.testing.assert_close(space.left @ core @ space.right, product(pair))
    twice = core_space([*found, *found])
    assert twice.left.shape == space.left.shape
    small = core_space([found[0], (found[1][0] * 1e-8, found[1][1] * 1e-8)])
    assert small.left.shape[1] == 5


def test_aligned_parts_are_an_svd_of_all_changes_side_by_side() -> None:
    found = pairs()
    basis, parts = aligned(found)
    for pair, part in zip(found, parts, strict=True):
        torch.testing.assert_close(basis @ part, product(pair))
    together = torch.cat([product(pair) for pair in found], dim=1)
    values = torch.cat(parts, dim=1).norm(dim=1)
    torch.testing.assert_close(values, torch.linalg.svdvals(together)[: len(values)])


# Rules in core space


def test_tsv_in_core_space_is_tsv_on_the_changes() -> None:
    found = pairs()
    space, weights = core_space(found), [1.0, 0.5, 2.0]
    inside = space.left @ rules.apply("tsv", space.cores, weights, rng=rng) @ space.right
    outside = rules.apply("tsv", [product(pair) for pair in found], weights, rng=rng)
    torch.testing.assert_close(inside, outside, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("copies", [1, 4])
def test_tsv_of_copies_is_the_copy(copies: int) -> None:
    """Published code is off by the root of T - 1."""
    (pair,) = pairs(ranks=(3,))
    found = rules.apply("tsv", [product(pair)] * copies, [1.0] * copies, rng=rng)
    torch.testing.assert_close(found, product(pair))


def test_tsv_of_orthogonal_tasks_is_their_sum() -> None:
    columns = torch.linalg.qr(torch.randn(12, 6, dtype=torch.float64)).Q
    rows = torch.linalg.qr(torch.randn(10, 6, dtype=torch.float64)).Q.T
    first, second = columns[:, :3] @ rows[:3], 2 * columns[:, 3:] @ rows[3:]
    found = rules.apply("tsv", [first, second], [1.0, 1.0], rng=rng)
    torch.testing.assert_close(found, first + second)


def test_iso_keeps_the_sum_of_the_singular_values_and_the_rank() -> None:
    found = pairs()
    target = sum(product(pair) for pair in found)
    values = torch.linalg.svdvals(torch.as_tensor(target))
    flat = torch.linalg.svdvals(
        rules.apply("iso", [product(pair) for pair in found], [1.0] * 3, rng=rng)
    )
    assert float(flat.sum()) == pytest.approx(float(values.sum()))
    torch.testing.assert_close(flat[:9], torch.full((9,), float(values.sum()) / 9).double())


def test_ties_on_known_numbers() -> None:
    first = torch.tensor([[4.0, -3.0, 0.1, 2.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, 5.0, -0.2, 2.0]], dtype=torch.float64)
    found = rules.apply("ties", [first, second], [1.0, 1.0], rng=rng, density=0.5)
    # Cut to two elements each: [4, -3, 0, 0] and [0, 5, 0, 2]; the second column elects plus.
    torch.testing.assert_close(found, torch.tensor([[4.0, 5.0, 0.0, 2.0]]).double())
    same = rules.apply("ties", [first, first], [1.0, 1.0], rng=rng, density=1.0)
    torch.testing.assert_close(same, first)


@pytest.mark.parametrize("rule", ["dare", "della"])
def test_random_drops_are_unbiased(rule: str) -> None:
    change = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = [
        rules.apply(rule, [change], [1.0], density=0.5, rng=lambda *path, s=seed: stream(s, *path))
        for seed in range(400)
    ]
    mean = torch.stack(draws).mean(0)
    assert float((mean - change).norm() / change.norm()) < 0.08
    kept = (draws[0] != 0).double().mean()
    assert 0.4 < float(kept) < 0.6


def test_rtsvm_without_outliers_weighs_equally() -> None:
    flat = torch.ones(6, 5, dtype=torch.float64)
    assert rtsvm.outlier_weights([flat, 2 * flat]) == [1.0, 1.0]
    assert rtsvm.sparsity(flat) == 0
    spiked = flat.clone()
    spiked[0, 0] = 100
    heavy = rtsvm.outlier_weights([spiked, flat])
    assert heavy == [2.0, 0.0]
    assert rtsvm.sparsity(spiked * torch.tensor([1.0, 0, 0, 0, 0]).double()) > 0.7


# LEGO


def test_lego_with_a_cluster_for_every_rank_is_the_sum() -> None:
    found = pairs()
    options = {**LEGO, "rescale_output": False}
    down, up = lego(found, [1.0] * 3, 9, **options)[0]
    target = sum(product(pair) for pair in found)
    torch.testing.assert_close(up @ down, torch.as_tensor(target))
    scaled = product(lego(found, [1.0] * 3, 9, **LEGO)[0])
    torch.testing.assert_close(scaled, math.sqrt(3 / 9) * torch.as_tensor(target))


def test_lego_of_identical_adapters_is_the_adapter() -> None:
    (pair,) = pairs(ranks=(4,))
    shuffled = (pair[0][[2, 0, 3, 1]], pair[1][:, [2, 0, 3, 1]])
    flipped = (
        pair[0] * torch.tensor([[1.0], [-1], [1], [-1]]),
        pair[1] * torch.tensor([1.0, -1, 1, -1]),
    )
    scaled = (pair[0] * 10, pair[1] / 10)
    merged, facts = lego([pair, shuffled, flipped, scaled], [1.0] * 4, 4, **LEGO)
    torch.testing.assert_close(product(merged), product(pair))
    assert facts["clusters"] == [4, 4, 4, 4]
    assert facts["purity"] == pytest.approx(0.25)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    turned = (rotation @ pair[0], pair[1] @ rotation.T)
    by_svd = product(lego([pair, turned], [1.0] * 2, 4, **{**LEGO, "gauge": "svd"})[0])
    torch.testing.assert_close(by_svd, product(pair))
    # Without a gauge the sign of a rank changes everything: the reason for the default.
    unfixed = product(lego([pair, flipped], [1.0] * 2, 4, **{**LEGO, "gauge": "none"})[0])
    assert (unfixed - product(pair)).norm() > 0.1 * product(pair).norm()


FIRST = (torch.eye(2).double(), torch.eye(2).double())
SECOND = (
    torch.tensor([[1, 0.2], [0, 1]]).double(),
    torch.tensor([[1, 0], [0.2, 1]]).double(),
)


def known(expected: list[list[float]]) -> torch.Tensor:
    return torch.tensor(expected, dtype=torch.float64)


def test_lego_on_known_numbers() -> None:
    options = {**LEGO, "gauge": "none"}
    merged, _ = lego([FIRST, SECOND], [1.0, 1.0], 2, **options)
    torch.testing.assert_close(product(merged), known([[1, 0.1], [0.1, 1.01]]))
    euclidean, _ = lego([FIRST, SECOND], [1.0, 1.0], 2, **{**options, "norm": "l2"})
    expected = known([[1.009804, 0.100980], [0.100980, 1.010098]])
    torch.testing.assert_close(product(euclidean), expected, atol=1e-6, rtol=1e-6)
    one, _ = lego([FIRST, SECOND], [1.0, 1.0], 1, **options)
    expected = known([[1.168772, 1.285649], [1.285649, 1.414214]])
    torch.testing.assert_close(product(one), expected, atol=1e-6, rtol=1e-6)


def test_opposite_ranks_cancel_and_are_counted() -> None:
    down, up = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0], [1.0]]).double()
    merged, facts = lego([(down, up), (-down, -up)], [1.0, 1.0], 1, **{**LEGO, "gauge": "none"})
    assert facts["cancelled"] == 1
    assert not product(merged).any()


# Runs


@pytest.mark.parametrize("method", EXACT_SUMS)
def test_sums_are_sums(method: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders, weights = shelf(checkpoint), [0.5, -2.0, 1.25]
    operate("merge", method, folders, tmp_path / "out", weights="0.5,-2,1.25", **EXACT_SUMS[method])
    assert distance(changes(tmp_path / "out"), summed(folders, weights)) < 1e-4


def test_a_sum_loses_nothing_where_scales_are_powers_of_two(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In half precision, where a root of two on both factors would round every number."""
    folders = []
    for index, (rank, alpha) in enumerate([(2, 4), (4, 2)]):
        source = checkpoint("adapter", seed=index, rank=rank, alpha=alpha)
        folder = tmp_path / f"half-{index}"
        folder.mkdir()
        stored = load_file(source / "adapter_model.safetensors")
        halved = {name: value.bfloat16() for name, value in stored.items()}
        save_file(halved, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        folders.append(folder)
    operate("merge", "cat", folders, tmp_path / "out", weights="-4,0.5")
    exact = summed(folders, [-4.0, 0.5])
    for name, change in changes(tmp_path / "out").items():
        torch.testing.assert_close(change, exact[name], rtol=1e-14, atol=1e-14)
    units = json.loads((tmp_path / "out" / "report.json").read_text())["units"]
    assert {unit["stored_error"] for unit in units.values()} == {0.0}
    operate("merge", "cat", folders, tmp_path / "rounded", weights="3,0.5")
    units = json.loads((tmp_path / "rounded" / "report.json").read_text())["units"]
    assert all(1e-4 < unit["stored_error"] < 1e-2 for unit in units.values())


def test_a_sweep_of_stacked_adapters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every point of the grid is the sum at its weights, and what a merge of its own would be."""
    folders = [checkpoint("adapter", seed=seed) for seed in (1, 2)]
    operate("merge", "cat", folders, tmp_path / "out", sweep="simplex:step=0.5")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = {entry["folder"]: entry["weights"] for entry in manifest["outputs"]}
    assert sorted(found.values()) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    for folder, weights in found.items():
        out = tmp_path / "out" / folder
        assert distance(changes(out), summed(folders, weights)) < 1e-5
        peft(checkpoint("llama"), out)
    operate("merge", "cat", folders, tmp_path / "one", weights="0.5,0.5")
    half = next(folder for folder, weights in found.items() if weights == [0.5, 0.5])
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "out" / half / name).read_bytes()


def remix(source: Path, target: Path, seed: int) -> Path:
    """The same adapter, each module's factors mixed by an invertible matrix."""
    generator = torch.Generator().manual_seed(seed)
    stored = load_file(source / "adapter_model.safetensors")
    for name in [name for name in stored if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        rank = stored[name].shape[0]
        mixing = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=generator)
        stored[name] = mixing @ stored[name]
        stored[other] = stored[other] @ torch.linalg.inv(mixing)
    target.mkdir()
    save_file(stored, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return target


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {"rank": 3}),
        ("core", {"rule": "tsv"}),
        ("tsv-m", {}),
        ("iso-c", {}),
        ("ctm", {"rank": 3}),
        ("ties", {}),
        ("lora-lego", {"gauge": "svd"}),
    ],
)
def test_the_split_into_factors_does_not_matter(
    method: str, options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Nor does it for all others that only see products; signs and magnitudes in a basis depend on its signs."""
    folders = shelf(checkpoint)
    mixed = [remix(folder, tmp_path / str(i), i) for i, folder in enumerate(folders)]
    operate("merge", method, folders, tmp_path / "one", **options)
    operate("merge", method, mixed, tmp_path / "two", **options)
    assert distance(changes(tmp_path / "one"), changes(tmp_path / "two")) < 2e-4


def test_the_truncated_sum_agrees_with_peft(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    folders = [checkpoint("adapter", seed=seed, rank=3, alpha=6) for seed in (1, 2)]
    adapted = peft(base, folders[0])
    adapted.load_adapter(str(folders[1]), adapter_name="second")
    adapted.add_weighted_adapter(
        ["default", "second"], [0.5, 2.0], "sum", "svd", svd_rank=4, svd_full_matrices=False
    )
    adapted.set_adapter("sum")
    operate("merge", "svd", folders, tmp_path / "out", weights="0.5,2", rank=4)
    ours = peft(base, tmp_path / "out")
    ids = token_ids(base)
    with torch.no_grad():
        assert (ours(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["svd", "lora-lego"])
def test_ranks_by_energy(method: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = shelf(checkpoint)
    option = {"svd": "energy", "lora-lego": "k_energy"}[method]
    operate("merge", method, folders, tmp_path / "out", **{option: 0.9})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for name, change in summed(folders, [1.0] * 3).items():
        energy = torch.linalg.svdvals(change).square()
        needed = int((energy.cumsum(0) / energy.sum() < 0.9).sum()) + 1
        escaped = name.replace(".", r"\.")
        assert config["rank_pattern"].get(escaped, config["r"]) == needed
        if method == "svd":
            assert report["units"][name]["error"] <= math.sqrt(0.1) + 1e-6
    peft(checkpoint("llama"), tmp_path / "out")


@pytest.mark.parametrize("alpha", [9, -3, 0])
def test_a_shared_first_factor_gives_the_exact_mean(
    alpha: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Whatever the scales, signs and zero included; the shared factor stays as it is, bit by bit."""
    one, other = checkpoint("adapter", seed=1, alpha=alpha), checkpoint("adapter", seed=2, alpha=9)
    stored, first = (load_file(f / "adapter_model.safetensors") for f in (other, one))
    stored.update({name: value for name, value in first.items() if "lora_A" in name})
    shared = tmp_path / "shared"
    shared.mkdir()
    save_file(stored, shared / "adapter_model.safetensors")
    (shared / "adapter_config.json").write_bytes((other / "adapter_config.json").read_bytes())
    operate("merge", "ffa", [one, shared], tmp_path / "out", weights="1,3")
    assert distance(changes(tmp_path / "out"), summed([one, shared], [0.25, 0.75])) < 1e-5
    for name, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert "lora_A" not in name or torch.equal(value, first[name])
    with pytest.raises(InputError, match="lora_A differs"):
        operate("merge", "ffa", [one, other], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svd", {"rank": 0}, "--rank 0"),
        ("svd", {"rank": 2, "energy": 0.5}, "exclude each other"),
        ("svd", {"energy": 1.5}, "--energy 1.5"),
        ("lora-lego", {"rank": 100}, "more clusters than module"),
        ("lora-lego", {"reference_rank": "big"}, "--reference-rank"),
        ("ties", {"density": 0.0}, "--density 0"),
        ("tsv-m", {"per_task": 0}, "--per-task"),
        ("task-arithmetic", {"scale": math.nan}, "--scale nan"),
        ("ffa", {"weights": "1,-1"}, "add up to 0"),
    ],
)
def test_options_out_of_range(
    method: str, options: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = [checkpoint("adapter", seed=seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match=message):
        operate("merge", method, folders, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_stacked_experts_keep_their_packing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A is expert-major and B rank-major; read contiguously, every expert would come out wrong."""
    experts, rank, m, n = 4, 3, 6, 5
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(experts, rank, n, generator=generator)
    up = torch.randn(experts, m, rank, generator=generator)
    name = "base_model.model.model.layers.0.mlp.experts"
    folders = []
    for index, scale in enumerate((1.0, 2.0)):
        folder = tmp_path / f"in{index}"
        folder.mkdir()
        stored = {
            f"{name}.lora_A.weight": (down * scale).reshape(experts * rank, n),
            f"{name}.lora_B.weight": up.permute(1, 2, 0).reshape(m, rank * experts).contiguous(),
        }
        save_file(stored, folder / "adapter_model.safetensors")
        document = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_parameters": ["mlp.experts.down_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(document))
        folders.append(folder)
    with pytest.raises(InputError, match="cannot be told"):
        operate("merge", "svd", folders, tmp_path / "out", rank=rank)
    operate("merge", "svd", folders, tmp_path / "out", rank=rank, expert_layout="peft")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found_down = written[f"{name}.lora_A.weight"].reshape(experts, rank, n)
    found_up = written[f"{name}.lora_B.weight"].reshape(m, rank, experts).permute(2, 0, 1)
    torch.testing.assert_close(found_up @ found_down, 3 * up @ down, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj"]

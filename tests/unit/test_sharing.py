"""Parts shared between experts: exact cases, optimality, and what must not matter."""

from __future__ import annotations

import pytest
import torch

from moesurg.surgery.errors import UsageError
from moesurg.surgery.linalg.barycentre import barycentre
from moesurg.surgery.linalg.lowrank import truncate
from moesurg.surgery.linalg.sharing import share_base, share_input, share_output
from moesurg.surgery.linalg.whitening import truncate_whitened


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(matrices: list[torch.Tensor], found: object) -> float:
    weights = [found.weight(e) for e in range(len(matrices))]  # type: ignore[attr-defined]
    return float(sum((a - b).square().sum() for a, b in zip(matrices, weights, strict=True)))


def rebuilt(side: str, tensors: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
    """What the stored tensors stand for, by the definition."""
    shared, private = tensors["shared"], tensors["private"]
    group = expert // (len(private) // len(shared))
    return private[expert] @ shared[group] if side == "input" else shared[group] @ private[expert]


@pytest.mark.parametrize("side", ["input", "output"])
def test_experts_with_a_common_space_are_exact_from_its_dimension_on(side: str) -> None:
    def common(seed: int) -> torch.Tensor:
        return normal(5, 12, seed=seed) if side == "input" else normal(12, 5, seed=seed)

    spaces = [common(50), common(51)]
    matrices = []
    for e in range(6):
        space = spaces[e // 3]
        own = normal(8, 5, seed=e) if side == "input" else normal(5, 8, seed=e)
        matrices.append(own @ space if side == "input" else space @ own)
    share = share_input if side == "input" else share_output
    assert distance(matrices, share(matrices, 5, 2)) < 1e-18
    assert distance(matrices, share(matrices, 4, 2)) > 1.0
    found = share(matrices, 4, 2)
    for e in range(6):
        assert torch.allclose(rebuilt(side, found.tensors(), e), found.weight(e), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_the_tail_of_the_stacked_spectrum(rank: int) -> None:
    matrices = [normal(7, 12, seed=e) for e in range(4)]
    tall = torch.linalg.svdvals(torch.cat(matrices))
    assert distance(matrices, share_input(matrices, rank, 1)) == pytest.approx(
        float(tall[rank:].square().sum()), rel=1e-9
    )
    turned = [matrix.T for matrix in matrices]
    assert distance(turned, share_output(turned, rank, 1)) == pytest.approx(
        float(tall[rank:].square().sum()), rel=1e-9
    )


def test_order_inside_a_group_moves_private_parts_only() -> None:
    matrices = [normal(7, 12, seed=e) for e in range(4)]
    order = [2, 0, 1, 3]
    one = share_input(matrices, 6, 1)
    two = share_input([matrices[e] for e in order], 6, 1)
    assert torch.allclose(one.shared[0], two.shared[0], atol=1e-9)
    for slot, e in enumerate(order):
        assert torch.allclose(two.private[slot], one.private[e], atol=1e-9)


def test_groups_of_one_are_separate_truncations() -> None:
    matrices = [normal(7, 12, seed=e) for e in range(3)]
    for found in (share_input(matrices, 4, 3), share_output(matrices, 4, 3)):
        for e, matrix in enumerate(matrices):
            assert torch.allclose(found.weight(e), truncate(matrix, 4).product(), atol=1e-9)
    with pytest.raises(UsageError, match="groups"):
        share_input(matrices, 4, 2)


def test_gram_matrices_decide_what_is_kept() -> None:
    matrices = [normal(7, 12, seed=e) for e in range(4)]
    inputs = normal(40, 12, seed=90) * torch.logspace(0, -2, 12, dtype=torch.float64)
    gram = inputs.T @ inputs
    found = share_input(matrices, 3, 1, gram)
    best = truncate_whitened(torch.cat(matrices), gram, 3).product()
    together = torch.cat([found.weight(e) for e in range(4)])
    assert torch.allclose(together, best, atol=1e-9)
    # For down each expert's own inputs count: outputs side by side are cut at their best.
    turned = [matrix.T.contiguous() for matrix in matrices]
    inner = [normal(30, 7, seed=70 + e) for e in range(4)]
    grams: list[torch.Tensor | None] = [x.T @ x for x in inner]
    out = share_output(turned, 3, 1, grams)
    lost = sum(
        float((x @ (w - out.weight(e)).T).square().sum())
        for e, (x, w) in enumerate(zip(inner, turned, strict=True))
    )
    values = torch.linalg.svdvals(torch.cat([x @ w.T for x, w in zip(inner, turned, strict=True)]))
    assert lost == pytest.approx(float(values[3:].square().sum()), rel=1e-9)
    plain: list[torch.Tensor | None] = [torch.eye(7, dtype=torch.float64)] * 4
    assert torch.allclose(
        share_output(turned, 3, 1, plain).weight(2), share_output(turned, 3, 1).weight(2)
    )


def test_equal_experts_have_no_difference_and_full_rank_has_no_error() -> None:
    same = [normal(6, 9, seed=1)] * 3
    found = share_base(same, same[0], 1)
    assert all(float(delta.product().abs().max()) == 0 for delta in found.deltas)
    matrices = [normal(6, 9, seed=e) for e in range(3)]
    base = sum(matrices[1:], matrices[0]) / 3
    assert distance(matrices, share_base(matrices, base, 6)) < 1e-20
    errors = [distance(matrices, share_base(matrices, base, rank)) for rank in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    inputs = normal(30, 9, seed=33)
    gram = inputs.T @ inputs
    grams: list[torch.Tensor | None] = [gram, None, torch.zeros(9, 9)]
    seen = share_base(matrices, base, 2, grams)
    wanted = [truncate_whitened(matrices[0] - base, gram, 2)] + [
        truncate(matrix - base, 2) for matrix in matrices[1:]
    ]
    for one, other in zip(seen.deltas, wanted, strict=True):
        assert torch.allclose(one.product(), other.product(), atol=1e-10)
    tensors = seen.tensors()
    assert torch.allclose(
        tensors["base"] + tensors["left"][1] @ tensors["right"][1], seen.weight(1), atol=1e-12
    )


def test_experts_that_differ_by_the_order_of_their_neurons_have_one_centre() -> None:
    neurons = normal(10, 9, seed=5)
    orders = [torch.randperm(10, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    found = barycentre([neurons[order] for order in orders])
    assert found.losses[-1] < 1e-20
    for order, mine in zip(orders, found.orders, strict=True):
        assert torch.equal(order[mine], orders[0])


def test_the_centre_never_gets_worse_and_its_orders_are_the_best_for_it() -> None:
    from scipy.optimize import linear_sum_assignment

    experts = [normal(12, 6, seed=s) for s in range(5)]
    found = barycentre(experts)
    assert len(found.losses) > 1
    assert all(b <= a + 1e-9 for a, b in zip(found.losses, found.losses[1:], strict=False))
    assert torch.allclose(
        found.centre_FN,
        torch.stack([x[o] for x, o in zip(experts, found.orders, strict=True)]).mean(0),
    )
    unaligned = torch.stack(experts)
    start = float((unaligned - unaligned.mean(0)).square().sum()) / 5
    assert found.losses[-1] < start
    for expert, order in zip(experts, found.orders, strict=True):
        cost = torch.cdist(found.centre_FN, expert).square()
        rows, columns = linear_sum_assignment(cost)
        assert float(cost[torch.arange(12), order].sum()) == pytest.approx(
            float(cost[rows, columns].sum())
        )

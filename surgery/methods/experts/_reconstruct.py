"""Reconstruction: new down projections for a whole layer, so that it gives the original layer's output again.

Once the experts of a layer are fewer, gate and up projections and the router are fixed, the layer's output is
linear in the down projections of all its experts together. With the original layer's routed output y(x) on sampled
inputs x, the new coefficients g_e(x) (0 where the new router does not select e) and h_e(x) = act(G_e x) * U_e x,

    minimise  sum over x |y(x) - sum_e g_e(x) D_e h_e(x)|²  +  sum_e r_e |D_e - D_e'|²

over all D_e, where D_e' is what the method made and r_e = ridge x mean diagonal of e's own normal equations. Solved
by block Gauss-Seidel: in turn, each expert's D_e exactly, the others held, on the rows that select e, with its
weights in the design matrix (g_e h_e). The objective never grows and starts at the method's own error, so the error
on the sampled inputs never grows either.

MergeMoE (arXiv:2510.14436) solves for one merged expert at a time, against the members' unweighted outputs. Here
the experts of a layer are solved together, against what the layer has to compute, on the tokens the new router sends.
This is our own. The inputs of every layer are those of the original model, or with ``--sequential`` those that the
layers already operated on give, with what the original model computes for the same tokens as the target y.

Memory: the rows and their residual, all experts of the new layer, and one expert's equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .._layers import LayerOptions
from ..base import option
from ._function import hidden

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts
    from ...execute import Work
    from ._function import Activation


@dataclass(frozen=True, kw_only=True)
class SolveOptions(LayerOptions):
    """The options of the solution; a method that always reconstructs inherits these alone."""

    sweeps: int = option(3, "passes over the experts of a layer in a reconstruction")
    weigh: str = option(
        "none",
        "rows of a reconstruction count alike (none), or by the inverse squared norm of the hidden state after the "
        "layer, so that tokens of huge norm do not decide alone (state)",
        choices=("none", "state"),
    )
    ridge: float = option(
        0.1,
        "pull of a reconstruction towards the weights that it starts from, in units of the mean diagonal",
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(SolveOptions):
    """The options of every method that can reconstruct; a method's ``Options`` inherits them."""

    reconstruct: bool = option(
        False, "solve for down projections that give the original layer's output on sampled inputs"
    )


def reconstruct_params(options: SolveOptions) -> dict[str, Any]:
    """What the units need to know; empty without reconstruction.

    Raises:
        UsageError: a number makes no sense.
    """
    if isinstance(options, ReconstructOptions) and not options.reconstruct:
        return {}
    if options.sweeps < 1:
        raise UsageError(f"--sweeps should be at least 1, is {options.sweeps}")
    if not options.ridge > 0:
        raise UsageError(f"--ridge should be more than 0, is {options.ridge:g}")
    solve = {"sweeps": options.sweeps, "ridge": options.ridge}
    return {"reconstruct": solve, "weigh": options.weigh}


def row_weights(work: Work) -> torch.Tensor | None:
    """How much each sampled row of the unit's layer counts, float64 [N] with mean 1; None for all alike."""
    if work.params.get("weigh", "none") == "none":
        return None
    weights_N = 1.0 / work.energies().clamp_min(1e-300)
    return weights_N / weights_N.mean()


def reconstruct_memory(experts: Experts, count: int, sample: int) -> int:
    """Bytes that reconstructing a layer of ``count`` new experts holds at its peak."""
    hidden_size, width = experts.hidden, experts.width
    matrix = hidden_size * width
    # Stored gate and up and merged down at most float32, the solution in float64.
    layer = count * (8 * matrix + 4 * matrix + 8 * matrix)
    # Rows, residual and one expert's target, coefficients; activations, and their float64 copy in the dual.
    rows = sample * (4 * hidden_size + 3 * 8 * hidden_size + 16 * experts.count)
    rows += sample * width * 12 + 8 * min(sample, width) * width
    side = width if sample >= width else sample
    return layer + rows + 3 * 8 * side * side + 4 * 8 * matrix


@dataclass(frozen=True)
class NewExpert:
    """An expert of the new layer: gate and up [F, D] as they will be stored, down [D, F] float32."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def reconstruct(
    rows_ND: torch.Tensor,
    target_ND: torch.Tensor,
    gates_NS: torch.Tensor,
    experts: Sequence[NewExpert],
    act: Activation,
    *,
    sweeps: int,
    ridge: float,
    weights_N: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Down projections of all experts of a layer.

    Args:
        rows_ND: sampled inputs, float32.
        target_ND: what the layer should give, float64.
        gates_NS: the coefficient of every new expert on every row, float64, 0 where it is not selected.
        experts: the new layer.
        act: the gate's activation.
        sweeps: passes over the experts.
        ridge: in units of the mean diagonal of an expert's normal equations.
        weights_N: how much each row's squared error counts; errors are told by the same weights.

    Returns:
        The down projections [D, F] in float64, and ``error_before`` and ``error_after`` (relative, Frobenius,
        on the rows), the error after each sweep, and the experts no row selects, which are left alone.
    """
    from ...linalg.least_squares import fit_change

    if weights_N is not None:
        # The output is linear in the coefficients, so a row's weight goes into them and into its target.
        target_ND, gates_NS = (part * weights_N.sqrt()[:, None] for part in (target_ND, gates_NS))
    solved = [expert.down.double() for expert in experts]
    chosen = [gates_NS[:, slot].nonzero().flatten() for slot in range(len(experts))]
    norm = float(target_ND.norm())

    def design(slot: int) -> torch.Tensor:
        expert, token_M = experts[slot], chosen[slot]
        activation_MF = hidden(rows_ND[token_M], expert.gate, expert.up, act)
        return activation_MF.mul_(gates_NS[token_M, slot, None].float())

    residual_ND = target_ND.clone()
    for slot, token_M in enumerate(chosen):
        if len(token_M):
            residual_ND.index_add_(0, token_M, design(slot).double() @ solved[slot].T, alpha=-1.0)

    def error() -> float:
        return float(residual_ND.norm()) / norm if norm > 0 else 0.0

    errors = [error()]
    for _ in range(sweeps):
        for slot, token_M in enumerate(chosen):
            if not len(token_M):
                continue
            design_MF, merged_DF = design(slot), experts[slot].down.double()
            wide_MF = design_MF.double()
            change_DF = solved[slot] - merged_DF
            # The residual with this expert as the method made it; the change from there is solved for.
            target_MD = residual_ND[token_M] + wide_MF @ change_DF.T
            change_DF = fit_change(design_MF, target_MD, ridge)
            solved[slot] = merged_DF + change_DF
            residual_ND[token_M] = target_MD - wide_MF @ change_DF.T
        errors.append(error())
    metrics: dict[str, object] = {
        "error_before": errors[0],
        "error_after": errors[-1],
        "errors": errors[1:],
        "rows": len(rows_ND),
        "unselected": [slot for slot, token_M in enumerate(chosen) if not len(token_M)],
    }
    return solved, metrics

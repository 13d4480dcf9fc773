"""MergeMoE's combination of a group: gate and up are averaged, the down projection is fitted to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._function import activation, expert_output, gates, hidden, stored

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts
    from ...execute import Work


def fit_down(
    work: Work,
    experts: Experts,
    members: Sequence[int],
    weights: Sequence[float],
    sums: dict[str, torch.Tensor],
) -> dict[str, object]:
    """Replace ``sums["down"]`` by the one with which the merged expert is closest to the members' weighted mean.

    On the sampled inputs that any member is selected for (all inputs if there is none), with P the merged expert's
    hidden activations and Y the weighted mean of the members' outputs: D = Y P⁺, as a ridge on the change from the
    averaged D. Neither the stacked members nor a pseudo-inverse is built.

    Returns:
        Rows used, and the error |D P - Y| / |Y| with the averaged and with the fitted D.
    """
    import torch

    from ...linalg.least_squares import fit_change

    rows_ND, act = work.inputs(), activation(work.model)
    gates_NE = gates(work.model, rows_ND, [work.read(part) for part in experts.routing])
    routed_N = (gates_NE[:, list(members)] > 0).any(dim=1)
    if bool(routed_N.any()):
        rows_ND = rows_ND[routed_N]
    target_ND = torch.zeros(rows_ND.shape, dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        target_ND.add_(expert_output(work, experts, member, rows_ND, act), alpha=weight)
    gate, up = (stored(work.model, experts.region(0, name), sums[name]) for name in ("gate", "up"))
    design_NF = hidden(rows_ND, gate, up, act)
    residual_ND = target_ND - design_NF.double() @ sums["down"].double().T
    change_DF = fit_change(design_NF, residual_ND, work.params["combine_ridge"])
    sums["down"] = sums["down"].double() + change_DF
    norm = max(float(target_ND.norm()), 1e-300)
    before = float(residual_ND.norm()) / norm
    residual_ND -= design_NF.double() @ change_DF.T
    return {
        "rows": len(rows_ND),
        "error_before": before,
        "error_after": float(residual_ND.norm()) / norm,
    }

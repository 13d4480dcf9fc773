"""What a mixture computes on given rows: routing and experts' functions, outside the stock modules.

N counts rows, E experts, D the model width, F an expert's width, K the experts a token selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ...architectures.routing import route
from ...checkpoint.dtypes import torch_dtype
from ...errors import InputError
from .._mixture import mixture

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...checkpoint.region import Region

    Activation = Callable[[torch.Tensor], torch.Tensor]


def require_plain(model: Model) -> None:
    """Refuse families whose mixture is more than what is computed here.

    Raises:
        InputError: the experts have biases, or their inputs are scaled.
    """
    if model.rule.scales_input:
        raise InputError(
            f"{model.folder}: {model.family.model_type} multiplies what its experts are given by their weights, "
            "and this method computes mixtures that weigh what experts give",
            hint="use a method that needs statistics only, without --reconstruct, such as m-smoe, hc-smoe or reap",
        )
    layout = model.layout
    if layout is None or "down_bias" not in layout.names:
        return
    raise InputError(
        f"{model.folder}: experts of {model.family.model_type} have biases, and this method computes experts "
        "without them",
        hint="use a method that needs statistics only, without --reconstruct, such as m-smoe, hc-smoe or reap",
    )


def activation(model: Model) -> Activation:
    """The gate's activation, from the config."""
    name = model.config.get("hidden_act", "activation_function")
    if name in (None, "silu"):
        from torch.nn.functional import silu

        return silu
    from transformers.activations import ACT2FN

    found: Activation = ACT2FN[name]
    return found


def hidden(
    rows_ND: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor, act: Activation
) -> torch.Tensor:
    """act(G x) * U x of every row, [N, F] float32: what the down projection is given."""
    gated_NF = act(rows_ND @ gate_FD.float().T)
    return gated_NF.mul_(rows_ND @ up_FD.float().T)


def stored(model: Model, region: Region, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in the type of a source region, which outputs keep: what a loader of the output will compute with.

    Raises:
        InputError: it is not finite in that type.
    """
    kind = model.dtype(region.tensor)
    cast = matrix.to(torch_dtype(kind))
    if not bool(cast.isfinite().all()):
        raise InputError(
            f"{model.folder}: what is merged from {region.tensor!r} and others is not finite in {kind}",
            hint="the input holds values too large for its type to be averaged",
        )
    return cast


def gates(model: Model, rows_ND: torch.Tensor, routing: Sequence[torch.Tensor]) -> torch.Tensor:
    """The coefficient of every expert on every row, [N, E] float64; 0 where it is not selected.

    Args:
        routing: what decides it, in the order of ``Experts.routing``: the router's rows [E, D] and, where the
            family has them, its bias [E] and what is added for the selection alone [E].
    """
    import torch

    router_ED, *biases = (part.float() for part in routing)
    layout = model.layout
    logits_NE = rows_ND @ router_ED.T
    if layout is not None and layout.router_bias:
        logits_NE += biases.pop(0)
    weights_NK, index_NK = route(logits_NE, model.rule, biases[0] if biases else None)
    dense_NE = torch.zeros(len(rows_ND), len(router_ED), dtype=torch.float64)
    return dense_NE.scatter_(1, index_NK, weights_NK.double())


class Reads(Protocol):
    """What gives a region's values."""

    def read(self, region: Region) -> torch.Tensor: ...


def mixture_output(
    reader: Reads, model: Model, layer: Layer, rows_ND: torch.Tensor
) -> torch.Tensor:
    """What a layer's routed experts give on every row, [N, D] float64; of plain families (:func:`require_plain`)."""
    experts = mixture(layer)
    gates_NE = gates(model, rows_ND, [reader.read(part) for part in experts.routing])
    return routed_output(reader, experts, rows_ND, gates_NE, activation(model))


def routed_output(
    reader: Reads, experts: Experts, rows_ND: torch.Tensor, gates_NE: torch.Tensor, act: Activation
) -> torch.Tensor:
    """The mixture's output on every row, [N, D] float64, one expert in memory at a time."""
    import torch

    mixed_ND = torch.zeros(rows_ND.shape, dtype=torch.float64)
    for expert in range(experts.count):
        token_M = gates_NE[:, expert].nonzero().flatten()
        if len(token_M):
            output_MD = expert_output(reader, experts, expert, rows_ND[token_M], act)
            mixed_ND.index_add_(0, token_M, output_MD * gates_NE[token_M, expert, None])
    return mixed_ND


def expert_output(
    reader: Reads, experts: Experts, expert: int, rows_ND: torch.Tensor, act: Activation
) -> torch.Tensor:
    """One expert's function on every row, [N, D] float64."""
    found = {name: reader.read(region) for name, region in experts.regions(expert).items()}
    hidden_NF = hidden(rows_ND, found["gate"], found["up"], act)
    return hidden_NF.double() @ found["down"].double().T

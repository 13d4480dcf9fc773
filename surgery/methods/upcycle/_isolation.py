"""DeepSeekMoE's fine-grained experts with isolated shared ones, from the neurons of one feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError
from ...plan import Unit
from . import _common as common

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer
    from ...execute import Work


def segment(neurons: int, experts: int, isolated: int) -> int:
    """Neurons of one of the equal segments that a feed-forward is cut into.

    Raises:
        InputError: it cannot be cut evenly.
    """
    parts = experts + isolated
    if neurons % parts:
        raise InputError(
            f"{neurons} neurons cannot be cut into {experts} routed and {isolated} shared segments of one width",
            hint="choose numbers whose sum divides the width",
        )
    return neurons // parts


def unit(mixture: common.Mixture, layer: Layer, experts: Experts) -> Unit:
    """Distributes a layer's neurons."""
    shared = mixture.shared(layer)
    rule = mixture.rule
    # With equal weights every selected expert then counts once, as a part of a sum does.
    routed = (rule.top_k if rule.weights_sum_to_one else experts.count) / rule.scaling
    return Unit(
        f"layer.{layer.index}.segments",
        "transform",
        layer.index,
        reads=tuple(layer.ffn[part] for part in PROJECTIONS),
        writes=(
            *shared.values(),
            *(
                experts.region(expert, part)
                for expert in range(experts.count)
                for part in PROJECTIONS
            ),
        ),
        params={
            "part": "segments",
            "experts": experts.count,
            "shared": shared["gate"].shape[0],
            "switch": "switch" in shared,
            "routed": routed,
        },
        memory=20 * sum(region.count for region in layer.ffn.values()),
    )


def distribute(work: Work) -> dict[str, object]:
    """Run a unit of `unit`."""
    import torch

    gate, up, down = (work.read(region) for region in work.unit.reads)
    strengths = (
        torch.linalg.vector_norm(gate.double(), dim=1)
        * torch.linalg.vector_norm(up.double(), dim=1)
        * torch.linalg.vector_norm(down.double(), dim=0)
    )
    neurons, width = len(strengths), work.params["shared"]
    order = sorted(range(neurons), key=lambda neuron: (-float(strengths[neuron]), neuron))
    shared, rest = sorted(order[:width]), sorted(order[width:])
    drawn = work.rng("segments", work.layer).permutation(len(rest))
    count = work.params["experts"]
    size = len(rest) // count
    writes = list(work.unit.writes)
    factor = 2.0 if work.params["switch"] else 1.0
    sets = [(shared, factor)]
    for expert in range(count):
        own = sorted(rest[place] for place in drawn[expert * size : (expert + 1) * size])
        sets.append((own, work.params["routed"]))
    for number, (chosen, scale) in enumerate(sets):
        for region, tensor in zip(
            writes[:3], (gate[chosen], up[chosen], down[:, chosen] * scale), strict=True
        ):
            work.write(region, tensor)
        del writes[:3]
        if number == 0 and work.params["switch"]:
            switch = writes.pop(0)
            work.write(switch, torch.zeros(switch.shape))
    return {"shared_strength": float(strengths[shared].sum() / strengths.sum())}

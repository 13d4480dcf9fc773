"""Put adapters into their base: a plain model that computes what base and adapters together compute.

    W' = W + sum_i w_i B_i A_i

with every adapter's own scale by module. Sums are taken in float32 or wider and rounded once to the stored type,
which is what is lost: the report has the relative rounding error of each matrix. Linear layers and the stacked
experts of mixtures can be changed; layers of other kinds are refused. A bias of B is added to the layer's bias, and
refused where it has none. What an adapter saves in full (``modules_to_save``) takes the place of the base's tensor,
cast to its type; two adapters that replace the same are refused, and so is a head of its own where the base's is tied
to the embedding. The base is the first source, the adapters follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.output import check_agreement, layout_of, placed
from ...adapters.packing import LAYOUTS
from ...adapters.targets import Target, targets
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit, copy_unit
from ..adapters import _merge as common
from ..base import Draft, Exactness, MethodInfo, option
from ..models._merge import blocks_of

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter, Module
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="put adapters into their base, which becomes a plain model",
    paper="arXiv:2106.09685",
    inputs="a base model, then one or more adapters of it",
    data="none",
    takes="model and adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    weights: str | None = option(
        None, "comma-separated weight of each adapter; by default 1 each", metavar="W,W,..."
    )
    expert_layout: str | None = option(
        None, "how stacked experts' second factors are stored", choices=LAYOUTS
    )


def plan(sources: Sequence[Any], options: Options) -> Draft:
    """The base with a unit for every layer that changes.

    Raises:
        InputError: an adapter that does not belong to the base.
    """
    base: Model = sources[0]
    adapters: list[Adapter] = list(sources[1:])
    check_agreement(adapters)
    weights = common.parse_weights(options.weights, len(adapters))
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    known = {target.name: target for target in targets(base)}
    experts = {name: target for name, target in known.items() if target.kind == "experts"}
    units, changed = [], set()
    names = sorted({name for adapter in adapters for name in adapter.modules})
    for name in names:
        held = [(i, a.modules[name]) for i, a in enumerate(adapters, start=1) if name in a.modules]
        target = known.get(name)
        if target is not None and target.kind == "experts":
            target = _of_one_parameter(target, adapters[held[0][0] - 1], experts)
        _check(base, adapters, name, held, target)
        if target is None:
            continue
        biases = [module.bias for _, module in held if module.bias is not None]
        writes = list(target.regions)
        if biases:
            writes.append(_bias(base, name))
        changed |= {region.tensor for region in writes}
        reads = [*writes]
        for index, module in held:
            parts = [module.down, module.up, *([module.bias] if module.bias else [])]
            reads += [placed(part, index) for part in parts]
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(reads),
                writes=tuple(writes),
                params={
                    "module": name,
                    "weights": weights,
                    "layouts": layouts,
                    "matrices": len(target.rows[0]),
                    "bias": bool(biases),
                },
                memory=40 * target.inputs * target.outputs
                + 16 * sum(module.down.count + module.up.count for _, module in held),
            )
        )
    replaced = _replaced(base, adapters)
    for tensor, (source, region, others) in replaced.items():
        whole = base.whole(tensor)
        units.append(
            Unit(
                f"saved.{tensor}",
                "transform",
                reads=tuple(placed(part, source) for part in (region, *others)),
                writes=blocks_of(whole),
                params={"saved": tensor},
                memory=32 * max(block.count for block in blocks_of(whole)) + (1 << 20),
            )
        )
        changed.add(tensor)
    moves, tensors = [], []
    for tensor in base.names():
        whole = base.whole(tensor)
        tensors.append(TensorSpec(tensor, base.dtype(tensor), whole.shape))
        if tensor not in changed:
            moves.append((whole, [whole]))
        elif tensor not in replaced and (covered := _uncovered(whole, units)):
            raise InputError(
                f"{base.folder}: the adapters change a part of {tensor!r} only ({covered} elements are not theirs)",
                hint="target both projections that share the tensor",
            )
    units.append(copy_unit("unchanged", moves))
    exactness = Exactness("approximate", "the base with the adapters' changes added")
    return Draft(dict(base.config.raw), tensors, units, exactness)


def transform(work: Work) -> dict[str, object]:
    """Add all adapters' changes to one layer."""
    import torch

    from ...adapters.output import read_factors

    params = work.params
    if "saved" in params:
        return _replace(work)
    name = params["module"]
    adapters = work.sources[1:]
    held: list[Any] = [(i, a) for i, a in enumerate(adapters) if name in a.modules]  # type: ignore[attr-defined]
    factors = []
    for index, adapter in held:
        down, up = read_factors(
            work, adapter.modules[name], source=index + 1, layout=params["layouts"][index]
        )
        factors.append((down, up * params["weights"][index]))
    writes = list(work.unit.writes)
    bias_region = writes.pop() if params["bias"] else None
    added = before = 0.0
    for start in range(0, len(writes), params["matrices"]):
        regions = writes[start : start + params["matrices"]]
        expert = start // params["matrices"]
        change = sum(up[expert] @ down[expert] for down, up in factors)
        rows = 0
        for region in regions:
            weight = work.read(region).double()
            part = torch.as_tensor(change)[rows : rows + region.shape[0]]
            rows += region.shape[0]
            added += float(part.square().sum())
            before += float(weight.square().sum())
            work.write(region, weight + part)
    if bias_region is not None:
        total = work.read(bias_region).double()
        for index, adapter in held:
            module = adapter.modules[name]
            if module.bias is not None:
                bias = work.read(placed(module.bias, index + 1)).double()
                total = total + bias * (module.scale * params["weights"][index])
        work.write(bias_region, total)
    return {"change": (added / before) ** 0.5 if before else 0.0}


def _check(
    base: Model,
    adapters: Sequence[Adapter],
    name: str,
    held: Sequence[tuple[int, Module]],
    target: Target | None,
) -> None:
    """Refuse what does not fit the base."""
    where = adapters[held[0][0] - 1].folder
    if target is None:
        raise InputError(
            f"{where}: module {name} is no linear layer of the decoder blocks of {base.folder}",
            hint="only linear layers and stacked experts can be applied",
        )
    for index, module in held:
        shape = (module.experts, module.outputs, module.inputs)
        wanted = (len(target.rows), target.outputs, target.inputs)
        if shape != wanted or module.kind != target.kind:
            raise InputError(
                f"{adapters[index - 1].folder}: module {name} is {module.kind} of {list(shape)} (experts, out, in), "
                f"the base has {target.kind} of {list(wanted)}",
                hint="check that the adapter was trained on this base",
            )
        if module.bias is not None and _bias(base, name).tensor not in base.checkpoint.tensors:
            raise InputError(
                f"{adapters[index - 1].folder}: module {name} adds a bias, and the base's layer has none"
            )


def _replaced(
    base: Model, adapters: Sequence[Adapter]
) -> dict[str, tuple[int, Region, list[Region]]]:
    """Tensors of the base that adapters replace: the source, its tensor, and others that have to be equal to it.

    Raises:
        InputError: no tensor of the base, another shape, two adapters that replace one, or a tied head alone.
    """
    embedding, head = base.family.embedding, base.family.head
    stored = set(base.names())
    found: dict[str, tuple[int, Region, list[Region]]] = {}
    for source, adapter in enumerate(adapters, start=1):
        full = dict(adapter.full)
        equal: list[Region] = []
        if base.config.tied and head in full:
            if embedding not in full:
                raise InputError(
                    f"{adapter.folder}: replaces the head, which {base.folder} ties to the embedding",
                    hint="untie the base first, or load the adapter with PEFT",
                )
            equal.append(full.pop(head))
        for name, region in full.items():
            if name not in stored or base.whole(name).shape != region.shape:
                raise InputError(
                    f"{adapter.folder}: holds {name} of {list(region.shape)} in full, which is no tensor of "
                    f"{base.folder}"
                )
            if name in found:
                raise InputError(f"{adapter.folder}: replaces {name}, and so does another adapter")
            found[name] = (source, region, equal if name == embedding else [])
            if base.config.tied and name == embedding and head in stored:
                found[head] = (source, region, [])
    return found


def _replace(work: Work) -> dict[str, object]:
    """Put an adapter's tensor in the place of the base's."""
    import torch

    first, *others = work.unit.reads
    for block in work.unit.writes:
        mine, *same = (
            work.read(dataclasses.replace(block, tensor=part.tensor, source=part.source))
            for part in (first, *others)
        )
        if not all(torch.equal(mine, other) for other in same):
            raise InputError(
                f"{work.sources[first.source].folder}: head and embedding differ, which the base ties to each other",
                hint="untie the base first, or load the adapter with PEFT",
            )
        work.write(block, mine)
    return {}


def _of_one_parameter(target: Target, adapter: Adapter, experts: dict[str, Target]) -> Target:
    """With a single targeted parameter PEFT nests nothing, so the module's own name can mean either."""
    found = [p.rpartition(".")[2] for p in adapter.config.parameters]
    if set(found) == {"gate_up_proj"}:
        return dataclasses.replace(experts[f"{target.name}.base_layer"], name=target.name)
    return target


def _bias(base: Model, name: str) -> Region:
    info = base.checkpoint.tensors.get(f"{name}.bias")
    return Region(f"{name}.bias", info.shape if info else (0,))


def _uncovered(whole: Region, units: Sequence[Unit]) -> int:
    """Elements of a stored tensor that no unit writes, of one that some unit writes in part."""
    written = sum(
        region.count for unit in units for region in unit.writes if region.tensor == whole.tensor
    )
    return whole.count - written

"""Several adapters in one pack of basis and coefficients, from which each can be taken out again.

Reversible Model Merging (arXiv:2510.14163). At every position of a module, a column of A or a row of B, the
adapters hold one r-vector each, x_1 ... x_T. With their mean b and the leading ``--basis`` principal directions U
of x_i - b,

    z_i = U^T (x_i - b),    x_i ~ b + U z_i

``moesurg revert PACK --task NAME`` writes that back as an adapter. With T - 1 directions nothing is lost but the
rounding of the stored type. ``--form global`` has one set of directions and coefficients for all positions of a
module: T (p + 1) times smaller coefficients, better near losslessness, worse far from it.

Size. A position costs (p (r + T) + r) / (r T) of its inputs, which is more than 1 from p = r (T - 1) / (r + T) on.
A pack that is not smaller than its inputs is refused unless ``--allow-larger`` is given. The report has, for every
module, the error of the changes of the weights against the size for each number of directions (``curve``) and,
beside it, that of cutting every adapter's rank (``truncation``).

Deviations. Factors are read with their scales folded in, so that adapters of different alpha fit together. Rank j
of one adapter need not mean what rank j of another does: each is first turned to the first adapter that has the
module by the orthogonal Procrustes rotation, which leaves its product as it is (``--align none``: the paper). So
factors come back rotated, products do not. Ranks that differ are refused, or with ``--pad`` sorted by singular
values and filled up with zeros, and cut again when taken out. Biases and modules saved in full are refused. The
published text was not available in full; the equations above are what its storage formula implies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.output import Written, aligned, check_agreement, config, layout_of, widest
from ...adapters.packing import LAYOUTS
from ...checkpoint.dtypes import nbytes
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, RefusedError, UsageError
from ...packs import SCHEMA_VERSION, task_names
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option, required
from . import _unit as unit

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter, Module
    from ...execute import Work
    from ...linalg.factors import Factors

INFO = MethodInfo(
    summary="a basis and coefficients, from which each adapter can be taken out again",
    paper="arXiv:2510.14163",
    inputs="two or more LoRA adapters of one base",
    data="none",
    tier="pack",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    basis: int = required("directions that are kept; one less than adapters loses nothing")
    form: str = option(
        "position",
        "whether directions are of every position or of all",
        choices=("position", "global"),
    )
    align: str = option(
        "procrustes", "how ranks of different adapters are matched", choices=("procrustes", "none")
    )
    pad: bool = option(False, "whether adapters of different ranks are filled up with zeros")
    allow_larger: bool = option(False, "whether a pack may be larger than its inputs")
    expert_layout: str | None = option(
        None,
        "how stacked experts' second factors are stored; needed where it cannot be told",
        choices=LAYOUTS,
    )


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """A mean, a basis and coefficients for every module.

    Raises:
        InputError: adapters that do not belong together, or hold what no basis can.
        UsageError: a number of directions that they do not span.
        RefusedError: a pack that would not be smaller.
    """
    if len(adapters) < 2:
        raise InputError("a basis is of two or more adapters, 1 was given")
    check_agreement(adapters)
    most = len(adapters) - 1
    if not 0 <= options.basis <= most:
        raise UsageError(
            f"--basis {options.basis} should be 0 to {most}: {len(adapters)} adapters differ from their mean in "
            f"{most} directions at most"
        )
    for adapter in adapters:
        _plain(adapter)
    names = task_names([adapter.folder for adapter in adapters])
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    parts: dict[str, Any] = {}
    given = 0
    for name, row in aligned(adapters).items():
        held = [(index, module) for index, module in enumerate(row) if module is not None]
        part = _part(adapters, name, held, options)
        parts[name] = part
        made = _tensors(name, part)
        specs.extend(made)
        reads = tuple(
            dataclasses.replace(region, source=index)
            for index, module in held
            for region in (module.down, module.up)
        )
        given += sum(
            nbytes(adapters[region.source].checkpoint.tensors[region.tensor].dtype, region.shape)
            for region in reads
        )
        units.append(
            Unit(
                name,
                "transform",
                reads=reads,
                writes=tuple(Region(spec.name, spec.shape) for spec in made),
                params={
                    "module": name,
                    "part": part,
                    "align": options.align,
                    "layouts": layouts,
                    "weights": [1.0] * len(adapters),
                },
                memory=8 * 8 * sum(region.count for region in reads),
            )
        )
    ratio = sum(spec.nbytes for spec in specs) / given
    if ratio >= 1 and not options.allow_larger:
        raise RefusedError(
            f"the pack would hold {ratio:.2f} times the bytes of the factors it is made of",
            hint="fewer directions, --form global, or --allow-larger",
        )
    tasks = [
        {
            "name": name,
            "config": _config(adapter),
            "original": dict(adapter.config.raw),
            "ranks": {module.name: module.rank for module in adapter.modules.values()},
        }
        for name, adapter in zip(names, adapters, strict=True)
    ]
    lossless = options.basis == most
    return Draft(
        {"schema_version": SCHEMA_VERSION, "kind": "rmm", "tasks": tasks, "parts": parts},
        specs,
        units,
        Exactness(
            "approximate",
            "every adapter can be rebuilt up to rounding"
            if lossless
            else f"adapters are rebuilt from {options.basis} directions",
        ),
        tier="pack",
        notes=[
            f"the pack holds {ratio:.3f} times the bytes of the factors it is made of",
            f"tasks: {', '.join(names)}",
        ],
        format="pack",
    )


def transform(work: Work) -> dict[str, object]:
    """Fit one module."""
    import torch

    from ...linalg import factors as products
    from ...linalg import reversible

    part, name = work.params["part"], work.params["module"]
    loaded = unit.load(work)
    before = loaded.factors
    after = [_prepared(found, part["rank"]) for found in before]
    if work.params["align"] == "procrustes":
        after = [after[0], *(reversible.aligned(found, after[0]) for found in after[1:])]
    positions = torch.stack([reversible.to_positions(found) for found in after], dim=-1)
    shared = part["form"] == "global"
    # All directions, for the curve; what is stored is the leading part of them.
    full = reversible.fit(positions, positions.shape[-1], shared=shared)
    shape = (part["experts"], part["inputs"], part["outputs"])

    def errors(directions: int) -> list[float]:
        return [
            products.relative_error(
                reversible.to_factors(full.rebuild(task, directions), *shape), target
            )
            for task, target in enumerate(before)
        ]

    kept = part["basis"]
    stored = {"mean": full.mean_PR}
    if kept:
        stored["basis"] = full.basis_PRK[..., :kept]
        stored["coefficients"] = full.coefficients[..., :kept, :]
    for region in work.unit.writes:
        work.write(region, stored[region.tensor.removeprefix(f"{name}.")].contiguous())
    found = errors(kept)
    inputs = sum(down.numel() + up.numel() for down, up in before)
    curve = [
        [p, _size(part, p) / inputs, reversible.root_mean_square(errors(p))]
        for p in range(full.basis_PRK.shape[-1] + 1)
    ]
    return {
        "error": max(found),
        "curve": curve,
        "truncation": _truncation(before),
    }


def _prepared(found: Factors, rank: int) -> Factors:
    """Factors of the pack's rank; sorted by singular values where they have to be filled up."""
    from ...linalg import factors as products
    from ...linalg import reversible

    if found[0].shape[1] == rank:
        return found
    return reversible.padded(products.truncated(found, found[0].shape[1]), rank)


def _truncation(all_of_them: Sequence[Factors]) -> list[list[float]]:
    """The competitor: rank kept, its share of the size, and the error when every adapter is cut to it."""
    import torch

    from ...linalg import factors as products
    from ...linalg.reversible import root_mean_square

    squares: list[torch.Tensor] = [
        torch.linalg.svdvals(products.core(found)).square().sum(dim=0) for found in all_of_them
    ]
    most = max(len(values) for values in squares)
    marks = sorted({max(1, round(most * share / 8)) for share in range(1, 9)})
    return [
        [
            rank,
            rank / most,
            root_mean_square(
                [
                    float((values[rank:].sum() / values.sum().clamp_min(1e-300)).sqrt())
                    for values in squares
                ]
            ),
        ]
        for rank in marks
    ]


def _part(
    adapters: Sequence[Adapter], name: str, held: Sequence[tuple[int, Module]], options: Options
) -> dict[str, Any]:
    """What the pack has to know of a module."""
    ranks = {module.rank for _, module in held}
    if len(ranks) > 1 and not options.pad:
        raise InputError(
            f"module {name} has the ranks {', '.join(map(str, sorted(ranks)))} in different adapters",
            hint="--pad fills the smaller ones up",
        )
    first = held[0][1]
    types = [
        adapters[index].checkpoint.tensors[region.tensor].dtype
        for index, module in held
        for region in (module.down, module.up)
    ]
    rank, tasks = max(ranks), len(held)
    limit = tasks - 1 if options.form == "global" else min(tasks - 1, rank)
    return {
        "kind": first.kind,
        "experts": first.experts,
        "inputs": first.inputs,
        "outputs": first.outputs,
        "down": [first.down.tensor, list(first.down.shape[1:])],
        "up": [first.up.tensor, list(first.up.shape[2:])],
        "rank": rank,
        "basis": min(options.basis, limit),
        "form": options.form,
        "dtype": widest(types),
        "tasks": [index for index, _ in held],
    }


def _shapes(part: dict[str, Any], directions: int) -> dict[str, tuple[int, ...]]:
    places = part["experts"] * (part["inputs"] + part["outputs"])
    found: dict[str, tuple[int, ...]] = {"mean": (places, part["rank"])}
    if directions:
        tasks = len(part["tasks"])
        found["basis"] = (places, part["rank"], directions)
        shared = part["form"] == "global"
        found["coefficients"] = (directions, tasks) if shared else (places, directions, tasks)
    return found


def _tensors(name: str, part: dict[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec(f"{name}.{key}", part["dtype"], shape)
        for key, shape in _shapes(part, part["basis"]).items()
    ]


def _size(part: dict[str, Any], directions: int) -> int:
    return sum(Region("", shape).count for shape in _shapes(part, directions).values())


def _config(adapter: Adapter) -> dict[str, object]:
    """The config of the adapter as it will be taken out: scales are in the factors."""
    return config(
        [adapter], [Written(module, module.rank, "") for module in adapter.modules.values()]
    )


def _plain(adapter: Adapter) -> None:
    """Refuse what is not made of two factors."""
    biased = next((m.name for m in adapter.modules.values() if m.bias is not None), None)
    if biased is not None:
        raise InputError(
            f"{adapter.folder}: module {biased} has lora_B.bias, which a basis cannot hold"
        )
    if adapter.full:
        raise InputError(
            f"{adapter.folder}: holds {', '.join(sorted(adapter.full))} in full, which a basis cannot hold",
            hint="take modules_to_save out of the adapter",
        )

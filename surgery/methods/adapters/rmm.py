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
values and filled up with zeros, and cut again when taken out. ``--exact-factors`` stores the pack in float32 and with
it each adapter's rotation: from a full basis adapters come back as they were, under their own config and in their own
type, with what differs far below the rounding of half precision; ranks are then filled up without being sorted.
Biases and modules saved in full are refused. The published text was not available in full; the equations above are
what its storage formula implies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.output import aligned, check_agreement, layout_of
from ...adapters.packing import LAYOUTS
from ...checkpoint.dtypes import nbytes
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, RefusedError, UsageError
from ...packs import SCHEMA_VERSION, task_names
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option, required
from . import _rmm as parts
from . import _unit as unit

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter
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
    exact_factors: bool = option(
        False, "whether float32 and rotations are stored, so that factors come back as they were"
    )
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
        parts.check_plain(adapter)
    for adapter in adapters if options.exact_factors else ():
        silent = next((m.name for m in adapter.modules.values() if not m.scale), None)
        if silent is not None:
            raise InputError(
                f"{adapter.folder}: module {silent} has the scale 0, from which no factor can come back",
                hint="leave out --exact-factors",
            )
    names = task_names([adapter.folder for adapter in adapters])
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    found: dict[str, Any] = {}
    given = 0
    for name, row in aligned(adapters).items():
        held = [(index, module) for index, module in enumerate(row) if module is not None]
        part = parts.part(adapters, name, held, options)
        found[name] = part
        made = parts.tensors(name, part)
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
            "config": dict(adapter.config.raw)
            if options.exact_factors
            else parts.folded_config(adapter),
            "original": dict(adapter.config.raw),
            "ranks": {module.name: module.rank for module in adapter.modules.values()},
        }
        for name, adapter in zip(names, adapters, strict=True)
    ]
    lossless = options.basis == most
    return Draft(
        {"schema_version": SCHEMA_VERSION, "kind": "rmm", "tasks": tasks, "parts": found},
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
    after = [_prepared(found, part["rank"], exact="types" in part) for found in before]
    turns = [torch.eye(part["rank"], dtype=torch.float64).expand(part["experts"], -1, -1)]
    turns *= len(after)
    if work.params["align"] == "procrustes":
        turns[1:] = [reversible.turn(found, after[0]) for found in after[1:]]
        after = [reversible.turned(*pair) for pair in zip(after, turns, strict=True)]
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
    if "types" in part:
        stored["turns"] = torch.stack(turns)
    for region in work.unit.writes:
        work.write(region, stored[region.tensor.removeprefix(f"{name}.")].contiguous())
    found = errors(kept)
    inputs = sum(down.numel() + up.numel() for down, up in before)
    curve = [
        [p, parts.size(part, p) / inputs, reversible.root_mean_square(errors(p))]
        for p in range(full.basis_PRK.shape[-1] + 1)
    ]
    return {
        "error": max(found),
        "curve": curve,
        "truncation": _truncation(before),
    }


def _prepared(found: Factors, rank: int, *, exact: bool) -> Factors:
    """Factors of the pack's rank; where they have to be filled up, sorted by singular values unless they must stay."""
    from ...linalg import factors as products
    from ...linalg import reversible

    if found[0].shape[1] == rank:
        return found
    found = found if exact else products.truncated(found, found[0].shape[1])
    return reversible.padded(found, rank)


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

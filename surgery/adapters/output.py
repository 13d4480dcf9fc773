"""The adapter that a method writes: tensors and a config that loads with no missing and no unexpected key.

Scales are folded into the factors, so that the written adapter's own scale is 1: alpha equals the rank of every module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..checkpoint.layout import TensorSpec
from ..checkpoint.region import Region
from ..errors import InputError
from .adapter import PREFIX, Adapter, Module

if TYPE_CHECKING:
    import torch

    from ..execute import Work

WIDTHS = ("F16", "BF16", "F32", "F64")
"""Floating types, the widest last; BF16 and F16 together need F32."""


class Reads(Protocol):
    """What factors are read through: a unit's work, or the weights of a run's sources."""

    def read(self, region: Region) -> torch.Tensor:
        """A region as float32, or float64 where it is stored so."""


@dataclass(frozen=True)
class Written:
    """One module of the output.

    Attributes:
        module: name, kind and shapes of it in a source.
        rank: of the output.
        dtype: stored type of both factors.
        bias: whether B has a bias.
    """

    module: Module
    rank: int
    dtype: str
    bias: bool = False

    @property
    def down(self) -> Region:
        """A."""
        return Region(
            self.module.down.tensor,
            (self.module.experts * self.rank, *self.module.down.shape[1:]),
        )

    @property
    def up(self) -> Region:
        """B."""
        rest = self.module.up.shape[2:]
        return Region(
            self.module.up.tensor,
            (self.module.outputs, self.rank * self.module.experts, *rest),
        )

    @property
    def bias_region(self) -> Region:
        return Region(f"{PREFIX}{self.module.name}.lora_B.bias", (self.module.outputs,))

    @property
    def regions(self) -> tuple[Region, ...]:
        """Everything of the module: A, B and, where it has one, the bias."""
        both = (self.down, self.up)
        return (*both, self.bias_region) if self.bias else both

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(region.tensor, self.dtype, region.shape) for region in self.regions]


def widest(dtypes: Sequence[str]) -> str:
    """The type that holds values of all of these.

    Raises:
        InputError: one of them is no common floating type.
    """
    for dtype in dtypes:
        if dtype not in WIDTHS:
            raise InputError(
                f"factors stored as {dtype} cannot be merged, only {', '.join(WIDTHS)}"
            )
    found = max(dtypes, key=WIDTHS.index)
    return "F32" if found == "BF16" and "F16" in dtypes else found


def config(
    adapters: Sequence[Adapter], written: Sequence[Written], full: Sequence[str] = ()
) -> dict[str, object]:
    """A minimal PEFT config of the output.

    Args:
        adapters: the sources, whose base, task and orientation agree.
        written: the modules.
        full: names below PREFIX of tensors that are saved in full.
    """
    first = adapters[0].config
    announced = {key for adapter in adapters for key in adapter.config.saved}
    modules = {name.rpartition(".")[0] for name in full}
    saved = sorted(
        key for key in announced if any(f".{module}".endswith(f".{key}") for module in modules)
    )
    return config_of(
        written,
        base=first.base,
        task=first.raw.get("task_type"),
        revision=first.raw.get("revision"),
        transposed=first.transposed,
        parameters=first.parameters,
        saved=saved,
    )


def config_of(
    written: Sequence[Written],
    *,
    base: str | None,
    task: object = None,
    revision: object = None,
    transposed: bool = False,
    parameters: Sequence[str] = (),
    saved: Sequence[str] = (),
) -> dict[str, object]:
    """A minimal PEFT config from facts; see `config`.

    Args:
        base, task, revision: what the adapter belongs to.
        transposed: whether the base stores its weights [in, out].
        parameters: targeted parameters, of stacked experts.
        saved: modules that are saved in full.
    """
    ranks = Counter(entry.rank for entry in written)
    rank = max(ranks, key=lambda found: (ranks[found], found)) if ranks else 1
    # Keys are regular expressions that have to match this module alone, however the base's classes are nested.
    pattern = {
        entry.module.name.replace(".", r"\."): entry.rank for entry in written if entry.rank != rank
    }
    stacked = any(entry.module.kind == "experts" for entry in written)
    plain = sorted(entry.module.name for entry in written if entry.module.kind != "experts")
    found: dict[str, object] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": task,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_bias": any(entry.bias for entry in written),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": plain,
        "modules_to_save": list(saved) or None,
    }
    if stacked:
        found["target_parameters"] = list(parameters)
    return found


def read_factors(
    work: Reads, module: Module, *, source: int, layout: str = "peft", balanced: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with the scale folded in: B A is the change of the weight.

    Args:
        source: which of the run's sources holds the module.
        layout: of stacked experts' second factor.
        balanced: whether both factors take a share of the scale; else B takes it all, so that A stays as stored, and
            so does B but for its exponents where the scale is a power of two.

    Returns:
        A [E, r, n] and B [E, m, r], float64; balanced, each times the square root of |scale|, and A carries its sign.
    """
    from . import packing

    down, up = (work.read(placed(region, source)).double() for region in (module.down, module.up))
    down_ERN = packing.unpack_down(down, module.experts)
    up_EMR = packing.unpack_up(up, module.experts, layout)
    if not balanced:
        return down_ERN, up_EMR * module.scale
    root = math.sqrt(abs(module.scale))
    return down_ERN * math.copysign(root, module.scale), up_EMR * root


def write_factors(
    work: Work, written: Written, down_ERN: torch.Tensor, up_EMR: torch.Tensor
) -> None:
    """Write folded factors [E, r, n] and [E, m, r] of the planned rank."""
    from . import packing

    work.write(written.down, packing.pack_down(down_ERN, written.down.shape))
    work.write(written.up, packing.pack_up(up_EMR, written.up.shape))


def placed(region: Region, source: int) -> Region:
    """The region in one of several sources."""
    return Region(region.tensor, region.shape, region.offset, region.strides, source)


def layout_of(adapter: Adapter, chosen: str | None) -> str:
    """The layout of an adapter's stacked experts, which only the user can tell where rank and count differ.

    Raises:
        InputError: it cannot be told and the user does not.
    """
    for module in adapter.modules.values():
        if chosen is None and module.experts > 1 and module.rank > 1:
            raise InputError(
                f"{adapter.folder}: module {module.name} stacks {module.experts} experts of rank {module.rank}, and "
                "the order in its second factor cannot be told from the file",
                hint="--expert-layout peft for adapters that PEFT wrote, unsloth for Unsloth's",
            )
    return chosen or "peft"


def stored_types(adapters: Sequence[Adapter], row: Sequence[Module | None]) -> list[str]:
    """Stored types of both factors of everything that adapters hold of a module."""
    return [
        adapters[index].checkpoint.tensors[region.tensor].dtype
        for index, module in enumerate(row)
        if module is not None
        for region in (module.down, module.up)
    ]


def check_agreement(adapters: Sequence[Adapter]) -> None:
    """Adapters that are combined belong to one base.

    Raises:
        InputError: two of them name different bases, tasks, orientations or parameters.
    """
    first = adapters[0]
    for key in (
        "base_model_name_or_path",
        "revision",
        "task_type",
        "fan_in_fan_out",
        "target_parameters",
    ):
        mine = first.config.raw.get(key)
        for other in adapters[1:]:
            found = other.config.raw.get(key)
            if (found or None) != (mine or None):
                raise InputError(
                    f"{other.folder}: {key} is {found!r}, that of {first.folder} is {mine!r}",
                    hint="adapters that are merged have to belong to one base model and task",
                )


def aligned(adapters: Sequence[Adapter]) -> Mapping[str, list[Module | None]]:
    """Every module of any adapter with what each adapter has of it, sorted by name.

    Raises:
        InputError: two adapters hold different shapes for one module.
    """
    names = sorted({name for adapter in adapters for name in adapter.modules})
    found: dict[str, list[Module | None]] = {}
    for name in names:
        row = [adapter.modules.get(name) for adapter in adapters]
        shapes = {
            module.shape: adapter for module, adapter in zip(row, adapters, strict=True) if module
        }
        if len(shapes) > 1:
            (mine, first), (other, second) = list(shapes.items())[:2]
            raise InputError(
                f"{second.folder}: module {name} is {other}, in {first.folder} it is {mine}",
                hint="adapters that are merged have to belong to one base model",
            )
        found[name] = row
    return found

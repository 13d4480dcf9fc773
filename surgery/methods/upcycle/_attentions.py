"""Attentions of several models side by side: which tensors grow, and how their parts are placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit, copy_unit
from . import _branches as branches
from . import _common as common

if TYPE_CHECKING:
    import torch

    from ...architectures.base import Shape
    from ...architectures.model import Layer, Model
    from ...execute import Work

OUTPUT = "self_attn.o_proj.weight"
BIAS = "self_attn.o_proj.bias"
QUERY = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")
KEY_VALUE = tuple(f"self_attn.{side}_proj.{kind}" for side in "kv" for kind in ("weight", "bias"))
NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
OTHER_NORMS = ("self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight")


@dataclass(frozen=True)
class Attentions:
    """How the attentions of N models become one.

    Attributes:
        model, count: the first model, and N.
        share_kv: one key and value projection, the mean; query heads then lie model by model below each key-value head.
        gates: constant ones, folded into the output projection; None for a router's.
    """

    model: Model
    count: int
    share_kv: bool
    gates: Sequence[float] | None

    @property
    def blocks(self) -> int:
        """Runs of columns of the output projection, each of all models in order."""
        return self.model.config.kv_heads if self.share_kv else 1

    @property
    def norms(self) -> list[str]:
        """Head norms that every expert has its own of."""
        names = {name.removeprefix(self.model.layers[0].prefix) for name in self._names()}
        wanted = NORMS[:1] if self.share_kv else NORMS
        return [name for name in wanted if name in names]

    def config(self) -> dict[str, object]:
        """Changes of the config: the effective numbers of heads."""
        config = self.model.config
        return {
            "num_attention_heads": self.count * config.heads,
            "num_key_value_heads": config.kv_heads * (1 if self.share_kv else self.count),
            "head_dim": config.head_dim,
        }

    def check(self) -> None:
        """Refuse norms on query and key that cannot be one for each model.

        Raises:
            InputError: naming them.
        """
        model, size = self.model, self.model.config.head_dim
        shapes = {
            name.removeprefix(model.layers[0].prefix): model.checkpoint.tensors[name].shape
            for name in self._names()
        }
        found = [name for name in (*NORMS, *OTHER_NORMS) if name in shapes]
        if not found:
            return
        if self.gates is not None:
            raise InputError(
                f"{model.folder}: {model.family.model_type} has norms on query and key, one for all heads, and each "
                "model's heads would need their own",
                hint="leave out --fold-gates, or average the attentions with --method btx",
            )
        if set(found) - set(NORMS) or any(shapes[name] != (size,) for name in found):
            raise InputError(
                f"{model.folder}: {model.family.model_type} norms query and key in a way that attention experts do not "
                "have",
                hint="--method btx averages the attentions",
            )

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors that grow."""
        grown = QUERY if self.share_kv else (*QUERY, *KEY_VALUE)
        found: dict[str, Shape] = {}
        for layer in self.model.layers:
            for name in layer.names:
                own, (rows, *rest) = (
                    name.removeprefix(layer.prefix),
                    self.model.checkpoint.tensors[name].shape or (1,),
                )
                if own in grown:
                    found[name] = (self.count * rows, *rest)
                elif own == OUTPUT:
                    found[name] = (rows, self.count * rest[0])
                elif own == BIAS and self.gates is not None:
                    found[name] = (rows,)
                elif own == BIAS or own in self.norms:
                    found[name] = (self.count, rows)
        return found

    def keep(self, name: str, layer: int | None, shape: Shape | None) -> list[Unit]:
        """Units that write a tensor outside the feed-forwards: average, stack or join it."""
        whole = self.model.whole(name)
        if shape is None:
            return branches.averages(whole, self.count, layer)
        target = Region(name, shape)
        if name.endswith(OUTPUT):
            return self._joined(target, layer)
        if name.endswith(BIAS) and self.gates is not None:
            return [self._unit(target, whole, layer)]
        if name.endswith((BIAS, *NORMS)):
            moves: common.Moves = [
                (replace(whole, source=source), [_row(target, source)])
                for source in range(self.count)
            ]
        else:
            moves = self._stacked(whole, target)
        return [copy_unit(f"stack.{name}", moves, layer=layer)]

    def _names(self) -> Sequence[str]:
        return list(self.model.layers[0].names)

    def _stacked(self, whole: Region, target: Region) -> common.Moves:
        """Rows of every model: model by model, or model by model below each key-value head."""
        rows = whole.shape[0] // self.blocks
        moves: common.Moves = []
        for block in range(self.blocks):
            for source in range(self.count):
                start = (block * self.count + source) * rows
                read = replace(whole.rows(block * rows, (block + 1) * rows), source=source)
                moves.append((read, [target.rows(start, start + rows)]))
        return moves

    def _joined(self, target: Region, layer: int | None) -> list[Unit]:
        """Columns of every model, a few rows at a time."""
        whole = self.model.whole(target.tensor)
        return [
            self._unit(block, whole.rows(start, start + block.shape[0]), layer, f".{start}")
            for start, block in branches.runs(target, branches.BLOCK)
        ]

    def _unit(self, target: Region, source: Region, layer: int | None, part: str = "") -> Unit:
        pieces = tuple(piece for _, piece in branches.runs(target, branches.PIECE))
        largest = max(piece.count for piece in pieces)
        return Unit(
            f"join.{target.tensor}{part}",
            "transform",
            layer,
            reads=tuple(replace(source, source=number) for number in range(self.count)),
            writes=pieces,
            params={
                "part": "join",
                "gates": None if self.gates is None else list(self.gates),
                "blocks": self.blocks,
            },
            memory=40 * largest * (self.count if source.shape == target.shape else 1),
        )


def join(work: Work) -> dict[str, object]:
    """Write rows of an output projection, or its bias, which constant gates weigh."""
    gates = work.params["gates"] or [1.0] * len(work.unit.reads)
    first = 0
    for target in work.unit.writes:
        last = first + target.shape[0]
        parts = [
            gate * work.read(region.rows(first, last))
            for gate, region in zip(gates, work.unit.reads, strict=True)
        ]
        _join(work, target, parts)
        first = last
    return {}


def _join(work: Work, target: Region, parts: Sequence[torch.Tensor]) -> None:
    import torch

    if len(target.shape) == 1:
        work.write(target, torch.stack(list(parts)).sum(dim=0))
        return
    blocks = work.params["blocks"]
    split = torch.stack([part.reshape(part.shape[0], blocks, -1) for part in parts], dim=2)
    work.write(target, split.reshape(target.shape))


def router_spec(model: Model, layer: Layer, name: str, count: int) -> TensorSpec:
    """The attention experts' router of a layer, in the type of the output projection."""
    dtype = model.dtype(layer.prefix + OUTPUT)
    return TensorSpec(f"{layer.prefix}self_attn.{name}.weight", dtype, (count, model.config.hidden))


def _row(target: Region, row: int) -> Region:
    """One row as a vector."""
    found = target.rows(row, row + 1)
    return replace(found, shape=found.shape[1:], strides=found.strides[1:])

"""A checkpoint seen through its family: layers, routers and experts instead of tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.dtypes import FLOATING
from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.region import Region
from ..errors import InputError
from . import family_of
from .base import Family, RouterRule, Shape
from .config import Config
from .layouts import FUSED, ExpertLayout

# Buffers that old checkpoints stored and every loader recomputes; they pass through untouched.
_RECOMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        layout: how they are stored.
        prefix: the layer's name prefix.
        count: routed experts E.
        hidden: model width D.
        width: expert width F.
        stock: what the stock decoder layer calls them.
    """

    layout: ExpertLayout
    prefix: str
    count: int
    hidden: int
    width: int
    stock: ExpertLayout = FUSED

    def region(self, expert: int, part: str) -> Region:
        """``gate`` and ``up`` are [F, D], ``down`` is [D, F]; biases [F], [F] and [D]."""
        return self.layout.region(self.prefix, expert, part, self.hidden, self.width)

    def regions(self, expert: int) -> dict[str, Region]:
        """Everything an expert consists of: its projections, and its biases where it has any."""
        return {part: self.region(expert, part) for part in self.layout.parts}

    @property
    def router(self) -> Region:
        """The router's rows [E, D]."""
        return Region(self.prefix + self.layout.router, (self.count, self.hidden))

    @property
    def router_bias(self) -> Region | None:
        """What is added to the router's logits, [E]."""
        name = self.layout.router_bias
        return Region(self.prefix + name, (self.count,)) if name else None

    @property
    def correction(self) -> Region | None:
        """What is added to the scores for the selection alone, [E], whatever rank it is stored with."""
        name = self.layout.correction
        return Region(self.prefix + name, (self.count,)) if name else None

    @property
    def routing(self) -> list[Region]:
        """Everything that decides the routing, the router's rows first; one entry an expert."""
        found = (self.router, self.router_bias, self.correction)
        return [region for region in found if region is not None]

    @property
    def names(self) -> list[str]:
        """Every tensor of the mixture, the router first."""
        shapes = self.layout.shapes(self.count, self.hidden, self.width)
        return [self.prefix + name for name in shapes]


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        index: position in the model.
        prefix: its tensors' name prefix.
        experts: the mixture, or None in a dense layer.
        ffn: the dense feed-forward's projections, empty in a MoE layer.
        shared: names of shared-expert tensors.
        names: every tensor of the layer in file order.
    """

    index: int
    prefix: str
    experts: Experts | None
    ffn: dict[str, Region]
    shared: tuple[str, ...]
    names: tuple[str, ...]


def layer_shapes(
    family: Family, config: Config, layout: ExpertLayout | None, index: int
) -> dict[str, Shape]:
    """Shape of every tensor of a decoder layer by name below its prefix, with experts stored in a layout."""
    moe = family.moe
    shapes: dict[str, Shape] = {**family.attention(config), **family.mixer(config, index)}
    if moe is not None and layout is not None and moe.is_moe_layer(config, index):
        width = config.integer(moe.width_key)
        shapes.update(layout.shapes(moe.experts(config), config.hidden, width))
        shapes.update(moe.shared(config))
        return shapes
    hidden, width = config.hidden, config.integer(family.dense_width_key)
    for projection, name in family.dense_ffn.items():
        shape = (hidden, width) if projection == "down" else (width, hidden)
        shapes[name] = shape
        if family.dense_biases(config):
            shapes[name.removesuffix(".weight") + ".bias"] = shape[:1]
    return shapes


def expected_shapes(
    family: Family, config: Config, layout: ExpertLayout | None
) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor that a config promises, with experts stored in a layout."""
    yield family.embedding, (config.vocab, config.hidden)
    for index in range(config.layers):
        prefix = family.prefix.format(layer=index)
        for name, shape in layer_shapes(family, config, layout, index).items():
            yield prefix + name, shape
    yield family.final_norm, (config.hidden,)
    if family.norm_bias:
        yield family.final_norm_bias, (config.hidden,)
    if not config.tied:
        yield family.head, (config.vocab, config.hidden)
    if family.head_bias(config):
        yield family.head_bias_name, (config.vocab,)


class Model:
    """A validated checkpoint of a known family. Holds no weight."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        where = str(checkpoint.folder / "config.json")
        self.checkpoint = checkpoint
        self.family: Family = family_of(checkpoint.config, where)
        self.config = Config(checkpoint.config, self.family.defaults, where)
        self.layout = self._find_layout()
        self.layers = tuple(self._layer(index) for index in range(self.config.layers))
        self._validate()

    @classmethod
    def open(cls, folder: Path) -> Model:
        """Open and validate a folder: every expected tensor is there, has its shape, and no other is.

        Raises:
            InputError: naming the first thing that differs.
        """
        return cls(open_checkpoint(folder))

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.family.model_type

    @property
    def is_moe(self) -> bool:
        return self.family.moe is not None

    @property
    def moe_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.experts is not None]

    @cached_property
    def rule(self) -> RouterRule:
        if self.family.moe is None:
            raise InputError(f"{self.folder}: {self.family.model_type} has no experts")
        return self.family.moe.rule(self.config)

    @cached_property
    def experts(self) -> int:
        """Routed experts per MoE layer."""
        if self.family.moe is None:
            raise InputError(f"{self.folder}: {self.family.model_type} has no experts")
        return self.family.moe.experts(self.config)

    def names(self) -> list[str]:
        """Every stored tensor in model order: embedding, layers, final norm, head, then leftovers."""
        ordered = [self.family.embedding]
        for layer in self.layers:
            ordered.extend(layer.names)
        family = self.family
        ordered.extend(
            [family.final_norm, family.final_norm_bias, family.head, family.head_bias_name]
        )
        present = [name for name in ordered if name in self.checkpoint.tensors]
        known = set(present)
        return present + sorted(name for name in self.checkpoint.tensors if name not in known)

    def prediction_names(self) -> list[str]:
        """Tensors of layers after the last that predict further tokens, which stock classes leave aside."""
        key = self.family.prediction_layers
        count = self.config.get(key) if key else 0
        extra = range(count if isinstance(count, int) else 0)
        layers = [self.family.prefix.format(layer=self.config.layers + index) for index in extra]
        prefixes = (*layers, *self.family.prediction_prefixes)
        return sorted(name for name in self.checkpoint.tensors if name.startswith(prefixes))

    def whole(self, name: str) -> Region:
        """A stored tensor as one region."""
        return Region(name, self.checkpoint.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return self.checkpoint.tensors[name].dtype

    def _find_layout(self) -> ExpertLayout | None:
        moe = self.family.moe
        if moe is None:
            return None
        first = next((i for i in range(self.config.layers) if moe.is_moe_layer(self.config, i)), 0)
        prefix = self.family.prefix.format(layer=first)
        for layout in moe.layouts:
            probe = layout.region(prefix, 0, "down", 1, 1).tensor
            if probe in self.checkpoint.tensors:
                return layout
        wanted = " or ".join(
            repr(layout.region(prefix, 0, "down", 1, 1).tensor) for layout in moe.layouts
        )
        raise InputError(
            f"{self.checkpoint.folder}: tensor {wanted} is missing, so there are no experts to read"
        )

    def _layer(self, index: int) -> Layer:
        prefix = self.family.prefix.format(layer=index)
        expected = self._layer_shapes(index)
        names = tuple(prefix + name for name in expected)
        moe, layout = self.family.moe, self.layout
        if moe is not None and layout is not None and moe.is_moe_layer(self.config, index):
            experts = Experts(
                layout,
                prefix,
                self.experts,
                self.config.hidden,
                self.config.integer(moe.width_key),
                moe.stock,
            )
            shared = tuple(prefix + name for name in moe.shared(self.config))
            return Layer(index, prefix, experts, {}, shared, names)
        ffn = {
            projection: Region(prefix + name, expected[name])
            for projection, name in self.family.dense_ffn.items()
        }
        return Layer(index, prefix, None, ffn, (), names)

    def _layer_shapes(self, index: int) -> dict[str, Shape]:
        return layer_shapes(self.family, self.config, self.layout, index)

    def _validate(self) -> None:
        tensors, expected = (
            self.checkpoint.tensors,
            dict(expected_shapes(self.family, self.config, self.layout)),
        )
        passed = set(self.prediction_names())
        for name, shape in expected.items():
            if name not in tensors:
                raise InputError(
                    f"{self.folder}: tensor {name!r} is missing (expected {list(shape)})"
                )
            info = tensors[name]
            if info.shape != shape:
                raise InputError(
                    f"{info.file}: tensor {name!r} has shape {list(info.shape)}, "
                    f"config.json makes it {list(shape)}"
                )
            if info.dtype not in FLOATING:
                raise InputError(
                    f"{info.file}: tensor {name!r} is stored as {info.dtype}, expected one of "
                    f"{', '.join(sorted(FLOATING))}"
                )
        for name in tensors:
            stored_head = name == self.family.head and self.config.tied
            known = stored_head or _RECOMPUTED.fullmatch(name) or name in passed
            if name not in expected and not known:
                raise InputError(
                    f"{tensors[name].file}: tensor {name!r} is not part of a "
                    f"{self.family.model_type} model with this config",
                    hint="moesurg refuses to drop or copy what it does not understand",
                )
        if self.family.moe is not None and self.rule.top_k > self.experts:
            raise InputError(
                f"{self.config.where}: {self.rule.top_k} experts per token but only "
                f"{self.experts} experts"
            )

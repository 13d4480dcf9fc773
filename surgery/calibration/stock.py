"""The stock transformers classes of a model, without weights, and the loading of one layer's
weights.

The class is built on the meta device from config.json alone. No code of the checkpoint is imported:
the class is chosen by our own table of families, and config keys that name code or kernels are
dropped.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..architectures.layouts import FUSED, ExpertLayout
from ..architectures.model import Model
from ..checkpoint.reader import TensorReader
from ..checkpoint.region import Region
from ..errors import InputError, MoesurgError

# Keys that choose an implementation (which can be a downloaded kernel), or extra outputs.
_DROPPED = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "experts_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "dtype",
        "torch_dtype",
    }
)

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments after the hidden states, and keyword arguments."""


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps what the model passes to it and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_BTD: torch.Tensor | None = None
        self.call: Call = ((), {})

    def forward(self, hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_BTD, self.call = hidden_BTD, (args, kwargs)
        return hidden_BTD


class StockModel:
    """A model's stock classes: what surrounds the layers for real, the layers on demand.

    Args:
        model: the checkpoint.
        device: where layers run.
        dtype: what they compute in.

    Raises:
        InputError: transformers has no such class or refuses the config.
    """

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        whole = _build(model, dtype)
        body: Any = whole.model
        self._layers: list[nn.Module] = list(body.layers)
        self._recorders = [_Recorder() for _ in self._layers]
        self._norm: nn.Module = body.norm
        # Rotary frequencies are computed, not stored: on the meta device they would have no values.
        with torch.device(device):
            body.rotary_emb = type(body.rotary_emb)(config=whole.config)
        body.layers = nn.ModuleList(self._recorders)
        body.norm = nn.Identity()
        self._body = body
        self._cached: tuple[object, list[Call]] | None = None

    def enter(self, embedded_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """What the stock model gives its first layer for these embeddings."""
        self._record(embedded_BTD, mask_BT)
        first_BTD = self._recorders[0].hidden_BTD
        if first_BTD is None:
            raise MoesurgError(f"{self.model.family.model_type}: no layer was called")
        return first_BTD

    def call(
        self, layer: int, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, lengths: tuple[int, ...]
    ) -> Call:
        """The further arguments the stock model gives a layer: masks, positions, rotary embeddings.

        They depend on the lengths alone, so those of the last batch are kept for the next like it.
        """
        if self._cached is None or self._cached[0] != lengths:
            self._record(hidden_BTD, mask_BT)
            self._cached = (lengths, [recorder.call for recorder in self._recorders])
        return self._cached[1][layer]

    def _record(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> None:
        with torch.no_grad():
            self._body(inputs_embeds=hidden_BTD, attention_mask=mask_BT.long(), use_cache=False)

    def layer(self, index: int, reader: TensorReader) -> nn.Module:
        """A decoder layer with its weights, every parameter filled from the checkpoint."""
        facts = self.model.layers[index]
        module = copy.deepcopy(self._layers[index])
        special: dict[str, torch.Tensor] = self._mixture(index, reader)
        for name, _ in [*module.named_parameters(), *module.named_buffers()]:
            if name not in special:
                special[name] = self._read(reader, self.model.whole(facts.prefix + name))
        return fill(module, special, f"layer {index}")

    def _mixture(self, index: int, reader: TensorReader) -> dict[str, torch.Tensor]:
        """The router's and the experts' parameters in the stock layout, filled part by part."""
        experts = self.model.layers[index].experts
        if experts is None:
            return {}
        stock = dataclasses.replace(experts, layout=experts.stock, prefix="")
        shapes = stock.layout.shapes(stock.count, stock.hidden, stock.width)
        found: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            # Selection biases are small and stock keeps them in float32.
            dtype = torch.float32 if name == stock.layout.correction else self.dtype
            found[name] = torch.empty(shape, dtype=dtype, device=self.device)
        for read, fill_in in zip(experts.routing, stock.routing, strict=True):
            found[fill_in.tensor].view(read.shape).copy_(reader.read(read))
        for expert in range(experts.count):
            for part, read in experts.regions(expert).items():
                to = stock.region(expert, part)
                slot = found[to.tensor].view(-1)
                slot.as_strided(to.shape, to.strides, to.offset).copy_(reader.read(read))
        return found

    def final_norm(self, reader: TensorReader) -> nn.Module:
        """The norm after the last layer, with its weight."""
        family = self.model.family
        names = {"weight": family.final_norm}
        if family.norm_bias:
            names["bias"] = family.final_norm_bias
        read = {leaf: self._read(reader, self.model.whole(name)) for leaf, name in names.items()}
        return fill(copy.deepcopy(self._norm), read, "final norm")

    def _read(self, reader: TensorReader, region: Region) -> torch.Tensor:
        return reader.read(region).to(device=self.device, dtype=self.dtype)


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> nn.Module:
    """Give a module all of its parameters and buffers, and freeze it.

    Raises:
        MoesurgError: a name or shape does not match exactly; the facts on the family are wrong
        then.
    """
    slots = dict([*module.named_parameters(), *module.named_buffers()])
    if set(slots) != set(tensors):
        differing = ", ".join(sorted(set(slots) ^ set(tensors)))
        raise MoesurgError(f"{where}: the stock class and the checkpoint differ in {differing}")
    for name, tensor in tensors.items():
        if slots[name].shape != tensor.shape:
            raise MoesurgError(
                f"{where}: {name} is {list(tensor.shape)} in the checkpoint, "
                f"{list(slots[name].shape)} in the stock class"
            )
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(slots[name], nn.Parameter):
            setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(parent, leaf, tensor)
    return module.eval()


def replace_experts(
    module: nn.Module,
    router_ED: torch.Tensor,
    gate_up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    stock: ExpertLayout = FUSED,
    correction_E: torch.Tensor | None = None,
) -> None:
    """Give a materialised MoE layer other experts, of any count, for methods that go layer by
    layer.

    Args:
        module: a decoder layer from :meth:`StockModel.layer`.
        router_ED: [E, D].
        gate_up_EFD: [E, 2 F, D], gate rows above up rows.
        down_EDF: [E, D, F].
        stock: the family's names, ``Experts.stock``.
        correction_E: [E], where the family has a selection bias.

    Raises:
        MoesurgError: the family has a selection bias and none is given, or the other way round, or its experts are
        stored in another way than the arguments.
    """
    if stock.transposed or stock.router_bias or (correction_E is None) == bool(stock.correction):
        raise MoesurgError(f"these are not all the parameters of a mixture like {stock.router}")
    given = {
        stock.router: router_ED,
        stock.names["gate_up"]: gate_up_EFD,
        stock.names["down"]: down_EDF,
    }
    if correction_E is not None:
        rank = stock.correction_rank
        given[stock.correction] = correction_E if rank == 1 else correction_E[None]
    for path, tensor in given.items():
        place, _, name = path.rpartition(".")
        owner: Any = module.get_submodule(place)
        old = getattr(owner, name)
        new = tensor.to(old)
        parameter = isinstance(old, nn.Parameter)
        setattr(owner, name, nn.Parameter(new, requires_grad=False) if parameter else new)
        owner.num_experts = router_ED.shape[0]
        outside: Any = module.get_submodule(place.rpartition(".")[0])
        if hasattr(outside, "num_experts"):  # JetMoE's router is a module around a linear layer
            outside.num_experts = router_ED.shape[0]


def _build(model: Model, dtype: torch.dtype) -> Any:
    import transformers

    where = model.folder / "config.json"
    known = {key: value for key, value in model.config.raw.items() if key not in _DROPPED}
    try:
        config_class: Any = transformers.CONFIG_MAPPING[model.family.model_type]
        model_class: Any = getattr(transformers, model.family.class_name)
        config = config_class.from_dict(known)
        with torch.device("meta"):
            whole = model_class._from_config(
                config,
                dtype=dtype,
                attn_implementation=model.family.backend,
                experts_implementation="eager",
            )
    except Exception as error:  # transformers validates configs with exceptions of many types
        raise InputError(f"{where}: transformers does not accept it ({error})") from error
    return whole.eval()

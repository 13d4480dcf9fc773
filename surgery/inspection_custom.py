"""What an output with model code of ours is, told from its config and headers, like `inspection` of a stock model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import inspection as facts
from .architectures.config import Config
from .architectures.model import Model, expected_shapes
from .checkpoint.formats import MODEL
from .checkpoint.header import TensorInfo
from .checkpoint.reader import Checkpoint
from .custom import CustomModel
from .errors import InputError, MoesurgError
from .inspection_facts import dtypes, provenance, shards
from .methods import load, methods
from .modeling import PREFIX

INTEGERS = ("I32", "I64")
"""Types of indices, which are no parameters. Packed codes (U8) count a byte as one."""


def inspect_custom(source: str, folder: Path, calibration: Path | None) -> dict[str, object]:
    """The facts of a custom output; how many of its parameters a token uses is not counted.

    Raises:
        InputError: its config does not fit our model code, or statistics are given.
    """
    model = CustomModel.open(folder)
    if calibration is not None:
        raise InputError(
            f"{folder}: experts of outputs with model code are not analysed",
            hint="make a stock model first: moesurg convert --expand",
        )
    stock = stock_geometry(model)
    counts = components(model, facts._components(stock))
    total = sum(count for component, count in counts.items() if component != "other")
    record: dict[str, object] = {
        "format": MODEL.name,
        "source": source,
        "folder": str(folder),
        "family": model.label,
        "class": f"Moesurg{model.family.class_name}",
        "support": support(model),
        "layers": stock.config.layers,
        "tied_embeddings": stock.config.tied,
        "widths": facts._widths(stock),
        "parameters": {
            "total": total,
            "active_per_token": None,
            "stock": sum(facts._component_counts(stock).values()),
            "components": {name: counts[name] for name in facts.COMPONENTS if counts.get(name)},
        },
        "parts": parts(model),
        "dtypes": dtypes(model.checkpoint),
        "bytes": sum(info.nbytes for info in model.checkpoint.tensors.values()),
        "tensors": len(model.checkpoint.tensors),
        "shards": shards(model.checkpoint),
        "methods": [
            {"command": method.command, "name": method.name, "summary": method.info.summary}
            for method in methods()
            if method.info.takes == "custom models"
        ],
    }
    if stock.is_moe:
        record["moe"] = {**facts._moe(stock), "layout": "custom"}
    origin = provenance(folder)
    if origin is not None:
        record["provenance"] = origin
    return record


def stock_geometry(model: CustomModel) -> Model:
    """The stock model whose parts are replaced, by its shapes alone: no tensor of it can be read."""
    where = str(model.folder / "config.json")
    config = Config(model.stock_config, model.family.defaults, where)
    layout = None if model.family.moe is None else model.family.moe.stock
    kind = next(iter(sorted(_kinds(model))), "F32")
    held = {
        name: TensorInfo(name, kind, shape, model.folder, 0, 0)
        for name, shape in expected_shapes(model.family, config, layout)
    }
    return Model(Checkpoint(model.folder, model.stock_config, held, ()))


def components(model: CustomModel, stock: Mapping[str, str]) -> dict[str, int]:
    """Parameters by component; a tensor belongs to that of the stock tensors below the same module.

    Args:
        stock: the component of every tensor of the stock model.
    """
    place: dict[str, str] = {}
    for name, component in stock.items():
        for path in _ancestors(name):
            place.setdefault(path, component)
    counts: Counter[str] = Counter()
    for name, info in model.checkpoint.tensors.items():
        found = stock.get(name) or next(
            (place[path] for path in _ancestors(name) if path in place), "other"
        )
        size = 1
        for length in info.shape:
            size *= length
        counts["other" if info.dtype in INTEGERS else found] += size
    return dict(counts)


def parts(model: CustomModel) -> dict[str, dict[str, Any]]:
    """By key of the config, without the prefix: how many layers or matrices it is about, and their forms."""
    found: dict[str, dict[str, Any]] = {}
    for key, entry in model.parts.items():
        forms = Counter(_forms(entry))
        listed = entry.get("layers", entry) if isinstance(entry, Mapping) else {}
        row: dict[str, Any] = {"entries": len(listed)}
        if forms:
            row["forms"] = dict(sorted(forms.items()))
        found[key.removeprefix(PREFIX)] = row
    return found


def support(model: CustomModel) -> dict[str, str]:
    """How it loads, and whether a stock model can be made of it."""
    code = f"loads with the model code beside it, as Moesurg{model.family.class_name}"
    method = load("convert", "expand", "custom models")
    try:
        method.plan([model], method.options())
    except InputError as error:
        return {"tier": "custom", "sentence": f"{code}; no stock class holds it: {error.message}"}
    except MoesurgError as error:
        return {"tier": "custom", "sentence": f"{code}; {error.message}"}
    return {
        "tier": "custom",
        "sentence": f"{code}; everything but eval and verify needs a stock model: moesurg convert --expand",
    }


def _ancestors(name: str) -> Iterator[str]:
    """The modules around a tensor, the innermost first."""
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _forms(entry: object) -> Iterator[str]:
    """Every ``form`` in an entry, at any depth."""
    if isinstance(entry, Mapping):
        form = entry.get("form")
        if isinstance(form, str):
            yield form
        for value in entry.values():
            yield from _forms(value)


def _kinds(model: CustomModel) -> set[str]:
    return {info.dtype for info in model.checkpoint.tensors.values()} - {*INTEGERS, "U8"}

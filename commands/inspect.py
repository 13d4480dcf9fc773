"""``moesurg inspect``: what a folder is, from its headers."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurg.surgery.adapters.packing import LAYOUTS
from moesurg.surgery.errors import UsageError

from . import inspect_analysis, inspect_folders
from . import options as shared
from .output import Reporter, emit, facts, in_bytes, in_number, table

if TYPE_CHECKING:
    from rich.console import Console


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="What to tell of: folders of models, adapters, packs, statistics or several of these, or Hub ids "
        "owner/name with an optional @revision.",
        show_default=False,
    ),
]
Weights = Annotated[
    bool,
    typer.Option(
        "--weights",
        "-w",
        help="Read adapters' factors: norm, effective rank and dead ranks of each change, and of several adapters "
        "the cosines between them.",
    ),
]
ExpertLayout = Annotated[
    str | None,
    typer.Option(
        "--expert-layout",
        metavar="|".join(LAYOUTS),
        help="With --weights, how stacked experts' second factors are stored, where it cannot be told.",
        show_default=False,
    ),
]


def inspect(
    sources: Sources,
    weights: Weights = False,
    expert_layout: ExpertLayout = None,
    calibration: shared.Calibration = None,
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Tell what models, adapters, packs, statistics and folders of several are, and what can be done with them.

    Reads configs and headers only, and checks them completely: every tensor that is promised is there, has its
    shape, and no other is.

    Of a model: family, sizes, experts and router; of an output with model code of moesurg, which parts are not stock.

    Of an adapter: its base, modules, ranks, scales and what it saves in full. With `--weights`, how large each change
    is and how many of its ranks it uses, and of several adapters of one base how alike they are.

    Of a pack: what can be taken out of it, and error against size. Of statistics: the model and text they are of.

    Of a shelf, a sweep or any folder of such folders: a line for each, and how a mixture of adapters is called.

    With `--calibration`, statistics of a mixture's experts from `moesurg calibrate` tell how evenly they are used, how
    alike they are in router rows, weights and outputs, which pairs would merge well, how long routing stays with the
    same experts (with `calibrate --trace`), and how stable each pruning score is under half of the text. This reads
    the experts' weights once.
    """
    from moesurg.surgery import inspecting

    if expert_layout is not None and expert_layout not in LAYOUTS:
        raise UsageError(
            f"--expert-layout {expert_layout!r} is no layout",
            hint=f"it is one of {', '.join(LAYOUTS)}",
        )
    with Reporter(quiet=quiet) as progress:
        record = inspecting.inspect(
            sources,
            calibration=calibration,
            weights=weights,
            layout=expert_layout,
            progress=progress,
        )
    emit(record, as_json=as_json, human=lambda console: _show(console, record))


def _show(console: Console, record: dict[str, Any]) -> None:
    if "sources" in record:
        for inner in record["sources"]:
            _show(console, inner)
            console.print()
        if "cosines" in record:
            names = [str(inner["source"]) for inner in record["sources"]]
            console.print(inspect_folders.cosines(names, record["cosines"]))
        return
    show = {
        "model": _model,
        "adapter": inspect_folders.adapter,
        "pack": inspect_folders.pack,
        "statistics": inspect_folders.statistics,
    }
    show.get(record["format"], inspect_folders.several)(console, record)
    if "provenance" in record:
        console.print("made by moesurg:")
        console.print(facts(_origin(record["provenance"])))


def _model(console: Console, record: dict[str, Any]) -> None:
    console.print(facts(_rows(record)))
    components = record["parameters"]["components"]
    found = table("component", "parameters", "share", right=("parameters", "share"))
    total = record["parameters"]["total"]
    for name, count in components.items():
        share = "" if name == "other" else f"{count / total:.1%}"
        found.add_row(name.replace("_", " "), f"{count:,}", share)
    console.print(found)
    if "per_layer" in record:
        console.print(_layers(record["per_layer"]))
    if "analysis" in record:
        inspect_analysis.show(console, record["analysis"])


def _rows(record: dict[str, Any]) -> dict[str, str]:
    parameters, widths = record["parameters"], record["widths"]
    rows = {
        "checkpoint": record["folder"],
        "family": f"{record['family']} ({record['class']})",
        "support": record["support"]["sentence"],
        "parameters": _parameters(parameters),
        "stored": f"{in_bytes(record['bytes'])} in {len(record['shards'])} file(s), "
        f"{record['tensors']} tensors, {', '.join(record['dtypes'])}",
        "layers": str(record["layers"]),
        "widths": ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in widths.items()),
        "embeddings": "tied" if record["tied_embeddings"] else "separate head",
    }
    for name, part in record.get("parts", {}).items():
        forms = ", ".join(f"{form} {count}" for form, count in part.get("forms", {}).items())
        rows[name.replace("_", " ")] = f"{part['entries']}" + (f": {forms}" if forms else "")
    if "moe" in record:
        moe = record["moe"]
        rows["experts"] = (
            f"{moe['experts']} in each of {moe['layers']} layers, "
            f"{moe['top_k']} per token, stored {moe['layout']}"
        )
        rows["router"] = moe["router"]["sentence"]
        same = moe["identical_experts"]
        verdict = "reproduce a dense layer" if same["reproduce_dense"] else "rescale a dense layer"
        rows["identical experts"] = f"{verdict}: {same['reason']}"
    for target in record.get("upcycle_targets", ()):
        possible = target["possible"]
        rows[f"to {target['family']}"] = ("possible: " if possible else "not: ") + target["reason"]
    rows["methods"] = inspect_folders.methods_for(record)
    return rows


def _parameters(parameters: dict[str, Any]) -> str:
    total = in_number(parameters["total"])
    if parameters["active_per_token"] is None:
        return f"{total} instead of {in_number(parameters['stock'])}"
    return f"{total}, {in_number(parameters['active_per_token'])} active per token"


def _origin(provenance: dict[str, Any]) -> dict[str, str]:
    exactness = provenance.get("exactness") or {}
    sources = [str(source.get("path")) for source in provenance.get("sources") or ()]
    return {
        "version": str(provenance.get("moesurg")),
        "command": shlex.join(map(str, provenance.get("command") or ())),
        "sources": ", ".join(sources),
        "function": f"{exactness.get('kind')}: {exactness.get('reason')}",
    }


def _layers(per_layer: list[dict[str, Any]]) -> Any:
    numbers = ("experts", "top-k", "width", "parameters", "active", "bytes")
    found = table("layer", "kind", *numbers, "dtypes", right=("layer", *numbers))
    for row in per_layer:
        found.add_row(
            str(row["layer"]),
            row["kind"],
            str(row["experts"] or "-"),
            str(row["top_k"] or "-"),
            str(row["width"]),
            f"{row['parameters']:,}",
            f"{row['active']:,}",
            in_bytes(row["bytes"]),
            ", ".join(row["dtypes"]),
        )
    return found


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect", no_args_is_help=True)(inspect)

"""What ``moesurg inspect`` shows people of adapters, packs and folders of several."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from .output import facts, in_bytes, in_number, table

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]


def adapter(console: Console, record: Record) -> None:
    """Facts, and a table: of every module where weights were read, else of modules that are called and sized alike."""
    console.print(facts(_adapter_rows(record)))
    console.print(
        _modules(record["per_module"]) if "weights" in record else _kinds(record["per_module"])
    )


def pack(console: Console, record: Record) -> None:
    """Facts, what can be taken out, and error against size."""
    parts = record["parts"]
    sizes = ", ".join(
        f"{row['parts']} {'in full' if row['size'] is None else 'with ' + str(row['size'])}"
        for row in parts["sizes"]
    )
    rows = {
        "pack": record["folder"],
        "method": record["kind"],
        "inputs": str(len(record["tasks"])),
        "parts": f"{parts['count']} by {parts['stored_by']}: {sizes}",
        "stored": _stored(record),
        "size": f"{record['size']:.1%} of what it stands for"
        + (f", {in_bytes(record['base_bytes'])} are the base's" if record["base_bytes"] else ""),
        "take out": record["take_out"],
    }
    if "forms" in parts:
        rows["form"] = ", ".join(parts["forms"])
        rows["form"] += ", factors come back as they were" if parts["exact_factors"] else ""
    console.print(facts(rows))
    found = table("task", "is", "of", "bytes", "comes back", right=("bytes",))
    for task in record["tasks"]:
        back = f"{task['exactness']['kind']}: {task['exactness']['reason']}"
        of = task["of"] or "-"
        found.add_row(task["name"], task["format"], of, in_bytes(task["bytes"]), back)
    console.print(found)
    if record["curve"]:
        key = next(iter(record["curve"][0]))
        columns = ("size", "error", "largest error")
        found = table(key.replace("_", " "), *columns, right=(key.replace("_", " "), *columns))
        for row in record["curve"]:
            errors = (f"{row[name]:.3g}" for name in ("error", "largest_error"))
            found.add_row(f"{row[key]:g}", f"{row['size']:.1%}", *errors)
        found.caption = "sizes and errors relative to the inputs' changes; error: root mean square over the parts"
        console.print(found)


def statistics(console: Console, record: Record) -> None:
    """Of which model and text, and which methods they are for."""
    model, text = record["model"], record["text"]
    domains = ", ".join(f"{item['name']} {item['tokens']:,}" for item in text["domains"])
    rows = {
        "statistics": record["folder"],
        "of": f"{record['of']} in layers {_runs(record['layers'])}",
        "model": f"{model['model_type']}, hidden {model['hidden']}, SHA-256 {model['sha256']}",
        "text": f"{text['tokens']:,} tokens in sequences of {text['seq_len']}: {domains}",
        "stored": f"{in_bytes(record['bytes'])}, {record['tensors']} tensors",
    }
    if "experts" in record:
        rows["experts"] = f"{record['experts']}, {record['top_k']} per token"
    rows["holds"] = ", ".join(
        f"{key.replace('_', ' ')} {_said(value)}" for key, value in record["holds"].items()
    )
    rows["--calibration"] = methods_for(record)
    console.print(facts(rows))


def several(console: Console, record: Record) -> None:
    """What a list of folders says of them, and a line for each."""
    rows = {record["format"]: record["folder"]}
    rows["holds"] = f"{len(record['members'])} folders, {in_bytes(record['bytes'])}"
    for key, value in record["listed"].items():
        rows[key.replace("_", " ")] = _said(value)
    if "router" in record:
        router = record["router"]
        rows["router folder"] = (
            f"{router['folder']}: {router['peft_type']}, "
            f"{in_number(router['parameters']['total'])} parameters"
        )
    console.print(facts(rows))
    if record["members"]:
        listed = ["listed"] if any(member["facts"] for member in record["members"]) else []
        found = table("folder", "is", "what", "bytes", *listed, right=("bytes",))
        for member in record["members"]:
            inner = member["record"]
            said = ", ".join(f"{key} {_said(value)}" for key, value in member["facts"].items())
            row = (member["folder"], inner["format"], sentence(inner), in_bytes(inner["bytes"]))
            found.add_row(*row, *([said.replace("_", " ")] if listed else []))
        console.print(found)
    if "cosines" in record:
        names = [
            member["folder"]
            for member in record["members"]
            if member["record"]["folder"] in record["cosines"]["folders"]
        ]
        console.print(cosines(names, record["cosines"]))


def cosines(names: list[str], found: Record) -> Any:
    """Cosines of the angles between whole changes."""
    shown = table("cosine", *names, right=names)
    for name, row in zip(names, found["cosines"], strict=True):
        shown.add_row(name, *(f"{value:.4f}" for value in row))
    return shown


def sentence(record: Record) -> str:
    """A record in one line."""
    if record["format"] == "adapter":
        ranks = sorted({row["rank"] for row in record["ranks"]})
        names = ", ".join(record["modules"]["names"])
        text = f"rank {_span(ranks)} on {record['modules']['count']} modules ({names}) of {_base(record)}"
        if "weights" in record:
            text += f", norm {record['weights']['norm']:.4g}"
        return text
    if record["format"] == "pack":
        return f"{record['kind']} of {', '.join(task['name'] for task in record['tasks'])}"
    if "members" in record:
        names = ", ".join(member["folder"] for member in record["members"])
        router = record["listed"].get("router")
        return (f"{router} of " if router else "") + (names or record["router"]["folder"])
    if record["format"] == "statistics":
        return f"{record['of']} of a {record['model']['model_type']}, {record['text']['tokens']:,} tokens"
    text = f"{record['class']}, {in_number(record['parameters']['total'])} parameters"
    if "moe" in record:
        text += f", {record['moe']['experts']} experts"
    return text


def _adapter_rows(record: Record) -> dict[str, str]:
    modules, parameters = record["modules"], record["parameters"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in modules["kinds"].items())
    layers = f", layers {_runs(modules['layers'])}" if modules["layers"] else ""
    rows = {
        "adapter": record["folder"],
        "base": _base(record),
        "task": str(record["task"] or "not named"),
        "modules": kinds + layers,
        "ranks": "; ".join(
            f"rank {row['rank']}, alpha {row['alpha']:g}, scale {row['scale']:.6g}: {row['modules']} modules"
            for row in record["ranks"]
        ),
        "scale": record["scaling"] + (", rank-stabilised" if "sqrt" in record["scaling"] else ""),
        "parameters": f"{in_number(parameters['total'])}, factors are "
        f"{parameters['factors'] / max(1, parameters['changed']):.2%} of the matrices they change",
        "stored": _stored(record),
    }
    if record["experts"]:
        experts = record["experts"]
        rows["experts"] = (
            f"{', '.join(map(str, experts['counts']))} stacked in {experts['modules']} modules "
            f"({', '.join(experts['parameters'])}); order in the second factor: {experts['layout']}"
        )
    if record["lora_bias"]:
        rows["biases"] = f"{in_number(parameters['biases'])} parameters on the second factors"
    if record["base_transposed"]:
        rows["base's weights"] = "stored transposed (fan_in_fan_out)"
    if record["full"]:
        names = ", ".join(f"{row['tensor']} {row['shape']}" for row in record["full"])
        rows["saved in full"] = f"{in_number(parameters['full'])} parameters: {names}"
    if "weights" in record:
        weights = record["weights"]
        rows["change"] = (
            f"Frobenius norm {weights['norm']:.6g}; {weights['ranks']} ranks, of which "
            f"{weights['effective_ranks']:.1f} effective and {weights['dead_ranks']} dead"
        )
    rows["methods"] = methods_for(record)
    return rows


def methods_for(record: Record) -> str:
    """The methods for it by command."""
    found: dict[str, list[str]] = {}
    for method in record["methods"]:
        found.setdefault(method["command"], []).append(method["name"])
    listed = (f"{command}: {', '.join(names)}" for command, names in found.items())
    return "; ".join(listed) or "none"


def _kinds(rows: list[Record]) -> Any:
    """Modules of one name and shape together."""
    numbers = ("modules", "outputs", "inputs", "parameters", "bytes")
    found = table("module", "kind", *numbers, "ranks", right=(*numbers, "ranks"))
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        name = row["module"].removesuffix(".base_layer").rpartition(".")[2]
        key = (name, row["kind"], row["outputs"], row["inputs"])
        groups.setdefault(key, []).append(row)
    for (name, kind, outputs, inputs), members in groups.items():
        found.add_row(
            name,
            kind,
            str(len(members)),
            str(outputs),
            str(inputs),
            f"{sum(row['parameters'] for row in members):,}",
            in_bytes(sum(row["bytes"] for row in members)),
            _span(sorted({row["rank"] for row in members})),
        )
    return found


def _modules(rows: list[Record]) -> Any:
    """Every module with what its weights told."""
    numbers = ("experts", "rank", "scale", "norm", "effective rank", "dead ranks")
    found = table("module", *numbers, right=numbers)
    for row in rows:
        found.add_row(
            row["module"],
            str(row["experts"]),
            str(row["rank"]),
            f"{row['scale']:.4g}",
            f"{row['norm']:.4g}",
            f"{row['effective_rank']:.2f}",
            str(row["dead_ranks"]),
        )
    if any(row["experts"] > 1 for row in rows):
        found.caption = (
            "of stacked experts the norm of all, the mean effective rank, and all dead ranks"
        )
    return found


def _base(record: Record) -> str:
    base = record["base"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['name']}{revision}" if base["name"] else "a base that it does not name"


def _stored(record: Record) -> str:
    return (
        f"{in_bytes(record['bytes'])} in {len(record['shards'])} file(s), {record['tensors']} tensors, "
        f"{', '.join(record['dtypes'])}"
    )


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _runs(numbers: list[int]) -> str:
    """Numbers with those that follow each other drawn together: 0-3, 7."""
    starts = Counter(number - place for place, number in enumerate(numbers))
    found, at = [], 0
    for length in starts.values():
        first, last = numbers[at], numbers[at + length - 1]
        found.append(str(first) if first == last else f"{first}-{last}")
        at += length
    return ", ".join(found)

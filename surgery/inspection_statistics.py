"""What a folder of statistics is, told from its manifest and headers: of which model and text, and who can use it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .calibration.gram_folder import Grams, layer_file
from .calibration.statistics import JSON_FILE, TENSOR_FILE, Statistics
from .checkpoint.header import read_header, read_json
from .checkpoint.reader import contained
from .errors import InputError, as_written
from .methods import methods

FORMAT = "statistics"


def inspect_statistics(source: str, folder: Path) -> dict[str, Any]:
    """The facts of a folder that ``moesurg calibrate`` wrote.

    Raises:
        InputError: another schema, or something missing in it.
    """
    with as_written(folder / JSON_FILE):
        if read_json(contained(folder, JSON_FILE)).get("mode") == Grams.mode:
            return _grams(source, Grams.open(folder))
        return _experts(source, Statistics.open(folder))


def _experts(source: str, found: Statistics) -> dict[str, Any]:
    first = found.layers[0]
    try:
        rows, _ = found.inputs_shape(first)
    except InputError:
        rows = 0  # --inputs was not given
    names = read_header(contained(found.folder, TENSOR_FILE))
    needs = {"routed", "all-expert"} if found.mode == "all" else {"routed"}
    return {
        **_common(source, found.folder, found.manifest, found.layers, [TENSOR_FILE]),
        "of": "experts",
        "experts": found.experts,
        "top_k": found.manifest.get("top_k"),
        "holds": {
            "all_experts": found.mode == "all",
            "inputs": rows,
            "trace": found.has_trace,
            "halves": found.has_halves,
            "gram": any(name.endswith(".input_gram_DD") for name in names),
        },
        "methods": [
            {"command": method.command, "name": method.name, "summary": method.info.summary}
            for method in methods()
            if method.info.data in needs and method.info.sample <= rows
        ],
    }


def _grams(source: str, found: Grams) -> dict[str, Any]:
    files = [layer_file(layer) for layer in found.layers]
    matrices = sum(len(read_header(contained(found.folder, name))) for name in files)
    return {
        **_common(source, found.folder, found.manifest, found.layers, files),
        "of": "linear layers",
        "holds": {"matrices": matrices},
        "methods": [
            {"command": method.command, "name": method.name, "summary": method.info.summary}
            for method in methods()
            if method.info.data == "gram"
        ],
    }


def _common(
    source: str, folder: Path, manifest: Any, layers: list[int], files: Iterable[str]
) -> dict[str, Any]:
    headers = [read_header(contained(folder, name)) for name in files]
    infos = [info for header in headers for info in header.values()]
    text = manifest["text"]
    return {
        "format": FORMAT,
        "source": source,
        "folder": str(folder),
        "model": {
            "model_type": manifest.get("model_type"),
            "sha256": manifest.get("model_sha256"),
            "hidden": manifest.get("hidden"),
        },
        "layers": layers,
        "text": {
            "domains": [
                {"name": item.get("name"), "tokens": item.get("tokens")} for item in text["domains"]
            ],
            "tokens": text.get("tokens"),
            "seq_len": text.get("seq_len"),
        },
        "moesurg": manifest.get("moesurg"),
        "bytes": sum(info.nbytes for info in infos),
        "tensors": len(infos),
    }

"""``moesurg verify``: a folder against its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as shared
from .output import Reporter, emit, facts, table

if TYPE_CHECKING:
    from rich.console import Console

Folder = Annotated[
    str,
    typer.Argument(metavar="FOLDER", help="Folder that moesurg wrote.", show_default=False),
]


def verify(
    folder: Folder,
    reference: shared.Reference = None,
    device: shared.Device = "cpu",
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Check that a folder is what its report says: every file, every tensor, and the promise of exactness.

    With `--reference`, the model that the folder was made from, a promise to compute the same function is
    tested by running both. Of a folder of outputs every one is checked. Exit code 5 means that something differs.
    """
    from moesurg.surgery import verification

    with Reporter(quiet=quiet) as progress:
        record = verification.verify(folder, reference=reference, device=device, progress=progress)
    emit(record, as_json=as_json, human=lambda console: _show(console, record))


def _show(console: Console, record: dict[str, Any]) -> None:
    if "outputs" in record:
        console.print(facts({"verified": f"{record['folder']}: {len(record['outputs'])} outputs"}))
        found = table("folder", "files", "tensors", "loads as", right=("files", "tensors"))
        for output in record["outputs"]:
            counts = (str(output[key]) for key in ("files", "tensors"))
            found.add_row(output["folder"], *counts, str(output.get("loads")))
        console.print(found)
        return
    rows = {
        "verified": str(record["folder"]),
        "files": f"{record['files']}, as the report says",
        "tensors": str(record["tensors"]),
        "loads as": str(record.get("loads")),
    }
    exactness = record.get("exactness") or {}
    if exactness:
        rows["function"] = f"{exactness.get('kind')}: {exactness.get('reason')}"
    if exactness.get("measured") is not None:
        rows["measured"] = f"{exactness['measured']:.3g} {exactness['measure']}"
        if exactness["reference"]:
            rows["measured"] += f" from {exactness['reference']}"
    if record.get("not_in_report"):
        rows["not in report"] = ", ".join(record["not_in_report"])
    console.print(facts(rows))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify", no_args_is_help=True)(verify)

"""What ``moesurg inspect --calibration`` shows people of its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import facts, table

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, analysis: dict[str, Any]) -> None:
    """Tables of layers, of routing and of scores."""
    about = analysis["statistics"]
    console.print(
        facts(
            {
                "statistics": f"{about['tokens']:,} tokens of {', '.join(about['domains'])} "
                f"({about['mode']})",
            }
        )
    )
    console.print(_layers(analysis["layers"]))
    if analysis["routing"] is None:
        console.print("Routing was not traced: calibrate --trace tells how local it is.")
    else:
        console.print(_routing(analysis["routing"]))
    console.print(_stability(analysis["stability"]))


def _layers(rows: list[dict[str, Any]]) -> Any:
    """Load, and for each similarity its mean and its most similar pair."""
    columns = ("entropy", "largest", "unseen", "rows", "logits", "weights", "outputs", "merge best")
    found = table("layer", *columns, right=("layer", *columns))
    for row in rows:
        load = row["load"]
        found.add_row(
            str(row["layer"]),
            f"{load['entropy']:.3f}",
            f"{load['largest_share']:.1%}",
            str(len(load["unseen"])),
            *(
                _similar(row[name])
                for name in ("router_rows", "router_logits", "weights", "outputs")
            ),
            _best(row["mergeability"]),
        )
    found.caption = (
        "entropy of use, 1 even; cosines: mean, and the most similar pair; merge best: the pair with the least "
        "Var[r] E||difference||\u00b2"
    )
    return found


def _similar(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "-"
    if not summary["most_similar"]:
        return f"{summary['mean']:.2f}"
    pair = summary["most_similar"][0]
    first, second = pair["experts"]
    return f"{summary['mean']:.2f}, {pair['value']:.2f} ({first},{second})"


def _best(mergeability: dict[str, Any] | None) -> str:
    if mergeability is None or not mergeability["best_pairs"]:
        return "-"
    pair = mergeability["best_pairs"][0]
    first, second = pair["experts"]
    return f"{pair['value']:.2g} ({first},{second})"


def _routing(routing: dict[str, Any]) -> Any:
    """Windows kept and cache hits: for all layers, then for each."""
    windows = sorted({window for row in routing["layers"] for window in row["srp"]}, key=int)
    caches = list(routing["sch"])
    columns = [
        *(f"SRP@{window}" for window in windows),
        *(f"SCH {share}k" for share in caches),
    ]
    found = table("layer", *columns, right=("layer", *columns))
    found.add_row(
        "all",
        *(_with_interval(routing["srp"].get(window)) for window in windows),
        *(f"{routing['sch'][share]:.3f}" for share in caches),
    )
    for row in routing["layers"]:
        found.add_row(
            str(row["layer"]),
            *(
                f"{row['srp'][window]['srp']:.3f}" if window in row["srp"] else "-"
                for window in windows
            ),
            *(f"{row['sch'][share]:.3f}" for share in caches),
        )
    found.caption = (
        "SRP: how well whole windows of tokens are served by experts kept for them (95 % interval over sequences); "
        f"SCH: hits of a cache of 1, 2, 4 times top-k experts that sees {routing['look_ahead']} tokens ahead"
    )
    return found


def _with_interval(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry['srp']:.3f} ({low:.3f} to {high:.3f})"


def _stability(stability: dict[str, Any]) -> Any:
    """Agreement of scores between the halves of the text."""
    columns = (
        "rank correlation",
        "worst layer",
        f"same lowest {stability['dropped']}",
        "worst layer ",
    )
    found = table("score", *columns, right=columns)
    for name, row in stability["scores"].items():
        halves = row["halves"]
        keys = ("spearman", "spearman_worst", "jaccard", "jaccard_worst")
        values = [None if halves is None else halves[key] for key in keys]
        found.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    found.caption = "scores on one half of the text against the other"
    return found

"""Is a folder what its report says: every byte, every tensor, loadable, and as exact as promised."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from . import shelves
from .adapters.adapter import Adapter
from .architectures.model import Model
from .check_text import check_ids
from .checkpoint.formats import ADAPTER, PACK, format_of
from .checkpoint.header import read_json
from .checkpoint.hub import resolve
from .checkpoint.place import REPORT
from .checkpoint.reader import Checkpoint, TensorReader, contained, file_digest, open_checkpoint
from .checkpoint.torch_archive import difference
from .errors import InputError, MoesurgError, VerificationError
from .executors.base import memory_budget
from .packs import Pack
from .progress import Progress
from .report.record import SCHEMA_VERSION, self_digest
from .sources import open_source
from .verify_adapter import verify_adapter
from .verify_custom import verify_custom

LOGITS = "largest |difference of logits|"
CHECK_TOKENS, CHECK_LENGTH = 512, 128
"""Tokens of text on which the promised exactness is measured, and those of one sequence at most."""


def verify(
    folder: str, *, reference: str | None, device: str, progress: Progress
) -> dict[str, Any]:
    """Check an output folder against its report.

    An output with model code of its own is loaded with the installed copy of that code, never with the folder's.
    In this order: the report's own digest; size and SHA-256 of every file; headers, names and shapes; that
    every weight is finite; that stock transformers loads it without a missing or unexpected key; and, where
    the report promises exactness and the source is at hand, the largest difference of logits on text, in float32.

    Args:
        folder: the output of an operation.
        reference: the source to measure against; by default the one the report names, if it is still there
            with the same digests.

    Of a folder of outputs, as taking everything out of a pack or a sweep makes it, every output is checked.

    Returns:
        What was checked and measured, JSON values; of several outputs a list of these as ``outputs``.

    Raises:
        InputError: neither the folder nor one in it has a report.
        VerificationError: naming the first difference.
    """
    started = time.monotonic()
    path = resolve(folder)
    inside = (
        [] if (path / REPORT).exists() else sorted(file.parent for file in path.glob(f"*/{REPORT}"))
    )
    if inside:
        outputs = [
            verify(str(one), reference=reference, device=device, progress=progress)
            for one in inside
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "command": "verify",
            "folder": folder,
            "verified": True,
            "files": sum(output["files"] for output in outputs),
            "tensors": sum(output["tensors"] for output in outputs),
            "outputs": outputs,
            "seconds": round(time.monotonic() - started, 3),
        }
    report = _report(path)
    _files(path, report, progress)
    try:
        if format_of(path).member is not None:
            members = [open_source(path / name) for name in shelves.members(path)]
            checkpoints = [member.checkpoint for member in members]
            checkpoints += [open_checkpoint(path / name, ADAPTER) for name in shelves.router(path)]
        else:
            members = [open_source(path)] if report["tier"] != "custom" else []
            checkpoints = [member.checkpoint for member in members] or [open_checkpoint(path)]
        for checkpoint in checkpoints:
            _weights(checkpoint, progress)
    except InputError as error:
        raise VerificationError(error.message, hint=error.hint) from error
    custom = not members and report["tier"] == "custom"
    for name, entry in sorted(report["output"]["files"].items()):
        if "of" not in entry:
            continue
        archive, shard = _member_file(path, name), _member_file(path, entry["of"])
        if (found := difference(shard, archive)) is not None:
            raise VerificationError(f"{archive}: does not hold what {entry['of']} holds: {found}")
    if not members and not custom:
        loaded = "not tried: shelf.json names a loader of its own"
        exactness = dict(report["exactness"]) | {
            "measured": _largest(report, "error"),
            "measure": "largest relative distance of a module's change from the one it stands for",
            "reference": None,
        }
    if custom:
        against = _source(report, reference)
        loaded, exactness = verify_custom(checkpoints[0], report, against, device, progress)
    kinds: list[str] = []
    for member in members:
        if isinstance(member, Pack):
            loaded, exactness = _pack(member, report)
        elif isinstance(member, Adapter):
            loaded, exactness = verify_adapter(member, report)
        elif isinstance(member, Model):
            loaded = _loads(member.folder, report, progress)
            exactness = _exactness(member, report, reference, device, progress)
        kinds.append(loaded)
    if len(members) > 1:
        # One sentence for folders of one kind, though adapters may count different modules.
        mixed = len({type(member) for member in members}) > 1
        loaded = "; ".join(kinds) if mixed else f"{len(members)} folders, each as {loaded}"
    known = set(report["output"]["files"]) | {REPORT}
    there = {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "verify",
        "folder": folder,
        "verified": True,
        "files": len(report["output"]["files"]),
        "tensors": sum(len(checkpoint.tensors) for checkpoint in checkpoints),
        "loads": loaded,
        "exactness": exactness,
        "not_in_report": sorted(there - known),
        "seconds": round(time.monotonic() - started, 3),
    }


def _report(path: Path) -> dict[str, Any]:
    if not (path / REPORT).exists():
        raise InputError(
            f"{path}: has no {REPORT}, so there is nothing to verify against",
            hint="verify takes what moesurg wrote, or a folder of such folders",
        )
    try:
        report = cast(dict[str, Any], read_json(contained(path, REPORT)))
    except InputError as error:
        raise VerificationError(error.message, hint=error.hint) from error
    if report.get("schema_version") != SCHEMA_VERSION or "output" not in report:
        raise InputError(f"{path / REPORT}: not a report of this version of moesurg")
    if report.get("digest") != self_digest(report):
        raise VerificationError(f"{path / REPORT}: was changed after it was written")
    return report


def _files(path: Path, report: Mapping[str, Any], progress: Progress) -> None:
    files = report["output"]["files"]
    progress.stage("hashing", len(files))
    for name, expected in sorted(files.items()):
        try:
            file = _member_file(path, name)
        except InputError as error:
            raise VerificationError(error.message, hint=error.hint) from error
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise VerificationError(
                f"{file}: has {size:,} bytes, the report says {expected['bytes']:,}"
            )
        if file_digest(file) != expected["sha256"]:
            raise VerificationError(
                f"{file}: its SHA-256 differs from the report's",
                hint="the file was damaged or changed after the run",
            )
        progress.advance()


def _member_file(path: Path, name: str) -> Path:
    """A file of the output, which in a shelf can lie in a member's folder."""
    folder, _, leaf = name.rpartition("/")
    if not folder:
        return contained(path, name)
    if folder not in [*shelves.members(path), *shelves.router(path)]:
        raise InputError(f"{path}: file name {name!r} is in no folder of this output")
    return contained(path / folder, leaf)


def _weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Read every tensor once, which refuses what is not finite."""
    buffer = memoryview(bytearray(4 << 20))
    progress.stage("reading", len(checkpoint.tensors))
    with TensorReader(checkpoint) as reader:
        for info in checkpoint.tensors.values():
            for start in range(0, info.nbytes, len(buffer)):
                length = min(len(buffer), info.nbytes - start)
                reader.read_into(info, start, buffer[:length])
            progress.advance()


def _loads(path: Path, report: Mapping[str, Any], progress: Progress) -> str:
    """Load with stock transformers where memory allows; says what was done."""
    size, budget = int(report["output"]["bytes"]), memory_budget(None)
    if budget is not None and 2 * size > budget:
        return "not tried: the model is larger than the memory that is free"
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as stock_logging

    logging: Any = stock_logging

    progress.stage("loading", 1)
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loader: Any = AutoModelForCausalLM
        _, found = loader.from_pretrained(
            path,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise VerificationError(f"{path}: stock transformers does not load it ({error})") from error
    finally:
        logging.set_verbosity(before)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise VerificationError(
                f"{path}: stock transformers reports {kind.replace('_', ' ')}: {sorted(found[kind])[:3]}"
            )
    progress.advance()
    return "stock transformers, no missing and no unexpected key"


def _exactness(
    model: Model,
    report: Mapping[str, Any],
    reference: str | None,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    promised = dict(report["exactness"])
    source = _source(report, reference)
    if source is None:
        return promised | {"measured": None, "reference": None}
    if format_of(source) == PACK:
        # What a pack lost is in its own report; taking out of it only rounds.
        return promised | {
            "measured": _largest(report, "cast_error") or 0.0,
            "measure": "largest relative rounding of a tensor",
            "reference": None,
        }
    from .evaluate import drift, open_either

    original = open_either(source)

    progress.stage("measuring", 1)
    longest = model.config.get("max_position_embeddings")
    length = min(CHECK_LENGTH, longest) if isinstance(longest, int) else CHECK_LENGTH
    measured = drift(model, original, check_ids(model, CHECK_TOKENS, length), device=device)
    progress.advance()
    limit = promised["tolerance"] if promised["kind"] != "approximate" else None
    if limit is not None and measured > limit:
        raise VerificationError(
            f"{model.folder}: promised {promised['kind']}, but logits differ from {source} by up to "
            f"{measured:.3g} (allowed {limit:.3g})"
        )
    return promised | {
        "measured": measured,
        "measure": LOGITS,
        "reference": str(source),
    }


def _pack(pack: Pack, report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a pack holds, and the largest error that the run measured on what will be taken out of it."""
    return (
        f"a pack of {len(pack.tasks)}: moesurg revert takes them out",
        dict(report["exactness"])
        | {
            "measured": _largest(report, "error"),
            "measure": "largest relative error of a change",
            "reference": None,
        },
    )


def _largest(report: Mapping[str, Any], key: str) -> float | None:
    found = [u[key] for u in report["units"].values() if isinstance(u, Mapping) and key in u]
    return max(found, default=None)


def _source(report: Mapping[str, Any], reference: str | None) -> Path | None:
    """The folder to measure against: what the user names, or an unchanged first source."""
    if reference is not None:
        return resolve(reference)
    first = report["sources"][0]
    try:
        found = resolve(first["path"])
        same = all(
            file_digest(contained(found, name)) == digest for name, digest in first["files"].items()
        )
    except MoesurgError:
        return None
    return found if same else None

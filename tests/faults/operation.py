"""A small run that uses all of the writing machinery as a real command does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesurg.surgery.checkpoint.commit import Staging, fingerprint_digest
from moesurg.surgery.checkpoint.layout import Shard, TensorSpec, index_json, lay_out
from moesurg.surgery.checkpoint.writer import Hasher, ShardWriter

UNITS = 8
FINGERPRINT: dict[str, object] = {
    "version": "1",
    "inputs": {"model": {"sha256": "00ff"}},
    "options": {"rank": 4, "ratio": 0.5, "layers": (0, 1)},
}


def plan() -> list[Shard]:
    """Two shards of 8 units, a plain and an interleaved tensor each."""
    specs = []
    for unit in range(UNITS):
        specs.append(TensorSpec(f"layers.{unit}.down", "BF16", (3, 5)))
        specs.append(TensorSpec(f"layers.{unit}.gate_up", "F32", (2, 6)))
    return lay_out(specs, max_shard_bytes=4 * (30 + 48))


def run(
    source: Path,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    fingerprint: dict[str, object] = FINGERPRINT,
    stop_at: int | None = None,
) -> list[int]:
    """Make the output; returns the units computed by this run and not taken from an earlier one.

    Args:
        source: a folder with a file ``tokenizer.json`` to be copied.
        output: the folder to make.
        force: as in `Staging.open`.
        resume: as in `Staging.open`.
        fingerprint: of the run.
        stop_at: a unit at which to be interrupted as by Ctrl-C.
    """
    shards = plan()
    computed = []
    with Staging.open(output, fingerprint, force=force, resume=resume, inputs=[source]) as staging:
        if staging.complete:
            return []
        staging.write_file("plan.json", b"{}")
        with (
            ShardWriter(staging.path, shards, create=not staging.finished) as writer,
            Hasher(staging.path, shards) as hasher,
        ):
            for unit in range(UNITS):
                name = f"layers.{unit}"
                if unit == stop_at:
                    raise KeyboardInterrupt
                if name not in staging.finished:
                    computed.append(unit)
                    _compute(writer, unit)
                    staging.record(name, {"loss": 1 / (unit + 3), "ranks": (unit, 2)})
                    if unit % 3 == 2:
                        staging.flush(writer.sync)
                hasher.done_tensor(f"{name}.down")
                hasher.done_tensor(f"{name}.gate_up")
            staging.flush(writer.sync)
            hashes = hasher.finish()
        staging.write_file("config.json", b'{"model_type": "tiny"}\n')
        staging.write_file("model.safetensors.index.json", index_json(shards))
        staging.copy_file(source / "tokenizer.json", "tokenizer.json")
        units = dict(sorted(staging.finished.items()))
        report = {"fingerprint": fingerprint_digest(fingerprint), "files": hashes, "units": units}
        staging.write_file("report.json", json.dumps(report).encode())
        staging.commit()
    return computed


def _compute(writer: ShardWriter, unit: int) -> None:
    writer.write(f"layers.{unit}.down", bytes(range(unit, unit + 30)))
    # Rows of 3 float32 side by side: first the gate, then the up projection.
    for half in range(2):
        rows = bytes((unit * 7 + half * 24 + at) % 256 for at in range(24))
        writer.write_strided(f"layers.{unit}.gate_up", 12 * half, 12, 24, rows)


@dataclass(frozen=True)
class Scene:
    """A place to run the operation in: ``root`` holds the source, the output and all leftovers."""

    root: Path
    mode: str

    @property
    def force(self) -> bool:
        return self.mode != "absent"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def output(self) -> Path:
        return self.root / ("out" if self.force else "made/by/the run")

    def command(self, **options: bool) -> Callable[[], object]:
        force = options.get("force", self.force)
        resume = options.get("resume", False)
        return lambda: run(self.source, self.output, force=force, resume=resume)

    def reset(self) -> None:
        """Empty the place but for the source and, with --force, an old output."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.source.mkdir(parents=True)
        (self.source / "tokenizer.json").write_bytes(b'{"words": []}')
        if self.force:
            (self.output / "sub").mkdir(parents=True)
            (self.output / "sub" / "old.txt").write_text("old")
            (self.output / "report.json").write_text('{"fingerprint": "of another run"}')
            (self.output / "link").symlink_to("sub")

    def left(self) -> set[str]:
        """Names beside the source, down to the output."""
        below = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        inside = str(self.output.relative_to(self.root)) + "/"
        return {name for name in below if not name.startswith(("source", inside))}

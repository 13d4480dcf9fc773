"""The part of a run that writes: calibration, decisions, units, commit. `finishing.py` writes what is not weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import __version__
from .checkpoint.commit import Staging, fingerprint_digest
from .checkpoint.writer import Hasher, ShardWriter
from .deciding import Decider
from .digests import Digests, file_marks, header_digest
from .errors import RefusedError, UsageError
from .execute import PLAN_FILE, Runner
from .executors.base import Executor, memory_budget
from .executors.pool import PoolExecutor
from .executors.serial import SerialExecutor
from .finishing import finish
from .methods.base import Draft, Method
from .plan import Plan, Unit, validate
from .progress import Progress, Stop
from .report import record
from .sources import Source
from .weights import Weights

if TYPE_CHECKING:
    from .architectures.model import Model
    from .operation import Request

DISK_MARGIN = 64 << 20
"""Bytes left free beyond what is planned: index, report, directory blocks."""


def plan_of(request: Request, sources: Sequence[Source], draft: Draft, options: Any) -> Plan:
    """Everything that will be done, from a draft."""
    return Plan(
        command=request.command,
        method=request.method,
        options=dataclasses.asdict(options),
        seed=request.seed,
        sources=tuple(str(source.folder) for source in (*sources, *draft.references.values())),
        references=len(draft.references),
        tensors=tuple(draft.tensors),
        units=tuple(draft.units),
        max_shard_bytes=request.max_shard_bytes,
        format=draft.format,
        archives=tuple(sorted(draft.archives.items())),
    )


def check_disk(output: Path, plan: Plan) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        RefusedError: with the bytes it needs and those that are free.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = plan.disk_bytes + DISK_MARGIN
    if free < needed:
        raise RefusedError(
            f"{place}: the output needs {needed:,} bytes, {free:,} are free",
            hint="choose another --output or make room",
        )


class Job:
    """One run of one method, once it is planned."""

    def __init__(
        self,
        request: Request,
        method: Method,
        sources: Sequence[Source],
        draft: Draft,
        plan: Plan,
        options: Any,
        workers: int,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.request, self.method, self.draft = request, method, draft
        self.sources = [*sources, *draft.references.values()]
        self.plan, self.options, self.workers = plan, options, workers
        self.progress, self.stop = progress, stop
        # A model may be given several times.
        self.inputs = list(
            dict.fromkeys(file for source in self.sources for file in source.checkpoint.inputs)
        )
        self.shards = plan.shards
        self.statistics: Any = None
        self.decider = Decider(
            method,
            sources,
            options,
            plan.seed,
            lambda draft, options: plan_of(request, sources, draft, options),
            progress,
            stop,
        )

    @property
    def given(self) -> Sequence[Source]:
        """What the method starts from, without what it only reads beside it."""
        return self.sources[: len(self.request.sources)]

    @property
    def models(self) -> Sequence[Model]:
        """The sources, where they are models; only methods that start from models need more than bytes."""
        return cast("Sequence[Model]", self.given)

    @property
    def model(self) -> Model:
        return self.models[0]

    def perform(self) -> bool:
        """Stage, work and commit; True if a resumed run found its output already complete."""
        if self.request.output is None:
            raise UsageError("an output folder is needed")
        self._draft_from_weights()
        given = self.request.data or self.request.calibration
        info = self.method.info
        needed = self.draft.data or info.data
        if needed != "none" and (given or not info.optional):
            from .calibration.run import statistics_source

            self.statistics = statistics_source(
                self.model,
                calibration=self.request.calibration,
                data=self.request.data,
                tokens=self.request.tokens,
                seq_len=self.request.seq_len,
                mode=needed,
                device=self.request.device,
                sample=max(self.method.info.sample, self.draft.sample),
                texts=self.draft.texts,
                units=self.draft.units,
                replacement=self.method.replacement,
                operate=self.decider.operate if self.decider.sequential else None,
                targets=any(unit.params.get("reconstruct") for unit in self.draft.units),
            )
            self.plan = dataclasses.replace(self.plan, statistics=self.statistics.place)
        identity = self._identity()
        self.fingerprint = fingerprint_digest(identity)
        protected = [source.folder for source in self.sources]
        if self.request.calibration is not None:
            protected.append(self.request.calibration)
        with Staging.open(
            self.request.output,
            identity,
            force=self.request.force,
            resume=self.request.resume,
            inputs=[*protected, *self.request.data],
        ) as staging:
            if staging.complete:
                return True
            self._check_inputs(staging)
            digests = Digests(self.inputs)
            with self.decider:
                decision = self._decide(staging)
            self._settle(decision)
            hashes, metrics = self._execute(staging, decision)
            finish(self, staging, decision, hashes, metrics, digests.finish())
            self.stop.check()
            if self.statistics is not None:
                for name in self.statistics.files:
                    staging.remove_file(name)
            staging.commit()
        return False

    def _identity(self) -> dict[str, Any]:
        return {
            "moesurg": __version__,
            "libraries": record.libraries(),
            "command": self.plan.command,
            "method": self.plan.method,
            "options": dict(self.plan.options),
            "seed": self.plan.seed,
            "max_shard_bytes": self.plan.max_shard_bytes,
            "sources": [header_digest(source.checkpoint) for source in self.sources],
            "statistics": None if self.statistics is None else self.statistics.identity,
            # Options may name files, such as a table of ranks, that are something else now. What differs is told by
            # the first key in order, and everything with a name of its own comes before this one.
            "work": self.plan.digest,
        }

    def _check_inputs(self, staging: Staging) -> None:
        marks = file_marks(self.inputs)
        before = staging.finished.get("inputs")
        if before is not None and before != marks:
            changed = next(name for name in marks if before.get(name) != marks[name])
            raise RefusedError(
                f"{changed}: changed since the interrupted run began",
                hint="--force begins afresh",
            )
        if before is None:
            staging.record("inputs", dict(marks))
            staging.flush(lambda: None)

    def _decide(self, staging: Staging) -> dict[str, Any] | None:
        """The method's decisions; a resumed run takes those that were journalled."""
        method = self.method
        if method.decide_from_weights is None and (
            method.decide is None or self.statistics is None
        ):
            return None
        kept = staging.finished.get("decision")
        if kept is None:
            found = described = None
            if self.statistics is not None:
                from .calibration.run import describe

                found = self.statistics.load(staging, self.progress, self.stop)
                described = describe(found)
            kept = {"layers": self.decider.decide(found), "statistics": described}
            staging.record("decision", kept)
            staging.flush(lambda: None)
        return kept

    def _settle(self, decision: dict[str, Any] | None) -> None:
        """Plan again where decisions tell what the output holds."""
        if decision is None:
            return
        self._plan_again(self.decider.settle(decision["layers"]))

    def _draft_from_weights(self) -> None:
        """Plan again where weights tell what statistics are made with; they do so again when a run is resumed."""
        if self.method.draft_from_weights is not None:
            with Weights(self.given, self.progress, self.stop) as weights:
                self._plan_again(self.method.draft_from_weights(self.models, self.options, weights))

    def _plan_again(self, draft: Draft | None) -> None:
        if draft is None:
            return
        self.draft = draft
        self.plan = dataclasses.replace(
            self.plan,
            tensors=tuple(draft.tensors),
            units=tuple(draft.units),
            archives=tuple(sorted(draft.archives.items())),
        )
        validate(self.plan, [source.checkpoint for source in self.sources])
        if self.request.output is not None:
            check_disk(self.request.output, self.plan)  # padding may have made it larger
        self.shards = self.plan.shards

    def _execute(
        self, staging: Staging, decision: dict[str, Any] | None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Run what is not yet journalled; returns shard hashes and metrics by unit."""
        planned = {unit.id for unit in self.plan.units}
        metrics: dict[str, Any] = {
            name: result for name, result in staging.finished.items() if name in planned
        }
        staging.write_file(PLAN_FILE, self.plan.to_json().encode())
        written = _Coverage(self.plan)
        with (
            ShardWriter(staging.path, self.shards, create=not metrics) as writer,
            Hasher(staging.path, self.shards) as hasher,
        ):
            for unit in self.plan.units:
                if unit.id in metrics:
                    written.add(unit, hasher)
            todo = self._in_file_order([u for u in self.plan.units if u.id not in metrics])
            self.progress.stage(
                self.request.method, sum(1 + unit.steps for unit in self.plan.units)
            )
            self.progress.advance(
                sum(1 + unit.steps for unit in self.plan.units if unit.id in metrics)
            )

            def done(unit: Unit, result: dict[str, object]) -> None:
                metrics[unit.id] = result
                writer.touch(region.tensor for region in unit.written())
                written.add(unit, hasher)
                if staging.record(unit.id, result) or self.stop.signal:
                    staging.flush(writer.sync)
                self.progress.advance()
                self.stop.check()

            layers = {} if decision is None else decision["layers"]
            executor, close = self._executor(staging.path)
            try:
                executor.run(todo, lambda unit: layers.get(str(unit.layer)), done)
            finally:
                close()
            staging.flush(writer.sync)
            return hasher.finish(), metrics

    def _in_file_order(self, units: Sequence[Unit]) -> list[Unit]:
        """Units by where they write, so that files fill from their start and are hashed meanwhile."""
        place = {
            name: (index, begin)
            for index, shard in enumerate(self.shards)
            for name, begin in shard.begin.items()
        }
        return sorted(units, key=lambda unit: min(place[r.tensor] for r in unit.written()))

    def _stepped(self) -> None:
        """A step inside a unit; between two of them a long unit can be stopped, and begins again on resume."""
        self.progress.advance()
        self.stop.check()

    def _executor(self, folder: Path) -> tuple[Executor, Any]:
        if self.workers > 1:
            pool = PoolExecutor(
                folder,
                self.workers,
                memory_budget(self.request.max_memory),
                self.progress.advance,
            )
            return pool, lambda: None
        runner = Runner(self.plan, folder, self.sources)
        runner.stepped = self._stepped
        return SerialExecutor(runner), runner.close


class _Coverage:
    """Counts written elements, to tell the hasher when a tensor is final."""

    def __init__(self, plan: Plan) -> None:
        self._left: dict[str, int] = {}
        for unit in plan.units:
            for region in unit.written():
                self._left[region.tensor] = self._left.get(region.tensor, 0) + region.count

    def add(self, unit: Unit, hasher: Hasher) -> None:
        for region in unit.written():
            self._left[region.tensor] -= region.count
            if not self._left[region.tensor]:
                hasher.done_tensor(region.tensor)

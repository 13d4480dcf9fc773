"""What a method file provides, and what it is given.

A method module holds ``INFO``, a frozen dataclass ``Options`` (its fields become command-line options), and
three functions: ``plan`` (headers to a draft, no torch), optionally ``decide`` (statistics to decisions, once,
before any weight is transformed) and ``transform`` (one unit of work). A method that has to see weights before it
can decide has ``decide_from_weights`` instead of ``decide``; one that needs sampled inputs of the mixtures says
how many in ``MethodInfo.sample`` or, where options decide, in ``Draft.sample``. Where only decisions tell what the
output holds (numbers of experts by layer), ``settle`` makes the draft again from them: (models, options, decisions)
to a draft, or to None where the first one stands. The first draft then is what a dry run shows and what disk and
memory are checked with, so it should be as large. ``replacement`` is of methods whose ``data`` is ``shifted``: from a
unit, its matrix, and the Gram matrices of its inputs to the matrix in its place, with which calibration goes on. Where
that needs what only weights tell, such as ranks by spectra, ``draft_from_weights`` makes the draft again before the
statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint.layout import TensorSpec
from ..plan import Unit

if TYPE_CHECKING:
    from ..architectures.model import Model
    from ..calibration.statistics import Statistics
    from ..execute import Work
    from ..sources import Source, Takes
    from ..weights import Weights

DataNeed = Literal["none", "routed", "all-expert", "gram", "shifted", "means", "prompts", "neurons"]
Tier = Literal["stock", "padded", "custom", "pack"]
FormatName = Literal["model", "adapter", "pack", "adapters", "models", "model and adapter"]


def option(default: Any, help: str, *, choices: Sequence[str] = (), metavar: str = "") -> Any:
    """A field of an ``Options`` dataclass with what the command line needs to know about it."""
    return field(
        default=default, metadata={"help": help, "choices": tuple(choices), "metavar": metavar}
    )


def required(help: str, *, choices: Sequence[str] = (), metavar: str = "") -> Any:
    """A field without a default."""
    return field(metadata={"help": help, "choices": tuple(choices), "metavar": metavar})


@dataclass(frozen=True)
class MethodInfo:
    """What ``moesurg methods`` tells.

    Attributes:
        summary: one line.
        paper: identifier of the source, such as an arXiv number; empty for our own.
        inputs: what it takes, in words.
        data: statistics it needs.
        tier: how its output loads.
        sample: rows of each mixture's input that the statistics must hold, whatever the options say.
        optional: it works without statistics and uses them where the user gives text or a folder.
        takes: what its sources are; methods of one name for several kinds are files of their own.
    """

    summary: str
    paper: str
    inputs: str
    data: DataNeed
    tier: Tier = "stock"
    sample: int = 0
    takes: Takes = "models"
    optional: bool = False

    def fits(self, *, mixture: bool) -> bool:
        """Whether a stock model can be the first source, as far as ``inputs`` tells: dense, a mixture, or either."""
        named = {kind for kind in ("dense", "mixture") if kind in self.inputs.partition(",")[0]}
        wanted = "mixture" if mixture else "dense"
        return self.takes == "models" and (not named or wanted in named)


@dataclass(frozen=True)
class Exactness:
    """A promise about the output, checked by ``verify``.

    Attributes:
        kind: ``bitwise`` (same weights), ``exact`` (same function up to rounding) or ``approximate``.
        reason: why, naming the rule.
        tolerance: for ``exact``: largest |difference of logits| in float32 that keeps the promise.
    """

    kind: Literal["bitwise", "exact", "approximate"]
    reason: str
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Draft:
    """What a method plans: the whole output before a weight is read.

    Attributes:
        config: the output's ``config.json``, or what its format has in its place.
        tensors: every output tensor, in the order shards are filled.
        units: the work.
        exactness: predicted relation to the first source.
        tier: how the output loads.
        notes: sentences for plan and report.
        sample: rows of each mixture's input that these options need; ``work.inputs()`` gives them.
        texts: how many texts mean inputs have to be of, where that is fixed; checked before any is read by a model.
        files: further small files of the output by name, such as model code.
        results: further small files by name that need the units' metrics, each made of (units, metrics by unit).
        format: what the output is.
        archives: files of the output by name that hold the tensors of one of its shards once more, in the format that
            torch loads: the shard's name.
        references: what units read beside the run's sources, such as the base of adapters that are merged, by
            what the user calls them; regions count them after the sources. A later draft has the same.
        data: statistics that these options need, where they need others than ``MethodInfo.data`` says.
    """

    config: dict[str, object]
    tensors: Sequence[TensorSpec]
    units: Sequence[Unit]
    exactness: Exactness
    tier: Tier = "stock"
    notes: Sequence[str] = ()
    sample: int = 0
    texts: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)
    results: Mapping[str, Callable[[Sequence[Unit], Mapping[str, Any]], bytes]] = field(
        default_factory=dict
    )
    format: FormatName = "model"
    archives: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Source] = field(default_factory=dict)
    data: DataNeed | None = None


@dataclass(frozen=True)
class Method:
    """A loaded method file."""

    command: str
    name: str
    info: MethodInfo
    options: type[Any]
    plan: Callable[[Sequence[Any], Any], Draft]
    transform: Callable[[Work], dict[str, object]]
    decide: Callable[[Model, Any, Statistics, int], dict[str, Any]] | None
    description: str
    decide_from_weights: (
        Callable[[Model, Any, Statistics | None, Weights, int], dict[str, Any]] | None
    ) = None
    settle: Callable[[Sequence[Model], Any, dict[str, Any]], Draft | None] | None = None
    replacement: Callable[[Unit, Any, Any, Any], Any] | None = None
    draft_from_weights: Callable[[Sequence[Model], Any, Weights], Draft | None] | None = None

    def parse(self, values: Mapping[str, object]) -> Any:
        """Options from values by field name; fields left out take their defaults."""
        known = {entry.name for entry in dataclasses.fields(self.options)}
        return self.options(**{key: value for key, value in values.items() if key in known})

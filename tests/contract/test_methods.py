"""The laws every registered method obeys. A new method file is tested here without being named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.checkpoint.formats import ADAPTER, PACK, format_of
from moesurg.surgery.executors.serial import SerialExecutor
from moesurg.surgery.methods import load, methods, names, spelt
from moesurg.surgery.methods.base import Method
from moesurg.surgery.packs import Pack
from moesurg.surgery.progress import Silent
from moesurg.surgery.sources import open_source
from moesurg.surgery.verification import verify
from tests.faults.harness import digest
from tests.oracle.helpers import custom, grams_of, operate, peft, stock, stored_tensors

Checkpoint = Callable[..., Path]
BF16 = {"dtype": "bfloat16"}
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("adapter", {"dtype": "bfloat16", "seed": 0}),
    ("adapter", {"dtype": "bfloat16", "seed": 1, "use_rslora": True}),
]
TWO = [("llama", BF16), ("llama", {**BF16, "seed": 1})]
THREE = [*TWO, ("llama", {**BF16, "seed": 2})]
SOURCES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "upcycle": [("llama", BF16)],
    "merge": [("qwen3_moe", BF16)],
    "prune": [("qwen3_moe", BF16)],
    "upcycle bam": [("llama", BF16), ("llama", {**BF16, "seed": 1})],
    "upcycle flex": [("llama", BF16), ("llama", BF16)],
    "upcycle prompts": [("llama", BF16), ("llama", {**BF16, "seed": 1})],
    "upcycle btx": [("llama", BF16), ("llama", {**BF16, "seed": 1})],
    "merge breadcrumbs": THREE,
    "merge dare": THREE,
    "merge della": THREE,
    "merge iso-c": THREE,
    "merge karcher": THREE,
    "merge linear": TWO,
    "merge model-stock": THREE,
    "merge regmean": TWO,
    "merge sce": THREE,
    "merge slerp": TWO,
    "merge task-arithmetic": TWO,
    "merge ties": THREE,
    "merge tsv-c": THREE,
    "merge tsv-m": THREE,
    "revert rmm packs": [("pack", {"method": "rmm", "basis": 1, "form": "global"})],
    "revert tsv-c packs": [("pack", {"method": "tsv-c"})],
    "compress": [("llama", BF16)],
    "expert pad": [("minimax_m2", BF16)],
    "compress d2-moe": [("qwen3_moe", BF16)],
    "compress mobe": [("qwen3_moe", BF16)],
    "compress molae": [("qwen3_moe", BF16)],
    "compress resmoe": [("qwen3_moe", BF16)],
    "compress slbf": [("qwen3_moe", BF16)],
    "convert": [("qwen3_moe", BF16)],
    "adapter extract": TWO,
    "adapter resize adapters": ADAPTERS[:1],
    "adapter split adapters": ADAPTERS[:1],
    "adapter apply model and adapters": [("llama", BF16), *ADAPTERS],
    "merge ffa adapters": [("adapter", BF16), ("adapter", {**BF16, "alpha": 9})],
    "expert": [("qwen3_moe", BF16)],
}
"""Sources that every method of a command takes, and those of methods that need others."""
OPTIONS: dict[str, dict[str, Any]] = {
    "upcycle ternary": {"experts": 3},
    "adapter extract": {"rest": "skip", "rank": 3},
    "compress mobe": {"steps": 3},
    "compress slbf": {"steps": 3},
    "upcycle read-me": {"experts": 2},
    "upcycle split": {"experts": 2},
    "upcycle virtual-groups": {"granularity": 2},
    "convert layout": {"layout": "fused"},
    "expert add": {"copy": "1,4-5"},
    "expert drop": {"which": "1,4-5"},
    "expert lowrank": {"rank": "1-5:3;6:full"},
    "expert null": {"zero": 2, "copy": 1, "constant": 2},
    "expert pad": {"experts": 12},
    "expert mute": {"more": "python", "less": "english", "count": 2, "per": "layer"},
    "expert opt-out": {"which": "1,4-5"},
    "merge rmm adapters": {"basis": 1, "allow_larger": True},
    "revert rmm packs": {"task": "model-2"},
    "revert tsv-c packs": {"task": "model-2"},
}
"""Options without which a method does not start, or not on these sources."""

DEFAULTS: dict[str, Any] = {"experts": 4, "ratio": 0.3}
"""Values for the options that methods require; each takes those it knows."""

ALL = methods()


def key(method: Method) -> str:
    """Command and name, and what its sources are where these are not models."""
    takes = method.info.takes
    return f"{method.command} {method.name}{'' if takes == 'models' else ' ' + takes}"


@pytest.fixture(params=ALL, ids=[key(method).replace(" ", "-") for method in ALL])
def method(request: pytest.FixtureRequest) -> Method:
    found: Method = request.param
    return found


def options_of(method: Method, sources: list[Path]) -> dict[str, Any]:
    found = {**DEFAULTS, **OPTIONS.get(key(method), {})}
    if key(method) == "merge regmean":
        found["grams"] = ",".join(str(grams_of(source)) for source in sources)
    return found


@pytest.fixture
def sources(
    method: Method, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    if method.info.takes == "custom models":
        folder = tmp_path_factory.mktemp("custom") / "model"
        operate("compress", "svd", checkpoint("llama", **BF16), folder, ratio=0.3)
        return [folder]
    usual = ADAPTERS if method.info.takes == "adapters" else SOURCES.get(method.command, [])
    wanted = SOURCES.get(key(method), usual)
    return [checkpoint(family, **arguments) for family, arguments in wanted]


def perform(method: Method, sources: list[Path], output: Path, **arguments: Any) -> dict[str, Any]:
    return operate(
        method.command, method.name, sources, output, **{**options_of(method, sources), **arguments}
    )


def test_it_is_documented(method: Method) -> None:
    assert len(method.description) > 200
    assert method.info.summary
    assert method.info.inputs
    for option in dataclasses.fields(method.options):
        assert len(option.metadata["help"]) > 10, option.name


def test_it_is_found_by_its_file_name(method: Method) -> None:
    assert method.name in names(method.command)
    assert load(method.command, method.name, method.info.takes).info == method.info


def test_the_output_is_what_the_dry_run_said(
    method: Method, sources: list[Path], tmp_path: Path
) -> None:
    planned = perform(method, sources, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    result = perform(method, sources, tmp_path / "out")
    form = format_of(tmp_path / "out")
    stored = stored_tensors(tmp_path / "out")
    listed = {name: (dtype, tuple(shape)) for name, dtype, shape in planned["plan"]["tensors"]}
    held = {name: (info.dtype, info.shape) for name, info in stored.items()}
    size = sum(info.nbytes for info in stored.values())
    assert size == result["bytes"]
    if method.settle is not None and held != listed:
        # What decisions tell is not known before; the dry run shows something about as large.
        assert size <= 1.05 * planned["bytes"]
        return
    assert held == listed
    assert size == planned["bytes"]
    written = json.loads((tmp_path / "out" / form.config).read_text())
    assert written == {
        key: value for key, value in planned["plan"]["config"].items() if key != "_name_or_path"
    }


def loads(method: Method, folder: Path, checkpoint: Checkpoint) -> None:
    """The output loads where users would load it."""
    form = format_of(folder)
    if form.member is not None:
        for member in json.loads((folder / form.config).read_text())["members"]:
            loads(method, folder / member, checkpoint)
    elif form == PACK:
        assert Pack.open(folder).names
    elif form == ADAPTER:
        peft(checkpoint("llama"), folder)
    elif method.info.tier == "custom":
        custom(folder)
    else:
        Model.open(folder)
        stock(folder)


def test_the_output_loads_and_verifies(
    method: Method, sources: list[Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    perform(method, sources, tmp_path / "out")
    loads(method, tmp_path / "out", checkpoint)
    found = verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())
    assert found["verified"]
    assert found["not_in_report"] == []
    shelf = format_of(tmp_path / "out").member is not None
    assert shelf or found["exactness"]["measured"] is not None


def test_bytes_depend_on_nothing_but_the_request(
    method: Method, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [digest(source) for source in sources]
    perform(method, sources, tmp_path / "one", workers=1)
    run = SerialExecutor.run

    def backwards(self: SerialExecutor, units: Any, decision: Any, done: Any) -> None:
        run(self, list(reversed(units)), decision, done)

    monkeypatch.setattr(SerialExecutor, "run", backwards)
    perform(method, sources, tmp_path / "backwards", workers=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "backwards")
    assert [digest(source) for source in sources] == before


@pytest.mark.parametrize(
    "name", ["upcycle sparse", "merge m-smoe", "prune reap", "compress svd-llm"]
)
def test_workers_do_not_change_the_bytes(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Processes take seconds to start, so one method of each kind stands for all; units are the same to all."""
    method = load(*name.split())
    sources = [checkpoint(family, **arguments) for family, arguments in SOURCES[method.command]]
    for workers in (1, 2):
        perform(method, sources, tmp_path / str(workers), workers=workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_shards_hold_the_same_tensors(
    method: Method, sources: list[Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    size = perform(method, sources, tmp_path / "one")["bytes"]
    perform(method, sources, tmp_path / "many", max_shard_bytes=min(20_000, size // 4))
    form = format_of(tmp_path / "one")
    one, many = (stored_tensors(tmp_path / name) for name in ("one", "many"))
    assert len({info.file for info in many.values()}) > 2 or not form.sharded
    assert one.keys() == many.keys()
    for name, info in one.items():
        other = many[name]
        first = info.file.read_bytes()[info.begin : info.end]
        assert first == other.file.read_bytes()[other.begin : other.end]
    loads(method, tmp_path / "many", checkpoint)


def test_the_report_is_complete(method: Method, sources: list[Path], tmp_path: Path) -> None:
    perform(method, sources, tmp_path / "out", seed=5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["operation"] == method.command
    assert report["method"] == method.name
    assert report["seed"] == 5
    assert set(report["options"]) == {field.name for field in dataclasses.fields(method.options)}
    words = ["moesurg", *spelt(method.command, method.name, list(map(str, sources)))]
    assert report["command"][: len(words)] == words
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    files -= {"report.json"}
    assert set(report["output"]["files"]) == files
    assert [set(source["files"]) for source in report["sources"]] == [
        {path.name for path in open_source(source).checkpoint.inputs} for source in sources
    ]
    without = method.info.data == "none" or method.info.optional
    assert (report["statistics"] is None) == without
    text = (tmp_path / "out" / "README.md").read_text()
    assert method.name in text
    assert "moesurg" in text
    # What differs between two equal runs has no place in it.
    assert not {"seconds", "workers", "time", "host"} & set(report)


def test_the_plan_survives_json(method: Method, sources: list[Path]) -> None:
    from moesurg.surgery.job import plan_of
    from moesurg.surgery.operation import Request

    models = [open_source(source) for source in sources]
    options = options_of(method, sources)
    draft = method.plan(models, method.parse(options))
    folders = tuple(map(str, sources))
    request = Request(method.command, method.name, folders, None, options)
    plan = plan_of(request, models, draft, method.parse(options))
    assert type(plan).from_json(plan.to_json()) == plan

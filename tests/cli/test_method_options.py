"""A method's ``Options`` become command-line options: tested with methods made up for the purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from moesurg.commands import method_command, method_options
from moesurg.commands.method_command import VALUES, MethodCommand
from moesurg.surgery import methods
from moesurg.surgery.errors import MoesurgError, UsageError
from moesurg.surgery.methods.base import Method, MethodInfo, option, required
from tests.conftest import Result


@dataclass(frozen=True)
class Options:
    """Every kind of option there is."""

    experts: int = required("experts to keep", metavar="E")
    router: str = option("keep", "what becomes of the router", choices=("keep", "mean"))
    damping: float = option(0.5, "between [0] and 1")
    rank: int | None = option(None, "truncate to this rank")
    top_k: int = option(2, "experts per token")
    align: bool = option(True, "align neurons first")
    label: str = option("", "any text")


def make(options: type[Any] = Options, name: str = "made-up") -> Method:
    return Method(
        command="merge",
        name=name,
        info=MethodInfo("a summary", "", "one mixture", "none"),
        options=options,
        plan=lambda models, options: pytest.fail("planned"),
        transform=lambda work: {},
        decide=None,
        description="What it does.\n\nW = [A, B] / 2",
    )


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> tuple[typer.Typer, list[dict[str, Any]]]:
    """A program whose command ``merge`` has one method, and what its function was called with."""
    registry = SimpleNamespace(
        names=lambda command: ("made-up",),
        load=lambda command, name, kind=None: make(),
        named=lambda command, name: [make()],
    )
    monkeypatch.setattr(method_command, "methods", registry)
    calls: list[dict[str, Any]] = []
    program = typer.Typer(add_completion=False)

    def merge(
        context: typer.Context,
        sources: list[str],
        method: str = typer.Option(...),
        seed: int = typer.Option(0),
    ) -> None:
        calls.append({**context.meta[VALUES], "sources": sources, "seed": seed, "method": method})

    @program.callback()
    def top() -> None:
        """A group."""

    program.command("merge", cls=MethodCommand)(merge)
    return program, calls


def run(app: Any, *arguments: str) -> dict[str, Any]:
    program, calls = app
    program(args=["merge", *arguments], standalone_mode=False)
    return dict(calls[-1])


def test_defaults_are_the_dataclass_s_own(app: Any) -> None:
    found = run(app, "a", "b", "--method", "made-up", "--experts", "4")
    assert found.pop("sources") == ["a", "b"]
    assert found.pop("method") == "made-up"
    assert found.pop("seed") == 0
    assert found == dataclasses.asdict(Options(experts=4))
    assert make().parse(found) == Options(experts=4)


def test_values_are_typed(app: Any) -> None:
    found = run(
        app, "--experts=4", "--damping", "0.25", "--rank", "7", "--top-k", "1", "--no-align", "a",
        "--router", "mean", "--label", "x y", "--method=made-up", "--seed", "3",
    )  # fmt: skip
    assert found["damping"] == 0.25
    assert found["rank"] == 7
    assert found["top_k"] == 1
    assert found["align"] is False
    assert found["router"] == "mean"
    assert found["label"] == "x y"
    assert found["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--experts", "many"], "'--experts'"),
        (["--experts", "1.5"], "'--experts'"),
        (["--experts", "4", "--router", "sum"], "'--router'"),
        (["--experts", "4", "--damping", "x"], "'--damping'"),
        ([], "Missing option '--experts'"),
    ],
)
def test_a_bad_value_names_its_option(app: Any, arguments: list[str], expected: str) -> None:
    with pytest.raises(typer.TyperException) as caught:
        run(app, "a", "--method", "made-up", *arguments)
    assert expected in caught.value.format_message()
    assert caught.value.exit_code == 2


def test_an_unknown_option_names_the_method_and_its_options(app: Any) -> None:
    with pytest.raises(UsageError) as caught:
        run(app, "a", "--method", "made-up", "--experst", "4")
    assert "--method made-up has no option --experst; did you mean --experts?" in str(caught.value)
    assert "--experts, --router, --damping, --rank, --top-k, --align" in str(caught.value.hint)


def test_a_misspelt_shared_option_is_recognised_too(app: Any) -> None:
    with pytest.raises(UsageError, match="did you mean --seed"):
        run(app, "a", "--method", "made-up", "--experts", "4", "--sede", "1")


def test_an_unknown_method_names_the_methods(app: Any) -> None:
    with pytest.raises(UsageError, match="no method 'mde-up'; did you mean made-up") as caught:
        run(app, "a", "--method", "mde-up")
    assert "made-up" in str(caught.value.hint)


def test_a_missing_method_names_the_methods(app: Any) -> None:
    with pytest.raises(UsageError, match="merge needs --method") as caught:
        run(app, "a")
    assert "made-up" in str(caught.value.hint)


def test_what_follows_two_dashes_is_no_option(app: Any) -> None:
    with pytest.raises(UsageError, match="needs --method"):
        run(app, "a", "--", "--method", "made-up")


def test_help_shows_the_options_with_markup_as_text(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    program, _ = app
    program(args=["merge", "--method", "made-up", "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    for expected in ("--experts", "--no-align", "keep|mean", "between [0] and 1", "[A, B] / 2"):
        assert expected in shown
    assert "[default: keep]" in shown


def test_help_without_a_method_shows_the_table(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    program, _ = app
    program(args=["merge", "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "made-up" in shown
    assert "a summary" in shown
    assert "--experts" not in shown


def test_options_are_described_for_json() -> None:
    found = {row["option"]: row for row in method_options.describe(make())}
    assert found["--experts"]["required"] is True
    assert found["--experts"]["default"] is None
    assert found["--router"]["choices"] == ["keep", "mean"]
    assert found["--top-k"]["default"] == 2


def test_defective_methods_are_told() -> None:
    @dataclass(frozen=True)
    class Mute:
        rank: int = 3

    @dataclass(frozen=True)
    class Odd:
        rank: list[int] = option((), "ranks")

    @dataclass(frozen=True)
    class Clash:
        seed: int = option(1, "a seed of its own")

    with pytest.raises(MoesurgError, match="rank has no help"):
        method_options.parameters(make(Mute))
    with pytest.raises(MoesurgError, match="rank has the type"):
        method_options.parameters(make(Odd))
    taken = [SimpleNamespace(name="seed", opts=["--seed"])]
    with pytest.raises(MoesurgError, match="--seed is one of the shared options"):
        method_options.parameters(make(Clash), taken=taken)


def test_no_real_method_clashes_with_the_shared_options() -> None:
    from moesurg.commands.app import app as program

    commands = typer.main.get_command(program).commands  # type: ignore[attr-defined]
    for method in methods.methods():
        if (
            method.command == "revert"
        ):  # the pack knows the method, so the command has its option itself
            continue
        found = method_options.parameters(method, taken=commands[method.command].params)
        assert len(found) == len(dataclasses.fields(method.options)), method.name


def test_text_for_a_method_that_uses_none_is_refused(
    call_cli: Callable[..., Result], checkpoint: Callable[..., Path], root: Path
) -> None:
    done = call_cli(
        "upcycle",
        checkpoint("llama"),
        "--method",
        "sparse",
        "--experts",
        "2",
        "--data",
        root / "README.md",
        "--dry-run",
    )
    assert done.code == 2
    assert "uses no statistics" in done.err

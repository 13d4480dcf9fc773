"""Every command and every option is explained, in the help and in the README."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from moesurg.commands import method_options
from moesurg.commands.app import EXIT_CODES, app
from moesurg.commands.methods import markdown_table
from moesurg.surgery import methods
from moesurg.surgery.errors import MoesurgError

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def subclasses(kind: type[MoesurgError]) -> Iterator[type[MoesurgError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def parameters_of(command: str, method: str | None = None) -> list[Any]:
    group = COMMANDS[command]
    if command in methods.BY_NAME and method is not None:
        group = group.get_command(None, method)
    found = list(group.params)
    if method is not None and command not in methods.BY_SOURCE:
        found += method_options.parameters(methods.load(command, method), taken=found)
    return found


def test_the_commands_are_the_documented_ones() -> None:
    names = {
        "upcycle",
        "merge",
        "prune",
        "compress",
        "convert",
        "expert",
        "calibrate",
        "inspect",
        "eval",
        "revert",
        "verify",
        "methods",
    }
    # A group of methods is there once it has some.
    names |= {"adapter"} if methods.names("adapter") else set()
    assert set(COMMANDS) == names


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_help(command: str) -> None:
    assert COMMANDS[command].help
    for parameter in parameters_of(command):
        assert parameter.help, f"{command} {parameter.name}"


@pytest.mark.parametrize(
    "method",
    methods.methods(),
    ids=lambda method: f"{method.command}-{method.name}-{method.info.takes}",
)
def test_every_method_explains_itself(
    method: Any, call_cli: Callable[..., Any], root: Path
) -> None:
    assert method.info.summary
    assert method.info.inputs
    assert len(method.description) > 80
    for parameter in method_options.parameters(method):
        assert parameter.help
    # Where a name stands for several methods, the sources choose.
    sources = [root / "fixtures" / "adapters" / "bible"] if method.info.takes == "adapters" else []
    chosen = ["--method", method.name]
    if method.command in methods.BY_FLAG:
        (own, *_) = dataclasses.fields(method.options)
        chosen = [f"--{method.name}", *own.metadata["choices"][:1]]
    if method.command in methods.BY_SOURCE:
        chosen = []
    if method.command in methods.BY_NAME:
        shown = call_cli(method.command, method.name, "--help")
    else:
        shown = call_cli(method.command, *sources, *chosen, "--help")
    assert shown.code == 0
    flat = re.sub(r"\s+", "", shown.out)
    for flag in method_options.flags(method):
        assert flag in flat


@pytest.mark.parametrize("command", [name for name in methods.FOLDERS if methods.names(name)])
def test_help_without_a_method_lists_the_methods(
    command: str, call_cli: Callable[..., Any]
) -> None:
    shown = call_cli(command, "--help")
    assert shown.code == 0
    for name in methods.names(command):
        assert name in shown.out


def test_a_misspelt_subcommand_is_named_with_those_there_are(
    call_cli: Callable[..., Any],
) -> None:
    shown = call_cli("expert", "dorp", "somewhere")
    assert shown.code == 2
    assert "did you mean drop?" in shown.err
    assert call_cli("expert", "drop", "somewhere", "--dorp").code == 2


def test_every_exit_code_of_an_error_is_documented(
    root: Path, call_cli: Callable[..., Any]
) -> None:
    for kind in subclasses(MoesurgError):
        assert kind.exit_code in EXIT_CODES
    shown = call_cli("--help").out
    readme = (root / "README.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in shown
        assert f"| {code} | {meaning} |" in readme


# The README


def readme_lines(root: Path) -> list[str]:
    """The shell lines of the README's code blocks."""
    text = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def readme_commands(root: Path) -> list[list[str]]:
    """Every call of moesurg in them, without the program's name."""
    found = []
    for line in readme_lines(root):
        for part in line.split("&&"):
            words = shlex.split(part)
            if words[0] == "moesurg":
                found.append(words[1:])
    return found


def test_the_readme_uses_existing_commands_and_options(root: Path) -> None:
    calls = readme_commands(root)
    assert {call[0] for call in calls} >= set(COMMANDS) - {"methods"}
    for call in calls:
        method = call[call.index("--method") + 1] if "--method" in call else None
        if call[0] in methods.BY_NAME:
            method = call[1]
        elif call[0] in methods.BY_FLAG:
            (method,) = [name for name in methods.names(call[0]) if f"--{name}" in call]
        known = {
            flag
            for parameter in parameters_of(call[0], method)
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {word.partition("=")[0] for word in call if word.startswith("-")}
        assert used <= known, f"{' '.join(call)}: {used - known}"


def test_the_readme_begins_with_an_installation_and_the_tests(root: Path) -> None:
    first, second, *_ = readme_lines(root)
    assert "pip install" in first
    assert "moesurg merge fixtures/tiny-moe" in first
    assert "pip install" in second
    assert second.endswith("python -m pytest -n 2")


def test_the_readme_lists_every_command(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `moesurg (\w+)`", readme, flags=re.MULTILINE)) == set(COMMANDS)


def test_the_readme_has_the_table_of_methods(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- methods:.*?-->\n(.*?)\n<!-- /methods -->", readme, flags=re.DOTALL)
    assert found is not None
    assert found[1] == markdown_table(), "renew it with `moesurg methods --markdown`"

"""stdout carries the result and nothing else; stderr carries everything else; exit codes are as documented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurg.commands import app as program
from moesurg.commands import output
from moesurg.commands.options import parse_size
from moesurg.surgery import __version__, methods
from moesurg.surgery.errors import (
    InputError,
    MoesurgError,
    RefusedError,
    StoppedError,
    UsageError,
    VerificationError,
)
from moesurg.surgery.methods.base import DataNeed

Cli = Callable[..., Any]


def test_version(run_cli: Cli) -> None:
    assert run_cli("--version") == (0, f"moesurg {__version__}\n", "")


def test_methods_as_json_is_one_document_with_every_method(run_cli: Cli) -> None:
    code, out, err = run_cli("methods", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["schema_version"] == 1
    listed = {(row["command"], row["name"]) for row in document["methods"]}
    assert listed == {(method.command, method.name) for method in methods.methods()}
    assert listed
    for row in document["methods"]:
        assert set(row) >= {"summary", "paper", "inputs", "data", "tier", "options"}
        assert row["data"] in typing.get_args(DataNeed)
        assert row["tier"] in ("stock", "padded", "custom", "pack")


def test_methods_for_people_names_every_method(call_cli: Cli) -> None:
    out = call_cli("methods").out
    for method in methods.methods():
        assert method.name in out
        assert method.info.summary in out  # a pipe is wide enough


def test_inspect_as_json_is_one_document(call_cli: Cli, checkpoint: Callable[..., Path]) -> None:
    code, out, err = call_cli("inspect", checkpoint("qwen3_moe"), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["family"] == "qwen3_moe"


def test_inspect_tells_a_person_what_is_not_stock(
    call_cli: Cli, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    options = ["--method", "svd", "--ratio", "0.3", "-o", small, "--quiet"]
    assert call_cli("compress", checkpoint("qwen3_moe"), *options).code == 0
    code, out, err = call_cli("inspect", small)
    assert (code, err) == (0, "")
    for words in ("instead of", "pivot", "convert --expand", "MoesurgQwen3MoeForCausalLM"):
        assert words in out


USAGE = [
    ["nonsense"],
    ["--nonsense"],
    ["merge", "x"],
    ["merge", "x", "--method", "nonsense"],
    ["merge", "x", "--method", "sub-moe", "--experts", "4"],
    ["merge", "x", "--method", "sub-moe", "--experts", "four", "-o", "y"],
    ["merge", "x", "--method", "sub-moe", "--experts", "4", "-o", "y", "--expertz", "4"],
    ["merge", "x", "--method", "sub-moe", "--experts", "4", "-o", "y", "--max-memory", "lots"],
    ["merge", "x", "--method", "sub-moe", "--experts", "4", "-o", "y", "--max-shard-size", "0"],
    ["merge", "x", "--method", "sub-moe", "--experts", "4", "-o", "y", "--workers", "0"],
    [
        "merge",
        "x",
        "--method",
        "sub-moe",
        "--experts",
        "4",
        "-n",
        "--calibration",
        "c",
        "--data",
        "d",
    ],
    ["merge", "--method", "sub-moe", "--experts", "4", "-o", "y"],
    ["calibrate", "x"],
    ["eval", "x", "--seq-len", "1"],
    ["verify"],
    ["inspect", "x", "y", "--calibration", "c"],
    ["inspect", "x", "--expert-layout", "peft"],
    ["inspect", "x", "--weights", "--expert-layout", "other"],
    ["verify", "x", "y"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage_errors_are_two(arguments: list[str], call_cli: Cli) -> None:
    code, out, err = call_cli(*arguments)
    assert code == 2
    if err:  # without any argument, the help is the answer
        assert out == ""
        lines = err.strip().splitlines()
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("hint: ")
        assert len(lines) == 2
    else:
        assert "Usage:" in out


@pytest.mark.parametrize("command", ["inspect", "eval", "verify"])
def test_a_source_that_is_not_there_is_three(command: str, call_cli: Cli, tmp_path: Path) -> None:
    code, out, err = call_cli(command, tmp_path / "absent")
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert "absent" in err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MoesurgError("wrong"), 1),
        (UsageError("wrong"), 2),
        (InputError("wrong"), 3),
        (RefusedError("wrong"), 4),
        (VerificationError("wrong"), 5),
        (StoppedError("wrong"), 75),
        (KeyboardInterrupt(), 130),
        (ValueError("wrong"), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_every_failure_has_its_code_and_its_sentence(
    monkeypatch: pytest.MonkeyPatch, call_cli: Cli, raised: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> dict[str, object]:
        raise raised

    monkeypatch.setattr("moesurg.surgery.inspecting.inspect", fail)
    found = call_cli("inspect", "x")
    assert found.code == code
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err
    assert code in program.EXIT_CODES
    monkeypatch.setenv("MOESURG_DEBUG", "1")
    if not isinstance(raised, KeyboardInterrupt):
        assert "Traceback" in call_cli("inspect", "x").err


def test_an_error_is_one_line_with_markup_as_text(
    monkeypatch: pytest.MonkeyPatch, call_cli: Cli
) -> None:
    def fail(*_: object, **__: object) -> dict[str, object]:
        raise InputError("shape [2, 3]\nis not [bold]", hint="look at [red]x[/red]")

    monkeypatch.setattr("moesurg.surgery.inspecting.inspect", fail)
    found = call_cli("inspect", "x")
    assert found.err == "error: shape [2, 3] is not [bold]\nhint: look at [red]x[/red]\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "moesurg.commands", "methods", "--json"],
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == ""


def test_no_color_means_no_escape_even_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")

    def on_terminal(**env: str) -> str:
        main_end, other_end = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "moesurg.commands", "inspect", str(tmp_path / "absent")],
            stdin=subprocess.DEVNULL,
            stdout=other_end,
            stderr=other_end,
            env={**os.environ, "TERM": "xterm", **env},
        )
        os.close(other_end)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(main_end)
        assert process.wait() == 3
        return shown.decode()

    assert "\x1b[" in on_terminal(NO_COLOR="")
    assert "\x1b[" not in on_terminal(NO_COLOR="1")


def test_ctrl_c_before_any_work_is_130() -> None:
    script = (
        "import os, signal, sys\n"
        "import moesurg.surgery.inspecting as inspection\n"
        "inspection.inspect = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "from moesurg.commands.app import main\n"
        "sys.exit(main(['inspect', 'x']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n"


# Pieces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("4GB", 4_000_000_000),
        ("4 gb", 4_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5k", 1500),
        ("2TiB", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text, "--max-memory") == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "4XB", "4iB", "1e9", "4GBs", "0.1", "٤GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        parse_size(text, "--max-memory")


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert parse_size(text, "--max-memory") > 0
    except UsageError:
        pass


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_every_record_is_strict_json(record: Any) -> None:
    text = json.dumps(output.plain({"value": record, "path": Path("a/b"), "pair": (1, 2)}))
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["path"] == "a/b"
    assert found["pair"] == [1, 2]


def test_the_reporter_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Reporter() as reporter:
        reporter.stage("layers", 3)
        reporter.advance()
        reporter.note("a note")
        reporter.warn("a [warning]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "note: a note\nwarning: a [warning]\n"


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Reporter(quiet=True) as reporter:
        reporter.note("a note")
        reporter.warn("a warning")
    assert capsys.readouterr().err == "warning: a warning\n"


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (272_000_000, "272 MB")]
)
def test_bytes_for_people(count: int, expected: str) -> None:
    assert output.in_bytes(count) == expected

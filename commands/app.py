"""The ``moesurg`` program: its subcommands, its exit codes, and how failures are told."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from moesurg.surgery import __version__
from moesurg.surgery.errors import MoesurgError

from . import (
    adapter,
    calibrate,
    compress,
    convert,
    evaluate,
    expert,
    inspect,
    merge,
    methods,
    output,
    prune,
    revert,
    upcycle,
    verify,
)
from .method_command import METHOD

EXIT_CODES = {
    0: "done",
    1: "internal error",
    2: "usage: the command line makes no sense",
    3: "bad or unsupported input",
    4: "refused: the output exists, or disk or memory would not suffice",
    5: "verification failed",
    75: "stopped; `--resume` continues the run",
    130: "interrupted by Ctrl-C; `--resume` continues the run",
    143: "terminated; `--resume` continues the run",
}
"""What a script may rely on. Any other code is a failure too."""

HELP = """Surgery on language-model checkpoints, offline and without training.

Grow a dense model into a mixture of experts, merge or prune the experts of a mixture, store layers at low rank,
and measure what it cost.
"""

app = typer.Typer(
    name="moesurg",
    help=HELP,
    epilog="\n".join(
        ["Exit codes:", *(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())]
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moesurg {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the program itself."""


for _command in (
    upcycle,
    merge,
    prune,
    compress,
    convert,
    expert,
    adapter,
    revert,
    calibrate,
    inspect,
    evaluate,
    verify,
    methods,
):
    _command.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code: Any = app(args=given, prog_name="moesurg", standalone_mode=False)
        sys.stdout.flush()
    except MoesurgError as error:
        output.failure(error.message, error.hint)
        _debug()
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader went away (`moesurg methods | head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        output.failure(
            f"internal error, a defect of moesurg ({found})",
            "set MOESURG_DEBUG=1 to see where it happened, and report it",
        )
        _debug()
        return 1
    if code == 130:
        output.failure("interrupted")
    return code if isinstance(code, int) else 0


def _usage(error: typer.TyperException) -> int:
    """A command line that does not parse: Typer's sentence in our form."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.exit_code  # the help is already on the screen
    path = context.command_path if context is not None else "moesurg"
    method = None if context is None else context.meta.get(METHOD)
    if context is not None and method is not None:
        path = f"moesurg {context.command.spelt(method.name)}"
    output.failure(error.format_message().rstrip("."), f"run `{path} --help`")
    return error.exit_code


def _debug() -> None:
    if os.environ.get("MOESURG_DEBUG") == "1":
        traceback.print_exc()

"""What every test may use: small checkpoints, the real one, and the command line."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# Nothing that is tested may reach for a network, and neither may a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
# Where transformers copies the model code of custom outputs before it imports it.
os.environ.setdefault(
    "HF_MODULES_CACHE", str(Path(__file__).resolve().parent.parent / "build" / "hf-modules")
)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("MOESURG_DEBUG", None)
# One thread a process, set before torch is imported: tests run side by side, and threads that outnumber the
# cores spin instead of working.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("moesurg", deadline=None, print_blob=True)
settings.load_profile("moesurg")

ROOT = Path(__file__).resolve().parent.parent


class Result(NamedTuple):
    """What a command line run gave."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a random checkpoint once per session and set of arguments; it must not be changed.

    ``checkpoint("qwen3_moe", layout="fused")`` takes the arguments of `fixtures.random_models.build` but for
    the folder, ``checkpoint("adapter", rank=4)`` those of `fixtures.random_adapters.build`; ``checkpoint("pack",
    method="rmm")`` packs three adapters or, for ``tsv-c``, fine-tunes.
    """
    built: dict[object, Path] = {}

    def build_pack(folder: Path, *, method: str, **options: Any) -> Path:
        from tests.oracle.helpers import operate

        family = "adapter" if method == "rmm" else "llama"
        sources = [build_once(family, dtype="bfloat16", seed=seed) for seed in range(3)]
        operate("merge", method, sources, folder, **options)
        return folder

    def build_once(model_type: str, **arguments: Any) -> Path:
        from fixtures import random_adapters
        from fixtures.random_models import build

        key = (model_type, repr(sorted(arguments.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            if model_type == "adapter":
                built[key] = random_adapters.build(folder, **arguments)
            elif model_type == "pack":
                built[key] = build_pack(folder, **arguments)
            else:
                built[key] = build(model_type, folder, **arguments)
        return built[key]

    return build_once


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The small trained mixture of the repository."""
    folder = ROOT / "fixtures" / "tiny-moe"
    if not (folder / "config.json").is_file():
        pytest.fail("fixtures/tiny-moe is not there; it is part of the repository")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M, built once and kept in ``build/``; only for tests marked ``slow``."""
    from filelock import FileLock

    from fixtures.smollm2 import build

    folder = ROOT / "build" / "smollm2"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        try:
            return build(folder)
        except SystemExit as error:
            pytest.skip(f"SmolLM2 cannot be built here: {error}")


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """Runs the command line as a process of its own: ``run_cli("methods", "--json", env={...})``."""

    def run(*arguments: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "moesurg.commands", *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, "COLUMNS": "100", **(env or {})},
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def call_cli() -> Callable[..., Result]:
    """Calls the command line in this process: fast where the libraries are imported already."""

    def call(*arguments: object) -> Result:
        from moesurg.commands.app import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        return Result(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that is opened for reading or writing while the test runs."""
    found: list[str] = []
    recording = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if recording and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            found.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hook)  # cannot be taken away again, only silenced
    yield found
    recording = False

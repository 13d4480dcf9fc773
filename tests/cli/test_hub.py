"""Sources by Hub id, from the offline cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Result

Cli = Callable[..., Result]


def cached(source: Path, cache: Path) -> str:
    """Put a folder into a Hub cache as a download would: snapshots are links to blobs."""
    home = cache / "models--some--model"
    revision = "0" * 40
    snapshot = home / "snapshots" / revision
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for file in source.rglob("*"):
        if file.is_dir():
            continue
        inside = file.relative_to(source)
        blob = home / "blobs" / hashlib.sha256(str(inside).encode()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / inside
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path("../" * len(inside.parts) + "../blobs") / blob.name)
    return "some/model"


def test_an_id_resolves_through_the_offline_cache(
    run_cli: Cli, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    name = cached(checkpoint("llama"), tmp_path / "hub")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = run_cli("inspect", name, "--json", env=env)
    assert found.code == 0, found.err
    assert json.loads(found.out)["family"] == "llama"
    made = run_cli(
        "upcycle", name, "--method", "sparse", "--experts", "2", "-o", tmp_path / "out", env=env
    )
    assert made.code == 0, made.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- some/model\n" in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_repository_of_several_adapters_is_told_folder_by_folder(
    run_cli: Cli, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for seed in (0, 1):
        shutil.copytree(checkpoint("adapter", seed=seed), tmp_path / "several" / f"seed-{seed}")
    name = cached(tmp_path / "several", tmp_path / "hub")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = run_cli("inspect", name, "--json", env=env)
    assert found.code == 0, found.err
    document = json.loads(found.out)
    assert document["source"] == name
    assert [member["folder"] for member in document["members"]] == ["seed-0", "seed-1"]


def test_an_id_that_is_nowhere_is_told_so(run_cli: Cli, tmp_path: Path) -> None:
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = run_cli("inspect", "some/absent", env=env)
    assert found.code == 3
    assert "some/absent" in found.err
    assert found.out == ""


def test_a_pipe_that_closes_is_no_accident(run_cli: Cli, tiny_moe: Path) -> None:
    import subprocess
    import sys

    line = f"{sys.executable} -m moesurg.commands inspect {tiny_moe} --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr

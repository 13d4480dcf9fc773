"""The wheel is the two folders, under one namespace."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_packaged(project: dict[str, Any], root: Path) -> None:
    folders = {
        f"moesurg.{'.'.join(init.parent.relative_to(root).parts)}"
        for package in ("surgery", "commands")
        for init in (root / package).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_no_code_lies_in_a_folder_without_init(root: Path) -> None:
    for package in ("surgery", "commands"):
        for path in (root / package).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_everything_lies_below_the_namespace(project: dict[str, Any], root: Path) -> None:
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"] == {
        "moesurg.commands": "commands",
        "moesurg.surgery": "surgery",
    }
    for package in ("surgery", "commands"):
        assert (root / package / "py.typed").is_file()
        assert "py.typed" in setuptools["package-data"][f"moesurg.{package}"]


def test_constraints_pin_every_direct_dependency(project: dict[str, Any], root: Path) -> None:
    def name(requirement: str) -> str:
        return requirement.partition(">")[0].partition("=")[0].strip().lower()

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name(line) for line in lines if "==" in line}
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
    ]
    assert {name(requirement) for requirement in wanted} <= pinned

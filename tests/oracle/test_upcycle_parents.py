"""Every way of growing a mixture, from every dense family there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurg.surgery.architectures import families
from moesurg.surgery.errors import InputError
from tests.oracle.helpers import drift, operate, stock

Checkpoint = Callable[..., Path]
PARENTS = sorted(name for name, family in families().items() if family.moe is None)
SHARING = {
    parent
    for family in families().values()
    if family.target is not None and family.target.shared_size is not None
    for parent in family.target.parents
}
METHODS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "drop": {},
    "virtual-groups": {"granularity": 2},
    "shared": {},
    "split": {"experts": 2},
    "btx": {},
    "bam": {"fold_gates": True},
}
EXACT = {"sparse", "virtual-groups", "shared"}


def test_all_parents_have_a_target() -> None:
    held = {
        parent
        for family in families().values()
        if family.target is not None
        for parent in family.target.parents
    }
    assert held == set(PARENTS)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_loads(method: str, parent: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    several = method in ("btx", "bam")
    sources = [checkpoint(parent, seed=seed) for seed in range(2 if several else 1)]
    options = {**({} if several else {"experts": 4}), **METHODS[method]}
    try:
        result = operate("upcycle", method, sources, tmp_path / "out", **options)
    except InputError as error:
        assert not list(tmp_path.iterdir())
        if method == "shared":
            assert parent not in SHARING
            assert "no supported MoE family with a shared expert" in error.message
        else:  # norms of all heads together cannot be those of several models
            assert method == "bam"
            assert "norm" in error.message
        return
    stock(tmp_path / "out")
    if method in EXACT:
        assert result["exactness"]["kind"] == "exact"
        assert drift(sources[0], tmp_path / "out") < 1e-4

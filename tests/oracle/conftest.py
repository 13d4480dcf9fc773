"""What several tests against stock transformers start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.oracle.helpers import TEXTS, calibrated


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, ...]:
    """Files of the three domains' texts."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tuple(tmp_path / f"{name}.txt" for name in TEXTS)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """All-expert statistics of a checkpoint with sampled inputs, once per folder and number of rows."""
    made: dict[tuple[Path, int], Path] = {}

    def find(source: Path, inputs: int = 600) -> Path:
        key = (source, inputs)
        if key not in made:
            folder = tmp_path_factory.mktemp("sampled") / "statistics"
            made[key] = calibrated(source, folder, mode="all-expert", inputs=inputs)
        return made[key]

    return find

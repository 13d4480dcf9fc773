"""Known answers on grown mixtures that are about routers, scales and configs rather than about one method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.base import RouterRule
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.architectures.routing import route
from moesurg.surgery.errors import InputError
from moesurg.surgery.methods.upcycle.virtual_groups import nvidia_factor

Checkpoint = Callable[..., Path]
LOGITS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_are_scaled_by_the_mass_that_is_selected(top_k: int) -> None:
    """Weights that are renormalised sum to one; others to the softmax mass of the selected experts."""
    weights, _ = route(LOGITS, RouterRule("softmax", top_k, renormalise=True))
    torch.testing.assert_close(weights.sum(1), torch.ones(64), atol=1e-6, rtol=0)
    weights, _ = route(LOGITS, RouterRule("softmax", top_k, renormalise=False))
    mass = LOGITS.softmax(1).sort(descending=True).values[:, :top_k].sum(1)
    torch.testing.assert_close(weights.sum(1).double(), mass, atol=1e-6, rtol=0)


def test_sparsemixer_gives_identical_experts_twice() -> None:
    """Each selected expert has its softmax over what is near it, which is itself alone here."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    weights, indices = route(logits, RouterRule("sparsemixer", 2, renormalise=False, jitter=0.01))
    assert indices.tolist() == [[0, 1]]
    assert weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("experts", "granularity", "top_k"), [(8, 8, 8), (8, 1, 2), (8, 1, 1)])
def test_the_cube_root_is_exact_on_squared_relu(experts: int, granularity: int, top_k: int) -> None:
    """relu(f U x)^2 f D is f^3 times the feed-forward: the factor that both matrices are scaled by."""
    factor = nvidia_factor(experts, granularity, top_k, normalised=False)
    generator = torch.Generator().manual_seed(1)
    up, down, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((12, 6), (6, 12), (5, 6))
    )
    plain = (x @ up.T).relu().square() @ down.T
    scaled = (x @ (factor * up).T).relu().square() @ (factor * down).T
    torch.testing.assert_close(scaled, factor**3 * plain, atol=0, rtol=1e-12)
    # Of E G experts each has that share of the softmax, and T selected ones hold 1 / G of the neurons each.
    assert factor**3 == pytest.approx(experts * granularity**2 / top_k)


@pytest.mark.parametrize("keys", [("num_experts",), ("num_experts", "num_local_experts")])
def test_either_key_of_the_number_of_experts_is_read(
    keys: tuple[str, ...], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("num_experts", "num_local_experts")}
    (folder / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, 8)}))
    assert Model.open(folder).experts == 8
    (folder / "config.json").write_text(json.dumps({**config, **{key: [8, 8, 8] for key in keys}}))
    with pytest.raises(InputError, match="experts should be"):
        Model.open(folder)

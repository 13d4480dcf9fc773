"""Where experts lie in stored tensors, and writing them there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesurg.surgery.architectures.layouts import FUSED, PER_EXPERT, ExpertLayout
from moesurg.surgery.checkpoint.layout import TensorSpec, lay_out
from moesurg.surgery.checkpoint.region import Region
from moesurg.surgery.checkpoint.writer import ShardWriter
from moesurg.surgery.errors import MoesurgError
from moesurg.surgery.execute import Work
from moesurg.surgery.plan import Unit

BIASED = ExpertLayout(
    "fused",
    "router",
    {"gate_up": "gu", "gate_up_bias": "gub", "down": "d", "down_bias": "db"},
    transposed=True,
    interleaved=True,
)
LAYOUTS = {
    "per-expert": PER_EXPERT,
    "fused": FUSED,
    "interleaved": dataclasses.replace(FUSED, interleaved=True),
    "transposed": dataclasses.replace(FUSED, transposed=True),
    "transposed and interleaved": BIASED,
}
E, D, F = 3, 5, 4


def window(stored: dict[str, torch.Tensor], region: Region) -> torch.Tensor:
    return stored[region.tensor].flatten().as_strided(region.shape, region.strides, region.offset)


def filled(layout: ExpertLayout) -> dict[str, torch.Tensor]:
    shapes = layout.shapes(E, D, F)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_cover_every_element_once(name: str) -> None:
    layout = LAYOUTS[name]
    seen = {name: torch.zeros(shape) for name, shape in layout.shapes(E, D, F).items()}
    seen.pop(layout.router)
    for expert in range(E):
        for part in layout.parts:
            window(seen, layout.region("", expert, part, D, F)).add_(1)
    assert all(bool((count == 1).all()) for count in seen.values())


def test_stored_order_is_what_it_is_called() -> None:
    stored = filled(BIASED)
    for expert in range(E):
        gate_up, bias = stored["gu"][expert], stored["gub"][expert]
        region = {part: BIASED.region("", expert, part, D, F) for part in BIASED.parts}
        assert torch.equal(window(stored, region["gate"]), gate_up[:, 0::2].T)
        assert torch.equal(window(stored, region["up"]), gate_up[:, 1::2].T)
        assert torch.equal(window(stored, region["down"]), stored["d"][expert].T)
        assert torch.equal(window(stored, region["gate_bias"]), bias[0::2])
        assert torch.equal(window(stored, region["up_bias"]), bias[1::2])
        assert torch.equal(window(stored, region["down_bias"]), stored["db"][expert])
    halves = LAYOUTS["transposed"]
    stored = filled(halves)
    gate_up = stored[halves.names["gate_up"]][2]
    assert torch.equal(window(stored, halves.region("", 2, "gate", D, F)), gate_up[:, :F].T)
    assert torch.equal(window(stored, halves.region("", 2, "up", D, F)), gate_up[:, F:].T)


def work_on(folder: Path, layout: ExpertLayout, regions: list[Region]) -> tuple[Work, ShardWriter]:
    specs = [TensorSpec(name, "BF16", shape) for name, shape in layout.shapes(E, D, F).items()]
    writer = ShardWriter(folder, lay_out(specs, max_shard_bytes=1 << 20), create=True)
    runner: Any = SimpleNamespace(writer=writer, specs={spec.name: spec for spec in specs})
    return Work(runner, Unit("unit", "transform", writes=tuple(regions)), None), writer


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_are_written_where_they_lie(name: str, tmp_path: Path) -> None:
    """In any order of experts and parts, and nothing else is touched."""
    layout = LAYOUTS[name]
    stored = {name: value.bfloat16() for name, value in filled(layout).items()}
    for expert in (2, 0):
        folder = tmp_path / str(expert)
        folder.mkdir()
        regions = [layout.region("", expert, part, D, F) for part in reversed(layout.parts)]
        work, writer = work_on(folder, layout, regions)
        with writer:
            for region in regions:
                work.write(region, window(stored, region).float())
            work.finish()
        (file,) = folder.glob("*.safetensors")
        written = load_file(file)
        expected = {key: torch.zeros_like(value) for key, value in stored.items()}
        for region in regions:
            window(expected, region).copy_(window(stored, region))
        assert all(torch.equal(written[key], value) for key, value in expected.items())


def test_a_gap_is_an_error(tmp_path: Path) -> None:
    region = BIASED.region("", 1, "gate", D, F)
    work, writer = work_on(tmp_path, BIASED, [region])
    with writer:
        work.write(region, torch.ones(region.shape))
        with pytest.raises(MoesurgError, match="left gaps in 'gu'"):
            work.finish()

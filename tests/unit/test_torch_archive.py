"""Archives against torch's own reader, byte for byte, and under a failing disk."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from moesurg.surgery.checkpoint import torch_archive
from moesurg.surgery.checkpoint.layout import TensorSpec
from moesurg.surgery.checkpoint.torch_archive import difference, most_bytes, write_archive
from moesurg.surgery.errors import RefusedError
from tests.faults.harness import effects, failing_at
from tests.unit.test_layout_writer import SPECS, STORABLE, reference, tensor

EVERY = [
    *(TensorSpec(f"a.{dtype}", dtype, (3, 5)) for dtype in STORABLE),
    TensorSpec("scalar", "BF16", ()),
    TensorSpec("empty", "F32", (0, 4)),
]


def written(specs: list[TensorSpec], folder: Path) -> Path:
    reference(specs, folder / "stored.safetensors")
    write_archive(folder / "stored.safetensors", folder / "found.bin")
    return folder / "found.bin"


def same(specs: list[TensorSpec], path: Path, *, mmap: bool) -> None:
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert set(loaded) == {spec.name for spec in specs}
    for spec in specs:
        found, expected = loaded[spec.name], tensor(spec)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.is_contiguous()
        mine, other = (part.reshape(-1).view(torch.uint8) for part in (found, expected))
        assert torch.equal(mine, other), spec


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_every_type(tmp_path: Path, mmap: bool) -> None:
    path = written(EVERY, tmp_path)
    same(EVERY, path, mmap=mmap)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            with path.open("rb") as file:
                file.seek(entry.header_offset + 26)
                lengths = file.read(4)
            name, extra = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0
    assert path.stat().st_size <= most_bytes(EVERY)


@settings(max_examples=20, deadline=None)
@given(SPECS.filter(lambda specs: all(spec.name for spec in specs)))
def test_any_names_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec]
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    path = written(specs, folder)
    same(specs, path, mmap=False)
    assert path.stat().st_size <= most_bytes(specs)
    first = path.read_bytes()
    write_archive(folder / "stored.safetensors", path)
    assert path.read_bytes() == first


def test_large_records_are_written_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for records above 2 GiB, at a limit that a test can pass."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(torch_archive, "PIECE", 64)
    specs = [TensorSpec("large", "F32", (20, 3)), TensorSpec("small", "F16", (2,))]
    path = written(specs, tmp_path)
    for mmap in (False, True):
        same(specs, path, mmap=mmap)


def test_a_difference_is_named(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (4,)), TensorSpec("b", "BF16", (2, 2))]
    path, stored = written(specs, tmp_path), tmp_path / "stored.safetensors"
    assert difference(stored, path) is None
    for changed, message in (
        ([specs[0], TensorSpec("b", "F16", (2, 2))], "b is torch.bfloat16"),
        ([specs[0]], "lacks or adds"),
        ([specs[0], TensorSpec("b", "BF16", (4, 1))], "b is torch.bfloat16"),
    ):
        reference(changed, stored)
        assert message in str(difference(stored, path))
    reference(specs, stored)
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    assert difference(stored, path) == "b has other values"
    path.write_bytes(path.read_bytes()[:100])
    assert "does not load" in str(difference(stored, path))


def test_every_effect_can_fail_and_stopping_stops(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (4,))]
    path, stored = written(specs, tmp_path), tmp_path / "stored.safetensors"
    seen = effects(lambda: write_archive(stored, path))
    assert {effect for effect, _ in seen} == {"create", "pwrite", "fsync"}
    for k in range(len(seen)):
        with failing_at(k, errno.ENOSPC), pytest.raises(RefusedError, match="disk full"):
            write_archive(stored, path)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(stored, path, stop)
    write_archive(stored, path)
    same(specs, path, mmap=False)

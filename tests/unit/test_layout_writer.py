"""The planned bytes against the reference library, and writing them in any order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moesurg.surgery.checkpoint import dtypes, layout
from moesurg.surgery.checkpoint import writer as writer_module
from moesurg.surgery.checkpoint.layout import Shard, TensorSpec, index_json, lay_out
from moesurg.surgery.checkpoint.writer import Hasher, ShardWriter
from moesurg.surgery.errors import InputError, RefusedError, UsageError

STORABLE = sorted(dtypes._TORCH)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SPECS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(STORABLE), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=12,
).map(lambda found: [TensorSpec(name, *rest) for name, rest in found.items()])


def payload(spec: TensorSpec, seed: int = 0) -> bytes:
    """Random bytes for a tensor. Booleans are 0 or 1, all else may be any bits."""
    data = random.Random(f"{seed}{spec.name}").randbytes(spec.nbytes)
    return bytes(byte & 1 for byte in data) if spec.dtype == "BOOL" else data


def tensor(spec: TensorSpec) -> torch.Tensor:
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtypes.torch_dtype(spec.dtype))
    flat = torch.frombuffer(bytearray(payload(spec)), dtype=torch.uint8)
    return flat.view(dtypes.torch_dtype(spec.dtype)).reshape(spec.shape)


def reference(specs: Sequence[TensorSpec], path: Path) -> bytes:
    save_file({spec.name: tensor(spec) for spec in specs}, path, metadata={"format": "pt"})
    return path.read_bytes()


def write_all(folder: Path, shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> None:
    with ShardWriter(folder, shards, create=True) as writer:
        for spec in random.Random(3).sample(specs, len(specs)):
            data = payload(spec)
            cut = len(data) // 3
            writer.write(spec.name, data[cut:], offset=cut)
            writer.write(spec.name, bytearray(data)[:cut])
        writer.sync()


@settings(deadline=None)
@given(specs=SPECS)
def test_bytes_equal_save_file(
    specs: list[TensorSpec], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("one")
    (shard,) = lay_out(specs)
    write_all(folder, [shard], specs)
    assert shard.file == "model.safetensors"
    assert (folder / shard.file).read_bytes() == reference(specs, folder / "theirs")


@settings(deadline=None, max_examples=40)
@given(specs=SPECS, limit=st.integers(1, 60))
def test_each_shard_equals_save_file(
    specs: list[TensorSpec], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("many")
    shards = lay_out(specs, max_shard_bytes=limit)
    by_name = {spec.name: spec for spec in specs}
    write_all(folder, shards, specs)
    order: list[int] = []
    for shard in shards:
        inside = [by_name[name] for name in shard.begin]
        order += sorted(map(specs.index, inside))
        assert sum(spec.nbytes for spec in inside) <= limit or len(inside) == 1
        assert (folder / shard.file).read_bytes() == reference(inside, folder / "theirs")
    assert order == list(range(len(specs)))


def test_all_storable_types_in_one_file(tmp_path: Path) -> None:
    specs = [TensorSpec(f"{n}", dtype, (3, 2)) for n, dtype in enumerate(STORABLE)]
    specs.append(TensorSpec("F4", "F4", (3, 2)))
    shards = lay_out(specs)
    write_all(tmp_path, shards, specs)
    # torch packs two F4 in an element; the header counts single ones.
    packed = torch.frombuffer(bytearray(payload(specs[-1])), dtype=torch.uint8).reshape(3, 1)
    tensors = {spec.name: tensor(spec) for spec in specs[:-1]}
    tensors["F4"] = packed.view(torch.float4_e2m1fn_x2)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / shards[0].file).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_fill_in_order_and_large_tensors_stand_alone() -> None:
    sizes = [4, 4, 40, 1, 9, 2]
    specs = [TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes)]
    shards = lay_out(specs, max_shard_bytes=10, stem="adapter_model")
    assert [list(shard.begin) for shard in shards] == [["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"]]
    assert shards[1].file == "adapter_model-00002-of-00004.safetensors"
    assert shards[0].end == {"t0": shards[0].begin["t1"], "t1": shards[0].size}


def test_index_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=4000)
    theirs = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    del theirs["metadata"]["total_parameters"]
    shards = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        inside = load_file(path)
        names = {name: dtypes.name_of(data.dtype) for name, data in inside.items()}
        specs = [TensorSpec(name, names[name], tuple(inside[name].shape)) for name in names]
        begin = lay_out(specs)[0]
        assert begin.header == path.read_bytes()[: len(begin.header)]
        shards.append(Shard(path.name, begin.header, begin.begin, begin.size))
    ours = index_json(shards)
    assert ours == (json.dumps(theirs, indent=2, sort_keys=True) + "\n").encode()


def test_bad_plans_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("a", "F32", (2,))
    with pytest.raises(InputError, match="'a' is planned twice"):
        lay_out([spec, TensorSpec("b", "F32", ()), spec])
    with pytest.raises(InputError, match="reserves"):
        lay_out([TensorSpec("__metadata__", "F32", ())])
    with pytest.raises(InputError, match="not valid Unicode"):
        lay_out([TensorSpec("a\ud800", "F32", ())])
    with pytest.raises(InputError, match="unknown tensor type 'F5'"):
        lay_out([TensorSpec("a", "F5", ())])
    with pytest.raises(UsageError, match="shard size"):
        lay_out([spec], max_shard_bytes=0)
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 100)
    with pytest.raises(RefusedError, match=r"header of model.safetensors would take 1\d\d bytes"):
        lay_out([TensorSpec("a" * 50, "F32", ())])


def test_strided_rows_interleave(tmp_path: Path) -> None:
    # gate_FD and up_FD into gate_up_DF2: every element of a row goes to its own place.
    gate, up = torch.rand(5, 3), torch.rand(5, 3)
    fused = torch.stack([gate, up], dim=-1).transpose(0, 1).contiguous()  # D, F, 2
    shards = lay_out([TensorSpec("x", "U8", (3,)), TensorSpec("w", "F32", (3, 5, 2))])
    with ShardWriter(tmp_path, shards, create=True) as writer:
        for half, part in enumerate((gate, up)):
            rows = part.T.contiguous().numpy()
            writer.write_strided("w", 4 * half, 4, 8, rows)
        writer.write("x", b"abc")
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["w"], fused)
    with ShardWriter(tmp_path, shards, create=False) as writer:
        halves = fused.reshape(3, 10).numpy()
        for half in range(2):
            writer.write_strided("w", 20 * half, 20, 40, halves[:, 5 * half : 5 * half + 5].copy())
        writer.write_strided("w", 0, 40, 40, halves)
        writer.write_strided("w", 0, 4, 8, b"")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], fused)


def test_writes_outside_a_tensor_are_errors(tmp_path: Path) -> None:
    shards = lay_out([TensorSpec("a", "U8", (8,)), TensorSpec("b", "U8", (8,))])
    with ShardWriter(tmp_path, shards, create=True) as writer:
        before = (tmp_path / "model.safetensors").read_bytes()
        for offset, length in [(-1, 2), (0, 9), (8, 1), (9, 0)]:
            with pytest.raises(ValueError, match="of tensor 'a', which has 8 bytes"):
                writer.write("a", bytes(length), offset=offset)
        with pytest.raises(ValueError, match="in no shard"):
            writer.write("c", b"")
        for row, stride, data in [(4, 3, bytes(8)), (0, 3, b""), (3, 4, bytes(4))]:
            with pytest.raises(ValueError, match="cannot be rows"):
                writer.write_strided("a", 0, row, stride, data)
        with pytest.raises(ValueError, match="bytes 1 to 9"):
            writer.write_strided("a", 1, 2, 3, bytes(6))
        assert (tmp_path / "model.safetensors").read_bytes() == before


def test_reopening_checks_the_files(tmp_path: Path) -> None:
    shards = lay_out([TensorSpec("a", "U8", (8,))])
    with pytest.raises(InputError, match="cannot be used"):
        ShardWriter(tmp_path, shards, create=False)
    ShardWriter(tmp_path, shards, create=True).close()
    ShardWriter(tmp_path, shards, create=False).close()
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="expected"):
        ShardWriter(tmp_path, shards, create=False)


def test_threads_write_at_once(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{n}", "U8", (5000,)) for n in range(24)]
    shards = lay_out(specs, max_shard_bytes=50_000)
    with ShardWriter(tmp_path, shards, create=True) as writer, Hasher(tmp_path, shards) as hasher:

        def work(part: int) -> None:
            for spec in specs[part::4]:
                writer.write(spec.name, payload(spec))
                writer.sync()
                hasher.done_tensor(spec.name)

        threads = [Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hashes = hasher.finish()
    for shard in shards:
        data = (tmp_path / shard.file).read_bytes()
        inside = {name: data[shard.begin[name] : shard.end[name]] for name in shard.begin}
        assert inside == {s.name: payload(s) for s in specs if s.name in inside}
        assert hashes[shard.file] == hashlib.sha256(data).hexdigest()


@settings(deadline=None, max_examples=40)
@given(specs=SPECS, data=st.data())
def test_hashes_in_any_order_of_completion(
    specs: list[TensorSpec], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hash")
    shards = lay_out(specs, max_shard_bytes=40)
    pieces = []
    for shard in shards:
        for name in shard.begin:
            middle = (shard.begin[name] + shard.end[name]) // 2
            pieces.append((shard.file, shard.begin[name], middle))
            pieces.append((shard.file, middle, shard.end[name]))
    pieces += data.draw(st.lists(st.sampled_from(pieces), max_size=3)) if pieces else []
    ShardWriter(folder, shards, create=True).close()
    with Hasher(folder, shards) as hasher:
        for file, begin, end in data.draw(st.permutations(pieces)):
            with (folder / file).open("r+b") as out:
                out.seek(begin)
                # A piece reported twice is final at the first time.
                out.write(random.Random(begin).randbytes(end - begin))
            hasher.done(file, begin, end)
        hashes = hasher.finish()
    assert hashes == {
        shard.file: hashlib.sha256((folder / shard.file).read_bytes()).hexdigest()
        for shard in shards
    }


def test_hashes_read_back_in_several_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurg.surgery.checkpoint.writer.HASH_BYTES", 100)
    specs = [TensorSpec("a", "U8", (1234,))]
    shards = lay_out(specs)
    write_all(tmp_path, shards, specs)
    with Hasher(tmp_path, shards) as hasher:
        hasher.done_tensor("a")
        found = hasher.finish()[shards[0].file]
    assert found == hashlib.sha256((tmp_path / shards[0].file).read_bytes()).hexdigest()


def test_hasher_reports_what_went_wrong(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "U8", (8,)), TensorSpec("b", "U8", (8,))]
    shards = lay_out(specs)
    with Hasher(tmp_path, shards) as hasher, pytest.raises(InputError, match="cannot be read back"):
        hasher.finish()
    write_all(tmp_path, shards, specs)
    with Hasher(tmp_path, shards) as hasher:
        hasher.done_tensor("b")
        with pytest.raises(ValueError, match="which has"):
            hasher.done("model.safetensors", 0, shards[0].size + 1)
        with pytest.raises(RuntimeError, match=f"byte {shards[0].begin['a']} of model.safetensors"):
            hasher.finish()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(shards[0].size - 1)
    with Hasher(tmp_path, shards) as hasher:
        hasher.done_tensor("a")
        hasher.done_tensor("b")
        with pytest.raises(InputError, match="ends early"):
            hasher.finish()
    with Hasher(tmp_path, shards):
        pass  # left without finish: the thread ends all the same


def test_the_disk_is_asked_early_for_all_but_the_last_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small writes are asked for together, wherever they lie, and never a length of zero, which means all the rest."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        writer_module.fs,
        "start_writeback",
        lambda _, offset, length: asked.append((offset, offset + length)),
    )
    size = writer_module.WRITEBACK // 4
    spec = TensorSpec("w", "U8", (16 * size,))
    shards = lay_out([spec])
    with ShardWriter(tmp_path, shards, create=True) as writer:
        for block in (0, 1, 2, 3, 4, 8, 9, 5):
            writer.write("w", bytes(size), offset=block * size)
        writer.write("w", bytes(4 * size), offset=12 * size)
    begin = shards[0].begin["w"]
    blocks = [((first - begin) / size, (last - begin) / size) for first, last in asked]
    assert blocks == [(0, 4), (4, 5), (8, 10), (5, 6), (12, 16)]

"""Reading what may be damaged or hostile: headers, indexes, configs and the links between them.

Whatever a folder holds, the only exception that leaves is ours, it names the culprit, and no file outside the
folder is opened.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.checkpoint.finite import first_non_finite
from moesurg.surgery.checkpoint.formats import MODEL
from moesurg.surgery.checkpoint.header import LFS_MAGIC, MAX_HEADER_BYTES, parse_json, read_header
from moesurg.surgery.checkpoint.reader import (
    TensorReader,
    contained,
    file_digest,
    open_checkpoint,
)
from moesurg.surgery.checkpoint.region import Region
from moesurg.surgery.errors import InputError, MoesurgError

Entry = dict[str, Any]


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any bytes as its header."""
    return struct.pack("<Q", len(header)) + header + data


def file_of(entries: dict[str, Entry], data: bytes) -> bytes:
    return raw_file(json.dumps(entries).encode(), data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors_file(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A well-formed file of float32 tensors."""
    entries, data = {}, b""
    for name, value in tensors.items():
        payload = value.astype("<f4").tobytes()
        entries[name] = entry("F32", list(value.shape), len(data), len(data) + len(payload))
        data += payload
    path.write_bytes(file_of(entries, data))
    return path


GOOD = file_of({"a": entry("F32", [2], 0, 8), "b": entry("BF16", [3], 8, 14)}, bytes(14))


def test_a_good_header_is_read_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"b": entry("BF16", [3], 8, 14), "__metadata__": {"format": "pt"}}
    path.write_bytes(file_of({**header, "a": entry("F32", [2], 0, 8)}, bytes(14)))
    found = read_header(path)
    assert list(found) == ["a", "b"]
    assert found["a"].shape == (2,)
    assert found["a"].dtype == "F32"
    assert found["b"].end == path.stat().st_size
    assert found["b"].begin - found["a"].begin == 8


@pytest.mark.parametrize("shape", [[], [0], [3, 0, 2]])
def test_scalars_and_empty_tensors_are_fine(tmp_path: Path, shape: list[int]) -> None:
    path = tmp_path / "x.safetensors"
    size = 4 * int(np.prod(shape))
    path.write_bytes(file_of({"a": entry("F32", shape, 0, size)}, bytes(size)))
    assert read_header(path)["a"].shape == tuple(shape)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "truncated header": (GOOD[:20], "truncated inside its header"),
    "truncated data": (GOOD[:-1], "truncated"),
    "trailing bytes": (GOOD + b"x", "after its last tensor"),
    "huge header length": (struct.pack("<Q", 1 << 62) + b"{}", str(MAX_HEADER_BYTES)),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "no safetensors file"),
    "LFS pointer": (LFS_MAGIC + b".github.com/spec/v1\noid sha256:00\nsize 9\n", "LFS pointer"),
    "leading space": (raw_file(b' {"a":' + b" " * 8 + b"}"), "brace"),
    "array": (raw_file(b"[]"), "brace"),
    "no JSON": (raw_file(b"{nonsense}"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "NaN constant": (raw_file(b'{"a": NaN}'), "NaN is not JSON"),
    "infinite constant": (raw_file(b'{"a": -Infinity}'), "-Infinity is not JSON"),
    "deep nesting": (raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not valid JSON"),
    "long number": (raw_file(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate tensor": (
        raw_file(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "'a' occurs twice",
    ),
    "duplicate key inside": (
        raw_file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "'dtype' occurs twice",
    ),
    "metadata not text": (file_of({"__metadata__": {"n": 1}}, b""), "metadata"),
    "empty name": (file_of({"": entry("U8", [1], 0, 1)}, b"x"), "empty name"),
    "overlap": (
        file_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "'b' overlaps",
    ),
    "same bytes twice": (
        file_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)),
        "overlaps",
    ),
    "hole": (
        file_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3)),
        "'b' leaves a hole",
    ),
    "hole at the start": (file_of({"a": entry("U8", [1], 1, 2)}, bytes(2)), "leaves a hole"),
    "unknown type": (file_of({"a": entry("Q4", [2], 0, 1)}, b"x"), "unknown type 'Q4'"),
    "type not text": (file_of({"a": {**entry("U8", [1], 0, 1), "dtype": 3}}, b"x"), "unknown type"),
    "half a byte": (file_of({"a": entry("F4", [3], 0, 2)}, b"xx"), "fill bytes"),
    "wrong size": (file_of({"a": entry("F32", [2], 0, 4)}, bytes(4)), "needs 8 bytes"),
    "negative size": (file_of({"a": entry("U8", [-1], 0, 1)}, b"x"), "no list of sizes"),
    "size as text": (file_of({"a": {**entry("U8", [1], 0, 1), "shape": ["1"]}}, b"x"), "sizes"),
    "size as true": (file_of({"a": {**entry("U8", [1], 0, 1), "shape": [True]}}, b"x"), "sizes"),
    "size as float": (file_of({"a": {**entry("U8", [1], 0, 1), "shape": [1.0]}}, b"x"), "sizes"),
    "sizes that overflow": (
        file_of({"a": entry("U8", [1 << 40, 1 << 40], 0, 1)}, b"x"),
        "needs",
    ),
    "offsets reversed": (file_of({"a": entry("U8", [1], 1, 0)}, b"x"), "no byte range"),
    "three offsets": (
        file_of({"a": {**entry("U8", [1], 0, 1), "data_offsets": [0, 1, 2]}}, b"x"),
        "no byte range",
    ),
    "extra field": (file_of({"a": {**entry("U8", [1], 0, 1), "x": 1}}, b"x"), "exactly"),
    "missing field": (file_of({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "exactly"),
    "tensor as list": (file_of({"a": [1]}, b"x"), "exactly"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, expected = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_git_lfs_pointer_comes_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE["LFS pointer"][0])
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert "git lfs pull" in str(caught.value.hint)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_our_error(tmp_path_factory: Any, content: bytes) -> None:
    _read_anything(tmp_path_factory, content)


@given(st.binary(max_size=100), st.binary(max_size=20))
def test_any_header_raises_nothing_but_our_error(
    tmp_path_factory: Any, header: bytes, data: bytes
) -> None:
    _read_anything(tmp_path_factory, raw_file(header, data))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "BF16", "nope"]) | _JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _JSON,
    }
)


@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4),
    st.binary(max_size=40),
)
def test_near_valid_headers_raise_nothing_but_our_error(
    tmp_path_factory: Any, header: dict[str, Any], data: bytes
) -> None:
    _read_anything(tmp_path_factory, raw_file(json.dumps(header).encode(), data))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_one_flipped_byte_is_never_misread(tmp_path_factory: Any, at: int, flip: int) -> None:
    damaged = bytearray(GOOD)
    damaged[at] ^= flip
    found = _read_anything(tmp_path_factory, bytes(damaged))
    if found is not None:  # still well-formed: another name or type, or a payload byte
        assert max(info.end for info in found.values()) == len(GOOD)


def _read_anything(tmp_path_factory: Any, content: bytes) -> dict[str, Any] | None:
    path = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.safetensors"
    path.write_bytes(content)
    try:
        return dict(read_header(path))
    except MoesurgError as error:
        assert str(path) in str(error)
        return None


@given(st.binary(max_size=100) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_json_raises_nothing_but_our_error(content: bytes) -> None:
    try:
        found = parse_json(content, "config.json")
    except InputError as error:
        assert "config.json" in str(error)
    else:
        assert isinstance(found, dict)


# Folders


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards, away from a file that it must never read."""
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors_file(folder / "model-00001-of-00002.safetensors", {"a": np.ones(2)})
    tensors_file(folder / "model-00002-of-00002.safetensors", {"b": np.ones(3)})
    write_index(folder, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return folder


def write_index(folder: Path, **weight_map: Any) -> None:
    (folder / MODEL.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return caught.value


def test_a_sharded_folder_is_read(sharded: Path, opened: list[str]) -> None:
    found = open_checkpoint(sharded)
    assert set(found.tensors) == {"a", "b"}
    assert [path.name[:11] for path in found.files] == ["model-00001", "model-00002"]
    assert found.tensors["b"].file.name == "model-00002-of-00002.safetensors"
    assert outside(sharded, opened) == []


ESCAPES = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "sub/inside.safetensors",
    "./model-00001-of-00002.safetensors",
    "{parent}/outside.safetensors",
    "C:outside.safetensors",
    "C:\\outside.safetensors",
    "\\outside.safetensors",
    "..\\outside.safetensors",
    "\\\\server\\share\\outside.safetensors",
    "//server/share/outside.safetensors",
    "file:outside.safetensors",
    "a\0b.safetensors",
    "..",
    ".",
    "",
]


def outside(folder: Path, opened: list[str]) -> list[str]:
    """Paths that were opened beside the folder, in the test's own place."""
    inside = os.path.join(folder.resolve(), "")
    place = str(folder.resolve().parent)
    real = [os.path.realpath(path) for path in opened]
    return [path for path in real if path.startswith(place) and not path.startswith(inside)]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_cannot_point_out_of_its_folder(
    sharded: Path, opened: list[str], name: str
) -> None:
    name = name.replace("{parent}", str(sharded.parent))
    write_index(sharded, a=name, b="model-00002-of-00002.safetensors")
    opened.clear()
    message = str(refusal(sharded))
    assert "points outside the folder" in message or "no safetensors" in message
    assert outside(sharded, opened) == []


@pytest.mark.parametrize("file", ["config.json", MODEL.index, "model-00001-of-00002.safetensors"])
def test_a_link_cannot_lead_out_of_the_folder(sharded: Path, opened: list[str], file: str) -> None:
    moved = sharded.parent / f"moved-{file}"
    (sharded / file).rename(moved)
    (sharded / file).symlink_to(moved)
    opened.clear()
    assert "outside the folder" in str(refusal(sharded))
    assert outside(sharded, opened) == []


def test_a_link_within_the_folder_is_fine(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "first.safetensors")
    (sharded / "model-00001-of-00002.safetensors").symlink_to("first.safetensors")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b"}


def test_a_dangling_link_is_named(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "model-00001-of-00002.safetensors").symlink_to("gone.safetensors")
    assert "does not exist" in str(refusal(sharded))


def test_snapshots_of_the_hub_cache_may_link_to_their_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "c0").write_text("{}")
    tensors_file(blobs / "w0", {"a": np.ones(2)})
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    (snapshot / MODEL.single).symlink_to("../../blobs/w0")
    assert set(open_checkpoint(snapshot).tensors) == {"a"}
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "secret")
    assert "outside the folder" in str(refusal(snapshot))


def test_an_index_beside_a_single_file_is_ambiguous(sharded: Path) -> None:
    tensors_file(sharded / MODEL.single, {"a": np.ones(2)})
    assert "both" in str(refusal(sharded))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_read(tmp_path: Path, opened: list[str], name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    opened.clear()
    error = refusal(tmp_path)
    assert name in str(error)
    assert "save_pretrained" in str(error.hint)
    assert not any(path.endswith(name) for path in opened)


def test_a_tensor_of_the_index_must_be_in_its_file(sharded: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    write_index(sharded, a="model-00001-of-00002.safetensors", b=second, c=second)
    assert "'c' is in the index but not in the file" in str(refusal(sharded))


def test_a_tensor_of_a_file_must_be_in_the_index(sharded: Path) -> None:
    tensors_file(
        sharded / "model-00002-of-00002.safetensors", {"b": np.ones(3), "extra": np.ones(1)}
    )
    assert "'extra'" in str(refusal(sharded))


def test_a_tensor_must_be_in_the_file_the_index_says(sharded: Path) -> None:
    tensors_file(sharded / "model-00002-of-00002.safetensors", {"b": np.ones(3), "a": np.ones(2)})
    assert "which the index places in 'model-00001-of-00002" in str(refusal(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in str(refusal(sharded))


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_bad_index_is_refused(sharded: Path, index: str) -> None:
    (sharded / MODEL.index).write_text(index)
    assert MODEL.index in str(refusal(sharded))


@pytest.mark.parametrize("config", ["", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1} x'])
def test_a_bad_config_is_refused(sharded: Path, config: str) -> None:
    (sharded / "config.json").write_text(config)
    assert "config.json" in str(refusal(sharded))


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "no such folder" in str(refusal(tmp_path / "absent"))
    assert "config.json: no such file" in str(refusal(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "has neither" in str(refusal(tmp_path))
    (tmp_path / MODEL.single).mkdir()
    assert "not a regular file" in str(refusal(tmp_path))


@given(st.text(max_size=20))
def test_no_name_leads_outside(tmp_path_factory: Any, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        path = contained(folder, name)
    except InputError:
        return
    except (OSError, ValueError) as error:  # pragma: no cover
        raise AssertionError(f"{name!r} raised {error!r}") from error
    assert path.parent == folder


# A model and its weights


@pytest.fixture
def model_folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a random mixture that may be damaged."""
    import shutil

    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> None:
    """Change a folder's tensors, keeping the file well-formed."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / MODEL.single)
    change(tensors)
    tensors_file(folder / MODEL.single, tensors)


def model_refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Model.open(folder)
    return str(caught.value)


def test_a_whole_model_opens(model_folder: Path, opened: list[str]) -> None:
    assert Model.open(model_folder).experts == 8
    assert outside(model_folder, opened) == []


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_wrong_shape_is_held_against_the_config(model_folder: Path) -> None:
    rewrite(model_folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.copy()}))
    message = model_refusal(model_folder)
    assert EXPERT in message
    assert "[32, 24]" in message
    assert "[24, 32]" in message


def test_a_missing_tensor_is_named(model_folder: Path) -> None:
    rewrite(model_folder, lambda tensors: tensors.__delitem__(EXPERT))
    assert f"tensor {EXPERT!r} is missing" in model_refusal(model_folder)


def test_an_extra_tensor_is_named(model_folder: Path) -> None:
    extra = "model.layers.1.mlp.extra.weight"
    rewrite(model_folder, lambda tensors: tensors.update({extra: np.ones(2)}))
    assert f"{extra!r} is not part" in model_refusal(model_folder)


def test_weights_that_are_no_numbers_are_refused(model_folder: Path) -> None:
    data = (model_folder / MODEL.single).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header[EXPERT]["dtype"] = "I32"
    (model_folder / MODEL.single).write_bytes(file_of(header, data[start:]))
    assert "stored as I32" in model_refusal(model_folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_as_it_is_read(
    model_folder: Path, value: float
) -> None:
    def damage(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        changed = tensors[EXPERT].copy()
        changed[2, 5] = value
        tensors[EXPERT] = changed

    rewrite(model_folder, damage)
    model = Model.open(model_folder)  # headers alone cannot tell
    with TensorReader(model.checkpoint) as reader:
        with pytest.raises(InputError) as caught:
            reader.read(model.whole(EXPERT))
        assert EXPERT in str(caught.value)
        assert f"element {2 * 32 + 5} of {24 * 32}" in str(caught.value)
        reader.read(Region(EXPERT, (2, 32)))  # the rows before it are fine
        with pytest.raises(InputError, match=f"element {2 * 32 + 5} of"):
            reader.read(Region(EXPERT, (2, 32), offset=64))


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)]
)
def test_the_scan_finds_exactly_what_is_not_finite(dtype: str, kind: torch.dtype) -> None:
    """Every number of sixteen bits; of 32 bits those with every sign, exponent and end of a mantissa."""
    high = torch.arange(1 << 16)
    if kind == torch.float32:
        bits = torch.cat([(high << 16) | low for low in (0, 1, 0xFFFF)])
        values = bits.to(torch.int32).view(kind)
    else:
        values = high.to(torch.int16).view(kind)
    data = values.view(torch.uint8).numpy().tobytes()
    width = values.element_size()
    found, start = [], 0
    while (bad := first_non_finite(data[start * width :], dtype)) is not None:
        found.append(start + bad)
        start += bad + 1
        if len(found) == 300:
            break
    assert found == torch.nonzero(~values.isfinite()).flatten()[: len(found)].tolist()
    assert found
    good = values[values.isfinite()].view(torch.uint8).numpy().tobytes()
    assert first_non_finite(good, dtype) is None
    assert all(
        first_non_finite(value.view(torch.uint8).numpy().tobytes(), dtype) == 0
        for value in values[~values.isfinite()].split(1)
    )


def test_reading_equals_the_reference_library(model_folder: Path) -> None:
    from safetensors.torch import load_file

    expected = load_file(model_folder / MODEL.single)
    model = Model.open(model_folder)
    with TensorReader(model.checkpoint) as reader:
        for name, tensor in expected.items():
            found = reader.read(model.whole(name))
            assert found.dtype == tensor.dtype
            assert found.equal(tensor)
        with pytest.raises(InputError, match="'absent' is missing"):
            reader.read(Region("absent", (1,)))


def test_a_file_that_shrinks_is_an_error_and_no_crash(model_folder: Path) -> None:
    model = Model.open(model_folder)
    last = max(model.checkpoint.tensors.values(), key=lambda info: info.end)
    os.truncate(model_folder / MODEL.single, last.end - 4)
    with TensorReader(model.checkpoint) as reader, pytest.raises(InputError, match="ended inside"):
        reader.read(model.whole(last.name))


def test_digests_name_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        file_digest(tmp_path / "absent")

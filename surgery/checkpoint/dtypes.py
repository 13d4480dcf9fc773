"""The element types of the safetensors format, by the names its headers use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of one element. A tensor of a sub-byte type must fill whole bytes."""

# safetensors lays tensors out by its own ordering of types, widest first; ties break by name.
RANK = {
    name: rank
    for rank, name in enumerate(
        (
            "BOOL",
            "F4",
            "F6_E2M3",
            "F6_E3M2",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "F8_E5M2FNUZ",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "C64",
            "F64",
            "I64",
            "U64",
        )
    )
}

FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
"""Types whose tensors the surgery computes with."""

_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on disk.

    Raises:
        InputError: an unknown type, or a sub-byte tensor that does not end on a byte.
    """
    if dtype not in BITS:
        raise InputError(f"unknown tensor type {dtype!r}; known are {', '.join(BITS)}")
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    if bits % 8:
        raise InputError(f"a tensor of type {dtype} and shape {list(shape)} does not fill bytes")
    return bits // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a header's type name.

    Raises:
        InputError: torch has no such type.
    """
    import torch

    if dtype not in _TORCH:
        raise InputError(f"tensors of type {dtype} cannot be computed with")
    found: torch.dtype = getattr(torch, _TORCH[dtype])
    return found


def name_of(dtype: torch.dtype) -> str:
    """The header's type name of a torch type."""
    short = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH.items():
        if torch_name == short:
            return name
    raise InputError(f"torch type {dtype} has no safetensors name")

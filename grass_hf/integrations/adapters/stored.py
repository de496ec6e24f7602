"""Bits of tensors, and safetensors files written one tensor at a time.

safetensors itself writes a file from tensors that are all in memory. Its format is a length, a JSON header and the
tensors' bytes in the header's order (https://huggingface.co/docs/safetensors), so with the header of a file kept, the
file can be written again byte for byte from tensors that come one by one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Integers that hold the bits of a dtype of that many bytes, and their safetensors names.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers, which compare and combine exactly whatever they stand for (NaNs, -0)."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def digest(tensor: Tensor, dtype: str) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes.

    Args:
        tensor: any.
        dtype: its safetensors name.
    """
    state = hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())
    state.update(_bytes(tensor))
    return state.hexdigest()


def read_header(path: Path) -> str:
    """The header of a safetensors file as it stands, padding included."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode("utf-8")


def layout(header: str) -> Iterator[str]:
    """Names of a header's tensors in the order of their bytes."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return iter(sorted(entries, key=lambda name: (entries[name]["data_offsets"], name)))


def write(path: Path, header: str, tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of a given header, asking for one tensor at a time.

    Args:
        path: of the file.
        header: as `read_header` gives it.
        tensor: called with each name, in the order of the bytes.
    """
    encoded = header.encode("utf-8")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in layout(header):
            file.write(_bytes(tensor(name)))


@dataclass(frozen=True)
class Entry:
    """A tensor of integers that is to be written: its dtype and shape now, its values when their turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_entries(path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    """Write a safetensors file of entries, one in memory at a time."""
    # wide dtypes first, so that every tensor starts at a multiple of its element size
    names = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in names:
        entry = entries[name]
        end = start + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header)
    padded = text + " " * (-len(text.encode()) % 8)
    write(path, padded, lambda name: entries[name].make())


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = bits(tensor).reshape(-1).numpy()  # a buffer, which numpy tells to Python from 3.12 on only
    return memoryview(values).cast("B") if tensor.numel() else memoryview(b"")

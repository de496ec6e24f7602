"""Counting live tensor bytes: every storage once, from the operation that made it to its last reference.

A dispatch mode sees what every operation returns, in forward, backward (the autograd engine runs CPU nodes on the
calling thread) and optimizer alike. A weak reference to each storage tells when it is freed. Nothing is rounded: an
allocator's blocks, and what a kernel allocates inside itself, come on top.

[Note: what lives at the peak] A storage shows what it was only later: a gradient is known once it is some
parameter's ``.grad``, an activation by outliving the forward pass that made it. So all storages of a step are
recorded with the times of their birth and death, and sorted afterwards into those that lived at the peak.

[Note: tensors made of tensors] A DTensor or a quantised weight has no memory of its own: the tensors inside it have.
Operations on such a tensor are left to its class, whose own operations on what is inside are counted.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from ...integrations.simulation import replaced, resizes_told

ACTIVATIONS, LOGITS, TEMPORARIES, COMMUNICATION = "activations", "logits", "temporaries", "communication"
_COLLECTIVES = ("c10d", "_c10d_functional")

_NEVER = float("inf")
# What a fake tensor answers when Python asks for its value: gradients are finite, norms are not zero. Whole numbers get
# no answer: they count things (the tokens of an expert), and an invented count would be an invented estimate.
_ANSWERS = {torch.bool: True, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0, torch.float64: 1.0}


@dataclass(slots=True, eq=False)
class _Forward:
    """One forward pass, or the recomputation of a part of one; times are counts of operations."""

    end: float = _NEVER


@dataclass(slots=True, eq=False)
class _Storage:
    nbytes: int
    born: int
    forward: _Forward | None
    kind: str | None = None
    died: float = _NEVER
    reference: weakref.ref | None = None

    def sort(self) -> str:
        if self.kind is not None:
            return self.kind
        return ACTIVATIONS if self.forward is not None and self.died > self.forward.end else TEMPORARIES


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered, of real tensors and of fake ones.

    Enter it inside a `FakeTensorMode`, if there is one, so that it sees the operations first.

    Args:
        vocabulary: size of the last dimension by which logits are recognised; None for none.

    Attributes:
        bytes: live now.
        peak: the most that was live at the end of an operation since `start`.
    """

    def __init__(self, vocabulary: int | None = None):
        super().__init__()
        self.vocabulary = vocabulary
        self.bytes = 0
        self.peak = 0
        self._peak_at = 0
        self._clock = 0
        self._forward: _Forward | None = None
        self._paused = False
        self._live: dict[int, _Storage] = {}
        self._history: list[_Storage] = []

    def start(self) -> None:
        """Forget what is dead, and look for a new peak."""
        self._history = list(self._live.values())
        self.peak, self._peak_at = self.bytes, self._clock
        self._clock += 1

    def mark(self, tensors: Iterable[Any], kind: str) -> None:
        """Say what the storages of some tensors are; those that were made elsewhere are counted from now on."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for inner in plain_tensors(tensor):
                    self._see(inner, kind)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass or a recomputation: what it makes and leaves behind are activations."""
        outer, self._forward = self._forward, _Forward()
        try:
            yield
        finally:
            self._forward.end = self._clock
            self._forward = outer

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """An optimizer's step: what it compiles (torchao's 8-bit ones) runs as it is, and is not counted.

        A compiled function makes one pass over its tensors, and under a counter nothing can be compiled.
        """

        def compile_(function: Callable, **options: Any) -> Callable:
            @functools.wraps(function)
            def uncounted(*args: Any, **kwargs: Any) -> Any:
                before, self._paused = self._paused, True
                try:
                    return function(*args, **kwargs)
                finally:
                    self._paused = before

            return uncounted

        with replaced(torch, "compile", compile_):
            yield

    def at_peak(self) -> dict[str, int]:
        """Bytes that lived at the peak by kind; their sum is `peak`."""
        found: dict[str, int] = {}
        for storage in self._history:
            if storage.born <= self._peak_at < storage.died:
                kind = storage.sort()
                found[kind] = found.get(kind, 0) + storage.nbytes
        return found

    def most_of(self, kinds: Iterable[str]) -> dict[str, int]:
        """Bytes by kind where these kinds together took most, since `start`."""
        kinds = set(kinds)
        storages = [(storage, storage.sort()) for storage in self._history]
        events = [
            (time, sign * storage.nbytes, sign, kind)
            for storage, kind in storages
            if kind in kinds
            for time, sign in ((storage.born, 1), (storage.died, -1))
        ]
        now, found = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
        for _, nbytes, _, kind in sorted(events, key=lambda event: (event[0], event[2])):  # deaths first
            now[kind] += nbytes
            if sum(now.values()) > sum(found.values()):
                found = dict(now)
        return found

    def __enter__(self):
        self._told = resizes_told(self._resized)
        self._told.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._told.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(_is_made_of_tensors, types)):
            return NotImplemented  # see [Note: tensors made of tensors]
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]) and args[0].dtype in _ANSWERS:
            return _ANSWERS[args[0].dtype]
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if func.namespace in _COLLECTIVES:
            self._sent(args)
        if self.bytes > self.peak:
            self.peak, self._peak_at = self.bytes, self._clock
        # only now: what is freed from here on lived at this operation's end
        self._clock += 1
        return out

    def _see(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        record = self._live.get(key)
        if record is None:
            record = _Storage(storage.nbytes(), self._clock, self._forward)
            if self.vocabulary is not None and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                record.kind = LOGITS
            # the callback must not keep this mode's storages, nor the storage itself, alive
            record.reference = weakref.ref(storage, lambda _: self._free(key))
            self._live[key] = record
            self._history.append(record)
            self.bytes += record.nbytes
        if kind is not None:
            record.kind = kind

    def _sent(self, tensors: Any) -> None:
        """Buffers that travel, unless they are something else besides."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                record = self._live.get(tensor.untyped_storage()._cdata)
                if record is not None and record.kind is None:
                    record.kind = COMMUNICATION

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """From now on it has another size: one record ends, and the next one begins."""
        before = self._live.get(storage._cdata)
        if before is None or before.nbytes == storage.nbytes():
            return
        before.died, before.kind = self._clock, before.kind or COMMUNICATION  # a layer that is gathered for a while
        after = _Storage(storage.nbytes(), self._clock, self._forward, before.kind, reference=before.reference)
        self._live[storage._cdata] = after
        self._history.append(after)
        self.bytes += after.nbytes - before.nbytes

    def _free(self, key: int) -> None:
        record = self._live.pop(key)
        record.died = self._clock
        self.bytes -= record.nbytes


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of, where it has no memory of its own; else itself."""
    if not _is_made_of_tensors(type(tensor)):
        yield tensor
        return
    flattened: Any = tensor
    for inner in (getattr(tensor, name) for name in flattened.__tensor_flatten__()[0]):
        if isinstance(inner, Tensor):  # a DTensor counts its mesh in
            yield from plain_tensors(inner)


@functools.cache
def _is_made_of_tensors(kind: type) -> bool:
    return is_traceable_wrapper_subclass_type(kind)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)

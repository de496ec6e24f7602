"""What Grass needs to know of other ranks: one collective, and where a sharded tensor's own part begins.

FSDP2 keeps parameters as DTensors sharded on their first dimension, in the chunks of `torch.chunk`. Rows are chosen
by blocks that match these chunks (`selection.bounds`), so every rank writes back and reloads its own rows, and the
norms are all that ever travels.

DeepSpeed's ZeRO-3 leaves parameters empty between their uses; their shape is then their attribute ``ds_shape``, and
this rank's run of their elements ``ds_tensor``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .selection import bounds

if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard
else:  # a torch that was built without: nothing is ever sharded

    class DTensor: ...  # type: ignore[no-redef]  # nothing is one


# How long a rank waits for the others before it says that they are missing.
AGREEMENT_SECONDS = 45.0
_checks: Counter[tuple[str, str]] = Counter()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes that train together: all, or those of a group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(vectors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Add up each tensor over all ranks, or those of a group, in one all-reduce.

    Every rank must pass tensors of the same shapes in the same order. The sum is bit-identical on every rank,
    which is what lets ranks select the same rows without exchanging them.
    """
    if world_size(group) == 1 or not vectors:
        return vectors
    flat = torch.cat([v.flatten() for v in vectors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([v.numel() for v in vectors])
    return [part.view_as(v) for part, v in zip(parts, vectors, strict=True)]


def check_agreement(
    what: str, digest: str, timeout: float = AGREEMENT_SECONDS, *, group: dist.ProcessGroup | None = None
) -> None:
    """Check that every rank says the same, through the process group's store and not by a collective, which would hang
    where a rank does not join.

    Args:
        what: names the check; every rank makes it equally often.
        digest: what this rank says.
        timeout: seconds to wait for the others.
        group: of the ranks that must agree, None for all.

    Raises:
        RuntimeError: a rank says something else, or nothing; on every rank that takes part.
    """
    if world_size(group) == 1 or dist.get_backend(group) == "fake":  # an estimator's: the other ranks are not there
        return
    store, own = dist.distributed_c10d._get_default_store(), dist.get_rank()
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)  # None is not for torch 2.6
    check = (what, _brief(str(ranks)))
    _checks[check] += 1
    # torchrun may keep the store when it restarts its workers, with what those before them said
    key = "/".join(["grass", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), *check, str(_checks[check])])
    # Every rank reads a few bytes of every other, and the whole of one only to say where it differs.
    brief = _brief(digest)
    store.set(f"{key}/whole/{own}", digest)
    store.set(f"{key}/{own}", brief)
    keys = [f"{key}/{rank}" for rank in ranks]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except (RuntimeError, dist.DistStoreError) as error:
        missing = next((rank for rank, its in zip(ranks, keys, strict=True) if not store.check([its])), own)
        raise RuntimeError(
            f"rank {missing} of {len(ranks)} has not begun {what} with Grass within {timeout:.0f} s: start every rank "
            "with the same command, optimizer and model."
        ) from error
    for rank, said in zip(ranks, store.multi_get(keys), strict=True):
        if said.decode() != brief:
            other = store.get(f"{key}/whole/{rank}").decode()
            raise RuntimeError(
                f"rank {own} and rank {rank} disagree on {what} with Grass: {_difference(digest, other)}. "
                "Start every rank with the same settings and model."
            )


def _brief(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _difference(ours: str, theirs: str) -> str:
    pairs = itertools.zip_longest(ours.split("; "), theirs.split("; "), fillvalue="nothing")
    mine, other = next((a, b) for a, b in pairs if a != b)
    return f"{mine!r} here, {other!r} there"


def refuse_join() -> None:
    """Stop within torch's `Join` (accelerate's `join_uneven_inputs`); to be called in a forward pass under DDP.

    A rank that has run out of batches takes part there in what DDP sends and in nothing else: it neither adds up norms
    nor counts steps, so ranks would train other rows from then on.

    Raises:
        ValueError: the model is run by a DDP that waits for ranks without batches.
    """
    running = nn.parallel.DistributedDataParallel._active_ddp_module
    if running is None:
        return
    _wrappers.add(running)
    if running._join_config.enable:
        raise ValueError(
            "join_uneven_inputs (torch.distributed.algorithms.Join) leaves ranks that run out of batches without a "
            "part in the selection of rows: use accelerate's even_batches=True or drop_last=True instead, so that all "
            "ranks take equally many steps."
        )


def forget_residuals() -> None:
    """Drop what communication hooks keep to add it to the next gradients, after slices have taken other rows.

    PowerSGD sends a gradient of low rank, and adds the rest of it to the next step's gradient at the same place (error
    feedback). Another row has that place now.
    """
    for wrapper in list(_wrappers):
        for _, state in wrapper._comm_hooks:
            getattr(state, "error_dict", {}).clear()


# the DDP modules that have run a converted model
_wrappers: weakref.WeakSet[nn.parallel.DistributedDataParallel] = weakref.WeakSet()


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that DeepSpeed's ZeRO-3 has split up, which is empty between its uses."""
    return hasattr(tensor, "ds_tensor")


def shape_of(tensor: Tensor) -> torch.Size:
    """Shape of a tensor, also of one that ZeRO-3 has left empty."""
    return getattr(tensor, "ds_shape", tensor.shape)


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Have parameters whole that ZeRO-3 has split up, by a collective that every rank must join."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, by a collective that every rank must join; an ordinary tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor sharded as another is, which may be on the meta device, of this rank's part of it; no collective."""
    assert isinstance(tensor, DTensor)
    place = (tensor.device_mesh, tensor.placements)
    return DTensor.from_local(own, *place, run_check=False, shape=tensor.shape, stride=tensor.stride())


def shards(tensor: Tensor) -> int:
    """Number of parts that a tensor's first dimension is split into."""
    return _place(tensor)[0]


def shard_range(tensor: Tensor) -> tuple[int, int]:
    """First and last (exclusive) row of this rank's part of a tensor.

    Raises:
        ValueError: it is sharded in another way than FSDP2's.
    """
    count, number = _place(tensor)
    return bounds(tensor.shape[0], count)[number]


def _place(tensor: Tensor) -> tuple[int, int]:
    if not isinstance(tensor, DTensor):
        return 1, 0
    along = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(along) > 1 or any(tensor.placements[dim] != Shard(0) for dim in along):
        raise ValueError(
            f"a parameter is placed as {tensor.placements}: grass-hf runs with fully_shard's own placement (rows over "
            "one dimension of the mesh, replicas over another), not with tensor parallelism."
        )
    if not along:
        return 1, 0
    mesh = tensor.device_mesh
    return mesh.size(along[0]), mesh.get_local_rank(along[0])

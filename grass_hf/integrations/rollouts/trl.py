"""TRL's trainers that generate with a vLLM server: with a Grass optimizer they send what changed.

GRPO and others synchronise in `VLLMGeneration.sync_weights`, AsyncGRPO in `WeightTransferClient.send_weights`; both
send every parameter. A server that was started with

    --weight-transfer-config '{"backend": "sparse_nccl"}'

takes vLLM's sparse patches (`grass_hf.integrations.rollouts.vllm`) over the connection that TRL has opened: the first
synchronisation sends everything, the others what a `WeightDelta` gives. Any other server is sent everything, as TRL
does it, which is said once. Whole weights are never gathered for patches; the first rank gathers those of the others.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.utils import logging

from ...convert.conversion import converted_part
from ...convert.record import conversion_of
from ...optim.delta_tensors import plain_tensors
from ...optim.weight_delta import WeightDelta
from ...slices.ops.grouping import groups_by_size
from ...slices.ops.sharding import world_size
from ..marks import is_marked, marked
from .vllm import chunks, patch_of, sparse_engine

logger = logging.get_logger(__name__)

_SPARSE = "sparse_nccl"
_FAILED = "a synchronisation with the vLLM server failed"
# Bytes of weights whose patches are gathered at a time from ranks that have shards of them.
_GATHERED = 2**28

Triple = tuple[str, Tensor | None, Tensor]


class PatchStream:
    """Patches of one synchronisation, made as they are asked for; every rank must read it to its end.

    Args:
        delta: of the trained model.
        device: on which the patches are wanted.
        is_known: whether the server has what the synchronisation before sent.
    """

    def __init__(self, delta: WeightDelta, device: torch.device, is_known: bool):
        self.delta, self._device, self._is_known = delta, device, is_known

    def __iter__(self) -> Iterator[Any]:
        """vLLM's ``SparseWeightPatch``, each name once; none on ranks but the first."""
        delta = self.delta
        tensors, _ = plain_tensors(delta.model)
        # TRL sends no buffers, and loaders of vLLM's models know none
        known = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
        given = delta.patches() if self._is_known else delta.full()
        found = [triple for triple in given if triple[0] in known]
        make = sparse_engine().SparseWeightPatch
        for name, indices, values in found if world_size() == 1 else self._gathered(found, list(tensors)):
            indices = None if indices is None else indices.to(self._device)
            yield patch_of(make, name, indices, values.to(self._device), delta.shape(name))

    def failed(self) -> None:
        """What the server has of it is not known."""
        self.delta.all_changed(_FAILED)

    def _gathered(self, found: list[Triple], names: list[str]) -> Iterator[Triple]:
        """The same of all ranks on the first one, some tensors at a time."""
        own = {name: (indices, values) for name, indices, values in found}
        for group in groups_by_size(names, lambda name: self.delta.shape(name).numel(), _GATHERED):
            mine = {name: tuple(t if t is None else t.cpu() for t in own[name]) for name in group if name in own}
            everyone: list[Any] | None = [None] * world_size() if dist.get_rank() == 0 else None
            dist.gather_object(mine, everyone)
            for name in group:
                parts = [part[name] for part in everyone or [] if name in part]
                if parts:
                    yield name, *_joined(parts)


def _joined(parts: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor | None, Tensor]:
    if not parts[1:]:
        return parts[0]
    return torch.cat([indices for indices, _ in parts if indices is not None]), torch.cat(
        [values for _, values in parts]
    )


class Everything:
    """All parameters as patches, for a model without slices: before conversion, after `restore_model`, of AdamW.

    Args:
        walk: gives them by the names that vLLM knows; every rank walks.
    """

    def __init__(self, walk: Callable[[], Iterable[tuple[str, Tensor]]]):
        self._walk = walk

    def __iter__(self) -> Iterator[Any]:
        for name, param in self._walk():
            yield patch_of(sparse_engine().SparseWeightPatch, name, None, param.detach(), param.shape)

    def failed(self) -> None:
        """Nothing is known of the server anyway."""


def stream_for(
    model: nn.Module, device: torch.device, client: Any, walk: Callable[[], Iterable[tuple[str, Tensor]]], place: Any
) -> PatchStream | Everything | None:
    """What to send a server, None for all parameters as TRL does it; every rank must ask.

    Args:
        model: that is trained, or a wrapper around it.
        device: of the trainer.
        client: of TRL's, of the server; None on ranks but the first, and where there is no server.
        walk: gives all parameters.
        place: of TRL, keeps what the server answered.
    """
    kept = vars(place)
    if "grass_backend" not in kept:
        kept["grass_backend"] = broadcast_object_list([_backend(client)], from_process=0)[0]
    backend, converted = kept["grass_backend"], converted_part(model)
    if backend != _SPARSE:
        if converted is not None and backend is not None:
            logger.warning_once(
                f"Every synchronisation sends all weights: the vLLM server's weight transfer is {backend!r}. Start it "
                f'with --weight-transfer-config \'{{"backend": "{_SPARSE}"}}\', and Grass sends what has changed.'
            )
        return None
    conversion = None if converted is None else conversion_of(converted)
    link = conversion.driver() if conversion is not None and conversion.driver is not None else None
    if converted is None or link is None or hasattr(model, "merge_adapter"):  # which changes all weights
        kept.pop("grass_delta", None)
        return Everything(walk)
    is_known = (delta := kept.get("grass_delta")) is not None and delta.conversion is conversion
    if not is_known:
        delta = kept["grass_delta"] = WeightDelta(converted, link.optimizer)
    return PatchStream(delta, device, is_known)


def send(stream: PatchStream | Everything, url: str, communicator: Any) -> None:
    """Send patches to a server, over the connection that TRL has opened, by vLLM's own trainer engine."""
    clients: Any = importlib.import_module("vllm.distributed.weight_transfer.clients")
    client = clients.HTTPVLLMWeightSyncClient(url)
    engine = sparse_engine().SparseNCCLTrainerWeightTransferEngine(client=client)
    engine.model_update_group = communicator
    try:
        client.start_weight_update()
        for group in chunks(stream):
            engine.send_weight_chunk(group)
        client.finish_weight_update()
    except BaseException:
        stream.failed()
        raise


def extend_generation(generation: ModuleType) -> None:
    """Have the trainers that synchronise by `VLLMGeneration` send what changed."""
    cls = generation.VLLMGeneration
    original = cls.sync_weights
    if is_marked(original):
        return

    @functools.wraps(original)
    @torch.no_grad()  # it is called within a training step, and what it reads of weights is in no loss
    def sync_weights(self) -> None:
        main, stream = self.accelerator.is_main_process, None
        if self.mode == "server":
            client = self.vllm_client if main else None
            stream = stream_for(self.model, self.accelerator.device, client, self._iter_named_params, self)
        if stream is None:
            original(self)
        elif main:
            send(stream, self.vllm_client.base_url, self.vllm_client.communicator)
            self.vllm_client.reset_prefix_cache()
        else:
            for _ in stream:
                pass

    cls.sync_weights = marked(sync_weights)


def extend_async(trainer_module: Any) -> None:
    """Have AsyncGRPO send what changed, and else the parameters of the plain model."""
    from ..trl_callbacks import plain_walk

    cls, client = trainer_module.AsyncGRPOTrainer, trainer_module.WeightTransferClient
    streaming, sending = cls._streaming_iter, client.send_weights
    if is_marked(streaming):
        return
    trainer_module._iter_vllm_named_params = plain_walk(trainer_module._iter_vllm_named_params)

    @functools.wraps(streaming)
    def _streaming_iter(self) -> Iterable[Any]:
        transfer = self.weight_transfer
        theirs = transfer.vllm if isinstance(transfer, client) else None  # others take tensors by name
        walk = functools.partial(streaming, self)
        stream = stream_for(self.model, self.accelerator.device, theirs, walk, self)
        return streaming(self) if stream is None else stream

    @functools.wraps(sending)
    def send_weights(self, iterator: Iterable[Any]) -> None:
        if not isinstance(iterator, (PatchStream, Everything)):
            sending(self, iterator)
        elif self.model_update_group is not None:
            send(iterator, self.vllm.server_url, self.model_update_group)

    cls._streaming_iter, client.send_weights = marked(_streaming_iter), send_weights


def _backend(client: Any) -> str | None:
    """Of a server's weight transfer, as it says itself."""
    config = None if client is None else client.get_server_info().get("weight_transfer_config")
    return None if config is None else config["backend"]

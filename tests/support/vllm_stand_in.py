"""A server with vLLM's weight transfer over HTTP, and what of vLLM and of TRL's client talks to it, for a CPU.

vLLM cannot be installed here, and NCCL wants GPUs. The routes, the fields of the messages and the checks are vLLM
0.33's; tensors travel through a queue in place of NCCL. `use` puts the stand-ins where TRL and grass_hf look for them.
"""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import requests
import torch
from accelerate import PartialState
from torch import Tensor


class Communicator(queue.Queue):
    """In place of vLLM's ``PyNcclCommunicator``: what is broadcast comes out at the other end, as other memory."""

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        assert tensor.is_contiguous() and src == 0
        self.put(tensor.detach().clone())


@dataclass
class SparseWeightPatch:
    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


class SparseNCCLTrainerWeightTransferEngine:
    """The trainer's side: announces a chunk, and broadcasts indices and values."""

    def __init__(self, *, client, source=None, is_sender=True):
        assert source is None
        self.client, self.model_update_group = client, None

    def send_weight_chunk(self, patches) -> None:
        patches = list(patches)
        for patch in patches:
            assert patch.indices.dtype == torch.int32 and patch.indices.ndim == patch.values.ndim == 1
            assert patch.indices.numel() == patch.values.numel()
        info = {
            "names": [patch.name for patch in patches],
            "dtype_names": [str(patch.values.dtype).split(".")[-1] for patch in patches],
            "shapes": [list(patch.full_shape) for patch in patches],
            "num_updates_list": [patch.indices.numel() for patch in patches],
        }
        for patch in patches:
            self.model_update_group.broadcast(patch.indices, src=0)
            self.model_update_group.broadcast(patch.values, src=0)
        self.client.update_weights(info)


class HTTPVLLMWeightSyncClient:
    def __init__(self, base_url: str, timeout: float = 300):
        self.base_url = base_url

    def _post(self, path: str, payload: dict | None = None) -> None:
        requests.post(f"{self.base_url}/{path}", json=payload).raise_for_status()

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update")


class Server:
    """A rollout engine: a model of transformers that is sent weights.

    Attributes:
        model: whose parameters are the server's weights.
        communicator: through which they come.
        syncs: elements that each synchronisation sent.
    """

    def __init__(self, model: torch.nn.Module, backend: str | None):
        self.model, self.backend, self.communicator = model.eval(), backend, Communicator()
        self.syncs: list[int] = []
        self.refuses = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def info(self) -> dict:
        transfer = None if self.backend is None else {"backend": self.backend}
        settings = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
        return {"vllm_config": {"weight_transfer_config": transfer, "model_config": settings}}

    def get(self, path: str) -> dict:
        known = {"/health": {}, "/v1/models": {"data": [{"id": "model"}]}, "/server_info": self.info}
        return known[path.partition("?")[0]]

    @torch.no_grad()
    def post(self, path: str, message: dict) -> dict:
        if path == "/start_weight_update":
            self.syncs.append(0)
        if path == "/update_weights":
            info, weights = message["update_info"], dict(self.model.named_parameters())
            if self.refuses or ("num_updates_list" in info) != (self.backend == "sparse_nccl"):
                raise ValueError("this engine does not take that")
            assert info["names"] and len(set(info["names"])) == len(info["names"])
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                weight, values = weights[name], self.communicator.get(timeout=30)
                assert list(weight.shape) == shape
                if "num_updates_list" in info:
                    indices, values = values, self.communicator.get(timeout=30)
                    assert indices.unique().numel() == indices.numel() and int(indices.max()) < math.prod(shape)
                    weight.view(-1)[indices.long()] = values
                else:
                    weight.copy_(values)
                assert str(values.dtype) == f"torch.{dtype}"
                self.syncs[-1] += values.numel()
        return {}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], count: int, most: int) -> dict:
        """`count` replies to each prompt, drawn from the server's weights."""
        replies = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            drawn = self.model.generate(
                ids,
                do_sample=True,
                num_return_sequences=count,
                max_new_tokens=most,
                attention_mask=torch.ones_like(ids),
            )
            replies += drawn[:, len(prompt) :].tolist()
        logprobs = [[[0.0]] * len(reply) for reply in replies]
        return {"prompt_ids": prompts, "completion_ids": replies, "logprobs": logprobs}

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(lambda: server.get(self.path))

            def do_POST(self):
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(lambda: server.post(self.path, json.loads(text or "{}")))

            def _answer(self, make):
                try:
                    code, found = 200, make()
                except Exception as error:
                    code, found = 400, {"error": repr(error)}
                body = json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        return Handler


def use(monkeypatch, server: Server) -> None:
    """Let TRL's trainers find the server: its own client, but for NCCL; and grass_hf vLLM's modules."""
    import trl.generation.vllm_client as theirs
    import trl.generation.vllm_generation as generation

    parts = {
        "sparse_nccl_engine": (SparseWeightPatch, SparseNCCLTrainerWeightTransferEngine),
        "clients": (HTTPVLLMWeightSyncClient,),
    }
    for name, classes in parts.items():
        module = ModuleType(name)
        vars(module).update({cls.__name__: cls for cls in classes})
        monkeypatch.setitem(sys.modules, f"vllm.distributed.weight_transfer.{name}", module)
    for module in (theirs, generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)

    class Client(theirs.VLLMClient):
        def init_communicator(self, device=0):
            self.communicator = server.communicator

        def update_named_params(self, metadata, named_params):
            names, dtypes, shapes = (list(field) for field in zip(*metadata, strict=True))
            self._start_weight_update()
            send_dense(server, named_params)
            info = {"names": names, "dtype_names": dtypes, "shapes": shapes}
            self._post(f"{self.base_url}/update_weights", json={"update_info": info})
            self._finish_weight_update()

        def generate(self, prompts, n=1, max_tokens=16, **_):
            return server.generate(prompts, n, max_tokens)

    monkeypatch.setattr(generation, "VLLMClient", Client)


def send_dense(server: Server, named_params) -> None:
    for _, tensor in named_params:
        server.communicator.broadcast(tensor.contiguous(), src=0)


def accelerator() -> SimpleNamespace:
    """As much of one as a synchronisation asks for."""
    PartialState()  # TRL's loggers want it
    return SimpleNamespace(
        is_main_process=True,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
        unwrap_model=lambda model: model,
    )

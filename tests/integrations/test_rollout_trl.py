"""TRL's trainers and a vLLM server: what changed is sent where the server takes it, else everything, said once."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl.generation.vllm_generation")

from trl_runs import model_for, trainer_of
from vllm_stand_in import Server, accelerator, send_dense, use

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.integrations import registration
from grass_hf.slices.ops.bits import as_bits

SERVED = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False}
QUARTER = "density=0.25,update_interval=2"


@pytest.fixture
def serve(monkeypatch):
    """A server of some backend; TRL and grass_hf find it."""
    servers = []

    def start(model, backend="sparse_nccl"):
        servers.append(Server(copy.deepcopy(model), backend))
        for weight in servers[-1].model.parameters():  # it is to be sent them
            weight.data.zero_()
        use(monkeypatch, servers[-1])
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def assert_served(server, model) -> None:
    """The server has the plain model's parameters, bit for bit."""
    whole = model.state_dict()
    for name, weight in server.model.named_parameters():
        assert torch.equal(as_bits(weight.data), as_bits(whole[name])), name


def run_grpo(tmp_path, server, model, **options):
    """A GRPO run over the server; how often what it served was compared with the trained weights."""
    given = {"optim_args": QUARTER, "max_steps": 5, "vllm_server_base_url": server.url, **SERVED, **options}
    run = trainer_of("grpo", tmp_path, model, **given)
    sync, compared = run.vllm_generation.sync_weights, []

    def sync_weights():
        sync()
        assert_served(server, run.model)
        compared.append(run.state.global_step)

    run.vllm_generation.sync_weights = sync_weights
    run.train()
    return run, compared


@pytest.mark.parametrize("tied, bf16", [(True, True), (False, False)])
def test_grpo_sends_what_changed(tmp_path, serve, caplog, tied, bf16):
    model = model_for("grpo", tied).to(torch.bfloat16 if bf16 else torch.float32)
    server = serve(model)
    _, compared = run_grpo(tmp_path, server, model, bf16=bf16)
    total = sum(weight.numel() for weight in server.model.parameters())
    assert compared == [0, 1, 2, 3, 4] and server.syncs[0] == total
    assert len(server.syncs) == 5 and all(0 < count < 0.7 * total for count in server.syncs[1:])
    assert "sends all weights" not in caplog.text


def test_another_server_is_sent_everything_and_that_is_said_once(tmp_path, serve, caplog):
    model = model_for("grpo")
    server = serve(model, "nccl")
    _, compared = run_grpo(tmp_path, server, model)
    assert compared == [0, 1, 2, 3, 4]
    assert set(server.syncs) == {sum(weight.numel() for weight in server.model.parameters())}
    said = [record for record in caplog.records if "sends all weights" in record.getMessage()]
    assert len(said) == 1 and """'nccl'. Start it with --weight-transfer-config '{"backend": "sparse_nccl"}'""" in (
        said[0].getMessage()
    )


def test_without_grass_nothing_is_another(tmp_path, serve, caplog):
    model = model_for("grpo")
    server = serve(model, "nccl")
    _, compared = run_grpo(tmp_path, server, model, optim="adamw_torch", optim_args=None)
    assert len(compared) == 5 and "sends all weights" not in caplog.text


def test_a_model_without_slices_is_sent_whole(tmp_path, serve):
    """Before training, by AdamW, and after `restore_model`, over the server that takes patches only."""
    model = model_for("grpo")
    server = serve(model)
    run, compared = run_grpo(tmp_path, server, model, optim="adamw_torch", optim_args=None)
    assert len(compared) == 5 and len(set(server.syncs)) == 1
    server = serve(model)
    run, compared = run_grpo(tmp_path, server, model, max_steps=2)
    restore_model(run.model)
    run.vllm_generation.sync_weights()
    total = sum(weight.numel() for weight in server.model.parameters())
    assert server.syncs[0] == server.syncs[-1] == total > max(server.syncs[1:-1])


def test_what_a_server_refuses_comes_again(tmp_path, serve):
    model = model_for("grpo")
    server = serve(model)
    run, _ = run_grpo(tmp_path, server, model, max_steps=2)
    server.refuses = True
    with pytest.raises(Exception, match="400"):
        run.vllm_generation.sync_weights()
        model.model.norm.weight.data += 1
        run.vllm_generation.sync_weights()
    server.refuses = False
    server.communicator.queue.clear()
    run.vllm_generation.sync_weights()
    assert_served(server, run.model)


def async_trainer(monkeypatch, server, model):
    """As much of AsyncGRPO as synchronises, over its own code and its own client."""
    import trl.experimental.async_grpo.async_grpo_trainer as theirs
    import trl.experimental.async_grpo.weight_transfer as transfer
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    monkeypatch.setattr(transfer, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(transfer, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    sender = lambda iterator, **_: send_dense(server, iterator)  # noqa: E731
    monkeypatch.setattr(transfer, "packed_nccl_broadcast_producer", sender, raising=False)
    monkeypatch.setattr(VLLMClient, "pause", lambda self, timeout=0: None)
    monkeypatch.setattr(VLLMClient, "resume", lambda self, timeout=0: None)
    named = list(theirs._iter_vllm_named_params(model))
    info = {
        "names": [name for name, _ in named],
        "dtype_names": [str(param.dtype).split(".")[-1] for _, param in named],
        "shapes": [list(param.shape) for _, param in named],
    }
    trainer = object.__new__(theirs.AsyncGRPOTrainer)
    client = transfer.WeightTransferClient(VLLMClient(server.url), info)
    client.model_update_group = server.communicator
    vars(trainer).update(
        accelerator=accelerator(), model=model, weight_transfer=client, rollout_worker=None, model_version=0
    )
    return trainer


@pytest.mark.parametrize("backend", ["sparse_nccl", "nccl"])
def test_async_grpo(monkeypatch, serve, backend):
    """Its list of parameters is made before the model is converted, and leaves frozen ones out."""
    model = model_for("grpo").to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    server = serve(model, backend)
    server.model.model.norm.weight.data.copy_(model.model.norm.weight)  # TRL never sends it
    trainer = async_trainer(monkeypatch, server, model)
    convert_to_grass(model, GrassConfig(density=0.25, update_interval=2))
    optimizer = grass_optimizer(model, lr=1e-3)
    for _ in range(4):
        trainer._sync_weight_merged(0.0)
        assert_served(server, model)
        ids = torch.randint(3, 9, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    total = sum(weight.numel() for weight in server.model.parameters() if weight.requires_grad)
    if backend == "nccl":
        assert set(server.syncs) == {total}
    else:
        assert server.syncs[0] >= total and all(0 < count < 0.7 * total for count in server.syncs[1:])


def test_another_transfer_of_async_grpo_is_given_parameters(monkeypatch, serve):
    """TRL lets one pass a transfer of one's own, which takes tensors by their names."""
    model = model_for("grpo")
    names = [name for name, _ in model.named_parameters()]
    trainer = async_trainer(monkeypatch, serve(model), model)
    convert_to_grass(model, GrassConfig(density=0.25))
    grass_optimizer(model, lr=1e-3)
    given = []
    trainer.weight_transfer = SimpleNamespace(
        pause=lambda: None, resume=lambda: None, send_weights=lambda iterator: given.extend(iterator)
    )
    trainer._sync_weight_merged(0.0)
    assert [name for name, _ in given] == names


@pytest.mark.parametrize("int8", [True, False])
def test_online_dpo_sends_the_weights(monkeypatch, int8):
    import trl.experimental.online_dpo.online_dpo_trainer as theirs

    model = model_for("grpo")
    plain = copy.deepcopy(model)
    convert_to_grass(model, GrassConfig(density=0.25, side="output", weight_dtype="int8" if int8 else None))
    sent = {}
    trainer = object.__new__(theirs.OnlineDPOTrainer)
    client = SimpleNamespace(update_named_param=lambda name, tensor: sent.update({name: tensor.clone()}))
    state = SimpleNamespace(is_main_process=True, state=SimpleNamespace(deepspeed_plugin=None))
    vars(trainer).update(model=model, vllm_mode="server", vllm_client=client, accelerator=state, is_fsdp_enabled=False)
    trainer._move_model_to_vllm_inner()
    assert list(sent) == [name for name, _ in plain.named_parameters()]
    whole = restore_model(model).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in sent.items())


def test_registration_is_done_once():
    import trl.experimental.async_grpo.async_grpo_trainer as theirs
    import trl.generation.vllm_generation as generation

    before = generation.VLLMGeneration.sync_weights, theirs.AsyncGRPOTrainer._streaming_iter
    registration.extend_trl_vllm(generation), registration.extend_trl_async(theirs)
    assert (generation.VLLMGeneration.sync_weights, theirs.AsyncGRPOTrainer._streaming_iter) == before
    assert logging.getLogger("grass_hf.integrations.rollouts.trl")

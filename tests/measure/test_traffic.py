"""What a step sends, from shapes: against closed forms, converted models, and torch's own counter of operations."""

import json

import pytest
import torch
from helpers import tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from grass_hf import GrassConfig, convert_to_grass
from grass_hf.convert.conversion import grass_slices
from grass_hf.measure.estimate.network_model import MEASURED_ERROR
from grass_hf.measure.estimate.traffic import KINDS, layers, ring_bytes, traffic


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50))


def mixtral():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, vocab_size=50, num_local_experts=4))


def test_adamw_sends_every_parameter():
    model = tiny_llama()
    total = 4 * sum(p.numel() for p in model.parameters())
    sent = traffic(model, None)
    buffers = sum(b.nbytes for b in model.buffers())
    assert sent.sent("ddp", 8) == dict(zip(KINDS, (total, 0, 0, buffers), strict=True))
    assert ring_bytes(sent.sent("ddp", 8), 8) == 2 * 7 / 8 * total


def test_grass_sends_r_of_m_rows_the_ordinary_parameters_and_a_norm_per_row():
    model, rank, interval = tiny_llama(), 8, 50
    targets = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    ordinary = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in targets)
    slices = sum(w.numel() * rank // w.shape[0] for w in targets)
    rows = sum(w.shape[0] for w in targets)
    sent = traffic(model, GrassConfig(rank=rank, side="output", update_interval=interval)).sent("ddp", 2)
    assert sent["all_reduce"] == 4 * (ordinary + slices + rows / interval)
    assert sent["reduce_scatter"] == sent["all_gather"] == 0


def test_fsdp2_gathers_layers_twice_and_the_root_once():
    model, rank = tiny_llama(), 8
    assert list(layers(model)) == ["model.layers.0", "model.layers.1"]
    inner = 4 * sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    root = 4 * sum(p.numel() for p in model.parameters()) - inner
    targets = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    slices = sum(4 * w.numel() * rank // w.shape[0] for w in targets)
    sent = traffic(model, None, "fsdp2").sent("fsdp2", 2)
    assert (sent["all_gather"], sent["reduce_scatter"]) == (2 * inner + root, inner + root)
    sent = traffic(model, GrassConfig(rank=rank, side="output"), "fsdp2").sent("fsdp2", 2)
    assert sent["all_gather"] == 2 * (inner + slices) + root
    assert sent["reduce_scatter"] == inner + root - sum(w.nbytes for w in targets) + slices
    scattered = ring_bytes(sent, 2, gloo=True) - ring_bytes(sent, 2)
    assert scattered == sent["reduce_scatter"] / 2
    padded = traffic(torch.nn.Linear(4, 6, bias=False), None, "fsdp2").sent("fsdp2", 4)
    assert padded["reduce_scatter"] == 8 * 4 * 4  # 6 rows in 4 equal parts


@pytest.mark.parametrize("make", [tiny_llama, gpt2, mixtral])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8, "side": "output"},
        {"density": 0.3, "side": "input"},
        {"rank": 8, "target_modules": "all-matrices", "side": "auto"},
        {"rank": 40, "side": "auto", "selection": "multinomial_norm"},
        {"rank": 8, "selection": "uniform_nr"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_what_the_conversion_makes(make, settings, dtype):
    config = GrassConfig(**settings)
    model = make().to(dtype)
    sent = traffic(model, config)
    convert_to_grass(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(slice_.gradient_bytes() for slice_ in sent.parts) == sum(p.nbytes for p in trained)
    assert sent.buffers == sum(b.nbytes for b in model.buffers())
    for slice_ in grass_slices(model):
        slice_.observe()
    observed = 0 if "uniform" in config.selection else sum(slice_.norms.nbytes for slice_ in grass_slices(model))
    assert sent.norms == observed
    if dtype == torch.float32:  # slices have the weights' dtype, as FSDP2 wants it
        gathered = sum(slice_.weight_bytes() for slice_ in sent.parts)
        assert gathered == sum(p.nbytes for p in model.parameters())


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(24, 32), torch.nn.Linear(32, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("config", [None, GrassConfig(rank=8, side="output"), GrassConfig(rank=8, side="input")])
def test_operations_are_those_that_torch_counts(config):
    model = Stack()
    expected = traffic(model, config).flops(10)
    if config is not None:
        convert_to_grass(model, config)
    x = torch.randn(10, 24, requires_grad=True)  # so that the first layer has a gradient of its input too
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == expected


def test_an_unknown_engine_gets_a_sentence():
    with pytest.raises(ValueError, match="engine='ddq' is not known: choose one of ddp, fsdp2"):
        traffic(tiny_llama(), None, "ddq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().config.save_pretrained(path)
    return path


def test_estimate_prints_steps_on_a_network(folder, command, tmp_path):
    words = ["--sequence", "16", "--rank", "8", "--dtype", "float32", "--world-size", "64", "--bandwidth", "8Mbit/s"]
    code, out, err = command("estimate", folder, *words, "--latency", "10us", "--json", tmp_path / "row.json")
    assert code == 0, err
    assert "speed-up" in out and "64 ranks, 8Mbit/s" in out and "compute takes no time" in out
    low, high = MEASURED_ERROR["fsdp2"]
    assert f"fsdp2 {low:+.0%} to {high:+.0%}" in " ".join(out.split())
    steps = json.loads((tmp_path / "row.json").read_text())["network"]["steps"]
    assert [(s["engine"], s["method"]) for s in steps] == [(e, m) for e in ("ddp", "fsdp2") for m in ("adamw", "grass")]
    adamw = steps[0]["sent"]["all_reduce"]
    assert adamw == 4 * sum(p.numel() for p in tiny_llama().parameters())
    # one bucket, and a broadcast of buffers before it
    broadcast = 6 * (10e-6 + steps[0]["sent"]["broadcast"] / 1e6)
    assert steps[0]["step"] == pytest.approx(2 * 63 * (10e-6 + adamw / 64 / 1e6) + broadcast)
    assert steps[1]["speed_up"] == pytest.approx(steps[0]["step"] / steps[1]["step"])
    words += ["--flops", "1G", "--tree", "--no-memory", "--json", tmp_path / "alone.json"]
    code, out, err = command("estimate", folder, *words)
    assert code == 0 and "a tree's hops" in out and "compute takes no time" not in out and "at the peak" not in out
    alone = json.loads((tmp_path / "alone.json").read_text())["network"]["steps"]
    assert [step["sent"] for step in alone] == [step["sent"] for step in steps] and alone[1]["compute"] > 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--no-memory"], "--no-memory leaves nothing to estimate: give --bandwidth"),
        (["--bandwidth", "25GB/s"], "--world-size 1 sends nothing: --bandwidth needs 2 or more"),
        (["--bandwidth", "25GB", "--world-size", "8"], "--bandwidth '25GB' is not a rate: write 25GB/s"),
        (["--bandwidth", "0GB/s", "--world-size", "8"], "--bandwidth '0GB/s' is not a rate"),
        (["--bandwidth", "1GB/s", "--world-size", "8", "--latency", "5"], "--latency '5' is not a time"),
        (["--bandwidth", "1GB/s", "--world-size", "8", "--step-time", "long"], "--step-time 'long' is not a time"),
        (["--bandwidth", "1GB/s", "--world-size", "8", "--flops", "fast"], "--flops 'fast' is not a speed"),
        (
            ["--bandwidth", "1GB/s", "--world-size", "8", "--flops", "1T", "--step-time", "1s"],
            "both say how long compute takes: keep one",
        ),
    ],
    ids=str,
)
def test_mistakes_get_a_sentence(folder, command, words, sentence):
    code, _, err = command("estimate", folder, "--sequence", "16", *words)
    assert code == 2 and sentence in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--ranks", "1"], "--ranks 1 sends nothing: give 2 or more"),
        (["--engine", "zero9"], "--engine zero9 is not known: choose among ddp, fsdp2"),
        (["--dtype", "int3"], "dtype='int3' is not known"),
        (["--rank", "1000"], "rank=1000 is above the selected side of every target"),
    ],
    ids=str,
)
def test_mistakes_of_bench_comm_get_a_sentence(folder, command, words, sentence):
    code, _, err = command("bench", "comm", folder, *words)
    assert code == 2 and sentence in err and "Traceback" not in err


def test_counted_bytes_are_the_expected_ones(folder, command, tmp_path):
    """Two processes over gloo; every kind of message of both engines and methods, within 1 %."""
    file = tmp_path / "rows.json"
    code, out, err = command("bench", "comm", folder, "--rank", "8", "--interval", "4", "--json", file)
    assert code == 0, err
    assert "counted / expected" in out and "selecting step" in out
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["setting"]["ranks"] == 2 and row["grass"]["rank"] == 8 and row["versions"]["torch"]
    found = {(c["engine"], c["method"]): c for c in row["counted"]}
    assert len(found) == 4
    for counted in found.values():
        for kind in KINDS:
            assert counted["mean"][kind] == pytest.approx(counted["expected"][kind], rel=0.01), (counted, kind)
    model, weights = tiny_llama(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weights.append(module.weight)
    total = sum(p.nbytes for p in model.parameters())
    shrunk = total - sum(w.nbytes * (1 - 8 / w.shape[0]) for w in weights)
    norms = sum(4 * w.shape[0] for w in weights)
    ddp = found["ddp", "grass"]
    assert ddp["ordinary"]["all_reduce"] == shrunk and ddp["selecting"]["all_reduce"] == shrunk + norms
    assert ddp["mean"]["all_reduce"] == shrunk + norms / 4
    assert found["ddp", "adamw"]["ordinary"]["all_reduce"] == total
    sharded = found["fsdp2", "grass"]
    assert sharded["ordinary"]["reduce_scatter"] == shrunk and sharded["ordinary"]["all_reduce"] == 0
    assert sharded["selecting"]["all_reduce"] == norms

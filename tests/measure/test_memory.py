"""The estimator against real training steps, and what it refuses."""

import pytest
import torch
from helpers import tiny_llama
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from grass_hf import GrassConfig, convert_to_grass, estimate_memory, grass_optimizer
from grass_hf.convert import conversion
from grass_hf.measure.bench.memory import PlainCounter
from grass_hf.measure.estimate.live_bytes import LiveBytes
from grass_hf.measure.estimate.memory import largest_rank
from grass_hf.measure.estimate.methods import METHODS, make_optimizer
from grass_hf.measure.estimate.simulate import _norms_of_the_last_blocks
from grass_hf.slices.ops import row_norms


def small_llama(layers=2):
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300, use_cache=False))


def real_peaks(model, config, batch, sequence, checkpointing, steps=3):
    """Peaks in bytes of real training steps, the first with an empty optimizer."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=int(checkpointing))
    convert_to_grass(model, config)
    optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (batch, sequence))
    known = [*model.parameters(), *model.buffers(), tokens]
    known += [slice_.state.trained for slice_ in optimizer.grass.slices]
    known += [slice_.norms for slice_ in optimizer.grass.slices if slice_.norms is not None]
    peaks = []
    counter = PlainCounter(*known)
    del known  # it would keep what a training loop lets go
    with counter:
        for _ in range(steps):
            counter.peak = 0
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(counter.peak)
    return peaks


SETTINGS = {
    "tiny, float32": (tiny_llama, {"rank": 8}, torch.float32, 2, 24, False),
    "small, input side": (small_llama, {"rank": 24, "side": "input"}, torch.float32, 2, 64, False),
    "small, all matrices": (
        small_llama,
        {"density": 0.5, "side": "output", "target_modules": "all-matrices"},
        torch.float32,
        1,
        16,
        False,
    ),
    "small, bfloat16": (small_llama, {"rank": 24}, torch.bfloat16, 2, 64, False),
    "small, pure bfloat16, checkpointing": (
        small_llama,
        {"rank": 64, "side": "output", "slice_dtype": "bfloat16"},
        torch.bfloat16,
        4,
        64,
        True,
    ),
    "small, all matrices, input side, checkpointing": (
        small_llama,
        {"rank": 48, "side": "input", "target_modules": "all-matrices"},
        torch.float32,
        2,
        128,
        True,
    ),
    "small, released slices": (
        small_llama,
        {"rank": 64, "resident": False, "target_modules": "all-matrices"},
        torch.bfloat16,
        1,
        16,
        False,
    ),
    "small, every second layer recomputed": (lambda: small_llama(4), {"rank": 24}, torch.float32, 2, 64, 2),
    "small, int8 weights": (
        small_llama,
        {"rank": 24, "side": "output", "weight_dtype": "int8"},
        torch.bfloat16,
        2,
        64,
        False,
    ),
    "small, released slices of int8 weights": (
        small_llama,
        {"rank": 64, "side": "output", "weight_dtype": "int8", "resident": False},
        torch.bfloat16,
        1,
        16,
        False,
    ),
    "small, few tokens": (small_llama, {"rank": 80, "side": "output"}, torch.bfloat16, 1, 4, False),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_estimate_is_what_a_real_run_holds(setting):
    make, options, dtype, batch, sequence, checkpointing = setting
    # the steps 0 and 2 observe, and only from the first on is there an optimizer state
    config = GrassConfig(update_interval=2, stagger=1, **options)
    name = str(dtype).removeprefix("torch.")
    shape = {"batch": batch, "sequence": sequence, "gradient_checkpointing": checkpointing}
    estimate = estimate_memory(make(), config, dtype=name, **shape)
    _, ordinary, observing = real_peaks(make().to(dtype), config, batch, sequence, checkpointing)
    assert estimate.step.total == pytest.approx(ordinary, rel=0.01)
    assert estimate.observing.total == pytest.approx(observing, rel=0.01)
    assert estimate.peak == pytest.approx(max(ordinary, observing), rel=0.01)


@pytest.mark.parametrize("options", [{"stagger": 3}, {"stagger": 3, "side": "output"}, {"stagger": 100}], ids=str)
def test_estimate_observes_in_the_turn_that_takes_most(options):
    config = GrassConfig(density=0.25, update_interval=16, **options)
    estimate = estimate_memory(small_llama(), config, batch=4, sequence=64)
    model = small_llama()
    peaks = real_peaks(model, config, 4, 64, False, steps=32)[16:]
    turns = {slice_.state.phase for slice_ in conversion.grass_slices(model)}
    assert len(turns) == min(options["stagger"], 4 * model.config.num_hidden_layers) < 16
    observing = [peak for step, peak in enumerate(peaks) if step in turns]
    ordinary = [peak for step, peak in enumerate(peaks) if step not in turns]
    assert estimate.step.total == pytest.approx(max(ordinary), rel=0.001)
    assert estimate.observing.total == pytest.approx(max(observing), rel=0.001)


def test_the_real_counters_agree_and_parts_sum_to_the_peak():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (2, 8))
    known = [*model.parameters(), *model.buffers(), tokens]
    with LiveBytes(vocabulary=300) as live, PlainCounter(*known) as counter:
        live.mark(known, "weights")
        live.start()
        model(input_ids=tokens, labels=tokens).loss.backward()
        live.mark((p.grad for p in model.parameters()), "gradients")
        optimizer.step()
        live.mark((v for state in optimizer.state.values() for v in state.values()), "optimizer_state")
    assert live.peak == counter.peak == sum(live.at_peak().values())
    weights = sum(p.nbytes for p in model.parameters())
    assert live.at_peak()["gradients"] == weights  # so short a batch peaks in the optimizer's step
    assert live.at_peak()["optimizer_state"] == 2 * weights + 4 * len(list(model.parameters()))


def test_a_model_is_left_as_it_is_and_a_factory_gives_the_same():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = GrassConfig(rank=8)
    estimate = estimate_memory(model, config, sequence=16)
    assert estimate == estimate_memory(tiny_llama, config, sequence=16)
    assert not hasattr(model, "grass") and model.model.embed_tokens.weight.device.type == "cpu"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_methods_hold_what_they_say():
    """Optimizer state of each method, from the shapes of the model."""
    model, rank = tiny_llama(), 8
    sizes = [p.numel() for p in model.parameters()]
    targets = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    others = sum(sizes) - sum(w.numel() for w in targets)
    low = sum(rank * max(w.shape) for w in targets)
    clocks = 4 * len(sizes)  # AdamW's step counters
    rows = GrassConfig(rank=rank, side="output")
    found = {m: estimate_memory(model, rows, method=m, sequence=16) for m in METHODS}
    state = {method: estimate.step.optimizer_state for method, estimate in found.items()}
    assert state["adamw"] == 8 * sum(sizes) + clocks
    assert state["grass"] == 8 * (others + sum(rank * w.shape[1] for w in targets)) + clocks
    assert state["frozen"] == 8 * others + 4 * (len(sizes) - len(targets))
    assert state["lora"] == sum(8 * rank * sum(w.shape) + 2 * 4 for w in targets)
    assert state["apollo"] == 8 * (others + low)
    assert state["galore"] == state["apollo"] + 4 * sum(rank * min(w.shape) for w in targets)
    assert [m for m, estimate in found.items() if estimate.computed] == ["galore", "apollo"]
    assert found["lora"].step.weights == found["adamw"].step.weights + 4 * rank * sum(sum(w.shape) for w in targets)
    assert found["grass"].step.slices > 0 and found["grass"].observing is not None
    assert all(e.step.slices == 0 and e.observing is None for m, e in found.items() if m != "grass")
    assert found["frozen"].peak < found["grass"].peak < found["adamw"].peak


def test_8bit_state_is_that_of_the_real_optimizer():
    model = small_llama()
    estimate = estimate_memory(model, method="adamw8bit", sequence=16)
    optimizer = make_optimizer("adamw8bit", model, GrassConfig(), torch.optim.AdamW, {})
    tokens = torch.randint(300, (1, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    real = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert estimate.step.optimizer_state == real


def test_input_side_keeps_less_and_checkpointing_least():
    def activations(**options):
        return estimate_memory(
            tiny_llama, GrassConfig(rank=8, side=options.pop("side", "output")), batch=4, sequence=64, **options
        ).step.activations

    assert activations() > activations(side="input") > activations(gradient_checkpointing=True)


def test_any_loss_will_do():
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    estimate = estimate_memory(model, GrassConfig(density=0.5), loss=lambda m: m(torch.ones(16, 64)).square().mean())
    weights = sum(p.nbytes for p in model.parameters())
    assert estimate.step.weights == weights and estimate.step.logits == 0
    # the norms of a layer of 16 tokens take more than its gradient: blocks of it in float32 live meanwhile
    assert estimate.peak == estimate.observing.total > estimate.step.total > weights


def test_a_layer_with_a_forward_of_its_own_counts_as_in_training():
    """Falcon's linear layer is tried on two tokens, and fake tensors have no values to compare."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    model = FalconForCausalLM(FalconConfig(**shape, use_cache=False))
    config = GrassConfig(density=0.25, update_interval=2, stagger=1)
    estimate = estimate_memory(model, config, batch=2, sequence=16)
    _, ordinary, observing = real_peaks(model, config, 2, 16, False)
    assert estimate.step.total == pytest.approx(ordinary, rel=0.01)
    assert estimate.observing.total == pytest.approx(observing, rel=0.01)


@pytest.mark.parametrize("rows, columns", [(1100, 300), (300, 1100), (512, 512), (700, 700), (100, 90), (257, 40)])
def test_the_norms_of_the_last_blocks_take_as_much_as_all(rows, columns):
    """The simulation leaves blocks out that take no more than others."""
    a, b = torch.randn(16, rows), torch.randn(16, columns)

    def peak(function):
        with LiveBytes() as live:
            live.mark([a, b], "weights")
            live.start()
            assert function(a, b).shape == (rows,)
        return live.peak

    assert peak(_norms_of_the_last_blocks) == peak(row_norms.squared_norms) > a.nbytes + b.nbytes


def test_storages_are_counted_as_they_are_resized():
    with LiveBytes() as live:
        tensor = torch.ones(1000)
        live.start()
        assert live.bytes == 4000
        tensor.untyped_storage().resize_(0)
        other = torch.ones(100)
        assert live.bytes == 400
        tensor.untyped_storage().resize_(4000)
        other += 1
        assert live.peak == 4400 and sum(live.at_peak().values()) == 4400
        assert live.most_of(["temporaries"]) == {"temporaries": 400}
        del tensor
        assert live.bytes == 400


@pytest.mark.parametrize("budget, rank", [(1000, 90), (999, 89), (110, 1), (5000, 400)])
def test_largest_rank_that_fits(budget, rank):
    tried = []

    def peak_of(r):
        tried.append(r)
        return 100 + 10 * r + (r > 200) * 900  # with a step in it

    assert largest_rank(peak_of, budget, 400) == (rank, peak_of(rank))
    assert len(tried) < 12


def test_no_rank_fits():
    assert largest_rank(lambda r: 100 + r, 100, 50) is None


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x[x > 0].view(-1, 8))


@pytest.mark.parametrize(
    "model, options, sentence",
    [
        (tiny_llama, {"method": "galor"}, "did you mean galore"),
        (tiny_llama, {"batch": 0}, "batch=0 is not a positive whole number"),
        (tiny_llama, {"dtype": "int8"}, "dtype='int8' is not known"),
        (tiny_llama, {"sequence": 10**6}, "longer than the model's max_position_embeddings"),
        (tiny_llama, {"config": GrassConfig(rank=10**6)}, "rank=1000000 is above the selected side"),
        (Branches, {}, "no language model of transformers: give loss="),
        (Branches, {"loss": lambda m: m(torch.ones(4, 8)).sum()}, "decides by the values of tensors"),
        (Branches, {"loss": lambda m: 0, "gradient_checkpointing": True}, "Branches has none: leave it out"),
        (tiny_llama, {"gradient_checkpointing": -2}, "gradient_checkpointing=-2 is not a positive whole number"),
    ],
)
def test_mistakes_get_a_sentence(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate_memory(model, **options)


def tiny_mixtral():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**shape, use_cache=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_trained_in_full_counts_as_in_training(dtype):
    model = tiny_mixtral()
    estimate = estimate_memory(model, method="adamw", dtype=dtype, batch=2, sequence=64)
    model = model.to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(50, (2, 64))
    with PlainCounter(*model.parameters(), *model.buffers(), tokens) as counter:
        for _ in range(2):
            counter.peak = 0
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert estimate.peak == pytest.approx(counter.peak, rel=0.001)


def test_counts_of_tokens_per_expert_are_not_invented():
    model = tiny_mixtral()
    with pytest.raises(ValueError, match="decides by the values of tensors"):
        estimate_memory(model, GrassConfig(rank=8), dtype="bfloat16", sequence=16)

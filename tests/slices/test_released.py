"""resident=False: slices without memory between steps train as resident ones do, bit for bit."""

import copy

import pytest
import torch
from helpers import assert_same_weights, plain_state, tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.optim.chunked_step import step_in_chunks
from grass_hf.optim.driving import plain_class

TOKENS = torch.arange(24).view(2, 12)


def run(resident: bool, optimizer_class=torch.optim.AdamW, steps: int = 8, dtype=torch.float32, model=None, **settings):
    model = (model or tiny_llama()).to(dtype)
    options = {"density": 0.25, "update_interval": 3, **settings}
    convert_to_grass(model, GrassConfig(resident=resident, **options))
    optimizer = grass_optimizer(model, optimizer_class, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def slice_bytes(model) -> int:
    return sum(slice_.active.untyped_storage().nbytes() for slice_ in grass_slices(model))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"side": "output", "target_modules": "all-matrices"},
        {"side": "output", "selection": "top_r", "state_policy": "carry"},
        {"selection": "uniform_nr", "state_policy": "reset_warmup"},
        {"stagger": 100, "decay": "active"},
        {"dtype": torch.bfloat16, "slice_dtype": "bfloat16"},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "default",
)
def test_a_released_slice_trains_as_a_resident_one(optimizer_class, settings, monkeypatch):
    monkeypatch.setattr("grass_hf.optim.chunked_step.CHUNK_BYTES", 2000)  # several chunks, some of one slice
    ours, _ = run(False, optimizer_class, **settings)
    theirs, _ = run(True, optimizer_class, **settings)
    assert_same_weights(ours, theirs)
    parts = list(grass_slices(ours))
    assert (
        all(slice_.is_released for slice_ in parts) and slice_bytes(ours) == len(parts) * parts[0].active.element_size()
    )
    assert_same_weights(restore_model(ours), restore_model(theirs))


def test_slices_exist_only_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr("grass_hf.optim.chunked_step.CHUNK_BYTES", 2000)
    model, optimizer = run(False, steps=1)
    held = []
    original = plain_class(optimizer).step

    def step(self, *args, **kwargs):
        held.append(slice_bytes(model))
        return original(self, *args, **kwargs)

    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    parts = list(grass_slices(model))
    step_in_chunks(optimizer, lambda: step(optimizer), parts)
    empty = sum(slice_.active.element_size() for slice_ in parts)
    assert held[0] == empty and all(empty < bytes_held <= 2000 + 3 * 48 * 32 for bytes_held in held[1:])


def test_resumes_exactly_and_between_the_two_ways(tmp_path):
    whole, _ = run(False, steps=10)
    model, part_way = run(False, steps=5)
    torch.save(part_way.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    entry = next(e for e in state["state"].values() if "grass_active" in e)["grass_active"]
    assert entry.untyped_storage().nbytes() == entry.element_size()  # nothing is written twice
    for resident in (False, True):
        fresh = tiny_llama()
        fresh.load_state_dict(plain_state(model))
        convert_to_grass(fresh, GrassConfig(density=0.25, update_interval=3, resident=resident))
        resumed = grass_optimizer(fresh, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        resumed.load_state_dict(copy.deepcopy(state))
        for _ in range(5):
            fresh(input_ids=TOKENS, labels=TOKENS).loss.backward()
            resumed.step()
            resumed.zero_grad()
        assert_same_weights(fresh, whole)


def test_through_the_trainer_and_plain_checkpoints(tmp_path):
    args = "density=0.25,update_interval=3,base=adamw_torch"
    ours = trainer(tmp_path / "a", optim_args=args + ",resident=false", save_strategy="steps", save_steps=4)
    ours.train()
    theirs = trainer(tmp_path / "b", optim_args=args)
    theirs.train()
    assert_same_weights(ours.model, theirs.model)
    resumed = trainer(tmp_path / "a", optim_args=args + ",resident=false")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_same_weights(resumed.model, theirs.model)
    loaded = type(ours.model).from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1


def test_what_cannot_be_released_stops_with_a_sentence():
    with pytest.raises(ValueError, match="slice_dtype='float64' holds more or other digits"):
        convert_to_grass(tiny_llama(), GrassConfig(density=0.5, resident=False, slice_dtype="float64"))
    with pytest.raises(ValueError, match="use resident=True, or uniform_nr"):
        GrassConfig(resident=False, selection="uniform")
    with pytest.raises(ValueError, match="Counting keeps counters in its parameter groups"):
        run(False, Counting)

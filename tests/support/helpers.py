"""Tiny models, data and Trainer runs that the tests share."""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 48


def tiny_llama(**options) -> LlamaForCausalLM:
    """Two layers, 32 wide, non-square projections; the same weights at every call."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **options}))


class Sequences(Dataset):
    """Counting sequences with random starts: something a model can learn."""

    def __init__(self, count: int = 64, length: int = 12):
        starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
        self.tokens = (starts + torch.arange(length)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[item], "labels": self.tokens[item]}


def arguments(folder, **options) -> TrainingArguments:
    """Six steps of four sequences on the CPU, everything logged, nothing saved."""
    defaults = {
        "output_dir": str(folder),
        "optim": "grass",
        "optim_args": "density=0.25,update_interval=3,base=adamw_torch",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer(folder, model=None, trainer_options=None, **options) -> Trainer:
    """A Trainer over `tiny_llama` and `Sequences`."""
    extra = trainer_options or {}
    if "model_init" not in extra:
        extra = {"model": model if model is not None else tiny_llama()} | extra
    return Trainer(args=arguments(folder, **options), train_dataset=Sequences(), **extra)


def leave() -> None:
    """End a rank that has done its work: together with the others, and without the interpreter's own end.

    A thread of gloo's may hold the tensors of the last message for a moment after the call that sent it has returned,
    and frees them, for which it wants the interpreter. If that is about to end, the process is aborted: SIGABRT, now
    and then, on a busy machine (github.com/pytorch/pytorch/pull/179291). destroy_process_group() joins the threads only
    where nothing else, such as a DDP module, still refers to the group.
    """
    if dist.is_initialized():
        dist.barrier()  # rank 0 holds the store, which the others may still need
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def check_resumes(start, run) -> None:
    """Check that a run which is resumed in mid-interval goes on bit for bit: losses and weights.

    Args:
        start: makes a model and its optimizer.
        run: trains them the steps of these numbers, and returns the losses.
    """
    whole, optimizer = start()
    run(whole, optimizer, range(4))
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    expected = run(whole, optimizer, range(4, 8))
    resumed, optimizer = start()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert run(resumed, optimizer, range(4, 8)) == expected
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def plain_state(model) -> dict[str, torch.Tensor]:
    """A copy of the weights, under the names of an ordinary model."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_weights(ours, theirs, rtol: float = 0.0, atol: float = 0.0) -> None:
    ours, theirs = plain_state(ours), plain_state(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")

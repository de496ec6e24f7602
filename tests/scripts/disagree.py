"""Ranks that do not agree: disagree.py CASE. Every rank prints its error as "RANK: SENTENCE"."""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
import torch.distributed as dist
from helpers import tiny_llama, trainer

from grass_hf import GrassConfig, convert_to_grass, distributed, grass_optimizer

distributed.AGREEMENT_SECONDS = 5.0
distributed.check_agreement.__defaults__ = (5.0,)
case = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
start = time.monotonic()
try:
    if case == "config":
        trainer(sys.argv[2], optim_args=f"rank={8 - rank},base=adamw_torch")
    elif case == "model":
        trainer(sys.argv[2], tiny_llama(num_hidden_layers=1 + rank))
    elif case == "without":
        trainer(sys.argv[2], **({} if rank == 0 else {"optim": "adamw_torch", "optim_args": None}))
        if rank == 1:
            time.sleep(8)  # it would wait for the others somewhere in training
            raise RuntimeError("rank 1 trains without Grass")
    elif case == "loop":
        model = convert_to_grass(tiny_llama(), GrassConfig(rank=4, seed=rank))
        optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-3)
        tokens = torch.arange(8)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
except RuntimeError as error:
    assert time.monotonic() - start < 40
    sys.stdout.write(f"{rank}: {error}\n")  # in one piece, for the ranks share the terminal
    sys.stdout.flush()

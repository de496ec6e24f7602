"""Eight sequences a step on any number of ranks, under DDP: split_batch.py FILE SETTINGS. Rank 0 writes the outcome."""

import contextlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
import torch.distributed as dist
from helpers import VOCABULARY, plain_state, tiny_llama
from torch.nn.parallel import DistributedDataParallel

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer
from grass_hf.convert import grass_slices

options = json.loads(sys.argv[2])
accumulate, clip = options.pop("accumulate", 1), options.pop("clip", None)
bfloat16, checkpointing = options.pop("bfloat16", False), options.pop("checkpointing", False)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = tiny_llama()
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
convert_to_grass(model, GrassConfig(**{"density": 0.25, "update_interval": 3, **options}))
wrapped = DistributedDataParallel(model)
optimizer = grass_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
losses, chosen = [], []
for step in range(8):
    tokens = torch.randint(VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(step))
    own = tokens.chunk(ranks)[rank]
    total = torch.zeros(())
    for number, part in enumerate(own.chunk(accumulate)):
        wait = contextlib.nullcontext() if number == accumulate - 1 else wrapped.no_sync()
        with wait:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                loss = wrapped(input_ids=part, labels=part).loss / accumulate
            loss.backward()
        total += loss.detach()
    if clip:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    losses.append(total.item() / ranks)
    chosen.append([part.index.clone() for part in grass_slices(model)])
if rank == 0:
    outcome = {"ranks": ranks, "losses": losses, "chosen": chosen, "weights": plain_state(model)}
    torch.save(outcome, sys.argv[1])
# A rank that closes its connections while another is still busy may abort that one: all end together.
del wrapped
dist.barrier()
dist.destroy_process_group()

"""Evaluate, then train, on two ranks with batches of their own: evaluate_first.py FOLDER. Rank 0 says if they agree."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch
import torch.distributed as dist
from helpers import Sequences, leave, plain_state, trainer
from torch.nn.parallel import DistributedDataParallel

import grass_hf  # noqa: F401

job = trainer(sys.argv[1], trainer_options={"eval_dataset": Sequences(8)})
job.evaluate()
job.train()
weights = torch.cat([tensor.flatten() for tensor in plain_state(job.model).values()])
everyone = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(everyone, weights)
if dist.get_rank() == 0:
    wrapped = isinstance(job.model_wrapped, DistributedDataParallel)
    print("world", dist.get_world_size(), "wrapped", wrapped, "same", torch.equal(*everyone))
leave()

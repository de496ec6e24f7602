"""A Trainer with Grass under whatever engine launched it: prints its losses. fsdp_trainer.py SETTINGS [CHECKPOINT]

Beside those of `helpers.arguments`, "model" has settings of `helpers.tiny_llama`.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import torch.distributed as dist
from helpers import leave, tiny_llama, trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import grass_hf  # noqa: F401
from grass_hf.convert.conversion import grass_slices


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parts = list(grass_slices(model))
        if parts and all(isinstance(slice_.active, DTensor) and isinstance(slice_.weight, DTensor) for slice_ in parts):
            mesh = parts[0].active.device_mesh
            print(f"sharded over {mesh.size()} as {' x '.join(map(str, mesh.shape))}", flush=True)
        for slice_ in parts:
            assert slice_.rank_part(slice_, False).agrees(), slice_.state.name
        print(f"{len(parts)} slices agree with their weights", flush=True)


settings = json.loads(sys.argv[1])
folder, model = settings.pop("output_dir"), tiny_llama(**settings.pop("model", {}))
defaults = {"use_cpu": False, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
job = trainer(
    folder,
    model,
    trainer_options={"callbacks": [Look()]},
    **{**defaults, "per_device_train_batch_size": 2, **settings},
)
job.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
world = dist.get_world_size() if dist.is_initialized() else 1
assert job.args.world_size == world == int(os.environ.get("WORLD_SIZE", 1))
if job.is_world_process_zero():
    print("world", world)
    print("losses", json.dumps([entry["loss"] for entry in job.state.log_history if "loss" in entry]))
leave()

"""A Trainer with Grass under accelerate's DeepSpeed, on the CPU: prints its losses.

zero_trainer.py STAGE SETTINGS [CHECKPOINT], under `accelerate launch` with a DeepSpeed config. The setting "pretrained"
is a folder to load the model from, which under ZeRO-3 happens in pieces.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import cpu_fsdp  # noqa: F401  (lets accelerate start over gloo)
import deepspeed
import torch.distributed as dist
from helpers import Sequences, arguments, leave
from transformers import AutoModelForCausalLM, Trainer

import grass_hf  # noqa: F401
from grass_hf.convert.conversion import grass_slices

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel to compile

stage, settings = int(sys.argv[1]), json.loads(sys.argv[2])
folder, pretrained = settings.pop("output_dir"), settings.pop("pretrained")
defaults = {"use_cpu": False, "save_strategy": "steps", "save_steps": 4, "max_steps": 8, "adam_epsilon": 1e-2}
args = arguments(folder, **{**defaults, "per_device_train_batch_size": 2, **settings})
model = AutoModelForCausalLM.from_pretrained(pretrained)
assert all(hasattr(param, "ds_tensor") for param in model.parameters()) == (stage == 3)
job = Trainer(model=model, args=args, train_dataset=Sequences())
job.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
assert job.args.world_size == dist.get_world_size() > 1
assert job.deepspeed.zero_optimization_stage() == stage and len(list(grass_slices(job.model))) == 14
job.save_model(f"{folder}/final")
if job.is_world_process_zero():
    print("losses", json.dumps([entry["loss"] for entry in job.state.log_history if "loss" in entry]))
leave()

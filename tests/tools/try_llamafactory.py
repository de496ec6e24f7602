"""LLaMA-Factory's own command, full finetuning, from a YAML file."""

import json
from pathlib import Path

import yaml
from checks import assert_trained
from shared import DENSITY, SETTINGS, chats, run, script, tiny_llama

model = tiny_llama(Path("model"))
chats(Path("chats.jsonl"))
columns = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
about = {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": columns}
Path("dataset_info.json").write_text(json.dumps({"chats": about}))
config = {
    "model_name_or_path": str(model),
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset_dir": ".",
    "dataset": "chats",
    "template": "default",
    "cutoff_len": 32,
    "output_dir": "out",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "optim": "grass",
    "optim_args": SETTINGS,
}
Path("run.yaml").write_text(yaml.safe_dump(config))
said = run([script("grass-hf"), "run", script("llamafactory-cli"), "train", "run.yaml"])
assert_trained(model, Path("out"), said, Path("out"))
assert_trained(model, Path("out/checkpoint-2"), said, Path("out"))

# processes that it starts itself by torchrun, and settings as a mapping
config["optim_args"] = {"density": DENSITY, "update_interval": 200, "exclude_modules": ["lm_head"]}
config["output_dir"] = "ranks"
Path("ranks.yaml").write_text(yaml.safe_dump(config))
command = [script("grass-hf"), "run", script("llamafactory-cli"), "train", "ranks.yaml"]
said = run(command, FORCE_TORCHRUN="1", NPROC_PER_NODE="1")
assert "Initializing 1 distributed tasks" in said, said
assert_trained(model, Path("ranks"), said, Path("ranks"))

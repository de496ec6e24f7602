"""ms-swift's own command with our file of plugins: it starts a process of its own."""

from pathlib import Path

import yaml
from checks import assert_trained
from shared import DENSITY, SETTINGS, chats, run, script, tiny_llama

model = tiny_llama(Path("model"))
chats(Path("chats.jsonl"))
plugin = run([script("python"), "-m", "grass_hf.integrations.ms_swift"]).strip()
config = {
    "model": str(model),
    "model_type": "llama",
    "template": "dummy",
    "tuner_type": "full",
    "external_plugins": [plugin],
    "optimizer": "grass",
    "optim": "adamw_torch",
    "optim_args": {"density": DENSITY, "update_interval": 200, "exclude_modules": ["lm_head"]},
    "dataset": ["chats.jsonl"],
    "split_dataset_ratio": 0,
    "output_dir": "out",
    "add_version": False,
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "weight_decay": 0,
    "logging_steps": 1,
    "save_steps": 2,
    "torch_dtype": "float32",
    "bf16": False,
    "report_to": "none",
    "use_cpu": True,
    "use_hf": True,
    "check_model": False,
    "attn_impl": "sdpa",
}
Path("run.yaml").write_text(yaml.safe_dump(config))
said = run([script("swift"), "sft", "run.yaml"])
assert_trained(model, Path("out/checkpoint-2"), said, Path("out"))

# settings as flags
config = {key: value for key, value in config.items() if key not in ("optim_args", "output_dir", "optim")}
Path("flags.yaml").write_text(yaml.safe_dump(config))
said = run([script("swift"), "sft", "flags.yaml", "--optim_args", SETTINGS, "--output_dir", "out_flags"])
assert_trained(model, Path("out_flags/checkpoint-2"), said, Path("out_flags"))

# without a plugin, where the name is known before the arguments are checked
config = {key: value for key, value in config.items() if key not in ("external_plugins", "optimizer")}
Path("named.yaml").write_text(yaml.safe_dump({**config, "optim": "grass"}))
command = [script("grass-hf"), "run", script("swift"), "sft", "named.yaml"]
said = run([*command, "--optim_args", SETTINGS, "--output_dir", "out_named"])
assert_trained(model, Path("out_named/checkpoint-2"), said, Path("out_named"))

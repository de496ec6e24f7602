"""axolotl's own command with our plugin: it starts a process of its own through accelerate."""

from pathlib import Path

import yaml
from checks import assert_trained
from shared import DENSITY, chats, run, script, tiny_llama

model = tiny_llama(Path("model"))
config = {
    "base_model": str(model),
    "plugins": ["grass_hf.integrations.axolotl.GrassPlugin"],
    "optimizer": "grass",
    "optim_args": {"density": DENSITY, "update_interval": 200, "exclude_modules": ["lm_head"], "stagger": 4},
    "datasets": [{"path": str(chats(Path("chats.jsonl"))), "type": "chat_template", "split": "train"}],
    "chat_template": "tokenizer_default",
    "dataset_prepared_path": "prepared",
    "output_dir": "out",
    "sequence_len": 32,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "num_epochs": 1,
    "learning_rate": 1.0e-2,
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "val_set_size": 0,
    "bf16": False,
    "tf32": False,
    "special_tokens": {"pad_token": "<pad>"},
}
Path("run.yaml").write_text(yaml.safe_dump(config))
said = run([script("axolotl"), "train", "run.yaml"])
assert_trained(model, Path("out"), said, Path("out"))
assert_trained(model, Path("out/checkpoint-2"), said, Path("out"))

# as text, and in one process
config |= {"optim_args": f"density={DENSITY},update_interval=200", "output_dir": "out_text"}
Path("text.yaml").write_text(yaml.safe_dump(config))
said = run([script("axolotl"), "train", "text.yaml", "--launcher", "python"])
assert_trained(model, Path("out_text"), said, Path("out_text"))

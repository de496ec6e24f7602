"""TRL's own command line, `trl sft`, which starts a process of its own, and its script in one process."""

from pathlib import Path

import yaml
from checks import assert_trained
from shared import DENSITY, SETTINGS, chats, run, script, tiny_llama

model = tiny_llama(Path("model"))
Path("data").mkdir()
chats(Path("data/train.jsonl"))
config = {
    "model_name_or_path": str(model),
    "dataset_name": "data",
    "optim": "grass",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}


def write(name: str, **more) -> str:
    Path(name).write_text(yaml.safe_dump({**config, **more}))
    return name


def check(folder: str, said: str) -> None:
    assert_trained(model, Path(folder), said, Path(folder))
    assert_trained(model, Path(folder) / "checkpoint-2", said, Path(folder))


# the command, bf16 as TRL has it by default, settings as a mapping
settings = {"density": DENSITY, "update_interval": 200, "exclude_modules": ["lm_head"]}
file = write("command.yaml", optim_args=settings, output_dir="command")
check("command", run([script("grass-hf"), "run", script("trl"), "sft", "--config", file]))

# the script in one process, settings as a flag
file = write("module.yaml", output_dir="module", bf16=False)
check("module", run([script("grass-hf"), "run", "-m", "trl.scripts.sft", "--config", file, "--optim_args", SETTINGS]))

# the bare command, where grass-hf is switched on in the environment
file = write("bare.yaml", optim_args=SETTINGS, output_dir="bare")
run([script("grass-hf"), "autoload", "on"])
try:
    check("bare", run([script("trl"), "sft", "--config", file]))
finally:
    run([script("grass-hf"), "autoload", "off"])

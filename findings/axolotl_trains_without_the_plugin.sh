#!/usr/bin/env bash
# axolotl 0.19.0 with torch 2.13.0 (CPU): `axolotl train` trains without a plugin whose module can't be imported.
#
# Guess beforehand: a run whose config names a plugin that isn't there stops before it trains, with an exit code that
# isn't 0: what a plugin does (a loss, an optimizer, a memory saver) is part of what the config asks for.
# Seen: where the module of an entry of `plugins:` can't be imported, be it misspelt or for an import of its own that
# fails, one error is logged among the other lines, with a traceback; the run then trains to its end without the plugin,
# saves the model and exits with 0. It is not so for all mistakes: a misspelt class of a module that is there stops the
# run. Output:
#   my_plugin.Plugin: exit code 0, model saved, plugin called
#   my_plugn.Plugin: exit code 0, model saved, plugin not called
#   my_plugin.Plugn: exit code 1, nothing saved, plugin not called
# Exits with 1 if that changes. Installs into a temporary folder, axolotl without its CUDA packages and the clouds'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0
"$folder/env/bin/python" -m pip install --quiet --no-deps axolotl==0.19.0
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.16.1 accelerate==1.13.0 peft==0.20.0 \
  trl==1.9.0 datasets==4.8.4 huggingface_hub==1.17.0 torchao==0.17.0 kernels==0.16.2 pydantic==2.12.5 addict==2.4.0 \
  art==6.5 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 bitsandbytes==0.50.2 colorama==0.4.6 einops==0.8.2 \
  evaluate==0.4.1 fire==0.7.1 posthog==6.7.11 python-dotenv==1.0.1 zstandard==0.22.0 scipy==1.17.1 numba==0.68.1 \
  sentencepiece==0.2.3
cd "$folder"
cat > my_plugin.py <<'EOF'
from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    def pre_model_load(self, cfg):
        print("the plugin is called", flush=True)
EOF
export HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 AXOLOTL_DO_NOT_TRACK=1 CUDA_VISIBLE_DEVICES= ACCELERATE_USE_CPU=true PYTHONPATH=.
PATH="$folder/env/bin:$PATH" "$folder/env/bin/python" - <<'EOF'
import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = "<pad> <s> </s> <unk> the sky sea is blue".split()
vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), words))
PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained("model")
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=2, **sizes)).save_pretrained("model")
Path("rows.jsonl").write_text(8 * (json.dumps({"text": "the sky is blue the sea is blue"}) + "\n"))

expected = {"my_plugin.Plugin": (True, True), "my_plugn.Plugin": (True, False), "my_plugin.Plugn": (False, False)}
as_stated = True
for plugin, outcome in expected.items():
    out = Path(f"out_{plugin}")
    config = {
        "base_model": "model",
        "plugins": [plugin],
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": "prepared",
        "output_dir": str(out),
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "val_set_size": 0,
        "bf16": False,
        "tf32": False,
    }
    Path("run.yaml").write_text(json.dumps(config))
    command = ["axolotl", "train", "run.yaml", "--launcher", "python"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    Path("said.txt").write_text(done.stdout)
    called, saved = "the plugin is called" in done.stdout, (out / "model.safetensors").is_file()
    print(
        f"{plugin}: exit code {done.returncode}, {'model' if saved else 'nothing'} saved,"
        f" plugin {'' if called else 'not '}called"
    )
    if (done.returncode == 0, called) != outcome or saved != outcome[0]:
        print(done.stdout[-4000:])
        as_stated = False
sys.exit(not as_stated)
EOF

#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: leaving `with model.disable_adapter():` makes frozen adapter weights trainable.
#
# Guess beforehand: the block switches the adapter off for a while and leaves `requires_grad` of all parameters as it was
# before, as it does for whether the adapter is on.
# Seen: on leaving, all weights of the active adapter, and all that `modules_to_save` has copied for it, are trainable,
# whatever they were. That undoes `requires_grad_(False)` (here: all lora_A and the head), and also `PeftModel.
# from_pretrained`, which loads for inference and freezes: an empty block makes the loaded adapter trainable, while its
# config still has inference_mode=True. Weights outside of the adapter keep what they had. There is no message; an
# optimizer that has the frozen weights moves them in its next step. One pass with the adapter off is the usual way to
# reference logits (DPO, KL terms). Known: https://github.com/huggingface/peft/issues/3447. Output:
#   trainable before: a.lora_B, norm.weight
#   trainable after: a.lora_A, a.lora_B, head.bias, head.weight, norm.weight
#   a step of SGD moves lora_A: without the block no, after it yes
#   loaded for inference, trainable before: nothing
#   loaded for inference, trainable after: a.lora_A, a.lora_B, head.bias, head.weight (inference_mode=True)
# Exits with 1 if that changes. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'EOF'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.a(x)))


def trainable(model):
    names = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    for part in ("base_model.model.", "modules_to_save.", "default.", ".default"):
        names = [name.replace(part, "") for name in names]
    return ", ".join(name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B") for name in names) or "nothing"


def moves(model, optimizer):
    """Whether a step of training changes lora_A."""
    factor = model.base_model.model.a.lora_A["default"].weight
    before = factor.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    return "no" if torch.equal(before, factor) else "yes"


torch.manual_seed(0)
x = torch.randn(8, 4)
config = LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"], init_lora_weights=False)
model = get_peft_model(Net(), config)
for name, parameter in model.named_parameters():
    if "lora_A" in name or "head" in name:
        parameter.requires_grad_(False)
model.base_model.model.norm.weight.requires_grad_(True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

chosen = trainable(model)
print("trainable before:", chosen)
without = moves(model, optimizer)
with torch.no_grad(), model.disable_adapter():
    model(x)
after = trainable(model)
print("trainable after:", after)
afterwards = moves(model, optimizer)
print(f"a step of SGD moves lora_A: without the block {without}, after it {afterwards}")

model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(Net(), "adapter")
frozen = trainable(loaded)
print("loaded for inference, trainable before:", frozen)
with loaded.disable_adapter():
    pass
thawed = trainable(loaded)
print(f"loaded for inference, trainable after: {thawed} (inference_mode={loaded.active_peft_config.inference_mode})")

adapter = "a.lora_A, a.lora_B, head.bias, head.weight"
as_stated = (chosen, after) == ("a.lora_B, norm.weight", f"{adapter}, norm.weight")
as_stated &= (without, afterwards) == ("no", "yes") and (frozen, thawed) == ("nothing", adapter)
sys.exit(not as_stated)
EOF

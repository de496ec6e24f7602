#!/usr/bin/env bash
# torch 2.13.0 (CPU): set_model_state_dict through DDP or torch.compile renames the keys of the dictionary it is given.
#
# Guess beforehand: loading only reads the dictionary, as `Module.load_state_dict` does; the same dictionary can be loaded
# into a second model (a moving average, a reference), or saved to a file afterwards.
# Seen: `torch.distributed.checkpoint.state_dict.set_model_state_dict` takes the names without prefixes, as its
# counterpart `get_model_state_dict` gives them, and puts the wrapper's prefix before each in the caller's own dictionary.
# The same call for the same model with the same dictionary then fails, and so does `load_state_dict` of the module inside
# the wrapper. What is saved after loading has other names than what is saved before. The docstring doesn't say so.
# A model without a wrapper leaves the dictionary as it is. Output:
#   plain: ['0.weight'] becomes ['0.weight'], a second time: loads
#   compiled: ['0.weight'] becomes ['_orig_mod.0.weight'], a second time: Missing key: 0.weight.
#   DDP: ['0.weight'] becomes ['module.0.weight'], a second time: Missing key: 0.weight.
# Exits with 1 if that changes. Installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet numpy torch==2.13.0
cd "$folder"
"$folder/env/bin/python" - <<'EOF'
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
wrapped = {
    "plain": net,
    "compiled": torch.compile(net, backend="eager"),
    "DDP": torch.nn.parallel.DistributedDataParallel(net),
}
as_stated = True
for name, model in wrapped.items():
    state = get_model_state_dict(model)
    before = list(state)
    set_model_state_dict(model, state)
    after = list(state)
    try:
        set_model_state_dict(model, state)
        again = "loads"
    except RuntimeError as error:
        again = str(error)
    print(f"{name}: {before} becomes {after}, a second time: {again}")
    as_stated &= (before == after) == (again == "loads") == (name == "plain")
dist.destroy_process_group()
sys.exit(not as_stated)
EOF

#!/usr/bin/env bash
# torch 2.13.0 (CPU): strict set_model_state_dict through DDP or torch.compile wants parameters that are never saved.
#
# Guess beforehand: whatever `get_model_state_dict` returns for a model, `set_model_state_dict` takes back for the same
# model with its default, strict=True, whether the model is wrapped or not.
# Seen: a module that leaves a parameter out of its `state_dict()` and does not ask for it when it loads (a frozen part
# that comes from elsewhere) loads what it saved with `load_state_dict`, plain, compiled or in DDP. So does
# `set_model_state_dict` without a wrapper. With a wrapper it goes through all of `named_parameters()` and raises for the
# one that no checkpoint has; the module's own loading is not asked. Output:
#   plain: saved ['weight'], load_state_dict loads, set_model_state_dict loads
#   compiled: saved ['weight'], load_state_dict loads, set_model_state_dict raises Missing key: frozen.
#   DDP: saved ['weight'], load_state_dict loads, set_model_state_dict raises Missing key: frozen.
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


class Scale(torch.nn.Module):
    """Saves `weight`, but not `frozen`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return x * self.weight * self.frozen

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "frozen"]

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *others):
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *others)
        missing.remove(prefix + "frozen")


def outcome(load, *given):
    try:
        load(*given)
        return "loads"
    except RuntimeError as error:
        return f"raises {error}"


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = Scale()
wrapped = {
    "plain": net,
    "compiled": torch.compile(net, backend="eager"),
    "DDP": torch.nn.parallel.DistributedDataParallel(net),
}
as_stated = True
for name, model in wrapped.items():
    own = outcome(model.load_state_dict, model.state_dict())
    saved = get_model_state_dict(model)
    keys = list(saved)
    of_dcp = outcome(set_model_state_dict, model, saved)
    print(f"{name}: saved {keys}, load_state_dict {own}, set_model_state_dict {of_dcp}")
    expected = "loads" if name == "plain" else "raises Missing key: frozen."
    as_stated &= keys == ["weight"] and own == "loads" and of_dcp == expected
dist.destroy_process_group()
sys.exit(not as_stated)
EOF

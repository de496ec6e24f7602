#!/usr/bin/env bash
# torch 2.13.0 (CPU): functionalize(remove="mutations_and_views") loses what batch_norm writes into running statistics.
#
# Guess beforehand: every operator of torch that writes into an argument says so in its schema, and `functionalize`, which
# goes by schemas, returns what the function itself returns, or raises.
# Seen: `batch_norm` in training mode writes running_mean and running_var, but aten::native_batch_norm (and batch_norm,
# instance_norm) declares no argument as written. Where the running statistics are views (here: rows of one tensor), the
# functionalized function returns them as they were before, without a message. The same writes by hand with `copy_`
# survive, and so do those of batch_norm under torch.compile, which replaces the operator by another one. A dispatch mode
# that asks `func._schema.is_mutable` misses them too. Output:
#   schemas that declare a write: native_batch_norm no, batch_norm no, instance_norm no
#   by hand: plain [3.0, 4.0], functionalized [3.0, 4.0], compiled [3.0, 4.0]
#   batch_norm: plain [3.0, 4.0], functionalized [0.0, 0.0], compiled [3.0, 4.0]
# (the mean and the variance of the batch, with momentum=1). Exits with 1 if that changes. Installs into a temporary
# folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet numpy torch==2.13.0
cd "$folder"
"$folder/env/bin/python" - <<'EOF'
import sys

import torch
from torch.func import functionalize


def by_hand(x):
    stats = torch.zeros(2, 1)
    stats[0].copy_(x.mean(0))
    stats[1].copy_(x.var(0))
    return stats


def batch_norm(x):
    stats = torch.zeros(2, 1)
    torch.nn.functional.batch_norm(x, stats[0], stats[1], training=True, momentum=1.0)
    return stats


declared = {
    name: any(argument.is_write for argument in getattr(torch.ops.aten, name).default._schema.arguments if argument.alias_info)
    for name in ("native_batch_norm", "batch_norm", "instance_norm")
}
print("schemas that declare a write:", ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in declared.items()))
x = torch.tensor([[1.0], [3.0], [5.0]])  # mean 3, variance 4
as_stated = not any(declared.values())
for function in (by_hand, batch_norm):
    plain = function(x)
    functional = functionalize(function, remove="mutations_and_views")(x)
    compiled = torch.compile(function, backend="aot_eager")(x)
    shown = {"plain": plain, "functionalized": functional, "compiled": compiled}
    name = function.__name__.replace("by_hand", "by hand")
    print(f"{name}:", ", ".join(f"{key} {value.flatten().tolist()}" for key, value in shown.items()))
    as_stated &= torch.equal(plain, compiled) and torch.equal(plain, functional) == (function is by_hand)
sys.exit(not as_stated)
EOF

#!/usr/bin/env bash
# torch 2.13.0 (CPU): a step of a fused optimizer does not raise the version counters of the parameters it changes.
#
# Guess beforehand: every change in place raises `Tensor._version`, so that backward through a tensor that was changed
# after the forward pass stops with "modified by an inplace operation", whichever implementation an optimizer has.
# Seen: `foreach=True` and `foreach=False` raise the counter, and backward stops. `fused=True` leaves it as it was, and
# backward goes on with the new values: the gradient is another one, without a message. It is so for AdamW, Adam, SGD
# and Adagrad. Whoever steps before all of backward is done (two losses over one graph, generators and discriminators)
# loses torch's own warning with fused=True, which is the Trainer's default for AdamW. Output:
#   AdamW foreach=False: counter rises, backward stops
#   AdamW foreach=True: counter rises, backward stops
#   AdamW fused=True: counter stays, backward goes on, its gradient is wrong
#   (the same for Adam, SGD, Adagrad)
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

as_stated = True
for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 4))
        optimizer = cls([weight], lr=0.5, **options)
        x = torch.randn(4, 4, requires_grad=True)
        (expected,) = torch.autograd.grad((x @ weight).square().sum(), x)
        loss = (x @ weight).square().sum()
        weight.grad = torch.ones_like(weight)
        before = weight._version
        optimizer.step()
        rises = weight._version > before
        try:
            (found,) = torch.autograd.grad(loss, x)
            said = "goes on, its gradient is " + ("right" if torch.allclose(found, expected) else "wrong")
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), error
            said = "stops"
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        print(f"{cls.__name__} {shown}: counter {'rises' if rises else 'stays'}, backward {said}")
        fused = "fused" in options
        as_stated &= rises != fused and said == ("goes on, its gradient is wrong" if fused else "stops")
sys.exit(not as_stated)
EOF

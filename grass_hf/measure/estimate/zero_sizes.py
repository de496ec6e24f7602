"""What one rank holds under DeepSpeed's ZeRO: computed from the sizes of partitions, not simulated.

DeepSpeed does not run under fake tensors. So a step of one process is simulated, and what ZeRO splits over N ranks is
put in the place of what that process held, with DeepSpeed's own defaults (0.19, `runtime/zero`; arXiv 1910.02054):

    of trained elements E, each of b bytes, and frozen ones:      ZeRO-1            ZeRO-2            ZeRO-3
    weights, slices                                               whole             whole             1/N
    gradients                                                     b E               b E / N           b E / N
    optimizer state, in float32, and the float32 master copy      (s + 4) E / N     (s + 4) E / N     (s + 4) E / N
    bucket in backward, 5e8 elements                              5e8 b             5e8 b             5e8 b
    gathered in forward and backward, 1e9 elements at most        -                 -                 1e9 b
    float32 copy of the gradients in the step                     4 E / N           4 E / N           4 E / N

with s the bytes of state per element (8 for AdamW); in ZeRO-3 float32 weights need no master copy. On top comes the
most that activations, logits and temporaries take together in the simulated step. Bucket and gathered layers are what
the settings allow (`reduce_bucket_size`, `stage3_max_live_parameters`), not what a model needs: on the safe side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from .simulate import Breakdown

BUCKET_ELEMENTS = 5 * 10**8
LIVE_ELEMENTS = 10**9


def on_one_rank(stage: int, ranks: int, step: Breakdown, transient: Mapping[str, int], model: nn.Module) -> Breakdown:
    """The parts of one rank at its peak.

    Args:
        stage: 1, 2 or 3.
        ranks: N.
        step: a step of one process, at its peak.
        transient: bytes of activations, logits and temporaries where their sum is largest.
        model: ready for its method, not wrapped.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    elements, low = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    itemsize = max(p.itemsize for p in model.parameters())
    own = -(-elements // ranks)
    state = round(4 * step.optimizer_state / low) if low else 0
    master = 0 if stage == 3 and all(p.dtype == torch.float32 for p in trained) else 4
    held = Breakdown(
        weights=step.weights if stage < 3 else -(-step.weights // ranks),
        slices=step.slices if stage < 3 else -(-step.slices // ranks),
        gradients=low if stage == 1 else -(-low // ranks),
        optimizer_state=own * (state + master),
    )
    gathered = min(LIVE_ELEMENTS, sum(p.numel() for p in model.parameters())) if stage == 3 else 0
    backward = dataclasses.replace(held, communication=(BUCKET_ELEMENTS + gathered) * itemsize, **transient)
    stepping = dataclasses.replace(held, temporaries=4 * own)
    return max(backward, stepping, key=lambda parts: parts.total)

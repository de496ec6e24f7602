"""Reselection: from the norms that slices observed to the rows they train next.

All slices that are due reduce their norms over the ranks in one all-reduce and choose; the randomness depends on
(seed, step, name) alone, so ranks agree and resuming repeats it. Slices that share an index (projections of one
input) choose together, by the sum of their scores: as if their weights were one matrix.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.settings import GrassConfig
from ..slices.ops import selection, sharding
from ..slices.slice import Slice
from . import guards

logger = logging.getLogger(__name__)


def turn_of(config: GrassConfig, step: int) -> int:
    """Number of the selection that is made after a step, the same for layers that stagger; the first is 0."""
    return step // config.update_interval


def choose(
    due: list[Slice], config: GrassConfig, step: int, replicas: dist.ProcessGroup | None = None
) -> list[tuple[Slice, selection.Selection, Tensor | None]]:
    """What each slice that is due trains next, and the squared norms that it observed, None if its rule needs none; a
    slice without usable norms is left out, and stays due.

    Ends the observations and notes the energy that the chosen rows held; `replicas` are the ranks with the same slices,
    None for all.
    """
    if selection.needs_scores(config.selection):
        observed = _observed(due, replicas)
        guards.check_observed(observed, step)
    else:
        observed = dict.fromkeys(due)
    groups: dict[str, list[Slice]] = {}
    for slice_ in due:
        groups.setdefault(slice_.state.leader, []).append(slice_)
    chosen = []
    for name, parts in groups.items():
        norms2 = [observed[slice_] for slice_ in parts]
        scores = None
        if selection.needs_scores(config.selection):
            known = [vector for vector in norms2 if vector is not None]
            if len(known) < len(parts):
                logger.warning(
                    "%s: its gradient overflowed in float16, so it selects a step later; the run goes on as it should.",
                    name,
                )
                continue
            scores = sum(known, torch.zeros_like(known[0]))
            if not bool(scores.any()):
                continue  # no token reached it (an unused branch): nothing to choose by
        rows = _rows(parts[0], name, scores, config, step)
        for slice_, own in zip(parts, norms2, strict=True):
            if own is not None:
                slice_.state.energy = (float(rows.energy(own)), float(own.sum()))
            chosen.append((slice_, rows, own))
    return chosen


def _rows(slice_: Slice, name: str, scores: Tensor | None, config: GrassConfig, step: int) -> selection.Selection:
    def select(scores: Tensor | None, trained: Tensor, name: str) -> selection.Selection:
        rule, turn = config.selection, turn_of(config, step)
        draws = selection.draws_of(rule, config.seed, step, name)
        state = slice_.state
        return selection.select(rule, scores, state.size, state.rank, draws, slice_.blocks(), turn, trained)

    trained = slice_.state.trained
    if slice_.index.dim() == 1:
        return select(scores, trained, name)
    now = slice_.current_selection()
    each = []
    for expert in range(slice_.index.shape[0]):
        own = None if scores is None else scores[expert]
        # an expert that no token came to has nothing to choose by
        idle = own is not None and not bool(own.any())
        each.append(now[expert] if idle else select(own, trained[expert], f"{name}.{expert}"))
    return selection.Selection.stack(each)


def _observed(due: list[Slice], replicas: dist.ProcessGroup | None) -> dict[Slice, Tensor | None]:
    """Squared norms summed over all ranks, in float64 on the CPU; None where they overflowed."""
    norms = sharding.sum_over_ranks([slice_.end_observation() for slice_ in due], replicas)
    vectors = [vector.double().cpu() for vector in norms]
    return {slice_: v if bool(v.isfinite().all()) else None for slice_, v in zip(due, vectors, strict=True)}


def metrics(slices: list[Slice], config: GrassConfig, step: int) -> dict[str, float]:
    """What logs say of the selection.

    Returns:
        ``grass/coverage``: share of all rows trained so far; ``grass/energy``: share of the squared gradient norm that
        the selected rows held when they were selected, absent before the first observation.
    """
    trained = total = 0
    held = seen = 0.0
    for slice_ in slices:
        if step:
            slice_.mark_trained(turn_of(config, step))
        trained += int((slice_.state.trained >= 0).sum())
        total += slice_.state.trained.numel()
        if slice_.state.energy is not None:
            held += slice_.state.energy[0]
            seen += slice_.state.energy[1]
    found = {"grass/coverage": trained / total if total else 0.0}
    return found | {"grass/energy": held / seen} if seen > 0 else found

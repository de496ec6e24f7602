"""Algorithm 1 of Grass (arXiv 2406.17660), dense and naive: the oracle of test_trajectory.py.

Full gradients by plain autograd on an ordinary model, P as an explicit m x r matrix with one column per draw,
both optimizers written out by hand, everything in float64. It shares no code with grass_hf except the draws: which
rows are selected is asked from outside, with this side's own scores. Slow on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Rows:
    """A draw: one entry per draw, so a row drawn twice stands here twice."""

    rows: Tensor  # int64 (draws,)
    rho: Tensor  # float64 (draws,)


class Matrix:
    """One parameter, seen with the selected units as its rows; `rule` None means that all rows are trained."""

    def __init__(self, param: nn.Parameter, transposed: bool, draw: Rows | None, phase: int):
        self.param, self.transposed, self.draw, self.phase = param, transposed, draw, phase
        shape = self.view(param.data).shape
        self.state = {"m": torch.zeros(shape), "v": torch.zeros(shape), "steps": 0}
        self.scores = torch.zeros(shape[0])
        self.owed = 1.0
        self.reset_at: int | None = None

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor


class NaiveGrass:
    """Trains `model` by Algorithm 1.

    Args:
        model: ordinary, float64.
        targets: names of the parameters that are compressed.
        side: "output" (rows) or "input" (columns).
        first: rows every target starts with, by its size.
        choose: (step, target's name, scores (m,)) -> `Rows`: the selection rule with the run's draws.
        observes: whether the rule reads scores, so that fresh rows are seeded by them too.
        kind: "adamw" or "sgd" (momentum, coupled weight decay).
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[str],
        *,
        side: str,
        first: Callable[[int], Tensor],
        choose: Callable[[int, str, Tensor], Rows],
        interval: int,
        kind: str,
        lr: Callable[[int], float],
        weight_decay: float,
        scale: float = 1.0,
        policy: str = "carry",
        decay_all: bool = True,
        phases: dict[str, int] | None = None,
        warmup: int = 1,
        scale_warmup: int = 0,
        until: int | None = None,
        observes: bool = False,
    ):
        self.model, self.choose, self.interval, self.kind, self.lr = model, choose, interval, kind, lr
        self.weight_decay, self.scale, self.policy, self.decay_all = weight_decay, scale, policy, decay_all
        self.warmup, self.until, self.observes, self.t = warmup, until, observes, 0
        self.scale_warmup = scale_warmup
        self.matrices = {}
        self.visited: dict[str, set[tuple[int, ...]]] = {name: set() for name in targets}
        for name, param in model.named_parameters():
            draw = None
            if name in targets:
                size = param.shape[0] if side == "output" else param.shape[1]
                rows = first(size)
                draw = Rows(rows, torch.ones(len(rows)))
            phase = (phases or {}).get(name, 0)
            self.matrices[name] = Matrix(param, draw is not None and side == "input", draw, phase)

    def step(self, losses: list[Callable[[nn.Module], Tensor]]) -> None:
        """One optimizer step over the gradients of all micro-batches, added up."""
        lr = self.lr(self.t)
        total = {name: torch.zeros_like(m.view(m.param.data)) for name, m in self.matrices.items()}
        for matrix in self.matrices.values():
            matrix.scores.zero_()
        for loss in losses:
            grads = torch.autograd.grad(loss(self.model), [m.param for m in self.matrices.values()])
            for (name, matrix), grad in zip(self.matrices.items(), grads, strict=True):
                total[name] += matrix.view(grad)
                if matrix.draw is not None:
                    matrix.scores += matrix.view(grad).pow(2).sum(dim=1)
        with torch.no_grad():
            for name, matrix in self.matrices.items():
                if matrix.draw is None:
                    self._update_ordinary(matrix, total[name], lr)
                else:
                    self._update_target(name, matrix, total[name], lr)
        self.t += 1

    def finish(self) -> None:
        """The decay that is still owed."""
        with torch.no_grad():
            for matrix in self.matrices.values():
                if matrix.draw is not None:
                    self._settle(matrix)

    def _update_ordinary(self, matrix: Matrix, grad: Tensor, lr: float) -> None:
        w = matrix.param.data
        if self.kind == "adamw":
            w *= 1 - lr * self.weight_decay
        else:
            grad = grad + self.weight_decay * w
        w += lr * self._optimizer(matrix.state, slice(None), grad)

    def _update_target(self, name: str, matrix: Matrix, grad: Tensor, lr: float) -> None:
        w = matrix.view(matrix.param.data)
        rows, rho = matrix.draw.rows, matrix.draw.rho
        self.visited[name].add(tuple(rows.tolist()))
        size = w.shape[0]
        p = torch.zeros(size, len(rows))  # P, one column per draw
        p[rows, torch.arange(len(rows))] = rho
        compressed = p.t() @ grad  # C = P^T G
        ramp = 1.0
        if self.policy == "reset_warmup" and matrix.reset_at is not None:
            since = self.t - matrix.reset_at
            ramp = min(1.0, since / (self.warmup + 1)) if since <= self.warmup else 1.0
        scale = self.scale * min(1.0, (self.t + 1) / (self.scale_warmup + 1))
        eta = lr * scale * ramp
        decay = self.weight_decay / scale  # so that eta * decay is lr * weight_decay
        distinct = rows.unique()
        if self.kind == "adamw":
            w[distinct] *= 1 - eta * decay
        else:
            drawn = torch.bincount(rows, minlength=size)[rows]
            compressed = compressed + decay * w[rows] / (drawn * rho)[:, None]
        w += eta * (p @ self._optimizer(matrix.state, rows, compressed))  # W += eta alpha P D
        if self.decay_all:
            matrix.owed *= 1 - lr * self.weight_decay
        if self.t % self.interval == matrix.phase and (self.until is None or self.t < self.until):
            self._settle(matrix)
            matrix.draw = self.choose(self.t, name, matrix.scores.clone())
            if self.policy.startswith("carry"):
                gone = torch.ones(size, dtype=torch.bool)
                gone[[row for row in matrix.draw.rows.tolist() if row in rows.tolist()]] = False
                matrix.state["m"][gone] = 0
                seeds = self._seeds(matrix, rows, rho)[gone] if self.policy == "carry_seeded" else 0
                matrix.state["v"][gone] = seeds
            else:
                matrix.state = {"m": torch.zeros_like(w), "v": torch.zeros_like(w), "steps": 0}
                matrix.reset_at = self.t

    def _seeds(self, matrix: Matrix, rows: Tensor, rho: Tensor) -> Tensor:
        """Second moments of fresh rows, one for each row of the matrix: the mean of the old rows', times what the row's
        share of the scores, as its gradient is multiplied, is to theirs."""
        v = matrix.state["v"]
        old, new = dict(zip(rows.tolist(), rho.tolist(), strict=True)), matrix.draw
        mean = v[list(old)].mean(dim=0)
        seeds = mean.repeat(v.shape[0], 1)
        if self.observes:
            level = sum(float(matrix.scores[row]) * factor**2 for row, factor in old.items()) / len(old)
            for row, factor in zip(new.rows.tolist(), new.rho.tolist(), strict=True):
                seeds[row] = mean * max(0.01, float(matrix.scores[row]) * factor**2 / level)
        return seeds

    def _settle(self, matrix: Matrix) -> None:
        w = matrix.view(matrix.param.data)
        outside = torch.ones(w.shape[0], dtype=torch.bool)
        outside[matrix.draw.rows] = False
        w[outside] *= matrix.owed
        matrix.owed = 1.0

    def _optimizer(self, state: dict, rows, grad: Tensor) -> Tensor:
        """D for gradient C; the rows of a slice have their state at their place in the full matrix."""
        m, v = state["m"], state["v"]
        state["steps"] += 1
        if self.kind == "sgd":
            new = 0.9 * m[rows] + grad
            m[rows] = new
            return -new
        b1, b2, eps = 0.9, 0.999, 1e-8
        new_m, new_v = b1 * m[rows] + (1 - b1) * grad, b2 * v[rows] + (1 - b2) * grad**2
        m[rows], v[rows] = new_m, new_v
        corrected = new_m / (1 - b1 ** state["steps"])
        return -corrected / ((new_v / (1 - b2 ** state["steps"])).sqrt() + eps)

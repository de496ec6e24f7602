"""Which rows are trained next: scores in, index and multipliers out. Pure functions, no state.

With ``s_i = ||G_i||^2`` the observed squared norm of row i of m, r rows to choose, and probabilities q:

    rule                     q_i           rows                          rho_j
    top_r                    -             the r largest s_i             1
    multinomial_norm         ~ sqrt(s_i)   r draws with replacement      1 / sqrt(r q_i)
    multinomial_norm_nr      ~ sqrt(s_i)   r draws, no replacement       1
    multinomial_norm2 / _nr  ~ s_i         with / without replacement    1 / sqrt(r q_i)  /  1
    multinomial_stale_nr     ~ a_i sqrt(s_i)  r draws, no replacement    1
    uniform / uniform_nr     1/m           with / without replacement    sqrt(m / r)      /  1
    cycle                    -             the next r of a permutation   1

`multinomial_stale_nr` is research, and not the paper's: norms times staleness. a_i is 1 for a row in the slice, one
more with every turn since it left, and for a row that was never in it one more than if it had left in the first turn.
Large gradients still count, and no row that has one waits for ever.

`cycle` is not the paper's. It draws one permutation of the rows per layer and walks through it, r rows a turn and over
its end to its beginning, so that after ceil(m / r) turns every row was trained, and no row ever more than one turn
more often than another. The turn is the number of intervals begun, so it needs no state.

The rules with replacement are unbiased, E[P P^T] = I; `multinomial_norm` has the least variance among them and
`top_r` the least reconstruction error (Grass, section 3.3 and Table 1; the field's `norm2` is the squared norm).

[Note: multiplicity] A row drawn c times would be c equal rows of C with equal optimizer states and equal updates,
so one active row serves: its gradient is multiplied by rho, its update reaches the weight c rho times. An active
slice keeps its r rows for good (optimizers, DDP and FSDP hold on to it), so the r - u rows that duplicates leave
over are padding: gradient multiplier 0, never written back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config.settings import WITH_REPLACEMENT


@dataclass(frozen=True)
class Selection:
    """Rows chosen for one matrix, or for each of E experts with a leading dimension; on the CPU.

    Attributes:
        index: int64 (r,), ascending; padding repeats a row that stands before it.
        rho: float64 (r,), the multiplier of the gradient, 0 at padding; None when it is 1 everywhere.
        write: float64 (r,), the multiplier c rho of the write-back, 1 at padding; None with `rho`.
    """

    index: Tensor
    rho: Tensor | None = None
    write: Tensor | None = None

    @property
    def count(self) -> int:
        """Number u of distinct rows of one matrix, u <= r."""
        return self.index.shape[-1] if self.rho is None else int((self.rho != 0).sum())

    def __getitem__(self, expert: int) -> Selection:
        rho, write = (None if v is None else v[expert] for v in (self.rho, self.write))
        return Selection(self.index[expert], rho, write)

    @staticmethod
    def stack(selections: list[Selection]) -> Selection:
        """One selection per expert as one."""
        return Selection._joined(selections, torch.stack)

    @staticmethod
    def concatenate(selections: list[Selection]) -> Selection:
        """One selection of all the rows that selections of different rows have."""
        return Selection._joined(selections, torch.cat)

    @staticmethod
    def _joined(selections: list[Selection], join: Callable[[list[Tensor]], Tensor]) -> Selection:
        def joined(values: list[Tensor | None]) -> Tensor | None:
            given = [value for value in values if value is not None]  # all of them or none
            return join(given) if given else None

        index = join([each.index for each in selections])
        return Selection(index, joined([s.rho for s in selections]), joined([s.write for s in selections]))

    def first_positions(self, size: int) -> Tensor:
        """int64 (..., r): where each row stands first; padding stands at the row that it repeats."""
        numbers = torch.arange(self.index.shape[-1], device=self.index.device).expand_as(self.index)
        first = torch.full((*self.index.shape[:-1], size), size, dtype=torch.int64, device=self.index.device)
        return first.scatter_reduce_(-1, self.index, numbers, "amin").gather(-1, self.index)

    def positions_in(self, old: Selection, size: int) -> Tensor:
        """int64 (..., r): where an earlier selection of `size` rows has the rows of this one, -1 where it does not;
        -1 at padding."""
        position = torch.full((*old.index.shape[:-1], size), -1, dtype=torch.int64)
        source = position.scatter_(-1, old.index, old.first_positions(size)).gather(-1, self.index)
        return source if self.rho is None else source.masked_fill(self.rho == 0, -1)

    def energy(self, scores: Tensor) -> Tensor:
        """Sum of the scores (..., size) of the chosen rows, each counted once."""
        held = scores.gather(-1, self.index)
        return (held if self.rho is None else held.masked_fill(self.rho == 0, 0.0)).sum()


def needs_scores(rule: str) -> bool:
    """Whether the rule reads gradient norms, so that a layer must observe before it selects."""
    return rule != "cycle" and not rule.startswith("uniform")


def with_replacement(rule: str) -> bool:
    """Whether the rule draws with replacement, so that its slices carry multipliers."""
    return rule in WITH_REPLACEMENT


def bounds(size: int, blocks: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of each block of a side, in the chunks that `torch.chunk` and FSDP2 make; the
    last ones may be shorter, or empty."""
    length = -(-size // blocks)
    return [(min(b * length, size), min((b + 1) * length, size)) for b in range(blocks)]


def fits(size: int, rank: int, blocks: int) -> bool:
    """Whether every block of the side has as many rows as its block of the slice."""
    pairs = zip(bounds(size, blocks), bounds(rank, blocks), strict=True)
    return all(high - low >= last - first for (low, high), (first, last) in pairs)


def aligned(index: Tensor, size: int, blocks: int) -> bool:
    """Whether every block of a slice (r,) holds rows of its own block of the side."""
    pairs = zip(bounds(size, blocks), bounds(index.numel(), blocks), strict=True)
    return all(bool(((index[p:q] >= low) & (index[p:q] < high)).all()) for (low, high), (p, q) in pairs)


def strided(size: int, rank: int, blocks: int = 1) -> Selection:
    """The evenly strided rows with which every layer starts: aligned with every even sharding of the side."""
    parts = []
    for (low, high), (first, last) in zip(bounds(size, blocks), bounds(rank, blocks), strict=True):
        if last > first:
            parts.append(low + torch.arange(last - first) * (high - low) // (last - first))
    return Selection(index=torch.cat(parts))


def seeded(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on nothing but its arguments: ranks agree, and resume needs no saved RNG."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def generator(seed: int, step: int, layer: str) -> torch.Generator:
    """The CPU generator of one layer's draws at one step."""
    return seeded(f"{seed}:{step}:{layer}")


def draws_of(rule: str, seed: int, step: int, layer: str) -> torch.Generator:
    """The generator of one layer's draws: of one step, or of the permutation that lasts for the whole run."""
    return generator(seed, _NO_STEP if rule == "cycle" else step, layer)


_NO_STEP = -1


def select(
    rule: str,
    scores: Tensor | None,
    size: int,
    rank: int,
    draws: torch.Generator,
    blocks: int = 1,
    turn: int = 0,
    trained: Tensor | None = None,
) -> Selection:
    """Choose `rank` of `size` rows, of each block its share of them.

    Args:
        rule: a name of the table above.
        scores: (size,) observed squared norms, finite; None for the rules that need none.
        size: rows on the selected side.
        rank: rows to choose, at most `size`.
        draws: source of randomness, see `draws_of`.
        blocks: parts of the side that choose for themselves, so that every shard of it trains its own rows; the
            slice is the slices of the blocks one after the other. `fits` says whether that is possible.
        turn: number of the selection, for `cycle` and `multinomial_stale_nr`.
        trained: (size,) turn that each row was last trained before, -1 if never, for `multinomial_stale_nr`; None if
            no row was.
    """
    if scores is not None and rule == "multinomial_stale_nr" and trained is not None:
        # a run that was resumed with longer intervals has counted more turns before than it does now
        staleness = (turn + 1 - trained.double()).clamp(min=1)
        scores = scores.double().cpu() * staleness.square()  # of which q is the root
    parts = []
    for (low, high), (first, last) in zip(bounds(size, blocks), bounds(rank, blocks), strict=True):
        if last > first:
            own = None if scores is None else scores[low:high]
            part = _select(rule, own, high - low, last - first, draws, turn)
            parts.append(Selection(part.index + low, part.rho, part.write))
    return parts[0] if len(parts) == 1 else Selection.concatenate(parts)


def _select(rule: str, scores: Tensor | None, size: int, rank: int, draws: torch.Generator, turn: int) -> Selection:
    if rule == "top_r":
        assert scores is not None  # the rule needs them
        # stable: among equal norms the first rows win, on every device and rank
        order = torch.sort(scores.double().cpu(), descending=True, stable=True).indices
        return Selection(index=order[:rank].sort().values)
    if rule == "cycle":
        rows = torch.randperm(size, generator=draws)
        return Selection(index=rows[torch.arange(turn * rank, (turn + 1) * rank) % size].sort().values)
    q = probabilities(rule, scores, size)
    if with_replacement(rule):
        drawn = torch.multinomial(q, rank, replacement=True, generator=draws)
        rows, multiplicity = torch.unique(drawn, return_counts=True)  # ascending
        return _weighted(rows, multiplicity, q, rank)
    # Sequential draws without replacement are the `rank` largest of log q + Gumbel noise (Efraimidis & Spirakis
    # 2006). Rows of probability 0 come last, in random order.
    noise = torch.rand(size, generator=draws, dtype=torch.float64).clamp_(min=torch.finfo(torch.float64).tiny)
    gumbel = -torch.log(-torch.log(noise))
    keys = torch.where(q > 0, q.clamp(min=torch.finfo(torch.float64).tiny).log(), -1e6) + gumbel
    return Selection(index=keys.topk(rank).indices.sort().values)


def probabilities(rule: str, scores: Tensor | None, size: int) -> Tensor:
    """float64 (size,), the probability q of each row; uniform where every norm is zero."""
    if not needs_scores(rule):
        return torch.full((size,), 1.0 / size, dtype=torch.float64)
    assert scores is not None
    weights = scores.double().cpu()
    if not rule.startswith("multinomial_norm2"):
        weights = weights.sqrt()
    total = weights.sum()
    return weights / total if total > 0 else torch.full((size,), 1.0 / size, dtype=torch.float64)


def _weighted(rows: Tensor, multiplicity: Tensor, q: Tensor, rank: int) -> Selection:
    """The slice for rows drawn with replacement, padded to `rank`; see [Note: multiplicity]."""
    count = rows.numel()
    index = torch.cat([rows, rows[:1].expand(rank - count)])
    rho = torch.zeros(rank, dtype=torch.float64)
    write = torch.ones(rank, dtype=torch.float64)
    rho[:count] = (rank * q[rows]).rsqrt()
    write[:count] = multiplicity * rho[:count]
    return Selection(index=index, rho=rho, write=write)

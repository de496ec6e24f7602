"""The closest product of two thin matrices: ``D ~ L R`` with L (m, k) and R (k, n), by a truncated SVD in float32.

Training with structured sparse gradients changes some rows or columns, so rows and columns of zeros are dropped first:
if k or fewer are left, the product is exact. Of what is left a full SVD is taken where it is small, and a randomised
one (`torch.svd_lowrank`, Halko et al., arXiv 0909.4061) where it is large and k is far below its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A full SVD of 1024 x 4096 takes about a second on a CPU and grows with the square of the smaller side.
LARGE = 1024
# Columns beyond k, and passes over the matrix, of the randomised SVD.
_EXTRA, _PASSES = 16, 4


@dataclass(frozen=True)
class Factors:
    """A product and how far it is from the matrix.

    Attributes:
        left: (m, k), float32.
        right: (k, n), float32.
        norm: Frobenius norm of the matrix.
        error: Frobenius norm of the matrix minus the product.
    """

    left: Tensor
    right: Tensor
    norm: float
    error: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


@torch.no_grad()
def factor(matrix: Tensor, rank: int) -> Factors:
    """Factor a matrix.

    Args:
        matrix: (m, n).
        rank: the largest k; less is used if the matrix has fewer rows or columns with something in them.
    """
    matrix = matrix.float()
    filled = matrix != 0
    rows, columns = filled.any(1), filled.any(0)
    core = matrix[rows][:, columns]
    smaller = min(core.shape)
    rank = min(rank, smaller)
    if not rank:  # all zero: an expert that no token reached
        return Factors(matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1]), 0.0, 0.0)
    if smaller > LARGE and 4 * (rank + _EXTRA) <= smaller:
        with torch.random.fork_rng(devices=[]):  # the same factors at every call, and the caller's random numbers
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(core, q=rank + _EXTRA, niter=_PASSES)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    thin_left, thin_right = u[:, :rank] * root, root[:, None] * vh[:rank]
    left = matrix.new_zeros(matrix.shape[0], rank)
    right = matrix.new_zeros(rank, matrix.shape[1])
    left[rows], right[:, columns] = thin_left, thin_right
    error = torch.linalg.matrix_norm(core - thin_left @ thin_right)
    return Factors(left, right, torch.linalg.matrix_norm(core).item(), error.item())

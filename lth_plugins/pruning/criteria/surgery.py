"""Optimal Brain Surgeon: what pruning a weight costs, and what becomes of the others.

Near a minimum the loss rises by ½ δᵀFδ when the weights change by δ (Hassibi & Stork, NIPS 1992).
All functions here compute blocks side by side: weights are [blocks, block], F is
[blocks, block, block], positive definite, both float64. Pure but for what is said to be in place.
"""

import torch
from torch import Tensor

from lth_plugins.errors import ConfigError


def damped(fisher: Tensor, weights: Tensor, damping: float) -> Tensor:
    """F + λI, in which weights that are pruned already, so exactly 0, have no part. In place."""
    there = (weights != 0).to(fisher.dtype)
    fisher.mul_(there[:, :, None]).mul_(there[:, None, :])
    fisher.diagonal(dim1=1, dim2=2).add_(damping)
    return fisher


def inverse(fisher: Tensor) -> Tensor:
    """F⁻¹, block by block.

    It equals what the Woodbury identity gives gradient by gradient (arXiv 2004.14340, equation 4).
    """
    return torch.cholesky_inverse(_factor(fisher))


def saliency(weights: Tensor, inverted: Tensor) -> Tensor:
    """What pruning each weight alone costs: w² / 2[F⁻¹]ᵢᵢ. (arXiv 2004.14340, equation 6).

    Args:
        weights: [blocks, block].
        inverted: F⁻¹.
    """
    return weights.square() / (2 * inverted.diagonal(dim1=1, dim2=2))


def elimination(weights: Tensor, inverted: Tensor) -> Tensor:
    """What pruning each weight costs once all cheaper ones of its block are pruned.

    Weights are removed one after another, the cheapest first, and each time the others move and F⁻¹
    loses a row and a column (Kuznedelev et al., "CAP", arXiv 2210.09223, section 3). Costs never
    fall on the way: those below a threshold are the first that were removed.

    Args:
        weights: [blocks, block].
        inverted: F⁻¹; overwritten.
    """
    count, block = weights.shape
    blocks = torch.arange(count)
    removed = torch.zeros_like(weights, dtype=torch.bool)
    worth, most = torch.empty_like(weights), torch.zeros_like(weights[:, :1])
    for _ in range(block):
        costs = saliency(weights, inverted).masked_fill_(removed, torch.inf)
        costs, cheapest = costs.min(1, keepdim=True)
        most = torch.maximum(most, costs)
        worth.scatter_(1, cheapest, most)
        removed.scatter_(1, cheapest, True)
        row = inverted[blocks, cheapest[:, 0]]
        pivot = row.gather(1, cheapest)
        weights = weights - row * (weights.gather(1, cheapest) / pivot)
        inverted.baddbmm_(row[:, :, None], (row / pivot)[:, None, :], alpha=-1)
    return worth


def compensated(weights: Tensor, fisher: Tensor, kept: Tensor) -> Tensor:
    """The weights that are left, moved so that pruning all others together costs least.

    The minimum of ½ δᵀFδ with -w where a weight q is pruned is δ = F_ss⁻¹ F_sq w_q on those that
    are left, s. It is what removing them one after another comes to, in any order.

    Args:
        weights: [blocks, block].
        fisher: F; overwritten.
        kept: boolean, [blocks, block].

    Returns:
        [blocks, block], zero where pruned.
    """
    left = kept.to(fisher.dtype)
    pulled = left * (fisher @ (weights * (1 - left))[:, :, None])[:, :, 0]
    fisher.mul_(left[:, :, None]).mul_(left[:, None, :])
    fisher.diagonal(dim1=1, dim2=2).add_(1 - left)
    moved = torch.cholesky_solve(pulled[:, :, None], _factor(fisher))[:, :, 0]
    return left * (weights + moved)


def _factor(fisher: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(fisher)
    if bool(failed.any()):
        raise ConfigError(
            "expected a damping that makes every block of the Fisher matrix positive definite, "
            f"found {int((failed > 0).sum())} that are not: the gradients are too large for it. "
            "Give a higher damping"
        )
    return factor

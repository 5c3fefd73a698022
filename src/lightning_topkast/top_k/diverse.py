"""The heaviest items of which no two are alike: diversified top-k search over a graph of conflicts."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.checks import check, is_count
from lightning_topkast.errors import TopKastError

Array = np.ndarray[Any, Any]


def diverse_top_k(weights: Tensor, conflicts: Tensor, k: int) -> Tensor:
    """Choose at most k items, no two of them in conflict, with the largest sum of weights.

    No other set has a sum that is larger by more than about 1e-11 of the largest weight. Where the k heaviest items are
    not in conflict, they are chosen, ties by the lowest index, and SciPy is not needed. Otherwise equal arguments give
    equal sets with one version of SciPy. The problem is NP-hard: thousands of items take a second if those that are
    alike form groups, and a few hundred may take very long if conflicts are at random.

    Args:
        weights: of the items, 1-D, finite and at least 0 (an item of less is never worth choosing).
        conflicts: bool, items × items, symmetric: which pairs must not be chosen together, such as
            `cosines > 0.9`. The diagonal is ignored.
        k: number of items to choose at most, in [0, number of items]; fewer are chosen if conflicts leave no more.

    Returns:
        bool in the shape of `weights`, on its device.

    Raises:
        TopKastError: an argument is out of range or of another shape, or SciPy is missing or found no solution.

    Source: Qin, Yu and Chang, "Diversifying Top-K Results", VLDB 2012 (there by a search of their own).
    """
    count = weights.numel()
    check(weights.dim() == 1, "weights", tuple(weights.shape), "of one dimension")
    wrong = weights[~((weights >= 0) & (weights < torch.inf))]
    check(not wrong.numel(), "every weight", wrong[:1].tolist(), "finite and at least 0")
    kind, square = (conflicts.dtype, tuple(conflicts.shape)), (torch.bool, (count, count))
    check(kind == square, "conflicts", kind, f"of {square}, a bool for every pair of items")
    if not torch.equal(conflicts, conflicts.T):
        raise TopKastError("expected conflicts to be symmetric; pass conflicts | conflicts.T")
    check(is_count(k, 0) and k <= count, "k", k, f"an int in [0, {count}]")
    values: Array = weights.detach().cpu().double().numpy()
    adjacent: Array = conflicts.cpu().numpy().copy()
    np.fill_diagonal(adjacent, False)
    heaviest = np.argsort(-values, kind="stable")
    chosen = heaviest[:k]
    if adjacent[np.ix_(chosen, chosen)].any():
        # of the items without a conflict only the k heaviest can be chosen
        alone = ~np.any(adjacent, axis=1)
        items = np.sort(np.concatenate([np.flatnonzero(~alone), heaviest[alone[heaviest]][:k]]))
        chosen = items[_solve(values[items], _cliques(adjacent[np.ix_(items, items)]), k)]
        if len(chosen) > k or adjacent[np.ix_(chosen, chosen)].any():
            raise TopKastError("scipy.optimize.milp returned items in conflict; this is an error of the solver")
    found = torch.zeros(count, dtype=torch.bool)
    found[torch.from_numpy(chosen)] = True
    return found.to(weights.device)


def _cliques(adjacent: Array) -> list[Array]:
    """Return sets of items of which all pairs are in conflict, which together cover every conflict."""
    uncovered, found = np.triu(adjacent), []
    for first in range(len(adjacent)):
        while uncovered[first].any():
            second = int(np.argmax(uncovered[first]))
            members, common = [first, second], adjacent[first] & adjacent[second]
            while common.any():
                members.append(int(np.argmax(common)))
                common = common & adjacent[members[-1]]
            members = sorted(members)
            uncovered[np.ix_(members, members)] = False
            found.append(np.array(members))
    return found


def _solve(values: Array, cliques: list[Array], k: int) -> Array:
    """Return the places of at most k items with the largest sum, at most one of each clique.

    This is one integer programme, also where the graph falls into parts: one for every part and number of items would
    have to be joined, and the solver branches on single items all the same.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise TopKastError("diverse_top_k needs SciPy where items are in conflict: pip install scipy") from None
    rows = [np.arange(len(values)), *cliques]
    ends = np.cumsum([0, *map(len, rows)])
    places = np.concatenate(rows)
    matrix = csr_array((np.ones(len(places)), places, ends), shape=(len(rows), len(values)))
    most = np.array([k, *[1] * len(cliques)])
    scaled = values / (values.max() or 1) * 1e6  # the solver stops at a difference of 1e-6
    solution = milp(
        -scaled,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, ub=most),
        options={"mip_rel_gap": 0},
    )
    if solution.x is None or solution.status != 0:
        raise TopKastError(f"scipy.optimize.milp found no solution: {solution.message}")
    return np.flatnonzero(solution.x > 0.5)

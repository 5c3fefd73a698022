"""DART: the best k of some arms, found from the joint rewards of k arms at a time."""

import math
import random
from collections.abc import Mapping
from typing import Any

from lightning_topkast.checks import check, is_count, is_number
from lightning_topkast.errors import TopKastError


class Dart:
    """Finds which k of N arms give the largest joint reward, by playing k of them at a time.

    This is "DART: aDaptive Accept RejecT for non-linear top-K subset identification" (Agarwal et al. 2021). In every
    pass the undecided arms are shuffled and played in groups, each beside the arms accepted so far, so that all meet
    partners of the same kind. An arm's worth is the mean reward of the sets that it was in. An arm that is certainly
    among the best k is then accepted, and one that certainly is not is rejected; what is certain follows from
    Hoeffding's inequality.

    The reward of a set need not be a sum or mean, but must not depend on the order of its arms, and a better arm in the
    place of a worse one must raise its expectation, whatever the others are.

    Args:
        arms: number N of arms, which are called 0 to N - 1.
        k: size of the sets, in [1, N).
        horizon: number of rounds T that will be played at most. Regret is of the order of k √(k N T).
        seed: of the groups; the same seed and rewards give the same sets.

    Raises:
        TopKastError: an argument is out of its range.
    """

    def __init__(self, arms: int, k: int, horizon: int, seed: int = 0) -> None:
        check(is_count(arms, 2), "arms", arms, "an int of at least 2")
        check(is_count(k, 1) and k < arms, "k", k, f"an int in [1, {arms}), less than the number of arms")
        check(is_count(horizon, 1), "horizon", horizon, "an int of at least 1")
        check(is_number(seed) and isinstance(seed, int), "seed", seed, "an int")
        self.arms, self.k, self.horizon, self.seed = arms, k, horizon, seed
        self._accepted: list[int] = []
        self._active = list(range(arms))  # neither accepted nor rejected
        self._sums, self._counts = [0.0] * arms, [0] * arms  # of rewards that say something about an arm
        self._rounds = self._passes = self._position = 0  # position: groups of this pass that were played
        self._group: list[int] | None = None  # the undecided arms that are being played

    def ask(self) -> tuple[int, ...]:
        """Return the arms to play next, sorted; the same ones until `tell` is called.

        Raises:
            TopKastError: the horizon is reached.
        """
        if self._rounds == self.horizon:
            raise TopKastError(f"the horizon of {self.horizon} rounds is reached; use best(), or give a longer horizon")
        self._group, padding = self._drawn()
        return tuple(sorted([*self._accepted, *self._group, *padding]))

    def tell(self, reward: float) -> None:
        """Give the joint reward of the arms that `ask` has returned.

        Args:
            reward: in [0, 1], for which the confidence bounds hold; scale others by bounds that are known beforehand.

        Raises:
            TopKastError: `ask` was not called since, or the reward is not in [0, 1].
        """
        if self._group is None:
            raise TopKastError("tell() gives the reward of the arms that ask() has returned; call ask() first")
        check(is_number(reward) and 0 <= reward <= 1, "reward", reward, "a number in [0, 1]; scale other rewards")
        for arm in self._group:
            self._sums[arm] += float(reward)
            self._counts[arm] += 1
        self._group = None
        self._rounds += 1
        self._position += 1
        if self._position * self._places >= len(self._active):
            self._decide()
            self._position, self._passes = 0, self._passes + 1

    def best(self) -> tuple[int, ...]:
        """Return the k arms that are best as far as is known, sorted: those accepted, then those of the best means."""
        return tuple(sorted([*self._accepted, *self._ranked()[: self._places]]))

    @property
    def is_decided(self) -> bool:
        """Whether every arm was accepted or rejected."""
        return not self._active

    def state_dict(self) -> dict[str, Any]:
        """Return what is known so far, as numbers and lists."""
        return {
            "arms": self.arms, "k": self.k, "horizon": self.horizon, "seed": self.seed,
            "accepted": [*self._accepted], "active": [*self._active], "sums": [*self._sums],
            "counts": [*self._counts], "rounds": self._rounds, "passes": self._passes, "position": self._position,
            "asked": self._group is not None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the very sets that would have followed.

        Raises:
            TopKastError: it was saved with other arguments, or is not whole. Nothing was changed then.
        """
        if missing := [name for name in self.state_dict() if name not in state]:
            raise TopKastError(f"the saved state of a Dart lacks {', '.join(missing)}; it is damaged")
        for name in ("arms", "k", "horizon", "seed"):
            check(state.get(name) == getattr(self, name), f"the state's {name}", state.get(name), getattr(self, name))
        self._accepted, self._active = [*state["accepted"]], [*state["active"]]
        self._sums, self._counts = [*state["sums"]], [*state["counts"]]
        self._rounds, self._passes, self._position = state["rounds"], state["passes"], state["position"]
        self._group = self._drawn()[0] if state["asked"] else None

    @property
    def _places(self) -> int:
        """Number of arms that are still to be accepted."""
        return self.k - len(self._accepted)

    def _drawn(self) -> tuple[list[int], list[int]]:
        """Return the undecided arms to play next, and others that fill up the last group of a pass.

        Arms that fill up do not count as played: all undecided arms are then played equally often.
        """
        generator = random.Random(f"{self.seed}/{self._passes}")  # so that no state of it need be saved
        order = generator.sample(self._active, len(self._active))
        begin = self._position * self._places
        group, rest = order[begin : begin + self._places], order[:begin]
        return group, generator.sample(rest, min(self._places - len(group), len(rest)))

    def _ranked(self) -> list[int]:
        """Return the undecided arms from the best to the worst; those not played yet are worth nothing."""
        return sorted(self._active, key=lambda arm: -self._sums[arm] / max(self._counts[arm], 1))

    def _decide(self) -> None:
        """Accept and reject the arms of which it is certain, after a pass in which each was played once.

        A mean of n rewards exceeds another that should be no less by √(L / n) with probability exp(-L) at most. L is
        such that no bad arm's mean exceeds a good one's by so much with probability 1 - 1/√T, at any one time; they are
        looked at four times while n doubles.
        """
        n = self._passes + 1
        if not self._active or n % 2 ** max(n.bit_length() - 3, 0):
            return
        ranked, places = self._ranked(), self._places
        means = [self._sums[arm] / self._counts[arm] for arm in ranked]
        pairs = self.k * (self.arms - self.k)  # of a good arm and another: only these can be mistaken for each other
        gap = math.sqrt(math.log(pairs * math.sqrt(self.horizon)) / n)
        self._accepted += [arm for arm, mean in zip(ranked, means, strict=True) if mean - means[places] > gap]
        rejected = [arm for arm, mean in zip(ranked, means, strict=True) if means[places - 1] - mean > gap]
        # once the last place is taken, all others are rejected by the same gap
        self._active = [arm for arm in self._active if arm not in (*self._accepted, *rejected)]

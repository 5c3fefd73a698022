"""What DDP sends of the gradients of sparse weights."""

from dataclasses import dataclass
from typing import Literal

from lightning_topkast.checks import check, check_bool, check_choice, is_number
from lightning_topkast.errors import TopKastError


@dataclass(frozen=True)
class TopKGradients:
    """DDP sends only the largest values of a sparse weight's gradient, and what remains in later steps.

    See `TopKAllReduce`, which does it.

    Args:
        density: share of the updated set's values that every rank sends in a step, in (0, 1 / number of ranks].
        feedback: whether a rank keeps what it does not send, and adds it to its next gradient.
        threshold: which values are sent: the k largest ("exact"), or at most k of those above a threshold that is
            estimated from their mean and standard deviation ("gaussian", GaussianK-SGD, Shi et al. 2019). The latter
            is for comparisons: it is no faster here, and sends fewer values.

    Raises:
        TopKastError: a value out of range.
    """

    density: float
    feedback: bool = True
    threshold: Literal["exact", "gaussian"] = "exact"

    def __post_init__(self) -> None:
        valid = is_number(self.density) and 0 < self.density <= 1
        check(valid, "TopKGradients.density", self.density, "a number in (0, 1]")
        check_bool("TopKGradients.feedback", self.feedback)
        check_choice("TopKGradients.threshold", self.threshold, Literal["exact", "gaussian"])

    def check_ranks(self, ranks: int) -> None:
        """Refuse more ranks than 1 / density.

        Raises:
            TopKastError: an all-reduce of the whole updated set would send less.
        """
        if self.density * ranks > 1:
            raise TopKastError(
                f"every rank gathers what the others send: expected a density of at most 1 / {ranks}, the number of "
                f"ranks, got {self.density}. Above it an all-reduce of the whole updated set sends less: use "
                "all_reduce='sparse' with masked storage, and 'dense' with packed storage"
            )


ByName = Literal["dense", "sparse", "sparse_bf16", "sparse_fp16"]
AllReduce = ByName | TopKGradients

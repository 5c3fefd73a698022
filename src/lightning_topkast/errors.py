"""Errors that a user can act on; each names the value, what was expected and the way out."""

from lightning_topkast.text import printable


class TopKastError(ValueError):
    """Raised for a setting, model or checkpoint that Top-KAST does not support."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NonFiniteWeightError(TopKastError):
    """Raised if a weight holds NaN or infinity when its sets are chosen; nothing was overwritten."""

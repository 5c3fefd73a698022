"""The errors a user can act on: each names the value, what was expected and the way out."""


class TopKastError(ValueError):
    """A setting, model or checkpoint that Top-KAST cannot honour."""


class NonFiniteWeightError(TopKastError):
    """A weight holds NaN or infinity when its sets are to be chosen; nothing was overwritten."""

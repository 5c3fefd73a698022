"""Choosing the sparse weights of a model, with a reason for each dense parameter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_topkast.checks import check, check_bool, name_matches, plain
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.stack import Stack
from lightning_topkast.method.structure import Structure

# Modules whose weights are sparse by default. RNNBase and RNNCellBase cover LSTM, GRU and RNN.
SPARSE_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_EMBEDDING_TYPES: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
# Parts of the names of modules and of parameters whose 3-D parameters are no stacks of matrices.
_NO_STACK = (("conv", "norm", "embed", "bilinear"), ("bias", "embed", "token", "position", "pos_"))
# Zeros make the one NaN, and are no zeros of the matrix that the other computes.
_PARAMETRIZATIONS = (
    (nn.utils.parametrizations._WeightNorm, "weight norm"),
    (nn.utils.parametrizations._Orthogonal, "orthogonal parametrization"),
)
FROZEN = "frozen"
# Reasons that no pattern overrides, only a full name.
_NEVER_BY_PATTERN = ("embedding", "norm", "bias", "weight norm", "orthogonal parametrization")


@dataclass
class Target:
    """One parameter of the model, sparse or dense.

    Args:
        name: the parameter's name in the plain model, without the `_orig_mod.` of torch.compile.
        parameter: the parameter itself.
        shape: the weight's own shape, even if the parameter is packed.
        reason: why it is dense, or "" if it is sparse.
        owners: all modules that hold it (several for tied weights), each with its name for the parameter.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    reason: str = ""
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def sparse(self) -> bool:
        """Whether the parameter is a sparse weight."""
        return not self.reason

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices along its first dimension, such as the experts of a mixture.

        That is a 3-D parameter which a module of no known kind holds itself, and which is not named as a bias or an
        embedding. Shapes such as (1, n, d) are those of positional embeddings and class tokens.
        """
        modules = [module for module, _ in self.owners]
        of_modules, of_parameters = _NO_STACK
        return (
            len(self.shape) == 3
            and min(self.shape) > 1
            and self.parameter.is_floating_point()
            and not any(isinstance(module, (*SPARSE_TYPES, *_NORM_TYPES, *_EMBEDDING_TYPES)) for module in modules)
            and not any(isinstance(module, ParametrizationList) for module in modules)
            and not any(part in type(module).__name__.lower() for module in modules for part in of_modules)
            and not any(part in own_name.lower() for _, own_name in self.owners for part in of_parameters)
        )

    def structure(self, structure: Structure) -> Structure:
        """Return the structure of this weight in a run with `structure`."""
        return Stack(structure) if self.is_stack else structure


@dataclass(frozen=True)
class Targets:
    """The choice of the sparse weights of a model.

    By default the weights of `SPARSE_TYPES` are candidates, and so are 3-D parameters that hold a matrix per expert of
    a mixture, each of which has sets of its own. With `include` or `include_types`, only the weights that these name
    are sparse, of any module type. Biases, norms and embeddings stay dense unless `include` contains their full name.

    The first and the last candidate of the *model* also stay dense (the paper's ImageNet set-up), unless `include`
    contains their full name. Excluded weights count as candidates here: if the first is excluded, the second may be
    sparse. In a language model, which begins with an embedding and ends in an output embedding (a head that is tied to
    an embedding, or has one output per entry of one), these two are the first and the last layer: its first candidate
    may be sparse, and its last one too if the head is tied. Any other model keeps its first candidate dense even if it
    begins with an embedding, which may hold a side input, such as the label of a class.

    Args:
        include: glob patterns of parameter names.
        exclude: glob patterns of parameter names.
        include_types: class names of modules, bare (`Linear`) or dotted (`transformers.pytorch_utils.Conv1D`),
            including base classes.
        exclude_types: class names of modules, in the same form.
        keep_first_dense: keep the first candidate dense; without effect in a language model.
        keep_last_dense: keep the last candidate dense; without effect in a language model with a tied head.

    Raises:
        TopKastError: a value has another type.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    include_types: Sequence[str] | None = None
    exclude_types: Sequence[str] | None = None
    keep_first_dense: bool = True
    keep_last_dense: bool = True

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "include_types", "exclude_types"):
            patterns = plain(getattr(self, name))
            listed = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
            check(patterns is None or listed, name, patterns, "a list of strings, or None")
            object.__setattr__(self, name, None if patterns is None else tuple(patterns))
        check_bool("keep_first_dense", self.keep_first_dense)
        check_bool("keep_last_dense", self.keep_last_dense)

    @property
    def patterns(self) -> dict[str, tuple[str, ...] | None]:
        """The patterns of parameter names and the class names, by argument."""
        return {name: getattr(self, name) for name in ("include", "exclude", "include_types", "exclude_types")}


def find_targets(model: nn.Module, chosen: Targets) -> list[Target]:
    """Decide for each parameter of a model whether it is a sparse weight.

    Args:
        model: the model; a tied weight counts once, under its first name.
        chosen: the choice of sparse weights.

    Returns:
        one `Target` per parameter, in the model's order.

    Raises:
        TopKastError: a pattern or type matches nothing, a parameter has no storage yet, or nothing is sparse.
    """
    targets = list(_parameters(model))
    _check_patterns(targets, chosen)
    candidates = []
    for target in targets:
        target.reason = _why_dense_by_kind(target)
        by_default = target.sparse
        if target.reason not in (FROZEN, "not floating point", "empty"):
            target.reason = _why_dense_by_choice(target, chosen)
        if by_default or target.sparse:
            candidates.append(target)
    first, last = _embeddings_at_ends(targets, candidates)
    ends = (
        (0, "first candidate", chosen.keep_first_dense and not first),
        (-1, "last candidate", chosen.keep_last_dense and not last),
    )
    for position, reason, keep_dense in ends if candidates else ():
        target = candidates[position]
        if keep_dense and target.sparse and target.name not in (chosen.include or ()):
            target.reason = reason
    for target in candidates:
        if _is_excluded(target, chosen):
            target.reason = "excluded"

    if not any(target.sparse for target in targets):
        reasons = ", ".join(f"{t.name} ({t.reason})" for t in targets[:6]) or "the model has no parameters"
        raise TopKastError(
            f"no weight of the model is sparse: {reasons}{', ...' if len(targets) > 6 else ''}. Name weights with "
            "include=[...], or set keep_first_dense=False / keep_last_dense=False"
        )
    return targets


def _parameters(model: nn.Module) -> Iterator[Target]:
    found: dict[int, Target] = {}
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise TopKastError(
                    f"{module_name}.{own_name} of a lazy module has no shape yet; run one forward pass before training"
                )
            name = f"{module_name}.{own_name}" if module_name else own_name
            packed = getattr(module, "packed_weights", {}).get(own_name)
            shape = parameter.shape if packed is None else packed.shape
            target = found.setdefault(id(parameter), Target(name.replace("_orig_mod.", ""), parameter, shape))
            target.owners.append((module, own_name))
    yield from found.values()


def _embeddings_at_ends(targets: Sequence[Target], candidates: Sequence[Target]) -> tuple[bool, bool]:
    """Return whether embeddings are the first layer of a model, and its last layer without being a candidate."""
    first = next((target for target in targets if len(target.shape) >= 2), None)
    if first is None or not isinstance(first.owners[0][0], _EMBEDDING_TYPES):
        return False, False
    embeddings = [target for target in targets if _is_held_by(target, _EMBEDDING_TYPES)]
    tied = any(_is_held_by(target, (nn.Linear,)) for target in embeddings)
    head = candidates[-1] if candidates and _is_held_by(candidates[-1], (nn.Linear,)) else None
    untied = head is not None and any(head.shape[0] == embedding.shape[0] for embedding in embeddings)
    return tied or untied, tied


def find_thawed(targets: Sequence[Target], chosen: Targets) -> list[str]:
    """Return the names of parameters that were frozen when `targets` were found, and would be sparse weights now."""
    thawed = [target for target in targets if target.reason == FROZEN and target.parameter.requires_grad]
    return [
        target.name
        for target in thawed
        if not _why_dense_by_choice(replace(target, reason=_why_dense_by_kind(target)), chosen)
        and not _is_excluded(target, chosen)
    ]


def _is_held_by(target: Target, types: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, types) for module, _ in target.owners)


def _why_dense_by_kind(target: Target) -> str:
    """Return why a parameter is dense by default, or "" for a weight of `SPARSE_TYPES` or a stack of matrices."""
    parameter, modules = target.parameter, [module for module, _ in target.owners]
    if not parameter.requires_grad:
        return FROZEN
    if not parameter.is_floating_point():
        return "not floating point"
    if not parameter.numel():
        return "empty"
    if any(isinstance(module, _EMBEDDING_TYPES) for module in modules):
        return "embedding"
    if any(isinstance(module, _NORM_TYPES) for module in modules):
        return "norm"
    if any(
        own_name.endswith(("_g", "_v")) and f"{own_name[:-1]}g" in module._parameters
        for module, own_name in target.owners
    ):
        return "weight norm"  # both parts of torch.nn.utils.weight_norm: zeros would cause a division by a zero norm
    for kind, reason in _PARAMETRIZATIONS:
        if any(
            isinstance(module, ParametrizationList) and any(isinstance(p, kind) for p in module) for module in modules
        ):
            return reason
    if len(target.shape) < 2 and any("norm" in type(module).__name__.lower() for module in modules):
        return "norm"  # classes of other packages, such as LlamaRMSNorm
    if any("bias" in own_name for _, own_name in target.owners):
        return "bias"
    if target.is_stack:
        return ""
    if not any(isinstance(module, SPARSE_TYPES) for module in modules):
        return f"{type(modules[0]).__name__} is not sparsified by default"
    return "" if len(target.shape) >= 2 else "vector"


def _why_dense_by_choice(target: Target, chosen: Targets) -> str:
    """Return why a parameter is dense, considering `include` and `include_types`, or ""."""
    include, include_types = chosen.include, chosen.include_types
    if target.name in (include or ()):
        if target.reason == "weight norm":
            raise TopKastError(
                f"include: '{target.name}' belongs to a weight norm, which divides every row by its norm, so that rows "
                "of zeros become NaN; remove it first (torch.nn.utils.parametrize.remove_parametrizations, or "
                "torch.nn.utils.remove_weight_norm in the old style), or leave the weight dense"
            )
        return ""  # a full name is explicit
    if target.reason in _NEVER_BY_PATTERN or (include is None and include_types is None):
        return target.reason
    if _matches(target, include) or (_has_type(target, include_types) and len(target.shape) >= 2):
        return ""
    return "not included"


def _is_excluded(target: Target, chosen: Targets) -> bool:
    return _matches(target, chosen.exclude) or _has_type(target, chosen.exclude_types)


def _matches(target: Target, patterns: Sequence[str] | None) -> bool:
    return any(name_matches(target.name, pattern) for pattern in patterns or ())


def _has_type(target: Target, names: Sequence[str] | None) -> bool:
    return any(name in _type_names(module) for module, _ in target.owners for name in names or ())


def _type_names(module: nn.Module) -> set[str]:
    """Return the names of a module's class and its bases: bare, dotted, and as exported by `torch.nn`."""
    names = set()
    for cls in type(module).__mro__:
        names |= {cls.__name__, f"{cls.__module__}.{cls.__qualname__}"}
        if cls.__module__.startswith("torch.nn."):
            names.add(f"torch.nn.{cls.__name__}")
    return names


def _check_patterns(targets: list[Target], chosen: Targets) -> None:
    """Refuse a pattern or type that matches nothing, since it is probably misspelt."""
    names = [target.name for target in targets]
    types = sorted({type(module).__name__ for target in targets for module, _ in target.owners})
    checks = (
        ("include", chosen.include, _matches, names, "parameter"),
        ("exclude", chosen.exclude, _matches, names, "parameter"),
        ("include_types", chosen.include_types, _has_type, types, "module type"),
        ("exclude_types", chosen.exclude_types, _has_type, types, "module type"),
    )
    for argument, wanted, matches, known, what in checks:
        for pattern in wanted or ():
            if not any(matches(target, [pattern]) for target in targets):
                near = get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
                raise TopKastError(
                    f"{argument}: '{pattern}' matches no {what} of the model; similar names: {', '.join(near)}"
                )

"""Flat options of a run, which random cases and tests combine freely, as the nouns that `TopKast` takes."""

from lightning_topkast import L1, L2, Block, Magnitude, Masked, Norm, Packed, Schedule, Targets


def nouns(**flat) -> dict:
    """The arguments of `TopKast` for flat options, which tests combine freely: fields of the nouns by their own names.

    `block` are a block's sides; `strength` and `shrinkage` belong to the penalty that "l2", "l1" or "norm" names, and
    kernels to packed storage only.
    """
    given = dict(flat)

    def taken(*names) -> dict:
        return {name: given.pop(name) for name in names if name in given}

    targets = taken("include", "exclude", "include_types", "exclude_types", "keep_first_dense", "keep_last_dense")
    schedule = taken("update_every", "delay", "stop_exploring_at", "stop_updating_at")
    rule, penalty, block = taken("exploration"), taken("strength", "shrinkage"), taken("block")
    packed, masked = taken("kernels", "unsupported", "theta"), taken("reset_optimizer_state")
    arguments: dict = {"targets": Targets(**targets), "schedule": Schedule(**schedule)}
    if rule:
        arguments["rule"] = Magnitude(**rule)
    penalty = {name: value for name, value in penalty.items() if value is not None}
    if "shrinkage" in penalty:
        penalty.pop("strength", None)
    if penalty:
        kind = given.pop("penalty", "l2")
        forms = {"l2": L2, "l1": L1, "norm": Norm}
        if penalty == {"strength": 0.0}:
            kind = None
        arguments["penalty"] = forms[kind](**penalty) if kind in forms else kind
    if block and given.get("structure") == "block":
        given["structure"] = Block(*block["block"])
    storage = given.get("storage", "masked")
    if storage == "masked" and masked:
        given["storage"] = Masked(**masked)
    elif storage in ("packed", "compact", "auto") and (packed or masked):
        products = {"packed": "sparse", "compact": "dense", "auto": "auto"}[storage]
        if products == "dense":
            packed.pop("kernels", None)
        given["storage"] = Packed(**packed, products=products, **masked)
    return arguments | given

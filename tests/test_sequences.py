"""Random sequences of what code may do to a run: all storages train alike, and are as sparse as they say."""

import copy
import warnings
from collections import Counter
from itertools import permutations
from random import Random

import pytest
import torch
from torch import nn

from lightning_topkast import SET, Block, Magnitude, Packed, Ramp, RigL, Schedule, Targets, TopKast

STORAGES = {
    "masked": "masked",
    "packed": Packed(kernels="torch"),
    "compact": "compact",
    "saved": "masked",  # and everything is saved after every operation, which leaves no trace
}
LIKE = {"masked": "packed", "packed": "compact", "compact": "saved", "saved": "masked"}  # whose files a run loads
RULES = {
    "magnitude": Magnitude(),
    "random": Magnitude(exploration="random"),
    "set": SET(),
    "rigl": RigL(),
    "ramp": Magnitude(),
}
STRUCTURES = {"unstructured": "unstructured", "block": Block(2, 2), "2:4": "2:4"}
OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "adam": torch.optim.Adam,
    "adagrad": lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=0.5),
}
NO_TRACE = ("save", "swap", "look", "averages", "copy", "reload", "interrupt", "recover", "detach")
REPLACE = {
    "load": 2,
    "reload": 2,
    "resume": 2,
    "other": 1,
    "swap": 2,
    "look": 2,
    "averages": 3,
}  # how often the sets are replaced
ANEW = "was saved with other sets than the present ones"
KNOWN = {  # what may be warned of, and by which storages
    ANEW: STORAGES,
    "other code wrote to sparse weights": ("masked", "saved"),
    "other code has written other values": ("masked", "saved"),
    "was copied while it is trained": ("packed", "compact"),
    "no attached optimizer holds": STORAGES,
    "sparse already, and zero outside B": STORAGES,  # after few other weights, in a ramp
}


class Run:
    """A network in one storage; its methods are the operations, each with arguments that are printed when it fails."""

    def __init__(self, kind, case):
        self.kind, self.case, self.saves, self.lr = kind, case, [], 0.05
        late = ["0.weight", "0.bias"] if case["late"] else []
        self.groups = [[f"{at}.{each}" for at in (0, 2, 4) for each in ("weight", "bias")]]
        self.groups = [[name for name in self.groups[0] if name not in late]]
        self.begin()
        self.attach()

    def begin(self):
        """Make everything as at the beginning, but do not attach it."""
        torch.manual_seed(0)
        layers = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2)]
        self.model = nn.Sequential(*layers).double()
        self.topkast = self.engine()
        self.optimizer = self.make()

    def engine(self):
        case, rule = self.case, RULES[self.case["rule"]]
        forward, backward = (0.5, 0.25) if case["structure"] == "2:4" else (0.75, 0.5)
        return TopKast(
            self.model,
            forward,
            backward if rule.explores else forward,
            schedule=Schedule(case["every"], case["delay"], case["stop"], 30 if case["rule"] == "rigl" else None),
            ramp=Ramp(0.5, 0.25, begin=2, end=9) if case["rule"] == "ramp" else None,
            rule=rule,
            structure=STRUCTURES[case["structure"]],
            penalty=case["penalty"],
            powerpropagation=case["power"],
            targets=Targets(keep_first_dense=False),
            storage=STORAGES[self.kind],
        )

    def make(self):
        parameters = dict(self.model.named_parameters())
        groups = [{"params": [parameters[name] for name in group], "lr": self.lr} for group in self.groups]
        return OPTIMIZERS[self.case["optimizer"]](groups)

    # --- operations -----------------------------------------------------------------------------------------------

    def attach(self):
        if not self.topkast.is_attached:
            self.topkast.attach(self.optimizer)

    def detach(self):
        self.topkast.accept_writes()  # or a later load takes them for loaded weights
        self.topkast.detach()

    def train(self, steps, seed):
        self.attach()
        self.topkast.accept_writes()  # as the callback does before a forward pass
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 8, generator=generator).double()).square().sum().backward()
            self.optimizer.step()

    def idle(self, has_gradient):
        self.attach()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if has_gradient else None
        self.optimizer.step()

    def interrupt(self):
        """A step raises after the weights were opened."""
        self.train(0, 0)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        handle = self.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.optimizer.step()
        handle.remove()
        self.topkast.recover()

    def refresh(self):
        self.topkast.refresh()

    def recover(self):
        self.topkast.recover()

    def restart(self):
        self.topkast.restart()

    def state(self, order=("model", "topkast", "optimizer")):
        return {part: copy.deepcopy(getattr(self, part).state_dict()) for part in order} | {"groups": self.groups}

    def save(self, order):
        if not self.topkast.is_attached:
            self.topkast.accept_writes()  # a detached engine leaves the model alone, and its state would not fit it
        self.saves.append(self.state(order))

    def load(self, which, parts, own):
        """Load a save, or that of another storage."""
        saves = self.saves if own else self.others.saves
        if not saves:
            return
        save = saves[which % len(saves)]
        if "optimizer" in parts and save["groups"] != self.groups:
            self.groups = save["groups"]
            self.renew(False, self.topkast.is_attached)
        for part in parts:
            getattr(self, part).load_state_dict(copy.deepcopy(save[part]))

    def resume(self, which, order, own):
        """Begin again from a save, in new objects."""
        if saves := self.saves if own else self.others.saves:
            self.begin_from(saves[which % len(saves)], order)

    def reload(self, order, anew):
        """Save, and put back at once: into what is there, or into new objects."""
        self.attach()
        state = self.state()
        if anew:
            self.begin_from(state, order)
        else:
            for part in ("model", *(part for part in order if part != "attach")):
                getattr(self, part).load_state_dict(state[part])

    def begin_again(self):
        """Begin again from the first save, without attaching."""
        self.begin_from(self.saves[0], ("topkast", "optimizer"))

    def begin_from(self, save, order):
        self.groups = save["groups"]
        self.begin()
        self.model.load_state_dict(copy.deepcopy(save["model"]))
        for part in order:
            self.attach() if part == "attach" else getattr(self, part).load_state_dict(copy.deepcopy(save[part]))

    def weights(self, seed, density):
        """Other weights for the model, sparse ones if the density is below 1."""
        generator = torch.Generator().manual_seed(seed)
        others = {}
        for name, weight in self.topkast.weights.items():
            values = torch.randn(weight.size, generator=generator).double()
            count = int(weight.active_count * density) if density < 1 else weight.size
            others[name] = values.index_fill(0, torch.randperm(weight.size, generator=generator)[count:], 0)
            others[name] = others[name].view(weight.shape)
        return others

    def other(self, seed, density):
        self.model.load_state_dict(self.model.state_dict() | self.weights(seed, density))

    def swap(self, seed, density, saves):
        """Validate other weights."""
        backup = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(backup | self.weights(seed, density))
        with torch.no_grad():
            self.model(torch.ones(1, 8).double())
        if saves:
            self.state()
        self.model.load_state_dict(backup)

    def look(self, which):
        """Validate the weights of a save of one's own."""
        if self.saves:
            backup = copy.deepcopy(self.model.state_dict())
            self.model.load_state_dict(copy.deepcopy(self.saves[which % len(self.saves)]["model"]))
            self.model.load_state_dict(backup)

    def averages(self, seed, count):
        """Validate averages one after the other, which have the same largest entries and some others."""
        backup = copy.deepcopy(self.model.state_dict())
        for number in range(count):
            changed = {
                name: (1 - 0.1 * number) * self.topkast.weights[name].alpha() + 1e-6 * values
                for name, values in self.weights(seed + number, 0.99).items()
            }
            self.model.load_state_dict(backup | changed)
        self.model.load_state_dict(backup)

    @torch.no_grad()
    def write(self, seed, inside):
        """Add noise inside A; or outside, which is undone, and where packed weights have nothing to write to."""
        self.attach()
        for name, noise in self.weights(seed, 1).items():
            weight = self.topkast.weights[name]
            if not weight.is_packed:
                weight.parameter.add_(noise * (weight.active == inside))
            elif inside:
                places = dense_order(weight)[: int(weight.active_entries)]
                weight.parameter[: len(places)] += noise.flatten()[places]

    def renew(self, keeps_state, attaches):
        """Make the optimizer anew; without `attach`, its steps are followed."""
        attaches &= self.topkast.is_attached
        state = self.optimizer.state_dict()
        if attaches:
            self.topkast.detach()
        self.optimizer = self.make()
        if keeps_state:
            self.optimizer.load_state_dict(state)
        if attaches:
            self.attach()

    def take_over(self, releases):
        """Go on with a new engine, and a new optimizer, since packed parameters are others."""
        self.topkast.accept_writes()
        if releases:
            self.topkast.release()
        self.topkast = self.engine()
        self.optimizer = self.make()
        self.attach()

    def copy(self, order):
        """Go on with copies."""
        attached = self.topkast.is_attached
        vars(self).update(zip(order, copy.deepcopy([getattr(self, part) for part in order]), strict=True))
        if attached:
            self.attach()

    def scale(self, factor):
        self.lr *= factor
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def add_group(self):
        parameters, late = dict(self.model.named_parameters()), ["0.weight", "0.bias"]
        if not any(late[0] in group for group in self.groups):
            self.groups = [*self.groups, late]
            self.optimizer.add_param_group({"params": [parameters[name] for name in late], "lr": self.lr})

    # --- what is compared -----------------------------------------------------------------------------------------

    @property
    def is_settled(self):
        return not any(weight.was_written or weight.was_loaded for weight in self.topkast.weights.values())

    def view(self, state=None):
        """What all storages have in common: the network, θ, the sets and, after a step, the optimizer's state."""
        found = {"steps": self.topkast.step_count, "refreshes": self.topkast.refresh_count}
        for name, parameter in self.model.named_parameters():
            weight = self.topkast.weights.get(name)
            if weight is None:
                found[name] = parameter.detach().clone()
                continue
            found |= {f"α {name}": weight.alpha(), f"θ {name}": weight.theta(), f"sets of {name}": weight.tiers}
            found |= {f"never active in {name}": int(weight.never_active_entries), f"λ {name}": weight.strength}
            for key, value in self.optimizer.state.get(weight.parameter, {}).items() if state else ():
                is_whole = isinstance(value, torch.Tensor) and value.dim() > 0
                found[f"{key} of {name}"] = dense(weight, value) if is_whole else value
        return found

    def waits(self, weight):
        """Whether a weight may be behind the schedule, until an optimizer that was given it late steps."""
        return self.case["late"] and not (self.topkast.is_attached and self.optimizer.state.get(weight.parameter))

    def check(self):
        """The network is as sparse as it says."""
        ramp = self.case["rule"] == "ramp"
        for name, weight in self.topkast.weights.items():
            tiers, counts = weight.tiers, (int(weight.active_entries), int(weight.updated_entries))
            assert counts == (int((tiers == 2).sum()), int((tiers > 0).sum())), f"counts of {name}"
            assert ramp or counts[0] == weight.active_count, f"|A| of {name}"
            explores = self.topkast.exploring
            expected = weight.updated_count if explores else weight.active_count
            assert ramp or self.waits(weight) or counts[1] == expected, f"|B| of {name}"
            assert int(weight.nonzero_entries) == int(torch.count_nonzero(weight.alpha())), f"non-zeros of {name}"
            assert weight.is_packed or torch.equal(weight.parameter.detach(), weight.alpha()), f"{name} is not α"


def dense_order(weight):
    return weight.layout.indices().long()


def dense(weight, values):
    """Optimizer state in the weight's own shape, zero outside B."""
    if values.shape == weight.shape:
        return values * weight.updated
    order = dense_order(weight)
    return values.new_zeros(weight.size).index_copy(0, order, values[: order.numel()]).view(weight.shape)


def difference(one, other):
    """Name what differs by more than rounding."""
    if one.keys() != other.keys():
        return f"only one has {sorted(one.keys() ^ other.keys())}"
    for key, value in one.items():
        if isinstance(value, torch.Tensor) and not torch.allclose(value, other[key], rtol=1e-6, atol=1e-8):
            return key
        if not isinstance(value, torch.Tensor) and value != pytest.approx(other[key]):
            return f"{key}: {value} and {other[key]}"
    return ""


def run(case, operations):
    """Run a sequence in all storages; return "" or, if it ended with a documented warning, which.

    Raises:
        AssertionError: the storages differ, or one is not as it should be.
    """
    alone = case["rule"] in ("rigl", "ramp")  # for which masked storage is required
    runs = {kind: Run(kind, case) for kind in STORAGES if not alone or STORAGES[kind] == "masked"}
    for kind, each in runs.items():
        each.others = runs.get(LIKE[kind]) or runs["masked" if kind == "saved" else "saved"]
    replaced, alone_loaded = 0, False  # how often since the last step; whether optimizer state was ever loaded alone
    for at, (name, *arguments) in enumerate(operations):
        what, warned, views = f"operation {at}, {name}", {}, {}
        replaced += REPLACE.get(name, 0)
        alone_loaded |= name == "load" and "optimizer" in arguments[1] and "topkast" not in arguments[1]
        alone_loaded |= name == "renew" and arguments == [True, False]
        for kind, each in runs.items():
            settled, before = each.is_settled, each.view()
            settled &= not any(map(each.waits, each.topkast.weights.values()))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    getattr(each, name)(*arguments)
                    if kind == "saved":
                        each.state()
                except Exception as error:
                    raise AssertionError(f"{what}: {kind} raises {type(error).__name__}: {error}") from error
            warned[kind] = {str(warning.message) for warning in caught}
            for text in warned[kind]:
                assert any(known in text and kind in kinds for known, kinds in KNOWN.items()), f"{what}: {kind} {text}"
            if settled and each.is_settled and name in NO_TRACE:
                assert not (found := difference(before, each.view())), f"{what}: {kind} leaves a trace in {found}"
        if anew := sorted(kind for kind in runs if any(ANEW in text for text in warned[kind])):
            assert alone_loaded or replaced > 4, f"{what}: the optimizer's state begins anew in {anew}"
            return "anew: " + ", ".join(anew)
        replaced = 0 if name in ("train", "idle") else replaced
        if not all(each.is_settled for each in runs.values()):
            continue
        for kind, each in runs.items():
            views[kind] = each.view(state=name == "train" and arguments[0])
            try:
                each.check()
            except AssertionError as error:
                raise AssertionError(f"{what}: {kind}: {error}") from None
            assert not (found := difference(views["masked"], views[kind])), f"{what}: {kind} has another {found}"
    return ""


def draw(seed, length=12):
    """Draw settings and operations."""
    random = Random(seed)
    rule = random.choice(["magnitude"] * 5 + ["random", "set", "set", "rigl", "ramp"])
    structure = random.choice(["unstructured"] * 3 + ["block"] + (["2:4"] if rule == "magnitude" else []))
    explores = rule not in ("set", "rigl")
    case = {
        "optimizer": random.choice(list(OPTIMIZERS)),
        "rule": rule,
        "structure": structure,
        "every": random.randint(2, 4),
        "delay": random.randint(0, 1) if rule == "magnitude" else 0,
        "stop": random.choice([None, random.randint(3, 15)]) if explores else None,
        "penalty": random.choice(["auto", None]),
        "power": random.choice([1.0, 1.0, 1.0, 2.0]) if explores else 1.0,
        "late": random.random() < 0.15,
    }
    seeds, shuffled = (lambda: random.randrange(1000)), (lambda *parts: random.choice(list(permutations(parts))))
    parts = [
        lambda: ("model", *shuffled("topkast", "optimizer")),
        lambda: ("model", "topkast"),
        lambda: ("model",),
        lambda: ("optimizer",),
    ]
    own, either = (lambda: random.random() < 0.6), (lambda: random.random() < 0.5)
    density = lambda: random.choice([1, 1, 0.99, 0.6])  # noqa: E731
    drawn = {
        "train": (10, lambda: (random.randint(1, 4), seeds())),
        "idle": (1, lambda: (either(),)),
        "interrupt": (1, lambda: ()),
        "refresh": (3, lambda: ()),
        "recover": (1, lambda: ()),
        "restart": (1, lambda: ()),
        "save": (5, lambda: (shuffled("model", "topkast", "optimizer"),)),
        "load": (6, lambda: (random.randrange(4), random.choices(parts, (4, 2, 2, 2))[0](), own())),
        "reload": (2, lambda: (shuffled("topkast", "optimizer", "attach"), either())),
        "resume": (2, lambda: (random.randrange(4), shuffled("topkast", "optimizer", "attach"), own())),
        "other": (3, lambda: (seeds(), density())),
        "swap": (4, lambda: (seeds(), density(), either())),
        "look": (2, lambda: (random.randrange(4),)),
        "averages": (2, lambda: (seeds(), random.randint(1, 2))),
        "write": (2, lambda: (seeds(), either())),
        "renew": (3, lambda: (either(), either())),
        "take_over": (1, lambda: (either(),)),
        "copy": (2, lambda: (shuffled("model", "topkast", "optimizer"),)),
        "detach": (2, lambda: ()),
        "attach": (1, lambda: ()),
        "scale": (1, lambda: (random.choice([0.5, 1.5]),)),
        "add_group": (2 if case["late"] else 0, lambda: ()),
    }
    # some are left out and others are frequent, so that rare ones meet
    often = {name: random.choice([0, 1, 4]) for name in drawn} | {"train": 1}
    weights = [often[name] * frequency for name, (frequency, _) in drawn.items()]
    names = random.choices(list(drawn), weights, k=length)
    operations = []
    for name in ["train", "save", *names, "train"]:
        operations.append((name, *drawn[name][1]()))
        if name == "load" and operations[-1][2] == ("optimizer",):  # masked and packed runs save it differently before
            operations.append(("train", 1, seeds()))
    return case, operations


def failure(case, operations):
    """Return why a sequence fails, or None."""
    try:
        run(case, operations)
    except AssertionError as error:
        return str(error)
    return None


def shrunk(case, operations):
    """Drop operations one at a time, as long as the sequence fails alike."""
    what = failure(case, operations).partition(", ")[2]
    for at in reversed(range(len(operations))):
        fewer = operations[:at] + operations[at + 1 :]
        if (failure(case, fewer) or "").partition(", ")[2] == what:
            return shrunk(case, fewer)
    return operations


def run_all(seeds):
    """Run many sequences; return how they ended, and raise with the shortest that fails like each."""
    ends, failures = Counter(), []
    for seed in seeds:
        case, operations = draw(seed)
        try:
            ends[run(case, operations) or "alike"] += 1
        except AssertionError:
            operations = shrunk(case, operations)
            failures.append(f"seed {seed}: {failure(case, operations)}\n  run({case},\n      {operations})")
    assert not failures, f"{len(failures)} sequences fail; {dict(ends)}\n" + "\n".join(failures)
    return ends


PLAIN = draw(0)[0] | {"optimizer": "adam", "rule": "magnitude", "structure": "unstructured", "every": 4, "delay": 0}
PLAIN |= {"stop": None, "penalty": None, "power": 1.0, "late": False}
ALL = ("model", "topkast", "optimizer")
# Sequences that failed once: (what differs from PLAIN, operations).
ONCE = {
    "packed state of Adagrad is loaded by masked weights, and entries enter B": (
        {"optimizer": "adagrad"},
        [("save", ALL), ("load", 0, ALL, False), ("other", 9, 1), ("train", 1, 7)],
    ),
    "a weight without an optimizer explores after exploration stops": (
        {"stop": 3, "late": True},
        [("train", 4, 1), ("copy", ALL)],
    ),
    "sets are chosen again between two loads": (
        {},
        [("train", 2, 1), ("swap", 5, 1, False), ("refresh",), ("other", 9, 1), ("train", 3, 2)],
    ),
    "a weight joins, which explores, when the others do not": (
        {"stop": 3, "late": True, "penalty": None},
        [("train", 4, 242), ("train", 3, 57), ("add_group",), ("train", 3, 822)],
    ),
    "exploration begins again, and a weight that joined still explores": (
        {"stop": 3, "late": True},
        [("train", 3, 1), ("add_group",), ("restart",), ("train", 2, 1)],
    ),
    "weights are swapped before a resumed run is attached": (
        {},
        [("train", 5, 1), ("save", ALL), ("begin_again",), ("swap", 6, 1, False), ("attach",), ("train", 3, 2)],
    ),
    "an optimizer made anew has not stepped when the run begins again": (
        {"penalty": "auto"},
        [("train", 2, 1), ("renew", False, False), ("restart",), ("train", 3, 2)],
    ),
    "two averages with the same active set are swapped in": (
        {},
        [("train", 2, 1), ("averages", 3, 2), ("train", 3, 2)],
    ),
    "weights are looked at that were there before others were loaded": (
        {},
        [("train", 2, 1), ("save", ALL), ("other", 5, 1), ("look", 0), ("swap", 6, 1, True), ("train", 2, 1)],
    ),
    "weights are swapped after others were loaded": (
        {},
        [("train", 2, 1), ("other", 5, 1), ("swap", 6, 1, False), ("swap", 7, 0.6, True), ("train", 3, 2)],
    ),
}


@pytest.mark.parametrize("sequence", ONCE)
def test_sequence_that_failed_once(sequence):
    changes, operations = ONCE[sequence]
    run(PLAIN | changes, operations)


def test_few_random_sequences_train_alike_in_all_storages():
    assert run_all(range(8))["alike"] > 0


@pytest.mark.slow
def test_random_sequences_train_alike_in_all_storages():
    ends = run_all(range(1000, 1250))
    assert ends["alike"] > 150

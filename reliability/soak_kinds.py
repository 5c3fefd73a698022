"""How the cases of each kind are run."""

import itertools
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from loader import Resumable
from nouns import nouns
from soak_cases import Case
from soak_oracle import Oracle, expect, order_of, spread
from soak_run import Run, build_engine, check_equal, rules_of, stop_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from whole import whole

from lightning_topkast import TopKastCallback

PATIENCE = 600  # seconds that a child process may take
# Children begin without the threads of this process, and need not import torch again.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_topkast", "torch.distributed.fsdp", "torch.distributed.tensor"])


def run_case(case: Case, folder: Path, counts: Counter[str]) -> None:
    """Run one case; what it was is added to `counts`.

    Raises:
        Violation: the library broke a rule.
        Refused: there is nothing to train.
    """
    {"loop": in_loop, "trainer": in_trainer, "killed": killed, "sharded": sharded}[case.kind](case, folder, counts)


def in_loop(case: Case, folder: Path, counts: Counter[str]) -> Run:
    run = Run(case, folder)
    for _ in range(case.steps):
        run.advance()
    counts["steps"] += run.topkast.step_count
    counts["refreshes"] += run.topkast.refresh_count
    counts["resumes"] += sum(event == "save" for events in case.events.values() for event, _ in events)
    return run


# --- a process that is killed -------------------------------------------------------------------------------------


def killed(case: Case, folder: Path, counts: Counter[str]) -> None:
    """Kill a process in the middle, go on from its last file, and end where the run ends that nobody killed."""
    whole = in_loop(case, folder, counts)
    path = folder / "killed.pt"
    child = _context.Process(target=_train_until_killed, args=(case, folder, path), daemon=True)
    child.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists() and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(Random(case.seed).random() * 0.02 * case.steps)
    finally:
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            counts["kills"] += 1
        child.join(PATIENCE)
    expect(path.exists(), f"the child ended with {child.exitcode} before it saved anything")
    resumed = Run(case, folder, watched=False, other=1)
    resumed.load(path, other=1)
    counts["resumes"] += 1
    while resumed.step < case.steps:
        resumed.advance()
    check_equal(whole.everything(), resumed.everything())


def _train_until_killed(case: Case, folder: Path, path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = Run(case, folder, watched=False)
    for _ in range(case.steps):
        run.advance()
        run.save(path)
        time.sleep(0.015)
    time.sleep(PATIENCE)


# --- Lightning ----------------------------------------------------------------------------------------------------


class Task(LightningModule):
    def __init__(self, case: Case, other: int = 0) -> None:
        super().__init__()
        self.case, self.net = case, case.build(other)
        self.observer: Observer | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (torch.tanh(self.net(batch)) - 0.3).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.case.make_optimizer(dict(self.named_parameters()))

    def configure_gradient_clipping(self, optimizer: Any, *limits: Any, **more: Any) -> None:
        self.clip_gradients(optimizer, *limits, **more)
        if self.observer is not None:
            self.observer.observe(self, optimizer)


class Observer(Callback):
    """Lets the oracle go along, and saves once."""

    def __init__(self, case: Case, topkast: TopKastCallback, path: Path, save_at: int) -> None:
        self.case, self.callback, self.path, self.save_at = case, topkast, path, save_at
        self.oracle: Oracle | None = None
        self.seen: tuple[dict[str, Tensor | None], list[float]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.callback.topkast is not None
        values = {f"net.{name}": value for name, value in self.case.build().named_parameters()}
        self.oracle = Oracle(values, rules_of(self.case, self.callback.topkast), self.case.make_optimizer)
        self._compare(trainer, pl_module)

    def observe(self, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        assert self.oracle is not None
        gradients: dict[str, Tensor | None] = {}
        for name, parameter in pl_module.named_parameters():
            gradient, sets = parameter.grad, self.oracle.sets.get(name)
            if gradient is not None and sets is not None and gradient.shape != sets[0].shape:
                gradient = spread(gradient, *sets, self.oracle.rules.units)
            gradients[name] = None if gradient is None else gradient.clone()
        self.seen = gradients, [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.oracle is not None
        if self.seen is None:
            return
        self.oracle.step_with(*self.seen)
        self.seen = None
        self._compare(trainer, pl_module)
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        topkast = self.callback.topkast
        assert topkast is not None
        assert self.oracle is not None
        masked = all(weight.storage == "masked" for weight in topkast.weights.values())
        exact = masked and self.case.settings["penalty"] != "norm"
        self.oracle.compare(topkast, trainer.optimizers[0], exact, pl_module.state_dict())


def in_trainer(case: Case, folder: Path, counts: Counter[str]) -> None:
    """Train under Lightning, and once more from a checkpoint of the middle: they end alike, bit for bit."""
    build_engine(case, Task(case))  # refused cases end here
    path = folder / "middle.ckpt"
    whole = _fit(case, folder, path, counts, None)
    if path.exists():
        counts["resumes"] += 1
        check_equal(whole, _fit(case, folder, path, counts, path))


def _fit(case: Case, folder: Path, path: Path, counts: Counter[str], ckpt_path: Path | None) -> dict[str, Any]:
    settings = dict(case.settings)
    if isinstance(settings["stop_exploring_at"], float):
        settings["stop_exploring_at"] = stop_of(case)
    callback, task = TopKastCallback(**nouns(**settings)), Task(case, other=1 if ckpt_path else 0)
    callbacks: list[Callback] = [callback]
    if ckpt_path is None:
        task.observer = Observer(case, callback, path, save_at=1 + case.seed % max(case.steps // case.accumulate, 2))
        callbacks.append(task.observer)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=-(-case.steps // 4), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        accumulate_grad_batches=case.accumulate, gradient_clip_val=case.clip,
    )  # fmt: skip
    batches = Resumable(case.batch(step, 0) for step in range(4))
    trainer.fit(task, batches, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    topkast = callback.topkast
    assert topkast is not None
    counts["steps"] += topkast.step_count
    counts["refreshes"] += topkast.refresh_count
    return {
        "model": {name: value.clone() for name, value in task.state_dict().items()},
        "theta": {name: weight.theta() for name, weight in topkast.weights.items()},
        "topkast": topkast.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
    }


# --- weights that are sharded -------------------------------------------------------------------------------------


def sharded(case: Case, folder: Path, counts: Counter[str]) -> None:
    """Train over two ranks whose gradients are given: each sees what one process would have."""
    case.sizes |= {"last": False} if case.family == "conv2d" else {}
    build_engine(case, case.build())  # refused cases end here
    ranks = [_context.Process(target=_rank, args=(case, folder, rank), daemon=True) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + PATIENCE
        for rank in ranks:
            rank.join(max(deadline - time.monotonic(), 0))
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
    for number in range(2):
        report = folder / f"rank-{number}.txt"
        expect(report.exists(), f"rank {number} ended with {ranks[number].exitcode} and said nothing")
        found = report.read_text()
        expect(found.startswith("steps"), f"rank {number}: {found}")
    steps, refreshes = found.split()[1:]
    counts["steps"] += int(steps)
    counts["refreshes"] += int(refreshes)


def _rank(case: Case, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE / 2))
    try:
        found = _train_sharded(case)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    (folder / f"rank-{rank}.txt").write_text(found)
    dist.destroy_process_group()


def _train_sharded(case: Case) -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = case.build()
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    is_packed = case.settings["storage"] != "masked"
    if is_packed:  # before FSDP2 slices the values
        topkast = build_engine(case, model)
    if case.cut == "FSDP2":
        fully_shard(model, mesh=mesh)
    elif case.cut != "DDP":
        _shard(model, mesh, case.cut)
    if not is_packed:
        topkast = build_engine(case, model)
    optimizer = case.make_optimizer(dict(model.named_parameters()))
    topkast.attach(optimizer)
    oracle = Oracle(plain, rules_of(case, topkast), case.make_optimizer)
    for step in range(case.steps):
        generator = torch.Generator().manual_seed(case.seed + step)
        gradients: dict[str, Tensor | None] = {}
        for name, parameter in model.named_parameters():
            shape = oracle.parameters[name].shape
            given = torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            gradients[name] = given.masked_fill(~oracle.sets[name][1], 0) if name in oracle.sets else given
            if parameter.shape != shape:
                order = order_of(*oracle.sets[name], oracle.rules.units)
                given = nn.functional.pad(given.flatten()[order], (0, parameter.numel() - order.numel()))
            if isinstance(parameter, DTensor):
                given = distribute_tensor(given.clone(), mesh, parameter.placements, src_data_rank=None)
            parameter.grad = given
        optimizer.step()
        oracle.step_with(gradients, [group["lr"] for group in optimizer.param_groups])
        # torch rounds bfloat16 otherwise where a vector register is not full, which depends on the part's size
        exact = not is_packed and case.settings["penalty"] != "norm" and case.dtype != "bfloat16"
        oracle.compare(topkast, optimizer, exact, whole(model.state_dict()))
    return f"steps {topkast.step_count} {topkast.refresh_count}"


def _shard(model: nn.Module, mesh: Any, cut: str) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            placements = [Replicate() if cut == "Replicate" else Shard(min(int(cut[6]), parameter.dim() - 1))]
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
                )
            module._parameters[name] = made[id(parameter)]


def folders(root: Path) -> Any:
    """A new empty folder for every case."""
    for number in itertools.count():
        folder = root / str(number)
        folder.mkdir()
        yield folder

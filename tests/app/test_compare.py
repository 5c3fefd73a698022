"""`topkast-compare` makes runs: which ones, once each, whatever happens to some of them."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_topkast.app.commands.compare import main
from lightning_topkast.app.sweep import expand as grids
from lightning_topkast.app.sweep.expand import Sweep, expand, read_sweep, run_name
from lightning_topkast.app.sweep.launch import Launcher, hydra_configs
from lightning_topkast.app.sweep.run_process import what_failed
from tests import processes

SHIPPED = sorted(path.stem for path in (Path(grids.__file__).parent / "sweeps").glob("*.yaml"))
TINY = ["trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=csv",
        "model.hidden=[8]", "trainer.max_epochs=1"]  # fmt: skip


@pytest.fixture
def compare(monkeypatch, capfd, tmp_path):
    """Run the command in this process on the folder `runs`; return exit code, output and errors."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["topkast-compare", str(tmp_path / "runs"), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run


def results(folder):
    """The results by run."""
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "runs").glob("*/result.json")}


def written(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/result.json")}


def rows(out):
    """First and last cell of the rows of the Markdown table that was written."""
    ((path, *_),) = (line.removeprefix("wrote ").split(", ") for line in out.splitlines() if line[:6] == "wrote ")
    lines = Path(path).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: row[-1] for row in cells[2:]}


# --- which runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loader(tmp_path):
    with hydra_configs():
        yield Launcher(tmp_path, [], None).loader


def test_grids_are_products_with_what_is_common_and_each_run_is_made_once(loader):
    sweep = Sweep([["sparsity=dense"], ["sparsity=topkast,dense", "seed=5"]], common=["data=digits", "seed=0,1"])
    runs = [run.overrides for run in expand(sweep, ["trainer.max_epochs=2"], loader)]
    more = ("trainer.max_epochs=2",)
    assert runs == [
        ("data=digits", "seed=0", "sparsity=dense", *more),
        ("data=digits", "seed=1", "sparsity=dense", *more),
        ("data=digits", "seed=5", "sparsity=topkast", *more),
        ("data=digits", "seed=5", "sparsity=dense", *more),
    ]


def test_overrides_of_the_command_line_win(loader):
    (run,) = expand(Sweep([["seed=0,1"]], ["data=digits"]), ["seed=7"], loader)
    assert run.overrides == ("data=digits", "seed=7")


def test_run_is_named_readably_safely_and_uniquely():
    name = run_name(["seed=3", "sparsity=set", "optimizer.lr=1e-3", "data=digits", "paths.data_dir=/x", "logger=csv"])
    assert re.fullmatch(r"digits-set-lr_1e_3-seed3-[0-9a-f]{7}", name)
    assert name == run_name(["data=digits", "optimizer.lr=1e-3", "sparsity=set", "seed=3"]), "whatever the order"
    long = [run_name([f"data.path=/a b/{'x' * 200}{n}'$(rm)", "seed=1"]) for n in range(2)]
    assert len(set(long)) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{10,80}", each) and "seed1" in each for each in long)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_each_run_of_a_shipped_sweep_can_be_composed(name, tmp_path):
    with hydra_configs():
        launcher = Launcher(tmp_path, [], None)
        runs = expand(read_sweep(name), ["seed=0"], launcher.loader)
        settings = [json.dumps(launcher.settings(run), sort_keys=True) for run in runs]
    assert len(runs) > 1
    assert len(set(settings)) == len(runs), "no two runs compute the same"


@pytest.mark.parametrize(
    ("text", "said"),
    [("grids: 3", "the keys `grids`"), ("grids: [[a=1]]\nmore: 1", "expected the keys"), ("[", "cannot be read")],
)
def test_sweep_file_that_is_none_is_refused(compare, tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    code, _, err = compare("--sweep", str(tmp_path / "mine.yaml"))
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sparsity=topkas"], "did you mean 'topkast'"),
        (["optimizr.lr=1"], "did you mean 'optimizer.lr'"),
        (["--sweep", "digit"], "did you mean 'digits'"),
        ([], "there is no folder"),
        (["--jobs", "2"], "needs something to run"),
    ],
)
def test_mistake_is_answered_in_one_line_before_any_run(compare, tmp_path, arguments, said):
    code, _, err = compare(*arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("topkast-compare: ")
    assert said in line
    assert not results(tmp_path)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_changed_ones_are_refused(compare, tmp_path):
    grid = ["sparsity=dense,small_dense,topkast", "seed=0,1", *TINY]
    code, out, _ = compare(*grid)
    assert code == 0
    assert rows(out) == {"dense": "2", "small_dense": "2", "topkast": "2"}
    assert [line[:5] for line in out.splitlines() if line.startswith("[")] == [f"[{n}/6]" for n in range(1, 7)]
    assert {path.name for path in (tmp_path / "runs").glob("comparison.*")} >= {"comparison.md", "comparison.csv"}
    before = written(tmp_path)
    assert len(before) == 6

    code, out, _ = compare(*grid, "logger=none")  # told to others or not, it is the same run
    assert code == 0
    assert "6 runs in" in out
    assert "6 of them completed before" in out
    assert written(tmp_path) == before

    path = next(iter(before))
    changed = json.loads(path.read_text())
    changed["config"]["optimizer"]["lr"] = 0.5
    path.write_text(json.dumps(changed))
    code, _, err = compare(*grid)
    assert code == 2
    assert f"{path.parent} was started with optimizer.lr=0.5, which is 0.003 now" in err

    path.write_text("{")
    code, _, _ = compare(*grid)
    assert code == 0
    now = written(tmp_path)
    assert {each for each in now if now[each] != before[each]} == {path}, "the broken one was made again, and no other"


@pytest.mark.slow
def test_failing_and_killed_runs_do_not_lose_the_others_and_are_tried_again(compare, tmp_path):
    sweep = {
        "common": [*TINY[:-1], "trainer.max_epochs=3"],
        "grids": [
            ["+callbacks.bomb._target_=tests.app.bombs.KillOnce", f"+callbacks.bomb.marker={tmp_path}/killed"],
            ["optimizer.lr=-1.0"],
            ["sparsity=dense"],
        ],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(sweep))
    code, out, err = compare("--sweep", str(tmp_path / "mine.yaml"))
    assert code == 1
    assert rows(out) == {"dense": "1"}
    assert "failed: killed by SIGKILL" in out
    assert "failed: optimizer: Invalid learning rate: -1.0" in out
    assert "2 of the runs failed" in err

    code, out, err = compare("--sweep", str(tmp_path / "mine.yaml"))
    assert code == 1
    assert sorted(name.partition(" ")[0] for name in rows(out)) == ["dense", "topkast"]
    assert "1 of the runs failed" in err
    (log,) = (tmp_path / "runs").glob("*marker*/run.log")
    epochs = re.findall(r"^epoch (\d)/3:", log.read_text(), re.MULTILINE)
    assert epochs == ["1", "2", "3"], "it went on from its checkpoint"
    (found,) = (result for name, result in results(tmp_path).items() if "marker" in name)
    assert (found["steps"], found["examples"]) == (6, 6 * 64)


@pytest.mark.slow
def test_exit_code_is_the_same_if_all_runs_fail(compare):
    code, _, err = compare("optimizer.lr=-1.0", *TINY)
    assert code == 1
    assert "no finished run" in err
    assert "of 1 started" in err
    assert "Invalid learning rate: -1.0" in err


@pytest.mark.parametrize(
    ("code", "printed", "said"),
    [
        (-9, "epoch 1/2", "killed by SIGKILL"),
        (2, "topkast-train: goes on\ntopkast-train: optimizer: bad\nwandb: bye\n", "optimizer: bad"),
        (1, "topkast-train: goes on\nTraceback\n  File\nMemoryError: all of it\n\n", "MemoryError: all of it"),
        (0, "all is well", "exited with code 0 without a result"),
        (1, "", "exited with code 1 without a result"),
    ],
)
def test_last_line_of_the_error_says_what_failed(code, printed, said):
    assert what_failed(code, printed) == said


@pytest.mark.slow
def test_diverged_run_is_counted_and_not_repeated(compare, tmp_path):
    grid = ["sparsity=dense", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=none", "seed=0,1", *TINY]
    code, _, _ = compare(*grid)
    assert code == 0
    assert {result["status"] for result in results(tmp_path).values()} == {"diverged"}
    before = written(tmp_path)
    code, out, _ = compare(*grid)
    assert code == 0
    assert rows(out) == {"dense": "0 + 2 diverged"}
    assert written(tmp_path) == before


def test_second_sweep_in_the_same_folder_is_refused_while_one_runs(compare, tmp_path):
    from filelock import FileLock

    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".topkast-compare.lock"):
        code, _, err = compare("seed=0", *TINY)
    assert code == 2
    assert "another topkast-compare is running" in err


def test_jobs_without_joblib_say_how_to_install_it(compare, monkeypatch):
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    monkeypatch.setattr(ConfigLoaderImpl, "get_group_options", lambda *_, **__: ["basic"])
    code, _, err = compare("seed=0", "--jobs", "2")
    assert code == 2
    assert "lightning-topkast[sweep]" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_parallel_sweep_ends_all_processes_and_goes_on_without_repeating(compare, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    grid = ["seed=0,1,2,3,4,5", *TINY[:-1], "trainer.max_epochs=40"]
    command = [sys.executable, "-m", "lightning_topkast.app.commands.compare", tmp_path / "runs", *grid, "--jobs", "2"]

    def done():
        return {
            path.parent.name for path in (tmp_path / "runs").glob("*/result.json") if "finished" in path.read_text()
        }

    with processes.started(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    ) as process:  # fmt: skip
        while not done() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode == 130
        assert "interrupted; the same command continues" in err
        deadline = time.monotonic() + 200
        while (left := _session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finished = done()
    assert 0 < len(finished) < 6
    before = {path: at for path, at in written(tmp_path).items() if path.parent.name in finished}

    code, out, _ = compare(*grid)
    assert code == 0
    assert f"{len(finished)} of them completed before" in out
    assert rows(out) == {"topkast": "6"}
    assert before.items() <= written(tmp_path).items()


def _session(number):
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == number and fields[0] != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("where", ["in a run", "in the launcher"])
def test_full_disk_stops_the_sweep_in_one_line_that_names_it_and_keeps_what_is_finished(
    compare, tmp_path, monkeypatch, where
):
    started = []

    def run(cfg):
        folder = Path(cfg.paths.output_dir)
        started.append(folder.name)
        if cfg.seed == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "result.json"))
        (folder / "result.json").write_text(json.dumps({"status": "finished"}))

    monkeypatch.setattr("lightning_topkast.app.sweep.launch.run_in_folder", run)
    if where == "in the launcher":  # Hydra writes the configuration of a run before it calls the run

        def save(cfg, filename, output_dir):
            if filename == "config.yaml" and cfg.seed == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("hydra.core.utils._save_config", save)
    code, _, err = compare("data=digits", "seed=0,1,2", *TINY)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("topkast-compare: ")]
    assert "No space left on device; free space on the disk mounted at /" in line
    assert f"{tmp_path}/runs" in line
    assert len(started) == len(set(started))
    assert len(results(tmp_path)) >= 1


def test_options_of_a_folder_of_ones_own_are_compared(compare, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "small.yaml").write_text("defaults: [mlp]\nhidden: [4]\n")
    grid = ["model=small", "seed=0", *(text for text in TINY if not text.startswith("model."))]
    code, out, err = compare(*grid, "--config-dir", str(tmp_path / "conf"))
    assert code == 0, err
    assert rows(out) == {"topkast": "1"}


def test_folder_of_ones_own_that_is_missing_is_named(compare):
    code, _, err = compare("seed=0", *TINY, "--config-dir", "nowhere")
    assert code == 2
    assert "--config-dir: there is no folder nowhere" in err

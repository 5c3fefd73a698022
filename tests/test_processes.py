"""A test whose time is up leaves no process behind."""

import os
import sys
from pathlib import Path

import pytest

from tests.processes import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# forks one process into its own session and another into a session of its own, and then hangs as they do
HANGING = """
import os, pathlib, sys, time
for number in range(2):
    if os.fork() == 0:
        if number:
            os.setsid()
        break
else:
    number = 2
pathlib.Path(sys.argv[1], f"pid-{number}").write_text(str(os.getpid()))
time.sleep(1000)
"""

TEST = """
import os, sys, time
import pytest
from tests.processes import forked, run

@pytest.fixture(scope="module")
def hung():
    run([sys.executable, {script!r}, {folder!r}])

@pytest.mark.timeout(4)
def test_in_a_fixture(hung):
    pass

@pytest.mark.timeout(1)
def test_with_a_fork():
    with forked() as children:
        children.append(os.fork())
        if not children[0]:
            time.sleep(1000)
        open({folder!r} + "/pid-3", "w").write(str(children[0]))
        os.waitpid(children[0], 0)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_a_test_that_times_out_ends_all_that_it_started(tmp_path):
    script, file = tmp_path / "hanging.py", tmp_path / "test_hanging.py"
    script.write_text(HANGING)
    file.write_text(TEST.format(script=str(script), folder=str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, file]
    done = run(command, cwd=tmp_path, env=environment)
    assert "1 failed, 1 error" in done.stdout, done.stdout
    assert done.stdout.count("Timeout") >= 2
    pids = [int(path.read_text()) for path in sorted(tmp_path.glob("pid-*"))]
    assert len(pids) == 4
    assert not [pid for pid in pids if is_running(pid)]

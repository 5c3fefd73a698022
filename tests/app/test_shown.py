"""Names and messages from files: nothing in them is obeyed by a terminal, a spreadsheet, Markdown or matplotlib."""

import ast
import csv
import io
import json
from pathlib import Path

import pytest
import torch

from lightning_topkast import TopKastError, app
from lightning_topkast.app.commands.compare import main as compare
from lightning_topkast.app.commands.export import main as export
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.formatting import csv_cell
from lightning_topkast.app.run.summary import WeightCount, print_summary
from lightning_topkast.app.sweep.collect import collect
from lightning_topkast.app.sweep.plot import draw
from lightning_topkast.app.sweep.tables import to_csv, to_markdown
from lightning_topkast.text import markdown, printable
from tests.app.result_files import write_result
from tests.app.test_comparison import result

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egpj.\r[bold]:smile:[/x] =1+1|a|$\\frac{x$ <img src=x>"
UNSEEN = ("\x1b", "\x07", "\x9b", "\u202e")


def check_harmless(text):
    assert not [char for char in UNSEEN if char in text]
    assert not [char for char in text.replace("\n", "") if not char.isprintable() and char != "\t"]


def test_only_one_place_prints():
    """Everything else goes through it, so that nothing is printed as it is."""
    for file in Path(app.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and file.name != "terminal.py":
                assert node.func.id not in ("print", "Console"), f"{file}:{node.lineno}"


def test_control_characters_are_escaped_and_all_else_is_kept():
    assert printable("a\x1b[2Jb\u202ec\n\té×≥") == "a\\x1b[2Jb\\u202ec\n\té×≥"
    for kind in (TopKastError, AppError):
        check_harmless(str(kind(f"'{HOSTILE}' is not valid")))


def test_names_in_a_checkpoint_are_shown_harmlessly(command_line, tmp_path):
    weight = torch.zeros(8, 8)
    weight[0, 0] = 1
    content = {"pytorch-lightning_version": "2.6", "global_step": 1, "state_dict": {HOSTILE: weight}}
    torch.save(content, tmp_path / "a.ckpt")
    code, out, err = command_line("topkast-export", export)(tmp_path / "a.ckpt", "--format", "dense")
    assert code == 0, err
    check_harmless(out + err)
    content["state_dict"] = HOSTILE
    torch.save(content, tmp_path / "a.ckpt")
    check_harmless("".join(command_line("topkast-export", export)(tmp_path / HOSTILE.replace("/", ""))[1:]))


def test_summary_of_a_run_shows_names_as_they_are(tmp_path, capsys):
    print_summary([WeightCount(HOSTILE, (2, 2), 4, 1)], {HOSTILE: 0.5}, tmp_path / "[red]x", None, None)
    out = capsys.readouterr().out
    check_harmless(out)
    assert "[red]x" in out
    assert out.count("[bold]:smile:") >= 1


@pytest.fixture
def sweep(tmp_path):
    """A folder of runs with hostile settings and names, one of which has failed."""
    for number in range(3):
        made = result(f"set{HOSTILE}" if number else "=dense", 0, 0.5 + number / 10, 0.9, 0.8)
        made["config"] |= {"optimizer": {"lr": 0.1 * number, HOSTILE: f"{HOSTILE}{number}"}}
        made["choices"]["data"] = HOSTILE
        made["versions"] = {HOSTILE: str(number)}
        made["monitor"]["name"] = f"val/{HOSTILE}"
        write_result(tmp_path / f"run-{number}", made)
    write_result(tmp_path / "run-\x1b[2J", made | {"status": "failed", "error": HOSTILE})
    return tmp_path


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # the names are long
def test_comparison_is_harmless_wherever_it_is_shown(sweep, command_line):
    code, out, err = command_line("topkast-compare", compare)(sweep)
    assert code == 1, err
    check_harmless(out + err)
    check_harmless((sweep / "comparison.md").read_text())
    json.loads((sweep / "comparison.json").read_text())
    assert (sweep / "comparison.png").stat().st_size > 1000


def test_markdown_tables_keep_their_columns(sweep):
    lines = [line for line in to_markdown(collect(sweep)).splitlines() if line.startswith("|")]
    counts = {len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in lines}
    assert len(lines) > 2
    assert len(counts) == 1
    assert markdown("a|b\\|c\nd<e>") == "a\\|b\\\\\\|c d\\<e>"


def test_cells_are_no_formulas_and_numbers_stay_numbers(sweep):
    rows = list(csv.reader(io.StringIO(to_csv(collect(sweep)))))
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        check_harmless(cell)
        if cell[:1] in "=+-@" and cell:
            float(cell)
    assert [csv_cell(v) for v in ("=1", "+a", "-a", "@a", "-1.5", "+2", -1.5, "a=b", None)] == [
        "'=1", "'+a", "'-a", "'@a", "-1.5", "+2", -1.5, "a=b", None,
    ]  # fmt: skip


def test_two_dollars_in_a_setting_are_drawn_as_they_are(sweep):
    figure = draw(collect(sweep).comparisons)
    figure.canvas.draw()

"""The documentation's Python runs, its site builds strictly, and it names settings, files and tests that there are."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from docs.tools import settings
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import lightning_topkast
from lightning_topkast import L2, Schedule, Settings, Targets, TopKastCallback
from tests import processes

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
PROSE = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")), *PAGES]
SETTINGS = [
    "Settings", "Targets", "Schedule", "Ramp", "Magnitude", "SET", "RigL", "Unstructured", "Block", "NOfM", "L2", "L1",
    "Norm", "Masked", "Packed", "TopKGradients",
]  # fmt: skip


def examples_of(page):
    """The Python blocks of a page, which share one namespace."""
    return list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())


def test_the_pages_with_python_are_found():
    names = {str(page.relative_to(ROOT / "docs")) for page in WITH_PYTHON}
    assert names >= {"index.md", "guides/researcher.md", "guides/practitioner.md", "guides/migration.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_python_of_a_page_runs_from_its_top_to_its_end(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = examples_of(page)
    assert len(examples) == page.read_text(encoding="utf-8").count("```python")
    for example in examples:
        if "rigl_torch" in example.parsed and not all(map(importlib.util.find_spec, ("rigl_torch", "torchvision"))):
            continue  # it imports torchvision, and is not among our extras
        example.evaluate()


def test_first_change_of_contributing_passes_its_own_test():
    examples = examples_of(ROOT / "CONTRIBUTING.md")
    for example in examples:
        example.evaluate()
    (test,) = (made for name, made in examples[0].namespace.items() if name.startswith("test_"))
    test()


def test_python_that_fails_fails_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nanswer = 41\n```\n\ntext\n\n```python\nassert answer == 42\n```\n")
    first, second = examples_of(page)
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()


# --- what the pages say of the code -----------------------------------------------------------------------------------


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_fits_its_column(page):
    """Code that is to be copied; what a program prints may be wider."""
    blocks = re.findall(r"(?ms)^```(\w*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"))
    code = [block for language, block in blocks if language in ("", "bash", "python", "yaml", "toml")]
    assert not [line for block in code for line in block.splitlines() if len(line) > 90]


def test_tables_of_settings_are_those_of_the_code():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- settings: (\w+) -->", page) == SETTINGS
    assert page == settings.renewed(page), "run: python docs/tools/settings.py docs/settings.md"
    (row,) = re.findall(r"\| `update_every` \| `int` \| (.*?) \|", page)
    assert row == f"`{lightning_topkast.Schedule().update_every}`"
    (row,) = re.findall(r"\| `products` \| (.*?) \| (.*?) \|", page)
    assert row == ('`"sparse"`, `"dense"`, `"auto"`', '`"sparse"`')


def test_configuration_has_every_setting_with_the_default_of_the_code():
    # without a recipe
    config = OmegaConf.create({"sparsity": OmegaConf.load(ROOT / "conf" / "sparsity" / "topkast.yaml")}).sparsity
    default = Settings(config.forward_sparsity, config.backward_sparsity)
    assert instantiate(config).settings == default
    nouns = {TopKastCallback: config, Targets: config.targets, Schedule: config.schedule, L2: config.penalty}
    short = {"update_every", "include", "exclude"}  # for fields of other nouns
    for noun, written in nouns.items():
        expected = set(inspect.signature(noun).parameters) - (short if noun is TopKastCallback else set())
        assert set(written) - {"_target_", "_convert_"} == expected
    recipe = OmegaConf.load(ROOT / "conf" / "train.yaml").recipe
    assert recipe.update_every == default.schedule.update_every
    assert (recipe.keep_first_dense, recipe.keep_last_dense) == (True, True)
    assert (default.targets.keep_first_dense, default.targets.keep_last_dense) == (True, True)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_tests_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"\b((?:tests|src|conf|docs|examples|benchmarks|reliability)/[\w./-]*\w)(?:::(\w+))?(?![\w<*{])", text
    )
    own = "conf/sparsity/shuffled.yaml"  # what CONTRIBUTING.md asks the reader to write
    assert not [path for path, _ in named if path != own and not list(ROOT.glob(f"{path}*"))]
    assert not [
        (path, test) for path, test in named if test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8")
    ]


def test_the_architecture_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folder = Path(lightning_topkast.__file__).parent
    rooms = [*folder.glob("[a-z]*.py"), *(path.parent for path in folder.glob("*/__init__.py"))]
    assert len(rooms) > 15
    assert not [room.name for room in rooms if f"`{room.name}{'/' if room.is_dir() else ''}`" not in page]


# --- the site ---------------------------------------------------------------------------------------------------------


def build(docs_config: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", docs_config, "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return processes.run(command, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_another_host(site):
    loading = re.compile(
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"|<link[^>]*\shref="(?:https?:)?//[^"]*"'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert not {found[0] for page in pages for found in loading.finditer(page.read_text(encoding="utf-8"))}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    missing = [
        name
        for name in lightning_topkast.__all__
        if not re.search(rf'id="lightning_topkast\.[\w.]*\b{name}"', reference)
    ]
    assert not missing


@pytest.mark.slow
def test_files_that_pages_link_to_are_part_of_the_site(site):
    results = (site / "results.html").read_text(encoding="utf-8")
    linked = re.findall(r'href="(repository/[^"#]+)', results)
    assert "repository/benchmarks/results/fashion_mnist_mlp_tuning.csv" in linked
    assert all((site / target).is_file() for target in linked)
    assert "TopKastCallback(" in (site / "repository" / "examples" / "callback.py.html").read_text(
        encoding="utf-8"
    ).replace('</span><span class="p">', "")


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[a page](elsewhere.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "elsewhere.md" in built.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_its_top_to_its_end(tmp_path, monkeypatch):
    # this environment's kernel, whatever the user has besides, and nothing left in the home directory
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    with warnings.catch_warnings():  # of the notebook's own packages, on their way to the kernel
        warnings.simplefilter("ignore")
        import nbformat
        from nbclient import NotebookClient

        path = ROOT / "examples" / "notebook.ipynb"
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3  # curves and masks
    printed = "".join(output.get("text", "") for output in outputs)
    accuracies = dict(re.findall(r"(dense|sparse): accuracy (0\.\d+)", printed))
    assert float(accuracies["dense"]) > 0.93
    assert float(accuracies["sparse"]) > 0.9
    assert not list(tmp_path.rglob("lightning_logs"))
    assert path.stat().st_size < 300_000

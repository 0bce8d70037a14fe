"""The layout: who imports whom, what a first reader reads, what runs without tests/.

These tests read the modules as text (ast), so that a rule holds even for a line that no test runs.
"""
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = "# ---- the method ends here; below is bookkeeping ----"

# module -> those of ours that it may import, anywhere in its file.
ALLOWED = {
    "losses": set(),
    "align": {"losses"},
    "data": set(),
    "teacher": {"data"},
    "student": {"align", "data", "losses"},
    "eval": {"data", "losses", "student"},
    "train": {"align", "data", "eval", "losses", "student", "teacher"},
}

# What `--help` may wait for, besides the standard library. All else is imported in functions.
LIGHT_PACKAGES = {"filelock", "numpy", "tqdm"}


def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def top_level_names(node):
    """The top-level packages that one import statement names: `import a.b as c` -> ["a"]."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module.split(".")[0]]
    if isinstance(node, ast.ImportFrom):  # `from . import a`: the folder is no package
        return ["a relative import"]
    return []


def all_imports(module):
    """Everything a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source_of(module))):
        names.update(top_level_names(node))
    return names


def imports_when_loaded(module):
    """What is imported as soon as the module is: all statements outside of functions."""
    names = set()
    waiting = [ast.parse(source_of(module))]
    while waiting:
        node = waiting.pop()
        names.update(top_level_names(node))
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def lines_to_fence(module):
    """How many lines a first reader reads of a module with a fence."""
    return source_of(module).splitlines().index(FENCE)


# ---- imports -----------------------------------------------------------------------------------


def test_the_seven_modules_are_all_the_python_at_the_top():
    """A new one wants its line in ALLOWED above: whom may it import?"""
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_no_module_imports_tests(module):
    """The program works in a checkout without that folder."""
    assert "tests" not in all_imports(module)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_one_way(module):
    """losses <- align <- student <- train: whoever reads in this order never meets an unread name.
    Nobody imports train, and data and teacher know nothing of training."""
    ours = all_imports(module) & set(ALLOWED)
    assert ours <= ALLOWED[module]


@pytest.mark.parametrize("module", ["data", "teacher", "eval"])
def test_modules_that_answer_before_torch_import_it_only_inside_functions(module):
    """Importing torch takes seconds, and `--help` and a mistyped flag must not wait for it."""
    light = set(sys.stdlib_module_names) | LIGHT_PACKAGES | {"data"}
    assert imports_when_loaded(module) <= light


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "student", "teacher", "data", "eval"])
def test_one_fence_divides_the_method_from_its_bookkeeping(module):
    assert source_of(module).splitlines().count(FENCE) == 1


@pytest.mark.parametrize("module", ["losses", "align"])
def test_losses_and_align_need_no_fence(module):
    assert FENCE not in source_of(module)


def reading_path():
    """{module: lines}: losses.py and align.py whole, train.py and student.py down to the fence."""
    return {
        "losses": len(source_of("losses").splitlines()),
        "align": len(source_of("align").splitlines()),
        "train": lines_to_fence("train"),
        "student": lines_to_fence("student"),
    }


def test_the_reading_path_is_one_sitting():
    assert sum(reading_path().values()) <= 800, reading_path()


def test_the_readme_counts_the_lines_of_the_reading_path():
    """A number that drifts would be found out by the first reader."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = readme.index("In one sitting:")
    sentence = readme[start:readme.index(FENCE, start)]
    promised = re.findall(r"`(\w+)\.py` \((\d+)", sentence)
    counted = {module: int(lines) for module, lines in promised}
    assert counted == reading_path(), f"README.md, 'In one sitting': write {reading_path()}"


@pytest.mark.parametrize("module", ALLOWED)
def test_no_line_is_longer_than_100_columns(module):
    too_long = []
    for number, line in enumerate(source_of(module).splitlines(), start=1):
        if len(line) > 100:
            too_long.append(f"{module}.py:{number} has {len(line)} columns")
    assert not too_long


# ---- the program without tests/ ----------------------------------------------------------------


def call(folder, *arguments, ahead=None):
    """`python ARGUMENTS` in `folder`, with modules found there or in the folder `ahead` first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if ahead is not None:
        environment["PYTHONPATH"] = str(ahead)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The modules alone, in a folder of their own: what a user has who deletes tests/."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def test_without_tests_it_trains_reports_and_draws(checkout):
    """One run after the other in one test: eval.py reads what train.py wrote."""
    trained = call(checkout, "train.py", "--seeds", "0", "--arms", "undistilled,armada",
                   "--epochs", "1", "--limit", "8", "--eval-limit", "8", "--out", "run")
    assert trained.returncode == 0, trained.stderr

    report = ["eval.py", "run"]
    if importlib.util.find_spec("matplotlib"):
        report.append("--plot")
    reported = call(checkout, *report)
    assert reported.returncode == 0, reported.stderr
    for arm in ("undistilled", "armada"):
        assert arm in reported.stdout


def test_without_tests_it_plans(checkout):
    planned = call(checkout, "train.py", "--plan")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("script", ["train.py", "eval.py", "teacher.py"])
def test_help_is_answered_without_torch(checkout, tmp_path, script):
    """Packages that take seconds to import, and here refuse to be, stand in the way."""
    for package in ("torch", "transformers", "safetensors"):
        (tmp_path / package).mkdir()
        refusal = f"raise ImportError('{package} is imported too early')"
        (tmp_path / package / "__init__.py").write_text(refusal)
    told = call(checkout, script, "--help", ahead=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"usage: {script}")

"""The zoo of defects: is the table in order, and does the tool tell the truth? See defects.py.

That each defect is caught is shown by `python -m tests.defects --check`, of which CI runs a part.
"""
import ast
import filecmp
from pathlib import Path

import pytest

from data import UserError
from tests import defects
from tests.defects import DEFECTS, HANDFULS, ROOT, Defect, main

MODULES = {"losses.py", "align.py", "student.py", "train.py", "data.py", "teacher.py", "eval.py"}
each_defect = pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: str(defect.number))


# ---- the table ----
@each_defect
def test_the_old_text_of_a_defect_occurs_exactly_once(defect):
    """Who changes that line mends the entry in tests/defects.py."""
    source = (ROOT / defect.file).read_text(encoding="utf-8")
    assert source.count(defect.old) == 1, (
        f"defect {defect.number}: {defect.old!r} must occur once in {defect.file}")


@each_defect
def test_a_defect_is_python_and_changes_what_the_program_does(defect):
    """A change of a comment would be a defect that nobody can find."""
    source = (ROOT / defect.file).read_text(encoding="utf-8")
    broken = source.replace(defect.old, defect.new)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))


@each_defect
def test_the_tests_that_a_defect_names_exist(defect):
    assert defect.tests
    for test in defect.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions


def test_defects_are_numbered_from_1_and_spread_over_all_modules():
    assert [defect.number for defect in DEFECTS] == list(range(1, len(DEFECTS) + 1))
    assert len(DEFECTS) >= 24
    assert {defect.file for defect in DEFECTS} == MODULES


def test_every_defect_is_in_one_handful():
    numbers = []
    for first in range(HANDFULS):
        numbers += [defect.number for defect in defects.handful(first)]
    assert sorted(numbers) == list(range(1, len(DEFECTS) + 1))
    assert defects.handful(1) == defects.handful(1 + 7 * HANDFULS)  # any number will do


# ---- what a student is shown ----
@each_defect
def test_a_symptom_does_not_name_the_file_or_quote_the_line(defect):
    assert defect.file not in defect.symptom
    assert defect.old.strip() not in defect.symptom


def test_the_list_shows_numbers_and_symptoms_and_nothing_else(capsys):
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{defect.number:3}  {defect.symptom}" for defect in DEFECTS]


def files_below(folder):
    """The files of a folder as paths relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("defect", DEFECTS[::HANDFULS], ids=lambda defect: str(defect.number))
def test_a_written_copy_differs_in_one_file_and_does_not_hold_the_answer(defect, tmp_path, capsys):
    folder = tmp_path / "broken"
    main(["--write", str(defect.number), str(folder)])
    shown = capsys.readouterr().out
    assert defect.symptom in shown
    assert defect.file not in shown

    names = files_below(folder)
    assert {Path(name) for name in MODULES} <= names
    assert not {Path("tests/defects.py"), Path("tests/test_defects.py")} & names
    assert not any(".git" in name.parts or "__pycache__" in name.parts for name in names)
    _, differ, missing = filecmp.cmpfiles(ROOT, folder, names, shallow=False)
    assert differ == [Path(defect.file)]
    assert missing == []


@pytest.mark.parametrize("words, says", [
    (["--write", "0", "new"], "no defect 0: --list shows 1 to"),
    (["--write", "x", "new"], "--write x: give a number of --list"),
    (["--write", "1", "."], ". is there already: give the name of a new folder"),
    (["--check", "999"], "no defect 999"),
    (["--list", "--handful", "2"], "--handful goes with --check alone"),
    (["--check", "1", "--handful", "2"], "--handful goes with --check alone"),
    ([], "one of the arguments --list --write --check is required"),
])
def test_a_mistake_in_typing_is_one_line_and_status_2(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- what is called caught ----
HARMLESS = Defect(1, "", "losses.py", "import math\n", "import math\n\n", "", ("tests/a.py::b",))


@pytest.mark.parametrize("status, printed, caught", [
    (1, "F\nFAILED tests/a.py::b - assert 0\n1 failed", True),
    (1, "E\nERROR tests/a.py::b - data.UserError: refused\n1 error", True),  # by the program itself
    (0, "1 passed", False),
    (2, "ERROR tests/a.py - SyntaxError\nInterrupted", False),
    (4, "ERROR: not found: tests/a.py::b", False),
    (5, "no tests ran", False),
    (None, "no answer", False),
])
def test_only_a_test_that_fails_has_caught_a_defect(status, printed, caught, tmp_path, monkeypatch):
    monkeypatch.setattr(defects, "run_tests", lambda folder, tests: (status, printed))
    was_caught, said = defects.check_one(HARMLESS, tmp_path / "broken")
    assert was_caught == caught
    assert said.startswith("caught by tests/a.py::b" if caught else "NOT CAUGHT")


@pytest.mark.parametrize("healthy, broken, status", [(0, 1, None), (0, 0, 1), (1, 1, 1)])
def test_the_status_is_1_where_one_is_not_caught_or_its_tests_fail_anyway(
        healthy, broken, status, monkeypatch, capsys):
    """A test that always fails would catch every defect."""
    def run_tests(folder, tests):
        return (healthy if folder.name == "healthy" else broken), "FAILED tests/a.py::b"

    monkeypatch.setattr(defects, "run_tests", run_tests)
    if status is None:
        main(["--check", "1", "2"])
        assert "2 of 2 defects are caught" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main(["--check", "1", "2"])
    assert stop.value.code == status


def test_an_entry_that_no_longer_fits_the_code_is_told_by_its_number(tmp_path):
    gone = Defect(7, "", "losses.py", "what never stood there", "", "", ())
    defects.copy_project(tmp_path / "copy")
    with pytest.raises(UserError, match="defect 7: its old text occurs 0 times in losses.py"):
        defects.break_copy(tmp_path / "copy", gone)

"""The exercises of tests/exercises: their checks fail before the work is done and pass after it.

Each solution of tests/exercises/solutions.py is applied to one copy of the project. The checks run
twice in a process of their own, here and in the copy, where the project's own tests that guard such
an extension run as well. Whoever has begun an exercise in this checkout sees it skipped.
"""
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from tests.exercises import solutions
from tests.exercises.solutions import ROOT, SOLUTIONS, copy_project, solve

# The project's own tests that an exercise's extension must pass, as its page says.
GUARDS = {
    1: ["tests/test_losses.py",
        "tests/test_train.py::"
        "test_every_field_of_the_configuration_is_a_flag_with_a_sentence_of_help"],
    2: ["tests/test_teacher.py::test_every_teacher_keeps_the_contract[mine]"],
    3: ["tests/test_train.py::test_the_aligner_sees_the_vector_that_the_pairing_names"
        "[shuffled-within]"],
    4: [],
    5: [],
    6: ["tests/test_unlabelled.py::test_objects_trains_on_its_first_120_rows_by_default",
        "tests/test_unlabelled.py::"
        "test_fewer_rows_than_the_flags_count_on_are_told_before_a_vector_is_made"],
}
README_COUNTS = "tests/test_layout.py::test_the_readme_counts_the_lines_of_the_reading_path"


def page_of(number):
    """The file of an exercise, relative to the project."""
    page, = (ROOT / "tests" / "exercises").glob(f"{number}_*.py")
    return f"tests/exercises/{page.name}"


class Check(NamedTuple):
    """What became of one test: the file it stands in, its name, and why it failed, or None."""
    page: str
    name: str
    failure: str | None


def run_tests(folder, report, names):
    """Run tests of the project in a folder, in a process of their own; return [Check]."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
               f"--junitxml={report}", *names]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert child.returncode in (0, 1), child.stdout + child.stderr  # all passed, or some failed
    checks = []
    for case in ElementTree.parse(report).iter("testcase"):
        page = case.get("classname").replace(".", "/") + ".py"
        failures = [*case.iter("failure"), *case.iter("error")]
        failure = failures[0].get("message") if failures else None
        checks.append(Check(page, case.get("name"), failure))
    return checks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """({exercise: its Checks here}, {exercise: those in the solved copy}, Checks of guards)."""
    folder = tmp_path_factory.mktemp("exercises")
    pages = {number: page_of(number) for number in SOLUTIONS}

    def by_exercise(checks):
        found = {}
        for number, page in pages.items():
            found[number] = [check for check in checks if check.page == page]
        return found

    before = by_exercise(run_tests(ROOT, folder / "before.xml", pages.values()))
    fresh = [number for number in SOLUTIONS if not is_begun(before[number])]
    copy_project(folder / "solved")
    guards = [README_COUNTS]
    for number in fresh:
        solve(number, folder / "solved")
        guards += GUARDS[number]
    names = [pages[number] for number in fresh] + guards
    checks = run_tests(folder / "solved", folder / "after.xml", names)
    of_guards = [check for check in checks if check.page not in pages.values()]
    return before, by_exercise(checks), of_guards


def is_begun(checks):
    """Whether a check passes in this checkout, in which a reader may have solved an exercise."""
    return any(check.failure is None for check in checks)


@pytest.mark.parametrize("number", SOLUTIONS)
def test_the_checks_fail_before_the_solution_and_pass_after_it(outcomes, number):
    before, after, _ = outcomes
    assert len(before[number]) >= 5
    if is_begun(before[number]):
        pytest.skip(f"exercise {number} has been begun in this checkout")
    assert [check.name for check in before[number]] == [check.name for check in after[number]]
    assert [check for check in after[number] if check.failure] == []


@pytest.mark.parametrize("number", SOLUTIONS)
def test_a_check_that_fails_says_in_which_file_something_is_missing(outcomes, number):
    """Not by an AttributeError from somewhere, but in words, and on one line."""
    before, _, _ = outcomes
    files = {Path(change.file).name for change in SOLUTIONS[number]}
    for check in before[number]:
        if check.failure:
            message = check.failure.splitlines()[0]
            assert any(file in message for file in files), f"{check.name}: {message}"


def test_the_projects_own_tests_pass_with_all_solutions(outcomes):
    """The new kind has its oracle, the new teacher keeps the contract, README counts the lines."""
    _, _, guards = outcomes
    assert guards
    assert [check for check in guards if check.failure] == []


def test_plain_pytest_does_not_collect_the_exercises(pytestconfig):
    """Their checks fail on purpose."""
    patterns = pytestconfig.getini("python_files")
    for path in (ROOT / "tests" / "exercises").glob("*.py"):
        assert not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path.name


@pytest.mark.parametrize("number", SOLUTIONS)
def test_every_page_says_what_to_ask_where_to_look_and_what_to_change(number):
    page = page_of(number)
    text = (ROOT / page).read_text(encoding="utf-8")
    title, command, question, look, change = [text.index(words) for words in (
        f'"""Exercise {number}: ', f"python -m pytest {page}", "\nQUESTION. ", "\nWHERE TO LOOK. ",
        "\nWHAT TO CHANGE")]
    assert title == 0
    assert command < question < look < change
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("number", SOLUTIONS)
def test_what_a_page_tells_to_look_at_is_there(number):
    """A page outlives the code that it speaks of, unless somebody looks."""
    text = (ROOT / page_of(number)).read_text(encoding="utf-8")
    look = text[text.index("\nWHERE TO LOOK. "):text.index("\nWHAT TO CHANGE")]
    names = re.findall(r"\b_?[a-z]+(?:_[a-z]+)+\b", look)   # as in splits_in_use
    names += re.findall(r"\b[A-Z]\w+\.(\w+)", look)        # as in Data.lookup
    names += re.findall(r"class (\w+)", look)
    modules = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert names
    for name in names:
        assert re.search(rf"\b{name}\b", modules), f"{page_of(number)} tells of {name}"


def test_the_command_writes_a_solved_copy(tmp_path, capsys):
    assert solutions.main(["4", str(tmp_path / "copy")]) == 0
    assert "4_lora_merge.py" in capsys.readouterr().out
    page = tmp_path / "copy" / "tests" / "exercises" / "4_lora_merge.py"
    assert "NotImplementedError" not in page.read_text(encoding="utf-8")
    assert (tmp_path / "copy" / "train.py").exists()


@pytest.mark.parametrize("line", [["9", "new"], ["4"], ["4", "."]])
def test_a_command_that_cannot_be_done_says_how_it_is_typed(line, capsys):
    assert solutions.main(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("python -m tests.exercises.solutions N FOLDER")
    assert told.count("\n") == 1


def test_a_solution_that_does_not_fit_writes_nothing(tmp_path, monkeypatch, capsys):
    changes = (*SOLUTIONS[4], solutions.Change("losses.py", "what is not there", ""))
    monkeypatch.setitem(SOLUTIONS, 4, changes)
    copy_project(tmp_path / "copy")
    with pytest.raises(ValueError, match="losses.py has 0 times what it changes"):
        solve(4, tmp_path / "copy")
    page = tmp_path / "copy" / page_of(4)
    assert page.read_bytes() == (ROOT / page_of(4)).read_bytes()
    assert solutions.main(["4", str(tmp_path / "another")]) == 2
    assert not (tmp_path / "another").exists()

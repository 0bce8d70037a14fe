"""Six exercises that check themselves; each is one page, to be read from its top.

    python -m pytest tests/exercises/1_relational_loss.py    # the checks of one: what is missing?
    python -m tests.exercises.solutions 1 FOLDER             # a copy of the project with 1 solved

The checks fail until the work is done, and say what is missing. Plain `python -m pytest` does not
collect them, since their files' names do not begin with test_; it runs tests/test_exercises.py,
which holds every solution to its checks.
"""

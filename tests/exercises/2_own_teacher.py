"""Exercise 2: a teacher of your own, and its dose.

    python -m pytest tests/exercises/2_own_teacher.py

QUESTION. A teacher is a black box that gives one vector a text. Nothing says that it must paint:
invent one that knows something of the sixty objects of data.py:OBJECTS which helps to answer "is a
mouse bigger than a piano?". It may be as odd as you like: a thermometer whose height is an object's
size, a list of what fits into what, the sound that a thing makes when it falls. Then give it a
dose: `mine:RHO` mixes what it knows with noise, so that its effect can be turned down to nothing.
If a student learns from dose 1 and not from dose 0, it was the teacher's knowledge that did it.

WHERE TO LOOK. teacher.py: the docstring of class Teacher is the contract, class Painter an example
with a dose; Painter.paint shows how a text's words are found. data.py:OBJECTS maps a name to (size
in cm, colour, shape); a word that is no object tells you nothing.

WHAT TO CHANGE.
1. teacher.py: a subclass of Teacher, registered as "mine" in TEACHERS.
   mine:RHO gives RHO v + sqrt(1 - RHO^2) noise, where v is what it knows and the noise has v's mean
   square; `mine` alone is dose 1. A RHO that is no number from 0 to 1 is a UserError of one line.
   Traps: the noise belongs to its text (seeded_generator), the dose to the teacher's name, and a
   text without objects still needs a vector (zeros will do).
2. tests/test_teacher.py: a line in OFFLINE, which says how to build it and a second one that must
   have another name. The contract test then asks it in another order and in another process.

THEN, this must be green:  python -m pytest tests/test_teacher.py -k contract

AND RUN IT, half a minute for each dose; draw accuracy over RHO by hand:

    python train.py --teacher mine:1 --arms undistilled,random-aligner,armada --seeds 0,1,2
    python train.py --teacher mine:0 --arms undistilled,random-aligner,armada --seeds 0,1,2

`random-aligner` ties with `armada` under the painter, since P_t only turns what the teacher gives.
Can you invent a teacher under which an aligner that learns is better? (Hint: what if most of v is
true, large, and of no use for the question?)
"""
import random

import numpy as np
import pytest

from data import OBJECTS, UserError
from teacher import TEACHERS, build_teacher


def teacher_of(dose):
    """The student's teacher; a check that needs it fails with what is missing."""
    is_there = "mine" in TEACHERS
    assert is_there, "teacher.py: TEACHERS has no teacher \"mine\" yet"
    return build_teacher(f"mine:{dose}")


def questions():
    """400 texts about two objects, and of each how much larger the first is, on a log scale."""
    rng = random.Random(0)
    texts = []
    answers = []
    for _ in range(400):
        first, second = rng.sample(sorted(OBJECTS), 2)
        texts.append(f"is a {first} bigger than a {second}?")
        answers.append(np.log(OBJECTS[first][0] / OBJECTS[second][0]))
    return texts, np.array(answers)


def how_much_is_known(dose):
    """The share of the log size ratios' variance that a linear map reads off unseen vectors.

    Ridge regression on 300 texts, scored on the other 100: about 1 if it can be read, 0 if not.
    """
    texts, y = questions()
    e = teacher_of(dose).encode(texts).astype(float)                # (400, d_e)
    kernel = e @ e.T                                                # (400, 400)
    kernel = kernel / kernel.diagonal().mean()
    weights = np.linalg.solve(kernel[:300, :300] + 0.03 * np.eye(300), y[:300])  # (300,)
    predicted = kernel[300:, :300] @ weights                        # (100,)
    return 1 - ((predicted - y[300:]) ** 2).mean() / y[300:].var()


def test_the_whole_dose_knows_the_sizes():
    known = how_much_is_known("1")
    assert known > 0.6, (
        f"teacher.py: of the sizes only {known:.0%} can be read off mine:1 by a linear map; it "
        "should know at least 60 % (the painter: over 80 %)")


def test_no_dose_knows_nothing_and_half_a_dose_lies_between():
    none, half, whole = [how_much_is_known(dose) for dose in ("0", "0.5", "1")]
    assert none < 0.1, f"teacher.py: mine:0 should be noise, but {none:.0%} can be read off it"
    assert none < half < whole, (
        f"teacher.py: of doses 0, 0.5, 1 can be read {none:.0%}, {half:.0%}, {whole:.0%}: more of "
        "the teacher should be more knowledge")


def test_all_doses_are_equally_loud():
    """Else a dose would change beta as well: two causes, one effect."""
    texts, _ = questions()
    whole = (teacher_of("1").encode(texts) ** 2).mean()
    for dose in ("0", "0.5"):
        power = (teacher_of(dose).encode(texts) ** 2).mean()
        assert power == pytest.approx(whole, rel=0.2), (
            f"teacher.py: mine:{dose} has a mean square of {power:.3g}, mine:1 of {whole:.3g}: "
            "give the noise v's mean square, and the two the weights RHO and sqrt(1 - RHO^2)")


def test_the_noise_belongs_to_its_text():
    """Two wordings of one question would else share it, and nothing could average it out."""
    one, other = teacher_of("0").encode(["is a cat bigger than a bus?", "a cat or a bus: bigger?"])
    assert not np.allclose(one, other), "teacher.py: two texts of the same objects share noise"


def test_a_dose_that_is_none_is_refused():
    teacher_of("1")
    for dose in ("2", "-1", "much", "nan"):
        try:
            TEACHERS["mine"](dose)  # as build_teacher does, which words any other error itself
        except UserError:
            continue
        except ValueError as error:
            pytest.fail(f"teacher.py: mine:{dose} should be a UserError, not {error!r}")
        pytest.fail(f"teacher.py: mine:{dose} was built: raise a UserError that says what RHO is")


def test_alone_it_is_the_whole_dose():
    whole = teacher_of("1")
    texts, _ = questions()
    assert np.array_equal(build_teacher("mine").encode(texts), whole.encode(texts)), (
        "teacher.py: mine and mine:1 give different vectors")


def test_it_keeps_the_contract(request):
    from tests.test_teacher import OFFLINE, check_contract
    is_there = "mine" in OFFLINE
    assert is_there, "tests/test_teacher.py: OFFLINE has no line \"mine\""
    check_contract(OFFLINE["mine"](request))

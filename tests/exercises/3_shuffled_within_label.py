"""Exercise 3: an arm whose pictures are shuffled within their label.

    python -m pytest tests/exercises/3_shuffled_within_label.py

QUESTION. The control `shuffled` gives each text another text's picture, and the student gets worse.
But that breaks two things at once: the picture no longer shows THIS question's objects, and it no
longer shows the right ANSWER. Shuffle only among the texts of the same label: now the picture still
shows a large thing on the left if the answer is yes. Before you run it, write down what this arm
keeps, what it loses, and between which two other arms its accuracy will lie.

WHERE TO LOOK. train.py: ARMS, Config.pairing, and Data.lookup, where `shuffled` is one cycle
through a random order (each row gets its predecessor's vector, so that none keeps its own).

WHAT TO CHANGE, all of it in train.py.
1. Config.pairing: one more choice, "within-label".
2. Data.lookup: its branch. One cycle through the rows of each label, in an order that the seed
   decides alone. A label with one text has nobody to swap with: that text keeps its own vector.
   Scores and bags of tokens (self.labels is floating point) have no groups of equal labels: that is
   a UserError that says so.
3. ARMS: a line "shuffled-within". is_control() will count it as a control; is that right?

THEN, these must be green (README, "In one sitting", wants a new number of lines and says which):

    python -m pytest tests/test_train.py -k "pairing or share or shuffling"
    python -m pytest tests/test_layout.py -k readme

AND RUN IT, about a minute:

    python train.py --arms undistilled,shuffled,shuffled-within,armada --seeds 0,1,2

Look at the column "aligner alone", too: who taught the aligner, and what did it learn?
"""
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import UserError
from train import ARMS, Config, Data, is_control, resolve

LABELS = [0, 1, 1, 0, 2, 1, 0, 1, 0, 1]  # label 2 has one text alone
N = len(LABELS)


def config_of(pairing):
    choices = Config.__dataclass_fields__["pairing"].metadata["choices"]
    assert pairing in choices, f"train.py: Config.pairing does not offer {pairing!r}"
    return replace(resolve(Config(task="objects")), pairing=pairing)


def sources(seed, labels=LABELS):
    """Whose vector each text gets: row i's own vector is the number i."""
    data = Data.__new__(Data)  # no files, no student: lookup() reads these two alone
    data.labels = torch.tensor(labels)
    data.vectors = {"painter": {"train": lambda rows: np.array(rows, np.float32)[:, None]}}
    config = config_of("within-label")
    try:
        vectors = data.lookup(config, seed)(list(range(len(labels))))  # (N, 1)
    except UserError:
        raise
    except ValueError as error:  # what lookup() raises of a pairing without a branch
        pytest.fail(f"train.py: {error}")
    return [int(number) for number in vectors.flatten()]


def test_every_text_gets_the_vector_of_a_text_with_the_same_label():
    for seed in range(5):
        labels = [LABELS[source] for source in sources(seed)]
        assert labels == LABELS, f"train.py, Data.lookup: of labels {LABELS} came {labels}"


def test_no_text_keeps_its_own_vector_unless_it_is_alone():
    for seed in range(5):
        found = sources(seed)
        kept = [row for row in range(N) if found[row] == row]
        assert kept == [4], (
            f"train.py, Data.lookup: rows {kept} keep their own vectors, but only row 4, which is "
            "alone with its label, has nobody to swap with")


def test_every_vector_is_given_once():
    """Else some pictures would be seen twice: a second difference to armada."""
    found = sorted(sources(0))
    assert found == list(range(N)), f"train.py, Data.lookup: the vectors given are {found}"


def test_so_each_labels_mean_vector_is_what_it_was():
    """This is what the arm keeps: all that can be learnt from a label's pictures as a heap."""
    found = np.array(sources(0))
    labels = np.array(LABELS)
    for label in (0, 1, 2):
        before = np.flatnonzero(labels == label).mean()
        after = found[labels == label].mean()
        assert after == before, f"train.py, Data.lookup: the mean of label {label} has changed"


def test_the_order_is_the_seeds_and_nothing_elses():
    first = sources(0)
    assert first == sources(0), "train.py, Data.lookup: seed 0 gives another order the second time"
    others = [sources(seed) for seed in range(1, 5)]
    assert any(other != first for other in others), "train.py, Data.lookup: all seeds are alike"


@pytest.mark.parametrize("labels", [[0.5, 3.2, 3.2, 1.0], [[0.0, 1.0], [0.5, 0.5], [0.0, 1.0]]])
def test_scores_and_bags_of_tokens_have_no_groups_of_equal_labels(labels):
    config_of("within-label")
    try:
        sources(0, labels)
    except UserError:
        return
    except IndexError:  # of a bag's label, which is a row of numbers
        pass
    pytest.fail(f"train.py, Data.lookup: labels {labels} were shuffled within their labels: raise "
                "a UserError that says for which tasks this pairing is")


def test_it_has_an_arm_which_counts_as_a_control():
    assert ARMS.get("shuffled-within") == {"pairing": "within-label"}, (
        "train.py: ARMS has no line \"shuffled-within\": {\"pairing\": \"within-label\"}")
    assert is_control(config_of("within-label")), "train.py: is_control() lets it pass as distilled"

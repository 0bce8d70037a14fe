"""Exercise 1: a loss that compares the texts of a batch with one another.

    python -m pytest tests/exercises/1_relational_loss.py

QUESTION. `manifold` asks that p_s equals p_t coordinate by coordinate. But what a picture knows may
lie in how texts stand to one another: a mouse is near a mug and far from a lorry, whatever the
coordinates are called. So compare the similarities WITHIN the batch, teacher's with student's:

    relational    mean over all B x B pairs (i, j) of (cos(p_t_i, p_t_j) - cos(p_s_i, p_s_j))^2

This is similarity-preserving distillation (Tung and Mori 2019) with cosines, a relative of
relational distillation (RKD, Park et al. 2019). Does it carry the teacher's knowledge over as well
as `manifold` does? Predict first: which of retrieval@1 and CKA will it raise, and why?

WHERE TO LOOK. losses.py from KINDS to _mean_cosine_distance; the README's "Change it", A loss.

WHAT TO CHANGE.
1. losses.py: the name "relational" in KINDS, and a branch in manifold_loss. Two traps, both tested:
   a row of zeros has no cosine, and F.normalize would give it a gradient of 1e12 (let its cosines
   be 0; _mean_cosine_distance shows how a `where` does it); and the two widths d must agree, as for
   every other kind, although a matrix (B, B) no longer shows whether they do.
2. Is it a mean over texts? Decide whether it belongs in PER_EXAMPLE, and be able to say why.
3. train.py: the name among the choices of Config.loss, and an arm "relational" in ARMS.
4. tests/test_losses.py: its oracle in ORACLES, a naive loop over lists of floats. It stands beside
   the others so that all tests of "every kind" hold the new one, too.

THEN, these must be green (README, "In one sitting", wants new numbers of lines and says which):

    python -m pytest tests/test_losses.py
    python -m pytest tests/test_layout.py -k readme
    python -m pytest tests/test_train.py -k "flag_with or share"

AND RUN IT, about a minute: python train.py --arms undistilled,armada,relational --seeds 0,1,2
Compare the columns retrieval@1 and CKA with your prediction. What happens at --batch-size 4?
"""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from train import ARMS, Config

B, D = 6, 9


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def relational(p_t, p_s):
    """The student's own loss; a check that needs it fails with what is missing."""
    assert "relational" in losses.KINDS, "losses.py: KINDS does not name 'relational' yet"
    return losses.manifold_loss(p_t, p_s, "relational")


def cosines(p):
    return F.cosine_similarity(p[:, None], p[None], dim=-1)  # (B, B)


def test_its_value_is_the_mean_squared_difference_of_all_cosines():
    p_t = randn(B, D)
    p_s = randn(B, D)
    expected = (cosines(p_t) - cosines(p_s)).square().mean().item()
    found = relational(p_t, p_s).item()
    ratios = {
        "a sum over the pairs was meant to be a mean": B * B,
        "only pairs i != j were averaged: the formula has all B x B": B / (B - 1),
        "each row was summed: divide by B x B, not by B": B,
    }
    for mistake, ratio in ratios.items():
        assert not math.isclose(found, ratio * expected), f"losses.py, manifold_loss: {mistake}"
    assert found == pytest.approx(expected), "losses.py, manifold_loss: not the formula's value"


def test_it_sees_which_picture_belongs_to_which_text():
    """Unlike the losses of batch means: the teacher's rows in another order give another value."""
    p_t = randn(B, D)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    mixed = relational(p_t[order], p_t).item()
    assert mixed > 0.01, "losses.py: it does not notice that the teacher's rows were permuted"
    both = relational(p_t[order], p_t[order]).item()
    assert both == pytest.approx(0), "losses.py: it is not 0 between equal projections"


def test_it_is_blind_to_rotation_and_scale():
    """So the student may use coordinates of its own: what does that mean for retrieval@1?"""
    p_t = randn(B, D)
    p_s = randn(B, D)
    rotation, _ = torch.linalg.qr(randn(D, D))
    turned = relational(p_t, 7 * p_s @ rotation).item()
    plain = relational(p_t, p_s).item()
    assert turned == pytest.approx(plain), "losses.py: a cosine knows neither rotation nor scale"
    small = relational(p_t, 1e-6 * p_s).item()
    assert small == pytest.approx(plain), (
        "losses.py: the cosines of short rows are too small; an eps that bounds a norm does that")


def test_a_row_of_zeros_and_a_batch_of_one_leave_the_gradient_bounded():
    """The gradient is clipped as a whole: one row's 1e12 would leave nothing of all the others."""
    p_t = randn(B, D)
    p_s = randn(B, D)
    p_s[2] = 0
    p_s.requires_grad_()
    loss = relational(p_t, p_s)
    expected = (cosines(p_t) - cosines(p_s)).square().mean().item()  # its cosines are 0 there, too
    assert loss.item() == pytest.approx(expected), (
        "losses.py: all cosines of a row of zeros should be 0, also with itself, and count as such")
    gradient, = torch.autograd.grad(loss, p_s)
    size = gradient.norm().item()
    assert size < 1e3, f"losses.py: a row of zeros has a gradient of {size:.1e} (or nan)"
    one = randn(1, D).requires_grad_()
    gradient, = torch.autograd.grad(relational(p_t[:1], one), one)
    assert gradient.isfinite().all(), "losses.py: a batch of one text has no finite gradient"


def test_projections_of_two_widths_are_refused():
    try:
        relational(randn(B, D), randn(B, D - 1))
    except ValueError:
        return
    pytest.fail("losses.py, manifold_loss: p_t of width 9 and p_s of width 8 pass unnoticed; "
                "_check_shapes tells")


def test_you_have_decided_whether_it_is_a_mean_over_texts():
    """PER_EXAMPLE tells the command line which kinds --micro-batch leaves as they are."""
    p_t = randn(B, D)
    p_s = randn(B, D)
    whole = relational(p_t, p_s).item()
    halves = (relational(p_t[:3], p_s[:3]) + relational(p_t[3:], p_s[3:])).item() / 2
    assert ("relational" in losses.PER_EXAMPLE) == math.isclose(whole, halves), (
        f"losses.py, PER_EXAMPLE: the whole batch has {whole:.4f}, the mean of its two halves "
        f"{halves:.4f}; a kind stands there if and only if these are equal")


def test_the_command_line_knows_it():
    choices = Config.__dataclass_fields__["loss"].metadata["choices"]
    assert "relational" in choices, "train.py: Config.loss does not offer 'relational'"
    assert choices == losses.KINDS, "train.py: Config.loss and losses.KINDS differ in their order"


def test_an_arm_trains_with_it():
    assert ARMS.get("relational") == {"loss": "relational"}, (
        "train.py: ARMS has no line \"relational\": {\"loss\": \"relational\"}")


def test_the_projects_tests_have_its_oracle():
    from tests.test_losses import ORACLES
    assert "relational" in ORACLES, "tests/test_losses.py: ORACLES has no 'relational'"
    p_t = randn(B, D)
    p_s = randn(B, D)
    expected = (cosines(p_t) - cosines(p_s)).square().mean().item()
    found = ORACLES["relational"](p_t.tolist(), p_s.tolist())
    assert found == pytest.approx(expected), "tests/test_losses.py: the oracle has another value"

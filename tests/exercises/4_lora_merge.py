"""Exercise 4: two adapters become one.

    python -m pytest tests/exercises/4_lora_merge.py

QUESTION. A LoRA adds (alpha / r) B A to a frozen map W. student.py can fold ONE adapter into W
(LoRA.merged). Now let two be trained on the same W, one by each of two teachers, and let a student
have both: W + s1 B1 A1 + s2 B2 A2. Folding both into W would do, but then they are gone: they
cannot be trained on, and the file holds a whole model. So make ONE adapter that does what both do,
exactly; and then the best one of a smaller rank, since ranks add up.

WHERE TO LOOK. student.py, class LoRA: forward() and merged(). Note that its scale is alpha / rank,
hence not free: an adapter of another rank has another scale.

WHAT TO CHANGE. Write the two functions below, a few lines each.
- joined(): stack the factors. B1 A1 + B2 A2 is the product of two larger matrices: which? Then see
  to the scales. (Adding A1 + A2 and B1 + B2 is wrong, though it is often done: multiply it out.)
- squeezed(): the singular value decomposition U diag(s) V^T of the update has the nearest matrix of
  rank r in its first r columns (Eckart and Young 1936), and what is lost is sqrt(sum of s_i^2,
  i > r). torch.linalg.svd(..., full_matrices=False) gives U, s and V^T.
The checks prove both, on paper's terms: equal outputs, equal merged weights, the error of theory.

THEN THINK. Merging one adapter after the other into a W held in bf16 rounds twice, the joined one
once: when would you see it? And does joined(a, b) train as a and b would have, side by side?
"""
import copy

import pytest
import torch
from torch import nn

from student import LoRA

IN, OUT = 12, 10
HERE = "4_lora_merge.py"


def joined(first, second):
    """Return one LoRA around the same base that does what the two do together.

    first, second: LoRA of ranks r1 and r2 with the same base, else ValueError. The new one has rank
    r1 + r2 and weights of its own: the two stay as they are.
    """
    raise NotImplementedError(f"{HERE}: write joined()")


def squeezed(lora, rank):
    """Return the LoRA of that rank, around the same base, whose update is nearest to lora's."""
    raise NotImplementedError(f"{HERE}: write squeezed()")


# ---- the checks ----


def update_of(lora):
    """What an adapter adds to its base's weight, (out, in)."""
    return lora.scale * lora.lora_B.weight @ lora.lora_A.weight


def adapter(base, rank):
    """A LoRA that does something: B is zero at first."""
    lora = LoRA(base, rank).eval()
    nn.init.normal_(lora.lora_B.weight)
    return lora


@pytest.fixture
def pair():
    """Two adapters of ranks 2 and 3 on one base."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    return adapter(base, 2), adapter(base, 3)


def close(found, expected, message):
    """Fail with a message unless two tensors are equal up to rounding."""
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale, f"{HERE}: {message}"


def test_the_joined_adapter_adds_both_updates(pair):
    first, second = pair
    both = joined(first, second)
    expected = update_of(first) + update_of(second)
    assert isinstance(both, LoRA), f"{HERE}: joined() returned no LoRA"
    assert both.lora_A.weight.shape == (5, IN), f"{HERE}: A should have r1 + r2 = 5 rows"
    assert both.lora_B.weight.shape == (OUT, 5), f"{HERE}: B should have r1 + r2 = 5 columns"
    assert both.scale == LoRA.alpha / 5, f"{HERE}: leave the scale at alpha / rank, as files do"
    found = update_of(both)
    without_scales = (first.lora_B.weight @ first.lora_A.weight
                      + second.lora_B.weight @ second.lora_A.weight)  # (out, in)
    mistakes = {
        "the two adapters' own scales are lost": both.scale * without_scales,
        "the new adapter's scale comes on top: divide by it": both.scale * expected,
    }
    for mistake, value in mistakes.items():
        assert not torch.allclose(found, value, rtol=1e-4), f"{HERE}: joined(): {mistake}"
    close(found, expected, "the joined update is not s1 B1 A1 + s2 B2 A2")


def test_its_outputs_are_the_base_plus_both(pair):
    first, second = pair
    both = joined(first, second).eval()
    x = torch.randn(7, 4, IN)
    expected = first(x) + second(x) - first.base(x)
    close(both(x), expected, "joined(a, b)(x) is not a(x) + b(x) - base(x)")


def test_merging_it_is_merging_one_after_the_other(pair):
    """Into copies of the base, since merged() gives the base itself a new weight."""
    first, second = pair
    both = copy.deepcopy(joined(first, second))
    one = copy.deepcopy(first)
    one_after_the_other = copy.deepcopy(second)
    one_after_the_other.base = one.merged()
    expected = one_after_the_other.merged().weight
    close(both.merged().weight, expected, "the merged weight differs from merging one by one")


def test_the_two_and_their_base_stay_as_they_were(pair):
    first, second = pair
    before = [copy.deepcopy(lora.state_dict()) for lora in pair]
    both = joined(first, second)
    assert both.base is first.base, f"{HERE}: joined() should keep the base, not copy it"
    with torch.no_grad():
        both.lora_A.weight.add_(1)
        both.lora_B.weight.add_(1)
    for lora, state in zip(pair, before):
        for name, value in lora.state_dict().items():
            assert torch.equal(value, state[name]), f"{HERE}: joined() shares or changed {name}"


def test_adapters_of_two_bases_are_refused(pair):
    first, _ = pair
    stranger = adapter(nn.Linear(IN, OUT), 2)
    try:
        joined(first, stranger)
    except ValueError:
        return
    pytest.fail(f"{HERE}: joined() joined adapters of two bases: raise a ValueError")


def test_the_squeezed_adapter_is_the_nearest_of_its_rank(pair):
    """No matrix of rank r is nearer than the root of the sum of the dropped squares."""
    wide = adapter(pair[0].base, 6)
    update = update_of(wide)
    singular_values = torch.linalg.svdvals(update)
    for rank in (1, 3, 5):
        narrow = squeezed(wide, rank)
        assert narrow.base is wide.base, f"{HERE}: squeezed() should keep the base"
        assert narrow.lora_A.weight.shape == (rank, IN), f"{HERE}: A should have {rank} rows"
        assert narrow.scale == LoRA.alpha / rank, f"{HERE}: leave the scale at alpha / rank"
        lost = (update_of(narrow) - update).norm().item()
        least = singular_values[rank:].norm().item()
        assert lost == pytest.approx(least, rel=1e-4), (
            f"{HERE}: at rank {rank} squeezed() loses {lost:.4f}, theory {least:.4f}")


def test_squeezing_what_was_joined_to_its_own_rank_loses_nothing(pair):
    first, _ = pair
    twice = joined(first, first)  # of rank 4, but its update has rank 2
    close(update_of(squeezed(twice, 2)), 2 * update_of(first), "2 a, squeezed to a's rank, is lost")

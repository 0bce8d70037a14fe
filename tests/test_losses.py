"""The equations, each against a loop, a closed form or an invariance. Read beside losses.py."""
import itertools
import math

import pytest
import torch

from align import Outputs
from losses import KINDS, aligner_loss, manifold_loss, output_loss, predictions, student_loss, task_loss

B, C, D = 5, 3, 7

def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def outputs():
    return Outputs(randn(B, C).requires_grad_(), randn(B, C).requires_grad_(), randn(B, D).requires_grad_())

def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]

# ---- task --------------------------------------------------------------------------------------------------
def test_task_loss_of_classes_is_the_mean_negative_log_probability_of_the_true_class():
    logits, labels = randn(B, C), torch.tensor([0, 2, 1, 1, 0])
    oracle = sum(-math.log(softmax(row)[y]) for row, y in zip(logits.tolist(), labels.tolist())) / B
    assert task_loss(logits, labels).item() == pytest.approx(oracle, rel=1e-12)

def test_task_loss_of_a_regression_is_the_squared_error_of_the_rectified_logit():
    logits, labels = torch.tensor([[-2.0], [3.0], [0.5]]), torch.tensor([1.0, 1.0, 4.0])
    assert task_loss(logits, labels).item() == pytest.approx((1**2 + 2**2 + 3.5**2) / 3)

def test_task_loss_of_a_distribution_is_its_entropy_plus_the_divergence_to_the_prediction():
    """So its minimum is not 0 but the entropy of y, reached where softmax(o) = y."""
    y = torch.softmax(randn(B, C), -1)
    entropy = -(y * y.log()).sum(-1).mean()
    assert task_loss(y.log() + 4, y).item() == pytest.approx(entropy.item())  # a softmax ignores the + 4
    logits = randn(B, C)
    divergence = (y * (y.log() - torch.log_softmax(logits, -1))).sum(-1).mean()
    assert task_loss(logits, y).item() == pytest.approx((entropy + divergence).item())

def test_a_one_hot_distribution_is_a_class():
    logits, labels = randn(B, C), torch.tensor([0, 2, 1, 1, 0])
    one_hot = torch.nn.functional.one_hot(labels, C).double()
    assert task_loss(logits, one_hot).item() == pytest.approx(task_loss(logits, labels).item())

@pytest.mark.parametrize("logits, labels", [
    ((B, C), torch.zeros(B)), ((B, 1), torch.zeros(B, dtype=torch.long)), ((B, 1), torch.zeros(B + 1)),
    ((B, C), torch.zeros(B, C + 1)), ((B, C), torch.zeros(B, C, dtype=torch.long))])
def test_logits_and_labels_that_do_not_fit_are_refused_and_never_broadcast(logits, labels):
    with pytest.raises(ValueError, match="do not fit"):
        task_loss(torch.zeros(logits), labels)

def test_predictions_are_the_largest_logit_or_the_score_clipped_to_0_5():
    assert predictions(torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])).tolist() == [1, 0]
    assert predictions(torch.tensor([[-1.0], [2.5], [7.0]])).tolist() == [0.0, 2.5, 5.0]

# ---- output ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("T", [0.5, 1.0, 5.0])
def test_output_loss_is_T_squared_times_the_mean_squared_difference_of_the_softened_probabilities(T):
    o_t, o_s = randn(B, C), randn(B, C)
    oracle = sum((p - q) ** 2 for t, s in zip(o_t.tolist(), o_s.tolist())
                 for p, q in zip(softmax([x / T for x in t]), softmax([x / T for x in s]))) / (B * C)
    assert output_loss(o_t, o_s, T).item() == pytest.approx(T**2 * oracle, rel=1e-12)

def test_output_loss_at_large_T_compares_the_centred_logits():
    """softmax(o/T) = 1/C + (o - mean o)/(C T) + ..., so T^2 MSE -> MSE(centred logits) / C^2."""
    o_t, o_s = randn(B, C), randn(B, C)
    difference = (o_t - o_t.mean(-1, keepdim=True)) - (o_s - o_s.mean(-1, keepdim=True))
    assert output_loss(o_t, o_s, 1e4).item() == pytest.approx(
        difference.square().mean().item() / C**2, rel=1e-3)

def test_T_squared_keeps_the_size_of_the_gradient():
    """Without it the gradient would fall a hundredfold from T = 10 to T = 100,
    and alpha would mean something else."""
    o_t, o_s = randn(B, C), randn(B, C).requires_grad_()
    sizes = [torch.autograd.grad(output_loss(o_t, o_s, T), o_s)[0].norm().item() for T in (10, 100)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)

def test_output_loss_of_a_regression_compares_rectified_scores_and_has_no_temperature():
    o_t, o_s = torch.tensor([[-1.0], [4.0]]), torch.tensor([[-3.0], [1.0]])
    assert (output_loss(o_t, o_s, 1).item() == output_loss(o_t, o_s, 50).item()
            == pytest.approx((0 + 3**2) / 2))

# ---- manifold ----------------------------------------------------------------------------------------------
def test_the_three_manifold_losses_against_loops():
    p_t, p_s = randn(B, D), randn(B, D)
    t, s = p_t.tolist(), p_s.tolist()
    m_t, m_s = ([sum(row[j] for row in p) / B for j in range(D)] for p in (t, s))
    dot = sum(a * b for a, b in zip(m_t, m_s))

    def norm(m):
        return math.sqrt(sum(a * a for a in m))

    oracle = {"euclidean": sum((a - b) ** 2 for a, b in zip(m_t, m_s)) / D,
              "cosine": 1 - dot / (norm(m_t) * norm(m_s)),
              "manifold": sum((a - b) ** 2 for x, y in zip(t, s) for a, b in zip(x, y)) / (B * D)}
    assert set(oracle) == set(KINDS), "a new loss wants its oracle here"
    for kind in KINDS:
        assert manifold_loss(p_t, p_s, kind).item() == pytest.approx(oracle[kind], rel=1e-12)

@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_batch_mean_losses_do_not_see_which_picture_belongs_to_which_text(kind):
    """Permuting the teacher's rows inside the batch changes neither value nor gradient:
    a step carries no pairing."""
    p_t, p_s, order = randn(B, D), randn(B, D).requires_grad_(), torch.tensor([3, 0, 4, 1, 2])
    plain, mixed = manifold_loss(p_t, p_s, kind), manifold_loss(p_t[order], p_s, kind)
    assert plain.item() == pytest.approx(mixed.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(plain, p_s), torch.autograd.grad(mixed, p_s))

def test_the_per_example_loss_does_see_it():
    p_t, order = randn(B, D), torch.tensor([3, 0, 4, 1, 2])
    assert manifold_loss(p_t, p_t, "manifold") == 0 < manifold_loss(p_t[order], p_t, "manifold")

def test_the_batch_mean_loss_is_at_most_the_per_example_loss():
    """The paper's Prop. 1, as Jensen's inequality for the square; not strict: both are 0 where p_t = p_s."""
    for _ in range(50):
        p_t, p_s = randn(B, D), randn(B, D)
        assert manifold_loss(p_t, p_s, "euclidean") <= manifold_loss(p_t, p_s, "manifold")
    assert manifold_loss(p_t, p_t, "euclidean") == manifold_loss(p_t, p_t, "manifold") == 0
    shift = randn(1, D)  # equality also where all examples differ by the same vector
    torch.testing.assert_close(manifold_loss(p_t, p_t + shift, "euclidean"),
                               manifold_loss(p_t, p_t + shift, "manifold"))

def test_averaging_a_batch_leaves_a_known_small_share_of_the_teachers_variance():
    """Over all batches of B from N, the mean's variance is (N - B) / (B (N - 1)) of the vectors' own,
    exactly: what is left for a batch-mean loss to transfer. At N = 2490 and B = 32 that is 3 %."""
    n, b = 7, 3
    e = randn(n, D)
    e = e - e.mean(0)
    means = torch.stack([e[list(chosen)].mean(0) for chosen in itertools.combinations(range(n), b)])
    share = means.square().sum(-1).mean() / e.square().sum(-1).mean()
    assert share.item() == pytest.approx((n - b) / (b * (n - 1)), rel=1e-12)

def test_cosine_ignores_length_and_a_zero_mean_gives_value_1_and_gradient_0():
    p_t, p_s = randn(B, D), randn(B, D)
    assert manifold_loss(p_t, p_s, "cosine").item() == pytest.approx(
        manifold_loss(9 * p_t, 0.1 * p_s, "cosine").item())
    for a, b in ((p_t, torch.zeros(B, D)), (torch.zeros(B, D), p_s.float()),
                 (torch.zeros(B, D), torch.zeros(B, D))):
        b = b.clone().requires_grad_()
        loss = manifold_loss(a, b, "cosine")
        loss.backward()
        assert loss == 1 and (b.grad == 0).all()

def test_an_unknown_kind_or_a_width_that_differs_is_an_error():
    with pytest.raises(
            ValueError, match="unknown loss kind 'euclid': choose one of euclidean, cosine, manifold"):
        manifold_loss(randn(B, D), randn(B, D), "euclid")
    with pytest.raises(ValueError, match="differ"):
        manifold_loss(randn(B, D), randn(B, 1), "manifold")  # would broadcast
    with pytest.raises(ValueError, match="differ"):
        output_loss(randn(B, 1), randn(B, C), 5)

# ---- the two objectives ------------------------------------------------------------------------------------
def test_aligner_loss_adds_gamma_times_the_auxiliary_head():
    out, y = outputs(), torch.tensor([0, 2, 1, 1, 0])
    expected = task_loss(out.logits, y) + 0.3 * task_loss(out.aux_logits, y)
    assert aligner_loss(out, y, 0.3).item() == pytest.approx(expected.item())

@pytest.mark.parametrize("kind", KINDS)
def test_student_loss_is_the_weighted_sum_of_its_parts_which_are_reported_before_their_weights(kind):
    s, t, y = outputs(), outputs(), torch.tensor([0, 2, 1, 1, 0])
    total, parts = student_loss(s, t, y, alpha=0.3, beta=7.0, gamma=0.2, temperature=5.0, kind=kind)
    task = task_loss(s.logits, y) + 0.2 * task_loss(s.aux_logits, y)
    output = output_loss(t.logits, s.logits, 5.0) + 0.2 * output_loss(t.aux_logits, s.aux_logits, 5.0)
    manifold = manifold_loss(t.proj, s.proj, kind)
    assert list(parts) == ["task", "output", "manifold"] and all(part.ndim == 0 for part in parts.values())
    torch.testing.assert_close(parts, {"task": task, "output": output, "manifold": manifold})
    torch.testing.assert_close(total, 0.7 * task + 0.3 * output + 7.0 * manifold)

def test_output_factor_0_drops_the_soft_labels_and_nothing_else():
    """The arm `no-output`. It is (1 - alpha) times `alpha-0` with beta / (1 - alpha), and AdamW does not see
    a constant factor, except through the clip: no-output is alpha-0 with a larger beta."""
    s, t, y = outputs(), outputs(), torch.tensor([0, 2, 1, 1, 0])
    common = dict(gamma=0.2, temperature=5.0, kind="manifold")
    total, parts = student_loss(s, t, y, alpha=0.3, beta=7.0, output_factor=0.0, **common)
    torch.testing.assert_close(total, 0.7 * parts["task"] + 7.0 * parts["manifold"])
    torch.testing.assert_close(total, 0.7 * student_loss(s, t, y, alpha=0.0, beta=10.0, **common)[0])
    whole, half = (student_loss(s, t, y, alpha=0.3, beta=7.0, output_factor=x, **common)[0] for x in (1, 0.5))
    torch.testing.assert_close(whole, student_loss(s, t, y, alpha=0.3, beta=7.0, **common)[0])
    torch.testing.assert_close(half, (total + whole) / 2)  # linear in between

def test_no_gradient_reaches_the_teachers_side():
    s, t = outputs(), outputs()
    student_loss(s, t, torch.zeros(B, dtype=torch.long), alpha=0.5, beta=1.0, gamma=1.0, temperature=5.0,
                 kind="manifold")[0].backward()
    assert all(x.grad is None for x in t) and all(x.grad.abs().sum() > 0 for x in s)

def test_without_a_teacher_the_student_loss_is_plain_cross_entropy():
    s, y = outputs(), torch.tensor([0, 2, 1, 1, 0])
    total, parts = student_loss(s, None, y, alpha=0.0, beta=0.0, gamma=0.0, temperature=5.0, kind="manifold")
    assert total == parts["task"] == torch.nn.functional.cross_entropy(s.logits, y)
    assert parts["output"] == parts["manifold"] == 0

def test_gradients_of_every_loss_agree_with_finite_differences():
    labels, y = torch.tensor([0, 2, 1, 1, 0]), torch.softmax(randn(B, C), -1)
    check = torch.autograd.gradcheck
    assert check(lambda o: task_loss(o, labels), outputs().logits)
    assert check(lambda o: task_loss(o, y), outputs().logits)
    assert check(lambda o: task_loss(o, labels.double()), randn(B, 1).requires_grad_())
    assert check(lambda a, b: output_loss(a, b, 2.0), outputs()[:2])
    for kind in KINDS:
        assert check(lambda a, b: manifold_loss(a, b, kind), (outputs().proj, outputs().proj))
        t = Outputs(*(x.detach() for x in outputs()))
        assert check(lambda *s: student_loss(Outputs(*s), t, labels, alpha=0.5, beta=2.0, gamma=0.5,
                                             temperature=5.0, kind=kind)[0], tuple(outputs()))

# ---- precision and accumulation ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_float32_and_float64_stays(dtype):
    """A float16 square overflows beyond 256: the losses must not compute in it."""
    p_t, p_s = torch.full((B, D), 300.0, dtype=dtype), torch.full((B, D), -300.0, dtype=dtype)
    for kind in KINDS:
        loss = manifold_loss(p_t, p_s, kind)
        assert (loss.dtype == torch.float32 and loss == manifold_loss(p_t.float(), p_s.float(), kind)
                and loss.isfinite())
    assert task_loss(torch.full((B, 1), 300.0, dtype=dtype), torch.zeros(B)).item() == 300.0**2
    assert output_loss(p_t, p_s, 5.0).dtype == torch.float32
    assert task_loss(randn(B, C), torch.zeros(B, dtype=torch.long)).dtype == torch.float64

def test_micro_batches_add_up_to_the_batch_for_the_per_example_loss_but_not_for_batch_means():
    """Weighted by their share, per-example means are exact under accumulation. A batch-mean loss sees the
    micro-batch's mean instead of the batch's, which is a different (by Jensen a larger) number."""
    p_t, p_s, cuts = randn(B, D), randn(B, D), [slice(0, 2), slice(2, 4), slice(4, 5)]
    summed = {kind: sum(len(p_t[c]) / B * manifold_loss(p_t[c], p_s[c], kind) for c in cuts)
              for kind in KINDS}
    torch.testing.assert_close(summed["manifold"], manifold_loss(p_t, p_s, "manifold"))
    assert summed["euclidean"] > 1.01 * manifold_loss(p_t, p_s, "euclidean")
    assert (summed["cosine"] - manifold_loss(p_t, p_s, "cosine")).abs() > 1e-3

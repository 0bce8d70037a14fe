"""The equations, each against a loop, a closed form or an invariance. Read beside losses.py."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from align import Outputs
from losses import (
    KINDS,
    PER_EXAMPLE,
    aligner_loss,
    manifold_loss,
    output_loss,
    predictions,
    student_loss,
    task_loss,
)

B, C, D = 5, 3, 7
CLASSES = torch.tensor([0, 2, 1, 1, 0])  # (B,)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def outputs():
    """Random outputs of a student or an aligner, each a leaf that wants its gradient."""
    logits = randn(B, C).requires_grad_()
    aux_logits = randn(B, C).requires_grad_()
    proj = randn(B, D).requires_grad_()
    return Outputs(logits, aux_logits, proj)


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


# ---- task --------------------------------------------------------------------------------------


def test_task_loss_of_classes_is_the_mean_negative_log_probability_of_the_true_class():
    logits = randn(B, C)
    oracle = 0.0
    for row, true_class in zip(logits.tolist(), CLASSES.tolist()):
        oracle -= math.log(softmax(row)[true_class]) / B
    assert task_loss(logits, CLASSES).item() == pytest.approx(oracle, rel=1e-12)


def test_task_loss_of_a_regression_is_the_squared_error_of_the_rectified_logit():
    logits = torch.tensor([[-2.0], [3.0], [0.5]])
    labels = torch.tensor([1.0, 1.0, 4.0])
    oracle = (1**2 + 2**2 + 3.5**2) / 3
    assert task_loss(logits, labels).item() == pytest.approx(oracle)


def test_task_loss_of_a_distribution_is_its_entropy_plus_the_divergence_to_the_prediction():
    """So its minimum is not 0 but the entropy of y, reached where softmax(o) = y."""
    y = torch.softmax(randn(B, C), -1)
    entropy = -(y * y.log()).sum(-1).mean().item()
    perfect = y.log() + 4  # a softmax ignores the + 4
    assert task_loss(perfect, y).item() == pytest.approx(entropy)

    logits = randn(B, C)
    log_ratio = y.log() - torch.log_softmax(logits, -1)  # (B, C)
    divergence = (y * log_ratio).sum(-1).mean().item()
    assert task_loss(logits, y).item() == pytest.approx(entropy + divergence)


def test_a_one_hot_distribution_is_a_class():
    logits = randn(B, C)
    one_hot = F.one_hot(CLASSES, C).double()
    expected = task_loss(logits, CLASSES).item()
    assert task_loss(logits, one_hot).item() == pytest.approx(expected)


KNOWN = torch.tensor([True, False, True, False, False])  # (B,), which texts have a label


def labels_of_every_kind():
    """{kind: (the width of its logits, labels of B texts, the same with NO label where not KNOWN)}.

    Built by hand and not by data.py, so that a slip there cannot hide one here.
    """
    scores = torch.tensor([1.0, 2.5, 4.0, 0.5, 3.0], dtype=torch.float64)
    bags = torch.softmax(randn(B, C), -1)
    return {
        "class": (C, CLASSES, CLASSES.where(KNOWN, torch.tensor(-100))),
        "score": (1, scores, scores.where(KNOWN, torch.tensor(math.nan))),
        "bag": (C, bags, bags * KNOWN[:, None])}


@pytest.mark.parametrize("kind", ["class", "score", "bag"])
def test_a_text_without_a_label_counts_0_and_the_sum_is_divided_by_all_texts(kind):
    """Oracle: the labelled texts alone, one by one, and B. Its gradient is 0, and never nan."""
    width, labels, some = labels_of_every_kind()[kind]
    logits = (2 + randn(B, width)).requires_grad_()  # above the relu's edge
    oracle = sum(task_loss(logits[[i]], labels[[i]]) for i in range(B) if KNOWN[i]) / B
    torch.testing.assert_close(task_loss(logits, some), oracle, rtol=1e-12, atol=0)
    expected, = torch.autograd.grad(oracle, logits)
    gradient, = torch.autograd.grad(task_loss(logits, some), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert (gradient[~KNOWN] == 0).all()
    assert torch.autograd.gradcheck(lambda logits: task_loss(logits, some), logits)


@pytest.mark.parametrize("kind", ["class", "score", "bag"])
def test_pieces_of_a_batch_add_up_to_it_however_its_labels_are_spread(kind):
    """A mean over labelled texts would not: the last piece here has none, and would be 0 / 0."""
    width, _, some = labels_of_every_kind()[kind]
    logits = randn(B, width)
    total = 0.0
    for piece in (slice(0, 2), slice(2, 3), slice(3, 5)):
        total += len(logits[piece]) / B * task_loss(logits[piece], some[piece]).item()
    assert total == pytest.approx(task_loss(logits, some).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_every_text_has_a_class_the_loss_is_torchs_mean_bit_for_bit(dtype):
    """So that runs without --unlabelled repeat what they gave before it was there."""
    for count in range(1, 70):
        logits = torch.randn(count, C, dtype=dtype, requires_grad=True)
        classes = torch.randint(C, (count,))
        ours = task_loss(logits, classes)
        theirs = F.cross_entropy(logits, classes)
        assert torch.equal(ours, theirs)
        our_gradient, = torch.autograd.grad(ours, logits)
        their_gradient, = torch.autograd.grad(theirs, logits)
        assert torch.equal(our_gradient, their_gradient)


MISFITS = {
    "one float for several logits": ((B, C), torch.zeros(B)),
    "a class for one logit": ((B, 1), torch.zeros(B, dtype=torch.long)),
    "a score too many": ((B, 1), torch.zeros(B + 1)),
    "a distribution too wide": ((B, C), torch.zeros(B, C + 1)),
    "a distribution of integers": ((B, C), torch.zeros(B, C, dtype=torch.long)),
}


@pytest.mark.parametrize("shape, labels", MISFITS.values(), ids=MISFITS)
def test_logits_and_labels_that_do_not_fit_are_refused_and_never_broadcast(shape, labels):
    with pytest.raises(ValueError, match="do not fit"):
        task_loss(torch.zeros(shape), labels)


def test_predictions_are_the_largest_logit_or_the_score_clipped_to_0_5():
    of_classes = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    assert predictions(of_classes).tolist() == [1, 0]
    of_scores = torch.tensor([[-1.0], [2.5], [7.0]])
    assert predictions(of_scores).tolist() == [0.0, 2.5, 5.0]


# ---- output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 5.0])
def test_output_loss_is_T_squared_times_the_mean_squared_difference_of_the_softened_probabilities(
    T,
):
    o_t = randn(B, C)
    o_s = randn(B, C)
    total = 0.0
    for row_t, row_s in zip(o_t.tolist(), o_s.tolist()):
        soft_t = softmax([x / T for x in row_t])
        soft_s = softmax([x / T for x in row_s])
        for p, q in zip(soft_t, soft_s):
            total += (p - q) ** 2
    oracle = T**2 * total / (B * C)
    assert output_loss(o_t, o_s, T).item() == pytest.approx(oracle, rel=1e-12)


def test_output_loss_at_large_T_compares_the_centred_logits():
    """softmax(o/T) = 1/C + (o - mean o)/(C T) + ..., so T^2 MSE -> MSE(centred logits) / C^2."""
    o_t = randn(B, C)
    o_s = randn(B, C)
    centred_t = o_t - o_t.mean(-1, keepdim=True)
    centred_s = o_s - o_s.mean(-1, keepdim=True)
    limit = F.mse_loss(centred_s, centred_t).item() / C**2
    assert output_loss(o_t, o_s, 1e4).item() == pytest.approx(limit, rel=1e-3)


def test_T_squared_keeps_the_size_of_the_gradient():
    """Without it the gradient would fall a hundredfold from T = 10 to T = 100,
    and alpha would mean something else."""
    o_t = randn(B, C)
    o_s = randn(B, C).requires_grad_()

    def gradient_norm(temperature):
        (gradient,) = torch.autograd.grad(output_loss(o_t, o_s, temperature), o_s)
        return gradient.norm().item()

    assert gradient_norm(10) == pytest.approx(gradient_norm(100), rel=0.2)


def test_output_loss_of_a_regression_compares_rectified_scores_and_has_no_temperature():
    o_t = torch.tensor([[-1.0], [4.0]])
    o_s = torch.tensor([[-3.0], [1.0]])
    at_1 = output_loss(o_t, o_s, 1).item()
    at_50 = output_loss(o_t, o_s, 50).item()
    assert at_1 == at_50 == pytest.approx((0 + 3**2) / 2)


# ---- manifold ----------------------------------------------------------------------------------


def mean_row(rows):
    """The mean over a batch, given as a list of lists: one number for each column."""
    return [sum(column) / len(rows) for column in zip(*rows)]


def mean_square(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b)) / len(a)


def naive_euclidean(t, s):
    return mean_square(mean_row(t), mean_row(s))


def naive_cosine(t, s):
    m_t = mean_row(t)
    m_s = mean_row(s)
    dot = sum(x * y for x, y in zip(m_t, m_s))
    norm_t = math.sqrt(sum(x * x for x in m_t))
    norm_s = math.sqrt(sum(y * y for y in m_s))
    return 1 - dot / (norm_t * norm_s)


def naive_manifold(t, s):
    return sum(mean_square(row_t, row_s) for row_t, row_s in zip(t, s)) / len(t)


# kind -> the same loss as a naive loop over lists of floats, written without looking at losses.py.
ORACLES = {
    "euclidean": naive_euclidean,
    "cosine": naive_cosine,
    "manifold": naive_manifold,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_manifold_loss_against_a_loop(kind):
    if kind not in ORACLES:
        pytest.fail(f"no oracle for the kind {kind!r}: write it as a naive loop naive_{kind}(t, s) "
                    "over lists of rows and add it to ORACLES in tests/test_losses.py")
    p_t = randn(B, D)
    p_s = randn(B, D)
    oracle = ORACLES[kind](p_t.tolist(), p_s.tolist())
    assert manifold_loss(p_t, p_s, kind).item() == pytest.approx(oracle, rel=1e-12)


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_batch_mean_losses_do_not_see_which_picture_belongs_to_which_text(kind):
    """Permuting the teacher's rows inside the batch changes neither value nor gradient:
    a step carries no pairing."""
    p_t = randn(B, D)
    p_s = randn(B, D).requires_grad_()
    order = torch.tensor([3, 0, 4, 1, 2])
    paired = manifold_loss(p_t, p_s, kind)
    mixed = manifold_loss(p_t[order], p_s, kind)
    assert paired.item() == pytest.approx(mixed.item(), rel=1e-12)
    gradient_paired = torch.autograd.grad(paired, p_s)
    gradient_mixed = torch.autograd.grad(mixed, p_s)
    torch.testing.assert_close(gradient_paired, gradient_mixed)


def test_the_per_example_loss_does_see_it():
    p_t = randn(B, D)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert manifold_loss(p_t, p_t, "manifold") == 0
    assert manifold_loss(p_t[order], p_t, "manifold") > 0.1


def test_the_batch_mean_loss_is_at_most_the_per_example_loss():
    """The paper's Prop. 1, as Jensen's inequality for the square."""
    for _ in range(50):
        p_t = randn(B, D)
        p_s = randn(B, D)
        of_means = manifold_loss(p_t, p_s, "euclidean")
        per_example = manifold_loss(p_t, p_s, "manifold")
        assert of_means <= per_example


def test_the_two_are_equal_where_all_examples_differ_by_the_same_vector():
    """So Prop. 1 is not strict: both are 0 where p_t = p_s."""
    p_t = randn(B, D)
    assert manifold_loss(p_t, p_t, "euclidean") == 0
    assert manifold_loss(p_t, p_t, "manifold") == 0
    shifted = p_t + randn(1, D)
    of_means = manifold_loss(p_t, shifted, "euclidean")
    per_example = manifold_loss(p_t, shifted, "manifold")
    torch.testing.assert_close(of_means, per_example)


def test_averaging_a_batch_leaves_a_known_small_share_of_the_teachers_variance():
    """Over all batches of B from N, the mean's variance is (N - B) / (B (N - 1)) of the vectors'
    own, exactly: what is left for a batch-mean loss to transfer. At N = 2490 and B = 32 that is
    3 %."""
    n, b = 7, 3
    e = randn(n, D)
    e = e - e.mean(0)
    batches = itertools.combinations(range(n), b)
    means = torch.stack([e[list(batch)].mean(0) for batch in batches])  # (n choose b, D)
    variance_of_means = means.square().sum(-1).mean()
    variance = e.square().sum(-1).mean()
    share = (variance_of_means / variance).item()
    assert share == pytest.approx((n - b) / (b * (n - 1)), rel=1e-12)


def test_cosine_ignores_length():
    p_t = randn(B, D)
    p_s = randn(B, D)
    expected = manifold_loss(p_t, p_s, "cosine").item()
    assert manifold_loss(9 * p_t, 0.1 * p_s, "cosine").item() == pytest.approx(expected)


@pytest.mark.parametrize("zero_side", ["student", "teacher", "both"])
def test_cosine_of_a_zero_mean_has_value_1_and_gradient_0(zero_side):
    p_t, p_s = zeros_on(zero_side, rows=slice(None))
    loss = manifold_loss(p_t, p_s, "cosine")
    loss.backward()
    assert loss == 1
    assert (p_s.grad == 0).all()


def zeros_on(side, rows):
    """Random float32 projections of teacher and student whose `rows` are 0 on one side or both."""
    p_t = torch.randn(B, D)
    p_s = torch.randn(B, D)
    if side in ("teacher", "both"):
        p_t[rows] = 0
    if side in ("student", "both"):
        p_s[rows] = 0
    return p_t, p_s.requires_grad_()


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("rows", [slice(2, 3), slice(None)], ids=["one row", "the whole batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_every_kind_a_finite_value_and_a_bounded_gradient(kind, rows, side):
    """A norm in a denominator, made safe by an epsilon alone, has the gradient 1 / epsilon at a row
    of zeros, and clipping the gradient's norm then leaves nothing of the other rows' share."""
    p_t, p_s = zeros_on(side, rows)
    loss = manifold_loss(p_t, p_s, kind)
    (gradient,) = torch.autograd.grad(loss, p_s)
    size = gradient.norm().item()
    assert loss.isfinite()
    assert size < 1e3, f"{kind!r} has a gradient of {size:.1e} at rows of zeros"  # or nan


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_gives_every_kind_a_finite_value_and_a_bounded_gradient(kind):
    """The last batch of an epoch may be that short: no kind may divide by B - 1."""
    p_t = torch.randn(1, D)
    p_s = torch.randn(1, D).requires_grad_()
    loss = manifold_loss(p_t, p_s, kind)
    (gradient,) = torch.autograd.grad(loss, p_s)
    assert loss.isfinite()
    assert gradient.norm() < 1e3


def test_an_unknown_kind_is_an_error_that_names_the_known_ones():
    says = f"unknown loss kind 'euclid': choose one of {', '.join(KINDS)}"
    with pytest.raises(ValueError, match=says):
        manifold_loss(randn(B, D), randn(B, D), "euclid")


@pytest.mark.parametrize("kind", KINDS)
def test_projections_whose_widths_differ_are_refused_and_never_broadcast(kind):
    with pytest.raises(ValueError, match="differ"):
        manifold_loss(randn(B, D), randn(B, 1), kind)


def test_logits_whose_widths_differ_are_refused_and_never_broadcast():
    with pytest.raises(ValueError, match="differ"):
        output_loss(randn(B, 1), randn(B, C), 5)


# ---- the two objectives ------------------------------------------------------------------------


def test_aligner_loss_adds_gamma_times_the_auxiliary_head():
    out = outputs()
    main = task_loss(out.logits, CLASSES).item()
    auxiliary = task_loss(out.aux_logits, CLASSES).item()
    assert aligner_loss(out, CLASSES, 0.3).item() == pytest.approx(main + 0.3 * auxiliary)


@pytest.mark.parametrize("kind", KINDS)
def test_student_loss_is_the_weighted_sum_of_its_parts_which_are_reported_before_their_weights(
    kind,
):
    s = outputs()
    t = outputs()
    total, parts = student_loss(
        s, t, CLASSES, alpha=0.3, beta=7.0, gamma=0.2, temperature=5.0, kind=kind)

    task = task_loss(s.logits, CLASSES) + 0.2 * task_loss(s.aux_logits, CLASSES)
    main = output_loss(t.logits, s.logits, 5.0)
    auxiliary = output_loss(t.aux_logits, s.aux_logits, 5.0)
    output = main + 0.2 * auxiliary
    manifold = manifold_loss(t.proj, s.proj, kind)

    assert list(parts) == ["task", "output", "manifold"]
    assert all(part.ndim == 0 for part in parts.values())
    torch.testing.assert_close(parts, {"task": task, "output": output, "manifold": manifold})
    torch.testing.assert_close(total, 0.7 * task + 0.3 * output + 7.0 * manifold)


def test_output_factor_0_drops_the_soft_labels_and_nothing_else():
    """The arm `no-output`. It is (1 - alpha) times `alpha-0` with beta / (1 - alpha), and AdamW
    does not see a constant factor, except through the clip: no-output is alpha-0 with a larger
    beta."""
    s = outputs()
    t = outputs()

    def loss(**weights):
        return student_loss(s, t, CLASSES, gamma=0.2, temperature=5.0, kind="manifold", **weights)

    no_output, parts = loss(alpha=0.3, beta=7.0, output_factor=0.0)
    torch.testing.assert_close(no_output, 0.7 * parts["task"] + 7.0 * parts["manifold"])
    alpha_0, _ = loss(alpha=0.0, beta=10.0)
    torch.testing.assert_close(no_output, 0.7 * alpha_0)


def test_output_factor_is_1_unless_given_and_linear_in_between():
    s = outputs()
    t = outputs()

    def total(**factor):
        loss, _ = student_loss(s, t, CLASSES, alpha=0.3, beta=7.0, gamma=0.2, temperature=5.0,
                               kind="manifold", **factor)
        return loss

    none = total(output_factor=0.0)
    half = total(output_factor=0.5)
    whole = total(output_factor=1)
    torch.testing.assert_close(whole, total())
    torch.testing.assert_close(half, (none + whole) / 2)


def test_no_gradient_reaches_the_teachers_side():
    s = outputs()
    t = outputs()
    loss, _ = student_loss(
        s, t, CLASSES, alpha=0.5, beta=1.0, gamma=1.0, temperature=5.0, kind="manifold")
    loss.backward()
    assert all(tensor.grad is None for tensor in t)
    assert all(tensor.grad.abs().sum() > 0 for tensor in s)


def test_without_a_teacher_the_student_loss_is_plain_cross_entropy():
    s = outputs()
    total, parts = student_loss(
        s, None, CLASSES, alpha=0.0, beta=0.0, gamma=0.0, temperature=5.0, kind="manifold")
    assert total == parts["task"] == F.cross_entropy(s.logits, CLASSES)
    assert parts["output"] == 0
    assert parts["manifold"] == 0


def test_gradients_of_the_task_loss_agree_with_finite_differences():
    logits = randn(B, C).requires_grad_()
    distribution = torch.softmax(randn(B, C), -1)
    assert torch.autograd.gradcheck(lambda o: task_loss(o, CLASSES), logits)
    assert torch.autograd.gradcheck(lambda o: task_loss(o, distribution), logits)
    scores = randn(B, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: task_loss(o, CLASSES.double()), scores)


def test_gradients_of_the_output_loss_agree_with_finite_differences():
    o_t, o_s, _ = outputs()
    assert torch.autograd.gradcheck(lambda a, b: output_loss(a, b, 2.0), (o_t, o_s))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_manifold_loss_agree_with_finite_differences(kind):
    p_t = outputs().proj
    p_s = outputs().proj
    assert torch.autograd.gradcheck(lambda a, b: manifold_loss(a, b, kind), (p_t, p_s))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_student_loss_agree_with_finite_differences(kind):
    s = outputs()
    t = outputs()
    detached = Outputs(*[tensor.detach() for tensor in t])

    def loss(logits, aux_logits, proj):
        total, _ = student_loss(Outputs(logits, aux_logits, proj), detached, CLASSES, alpha=0.5,
                                beta=2.0, gamma=0.5, temperature=5.0, kind=kind)
        return total

    assert torch.autograd.gradcheck(loss, tuple(s))


# ---- precision and accumulation ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_manifold_loss_raises_half_precision_to_float32(dtype, kind):
    """A float16 square overflows beyond 256: the losses must not compute in it."""
    p_t = torch.full((B, D), 300.0, dtype=dtype)
    p_s = torch.full((B, D), -300.0, dtype=dtype)
    loss = manifold_loss(p_t, p_s, kind)
    assert loss.dtype == torch.float32
    assert loss == manifold_loss(p_t.float(), p_s.float(), kind)
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_task_and_output_loss_raise_half_precision_to_float32(dtype):
    scores = torch.full((B, 1), 300.0, dtype=dtype)
    assert task_loss(scores, torch.zeros(B)).item() == 300.0**2
    o_t = torch.full((B, C), 300.0, dtype=dtype)
    assert output_loss(o_t, -o_t, 5.0).dtype == torch.float32


def test_float64_stays_float64():
    assert task_loss(randn(B, C), CLASSES).dtype == torch.float64


def in_micro_batches(p_t, p_s, kind, cuts):
    """The sum of the micro-batches' losses, each weighted by its share of the batch."""
    total = 0.0
    for cut in cuts:
        share = len(p_t[cut]) / len(p_t)
        total = total + share * manifold_loss(p_t[cut], p_s[cut], kind)
    return total


CUTS = [slice(0, 2), slice(2, 4), slice(4, 5)]  # of B = 5 rows; the last one is shorter


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch_for_the_kinds_declared_per_example_and_no_others(kind):
    """Weighted by their share, per-example means are exact under accumulation, gradients included.
    A batch-mean loss sees the micro-batch's mean instead of the batch's: a different number.
    train.py warns who accumulates with such a kind, so what PER_EXAMPLE says must be true."""
    p_t = randn(B, D)
    p_s = randn(B, D).requires_grad_()
    whole = manifold_loss(p_t, p_s, kind)
    summed = in_micro_batches(p_t, p_s, kind, CUTS)
    gradient_whole = torch.autograd.grad(whole, p_s)
    gradient_summed = torch.autograd.grad(summed, p_s)

    if kind in PER_EXAMPLE:
        says = f"micro-batches of {kind!r} do not add up: take it out of PER_EXAMPLE in losses.py"
        torch.testing.assert_close(summed, whole, msg=says)
        torch.testing.assert_close(gradient_summed, gradient_whole, msg=says)
    else:
        says = f"micro-batches of {kind!r} do add up: name it in PER_EXAMPLE in losses.py"
        assert not torch.isclose(summed, whole, rtol=1e-3), says


def test_only_known_kinds_are_declared_per_example():
    assert set(PER_EXAMPLE) <= set(KINDS)


def test_batch_means_of_micro_batches_are_further_apart_than_the_batchs():
    """By Jensen again: the mean of the squares is at least the square of the mean."""
    p_t = randn(B, D)
    p_s = randn(B, D)
    summed = in_micro_batches(p_t, p_s, "euclidean", CUTS)
    assert summed > 1.01 * manifold_loss(p_t, p_s, "euclidean")

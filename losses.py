"""All losses of ARMADA (arXiv 2603.10877), one function each: tensors in, tensors out.

Shapes: B batch, C labels, d shared projection space (the paper's "manifold").
    o_t, o_s   main logits of the TS Aligner (t, the teacher's side) and of the student (s)   (B, C)
    a_t, a_s   auxiliary logits, read off the projections                                     (B, C)
    p_t, p_s   projections into the shared space                                              (B, d)

The kind of loss follows the tensors, not a flag: integer labels are classes; float labels with
logits of width 1 are a regression; float labels of the logits' width are a distribution. Half
precision is raised to float32 first, since a float16 square overflows beyond 256; float32 and
float64 stay as they are.

    total, parts = student_loss(out_s, out_t, y, alpha=.5, beta=1, gamma=1, temperature=5,
                                kind="manifold")
"""
import math

import torch
import torch.nn.functional as F


def _full(x):
    """Half precision -> float32; wider types unchanged."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def _check_shapes(a, b):
    """Raise ValueError where shapes differ: (B, 1) against (B, C) would broadcast silently."""
    if a.shape != b.shape:
        raise ValueError(
            f"the teacher's {tuple(a.shape)} and the student's {tuple(b.shape)} differ")


def _mse(a, b):
    """MSE(a, b) = mean (a - b)^2 over ALL elements: a sum over d would tie beta to d."""
    _check_shapes(a, b)
    return (a - b).square().mean()


def task_loss(logits, labels):
    """task(o, y) = CE(softmax(o), y) for classes and distributions; MSE(relu(o), y) for regression.
    logits (B, C); labels (B,) integers, or (B,) floats where C = 1, or (B, C) floats whose rows sum
    to 1. A text without a label (--unlabelled: -100, nan, a row of zeros) counts 0, and the sum is
    still divided by all B: so the parts of a batch add up to it, however its labels are spread.
    Raises ValueError when the two do not fit together."""
    logits = _full(logits)
    width = logits.size(-1)
    are_floats = labels.is_floating_point()
    if not are_floats and labels.shape == logits.shape[:1] and width > 1:
        # "mean" would divide by the labelled texts, which are 0 in some micro-batches.
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / len(labels)
    if are_floats and width == 1 and labels.numel() == logits.numel():
        # STS-B's scores lie in [0, 5], hence the relu. It is flat below 0, so train.py starts the
        # heads' biases at the mean label (start_biases_at).
        targets = labels.flatten().to(logits.dtype)  # (B,)
        scores = F.relu(logits.flatten())            # (B,)
        # A missing score is what the head says itself: its difference and its gradient are 0.
        targets = torch.where(targets.isnan(), scores.detach(), targets)  # (B,)
        return _mse(targets, scores)
    if are_floats and labels.shape == logits.shape:
        # - sum_c y_c log softmax(o)_c, mean over B
        return F.cross_entropy(logits, labels.to(logits.dtype))
    raise ValueError(
        f"logits {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)} do not fit: "
        "want integers (B,) for C > 1, floats (B,) for C = 1, or a distribution (B, C)")


def output_loss(teacher_logits, student_logits, temperature):
    """L_output of one head = T^2 MSE(softmax(o_t/T), softmax(o_s/T)); for C = 1, a regression,
    MSE(relu o_t, relu o_s). t is the aligner's head, s the student's, both (B, C). At a T that is
    large beside the logits softmax(o/T) is near 1/C + (o - mean_c o) / (C T): it puts 1/T into the
    difference and into its derivative. T^2 takes both out, so alpha need not change with T: as T
    grows, the value tends to MSE(o_t - mean_c o_t, o_s - mean_c o_s) / C^2."""
    o_t = _full(teacher_logits)  # (B, C)
    o_s = _full(student_logits)  # (B, C)
    if o_s.size(-1) == 1:
        return _mse(F.relu(o_t), F.relu(o_s))  # no T: a softmax over one logit is constant
    soft_t = F.softmax(o_t / temperature, -1)  # (B, C)
    soft_s = F.softmax(o_s / temperature, -1)  # (B, C)
    return temperature**2 * _mse(soft_t, soft_s)


def output_kl(teacher_logits, student_logits, temperature):
    """L_output of a task that generates = T^2 KL(softmax(o_t/T) || softmax(o_s/T)), mean over B.
    It is ours. Over an answer vocabulary of 1,000 tokens softmaxes are so small that the gradient
    of their MSE vanishes (tests/test_generate.py shows by how much). Logits (B, V_a)."""
    log_t = F.log_softmax(_full(teacher_logits) / temperature, -1)  # (B, V_a)
    log_s = F.log_softmax(_full(student_logits) / temperature, -1)  # (B, V_a)
    divergence = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def answer_losses(logits, tokens, counts, vocabulary):
    """Return what a language model says of B answers, teacher-forced:
        cross entropy   -mean_l log p(y_l | prefix_l)                     (B,)
        o_s             log mean_l p(v | prefix_l), for the v in V_a      (B, V_a)
    Both are means over an answer's positions l: long answers weigh no more than short ones. exp o_s
    is the bag of tokens that the model expects, whose sum over V_a is below 1; the softmax of
    task_loss makes it 1. logits (N, V) and tokens (N,) of all the answers' positions one after
    another, counts [B] of each answer, vocabulary (V_a,) token ids."""
    logits = _full(logits)
    norm = logits.logsumexp(-1, keepdim=True)         # (N, 1): a log_softmax would be (N, V)
    token_logits = logits.gather(1, tokens[:, None])  # (N, 1)
    surprise = (norm - token_logits).flatten()        # (N,)
    log_p = logits[:, vocabulary] - norm              # (N, V_a)
    log_bags = []
    for answer_log_p in log_p.split(counts):          # (l, V_a)
        # In logs: a p of 1e-40 would be 0 in float32, and its log would poison the sums.
        log_bags.append(answer_log_p.logsumexp(0) - math.log(len(answer_log_p)))  # (V_a,)
    o_s = torch.stack(log_bags)                       # (B, V_a)
    cross_entropies = [answer.mean() for answer in surprise.split(counts)]
    return torch.stack(cross_entropies), o_s          # (B,), (B, V_a)


# The kinds of L_manifold. Their twin is the choices of `--loss` in train.py (Config.loss), which
# cannot import them from here: `--help` does not wait for torch. tests/test_train.py compares them.
KINDS = ("euclidean", "cosine", "manifold")

# The kinds that are a mean over texts: a batch in pieces (--micro-batch) gives the same value. The
# others compare batch means, and of a piece its own. tests/test_losses.py holds every kind to this.
PER_EXAMPLE = ("manifold",)


def manifold_loss(teacher_proj, student_proj, kind):
    """L_manifold compares the projections p_t and p_s (B, d); kind (--loss) says how:
        "euclidean"    MSE(mean_b p_t, mean_b p_s)
        "cosine"       1 - cos(mean_b p_t, mean_b p_s)
        "manifold"     MSE(p_t, p_s), text by text
    The first two compare batch means, which permuting a batch's teacher rows does not change: they
    carry no pairing of text and picture. By Jensen euclidean <= manifold (the paper's Prop. 1,
    though not strictly: both are 0 at p_t = p_s)."""
    # DEVIATION: the authors' code silently takes any unknown name for the per-example loss; an
    # error here.
    if kind not in KINDS:
        raise ValueError(f"unknown loss kind {kind!r}: choose one of {', '.join(KINDS)}")
    p_t = _full(teacher_proj)  # (B, d)
    p_s = _full(student_proj)  # (B, d)
    if kind == "manifold":
        return _mse(p_t, p_s)
    m_t = p_t.mean(0)  # (d,)
    m_s = p_s.mean(0)  # (d,)
    if kind == "euclidean":
        return _mse(m_t, m_s)
    if kind == "cosine":
        return _mean_cosine_distance(m_t, m_s)
    raise ValueError(f"the loss kind {kind!r} stands in KINDS, but has no branch in manifold_loss")


def _mean_cosine_distance(m_t, m_s):
    """1 - cos(m_t, m_s) of two vectors (d,), 0-dim; a zero vector has value 1 and gradient 0."""
    _check_shapes(m_t, m_s)
    # DEVIATION: paper says the inner product of the means (Eq. 3), which growing p_s lowers without
    # end; we normalise, as the authors' code does.
    # A zero mean has no direction: value 1, gradient 0. An epsilon in the denominator would give
    # the gradient 1 / epsilon. There are two where(), for the outer one alone would still
    # differentiate 0 / 0, which gives nan.
    norms = m_t.norm() * m_s.norm()
    dot = (m_t * m_s).sum()
    cosine = dot / torch.where(norms > 0, norms, 1)
    return 1 - torch.where(norms > 0, cosine, 0)


def aligner_loss(aligner_out, labels, gamma):
    """L_A = task(o_t, y) + gamma task(a_t, y): the TS Aligner learns from the vector alone."""
    main = task_loss(aligner_out.logits, labels)
    auxiliary = task_loss(aligner_out.aux_logits, labels)
    return main + gamma * auxiliary


def student_loss(student_out, aligner_out, labels, *, alpha, beta, gamma, temperature, kind,
                 output_factor=1, answer_loss=None):
    """L_S = (1 - alpha) L_task + alpha L_output + beta L_manifold [+ answer_loss], where
        L_task      = task(o_s, y) + gamma task(a_s, y)            task_loss
        L_output    = head(o_t, o_s) + gamma head(a_t, a_s)        output_loss
        L_manifold    compares p_t with p_s                        manifold_loss
    student_out, aligner_out: Outputs of align.py: logits (B, C), aux_logits (B, C), proj (B, d).
    The aligner's are detached: a student does not teach its teacher. With aligner_out None, "no
    teacher", L_output and L_manifold are 0. output_factor multiplies L_output: 0 drops the soft
    labels and leaves L_task at 1 - alpha. A generation task gives answer_loss, the answers' cross
    entropy (0-dim); its L_output is gamma output_kl(a_t, a_s). Returns (total, parts): parts maps
    task, output, manifold, and there answer, to 0-dim tensors, before their weights."""
    o_s = student_out.logits      # (B, C)
    a_s = student_out.aux_logits  # (B, C)
    task = task_loss(o_s, labels) + gamma * task_loss(a_s, labels)
    output = torch.zeros_like(task)
    manifold = torch.zeros_like(task)
    if aligner_out is not None:
        o_t = aligner_out.logits.detach()      # (B, C)
        a_t = aligner_out.aux_logits.detach()  # (B, C)
        p_t = aligner_out.proj.detach()        # (B, d)
        if answer_loss is None:
            output = output_loss(o_t, o_s, temperature) + gamma * output_loss(a_t, a_s, temperature)
        else:
            # o_s is the language model itself. A teacher that sees nothing of a text has one bag
            # for all, and would pull it there nearly as hard as answer_loss teaches it to write.
            output = gamma * output_kl(a_t, a_s, temperature)
        manifold = manifold_loss(p_t, student_out.proj, kind)
    total = (1 - alpha) * task + alpha * output_factor * output + beta * manifold
    parts = {"task": task, "output": output, "manifold": manifold}
    if answer_loss is not None:
        # It keeps its full weight: it alone teaches how to write, which no soft label takes over.
        total = total + answer_loss
        parts["answer"] = answer_loss
    return total, parts


def predictions(logits):
    """What a head answers (B,) = argmax_c o_c, the class with the largest logit; of width 1 the
    score, clipped to [0, 5]. logits (B, C)."""
    if logits.size(-1) > 1:
        return logits.argmax(-1)
    scores = _full(logits).squeeze(-1)  # (B,)
    return scores.clamp(0, 5)

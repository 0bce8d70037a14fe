"""The TS Aligner and its orthogonal projection. Read beside align.py."""
import pytest
import torch
import torch.nn.functional as F

from align import Householder, TSAligner
from losses import aligner_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def random_orthogonal(n, columns=None):
    """(n, columns), orthonormal columns; square unless told otherwise."""
    q, _ = torch.linalg.qr(randn(n, columns or n))
    return q


def matrix(projection):
    """P (d, n): the projection of every unit vector."""
    return projection(torch.eye(projection.in_dim, dtype=projection.v.dtype)).T


# ---- the projection ----------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim, out_dim, k", [(12, 12, 4), (12, 5, 4), (5, 12, 5), (12, 12, 12)])
def test_the_compact_form_equals_the_reflections_one_after_another(in_dim, out_dim, k):
    projection = Householder(in_dim, out_dim, k).double()
    x = randn(6, in_dim)
    n = max(in_dim, out_dim)
    reflected = F.pad(x, (0, n - in_dim))           # (6, n)
    for v in projection.v:
        v = v / v.norm()                            # (n,)
        along_v = (reflected @ v)[:, None]          # (6, 1)
        reflected = reflected - 2 * along_v * v     # (6, n)
    torch.testing.assert_close(projection(x), reflected[:, :out_dim])


def test_the_projection_stays_orthogonal_through_training_with_plain_adamw():
    """And it does move: orthogonal by construction, not because nothing learns it."""
    aligner = TSAligner(64, 3)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=0.05)
    e = torch.randn(96, 64)
    y = torch.randint(3, (96,))
    before = matrix(aligner.projection).detach()
    for _ in range(50):
        loss = aligner_loss(aligner(e), y, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    P = matrix(aligner.projection).detach()  # (64, 64)
    assert (P @ P.T - torch.eye(64)).abs().max() < 1e-5
    assert (P - before).norm() > 1


def test_at_the_papers_size_it_is_orthogonal_to_float32_precision():
    P = matrix(Householder(1024, 768)).detach()  # (768, 1024)
    assert (P @ P.T - torch.eye(768)).abs().max() < 1e-5


def test_at_full_width_the_projection_keeps_every_length_and_angle_of_the_teachers_vectors():
    """An isometry whatever the aligner learns: the per-example loss transfers the teacher's own
    geometry."""
    projection = Householder(40, 40).double()
    e = randn(9, 40)
    p = projection(e)
    torch.testing.assert_close(p @ p.T, e @ e.T)


def test_turning_projection_and_head_together_changes_no_logit():
    """The gauge: (C', P) and (C' R^T, R P) are the same function of e for any orthogonal R, so L_A
    cannot tell them apart, and restricting P to few reflections costs L_A nothing as long as C' can
    follow."""
    C = randn(3, 16)
    P = random_orthogonal(16)
    R = random_orthogonal(16)
    e = randn(8, 16)
    logits = (e @ P.T) @ C.T           # (8, 3)
    turned_P = R @ P                   # (16, 16)
    turned_C = C @ R.T                 # (3, 16)
    turned_logits = (e @ turned_P.T) @ turned_C.T
    torch.testing.assert_close(logits, turned_logits)


def test_C_reflections_carry_any_C_frame_to_any_other():
    """Reflecting along u_i - w_i sends u_i to w_i and, as both are orthogonal to the frame vectors
    already in place, leaves those where they are. So with k >= C reflections P_t can send the C
    directions that matter anywhere."""
    n, C = 20, 4
    u = random_orthogonal(n, C).T  # (C, n)
    w = random_orthogonal(n, C).T  # (C, n)
    projection = Householder(n, n, C).double()
    x = u.clone()
    with torch.no_grad():
        for i in range(C):
            v = x[i] - w[i]                    # (n,)
            projection.v[i] = v
            along_v = (x @ v)[:, None]         # (C, 1)
            x = x - 2 * along_v * v / (v @ v)  # (C, n)
    torch.testing.assert_close(projection(u), w)


def test_gradients_of_the_projection_agree_with_finite_differences():
    projection = Householder(6, 4, 3).double()
    x = randn(2, 6).requires_grad_()

    def project(x, v):
        return torch.func.functional_call(projection, {"v": v}, x)

    assert torch.autograd.gradcheck(project, (x, projection.v))


# ---- the aligner -------------------------------------------------------------------------------


def test_the_forward_pass_is_the_papers_formula():
    aligner = TSAligner(10, 3, hidden_dim=8, proj_dim=6).eval()
    e = torch.randn(4, 10)
    out = aligner(e)

    h = torch.relu(e @ aligner.w1.weight.T + aligner.w1.bias)  # (4, 8)
    h = torch.relu(h @ aligner.w2.weight.T + aligner.w2.bias)  # (4, 8)
    o = h @ aligner.classifier.weight.T + aligner.classifier.bias          # (4, 3)
    p = e @ matrix(aligner.projection).T                                   # (4, 6)
    a = p @ aligner.aux_classifier.weight.T + aligner.aux_classifier.bias  # (4, 3)

    torch.testing.assert_close(out.logits, o)
    torch.testing.assert_close(out.proj, p)
    torch.testing.assert_close(out.aux_logits, a)


def test_dropout_hits_the_hidden_layers_and_the_auxiliary_head_but_not_the_projection():
    """p_t is what the student is pulled to: it must be P_t e, not a thinned copy."""
    aligner = TSAligner(10, 3, dropout=0.5).train()
    e = torch.randn(4, 10)
    first = aligner(e)
    second = aligner(e)
    assert (first.proj == second.proj).all()
    assert (first.logits != second.logits).any()
    assert (first.aux_logits != second.aux_logits).any()


def test_the_projection_width_defaults_to_the_teachers():
    assert TSAligner(10, 3)(torch.randn(1, 10)).proj.shape == (1, 10)


@pytest.mark.parametrize("width", [11, 0])
def test_the_projection_width_cannot_exceed_the_teachers(width):
    with pytest.raises(ValueError, match="between 1 and latent_dim 10"):
        TSAligner(10, 3, proj_dim=width)


def accuracy(logits, y):
    return (logits.argmax(-1) == y).float().mean().item()


def test_the_aligner_learns_what_only_its_hidden_layers_can_see():
    """A sign that depends on a product of two coordinates: the linear auxiliary head is at chance,
    the main head is not."""
    e = torch.randn(400, 8)
    y = (e[:, 0] * e[:, 1] > 0).long()  # (400,)
    aligner = TSAligner(8, 2, dropout=0.0)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        aligner_loss(aligner(e), y, 1.0).backward()
        optimizer.step()
    out = aligner(e)
    assert accuracy(out.logits, y) > 0.95
    assert accuracy(out.aux_logits, y) < 0.7


def test_dropout_thins_both_hidden_layers_and_what_the_auxiliary_head_reads():
    """Each by the rate that was asked for. Biases as large as these keep every relu open."""
    aligner = TSAligner(400, 3, hidden_dim=400, dropout=0.5).train()
    torch.nn.init.constant_(aligner.w1.bias, 1e2)
    torch.nn.init.constant_(aligner.w2.bias, 1e4)
    thinned = {}
    for name in ("w1", "w2", "classifier", "aux_classifier"):
        def note(module, args, name=name):
            thinned[name] = (args[0] == 0).float().mean().item()
        getattr(aligner, name).register_forward_pre_hook(note)
    aligner(torch.randn(8, 400))
    expected = {"w1": 0, "w2": 0.5, "classifier": 0.5, "aux_classifier": 0.5}
    assert thinned == pytest.approx(expected, abs=0.05)


def test_the_projection_leaves_torchs_precision_of_products_as_it_found_it():
    """TF32, which a GPU's student is trained with, must be on again afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        Householder(6, 4)(torch.randn(3, 6))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_under_autocast_the_projection_is_computed_in_float32_all_the_same():
    """In bf16 Q would not be orthogonal; an orthogonal student projects under autocast."""
    projection = Householder(64, 48)
    x = torch.randn(5, 64)
    expected = projection(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection(x), expected)

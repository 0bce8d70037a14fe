"""The TS Aligner and its orthogonal projection. Read beside align.py."""
import pytest
import torch
import torch.nn.functional as F

from align import Householder, TSAligner
from losses import aligner_loss

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def matrix(projection):
    """P (d, n): the projection of every unit vector."""
    return projection(torch.eye(projection.in_dim, dtype=projection.v.dtype)).T

@pytest.mark.parametrize("in_dim, out_dim, k", [(12, 12, 4), (12, 5, 4), (5, 12, 5), (12, 12, 12)])
def test_the_compact_form_equals_the_reflections_one_after_another(in_dim, out_dim, k):
    projection, x = Householder(in_dim, out_dim, k).double(), torch.randn(6, in_dim, dtype=torch.float64)
    reflected = F.pad(x, (0, max(in_dim, out_dim) - in_dim))
    for v in projection.v:
        v = v / v.norm()
        reflected = reflected - 2 * (reflected @ v)[:, None] * v
    torch.testing.assert_close(projection(x), reflected[:, :out_dim])

def test_the_projection_stays_orthogonal_through_training_with_plain_adamw():
    """And it does move: orthogonal by construction, not because nothing learns it."""
    aligner = TSAligner(64, 3)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=0.05)
    e, y, before = torch.randn(96, 64), torch.randint(3, (96,)), matrix(aligner.projection).detach()
    for _ in range(50):
        loss = aligner_loss(aligner(e), y, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    P = matrix(aligner.projection).detach()
    assert (P @ P.T - torch.eye(64)).abs().max() < 1e-5
    assert (P - before).norm() > 1

def test_at_the_papers_size_it_is_orthogonal_to_float32_precision():
    P = matrix(Householder(1024, 768)).detach()
    assert (P @ P.T - torch.eye(768)).abs().max() < 1e-5

def test_at_full_width_the_projection_keeps_every_length_and_angle_of_the_teachers_vectors():
    """An isometry whatever the aligner learns: the per-example loss transfers the teacher's own geometry."""
    projection, e = Householder(40, 40).double(), torch.randn(9, 40, dtype=torch.float64)
    torch.testing.assert_close(projection(e) @ projection(e).T, e @ e.T)

def test_turning_projection_and_head_together_changes_no_logit():
    """The gauge: (C', P) and (C' R^T, R P) are the same function of e for any orthogonal R, so L_A cannot
    tell them apart, and restricting P to few reflections costs L_A nothing as long as C' can follow."""
    C, P = (torch.randn(3, 16, dtype=torch.float64),
            torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0])
    R, e = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0],
            torch.randn(8, 16, dtype=torch.float64))
    torch.testing.assert_close((e @ P.T) @ C.T, (e @ (R @ P).T) @ (C @ R.T).T)

def test_C_reflections_carry_any_C_frame_to_any_other():
    """Reflecting along u_i - w_i sends u_i to w_i and, as both are orthogonal to the frame vectors already in
    place, leaves those where they are. So with k >= C reflections P_t can send the C directions that matter
    anywhere."""
    n, C = 20, 4
    u, w = (torch.linalg.qr(torch.randn(n, C, dtype=torch.float64))[0].T for _ in range(2))
    projection, x = Householder(n, n, C).double(), u.clone()
    with torch.no_grad():
        for i in range(C):
            projection.v[i] = v = x[i] - w[i]
            x = x - 2 * (x @ v)[:, None] * v / (v @ v)
    torch.testing.assert_close(projection(u), w)

def test_gradients_of_the_projection_agree_with_finite_differences():
    projection = Householder(6, 4, 3).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: torch.func.functional_call(projection, {"v": v}, x),
                                    (x, projection.v))

def test_the_forward_pass_is_the_papers_formula():
    aligner, e = TSAligner(10, 3, hidden_dim=8, proj_dim=6).eval(), torch.randn(4, 10)
    out = aligner(e)
    h = torch.relu(torch.relu(e @ aligner.w1.weight.T + aligner.w1.bias) @ aligner.w2.weight.T
                   + aligner.w2.bias)
    p = e @ matrix(aligner.projection).T
    torch.testing.assert_close(out.logits, h @ aligner.classifier.weight.T + aligner.classifier.bias)
    torch.testing.assert_close(out.proj, p)
    torch.testing.assert_close(out.aux_logits,
                               p @ aligner.aux_classifier.weight.T + aligner.aux_classifier.bias)
    assert [tuple(x.shape) for x in out] == [(4, 3), (4, 3), (4, 6)]

def test_dropout_hits_the_hidden_layers_and_the_auxiliary_head_but_not_the_projection():
    """p_t is what the student is pulled to: it must be P_t e, not a thinned copy."""
    aligner, e = TSAligner(10, 3, dropout=0.5).train(), torch.randn(4, 10)
    a, b = aligner(e), aligner(e)
    assert (a.proj == b.proj).all() and (a.logits != b.logits).any() and (a.aux_logits != b.aux_logits).any()

def test_the_projection_width_defaults_to_the_teachers_and_cannot_exceed_it():
    assert TSAligner(10, 3)(torch.randn(1, 10)).proj.shape == (1, 10)
    for width in (11, 0):
        with pytest.raises(ValueError, match="between 1 and latent_dim 10"):
            TSAligner(10, 3, proj_dim=width)

def test_the_aligner_learns_what_only_its_hidden_layers_can_see():
    """A sign that depends on a product of two coordinates: the linear auxiliary head is at chance,
    the main head is not."""
    e = torch.randn(400, 8)
    y, aligner = (e[:, 0] * e[:, 1] > 0).long(), TSAligner(8, 2, dropout=0.0)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        aligner_loss(aligner(e), y, 1.0).backward()
        optimizer.step()
    out = aligner(e)
    assert ((out.logits.argmax(-1) == y).float().mean() > 0.95 > 0.7
            > (out.aux_logits.argmax(-1) == y).float().mean())

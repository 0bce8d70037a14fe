"""The TS Aligner, a small network that learns the task from the teacher's vector alone.

Shapes: B batch, d_e teacher (1024 = a 4x16x16 Stable Diffusion latent), d_h hidden, C labels,
d shared projection space.
    h_t = drop(relu(W2 drop(relu(W1 e))))     (B, d_h)
    o_t = C_t h_t                             (B, C)    main logits
    p_t = P_t e,   P_t P_t^T = I              (B, d)    orthogonal projection into the shared space
    a_t = C'_t drop(p_t)                      (B, C)    auxiliary logits

    aligner_loss(TSAligner(latent_dim=1024, num_labels=2)(e), y, gamma=1.0).backward()
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Outputs(NamedTuple):
    """What the aligner and the student both return."""
    logits: torch.Tensor      # (B, C)
    aux_logits: torch.Tensor  # (B, C)
    proj: torch.Tensor        # (B, d)


class Householder(nn.Module):
    """x (B, in) -> x Q[:, :d] (B, d), so that P = Q[:, :d]^T. Q is a product of k reflections
    x <- x - 2 (x.v) v, |v| = 1. A reflection is orthogonal whatever v is, so Q is orthogonal
    BY CONSTRUCTION at every step of any optimizer. A matrix exponential or a Cayley transform is so
    too, but solves an n x n problem a step (tests/bench.py measures how much slower that is), and a
    QR retraction is a second optimizer step to remember.
    Why k = 32 reflections are enough, though a general Q needs n: without dropout L_A sees P_t only
    through the product M = C'_t P_t, and C'_t is free. At d = d_e, the default, every M is reached
    with any P_t, by C'_t = M P_t^T. At d < d_e P_t also chooses the d directions in which the rows
    of M lie, and k >= C reflections carry any C-frame to any other, one for each vector: enough for
    up to 32 labels. tests/test_align.py shows both. L_manifold sees P_t, but does not train it.
    Q is n x n, n the larger of in and d. Where d > in (a student's projection, on request), x is
    padded with zeros and the map has orthonormal columns."""

    def __init__(self, in_dim, out_dim, reflections=32):
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        n = max(in_dim, out_dim)
        self.v = nn.Parameter(torch.randn(reflections, n))  # (k, n)

    def forward(self, x):
        # DEVIATION: the authors' code makes P a matrix exponential; reflections are as exact and
        # far cheaper. k of them one after another are 2k small steps, but their product has a
        # closed ("compact WY") form,
        #   Q = I - V^T S^-1 V   with S = I/2 + the strict upper triangle of V V^T   (V holds the k
        # rows v): two thin matrix products and one k x k triangular solve. The test's oracle is the
        # plain loop.
        n = self.v.size(1)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 or bf16 would bend Q by 1e-4 and more
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.to(self.v.dtype), (0, n - self.in_dim))                   # (B, n)
            v = F.normalize(self.v, dim=-1)                                       # (k, n)
            half = 0.5 * torch.eye(len(v), dtype=v.dtype, device=v.device)        # (k, k)
            s = (v @ v.T).triu(1) + half                                          # (k, k)
            w = torch.linalg.solve_triangular(s, v[:, :self.out_dim], upper=True)  # (k, d)
            p = x[:, :self.out_dim] - (x @ v.T) @ w                               # (B, d)
        torch.set_float32_matmul_precision(precision)
        return p


class TSAligner(nn.Module):
    """Teacher vectors (B, d_e) -> Outputs. It costs milliseconds, so it always runs in float32.
    proj_dim d defaults to latent_dim; ValueError if d > d_e: only d_e such rows are orthonormal."""

    def __init__(self, latent_dim, num_labels, hidden_dim=512, proj_dim=None, dropout=0.1):
        super().__init__()
        # DEVIATION: paper says 768 (Table 1), the authors' code 1024; we default to d_e, because
        # then p_t keeps every length and angle of e (an isometry) and nothing of the teacher is cut
        # off.
        if proj_dim is None:
            proj_dim = latent_dim
        if not 1 <= proj_dim <= latent_dim:
            raise ValueError(f"proj_dim {proj_dim} must be between 1 and latent_dim {latent_dim}")
        self.w1 = nn.Linear(latent_dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, hidden_dim)
        self.classifier = nn.Linear(hidden_dim, num_labels)    # C_t
        self.projection = Householder(latent_dim, proj_dim)    # P_t
        self.aux_classifier = nn.Linear(proj_dim, num_labels)  # C'_t
        self.drop = nn.Dropout(dropout)

    def forward(self, latents):
        h = self.drop(F.relu(self.w1(latents)))  # (B, d_h)
        h = self.drop(F.relu(self.w2(h)))        # (B, d_h)
        p = self.projection(latents)             # (B, d)
        o = self.classifier(h)                   # (B, C)
        a = self.aux_classifier(self.drop(p))    # (B, C)
        return Outputs(o, a, p)

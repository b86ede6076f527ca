"""Losses, each written once for every schedule and prediction. The denoising loss is the mean squared error of what a
network predicts (`Denoiser.target`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradient that moves x from the student's density towards the teacher's (DMD, Yin et al. 2024, eq. 7-8).

    x, real, fake: (B, ...) generated samples and the two denoisers' x0 at one noised x, in data range.
    weight: a factor a sample, (B,) or a number. Returns the gradient (B, ...) and the normaliser mean|x - real| (B,).
    The amplification of a prediction near pure noise cancels between the two, so x0-space equals eps-, v- and F-space.
    Departs from the paper: no alpha_t (nor has the published DMD2), and the normaliser has a floor of 1e-6.
    """
    scale = (x - real).flatten(1).abs().mean(1).clamp_min(1e-6)
    factor = (weight / scale).view(-1, *[1] * (x.ndim - 1))
    return (fake - real) * factor, scale


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 mean(|x - sg(x - g)|^2): a loss whose gradient on x is g / x.numel() exactly. Its value says nothing.

    Distribution matching gives g to samples; consistency methods give it to the network's output, -g being the residual
    by which that output should move.
    """
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def unit(residual: Tensor, floor: float = 0.1) -> Tensor:
    """Each sample's residual (B, ...) over its own norm plus a floor, r / (|r| + c): sCM's tangent normalisation."""
    norm = residual.flatten(1).norm(dim=1).view(-1, *[1] * (residual.ndim - 1))
    return residual / (norm + floor)


def pseudo_huber(x: Tensor, target: Tensor, knee: float = 1e-3) -> Tensor:
    """mean(sqrt((x - y)^2 + c^2) - c): quadratic below the knee c, linear above it (LCM, Luo et al. 2023)."""
    return (((x - target) ** 2 + knee**2).sqrt() - knee).mean()


def clamped(score: Tensor, enough: float) -> Tensor:
    """mean(max(0, enough - score)): raises scores (B,) up to a bound (SwiftBrush v2, Dao et al. 2024)."""
    return F.relu(enough - score).mean()


def gan_generator(logits: Tensor) -> Tensor:
    """Non-saturating generator loss, mean softplus(-D)."""
    return F.softplus(-logits).mean()


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic discriminator loss, mean softplus(-D(real)) + mean softplus(D(fake))."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_generator(logits: Tensor) -> Tensor:
    """Hinge generator loss, -mean D."""
    return -logits.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge discriminator loss, mean relu(1 - D(real)) + mean relu(1 + D(fake)) (Lim & Ye 2017)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def preference(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """Preference loss -log sigmoid(beta (better - worse)) of log-likelihood ratios to a reference, each (B,).

    (DPO, Rafailov et al. 2023, arXiv:2305.18290.)
    """
    return F.softplus(-beta * (better - worse)).mean()


def finite(*tensors: Tensor) -> Tensor:
    """0-d bool on the tensors' device: true where every element is finite. Asks nothing of the host."""
    return torch.stack([t.isfinite().all() for t in tensors]).all()

"""Health signals of a few-step student, under the names that the guard, the gauges and the pages read."""

from __future__ import annotations

from torch import Tensor

GREY_LEVEL = 2 / 255  # of data in [-1, 1]


def statistics(x: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """Brightness, contrast and diversity of generated samples x (B, ...), and of the data beside them, as 0-d tensors.

    saturated: share of values beyond [-1, 1] by a grey level. spread: diversity, the standard deviation of a value over
    the batch, averaged over values; a batch of one sample has none.
    """
    out: dict[str, Tensor] = {}
    for who, values in (("student", x.detach()), ("real", real)):
        if values is None:
            continue
        out[f"{who}_mean"], out[f"{who}_std"] = values.mean(), values.std()
        out[f"{who}_saturated"] = (values.abs() > 1 + GREY_LEVEL).float().mean()
        if len(values) > 1:
            out[f"{who}_spread"] = values.std(dim=0).mean()
    return out


def verdicts(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Mean probability that an image is real, and accuracy, of a discriminator's logits (B,) on real and fake samples.

    accuracy: one half when it cannot tell; a logit of exactly 0 counts as wrong.
    """
    real, fake = real.detach(), fake.detach()
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return {"d_real": real.sigmoid().mean(), "d_fake": fake.sigmoid().mean(), "d_accuracy": right}

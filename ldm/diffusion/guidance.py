"""Guidance rules: a Denoiser in, a Denoiser out, so that they compose."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


def classifier_free(denoiser: Denoiser, scale: float) -> Denoiser:
    """Go from the unconditional answer through the conditional one and `scale` times as far (Ho and Salimans 2022).

    `denoiser` is asked for a doubled batch, whose first half it answers under the prompt and whose second half without.
    """

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return guided

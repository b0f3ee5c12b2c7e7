"""Guidance rules, each against its equation, and all together."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion import guidance as g

ANSWER, REFERENCE, Z = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((2,), 0.5, dtype=torch.float64)
RULES: dict[str, g.GuidanceFn] = {
    "classifier_free": g.cfg(1.0),
    "rescaled": g.guidance_rescale(g.cfg(1.0), 0.7),
    "apg": g.apg(1.0),
    "zero_star": g.cfg_zero_star(g.cfg(1.0)),
    "zero_star_apg": g.cfg_zero_star(g.apg(1.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_scale_one_is_the_answer_itself(name: str) -> None:
    torch.testing.assert_close(RULES[name](ANSWER, REFERENCE, Z, T), ANSWER)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_apg_without_its_parts_is_classifier_free(scale: float) -> None:
    want = g.cfg(scale)(ANSWER, REFERENCE, Z, T)
    torch.testing.assert_close(want, REFERENCE + scale * (ANSWER - REFERENCE))
    torch.testing.assert_close(g.apg(scale, parallel=1.0)(ANSWER, REFERENCE, Z, T), want)


def test_apg_pushes_across_the_answer_and_no_farther_than_its_radius() -> None:
    push = g.apg(3.0, radius=0.1)(ANSWER, REFERENCE, Z, T) - ANSWER
    across = (push * ANSWER).flatten(1).sum(1)
    torch.testing.assert_close(across, torch.zeros_like(across), rtol=0, atol=1e-9)
    assert (push.flatten(1).norm(dim=1) <= 2 * 0.1 + 1e-9).all()


def test_apg_momentum_adds_the_pushes_before() -> None:
    rule = g.apg(2.0, parallel=1.0, momentum=-0.5)
    first, second = (rule(ANSWER, REFERENCE, Z, T) - ANSWER for _ in range(2))
    torch.testing.assert_close(second, 0.5 * first)


def test_rescaling_restores_the_deviation_of_the_answer() -> None:
    result = g.guidance_rescale(g.cfg(9.0), 1.0)(ANSWER, REFERENCE, Z, T)
    torch.testing.assert_close(result.flatten(1).std(1), ANSWER.flatten(1).std(1))
    assert g.cfg(9.0)(ANSWER, REFERENCE, Z, T).std() > 3 * ANSWER.std()


def test_zero_star_fits_the_reference() -> None:
    """With velocities that differ by a factor alone there is nothing to push."""
    rule = g.cfg_zero_star(g.cfg(5.0))
    torch.testing.assert_close(rule(ANSWER, Z - 0.3 * (Z - ANSWER), Z, T), ANSWER)
    factor = ((Z - ANSWER) * (Z - REFERENCE)).flatten(1).sum(1) / (Z - REFERENCE).square().flatten(1).sum(1)
    reference = Z - factor.reshape(-1, 1, 1, 1) * (Z - REFERENCE)
    torch.testing.assert_close(rule(ANSWER, REFERENCE, Z, T), reference + 5 * (ANSWER - reference))


def test_zero_init_moves_nothing_at_the_start_of_the_path_alone() -> None:
    rule = g.zero_init(g.cfg(5.0))
    for _ in range(2):
        assert torch.equal(rule(ANSWER, REFERENCE, Z, torch.ones(2)), Z)
        torch.testing.assert_close(rule(ANSWER, REFERENCE, Z, T), g.cfg(5.0)(ANSWER, REFERENCE, Z, T))


def test_pairs() -> None:
    def denoise(z: Tensor, t: Tensor) -> Tensor:
        assert len(z) == len(t)
        return torch.cat([part + i for i, part in enumerate(z.split(2))])

    answer, reference = g.batched_cond_uncond(denoise)(Z, T)
    assert torch.equal(answer, Z) and torch.equal(reference, Z + 1)
    answer, reference = g.composable_diffusion(denoise, torch.tensor([[0.5, 0.5], [2.0, 2.0]]))(
        Z, T
    )  # Z, Z + 1 and the reference Z + 2
    torch.testing.assert_close(answer, Z + 2 - 0.5 * 2 - 2.0 * 1)
    assert torch.equal(reference, Z + 2)
    answer, reference = g.autoguidance_pair(denoise, lambda z, t: 0 * z)(Z, T)
    assert torch.equal(answer, Z) and not reference.any()


def test_one_prompt_composed_is_one_prompt() -> None:
    denoise = lambda z, t: torch.cat([ANSWER, REFERENCE])  # noqa: E731
    one, other = (
        g.guided_denoiser(pair, g.cfg(4.0))
        for pair in (g.batched_cond_uncond(denoise), g.composable_diffusion(denoise, torch.ones(1, 2)))
    )
    torch.testing.assert_close(one(Z, T), other(Z, T))


def test_outside_the_interval_the_plain_answer_is_asked_alone() -> None:
    guided = g.guidance_interval((0.2, 0.6), lambda z, t: z + 1, lambda z, t: z)
    for t, plus in ((0.1, 0), (0.2, 1), (0.6, 1), (0.7, 0)):
        assert torch.equal(guided(Z, torch.full((2,), t, dtype=torch.float64)), Z + plus)


def test_all_compose() -> None:
    """Any pair under any rule, rescaled, within an interval, is still a Denoiser."""
    denoise = lambda z, t: torch.tanh(z)  # noqa: E731
    for pair in (
        g.batched_cond_uncond(denoise),
        g.composable_diffusion(denoise, torch.ones(2, 2)),
        g.autoguidance_pair(denoise, denoise),
    ):
        for rule in RULES.values():
            result = g.guidance_interval((0.0, 1.0), g.guided_denoiser(pair, g.guidance_rescale(rule, 0.5)), denoise)(
                Z, T
            )
            assert result.shape == Z.shape and result.isfinite().all()

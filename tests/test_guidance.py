"""Guidance methods, each against its equation, and all together."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion import guidance as g

COND, UNCOND, Z = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((2,), 0.5, dtype=torch.float64)
AT_SCALE_1: dict[str, g.GuidanceFn] = {
    "cfg": g.cfg(1.0),
    "rescaled": g.guidance_rescale(g.cfg(1.0), 0.7),
    "apg": g.APG(1.0),
    "zero_star": g.cfg_zero_star(g.cfg(1.0)),
    "zero_star_apg": g.cfg_zero_star(g.APG(1.0)),
}


@pytest.mark.parametrize("name", AT_SCALE_1)
def test_scale_1_is_the_conditional_prediction(name: str) -> None:
    torch.testing.assert_close(AT_SCALE_1[name](COND, UNCOND, Z, T), COND)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_apg_with_eta_1_is_cfg(scale: float) -> None:
    want = UNCOND + scale * (COND - UNCOND)
    torch.testing.assert_close(g.cfg(scale)(COND, UNCOND, Z, T), want)
    torch.testing.assert_close(g.APG(scale, eta=1.0)(COND, UNCOND, Z, T), want)


def test_apg_updates_across_the_prediction_and_within_its_norm_threshold() -> None:
    update = g.APG(3.0, norm_threshold=0.1)(COND, UNCOND, Z, T) - COND
    parallel = (update * COND).flatten(1).sum(1)
    torch.testing.assert_close(parallel, torch.zeros_like(parallel), rtol=0, atol=1e-9)
    assert (update.flatten(1).norm(dim=1) <= 2 * 0.1 + 1e-9).all()


def test_apg_momentum_adds_the_previous_updates() -> None:
    guidance = g.APG(2.0, eta=1.0, momentum=-0.5)
    first, second = (guidance(COND, UNCOND, Z, T) - COND for _ in range(2))
    torch.testing.assert_close(second, 0.5 * first)


def test_a_built_guidance_has_no_momentum_of_an_earlier_run() -> None:
    config = g.GuidanceConfig(method="apg", apg_eta=1.0, apg_momentum=-0.5)
    for _ in range(2):
        guidance = config.build(2.0)
        torch.testing.assert_close(guidance(COND, UNCOND, Z, T), 2 * COND - UNCOND)
        assert not torch.allclose(guidance(COND, UNCOND, Z, T), 2 * COND - UNCOND)


def test_rescaling_restores_the_standard_deviation() -> None:
    result = g.guidance_rescale(g.cfg(9.0), 1.0)(COND, UNCOND, Z, T)
    torch.testing.assert_close(result.flatten(1).std(1), COND.flatten(1).std(1))
    assert g.cfg(9.0)(COND, UNCOND, Z, T).std() > 3 * COND.std()


def test_zero_star_scales_the_unconditional_velocity() -> None:
    """With velocities that differ by a factor alone there is nothing left to guide."""
    guidance = g.cfg_zero_star(g.cfg(5.0))
    torch.testing.assert_close(guidance(COND, Z - 0.3 * (Z - COND), Z, T), COND)
    scale = ((Z - COND) * (Z - UNCOND)).flatten(1).sum(1) / (Z - UNCOND).square().flatten(1).sum(1)
    uncond = Z - scale.reshape(-1, 1, 1, 1) * (Z - UNCOND)
    torch.testing.assert_close(guidance(COND, UNCOND, Z, T), uncond + 5 * (COND - uncond))


def test_zero_init_keeps_z_at_t_1_alone() -> None:
    guidance = g.zero_init(g.cfg(5.0))
    assert torch.equal(guidance(COND, UNCOND, Z, torch.ones(2)), Z)
    assert torch.equal(guidance(COND, UNCOND, Z, T), g.cfg(5.0)(COND, UNCOND, Z, T))


def test_pairs_of_predictions() -> None:
    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        assert len(z) == len(t)
        return torch.cat([copy + i for i, copy in enumerate(z.split(2))])

    cond, uncond = g.batched_cond_uncond(denoiser)(Z, T)
    assert torch.equal(cond, Z) and torch.equal(uncond, Z + 1)
    weights = torch.tensor([[0.5, 0.5], [2.0, 2.0]])
    cond, uncond = g.composable_diffusion(denoiser, weights)(Z, T)  # of Z, Z + 1 and the reference Z + 2
    torch.testing.assert_close(cond, Z + 2 - 0.5 * 2 - 2.0 * 1)
    assert torch.equal(uncond, Z + 2)
    cond, uncond = g.autoguidance_pair(denoiser, lambda z, t: 0 * z)(Z, T)
    assert torch.equal(cond, Z) and not uncond.any()


def test_composing_one_prompt_is_cfg() -> None:
    denoiser = lambda z, t: torch.cat([COND, UNCOND])  # noqa: E731
    one, other = (
        g.guided_denoiser(pair, g.cfg(4.0))
        for pair in (g.batched_cond_uncond(denoiser), g.composable_diffusion(denoiser, torch.ones(1, 2)))
    )
    torch.testing.assert_close(one(Z, T), other(Z, T))


def test_outside_the_interval_the_unguided_denoiser_is_called_alone() -> None:
    denoiser = g.guidance_interval((0.2, 0.6), lambda z, t: z + 1, lambda z, t: z)
    for t, added in ((0.1, 0), (0.2, 1), (0.6, 1), (0.7, 0)):
        assert torch.equal(denoiser(Z, torch.full((2,), t, dtype=torch.float64)), Z + added)


def test_inpainting_keeps_what_the_mask_leaves_out() -> None:
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    result = g.inpaint_denoiser(lambda z, t: COND, UNCOND[:1], mask)(Z, T)
    assert torch.equal(result[..., :2], COND[..., :2])
    assert torch.equal(result[..., 2:], UNCOND[:1].expand_as(Z)[..., 2:])


def test_all_compose() -> None:
    """Any pair of predictions under any method, rescaled, within an interval, is still a Denoiser."""
    denoiser = lambda z, t: torch.tanh(z)  # noqa: E731
    for pair in (
        g.batched_cond_uncond(denoiser),
        g.composable_diffusion(denoiser, torch.ones(2, 2)),
        g.autoguidance_pair(denoiser, denoiser),
    ):
        for guidance in AT_SCALE_1.values():
            guided = g.guided_denoiser(pair, g.guidance_rescale(guidance, 0.5))
            result = g.guidance_interval((0.0, 1.0), guided, denoiser)(Z, T)
            assert result.shape == Z.shape and result.isfinite().all()


@pytest.mark.parametrize("interval", [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.1)])
def test_an_interval_that_does_not_rise_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="interval.*must rise.*0 to 1.*lower t first"):
        g.GuidanceConfig(interval=interval)

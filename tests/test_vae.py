"""The VAE: published size, structure, losses, and agreement with diffusers."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ldm.config import read_yaml
from ldm.vae import VAE, Posterior, VAEConfig
from ldm.vae.losses import VAELossConfig, psnr, ssim, vae_loss

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = VAEConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3)
PATCHED = VAEConfig(
    patch_size=4, base_channels=32, channel_mult=(1,), num_res_blocks=1, mid_attention=False, latent_channels=12
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_stable_diffusion_vae_is_a_yaml_file() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig(**read_yaml(CONFIGS / "sd15/vae.yaml")["vae"]))
    parameters = list(vae.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (83_653_863, 248)
    assert sum(p.numel() for p in vae.encoder.parameters()) == 34_163_592
    assert vae.config.factor == 8


@pytest.mark.parametrize("config", [SMALL, PATCHED])
def test_shapes_of_latents_and_images(config: VAEConfig) -> None:
    vae = VAE(config)
    posterior = vae.encode(torch.rand(2, 3, 16, 24))
    side = 16 // config.factor, 24 // config.factor
    assert posterior.mean.shape == posterior.logvar.shape == (2, config.latent_channels, *side)
    assert vae.decode(posterior.mean).shape == (2, 3, 16, 24)


def test_sizes_that_the_factor_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="image size 18 is not a multiple of 4, the VAE's factor"):
        VAE(PATCHED).encode(torch.zeros(1, 3, 16, 18))


def test_norm_groups_are_a_setting() -> None:
    vae = VAE(SMALL.model_copy(update={"base_channels": 24, "norm_num_groups": 8}))
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert vae(torch.rand(1, 3, 16, 16), torch.randn(1, 3, 8, 8))[0].shape == (1, 3, 16, 16)
    with pytest.raises(ValidationError, match="norm_num_groups: 32 groups .* 40 .base_channels.* divisor of 40"):
        VAEConfig(base_channels=40)


def test_kl_and_sampling_are_those_of_a_gaussian() -> None:
    mean, logvar = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    posterior = Posterior(mean, logvar)
    ours = torch.distributions.Normal(mean, (logvar / 2).exp())
    want = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), want)
    samples = Posterior(mean[:1], logvar[:1]).sample(torch.randn(50_000, 3, 2, 2))
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(0), (logvar[0] / 2).exp(), rtol=0.03, atol=0)


def test_batch_items_do_not_see_each_other() -> None:
    vae, images = VAE(SMALL).eval(), torch.rand(3, 3, 16, 16)
    whole = vae.encode(images).mean
    torch.testing.assert_close(vae.encode(images[1:2]).mean, whole[1:2], rtol=0, atol=2e-6)


def test_gradient_checkpointing_recomputes_each_level_and_changes_nothing() -> None:
    plain = VAE(SMALL)
    saving = VAE(SMALL, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    calls = {plain: 0, saving: 0}
    for vae in calls:
        for level in (*vae.encoder.levels, *vae.decoder.levels):
            level.register_forward_pre_hook(lambda *_, vae=vae: calls.update({vae: calls[vae] + 1}))
        vae(images, noise)[0].square().mean().backward()
    assert calls[saving] == 2 * calls[plain] > 0
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_the_pca_skip_starts_at_the_principal_components() -> None:
    """After `init_from_pca` the mean reconstruction is the best rank-12 projection of the patches, by SVD."""
    images = torch.rand(8, 3, 16, 16)
    vae = VAE(PATCHED)
    assert vae.linear is not None
    vae.linear.init_from_pca(images)
    patches = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48).double()
    centered = patches - patches.mean(0)
    _, _, right = torch.linalg.svd(centered, full_matrices=False)
    lost = (centered - centered @ right[:12].mT @ right[:12]).square().mean()
    with torch.no_grad():
        found = (vae.decode(vae.encode(images).mean) - images).square().mean()
    assert found.item() == pytest.approx(lost.item(), rel=1e-3)


@pytest.mark.parametrize("color", [-1.0, 0.1])
def test_images_without_variance_have_no_principal_components(color: float) -> None:
    vae = VAE(PATCHED)
    assert vae.linear is not None
    with pytest.raises(ValueError, match="one colour, .* no principal components: check the set"):
        vae.linear.init_from_pca(torch.full((8, 3, 16, 16), color))
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


def test_latent_statistics_standardize() -> None:
    vae = VAE(PATCHED)
    assert vae.linear is not None
    images = torch.rand(64, 3, 16, 16)
    vae.linear.init_from_pca(images)
    vae.fit_latent_stats(images.split(16))
    with torch.no_grad():
        posterior = vae.encode(images)
        standard = vae.standardize(posterior.sample(torch.randn_like(posterior.mean)))
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=0.1)
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(12), rtol=0.05, atol=0)
    torch.testing.assert_close(vae.unstandardize(vae.standardize(posterior.mean)), posterior.mean)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    images, output = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    posterior = Posterior(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    terms = vae_loss(images, output, posterior, VAELossConfig(ssim_weight=0.5, kl_weight=0.01))
    kl = posterior.kl().mean() / (3 * 16 * 16)
    want = (images - output).abs().mean() + 0.5 * (1 - ssim(output, images).mean()) + 0.01 * kl
    torch.testing.assert_close(terms["loss"], want)
    assert vae_loss(images, images, posterior, VAELossConfig(kl_weight=0))["loss"].item() == pytest.approx(0, abs=1e-6)


def test_ssim_and_psnr_are_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    x = torch.rand(3, 3, 24, 20) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    # torchmetrics also counts windows that reach over a reflected border; the inner ones are those of Wang et al.
    _, theirs = image.structural_similarity_index_measure(x, y, data_range=2.0, return_full_image=True)
    torch.testing.assert_close(ssim(x, y), theirs[..., 5:-5, 5:-5].flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    want = [image.peak_signal_noise_ratio(a, b, data_range=2.0).item() for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(psnr(x, y), torch.tensor(want))
    with pytest.raises(ValueError, match="at least 11 pixels.* ssim_weight"):
        ssim(x[..., :8, :8], y[..., :8, :8])


def blobs(count: int) -> torch.Tensor:
    """Smooth random images of 32 pixels."""
    return torch.nn.functional.interpolate(torch.randn(count, 3, 6, 6), size=32, mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssim_keeps_its_gradient_under_autocast(dtype: torch.dtype) -> None:
    """Its variances are differences of moments; in bf16 their gradient pointed elsewhere (cosine 0.3)."""
    images = blobs(4)
    output = (images + 0.02 * torch.randn_like(images)).requires_grad_()
    [exact] = torch.autograd.grad(ssim(output, images).mean(), output)
    with torch.autocast("cpu", dtype):
        value = ssim(output, images).mean()
    [found] = torch.autograd.grad(value, output)
    assert value.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99


def test_the_pca_skip_is_exact_under_autocast() -> None:
    """White images, as icons have: latents are small differences of products with all the white."""
    vae, images = VAE(PATCHED), 1 - 0.05 * torch.rand(8, 3, 16, 16)
    assert vae.linear is not None
    vae.linear.init_from_pca(images)
    with torch.no_grad():
        exact = vae.linear.to_latents(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = vae.linear.to_latents(images)
            torch.testing.assert_close(vae.linear.to_images(found), vae.linear.to_images(exact))
    torch.testing.assert_close(found, exact)


def test_training_in_bf16_reaches_the_ssim_of_float32() -> None:
    def lost(*, bf16: bool) -> float:
        torch.manual_seed(0)
        vae, images = VAE(PATCHED), blobs(8)
        assert vae.linear is not None
        vae.linear.init_from_pca(images)
        optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output, posterior = vae(images, torch.randn(8, 12, 8, 8))
                loss = vae_loss(images, output, posterior, VAELossConfig(ssim_weight=1))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return 1 - ssim(vae.decode(vae.encode(images).mean), images).mean().item()

    assert lost(bf16=True) == pytest.approx(lost(bf16=False), rel=0.05)


def test_the_network_is_diffusers_network() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=3, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    ours = VAE(SMALL).eval()
    own = ours.state_dict()
    theirs.load_state_dict({name: own[ours_name(name)] for name in theirs.state_dict()})
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want = theirs.encode(images).latent_dist
        torch.testing.assert_close(ours.encode(images).mean, want.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode(images).logvar, want.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-4, atol=1e-5)


def ours_name(name: str) -> str:
    """Our name of a parameter of diffusers' VAE with two levels and one block in each of the encoder's."""
    pairs = {
        "conv_norm_out": "norm_out", "conv_shortcut": "shortcut", "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0.group_norm": "middle.1.norm", "mid_block.attentions.0": "middle.1",
        "mid_block.resnets.1": "middle.2", "to_out.0": "to_out",
        "encoder.down_blocks.0.downsamplers.0": "encoder.levels.0.1",
        "decoder.up_blocks.0.upsamplers.0": "decoder.levels.0.2",
        "down_blocks.": "levels.", "up_blocks.": "levels.", "resnets.": "",
    }  # fmt: skip
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name

"""The U-Net: published sizes, structure, and agreement with diffusers."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ldm.unet import UNet, UNetConfig
from ldm.unet.blocks import timestep_embedding

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1),
    num_heads=(2, 4),
    context_dim=24,
    pooled_dim=10,
)


def count(config: UNetConfig) -> tuple[int, int]:
    with torch.device("meta"):
        parameters = list(UNet(config).parameters())
    return sum(p.numel() for p in parameters), len(parameters)


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A U-Net whose zero-initialised outputs are random too, so that its answer says something."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


def inputs(batch: int = 3, size: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 5, 24, generator=generator)
    mask = torch.tensor([[True] * 3 + [False] * 2] * batch)
    return z, torch.arange(batch) * 300.0, context, mask, torch.randn(batch, 10, generator=generator)


def test_sizes_go_beside_the_vector_and_extra_channels_are_only_seen() -> None:
    config = SMALL.model_copy(update={"size_embed_dim": 8, "cond_channels": 5})
    unet, (z, t, context, mask, vector) = random_unet(config), inputs()
    told, sizes = torch.randn(3, 5, 8, 8), torch.tensor([[64, 64, 0, 0, 64, 64]] * 3)
    answer = unet(torch.cat([z, told], 1), t, context, mask, vector, sizes)
    assert answer.shape == z.shape
    assert not torch.equal(answer, unet(torch.cat([z, -told], 1), t, context, mask, vector, sizes))
    assert not torch.equal(answer, unet(torch.cat([z, told], 1), t, context, mask, vector, sizes + 1))
    with pytest.raises(ValueError, match="takes 9 channels, not 4"):
        unet(z, t, context, mask, vector, sizes)
    with pytest.raises(ValueError, match="takes a row of sizes of width 6 .*got none"):
        unet(torch.cat([z, told], 1), t, context, mask, vector)


def test_a_new_network_answers_zero() -> None:
    assert not UNet(SMALL)(*inputs()).any()


def test_every_parameter_gets_a_gradient() -> None:
    unet = random_unet(SMALL)
    unet(*inputs()).square().mean().backward()
    assert not [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]


def test_batch_items_do_not_see_each_other() -> None:
    unet, arguments = random_unet(SMALL), inputs()
    whole = unet(*arguments)
    for i in range(3):
        torch.testing.assert_close(unet(*(a[i : i + 1] for a in arguments)), whole[i : i + 1], rtol=0, atol=2e-6)


def test_masked_context_has_no_effect_and_the_rest_has() -> None:
    unet, (z, t, context, mask, vector) = random_unet(SMALL), inputs()
    answer = unet(z, t, context, mask, vector)
    padded = context.clone()
    padded[:, 3:] = 1e3
    torch.testing.assert_close(unet(z, t, padded, mask, vector), answer)
    torch.testing.assert_close(unet(z, t, context[:, :3], mask[:, :3], vector), answer, rtol=0, atol=2e-6)
    seen = context.clone()
    seen[:, 2] += 1
    assert (unet(z, t, seen, mask, vector) - answer).abs().max() > 1e-4
    assert (unet(z, t, context, mask, vector + 1) - answer).abs().max() > 1e-4
    assert (unet(z, t + 100, context, mask, vector) - answer).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = random_unet(SMALL), random_unet(SMALL)
    saving.gradient_checkpointing = True
    for unet in (plain, saving):
        unet(*inputs()).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_patches_and_no_text() -> None:
    config = UNetConfig(
        in_channels=3,
        patch_size=2,
        model_channels=32,
        channel_mult=(1,),
        transformer_depth=(1,),
        num_heads=(2,),
        context_dim=0,
    )
    assert random_unet(config)(torch.randn(2, 3, 6, 10), torch.tensor([1.0, 2.0])).shape == (2, 3, 6, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": (3, 4)}, "3 heads do not divide a width of 32"),
        ({"model_channels": 40, "num_heads": (2, 4)}, "width of 40, which 32 normalization groups do not divide"),
        ({"transformer_depth": (1, 1, 1)}, "transformer_depth has 3 entries for 2 levels"),
    ],
)
def test_bad_sizes_are_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**{**SMALL.to_dict(), **values})


def test_bad_inputs_are_told() -> None:
    unet, (z, t, context, mask, vector) = UNet(SMALL), inputs()
    with pytest.raises(ValueError, match=r"input of \(8, 7\) is not a multiple of 2"):
        unet(z[..., :7], t, context, mask, vector)
    with pytest.raises(ValueError, match="takes 4 channels, not 3"):
        unet(z[:, :3], t, context, mask, vector)
    with pytest.raises(ValueError, match="takes a context of width 24 .* got none"):
        unet(z, t, None, None, vector)
    with pytest.raises(ValueError, match="takes a vector of width 10 .* got width 9"):
        unet(z, t, context, mask, vector[:, :9])


def test_the_timestep_embedding_is_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    theirs = embeddings.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, 64), theirs)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_the_network_is_diffusers_network(scale_shift: bool) -> None:
    """Equal weights give equal answers; 256 channels, as narrower layers have smaller norm groups than diffusers'."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(256, 256), layers_per_block=1, cross_attention_dim=24, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        use_linear_projection=True, norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()  # fmt: skip
    update = {"model_channels": 256, "channel_mult": (1, 1), "pooled_dim": 0, "scale_shift_norm": scale_shift}
    ours = random_unet(SMALL.model_copy(update=update))
    own = ours.state_dict()
    theirs.load_state_dict({name: own[ours_name(name)] for name in theirs.state_dict()})
    z, t, context, mask, _ = inputs()
    with torch.no_grad():
        want = theirs(z, t, context, encoder_attention_mask=mask).sample
        torch.testing.assert_close(ours(z, t, context, mask), want, rtol=1e-4, atol=1e-5)


def ours_name(name: str) -> str:
    """Our name of a parameter of diffusers' U-Net with two levels and one block in each."""
    pairs = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "norm_out", "down_blocks.": "down.", "up_blocks.": "up.",
        "down.0.downsamplers.0": "downsample.0", "up.0.upsamplers.0": "upsample.0",
        "mid_block.resnets.0": "middle.0.residual", "mid_block.attentions.0": "middle.0.transformer",
        "mid_block.resnets.1": "middle.1.residual", "conv_shortcut": "shortcut", "time_emb_proj": "time_proj",
        "transformer_blocks": "blocks", "attn1": "self_attention", "attn2": "cross_attention",
        "to_out.0": "to_out", "ff.net.0": "feed_forward.0", "ff.net.2": "feed_forward.1",
    }  # fmt: skip
    for old, new in pairs.items():
        name = name.replace(old, new)
    for kind, part in (("resnets", "residual"), ("attentions", "transformer")):
        pieces = name.split(f".{kind}.")
        if len(pieces) == 2:
            index, rest = pieces[1].split(".", 1)
            name = f"{pieces[0]}.{index}.{part}.{rest}"
    return name

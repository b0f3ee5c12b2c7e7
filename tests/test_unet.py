"""The U-Net: published sizes, structure, and agreement with diffusers."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.unet import UNet, UNetConfig, model
from ldm.unet.blocks import timestep_embedding

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1),
    num_heads=(2, 4),
    context_dim=24,
    pooled_dim=10,
    norm_min_group_channels=8,
)


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A U-Net whose zero-initialized outputs are random too, so that its prediction is not 0."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.eval()


def inputs(batch: int = 3, size: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 5, 24, generator=generator)
    mask = torch.tensor([[True] * 3 + [False] * 2] * batch)
    pooled = torch.randn(batch, 10, generator=generator)
    return z, torch.arange(batch) * 300.0, Conditioning(context, mask, pooled)


def test_sizes_and_spatial_conditions_change_the_prediction() -> None:
    config = SMALL.model_copy(update={"size_embed_dim": 8, "cond_channels": 5, "coord_conv": True})
    unet, (z, t, cond) = random_unet(config), inputs()
    cond = replace(cond, sizes=torch.tensor([[64, 64, 0, 0, 64, 64]] * 3), spatial=torch.randn(3, 5, 8, 8))
    prediction = unet(z, t, cond)
    assert prediction.shape == z.shape
    assert cond.sizes is not None and cond.spatial is not None
    assert not torch.equal(prediction, unet(z, t, replace(cond, spatial=-cond.spatial)))
    assert not torch.equal(prediction, unet(z, t, replace(cond, sizes=cond.sizes + 1)))
    with pytest.raises(ValueError, match="spatial: expected width 5, got 0"):
        unet(z, t, replace(cond, spatial=None))
    with pytest.raises(ValueError, match="sizes: expected width 6, got 0"):
        unet(z, t, replace(cond, sizes=None))


def test_one_timestep_and_one_row_of_sizes_serve_a_batch() -> None:
    config = SMALL.model_copy(update={"size_embed_dim": 8, "cond_channels": 5})
    unet, (z, _, cond) = random_unet(config), inputs()
    one = replace(cond, sizes=torch.rand(1, 6), spatial=torch.randn(1, 5, 8, 8))
    assert one.sizes is not None and one.spatial is not None
    each = replace(cond, sizes=one.sizes.expand(3, -1), spatial=one.spatial.expand(3, -1, -1, -1))
    t = torch.tensor([7.0])
    prediction = unet(z, t, one)
    torch.testing.assert_close(prediction, unet(z, t.expand(3), each), rtol=0, atol=2e-6)
    assert torch.equal(prediction, unet(z, t, one.cached()))


def test_a_new_network_predicts_zero() -> None:
    assert not UNet(SMALL)(*inputs()).any()
    assert not UNet(SMALL.model_copy(update={"refine_channels": 8}))(*inputs()).any()


def test_the_refinement_corrects_a_prediction_from_z_at_every_cell() -> None:
    """What the network's patches cannot tell apart, it can."""
    unet, (z, t, cond) = random_unet(SMALL.model_copy(update={"refine_channels": 8, "patch_size": 2})), inputs()
    with torch.no_grad():
        for parameter in (unet.conv_out.weight, unet.conv_out.bias):  # the rest of the network is silent
            parameter.zero_()  # type: ignore[union-attr]
    moved = z.clone()
    moved[..., 0, 0] += 1
    change = (unet(moved, t, cond) - unet(z, t, cond)).abs().sum(1)
    assert change[:, :4, :4].any() and not change[:, 4:, 4:].any()


def test_every_parameter_gets_a_gradient() -> None:
    unet = random_unet(SMALL)
    unet(*inputs()).square().mean().backward()
    assert not [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]


def test_batch_items_do_not_see_each_other() -> None:
    unet, (z, t, cond) = random_unet(SMALL), inputs()
    whole = unet(z, t, cond)
    for i in range(3):
        own = slice(i, i + 1)
        conditions = (cond.context[own], cond.context_mask[own], cond.pooled[own])  # type: ignore[index]
        torch.testing.assert_close(unet(z[own], t[own], Conditioning(*conditions)), whole[own], rtol=0, atol=2e-6)


def test_masked_context_has_no_effect_and_the_rest_has() -> None:
    unet, (z, t, cond) = random_unet(SMALL), inputs()
    prediction = unet(z, t, cond)
    context, mask, pooled = cond.context, cond.context_mask, cond.pooled
    assert isinstance(context, Tensor) and mask is not None and pooled is not None
    padded = context.clone()
    padded[:, 3:] = 1e3
    torch.testing.assert_close(unet(z, t, replace(cond, context=padded)), prediction)
    short = replace(cond, context=context[:, :3], context_mask=mask[:, :3])
    torch.testing.assert_close(unet(z, t, short), prediction, rtol=0, atol=2e-6)
    attended = context.clone()
    attended[:, 2] += 1
    for changed in (replace(cond, context=attended), replace(cond, pooled=pooled + 1)):
        assert (unet(z, t, changed) - prediction).abs().max() > 1e-4
    assert (unet(z, t + 100, cond) - prediction).abs().max() > 1e-4


def test_gradient_checkpointing_recomputes_each_block_and_changes_nothing() -> None:
    plain, saving = random_unet(SMALL), random_unet(SMALL)
    saving.gradient_checkpointing = True
    calls = {plain: 0, saving: 0}
    for unet in calls:
        for block in [m for m in unet.modules() if isinstance(m, model.Block)]:
            block.register_forward_pre_hook(lambda *_, unet=unet: calls.update({unet: calls[unet] + 1}))
        unet(*inputs()).square().mean().backward()
    assert calls[saving] == 2 * calls[plain] > 0
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
        ({"num_heads": (3, 4)}, "num_heads: 3 heads do not divide a width of 32"),
        ({"num_heads": (2, 0)}, "num_heads: 0 heads do not divide a width of 64"),
        ({"norm_min_group_channels": 1, "model_channels": 40}, "norm_num_groups: 32 groups .* 40 .*divisor of 40"),
        ({"norm_min_group_channels": 1, "norm_num_groups": 24}, "norm_num_groups: 24 groups .* divisor of 32"),
        ({"norm_min_group_channels": 64}, "norm_num_groups: 0 groups do not divide a width of 32"),
        ({"model_channels": 7}, "model_channels"),
        ({"transformer_depth": (1, 1, 1)}, "transformer_depth has 3 entries for 2 levels"),
    ],
)
def test_bad_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**{**SMALL.to_dict(), **values})


def test_heads_matter_only_where_there_is_attention() -> None:
    values = SMALL.to_dict() | {"transformer_depth": (0, 0), "num_heads": (3, 3), "mid_transformer_depth": 0}
    assert random_unet(UNetConfig(**values))(*inputs()).shape == (3, 4, 8, 8)
    with pytest.raises(ValidationError, match="num_heads: 3 heads do not divide a width of 64"):
        UNetConfig(**values | {"mid_transformer_depth": 1})


@pytest.mark.parametrize(
    ("settings", "width", "groups"),
    [((32, 1), 32, 32), ((32, 8), 32, 4), ((32, 8), 96, 12), ((32, 8), 320, 32), ((4, 1), 32, 4), ((4, 16), 32, 2)],
)
def test_groups_of_each_norm(settings: tuple[int, int], width: int, groups: int) -> None:
    """All norms of a network, those after skips included, have the groups that its configuration says."""
    config = SMALL.model_copy(update=dict(zip(("norm_num_groups", "norm_min_group_channels"), settings, strict=True)))
    assert config.num_groups(width) == groups
    norms = {(m.num_channels, m.num_groups) for m in UNet(config).modules() if isinstance(m, torch.nn.GroupNorm)}
    assert norms == set(config.norm_groups.items()) == {(w, config.num_groups(w)) for w in (32, 64, 96, 128)}


def test_bad_inputs_are_named() -> None:
    unet, (z, t, cond) = UNet(SMALL), inputs()
    with pytest.raises(ValueError, match="z: .* multiples of 2, got 8 x 7"):
        unet(z[..., :7], t, cond)
    with pytest.raises(ValueError, match="z: expected 4 channels .*, got 3"):
        unet(z[:, :3], t, cond)
    with pytest.raises(ValueError, match="Conditioning.context: expected width 24, got 0"):
        unet(z, t)
    with pytest.raises(ValueError, match="Conditioning.pooled: expected width 10, got 9"):
        unet(z, t, replace(cond, pooled=cond.pooled[:, :9]))  # type: ignore[index]


def test_the_timestep_embedding_is_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    theirs = embeddings.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, 64), theirs)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (32, 32), (8, 2)])
def test_the_network_is_diffusers_network(scale_shift: bool, channels: int, groups: int) -> None:
    """Equal weights give equal predictions."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(channels, channels), layers_per_block=1, cross_attention_dim=24, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        use_linear_projection=True, norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()  # fmt: skip
    update = {"model_channels": channels, "channel_mult": (1, 1), "pooled_dim": 0, "scale_shift_norm": scale_shift}
    norms = {"norm_num_groups": groups, "norm_min_group_channels": 1}
    ours = random_unet(SMALL.model_copy(update=update | norms))
    own = ours.state_dict()
    theirs.load_state_dict({name: own[ours_name(name)] for name in theirs.state_dict()})
    z, t, cond = inputs()
    with torch.no_grad():
        want = theirs(z, t, cond.context, encoder_attention_mask=cond.context_mask).sample
        torch.testing.assert_close(ours(z, t, replace(cond, pooled=None)), want, rtol=1e-4, atol=1e-5)


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

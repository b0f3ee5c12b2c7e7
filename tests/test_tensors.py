"""Files of tensors and modules: read back, checked, and a start from the weights of another model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.io.atomic import write_tensors
from ldm.io.tensors import init_weights, load_strict, load_weights, read_tensors, save_weights, sha256
from ldm.unet import UNet, UNetConfig

SMALL = UNetConfig(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, transformer_depth=(0,), num_heads=(2,), context_dim=0,
    mid_transformer_depth=0, patch_size=2, coord_conv=True,
)  # fmt: skip
WHERE = Path("theirs")


def random_unet(config: UNetConfig = SMALL, seed: int = 0) -> UNet:
    """A U-Net without tensors of zeros."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet


def test_weights_are_read_back(tmp_path: Path) -> None:
    unet, path = random_unet(), tmp_path / "a.safetensors"
    assert save_weights(unet, path) == sha256(path)
    with torch.device("meta"):
        found = UNet(SMALL)
    load_weights(found, path)
    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="a.safetensors is missing: .*copy it again"):
        read_tensors(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="a.safetensors is damaged or not a safetensors file"):
        read_tensors(path)
    layer = nn.Linear(2, 3)
    write_tensors(path, layer.state_dict() | {"weight": torch.full((3, 2), torch.nan)})
    with pytest.raises(ValueError, match="1 tensors hold NaN or infinite numbers: weight"):
        load_weights(layer, path)
    write_tensors(path, layer.state_dict() | {"weight": torch.zeros(3, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="1 tensors have another kind of number, such as weight: convert the file"):
        load_weights(layer, path)


@pytest.mark.parametrize("fill", [load_strict, init_weights])
def test_each_difference_is_named_with_both_shapes(fill: object) -> None:
    assert callable(fill)
    state = random_unet().state_dict()
    state["extra"] = torch.zeros(7)
    state["conv_out.bias"] = torch.zeros(3)
    del state["norm_out.weight"]
    message = (
        r"theirs does not fit this network: 3 tensors differ: norm_out.weight expected \(32,\), got none, "
        r"conv_out.bias expected \(16,\), got \(3,\), extra expected none, got \(7,\)$"
    )
    unet = random_unet(seed=1)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fill(unet, state, WHERE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    with pytest.raises(ValueError, match=r"64 tensors differ: (\S+ expected [^n]*, got none(, )?){5}$"):
        fill(unet, {}, WHERE)


def predict(unet: UNet, spatial: Tensor | None = None) -> Tensor:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return unet(z, torch.tensor([5.0]), Conditioning(spatial=spatial))


def test_a_start_from_the_same_shapes_is_a_copy() -> None:
    source, unet = random_unet(), random_unet(seed=1)
    init_weights(unet, source.state_dict(), WHERE)
    assert torch.equal(predict(unet), predict(source))
    with torch.no_grad():
        unet.conv_out.bias.add_(1)
    assert not torch.equal(unet.conv_out.bias, source.conv_out.bias)


def test_a_new_spatial_condition_changes_nothing_at_first() -> None:
    """Also with patches and coordinates, which have input channels of their own."""
    source, unet = random_unet(), random_unet(SMALL.model_copy(update={"cond_channels": 5}), seed=1)
    init_weights(unet, source.state_dict(), WHERE)
    spatial = torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(predict(unet, spatial), predict(source), rtol=0, atol=1e-5)
    predict(unet, spatial).sum().backward()
    assert unet.conv_in.weight.grad[:, -20:].any()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"conv_in.weight expected \(32, 18, 3, 3\), got \(32, 38, 3, 3\)"):
        init_weights(source, unet.state_dict(), WHERE)

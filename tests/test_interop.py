"""The Stable Diffusion family: names, counts, and the same outputs as diffusers from the same weights."""

import itertools
import json
import logging
import random
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import convert
import evaluate
import numpy as np
import open_clip
import pytest
import torch
import txt2img
from helpers import assert_same, save_lightning, train_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldm.pipeline.convert
from ldm.conditioning import Conditioning
from ldm.config import read_yaml
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import compvis, key_map
from ldm.interop.diffusers import write
from ldm.interop.family import build_frozen
from ldm.io.tensors import sha256, weights_sha256
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise
from ldm.pipeline.load import load_components, load_vae, save_components, save_vae
from ldm.stages.diffusion import TrainLDMConfig
from ldm.stages.vae import TrainVAEConfig
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextTower
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor random, so that nothing is zero by design."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return module.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4 of the largest value."""
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


SD2 = {"model_channels": 64, "channel_mult": (1, 1, 2), "num_res_blocks": 1, "num_heads": (1, 1, 2), "context_dim": 32}
CONFIGS = {
    "sd1": UNetConfig(
        model_channels=64, channel_mult=(1, 1, 1), transformer_depth=(1, 1, 0), num_heads=(8, 8, 8), context_dim=24
    ),
    "sd2": UNetConfig(**SD2, transformer_depth=(1, 1, 0)),
    "sdxl": UNetConfig(**SD2, transformer_depth=(0, 1, 2), mid_transformer_depth=2, pooled_dim=16, size_embed_dim=4),
}
CONFIGS["sd2-base"] = CONFIGS["sd2"]
CONFIGS["inpaint"] = CONFIGS["sd1"].model_copy(update={"cond_channels": 5})
KINDS = list(CONFIGS)


def their_unet(kind: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[kind]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depth]
    more = {}
    if kind == "sdxl":
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 16 + 6 * 4,
        }
    return randomized(
        diffusers.UNet2DConditionModel(
            in_channels=config.in_channels + config.cond_channels,
            block_out_channels=config.widths,
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.num_heads,
            transformer_layers_per_block=tuple(max(depth, 1) for depth in config.transformer_depth),
            use_linear_projection=kind not in ("sd1", "inpaint"),
            layers_per_block=config.num_res_blocks,
            **more,
        )
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_unet_predicts_as_that_of_diffusers(kind: str) -> None:
    config, theirs = CONFIGS[kind], their_unet(kind)
    ours = UNet(config).eval()
    ours.load_state_dict(
        key_map.remap_state_dict(theirs.state_dict(), ours.state_dict(), key_map.unet_key_to_diffusers, "theirs")
    )
    generator = torch.Generator().manual_seed(1)
    z, spatial = torch.randn(2, 9, 8, 12, generator=generator).tensor_split([config.in_channels], dim=1)
    their_z = torch.cat([z, spatial], dim=1) if config.cond_channels else z
    t = torch.tensor([7.0, 801.0])
    context = torch.randn(2, 5, config.context_dim, generator=generator)
    with torch.no_grad():
        if kind == "sdxl":
            pooled, sizes = torch.randn(2, 16, generator=generator), torch.rand(2, 6, generator=generator) * 1000
            added = {"text_embeds": pooled, "time_ids": sizes}
            want = theirs(z, t, context, added_cond_kwargs=added).sample
            close(ours(z, t, Conditioning(context, pooled=pooled, sizes=sizes)), want)
        else:
            cond = Conditioning(context, spatial=spatial if config.cond_channels else None)
            close(ours(z, t, cond), theirs(their_z, t, context).sample)


def test_vae_encodes_and_decodes_as_that_of_diffusers() -> None:
    config = VAEConfig(base_channels=64, channel_mult=(1, 2, 2))
    theirs = their_vae(*config.widths, layers_per_block=config.num_res_blocks)
    ours = VAE(config).eval()
    own = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("latent_")}
    found = key_map.remap_state_dict(theirs.state_dict(), own, key_map.vae_key_to_diffusers, "theirs")
    ours.load_state_dict(found, strict=False)
    pixels, latents = torch.rand(1, 3, 24, 16) * 2 - 1, torch.randn(1, 4, 6, 4)
    with torch.no_grad():
        close(ours.encode(pixels).mean, theirs.encode(pixels).latent_dist.mean)
        close(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize(("folder", "tensors"), [("sd15", 686), ("sd21-base", 686), ("sd21-v", 686), ("sdxl", 1_680)])
def test_names_in_compvis_files(folder: str, tensors: int) -> None:
    """Each name is another one; some of them are known from the published files."""
    config = UNetConfig(**read_yaml(ROOT / f"configs/{folder}/ldm.yaml")["unet"])
    vae_config = VAEConfig(**read_yaml(ROOT / f"configs/{folder}/vae.yaml")["vae"])
    with torch.device("meta"):
        unet, vae = UNet(config).state_dict(), VAE(vae_config).state_dict()
    found = {key_map.unet_key_to_compvis(config)(name) for name in unet}
    assert len(found) == len(unet) == tensors
    xl = {
        "label_emb.0.0.weight",
        "label_emb.0.2.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "input_blocks.8.1.transformer_blocks.9.ff.net.2.bias",
        "middle_block.1.transformer_blocks.9.attn1.to_out.0.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.0.skip_connection.weight",
        "out.2.bias",
    }
    assert (
        xl <= found
        if folder == "sdxl"
        else {
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            "input_blocks.3.0.op.weight",
            "input_blocks.11.0.out_layers.3.bias",
            "middle_block.1.proj_in.weight",
            "middle_block.2.emb_layers.1.weight",
            "output_blocks.2.1.conv.weight",
            "output_blocks.5.2.conv.weight",
            "output_blocks.8.2.conv.bias",
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            "output_blocks.0.0.skip_connection.weight",
            "out.0.weight",
            "out.2.bias",
        }
        <= found
    )
    found = {key_map.vae_key_to_compvis(vae_config)(name) for name in vae if not name.startswith("latent_")}
    assert len(found) == 248
    assert {
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.0.block.2.conv2.bias",
        "decoder.up.3.upsample.conv.weight",
        "decoder.norm_out.weight",
        "post_quant_conv.weight",
    } <= found


TOWERS = {  # of open_clip, and parameters of their text half
    "sd15": {"ViT-L-14-quickgelu": 123_650_304},
    "sd21-base": {"ViT-H-14": 354_032_640},
    "sd21-v": {"ViT-H-14": 354_032_640},
    "sdxl": {"ViT-L-14-quickgelu": 123_650_304, "ViT-bigG-14": 694_659_840},
}


@pytest.mark.parametrize(
    ("folder", "parameters", "tensors"),
    [
        ("sd15", 859_520_964, 686),
        ("sd21-base", 865_910_724, 686),
        ("sd21-v", 865_910_724, 686),
        ("sdxl", 2_567_463_684, 1_680),
    ],
)
def test_the_sizes_of_the_family(folder: str, parameters: int, tensors: int) -> None:
    """Parameters and tensors of the published networks, on the meta device."""
    config = TrainLDMConfig.from_dict(read_yaml(ROOT / f"configs/{folder}/ldm.yaml"), source=folder)
    vae_config = TrainVAEConfig.from_dict(read_yaml(ROOT / f"configs/{folder}/vae.yaml"), source=folder)
    with torch.device("meta"):
        unet, vae = UNet(config.unet).state_dict(), VAE(vae_config.vae)
        towers = {
            tower.model: TextTower(open_clip.get_model_config(tower.model))
            for tower in (config.text, config.second_text)
            if tower.model != "none"
        }
    assert (sum(t.numel() for t in unet.values()), len(unet)) == (parameters, tensors)
    assert (sum(p.numel() for p in vae.parameters()), len(list(vae.parameters()))) == (83_653_863, 248)
    assert {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()} == TOWERS[folder]
    widths = [tower.positional_embedding.shape[1] for tower in towers.values()]
    assert sum(widths) == config.unet.context_dim
    assert config.unet.pooled_dim == (1_280 if folder == "sdxl" else 0)


def test_tensors_that_do_not_fit_are_named() -> None:
    config = CONFIGS["sd1"]
    with torch.device("meta"):
        own = UNet(config).state_dict()
    rename = key_map.unet_key_to_diffusers
    theirs = {rename(name): torch.zeros(tensor.shape) for name, tensor in own.items()}
    for change, message in (
        (
            {"conv_in.bias": None, "conv_out.bias": None},
            r"theirs does not .* 2 tensors differ: conv_in.bias expected \(64,\), got none, conv_out.bias ",
        ),
        (
            {f"lora.{i}": torch.zeros(1) for i in range(7)},
            r"7 tensors differ: lora.0 expected none, got \(1,\), .*lora.4 expected none, got \(1,\)$",
        ),
        ({"conv_in.bias": torch.zeros(3)}, r"1 tensors differ: conv_in.bias expected \(64,\), got \(3,\)$"),
        (
            {"conv_in.bias": torch.full((64,), torch.nan)},
            "theirs: 1 tensors hold NaN or infinite numbers: conv_in.bias",
        ),
    ):
        changed = {name: t for name, t in (theirs | change).items() if t is not None}
        with pytest.raises(ValueError, match=message):
            key_map.remap_state_dict(changed, own, rename, "theirs")


@pytest.mark.parametrize(("act", "projected"), [("quick_gelu", False), ("gelu", True)])
def test_text_states_are_those_of_transformers(act: str, projected: bool) -> None:
    """Padded as Stable Diffusion 1 and 2 do, last and penultimate layer, with and without the final norm."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
    ends = {"eos_token_id": 49407, "bos_token_id": 49406, "projection_dim": 20}
    config = transformers.CLIPTextConfig(
        num_attention_heads=2, max_position_embeddings=16, hidden_act=act, **sizes, **ends
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = randomized(cls(config))
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 3}
    tower = TextTower({"embed_dim": 20 if projected else 32, "quick_gelu": act == "quick_gelu", "text_cfg": text})
    tower.load_state_dict(key_map.text_from_transformers(theirs.state_dict()))
    for padding in (49407, 0):
        for layer, index in (("last", -1), ("penultimate", -2)):
            text_config = TextConfig(layer=layer, pad_token_id=padding)  # type: ignore[arg-type]
            own = TextEncoder(tower, text_config, model_id="random", weights=Path())
            encoder = TextConditioner(own)
            prompts = ["a red circle", ""]
            ids = encoder.tokenizer(prompts)
            ids = torch.where(torch.arange(16) > (ids == 49407).int().argmax(1)[:, None], padding, ids)
            with torch.no_grad():
                want = theirs(ids, output_hidden_states=True)
                hidden = tower.ln_final(want.hidden_states[index])
            for states in (encoder(prompts), encoder.encode_prompts(prompts)):
                assert states.mask is None and states.hidden_states.shape == (2, 16, 32)
                close(states.hidden_states, hidden)
            if projected:
                close(encoder(prompts).pooled, want.text_embeds)
            raw = tower(ids, layer=layer, final_layer_norm=False).hidden_states
            close(raw, want.hidden_states[index])


@pytest.mark.slow
def test_networks_of_full_width_are_those_of_diffusers() -> None:
    """One forward of the Stable Diffusion 1.5 U-Net and VAE on random weights, which both have in the same memory."""
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(2)
    try:
        with torch.device("meta"):  # whose own random numbers would only be drawn to be replaced
            theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        theirs = randomized(theirs.to_empty(device="cpu"))
        config = UNetConfig(**read_yaml(ROOT / "configs/sd15/ldm.yaml")["unet"])
        assert sum(p.numel() for p in theirs.parameters()) == 859_520_964
        ours = build_frozen(UNet, config, theirs.state_dict(), key_map.unet_key_to_diffusers, "theirs")
        generator = torch.Generator().manual_seed(1)
        z, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
        with torch.no_grad():
            close(ours(z, torch.tensor([501.0]), Conditioning(context)), theirs(z, 501, context).sample)
        del theirs, ours
        theirs = their_vae(128, 256, 512, 512, layers_per_block=2)
        vae_config = VAEConfig(**read_yaml(ROOT / "configs/sd15/vae.yaml")["vae"])
        rename, buffers = key_map.vae_key_to_diffusers, {"latent_mean": 0.0, "latent_std": 1 / 0.18215}
        ours = build_frozen(VAE, vae_config, theirs.state_dict(), rename, "theirs", **buffers)
        pixels = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        with torch.no_grad():
            close(ours.encode(pixels).mean, theirs.encode(pixels).latent_dist.mean)
            close(ours.decode(z[..., :8, :8]), theirs.decode(z[..., :8, :8]).sample)
    finally:
        torch.set_num_threads(1)


# Whole pipelines.


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The vocabulary and the merges of CLIP's tokenizer, as transformers reads them."""
    folder, tokenizer = tmp_path_factory.mktemp("words"), Tokenizer(16)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def their_tower(
    clip_files: tuple[str, str], width: int, *, openai: bool, projected: bool = False, **settings: Any
) -> tuple[nn.Module, object]:
    """A random text model of transformers, and CLIP's tokenizer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 16}
    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407 if openai else 0}
    values = {"vocab_size": 49408, "hidden_act": "quick_gelu" if openai else "gelu", "projection_dim": 16}
    config = transformers.CLIPTextConfig(hidden_size=width, **{**sizes, **tokens, **values, **settings})
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    pad, length = "<|endoftext|>" if openai else "!", config.max_position_embeddings
    tokenizer = transformers.CLIPTokenizer(*clip_files, pad_token=pad, model_max_length=length)
    return randomized(cls(config), 2 + projected), tokenizer


def their_vae(*widths: int, **settings: Any) -> nn.Module:
    """A random VAE of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    levels = len(widths)
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **settings,
    )
    return certain(randomized(vae, 1))


def their_scheduler(prediction: str = "epsilon") -> Any:
    """As Stable Diffusion's, for the timesteps that are ours."""
    return pytest.importorskip("diffusers").DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing",
        prediction_type=prediction, set_alpha_to_one=True, clip_sample=False, steps_offset=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def their_folder(clip_files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that diffusers wrote, by kind: random weights, reduced width, the tokens of open_clip's tokenizer."""
    diffusers = pytest.importorskip("diffusers")
    folders = {}
    for kind in KINDS:
        config = CONFIGS[kind]
        vae = their_vae(64, 64, 64, layers_per_block=1, scaling_factor=0.13025 if kind == "sdxl" else 0.18215)
        unet = their_unet(kind)
        unet.register_to_config(sample_size=8)
        scheduler = their_scheduler("v_prediction" if kind == "sd2" else "epsilon")
        parts = {"vae": vae, "unet": unet, "scheduler": scheduler}
        if kind == "sdxl":
            parts["text_encoder"], parts["tokenizer"] = their_tower(clip_files, 8, openai=True)
            second = their_tower(clip_files, 24, openai=False, projected=True)
            parts["text_encoder_2"], parts["tokenizer_2"] = second
            pipeline = diffusers.StableDiffusionXLPipeline(**parts)
        else:
            openai = kind in ("sd1", "inpaint")
            parts["text_encoder"], parts["tokenizer"] = their_tower(clip_files, config.context_dim, openai=openai)
            cls = diffusers.StableDiffusionInpaintPipeline if kind == "inpaint" else diffusers.StableDiffusionPipeline
            pipeline = cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        folders[kind] = tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folders[kind])
    return folders


def certain(vae: nn.Module) -> nn.Module:
    """Without deviation in its latents: diffusers starts from a sample of them, we start from their mean."""
    half = vae.quant_conv.weight.shape[0] // 2
    with torch.no_grad():
        vae.quant_conv.weight[half:], vae.quant_conv.bias[half:] = 0, -30
    return vae


@pytest.fixture(scope="module")
def loaded(their_folder: dict[str, Path]) -> Callable[[str], tuple[Pipeline, dict[str, Any]]]:
    """Our pipeline and the components of theirs, by kind, read once from one folder; no test may change them."""
    diffusers = pytest.importorskip("diffusers")

    @lru_cache
    def load(kind: str) -> tuple[Pipeline, dict[str, Any]]:
        theirs = diffusers.DiffusionPipeline.from_pretrained(their_folder[kind])
        return Pipeline.load(their_folder[kind]), theirs.components

    return load


SAMPLERS = ["ddim", "euler", "dpmpp_2m"]


def their_pipeline(components: dict[str, Any], kind: str, task: str, sampler: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    name = f"StableDiffusion{'XL' if kind == 'sdxl' else ''}{task}Pipeline"
    more = {} if kind == "sdxl" else {"requires_safety_checker": False}
    theirs = getattr(diffusers, name)(**components, **more)
    cls, more = {
        "ddim": (diffusers.DDIMScheduler, {}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    }[sampler]
    theirs.scheduler = cls.from_config(theirs.scheduler.config, **more)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest of a pixel, of 255."""
    assert one.size == other.size and np.asarray(other).std() > 10
    return abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2-base", "sdxl"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pipelines_sample_as_those_of_diffusers(kind: str, sampler: str, loaded: Any) -> None:
    """From a folder that diffusers wrote, with the same first noise: no pixel differs by more than 2 of 255."""
    ours, components = loaded(kind)
    theirs, negative = their_pipeline(components, kind, "", sampler), "" if sampler == "euler" else "a dog"
    # Where "!" pads, transformers also reads that of a prompt as padding, and open_clip and we as a token.
    prompt = "A cat, astronaut!" if kind == "sd1" else "A cat, astronaut"
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "negative_prompt": negative or None}
    want = theirs(prompt, latents=initial_noise((4, 8, 8), [5]), **call).images[0]
    call = {"steps": 5, "guidance_scale": 3.0, "negative_prompt": negative, "sampler": sampler, "seed": 5}
    assert difference(ours(prompt, **call)[0], want) <= 2


def scene() -> Image.Image:
    """An image with structure, 32 x 32."""
    x = np.linspace(0, 255, 32)
    return Image.fromarray(
        np.stack([np.tile(x, (32, 1)), np.tile(x[:, None], 32), 128 + 0 * np.eye(32)], -1).astype("uint8")
    )


MASK = Image.new("L", (32, 32))
MASK.paste(255, (8, 4, 24, 20))  # on the grid of the latents: theirs takes the nearest pixel, ours any that is touched


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2-base", "sdxl"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_images_are_changed_as_by_diffusers(
    kind: str, sampler: str, task: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise: no pixel differs by more than 2 of 255; under a mask, of what is generated."""
    ours, components = loaded(kind)
    theirs, noise = their_pipeline(components, kind, task, sampler), initial_noise((4, 8, 8), [5])
    for module in list(sys.modules.values()):  # wherever it draws noise, it gets ours
        if getattr(module, "__name__", "").startswith("diffusers.pipelines.stable") and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise.clone())
    mask = MASK if task == "Inpaint" else None
    more = {"mask_image": mask, "height": 32, "width": 32} if mask else {}
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "negative_prompt": "a dog", "strength": 0.8}
    want = theirs("a cat", image=scene(), **call, **more).images[0]
    call = {"steps": 5, "guidance_scale": 3.0, "negative_prompt": "a dog", "strength": 0.8, "sampler": sampler}
    found = ours("a cat", image=scene(), mask=mask, seed=5, **call)[0]
    box = (8, 4, 24, 20) if mask else (0, 0, 32, 32)
    assert difference(found.crop(box), want.crop(box)) <= 2
    if mask:
        known = np.asarray(mask) == 0
        assert (np.asarray(found)[known] == np.asarray(scene())[known]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_networks_sample_as_in_diffusers(
    sampler: str, strength: float, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, components = loaded("inpaint")
    theirs, noise = their_pipeline(components, "inpaint", "Inpaint", sampler), initial_noise((4, 8, 8), [5])
    module = sys.modules["diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"]
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise.clone())
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": strength, "height": 32, "width": 32}
    want = theirs("a cat", image=scene(), mask_image=MASK, **call).images[0]
    call = {"steps": 5, "guidance_scale": 3.0, "strength": strength, "sampler": sampler, "seed": 5}
    found = ours("a cat", image=scene(), mask=MASK, **call)[0]
    box = (8, 4, 24, 20)
    assert difference(found.crop(box), want.crop(box)) <= 2
    with pytest.raises(ValueError, match="inpainting model: pass an image and a mask"):
        ours("a cat")


def test_folders_that_cannot_be_read(their_folder: dict[str, Path], tmp_path: Path) -> None:
    for change, message in (
        ({"unet/config.json": {"act_fn": "gelu"}}, "unet/config.json: unsupported .*act_fn is 'gelu': only 'silu' can"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "holds a FluxPipeline: only StableDiffusionPipeline"),
        (
            {"unet/config.json": {"addition_embed_type": "image"}},
            "addition_embed_type is 'image': only None and 'text_time' can be read",
        ),
        (
            {"unet/config.json": {"down_block_types": ["SkipDownBlock2D"] * 3}},
            "down_block_types is 'SkipDownBlock2D': only 'DownBlock2D' and 'CrossAttnDownBlock2D'",
        ),
        ({"unet/config.json": {"norm_eps": 0.1}}, "norm_eps is 0.1: only 1e-05 can be read"),
        (
            {"vae/config.json": {"scaling_factor": 0}},
            "vae/config.json: unsupported .*scaling_factor is 0.0, expected a number above 0",
        ),
        ({"unet/config.json": {"norm_num_groups": 24}}, "unet/config.json: .*norm_num_groups: 24 groups do not divide"),
        ({"vae/config.json": {"norm_num_groups": None}}, "vae/config.json: unsupported .*norm_num_groups"),
        (
            {"unet/config.json": {"block_out_channels": [64, 96, 128]}},
            r"the widths .64, 96, 128. are not multiples",
        ),
        (
            {"scheduler/scheduler_config.json": {"num_train_timesteps": 500}},
            "num_train_timesteps is 500: only 1000 can be read",
        ),
        (
            {"text_encoder/config.json": {"hidden_act": "relu"}},
            "text_encoder/config.json: .*hidden_act is 'relu': only 'quick_gelu' and 'gelu' can be read",
        ),
        ({"unet/config.json": {"block_out_channels": []}}, "unet/config.json: unsupported configuration"),
        ({"unet/config.json": {"sample_size": [8, 8]}}, "unet/config.json: unsupported configuration"),
        ({"vae/config.json": {"latent_channels": "many"}}, "vae/config.json: unsupported .*latent_channels"),
        (
            {"scheduler/scheduler_config.json": {"prediction_type": "x"}},
            "scheduler_config.json: .*prediction_type is 'x': only 'epsilon' and",
        ),
        ({"scheduler/scheduler_config.json": {"beta_start": 0.5}}, "scaled_linear betas from 0.5 to 0.012"),
        ({"vae/diffusion_pytorch_model.safetensors": None}, "vae has no diffusion_pytorch_model.safetensors"),
        ({"vae/config.json": None}, "vae/config.json is missing: .*download"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(their_folder["sd1"], folder)
        for name, values in change.items():
            if values is None:
                (folder / name).unlink()
            else:
                (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
        with pytest.raises(ValueError, match=message):
            Pipeline.load(folder)


def test_old_names_and_the_map_of_special_tokens_are_read(their_folder: dict[str, Path], tmp_path: Path) -> None:
    """The published folders of Stable Diffusion 1 have the first, those of 2 the second."""
    folder = tmp_path / "old"
    shutil.copytree(their_folder["sd1"], folder)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)(?=\.)")
    tensors = {pattern.sub(lambda m: old[m[1]], name): tensor for name, tensor in load_file(file).items()}
    assert sum(".proj_attn." in name for name in tensors) == 4
    save_file(tensors, tmp_path / "vae.safetensors")
    (tmp_path / "vae.safetensors").replace(file)
    (folder / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "!"}')
    found, want = Pipeline.load(folder), Pipeline.load(their_folder["sd1"])
    assert found.text is not None and [encoder.config.pad_token_id for encoder in found.text.encoders] == [0]
    a, b = (pipeline.vae.state_dict() for pipeline in (found, want))  # type: ignore[union-attr]
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_folder_of_pickles_is_converted(their_folder: dict[str, Path], tmp_path: Path) -> None:
    """As diffusers wrote them before it wrote safetensors."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(their_folder["sd1"])
    pipeline.save_pretrained(tmp_path / "bin", safe_serialization=False)
    text = tmp_path / "bin/text_encoder"
    if (file := text / "model.safetensors").exists():  # transformers 5 writes nothing else
        torch.save(load_file(file), text / "pytorch_model.bin")
        file.unlink()
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.bin is a pickle, .*scripts/convert.py"):
        Pipeline.load(tmp_path / "bin")
    convert.main([str(tmp_path / "bin"), str(tmp_path / "ours")])
    want, found = load_components(their_folder["sd1"]), load_components(tmp_path / "ours")
    assert_same(want.unet.state_dict(), found.unet.state_dict())
    assert_same(load_vae(tmp_path / "bin/vae").state_dict(), load_vae(their_folder["sd1"]).state_dict())


def test_variants_and_shards_are_read(their_folder: dict[str, Path], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(their_folder["sd1"])
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    want = Pipeline.load(their_folder["sd1"]).unet.state_dict()
    for folder, tolerance in (("shards", 0.0), ("half", 1e-2)):
        found = Pipeline.load(tmp_path / folder).unet.state_dict()
        assert max((want[name] - found[name]).abs().max().item() for name in want) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_loads_in_diffusers(
    kind: str,
    their_folder: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no warning, and it gives the same image; also where the latents have statistics of their own."""
    diffusers = pytest.importorskip("diffusers")
    ours = Pipeline.load(their_folder[kind])
    assert ours.vae is not None and ours.text is not None
    ours.vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    ours.vae.latent_mean.copy_(torch.tensor([0.1, -1.0, 0.0, 2.0]))
    if kind == "sd2":
        encoder = ours.text.encoders[0]
        encoder.config = encoder.config.model_copy(update={"layer": "penultimate"})
    write(ours.components, tmp_path)
    cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    cls = diffusers.StableDiffusionInpaintPipeline if kind == "inpaint" else cls
    for library in ("diffusers", "transformers"):  # which keep what they log to themselves
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = cls.from_pretrained(tmp_path)
    assert not caught and not [record for record in caplog.records if record.levelno >= logging.WARNING]
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise((4, 8, 8), [5])
    box, call, theirs_call = (0, 0, 32, 32), {}, {}
    if kind == "inpaint":
        box, call = (8, 4, 24, 20), {"image": scene(), "mask": MASK, "strength": 1.0}
        theirs_call = {"image": scene(), "mask_image": MASK, "height": 32, "width": 32}
    want = theirs("a cat", latents=noise, num_inference_steps=5, guidance_scale=3.0, **theirs_call).images[0]
    for pipeline in (ours, Pipeline.load(tmp_path)):
        found = pipeline("a cat", steps=5, guidance_scale=3.0, sampler="ddim", seed=5, **call)[0]
        assert difference(found.crop(box), want.crop(box)) <= 2


@pytest.mark.parametrize("kind", ["sd1", "sd2-base", "sdxl", "inpaint"])
def test_single_files_keep_the_images(kind: str, their_folder: dict[str, Path], tmp_path: Path) -> None:
    """Diffusers folder -> CompVis file -> our pipeline: the same image; heads and layers come from shapes."""
    ours, file = Pipeline.load(their_folder[kind]), tmp_path / "model.safetensors"
    compvis.write(ours.components, file)
    tensors = load_file(file)
    square = tensors["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == 4
    assert square == (kind in ("sd1", "inpaint"))
    found = Pipeline.load(file)
    assert found.diffusion.config == ours.diffusion.config and found.unet.config == ours.unet.config
    call = {"image": scene(), "mask": MASK} if kind == "inpaint" else {"width": 32, "height": 32}
    a, b = (p("a cat", steps=4, sampler="ddim", seed=5, **call)[0] for p in (ours, found))
    assert difference(a, b) <= 1


def test_the_prediction_of_a_version_2_file_is_detected_from_one_bias(
    their_folder: dict[str, Path], tmp_path: Path
) -> None:
    """As ComfyUI sees it; a network whose bias does not tell is refused before anything is written."""
    config = UNetConfig(
        model_channels=64,
        channel_mult=(1, 1, 1, 1),
        transformer_depth=(1, 1, 1, 0),
        num_heads=(1,) * 4,
        context_dim=32,
    )
    unet = randomized(UNet(config))
    bias = {key_map.unet_key_to_compvis(config)(name): tensor for name, tensor in unet.named_parameters()}[
        compvis.V_BIAS
    ]
    ours = load_components(their_folder["sd2"])._replace(unet=unet)  # type: ignore[arg-type]
    for spread, prediction in ((0.2, "v"), (0.01, "epsilon")):
        with torch.no_grad():
            bias.copy_(spread * torch.randn(64, generator=torch.Generator().manual_seed(0)))
        diffusion = Diffusion(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
        compvis.write(ours._replace(diffusion=diffusion), tmp_path / f"{prediction}.safetensors")
        found = compvis.read(tmp_path / f"{prediction}.safetensors")
        assert found.diffusion.config.prediction == prediction and f"predicts {prediction}, " in found.description
    with pytest.raises(ValueError, match="unsupported settings diffusion.prediction v .only epsilon."):
        compvis.write(ours, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_files_of_xl_have_flags_for_their_prediction(their_folder: dict[str, Path], tmp_path: Path) -> None:
    ours = load_components(their_folder["sdxl"])
    for prediction, zero in (("epsilon", False), ("v", False), ("v", True)):
        diffusion = Diffusion(DiffusionConfig(prediction=prediction, zero_terminal_snr=zero))  # type: ignore[arg-type]
        compvis.write(ours._replace(diffusion=diffusion), tmp_path / "xl.safetensors")
        assert Pipeline.load(tmp_path / "xl.safetensors").diffusion.config == diffusion.config


@pytest.mark.parametrize("kind", ["sd1", "sd2-base", "sdxl", "inpaint"])
def test_single_files_load_in_diffusers(kind: str, their_folder: dict[str, Path], tmp_path: Path) -> None:
    """Its own loader, which takes the sizes of these small networks from a folder, and all tensors from our file."""
    diffusers = pytest.importorskip("diffusers")
    compvis.write(load_components(their_folder[kind]), tmp_path / "model.safetensors")
    first = diffusers.DiffusionPipeline.from_pretrained(their_folder[kind])
    places = {"config": str(their_folder[kind]), "local_files_only": True}
    again = type(first).from_single_file(str(tmp_path / "model.safetensors"), **places)
    parts = [name for name, part in first.components.items() if isinstance(part, nn.Module)]
    assert len(parts) == (4 if kind == "sdxl" else 3)
    for name in parts:
        want, found = (getattr(pipeline, name).state_dict() for pipeline in (first, again))
        assert want.keys() == found.keys()
        for key, tensor in want.items():
            torch.testing.assert_close(found[key].reshape(tensor.shape), tensor, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_read_on_request(their_folder: dict[str, Path], tmp_path: Path) -> None:
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for name in list(tensors):
        if name.startswith("model.diffusion_model."):
            short = name.removeprefix("model.diffusion_model.").replace(".", "")
            tensors["model_ema.diffusion_model" + short] = tensors[name] * 2
    save_file(tensors, tmp_path / "b.safetensors")
    usual, averaged = (compvis.read(tmp_path / "b.safetensors", ema=ema).unet.conv_in.weight for ema in (False, True))
    torch.testing.assert_close(averaged, 2 * usual)
    with pytest.raises(ValueError, match="has no averaged weights of .* tensors, such as"):
        compvis.read(tmp_path / "a.safetensors", ema=True)


def test_files_that_cannot_be_read(their_folder: dict[str, Path], tmp_path: Path) -> None:
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    bias = "model.diffusion_model.out.2.bias"
    for change, message in (
        ({bias: None}, r"1 tensors differ: out.2.bias expected \(4,\), got none"),
        ({bias: torch.zeros(7)}, r"1 tensors differ: out.2.bias expected \(4,\), got \(7,\)"),
        ({bias: torch.full((4,), torch.inf)}, "hold NaN or infinite numbers: out.2.bias"),
        ({"model.diffusion_model.lora.up": torch.zeros(1)}, r"1 tensors differ: lora.up expected none, got \(1,\)"),
        (
            {name: None for name in tensors if name.startswith("first_stage")},
            "is not a Stable Diffusion file: expected model",
        ),
        (
            {name: None for name in tensors if name.startswith("cond_stage")},
            "has no text tower: expected cond_stage_model",
        ),
    ):
        file = tmp_path / "changed.safetensors"
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=message):
            Pipeline.load(file)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for content in (b"", b"not a file", whole[:5000], whole[:-1], whole + b"x", b"\xff" * 64, *hostile_files()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="changed.safetensors is damaged or not a safetensors file"):
            Pipeline.load(file)


def hostile_files() -> list[bytes]:
    """Files whose header lies: of its own length, of where tensors are, of what they are."""

    def with_header(header: object, data: bytes = b"\0" * 16) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def tensor(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
        return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    shared = {"x": tensor()["x"], "y": tensor()["x"]}
    return [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        with_header(b"[" * 100_000),
        with_header(b'{"x": ' * 1_000),
        with_header(b"\xff\xfe"),
        with_header([]),
        with_header(tensor(offsets=(0, 2**62))),
        with_header(tensor(offsets=(16, 0))),
        with_header(tensor(shape=(2**40, 2**40))),
        with_header(tensor(shape=(-4,))),
        with_header(tensor(dtype="object")),
        with_header(tensor(shape=(3,))),
        with_header(shared),
    ]


def test_shapes_that_make_no_network_are_refused_in_one_line(their_folder: dict[str, Path], tmp_path: Path) -> None:
    """60 files of which one to three tensors are gone, flat, empty or turned round: each is one line, or is read."""
    compvis.write(load_components(their_folder["sdxl"]), tmp_path / "whole.safetensors")
    whole, draw = load_file(tmp_path / "whole.safetensors"), random.Random(0)
    telling = [name for name in whole if re.search(r"s\.0\.|out\.2|proj_in|quant|positional|projection|fc1|to_k", name)]
    for _ in range(60):
        tensors = dict(whole)
        for name in draw.sample(telling, draw.randint(1, 3)):
            tensor = tensors.pop(name)
            changed = [None, tensor.flatten()[:7], tensor.sum(), tensor.transpose(0, -1), tensor[:0], tensor.long()]
            new = draw.choice(changed)
            if new is not None:
                tensors[name] = new
        try:
            compvis.components_from_tensors(tensors, tmp_path / "a.safetensors")
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "a.safetensors")) and "\n" not in str(error)


def test_what_a_format_cannot_hold_is_named(tiny_model: Path, tmp_path: Path) -> None:
    ours = Pipeline.load(tiny_model)
    wrong = ["unet.coord_conv True .only False.", "unet.pooled_dim 16 .only 0.", "vae.patch_size 4 .only 1."]
    wrong += ["diffusion.noise_schedule", "text.pad_token_id", "text.use_pooled True", "unet.norm_min_group_channels"]
    for target in (write, compvis.write):
        for name in wrong:
            with pytest.raises(ValueError, match=f"cannot export to a .*: unsupported settings .*{name}"):
                target(ours.components, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "change", "target", "setting"),
    [
        ("sd1", {"diffusion": {"prediction": "flow"}}, "diffusers", "diffusion.prediction"),
        ("sd1", {"diffusion": {"noise_schedule": "linear"}}, "compvis", "diffusion.noise_schedule"),
        ("sd1", {"diffusion": {"prediction": "v"}}, "compvis", "diffusion.prediction v .only epsilon."),
        (
            "sd1",
            {"diffusion": {"prediction": "v", "zero_terminal_snr": True}},
            "compvis",
            "diffusion.zero_terminal_snr",
        ),
        ("sd1", {"unet": {"num_heads": (4, 4, 4)}}, "compvis", "unet.num_heads"),
        ("sd1", {"unet": {"scale_shift_norm": True}}, "compvis", "unet.scale_shift_norm"),
        ("sd1", {"unet": {"mid_transformer_depth": 2}}, "diffusers", "unet.mid_transformer_depth"),
        ("sd1", {"text": {"layer": "penultimate"}}, "compvis", "text.layer"),
        ("sd1", {"text": {"zero_empty_prompt": True}}, "diffusers", "text.zero_empty_prompt"),
        ("sd2-base", {"text": {"pad_token_id": 49407}}, "compvis", "text.pad_token_id"),
        ("sdxl", {"text": {"final_layer_norm": True}}, "diffusers", "text.final_layer_norm"),
        ("sdxl", {"text": {"layer": "last"}}, "compvis", "text.layer"),
    ],
)
def test_each_unsupported_setting_is_named(
    kind: str, change: dict[str, Any], target: str, setting: str, loaded: Any, tmp_path: Path
) -> None:
    parts = loaded(kind)[0].components
    if "diffusion" in change:
        parts = parts._replace(diffusion=Diffusion(DiffusionConfig(**change["diffusion"])))
    if "unet" in change:
        with torch.device("meta"):
            parts = parts._replace(unet=UNet(parts.unet.config.model_copy(update=change["unet"])))
    encoder = parts.text.encoders[0]
    before = encoder.config
    try:
        encoder.config = before.model_copy(update=change.get("text", {}))
        with pytest.raises(ValueError, match=f"cannot export to .*: unsupported settings .*{setting}"):
            (write if target == "diffusers" else compvis.write)(parts, tmp_path / "out")
    finally:
        encoder.config = before
    assert not (tmp_path / "out").exists()


# Small pipelines, of the sizes that diffusers' own tests have.

SMALL = {
    "sd-32": ((32, 64), 32, (32, 64), 32),  # widths and norm groups of the U-Net, and of the VAE
    "sd-32-8": ((32, 64), 8, (32, 64), 16),
    "sd-4": ((4, 8), 2, (4, 8), 2),
    "xl": ((2, 4), 1, (32, 64), 32),
}


def small_pipeline(kind: str, clip_files: tuple[str, str]) -> Any:
    """A pipeline of diffusers with a level with attention and one without."""
    diffusers = pytest.importorskip("diffusers")
    widths, groups, vae_widths, vae_groups = SMALL[kind]
    xl: dict[str, Any] = {}
    if kind == "xl":
        xl = {"attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2)}
        xl |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        xl |= {"projection_class_embeddings_input_dim": 32 + 6 * 8}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=2, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if kind == "xl" else 32, norm_num_groups=groups, **xl,
    )  # fmt: skip
    vae = their_vae(*vae_widths, norm_num_groups=vae_groups, latent_channels=4)
    parts = {"unet": randomized(unet), "vae": vae, "scheduler": their_scheduler()}
    if kind != "xl":
        heads = 1 if kind.startswith("sd-32") else 8
        text = {"num_hidden_layers": 3, "num_attention_heads": heads, "max_position_embeddings": 77}
        parts["text_encoder"], parts["tokenizer"] = their_tower(clip_files, 32, openai=True, **text)
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, **more)
    text = {"num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 37, "projection_dim": 32}
    text |= {"max_position_embeddings": 77, "hidden_act": "gelu"}
    parts["text_encoder"], parts["tokenizer"] = their_tower(clip_files, 32, openai=True, **text)
    second = their_tower(clip_files, 32, openai=True, projected=True, **text)
    parts["text_encoder_2"], parts["tokenizer_2"] = second
    return diffusers.StableDiffusionXLPipeline(**parts)


@pytest.mark.parametrize("kind", SMALL)
def test_small_pipelines_are_read_and_written(kind: str, clip_files: tuple[str, str], tmp_path: Path) -> None:
    """They sample as diffusers does, and so does what is written back, in both formats where the file can hold it."""
    theirs = small_pipeline(kind, clip_files)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.set_progress_bar_config(disable=True)
    call = {"latents": initial_noise((4, 16, 16), [5]), "num_inference_steps": 5, "guidance_scale": 3.0}
    if kind == "xl":
        call |= {"height": 32, "width": 32}
    want = theirs("a cat", **call).images[0]
    ours = load_components(tmp_path / "theirs")
    assert ours.vae is not None
    assert (ours.unet.config.norm_num_groups, ours.vae.config.norm_num_groups) == (SMALL[kind][1], SMALL[kind][3])
    assert ours.resolution == 64
    write(ours, tmp_path / "folder")
    paths = [tmp_path / "theirs", tmp_path / "folder"]
    if kind == "sd-32":
        compvis.write(ours, tmp_path / "file.safetensors")
        paths.append(tmp_path / "file.safetensors")
    else:
        with pytest.raises(ValueError, match="CompVis file: unsupported settings .*unet.norm_num_groups .not 32."):
            compvis.write(ours, tmp_path / "file.safetensors")
    settings = {"steps": 5, "guidance_scale": 3.0, "sampler": "ddim", "seed": 5, "width": 32, "height": 32}
    for path in paths:
        assert load_components(path).unet.config == ours.unet.config
        assert difference(Pipeline.load(path)("a cat", **settings)[0], want) <= 2
    again = type(theirs).from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert difference(again("a cat", **call).images[0], want) <= 2


def test_another_vocabulary_than_clips_is_refused(clip_files: tuple[str, str], tmp_path: Path) -> None:
    """As of the pipelines of diffusers' and transformers' tests: a text model of few tokens."""
    pipeline = small_pipeline("sd-4", clip_files)
    tokens = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    pipeline.text_encoder, _ = their_tower(clip_files, 32, openai=True, **tokens)
    pipeline.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text/text_encoder: .*a vocabulary of 1,000 tokens: use CLIP's tokenizer"):
        load_components(tmp_path / "text")
    words = [
        "l",
        "o",
        "w",
        "e",
        "r",
        "lo",
        "w</w>",
        "r</w>",
        "er</w>",
        "low</w>",
        "<unk>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\ne r</w>\n")
    files = (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer = pytest.importorskip("transformers").CLIPTokenizer(*files, unk_token="<unk>")
    shutil.copytree(tmp_path / "text", tmp_path / "tokens")
    shutil.rmtree(tmp_path / "tokens/tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokens/tokenizer")
    with pytest.raises(
        ValueError,
        match="tokens/tokenizer: unsupported configuration .13 tokens of another vocabulary: use CLIP's tokenizer",
    ):
        load_components(tmp_path / "tokens")


def test_models_without_vae_or_text_are_not_exported(loaded: Any, tmp_path: Path) -> None:
    for target in (write, compvis.write):
        for part, name in (("vae", "VAE"), ("text", "text tower")):
            with pytest.raises(ValueError, match=f"cannot export to a .*: the model has no {name}"):
                target(loaded("sd1")[0].components._replace(**{part: None}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The script.


def test_convert_round_trip(their_folder: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers -> ours -> diffusers -> ours: each step is compared, and says so."""
    places = [their_folder["sd2"], tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"]
    for (source, target), to in zip(itertools.pairwise(places), ("ldm", "diffusers", "ldm"), strict=True):
        convert.main([str(source), str(target), "--format", to])
    out = capsys.readouterr().out
    assert "theirs: written as diffusers, read back; the same image differs by " in out and out.count("\n") == 6
    assert f"{places[0]}: Stable Diffusion 2, predicts v, 32 pixels\n" in out
    assert (tmp_path / "ours/text/open_clip_model.safetensors").is_file()
    with pytest.raises(SystemExit, match="pass a model and where to write it"):
        convert.main([str(places[2])])
    with pytest.raises(SystemExit, match="again exists: remove it"):
        convert.main([str(places[2]), str(places[3])])


def test_convert_leaves_nothing_that_generates_another_image(
    their_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.pipeline.convert, "compare", lambda one, other: 3.0)
    for to in ("ldm", "compvis"):
        with pytest.raises(SystemExit, match=f"another image.*as {to}, its pixels differ by 3 of 255, so nothing was"):
            convert.main([str(their_folder["sd1"]), str(tmp_path / "out"), "--format", to])
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_exportable_recipe_goes_to_diffusers_and_to_one_file(tmp_path: Path) -> None:
    """From training to the image that diffusers generates; the loss may be one that no other format knows."""
    diffusers = pytest.importorskip("diffusers")
    for stage in ("clip", "vae", "ldm"):
        few = ["--no-cache-latents", "--sample-steps", "1", "--sample-prompts", "a"] if stage == "ldm" else []
        model = train_recipe("exportable", stage, tmp_path / stage, "--data.resolution", "16", *few)
    places = {"diffusers": tmp_path / "theirs", "compvis": tmp_path / "file.safetensors"}
    for format, place in places.items():
        convert.main([str(model), str(place), "--format", format])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(places["diffusers"])
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline("a red star", latents=initial_noise((4, 4, 4), [5]), num_inference_steps=5, guidance_scale=3.0)
    assert Pipeline.load(model).diffusion.config.loss_weighting != "uniform"
    for path in (model, places["compvis"]):
        settings = {"guidance_scale": 3.0, "sampler": "ddim", "seed": 5, "width": 16, "height": 16}
        assert difference(Pipeline.load(path)("a red star", steps=5, **settings)[0], want.images[0]) <= 2


def test_the_message_of_a_model_that_cannot_be_exported_names_the_recipe_that_can(
    tiny_model: Path, tmp_path: Path
) -> None:
    for target in ("diffusers", "compvis"):
        with pytest.raises(SystemExit, match=r"cannot export .* recipe configs/exportable/ can be exported"):
            convert.main([str(tiny_model), str(tmp_path / "out"), "--format", target])
    with pytest.raises(SystemExit, match="noise_schedule flow .StableDiffusionPipeline cannot run FlowMatchEuler"):
        convert.main([str(tiny_model), str(tmp_path / "out"), "--format", "diffusers"])
    assert (ROOT / "configs/exportable/ldm.yaml").is_file() and not (tmp_path / "out").exists()


def test_convert_reads_a_pickle_and_refuses_to_write_one(
    their_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With objects of other packages beside its weights; a target that is none is refused before anything is read."""
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "a.safetensors")
    save_lightning(load_file(tmp_path / "a.safetensors"), tmp_path / "a.CKPT")
    with pytest.raises(ValueError, match=r"a\.CKPT is a pickle, .*`python scripts/convert.py`"):
        Pipeline.load(tmp_path / "a.CKPT")
    convert.main([str(tmp_path / "a.CKPT"), str(tmp_path / "ours")])
    assert_same(
        load_components(tmp_path / "ours").unet.state_dict(), compvis.read(tmp_path / "a.safetensors").unet.state_dict()
    )
    assert "objects that are no tensors are left out" in caplog.text
    monkeypatch.setattr(ldm.pipeline.convert, "open_source", lambda config: pytest.fail("read too early"))
    for target, format, message in (
        ("b.ckpt", "compvis", r"b\.ckpt: pickles are not written: pass OUT\.safetensors"),
        ("b.CKPT", "ldm", r"b\.CKPT: pickles are not written"),
        ("b.pth", "diffusers", r"b\.pth: pickles are not written"),
        ("b.safetensors", "ldm", r"b\.safetensors names a file, .* add --format compvis"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([str(tmp_path / "a.CKPT"), str(tmp_path / target), "--format", format])
    with pytest.raises(SystemExit, match=r"missing does not exist"):
        convert.main([str(tmp_path / "missing"), str(tmp_path / "out")])


@pytest.mark.parametrize("dropped", ["projection", "projection and block", "block", "block of 24"])
def test_files_of_version_2_without_what_conditions_nothing_generate_the_same_image(
    dropped: str, their_folder: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files made of diffusers folders have neither the projection of the text tower nor its last block."""
    ours, file = load_components(their_folder["sd2-base"]), tmp_path / "a.safetensors"
    assert ours.text is not None
    if dropped == "block of 24":
        cfg = {"context_length": 16, "width": 32, "heads": 1, "layers": 24, "mlp_ratio": 1}
        config = TextConfig(layer="penultimate", pad_token_id=0)
        encoder = TextEncoder.random(config, {"embed_dim": 32, "quick_gelu": False, "text_cfg": cfg})
        ours = ours._replace(text=TextConditioner(encoder))
    compvis.write(ours, file)
    tensors = load_file(file)
    blocks = {int(match[1]) for name in tensors if (match := re.search(r"resblocks\.(\d+)\.", name))}
    for name in list(tensors):
        last = f"resblocks.{max(blocks)}." in name
        if ("projection" in dropped and name.endswith("text_projection")) or ("block" in dropped and last):
            del tensors[name]
    save_file(tensors, file)
    found = compvis.read(file)
    assert found.text is not None
    texts = (text.encode_prompts(["a red cat", ""]).hidden_states for text in (ours.text, found.text))
    torch.testing.assert_close(*texts)
    assert ("ends before the last, unused block" in caplog.text) == ("block" in dropped)


def test_what_a_file_holds_that_is_not_stable_diffusion_is_named(their_folder: dict[str, Path], tmp_path: Path) -> None:
    for name, message in (
        ("lora_unet_down_blocks_0.lora_up.weight", "is a LoRA"),
        ("unet.down_blocks.0.attn1.to_q_lora.down.weight", "is a LoRA"),
        ("base_model.to_q.lora_A.weight", "is a LoRA"),
        ("control_model.input_hint_block.0.weight", "is a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "is a ControlNet"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("conditioner.embedders.0.model.ln_final.weight", "is the refiner of Stable Diffusion XL"),
        ("model.diffusion_model.output_blocks.3.0.time_stack.out_layers.3.bias", "is Stable Video Diffusion"),
        ("low_scale_model.betas", "is the upscaler of Stable Diffusion 2"),
        ("decoder.conv_in.weight", "is a VAE alone, for --vae"),
        ("down_blocks.0.resnets.0.conv1.weight", "is a U-Net alone"),
        ("text_model.final_layer_norm.weight", "is a text tower alone"),
        ("edm_mean", "EDM schedule"),
        ("emb_params", "is a textual inversion"),
    ):
        save_file({name: torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=f"a.safetensors .*{message}.*only whole models of Stable Diffusion 1, 2"):
            Pipeline.load(tmp_path / "a.safetensors")
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "a.safetensors")
    tensors, name = load_file(tmp_path / "a.safetensors"), "model.diffusion_model.input_blocks.0.0.weight"
    for channels, message in ((8, "for InstructPix2Pix"), (5, "for depth"), (7, "for upscaling"), (6, "another kind")):
        save_file({**tensors, name: torch.zeros(64, channels, 3, 3)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=f"a.safetensors: .*a U-Net .*{message}, with {channels} input channels"):
            Pipeline.load(tmp_path / "a.safetensors")


def test_learned_tokens_of_a_diffusers_folder_are_used(clip_files: tuple[str, str], tmp_path: Path) -> None:
    """Each of the ways that versions of transformers list them, and kept in our folder and in one written back."""
    theirs = small_pipeline("sd-32", clip_files)
    for token, count in (("<cat-toy>", 3), ("Sks", 1)):
        vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
        theirs.load_textual_inversion(vectors[0] if count == 1 else vectors, token=token)
    theirs.save_pretrained(tmp_path / "theirs")
    learned = {"<cat-toy>": 49408, "<cat-toy>_1": 49409, "<cat-toy>_2": 49410, "Sks": 49411}
    tokenizer = tmp_path / "old/tokenizer"
    for name in ("old", "newer"):
        shutil.copytree(tmp_path / "theirs", tmp_path / name)
        (tmp_path / name / "tokenizer/tokenizer.json").unlink()
        for file in clip_files:
            shutil.copy(file, tmp_path / name / "tokenizer")
    (tokenizer / "added_tokens.json").write_text(json.dumps(learned))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(index): {"content": token} for token, index in learned.items()}
    (tmp_path / "newer/tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    components = load_components(tmp_path / "theirs")
    save_components(components, tmp_path / "ours")
    write(components, tmp_path / "again")
    prompt = "a photo of a <cat-toy>, on a Sks chair"
    with torch.no_grad():
        ids = theirs.tokenizer(theirs.maybe_convert_prompt(prompt, theirs.tokenizer), padding="max_length")["input_ids"]
        want = theirs.text_encoder(torch.tensor([ids])).last_hidden_state
    assert 49411 in ids and ids.count(49408) == 1
    for name in ("theirs", "old", "newer", "ours", "again"):
        text = load_components(tmp_path / name).text
        assert text is not None
        for states in (text.encode_prompts([prompt]), text([prompt])):
            close(states.hidden_states, want)
    with pytest.raises(ValueError, match="cannot export .* learned tokens"):
        compvis.write(components, tmp_path / "a.safetensors")
    again = type(theirs).from_pretrained(tmp_path / "again").tokenizer
    assert learned.items() <= again.get_vocab().items()
    (tokenizer / "added_tokens.json").write_text(json.dumps(learned | {"<too-many>": 49412}))
    with pytest.raises(ValueError, match="49,412 embeddings, but the tokenizer has 1 more"):
        load_components(tmp_path / "old")


# A VAE alone.


@pytest.fixture(scope="module")
def published_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers wrote, with the scale of Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    their_vae(32, 32, layers_per_block=1, scaling_factor=0.13025, norm_num_groups=32).save_pretrained(folder)
    return folder


def test_a_vae_alone_is_converted_both_ways(
    published_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers -> ours -> diffusers -> one file -> ours: the same standardized latents, and their scale."""
    places = [published_vae, tmp_path / "ours", tmp_path / "theirs", tmp_path / "file.safetensors", tmp_path / "again"]
    formats = ("ldm", "diffusers", "compvis", "ldm")
    for (source, target), to in zip(itertools.pairwise(places), formats, strict=True):
        convert.main([str(source), str(target), "--format", to])
    assert capsys.readouterr().out.count("a VAE alone") == 4
    assert json.loads((places[2] / "config.json").read_text())["scaling_factor"] == pytest.approx(0.13025)
    assert "file.safetensors does not tell the scale of its latents: 0.18215" in caplog.text
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(published_vae)
    with torch.no_grad():
        want = theirs.encode(pixels).latent_dist.mean * theirs.config.scaling_factor
        for place in places:
            vae = load_vae(place)
            z = vae.standardize(vae.encode(pixels).mean)
            close(z, want)
            close(vae.decode(vae.unstandardize(z)), theirs.decode(want / theirs.config.scaling_factor).sample)
    inner = load_vae(published_vae / "diffusion_pytorch_model.safetensors")  # with its config.json beside it
    assert inner.latent_std[0].item() == pytest.approx(1 / 0.13025)
    for place in (places[0], places[1], places[3]):
        with pytest.raises(ValueError, match="is a VAE alone, for --vae"):
            load_components(place)


def test_every_form_of_a_vae_is_the_same_vae(
    published_vae: Path, their_folder: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file under the names of diffusers, a pickle of a training, one in a whole model, a folder without U-Net."""
    vae = load_vae(their_folder["sd1"])
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "whole.safetensors")
    compvis.write_vae(vae, tmp_path / "vae.safetensors")
    state = load_file(tmp_path / "vae.safetensors")
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}, "epoch": 3}, tmp_path / "vae.pt")
    (tmp_path / "partial").mkdir()
    shutil.copytree(their_folder["sd1"] / "vae", tmp_path / "partial/vae")
    shutil.copy(their_folder["sd1"] / "vae/diffusion_pytorch_model.safetensors", tmp_path / "theirs.safetensors")
    for name in ("whole.safetensors", "vae.safetensors", "vae.pt", "partial", "partial/vae", "theirs.safetensors"):
        found = load_vae(tmp_path / name)
        assert found.config == vae.config
        for key, tensor in vae.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], tensor)
    assert "vae.pt: 1 tensors that are not of the VAE are left out" in caplog.text
    assert weights_sha256(load_vae(tmp_path / "partial")) == weights_sha256(load_vae(tmp_path / "theirs.safetensors"))
    save_vae(vae, tmp_path / "ours")
    assert weights_sha256(vae) == sha256(tmp_path / "ours/vae.safetensors")


def test_a_vae_without_quant_convs_keeps_its_scale_and_shift(tmp_path: Path) -> None:
    """As those of Stable Diffusion 3 and Flux, with 16 channels; the file alone does not tell them."""
    settings = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(block_out_channels=(32,), scaling_factor=1.5305, shift_factor=0.0609, **settings)
    theirs.save_pretrained(tmp_path / "vae")
    vae, pixels = load_vae(tmp_path / "vae"), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        want = (theirs.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
        close(vae.standardize(vae.encode(pixels).mean), want)
        convert.main([str(tmp_path / "vae"), str(tmp_path / "again"), "--format", "diffusers"])
        again = load_vae(tmp_path / "again")
        close(again.standardize(again.encode(pixels).mean), want)
    with pytest.raises(ValueError, match=r"scale of latents of 16 channels is not in the file: pass the folder vae/"):
        load_vae(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"cannot export to a CompVis file: .*vae.latent_channels 16 .only 4."):
        compvis.write_vae(vae, tmp_path / "a.safetensors")


def test_what_is_no_vae_is_named(their_folder: dict[str, Path], tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for path, message in (
        (tmp_path / "missing", "missing does not exist: pass a model folder"),
        (tmp_path, "is not a model folder"),
        (tmp_path / "lora.safetensors", "is a LoRA"),
        (tmp_path / "x.safetensors", "x.safetensors has no VAE: expected first_stage_model"),
        (their_folder["sd1"] / "unet", "_class_name is 'UNet2DConditionModel': only 'AutoencoderKL' can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vae(path)


def test_txt2img_generates_with_a_foreign_model(
    their_folder: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And reproduces; it knows no captions, so it names no words."""
    compvis.write(load_components(their_folder["sd1"]), tmp_path / "model.safetensors")
    for model in (their_folder["sd1"], tmp_path / "model.safetensors"):
        out = tmp_path / model.stem
        size = ["--width", "32", "--height", "32", "--steps", "2", "--device", "cpu"]
        txt2img.main(["a zebra", "--model", str(model), "--out", str(out), *size])
        txt2img.main(["--reproduce", str(out / "00000.png"), "--out", str(out), "--device", "cpu"])
        assert (out / "00000.png").read_bytes() == (out / "00001.png").read_bytes()
    assert "zebra" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="does not name its data, as it was not trained here"):
        evaluate.main(["--model", str(their_folder["sd1"]), "--device", "cpu"])

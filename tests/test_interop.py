"""The Stable Diffusion family: names, counts, and the same outputs as diffusers from the same weights."""

import itertools
import json
import pickle
import shutil
import warnings
from pathlib import Path

import convert
import evaluate
import numpy as np
import pytest
import torch
import txt2img
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.config import read_yaml
from ldm.interop import compvis, names
from ldm.interop.diffusers import write
from ldm.interop.parts import Parts
from ldm.pipeline import Pipeline, initial_noise
from ldm.text import TextConfig, TextEncoder
from ldm.text.encoder import TextTower, make_tokenizer
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


CONFIGS = {
    "sd1": UNetConfig(channels=256, multipliers=(1, 1, 1), depths=(1, 1, 0), heads=(8, 8, 8), context_width=24),
    "sd2": UNetConfig(channels=256, multipliers=(1, 1, 2), depths=(1, 1, 0), heads=(4, 4, 8), context_width=32),
    "sdxl": UNetConfig(
        channels=256, multipliers=(1, 1, 2), depths=(0, 1, 2), middle_depth=2, heads=(4, 4, 8), context_width=32,
        vector_width=40,
    ),
}  # fmt: skip


SDXL = {"multipliers": (1, 2, 4), "depths": (0, 2, 10), "middle_depth": 10, "heads": (5, 10, 20)}
SDXL |= {"context_width": 2048, "vector_width": 2816}  # type: ignore[dict-item]


def their_unet(kind: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[kind]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths]
    more = {}
    if kind == "sdxl":  # 8 = the width of each embedded size, 6 of them; the pooled text has the rest
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        }
    return randomized(
        diffusers.UNet2DConditionModel(
            block_out_channels=config.widths,
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            cross_attention_dim=config.context_width,
            attention_head_dim=config.heads,
            transformer_layers_per_block=tuple(max(depth, 1) for depth in config.depths),
            use_linear_projection=kind != "sd1",
            layers_per_block=config.blocks,
            **more,
        )
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_unet_answers_as_that_of_diffusers(kind: str) -> None:
    config, theirs = CONFIGS[kind], their_unet(kind)
    ours = UNet(config).eval()
    ours.load_state_dict(names.renamed(theirs.state_dict(), ours.state_dict(), names.unet_in_diffusers(config)))
    generator = torch.Generator().manual_seed(1)
    z, t = torch.randn(2, 4, 8, 12, generator=generator), torch.tensor([7.0, 801.0])
    context = torch.randn(2, 5, config.context_width, generator=generator)
    with torch.no_grad():
        if kind == "sdxl":
            pooled, sizes = torch.randn(2, 16, generator=generator), torch.rand(2, 6, generator=generator) * 1000
            added = {"text_embeds": pooled, "time_ids": sizes}
            want = theirs(z, t, context, added_cond_kwargs=added).sample
            from ldm.unet.blocks import timestep_embedding

            vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), 4).reshape(2, -1)], dim=1)
            close(ours(z, t, context, vector=vector), want)
        else:
            close(ours(z, t, context), theirs(z, t, context).sample)


def test_vae_encodes_and_decodes_as_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = VAEConfig(channels=64, multipliers=(1, 2, 2))
    theirs = randomized(
        diffusers.AutoencoderKL(
            block_out_channels=config.widths,
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            layers_per_block=config.blocks,
        )
    )
    ours = VAE(config).eval()
    own = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("latent_")}
    found = names.renamed(theirs.state_dict(), own, names.vae_in_diffusers(config))
    ours.load_state_dict(found, strict=False)
    pixels, latents = torch.rand(1, 3, 24, 16) * 2 - 1, torch.randn(1, 4, 6, 4)
    with torch.no_grad():
        close(ours.encode(pixels).mean, theirs.encode(pixels).latent_dist.mean)
        close(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize("folder", ["sd15", "sd21"])
def test_names_in_compvis_files(folder: str) -> None:
    """686 and 248 different names; some of them where the published files have them."""
    config = UNetConfig(**read_yaml(ROOT / f"configs/{folder}/ldm.yaml")["unet"])
    vae_config = VAEConfig(**read_yaml(ROOT / "configs/sd15/vae.yaml")["vae"])
    with torch.device("meta"):
        unet, vae = UNet(config).state_dict(), VAE(vae_config).state_dict()
    found = {names.unet_in_compvis(config)(name) for name in unet}
    assert len(found) == len(unet) == 686
    assert {
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
    } <= found
    found = {names.vae_in_compvis(vae_config)(name) for name in vae if not name.startswith("latent_")}
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


def test_the_sizes_of_the_family() -> None:
    """Parameters and tensors of the published networks, on the meta device."""
    for values, parameters, tensors in (
        (read_yaml(ROOT / "configs/sd15/ldm.yaml")["unet"], 859_520_964, 686),
        (read_yaml(ROOT / "configs/sd21/ldm.yaml")["unet"], 865_910_724, 686),
        (SDXL, 2_567_463_684, 1_680),
    ):
        with torch.device("meta"):
            state = UNet(UNetConfig(**values)).state_dict()  # type: ignore[arg-type]
        assert (sum(t.numel() for t in state.values()), len(state)) == (parameters, tensors)


def test_tensors_that_do_not_fit_are_named() -> None:
    config = CONFIGS["sd1"]
    with torch.device("meta"):
        own = UNet(config).state_dict()
    rename = names.unet_in_diffusers(config)
    theirs = {rename(name): torch.zeros(tensor.shape) for name, tensor in own.items()}
    for change, message in (
        ({"conv_in.bias": None, "conv_out.bias": None}, "2 tensors are missing: conv_in.bias, conv_out.bias"),
        ({f"lora.{i}": torch.zeros(1) for i in range(7)}, "7 tensors are extra: lora.0, .*lora.4$"),
        ({"conv_in.bias": torch.zeros(3)}, r"1 tensors have another shape: conv_in.bias is \(3,\), not \(256,\)"),
        ({"conv_in.bias": torch.full((256,), torch.nan)}, "1 tensors hold NaN or infinite numbers: conv_in.bias"),
    ):
        changed = {name: t for name, t in (theirs | change).items() if t is not None}
        with pytest.raises(ValueError, match=message):
            names.renamed(changed, own, rename)


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
    tower.load_state_dict(names.text_from_transformers(theirs.state_dict()))
    for padding in (49407, 0):
        for layer, index in (("last", -1), ("penultimate", -2)):
            encoder = TextEncoder(
                tower,
                make_tokenizer(16),
                TextConfig(layer=layer, padding=padding),  # type: ignore[arg-type]
                source="random",
                weights=Path(),
            )
            prompts = ["a red circle", ""]
            ids = encoder.tokenize(prompts)
            ids = torch.where(torch.arange(16) > (ids == 49407).int().argmax(1)[:, None], padding, ids)
            with torch.no_grad():
                want = theirs(ids, output_hidden_states=True)
                hidden = tower.ln_final(want.hidden_states[index])
            for states in (encoder(prompts), encoder.prompt_states(prompts)):
                assert states.mask is None and states.tokens.shape == (2, 16, 32)
                close(states.tokens, hidden)
            if projected:
                close(encoder(prompts).pooled, want.text_embeds)
            raw = encoder.tower(ids, layer=layer, normalize=False).tokens
            close(raw, want.hidden_states[index])


# Whole pipelines.


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that diffusers wrote, by kind: random weights, reduced width, the tokens of open_clip's tokenizer."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    words = tmp_path_factory.mktemp("words")
    tokenizer = make_tokenizer(16)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    (words / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    folders = {}
    for kind, prediction in (("sd1", "epsilon"), ("sd2", "v_prediction")):
        config = CONFIGS[kind]
        text = transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=config.context_width, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, hidden_act="quick_gelu" if kind == "sd1" else "gelu",
            eos_token_id=49407, bos_token_id=49406, pad_token_id=49407 if kind == "sd1" else 0,
        )  # fmt: skip
        pad = "<|endoftext|>" if kind == "sd1" else "!"
        files = (str(words / "vocab.json"), str(words / "merges.txt"))
        vae = diffusers.AutoencoderKL(
            block_out_channels=(64, 64, 64),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            layers_per_block=1,
            scaling_factor=0.18215,
        )
        unet = their_unet(kind)
        unet.register_to_config(sample_size=8)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=randomized(vae, 1),
            text_encoder=randomized(transformers.CLIPTextModel(text), 2),
            tokenizer=transformers.CLIPTokenizer(*files, pad_token=pad, model_max_length=16),
            unet=unet,
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
                timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
            ),
            safety_checker=None,
            feature_extractor=None,
        )  # fmt: skip
        folders[kind] = tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_pipelines_paint_as_those_of_diffusers(kind: str, sampler: str, their_folder: dict[str, Path]) -> None:
    """From a folder that diffusers wrote, with the same first noise: no pixel differs by more than 2 of 255."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(their_folder[kind])
    theirs.set_progress_bar_config(disable=True)
    cls, more = {
        "ddim": (diffusers.DDIMScheduler, {}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    }[sampler]
    theirs.scheduler = cls.from_config(theirs.scheduler.config, **more)
    ours = Pipeline.load(their_folder[kind])
    noise = initial_noise((4, 8, 8), [5])
    call = {"num_inference_steps": 10, "guidance_scale": 3.0, "negative_prompt": "a dog"}
    if sampler == "euler":  # theirs starts from sqrt(sigma^2 + 1) times the noise: exactly ours over alpha
        theirs.scheduler.set_timesteps(10)
    want = theirs("A cat, (astronaut)!".replace("(", "").replace(")", ""), latents=noise, **call).images[0]
    found = ours("A cat, astronaut!", negative_prompt="a dog", steps=10, guidance_scale=3.0, sampler=sampler, seed=5)[0]
    assert found.size == want.size == (32, 32) and np.asarray(want).std() > 10
    assert abs(np.asarray(found, dtype=int) - np.asarray(want, dtype=int)).max() <= 2


def test_folders_that_can_not_be_read_are_told(their_folder: dict[str, Path], tmp_path: Path) -> None:
    for change, message in (
        ({"unet/config.json": {"act_fn": "gelu"}}, "unet/config.json: act_fn is 'gelu'; only 'silu' is known here"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "holds a FluxPipeline; only a StableDiffusionPipeline"),
        ({"scheduler/scheduler_config.json": {"beta_start": 0.5}}, "betas of scaled_linear from 0.5 are not known"),
        ({"vae/diffusion_pytorch_model.safetensors": None}, "vae has no diffusion_pytorch_model.safetensors"),
        ({"vae/config.json": None}, "vae/config.json is missing: the diffusers folder is not whole"),
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


def test_variants_and_shards_are_read(their_folder: dict[str, Path], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(their_folder["sd1"])
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="10MB")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    want = Pipeline.load(their_folder["sd1"]).unet.state_dict()
    for folder, tolerance in (("shards", 0.0), ("half", 1e-2)):
        found = Pipeline.load(tmp_path / folder).unet.state_dict()
        assert max((want[name] - found[name]).abs().max().item() for name in want) <= tolerance


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_folder_of_ours_loads_in_diffusers(
    kind: str, their_folder: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With no warning, and it gives the same picture; also where the latents have statistics of their own."""
    diffusers = pytest.importorskip("diffusers")
    ours = Pipeline.load(their_folder[kind])
    assert ours.vae is not None and ours.text is not None
    ours.vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    ours.vae.latent_mean.copy_(torch.tensor([0.1, -1.0, 0.0, 2.0]))
    if kind == "sd2":
        ours.text.config = ours.text.config.model_copy(update={"layer": "penultimate"})
    write(parts_of(ours), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert not [w for w in caught if "deprecat" not in str(w.message).lower()] and not caplog.records
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise((4, 8, 8), [5])
    want = theirs("a cat", latents=noise, num_inference_steps=5, guidance_scale=3.0).images[0]
    for pipeline in (ours, Pipeline.load(tmp_path)):
        found = pipeline("a cat", steps=5, guidance_scale=3.0, sampler="ddim", seed=5)[0]
        assert abs(np.asarray(found, dtype=int) - np.asarray(want, dtype=int)).max() <= 2


def parts_of(pipeline: Pipeline) -> Parts:
    assert pipeline.vae is not None and pipeline.text is not None
    return Parts(pipeline.unet, pipeline.process, pipeline.vae, pipeline.text, pipeline.size)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_single_files_keep_the_pictures(kind: str, their_folder: dict[str, Path], tmp_path: Path) -> None:
    """Diffusers folder -> CompVis file -> our pipeline: the same picture; heads and layers are seen from shapes."""
    ours, file = Pipeline.load(their_folder[kind]), tmp_path / "model.safetensors"
    compvis.write(parts_of(ours), file)
    tensors = load_file(file)
    square = tensors["model.diffusion_model.input_blocks.1.1.proj_in.weight"].ndim == 4
    assert square == (kind == "sd1")
    found = Pipeline.load(file)
    assert found.text is not None and ours.text is not None
    for block in found.text.tower.blocks:
        block.heads = ours.text.tower.blocks[0].heads  # of width 64 in the family, and only here not
    found.process = ours.process  # v can not be seen in a network that was never trained
    a, b = (p("a cat", steps=4, sampler="ddim", seed=5, width=32, height=32)[0] for p in (ours, found))
    assert found.unet.config == ours.unet.config
    assert abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_single_files_are_understood_by_diffusers(kind: str, their_folder: dict[str, Path], tmp_path: Path) -> None:
    """Its own conversion of U-Net and VAE gives the tensors that it wrote itself."""
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    compvis.write(parts_of(Pipeline.load(their_folder[kind])), tmp_path / "model.safetensors")
    file = load_file(tmp_path / "model.safetensors")
    for part, translate in (
        ("unet", utilities.convert_ldm_unet_checkpoint),
        ("vae", utilities.convert_ldm_vae_checkpoint),
    ):
        config = json.loads((their_folder[kind] / part / "config.json").read_text())
        want = load_file(their_folder[kind] / part / "diffusion_pytorch_model.safetensors")
        found = translate(dict(file), config)
        assert found.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(found[name].reshape(tensor.shape), tensor, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_read_on_request(their_folder: dict[str, Path], tmp_path: Path) -> None:
    compvis.write(parts_of(Pipeline.load(their_folder["sd1"])), tmp_path / "a.safetensors")
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


def test_files_that_can_not_be_read_are_told(their_folder: dict[str, Path], tmp_path: Path) -> None:
    compvis.write(parts_of(Pipeline.load(their_folder["sd1"])), tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    bias = "model.diffusion_model.out.2.bias"
    for change, message in (
        ({bias: None}, "1 tensors are missing: out.2.bias"),
        ({bias: torch.zeros(7)}, r"have another shape: out.2.bias is \(7,\), not \(4,\)"),
        ({bias: torch.full((4,), torch.inf)}, "hold NaN or infinite numbers: out.2.bias"),
        ({"model.diffusion_model.lora.up": torch.zeros(1)}, "1 tensors are extra: lora.up"),
        ({"conditioner.embedders.0.x": torch.zeros(1)}, "is a Stable Diffusion XL file; only 1 and 2"),
        ({name: None for name in tensors if name.startswith("first_stage")}, "is no Stable Diffusion file: it has"),
        ({name: None for name in tensors if name.startswith("cond_stage")}, "has no text tower: neither"),
    ):
        file = tmp_path / "changed.safetensors"
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=message):
            Pipeline.load(file)
    for content in (b"", b"not a file", (tmp_path / "whole.safetensors").read_bytes()[:5000], b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="changed.safetensors is damaged or no safetensors file"):
            Pipeline.load(file)


def test_what_a_format_can_not_hold_is_named(tiny_model: Path, tmp_path: Path) -> None:
    ours = Pipeline.load(tiny_model)
    wrong = "unet.coordinates, unet.vector_width, vae.patch, process.path, text.padding"
    message = f"can not hold this model: {wrong} stand in the way"
    for target in (write, compvis.write):
        with pytest.raises(ValueError, match=message):
            target(parts_of(ours), tmp_path)
    assert not list(tmp_path.iterdir())


# The script.


def test_convert_goes_around(their_folder: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers -> ours -> diffusers -> ours: each step is compared, and says so."""
    places = [their_folder["sd2"], tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"]
    for (source, target), to in zip(itertools.pairwise(places), ("ldm", "diffusers", "ldm"), strict=True):
        convert.main([str(source), str(target), "--to", to])
    told = capsys.readouterr().out
    assert "theirs: written as diffusers, read back; the same picture differs by " in told and told.count("\n") == 3
    assert (tmp_path / "ours/text/open_clip_model.safetensors").is_file()
    with pytest.raises(SystemExit, match="name a model and where to write it"):
        convert.main([str(places[2])])
    with pytest.raises(SystemExit, match="again is there already: remove it"):
        convert.main([str(places[2]), str(places[3])])


def test_pickles_are_read_by_convert_alone_and_never_run(
    their_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compvis.write(parts_of(Pipeline.load(their_folder["sd1"])), tmp_path / "a.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "a.safetensors"), "step": 3}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt is a pickle, which can hold code: `python scripts/convert.py`"):
        Pipeline.load(tmp_path / "a.ckpt")
    parts = compvis.read(tmp_path / "a.ckpt", pickles=True)
    want = compvis.read(tmp_path / "a.safetensors").unet.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in parts.unet.state_dict().items())

    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    for content in (Hostile(), {"state_dict": {"x": Hostile()}}):
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(SystemExit, match="bad.ckpt can not be read without running code of it"):
            convert.main([str(tmp_path / "bad.ckpt"), str(tmp_path / "out")])
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(content))
        with pytest.raises(SystemExit, match="bad.ckpt can not be read without running code of it"):
            convert.main([str(tmp_path / "bad.ckpt"), str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_txt2img_paints_with_a_foreign_model(
    their_folder: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And reproduces; it knows no captions, so it names no words."""
    compvis.write(parts_of(Pipeline.load(their_folder["sd1"])), tmp_path / "model.safetensors")
    for model in (their_folder["sd1"], tmp_path / "model.safetensors"):
        out = tmp_path / model.stem
        size = ["--width", "32", "--height", "32", "--steps", "2", "--device", "cpu"]
        txt2img.main(["a zebra", "--model", str(model), "--out", str(out), *size])
        txt2img.main(["--reproduce", str(out / "00000.png"), "--out", str(out), "--device", "cpu"])
        assert (out / "00000.png").read_bytes() == (out / "00001.png").read_bytes()
    assert "zebra" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="does not tell its data, as it was not trained here"):
        evaluate.main(["--model", str(their_folder["sd1"]), "--device", "cpu"])

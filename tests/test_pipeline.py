"""The pipeline: seeds, batches, folders, sizes, messages."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import distill_decoder
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.data.sources import shapes
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, SamplerStep, final_latents
from ldm.imaging import pil_to_tensor, tensor_to_pil
from ldm.pipeline import Pipeline
from ldm.pipeline.generate import Img2ImgConfig
from ldm.pipeline.inputs import initial_noise, slerp
from ldm.text.tokenizer import split_words


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_seed_of_image_i_is_seed_plus_i(tiny_model: Path) -> None:
    """And the batch around an image changes nothing but, at most, the last bit of the arithmetic."""
    pipeline = Pipeline.load(tiny_model)
    together = pipeline("a red circle", seed=7, num_images=3, steps=4)
    for i in range(3):
        alone = pipeline("a red circle", seed=7 + i, steps=4)[0]
        assert abs(pixels(alone) - pixels(together[i])).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[1])).max() > 1


@pytest.mark.parametrize("sampler", [name for name, (_, eta) in SAMPLERS.items() if eta is not None])
def test_fresh_noise_belongs_to_the_seed_too(tiny_model: Path, sampler: str) -> None:
    pipeline = Pipeline.load(tiny_model)
    call = {"sampler": sampler, "eta": 1.0, "steps": 4}
    alone = pipeline("a red circle", seed=8, **call)[0]  # type: ignore[arg-type]
    second = pipeline("a red circle", seed=7, num_images=2, **call)[1]  # type: ignore[arg-type]
    assert abs(pixels(alone) - pixels(second)).max() <= 1


def test_the_first_noise_is_the_documented_one() -> None:
    want = torch.randn(1, 4, 2, 2, generator=torch.Generator("cpu").manual_seed(12))
    assert torch.equal(initial_noise((4, 2, 2), [11, 12])[1:], want)


def test_seed_zero_is_a_seed(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    one, two = (pipeline("a red circle", seed=0, steps=2)[0] for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_every_sampler_runs_and_on_step_gets_each_step(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    for sampler in SAMPLERS:
        steps: list[tuple[int, SamplerStep]] = []
        images = pipeline("a star", sampler=sampler, steps=3, on_step=lambda *step, steps=steps: steps.append(step))
        assert [index for index, _ in steps] == [1, 2, 3]
        assert all(step.z.shape == step.denoised.shape == (1, 4, 4, 4) for _, step in steps)
        assert images[0].size == (16, 16)


def test_stream_is_stopped_by_the_caller_and_leaves_gradients_on(tiny_model: Path) -> None:
    """Each step is computed when it is asked for, without gradients; its last one is what a call decodes."""
    pipeline = Pipeline.load(tiny_model)
    pipeline.unet.requires_grad_(True)
    calls: list[bool] = []
    pipeline.unet.conv_in.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    noise = initial_noise((4, 4, 4), [0])
    settings = {"seeds": [0], "steps": 4, "guidance_scale": 2.0}
    stream = pipeline.stream(noise, ["a star"], [""], **settings)  # type: ignore[arg-type]
    for count in (1, 2):
        step = next(stream)
        assert torch.is_grad_enabled() and not step.z.requires_grad
        assert calls == [False] * count
    stream.close()
    assert torch.is_grad_enabled() and len(calls) == 2
    *_, last = pipeline.stream(noise, ["a star"], [""], **settings)  # type: ignore[arg-type]
    assert tensor_to_pil(pipeline.decode(last.z).detach())[0] == pipeline("a star", steps=4, guidance_scale=2.0)[0]
    sampled = pipeline.sample(["a star"], [0], steps=4, guidance_scale=2.0)
    assert torch.equal(sampled, pipeline.decode(last.z))
    with pytest.raises(ValueError, match="sampler 'plms'"):  # before the first step
        pipeline.stream(noise, ["a star"], [""], sampler="plms", **settings)  # type: ignore[arg-type]


def test_strength_zero_takes_no_step_and_returns_the_image(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    init_image, noise = pipeline.prepare_init_image(an_image(), 0.0), initial_noise((4, 4, 4), [0, 1])
    call = {"seeds": [0, 1], "steps": 4, "guidance_scale": 2.0, "init_image": init_image}
    assert list(pipeline.stream(noise, ["a star"] * 2, [""] * 2, **call)) == []  # type: ignore[arg-type]
    images = pipeline("a star", num_images=2, image=an_image(), strength=0.0)
    assert images == tensor_to_pil(pipeline.decode(init_image.latents)) * 2


def test_guidance_and_negative_prompt_change_the_image(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    torch.manual_seed(0)
    for parameter in pipeline.unet.parameters():  # after four steps of training the text has no effect
        parameter.add_(0.2 * torch.randn_like(parameter))
    plain, guided, negative = (
        pixels(pipeline("a red circle", steps=3, **call)[0])  # type: ignore[arg-type]
        for call in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 5.0},
            {"guidance_scale": 5.0, "negative_prompt": "a star"},
        )
    )
    assert (plain != guided).any() and (guided != negative).any()


def test_other_sizes_work_where_the_factor_divides_them(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    assert pipeline("a star", steps=1, width=24, height=32)[0].size == (24, 32)
    with pytest.raises(ValueError, match="width 20 .*multiples of 8"):
        pipeline("a star", width=20)


def test_bad_settings_are_errors(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    with pytest.raises(ValueError, match="steps .*at least 1.* 0"):
        pipeline("a star", steps=0)
    with pytest.raises(ValueError, match="sampler 'plms'"):
        pipeline("a star", sampler="plms")
    with pytest.raises(ValueError, match="eta .*0 and 1.* 2"):
        pipeline("a star", eta=2)


def test_saving_and_loading_keeps_every_bit(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    pipeline.save(tmp_path / "copy")
    copy = Pipeline.load(tmp_path / "copy")
    for name in ("unet.safetensors", "vae.safetensors", "vocab.txt", "model.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tiny_model / name).read_bytes()
    assert copy("a star", steps=2)[0].tobytes() == pipeline("a star", steps=2)[0].tobytes()


def test_a_model_folder_explains_itself_and_can_be_moved(tiny_model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    values = json.loads((moved / "model.json").read_text())
    assert values["diffusion"]["noise_schedule"] == "flow" and values["null_prompt"] == ""
    assert values["text"]["model"] == "local-dir:text" and values["text"]["layer"] == "penultimate"
    assert values["metadata"]["data"]["source"] == "shapes"
    assert len(values["vae_sha256"]) == 64
    Pipeline.load(moved)("a star", steps=1)


def test_another_vae_than_that_of_the_training_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = bytearray((folder / "vae.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "vae.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="vae.safetensors is not the VAE .*put that one back"):
        Pipeline.load(folder)


def test_other_and_incomplete_folders_are_errors(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model.json.*pass RUN/model"):
        Pipeline.load(tmp_path)
    with pytest.raises(ValueError, match="is a VAE alone.*pass a whole model"):
        Pipeline.load(tiny_runs / "vae/model")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    whole = (folder / "unet.safetensors").read_bytes()
    (folder / "unet.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="unet.safetensors is damaged"):
        Pipeline.load(folder)
    (folder / "unet.safetensors").unlink()
    with pytest.raises(ValueError, match="unet.safetensors is missing"):
        Pipeline.load(folder)
    values = json.loads((folder / "model.json").read_text())
    del values["resolution"]
    (folder / "model.json").write_text(json.dumps(values | {"colour": 1}))
    with pytest.raises(ValueError, match=r"model.json: resolution: Field required(.|\n)*colour: unknown key"):
        Pipeline.load(folder)
    shutil.copy(tiny_model / "model.json", folder / "model.json")
    shutil.copy(folder / "vae.safetensors", folder / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet.safetensors.* \d+ "):
        Pipeline.load(folder)


def test_words_that_training_never_had_are_named(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    assert pipeline.unseen_words("A small red Circle, riding a horse!") == ["riding", "horse"]
    assert split_words("Cat's-eye, O'Neill: 2 cats") == ["cat's-eye", "o'neill", "2", "cats"]


def test_grey_and_colour_pixels_become_images() -> None:
    grey = tensor_to_pil(torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2))[0]
    assert grey.mode == "L" and list(grey.get_flattened_data()) == [0, 128, 255, 255]
    assert tensor_to_pil(torch.zeros(2, 3, 4, 5))[1].size == (5, 4)


def test_guidance_rules_compose_in_the_pipeline(tiny_model: Path) -> None:
    """Each changes the image; scale 1 is no guidance under any rule; an empty interval is no guidance."""
    pipeline = Pipeline.load(tiny_model)
    call = {"seed": 3, "steps": 4, "guidance_scale": 6.0}
    plain = pipeline("a red circle", seed=3, steps=4, guidance_scale=1)[0]
    seen = {pipeline("a red circle", **call)[0].tobytes(), plain.tobytes()}  # type: ignore[arg-type]
    for values in (
        {"method": "apg"},
        {"method": "apg", "apg_momentum": -0.5},
        {"zero_star": True},
        {"zero_star": True, "method": "apg"},
        {"zero_init": True},
        {"rescale": 0.7},
        {"interval": (0.3, 0.7)},
    ):
        guidance = GuidanceConfig(**values)  # type: ignore[arg-type]
        seen.add(pipeline("a red circle", guidance=guidance, **call)[0].tobytes())  # type: ignore[arg-type]
    assert len(seen) == 9
    nowhere = GuidanceConfig(interval=(0.0, 0.0))
    assert pipeline("a red circle", guidance=nowhere, **call)[0].tobytes() == plain.tobytes()  # type: ignore[arg-type]


def test_a_model_has_its_own_number_of_steps(tiny_model: Path) -> None:
    pipeline, taken = Pipeline.load(tiny_model), []
    assert pipeline.default_steps == pipeline.metadata["steps"] == 2, "those of the sample images of its training"
    pipeline("a red circle", on_step=lambda index, step: taken.append(index))
    pipeline("a red circle", steps=3, on_step=lambda index, step: taken.append(index))
    del pipeline.metadata["steps"]
    assert taken == [1, 2, 1, 2, 3] and pipeline.default_steps == 30


def test_guidance_is_used_in_the_interval_of_the_model_unless_another_is_asked_for(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    call: dict[str, Any] = {"seed": 3, "steps": 4, "guidance_scale": 6.0}
    inside, everywhere = (GuidanceConfig(interval=(low, 1.0)) for low in (0.6, 0.0))
    wanted = [pipeline("a red circle", guidance=guidance, **call)[0].tobytes() for guidance in (inside, everywhere)]
    pipeline.metadata["guidance_interval"] = [0.6, 1.0]
    own = pipeline("a red circle", **call)[0].tobytes()
    assert [own, pipeline("a red circle", guidance=everywhere, **call)[0].tobytes()] == wanted
    assert own != wanted[1]
    rescaled = pipeline.with_own_interval(GuidanceConfig(rescale=0.5))
    assert rescaled == GuidanceConfig(rescale=0.5, interval=(0.6, 1.0))


def test_autoguidance_guides_away_from_the_guide_model(tiny_model: Path) -> None:
    pipeline, guide = Pipeline.load(tiny_model), Pipeline.load(tiny_model)
    plain = pipeline("a red circle", steps=3, guidance_scale=1)[0]
    same = pipeline.set_guide_model(guide)("a red circle", steps=3, guidance_scale=4)[0]
    assert abs(pixels(same) - pixels(plain)).max() <= 1  # both predictions are the same
    with torch.no_grad():
        for parameter in guide.unet.parameters():
            parameter.mul_(0.9)
    assert abs(pixels(pipeline("a red circle", steps=3, guidance_scale=4)[0]) - pixels(plain)).max() > 1
    seen = {
        pipeline(prompt, negative_prompt=negative, steps=3, guidance_scale=4)[0].tobytes()
        for prompt in ("a red circle", "a red circle AND a blue ring", "a red circle AND a blue ring :0.5")
        for negative in ("", "a star")
    }
    assert len(seen) == 6
    with torch.no_grad():
        guide.vae.decoder.conv_in.bias.add_(1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="guide model .*model.* vae differs"):
        pipeline.set_guide_model(guide)
    guide.diffusion = Diffusion(DiffusionConfig(prediction="v"))
    with pytest.raises(ValueError, match="guide model .* diffusion differs"):
        pipeline.set_guide_model(guide)
    pipeline.guide_unet, pipeline.diffusion = None, guide.diffusion
    with pytest.raises(ValueError, match="zero_star .*flow.*scaled_linear"):
        pipeline("a star", steps=1, guidance=GuidanceConfig(zero_star=True))


def test_what_is_left_out_is_the_model_s_own_as_on_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    """One default for both; 7.5 for models that record no guidance scale."""
    pipeline = Pipeline.load(tiny_model)
    pipeline.metadata = {**pipeline.metadata, "guidance_scale": 4.5}
    pipeline.save(tmp_path / "model")
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():  # after four steps of training the text has no effect
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    own, same, other = (
        pixels(pipeline("a star", steps=3, **call)[0])  # type: ignore[arg-type]
        for call in ({}, {"guidance_scale": 4.5}, {"guidance_scale": 7.5})
    )
    assert (own == same).all() and (own != other).any()
    pipeline.metadata = {}
    assert (pixels(pipeline("a star", steps=3)[0]) == other).all()
    config = Img2ImgConfig()
    call = {name: p.default for name, p in inspect.signature(Pipeline.__call__).parameters.items()}
    shared = [name for name in call if name in Img2ImgConfig.model_fields]
    assert "sampler" in shared and "steps" in shared and "guidance_scale" in shared and "strength" in shared
    assert {name: call[name] for name in shared} == {name: getattr(config, name) for name in shared}


def test_a_model_is_loaded_on_the_accelerator_of_the_machine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    assert Pipeline.load(tiny_model).device.type == "meta"
    assert Pipeline.load(tiny_model, device="cpu").device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert Pipeline.load(tiny_model).device.type == "cpu"
    with pytest.raises(ValueError, match="device cuda:99 cannot be used here .*: leave out --device"):
        Pipeline.load(tiny_model, device="cuda:99")


# From an image.


def an_image(size: int = 16) -> Image.Image:
    return shapes.render(shapes.scenes("train")[0], size, seed=1)


def test_strength_goes_from_the_image_to_another(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    image = an_image()
    far = []
    unchanged = tensor_to_pil(pipeline.decode(pipeline.prepare_init_image(image, 0.0).latents))[0]
    for strength in (0.0, 0.3, 1.0):
        steps: list[int] = []
        found = pipeline(
            "a star", image=image, strength=strength, steps=10, on_step=lambda n, step, steps=steps: steps.append(n)
        )[0]
        assert len(steps) == round(10 * strength)
        far.append(abs(pixels(found) - pixels(unchanged)).mean())
    assert far[0] == 0 and 0 < far[1] < far[2]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddpm", "unipc"])
def test_inpainting_keeps_what_the_mask_does_not_cover(sampler: str, tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    image, mask = an_image(), Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    call = {"image": image, "strength": 1.0, "steps": 4, "sampler": sampler}
    found = pixels(pipeline("a star", mask=mask, **call)[0])  # type: ignore[arg-type]
    assert (found[:, :8] == pixels(image)[:, :8]).all() and (found[:, 8:] != pixels(image)[:, 8:]).any()
    white = pixels(pipeline("a star", mask=Image.new("L", (16, 16), 255), **call)[0])  # type: ignore[arg-type]
    assert abs(white - pixels(pipeline("a star", **call)[0])).max() <= 1  # type: ignore[arg-type]
    black = pixels(pipeline("a star", mask=Image.new("L", (16, 16), 0), **call)[0])  # type: ignore[arg-type]
    assert (black == pixels(image)).all()


def test_known_latents_arrive_unchanged(tiny_model: Path) -> None:
    """What the mask leaves are the latents of the image, for every sampler, not only after pasting."""
    pipeline = Pipeline.load(tiny_model)
    init_image = pipeline.prepare_init_image(an_image(), 1.0, Image.new("L", (16, 16)))
    noise = initial_noise((4, 4, 4), [0])
    for sampler in SAMPLERS:
        call = {"seeds": [0], "steps": 3, "guidance_scale": 2.0, "sampler": sampler}
        found = final_latents(pipeline.stream(noise, ["a star"], [""], init_image=init_image, **call))  # type: ignore[arg-type]
        torch.testing.assert_close(found, init_image.latents, rtol=1e-5, atol=1e-5)


def test_variations_lie_between_two_seeds(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    one, two = (pixels(pipeline("a star", seed=seed, steps=2)[0]) for seed in (1, 2))
    for strength, want in ((0.0, one), (1.0, two)):
        found = pixels(pipeline("a star", seed=1, variation_seed=2, variation_strength=strength, steps=2)[0])
        assert abs(found - want).max() <= 1
    a, b = initial_noise((4, 8, 8), [1, 2]).split(1)
    assert slerp(a, b, 0.5).std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_inversion_gives_the_image_back(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the optimal network for normal latents, under the flow schedule; more steps miss less."""
    pipeline = Pipeline.load(tiny_model)

    def optimal(z: torch.Tensor, timestep: torch.Tensor, _: object) -> torch.Tensor:
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        return (1 - sigma) * z / ((1 - sigma) ** 2 + sigma**2)

    monkeypatch.setattr(pipeline.unet, "forward", optimal)
    latents = pipeline.prepare_init_image(an_image(), 1.0).latents
    errors = []
    for steps in (10, 160):
        noise = pipeline.invert_image(an_image(), "a star", steps=steps)
        call = {"seeds": [0], "steps": steps, "guidance_scale": 1, "sampler": "euler"}
        again = final_latents(pipeline.stream(noise, ["a star"], [""], **call))  # type: ignore[arg-type]
        errors.append((again - latents).abs().mean().item())
    assert errors[0] < 0.3 and errors[1] < 0.2 * errors[0], errors


def test_bad_images_are_errors(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    for message, call in {
        "strength .*0 and 1.* 1.5": {"image": an_image(), "strength": 1.5},
        "mask is 8x8.* same size": {"image": an_image(), "mask": Image.new("L", (8, 8))},
        "mask is 16x16.* needs an image": {"mask": Image.new("L", (16, 16))},
        "width 18 .*multiples": {"image": an_image(), "width": 18},
        "variation_strength .*0 and 1.* 2": {"variation_seed": 1, "variation_strength": 2.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            pipeline("a star", steps=1, **call)  # type: ignore[arg-type]


def test_an_image_keeps_its_shape_or_gets_the_size_of_the_training(tiny_model: Path) -> None:
    """The tiny model was trained at 16 pixels and divides sides by 8."""
    pipeline = Pipeline.load(tiny_model)
    sizes = {
        ((24, 16), None, None): (24, 16),  # as it is
        ((8, 8), None, None): (8, 8),
        ((1000, 750), None, None): (16, 16),  # too large
        ((20, 18), None, None): (16, 16),  # not supported
        ((1000, 500), 64, None): (64, 32),
        ((1000, 330), None, 32): (96, 32),
        ((1000, 2), 64, None): (64, 8),
        ((24, 16), 16, 32): (16, 32),
    }
    for (size, width, height), want in sizes.items():
        assert pipeline.image_size(width, height, Image.new("RGB", size)) == want, (size, width, height)
    assert pipeline.image_size(None, 32) == (16, 32) and pipeline.image_size() == (16, 16)


def test_images_of_any_mode_are_taken(tiny_model: Path) -> None:
    """Upright and on white, as training sees them; a mask keeps what is clear in it."""
    pipeline, scene = Pipeline.load(tiny_model), an_image()
    turned = scene.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    clear = Image.merge("RGBA", [*scene.split(), Image.new("L", scene.size, 255)])
    clear.paste((0, 0, 0, 0), (0, 0, 4, 16))
    white = scene.copy()
    white.paste("white", (0, 0, 4, 16))
    mask = Image.new("LA", (16, 16), (255, 0))  # white, but clear
    mask.paste((255, 255), (8, 0, 16, 16))
    opaque = Image.new("L", (16, 16))
    opaque.paste(255, (8, 0, 16, 16))
    for found, want in (
        ({"image": turned}, {"image": scene}),
        ({"image": clear}, {"image": white}),
        ({"image": scene.quantize(8)}, {"image": scene.quantize(8).convert("RGB")}),
        ({"image": scene, "mask": mask}, {"image": scene, "mask": opaque}),
        ({"image": scene, "mask": opaque.convert("1")}, {"image": scene, "mask": opaque}),
        (
            {"image": scene, "mask": Image.fromarray(257 * np.asarray(opaque, np.uint16))},
            {"image": scene, "mask": opaque},
        ),
    ):
        one, two = (pipeline("a star", steps=2, **call)[0] for call in (found, want))  # type: ignore[arg-type]
        assert one == two, found


def test_tiles_are_decoded_without_seams(tiny_model: Path) -> None:
    """Against the whole: no pixel is far off, and the borders of tiles are not worse than the rest."""
    pipeline = Pipeline.load(tiny_model)
    latents = torch.nn.functional.interpolate(initial_noise((4, 6, 6), [3]), scale_factor=4, mode="bilinear")
    with torch.no_grad():
        whole, tiled = pipeline.decode(latents), pipeline.decode(latents, tile=8)
    assert tiled.shape == whole.shape == (1, 3, 96, 96)
    difference = (whole - tiled).abs()
    assert difference.max() < 0.25
    jumps = (tiled - whole).diff(dim=-1).abs().mean((0, 1, 2))
    assert jumps.max() < 4 * jumps.mean() + 1e-3
    with torch.no_grad():
        assert torch.equal(pipeline.decode(latents, tile=24), whole)


def test_previews_look_like_the_image(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    latents = pipeline.prepare_init_image(an_image(32), 1.0).latents
    whole = tensor_to_pil(pipeline.decode(latents))[0].resize((8, 8), Image.Resampling.BOX)
    preview = pipeline.preview(latents)[0]
    assert preview.size == (8, 8)
    error = pixels(preview) - pixels(whole)
    assert (error**2).mean() < 0.1 * pixels(whole).var()


def test_a_distilled_decoder_gives_previews_of_the_whole_size(tiny_model: Path, tmp_path: Path) -> None:
    """It is as good as the VAE's own decoder to some dB, is kept beside the model, and belongs to its VAE."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    distill_decoder.main(["--model", str(model), "--run", str(tmp_path / "run"), "--steps=300", "--warmup-steps=20"])
    measured = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["validation_psnr"]
    pipeline = Pipeline.load(model)
    images = [shapes.render(scene, 16, seed=0) for scene in shapes.scenes("test")[:32]]
    latents = pipeline.encode(torch.stack([pil_to_tensor(image, 3) for image in images]))
    whole, previews = tensor_to_pil(pipeline.decode(latents)), pipeline.preview(latents)
    assert previews[0].size == (16, 16) and measured > 20
    small = [image.resize((16, 16), Image.Resampling.BILINEAR) for image in pipeline.linear_preview(latents)]
    errors = [
        sum(((pixels(a) - pixels(b)) ** 2).mean() for a, b in zip(made, whole, strict=True))
        for made in (previews, small)
    ]
    assert errors[0] < errors[1]
    with safe_open(model / "preview.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, model / "preview.safetensors", {"vae_sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"preview.safetensors imitates another VAE .* run scripts/distill_decoder.py"):
        Pipeline.load(model).preview(latents)
    (model / "preview.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"preview.safetensors is damaged .*: run scripts/distill_decoder.py again"):
        Pipeline.load(model).preview(latents)

"""Training that starts from the weights of a finished model: one's own, a diffusers folder, a single file."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_same, copy_stages_before, train
from safetensors.torch import load_file

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import compvis, diffusers
from ldm.interop.components import ModelComponents
from ldm.io.tensors import init_weights
from ldm.pipeline import Pipeline
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

NO_STEP = ["--steps", "1", "--learning-rate", "1e-30", "--warmup-steps", "0"]  # weights stay what they were


def test_train_ldm_starts_from_a_finished_model(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    model = train("ldm", tmp_path / "ldm", "--init-from", str(tiny_runs / "ldm/model"), "--seed", "5", *NO_STEP)
    want, found = (load_file(folder / "unet.safetensors") for folder in (tiny_runs / "ldm/model", model))
    assert want.keys() == found.keys() and all(torch.allclose(want[n], found[n], atol=1e-6) for n in want)


def test_train_vae_starts_from_a_finished_vae_or_pipeline(tiny_runs: Path, tmp_path: Path) -> None:
    want = load_file(tiny_runs / "vae/model/vae.safetensors")
    for name in ("vae", "ldm"):
        source = str(tiny_runs / name / "model")
        model = train("vae", tmp_path / name, "--init-from", source, "--seed", "5", *NO_STEP)
        found = load_file(model / "vae.safetensors")
        assert all(torch.allclose(want[n], found[n], atol=1e-6) for n in want if not n.startswith("latent_"))


TOWER = {
    "embed_dim": 64,
    "quick_gelu": True,
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of the kind of Stable Diffusion 1, as a diffusers folder and as a single file."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 1), num_res_blocks=1, transformer_depth=(1, 0),
                           num_heads=(8, 8), context_dim=64))  # fmt: skip
    vae = VAE(VAEConfig(base_channels=32, channel_mult=(1, 1), num_res_blocks=1))
    text = TextConditioner(TextEncoder.random(TextConfig(pad_token_id=49407), TOWER))
    components = ModelComponents(unet, Diffusion(DiffusionConfig()), vae, text, 16)
    diffusers.write(components, folder / "diffusers")
    compvis.write(components, folder / "file.safetensors")
    return {"diffusers": folder / "diffusers", "file": folder / "file.safetensors"}


@pytest.mark.parametrize("form", ["diffusers", "file"])
def test_a_stable_diffusion_model_is_fine_tuned(form: str, foreign: dict[str, Path], tmp_path: Path) -> None:
    """As the README says: converted for its VAE and text tower, then trained on from either form."""
    source, model = Pipeline.load(foreign[form]), tmp_path / "model"
    source.save(model)
    start = ["--init-from", str(foreign[form]), *NO_STEP]
    sizes = "--vae.channel-mult 1 1 --vae.num-res-blocks 1 --vae.patch-size 1 --vae.mid-attention"
    vae = train("vae", tmp_path / "vae", *sizes.split(), *start)
    sizes = "--unet.model-channels 64 --unet.channel-mult 1 1 --unet.transformer-depth 1 0 --unet.num-heads 8 8"
    sizes += " --unet.context-dim 64 --unet.pooled-dim 0 --unet.num-res-blocks 1 --unet.mid-transformer-depth 1"
    sizes += " --unet.no-scale-shift-norm --unet.no-coord-conv --unet.norm-min-group-channels 1"
    frozen = f"--vae {model} --text.model local-dir:{model}/text --text.pad-token-id 49407 --text.layer last"
    ldm = train("ldm", tmp_path / "ldm", *sizes.split(), *frozen.split(), "--text.no-use-pooled", *start)
    want, found = source.unet.state_dict(), Pipeline.load(ldm).unet.state_dict()
    assert all(torch.allclose(want[name], found[name], atol=1e-6) for name in want)
    assert source.vae is not None
    want, found = source.vae.state_dict(), load_file(vae / "vae.safetensors")
    assert all(torch.allclose(want[name], found[name], atol=1e-6) for name in want if not name.startswith("latent_"))


def test_other_settings_are_named(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    flags = ["--init-from", str(tiny_runs / "ldm/model"), "--unet.model-channels", "64"]
    with pytest.raises(SystemExit, match=r"ldm/model has model_channels 32, here 64: they must be equal"):
        train("ldm", tmp_path / "ldm", *flags)
    with pytest.raises(SystemExit, match=r"vae/model has latent_channels 4, here 8"):
        train("vae", tmp_path / "other", "--init-from", str(tiny_runs / "vae/model"), "--vae.latent-channels", "8")


def test_what_the_unet_has_to_learn_anew_is_printed(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    flags = ["--init-from", str(tiny_runs / "ldm/model"), *NO_STEP]
    train("ldm", tmp_path / "same", *flags)
    assert "anew" not in capsys.readouterr().out
    vae = train("vae", tmp_path / "other_vae", "--steps", "1")
    train("ldm", tmp_path / "ldm", *flags, "--vae", str(vae), "--diffusion.prediction", "v")
    printed = capsys.readouterr().out
    assert "ldm/model has prediction x0, here v; another VAE: its U-Net has to learn that anew" in printed


def test_a_resumed_run_does_not_read_the_model_that_it_started_from(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    for stage in ("vae", "ldm"):
        start, run = tmp_path / "start", tmp_path / f"new_{stage}"
        shutil.copytree(tiny_runs / stage / "model", start)
        train(stage, run, "--init-from", str(start), "--steps", "2", "--checkpoint-every", "1")
        shutil.rmtree(start)
        train(stage, run, "--init-from", str(start), "--resume", "latest", "--steps", "4")


def test_a_unet_of_other_dimensions_is_refused_before_the_data_are_opened(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    with pytest.raises(SystemExit, match=r"unet\.in_channels is 5.*--unet\.in-channels 4"):
        train("ldm", tmp_path / "ldm", "--unet.in-channels", "5", "--data.source", str(tmp_path / "missing"))


def test_widened_input_channels_start_at_zero() -> None:
    config = UNetConfig(model_channels=32, channel_mult=(1,), transformer_depth=(0,), num_heads=(1,), context_dim=0,
                        mid_transformer_depth=0)  # fmt: skip
    narrow, wide = UNet(config), UNet(config.model_copy(update={"cond_channels": 5}))
    init_weights(wide, narrow.state_dict(), Path("narrow"))
    assert not wide.conv_in.weight[:, 4:].any()
    assert_same({"w": narrow.conv_in.weight}, {"w": wide.conv_in.weight[:, :4]})

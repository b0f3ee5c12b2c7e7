"""What benchmarks/run.py compares: actions of ours, and the same of diffusers on the same weights and inputs."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import CONFIGS
from ldm.diffusion.process import Diffusion
from ldm.interop.components import ModelComponents
from ldm.interop.diffusers import write
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise
from ldm.planning.planner import read_recipe
from ldm.precision import DTYPES, Precision
from ldm.rng import generator
from ldm.stages.diffusion import TrainLDMConfig
from ldm.text import TextEncoder, combine_encoders
from ldm.unet import UNet
from ldm.vae import VAE

SCRIPTS = Path(__file__).parents[1] / "scripts"
PROMPT = "a photograph of an astronaut riding a horse"
SAMPLING_STEPS = 50
GUIDANCE_SCALE = 7.5
TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
OURS, THEIRS, COMPILED = "ldm", "diffusers", ", compiled"
THEIR_PROCESS = """
import sys
from diffusers import StableDiffusionPipeline
folder, prompt, steps, out = sys.argv[1:]
StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=int(steps)).images[0].save(out)
"""

Action = Callable[[], Tensor]
Network = TypeVar("Network", bound=nn.Module)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, over that of the other."""
    return ((one.float() - other.float()).square().mean() / other.float().square().mean()).sqrt().item()


def mean_difference(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference."""
    return (one - other).abs().mean().item()


class Comparison(NamedTuple):
    """One action, as several do it, ours first: what they return must be equal, up to `tolerance`."""

    ways: dict[str, Action]  # by whose it is
    tolerance: float | None  # of the difference; None: they cannot be equal
    difference: Callable[[Tensor, Tensor], float] = relative_difference
    in_processes: bool = False  # of their own, whose memory cannot be counted


class Pair(NamedTuple):
    """Pipelines of the same weights: ours, of which a compiled one comes first, and theirs."""

    ours: dict[str, Pipeline]
    theirs: dict[str, StableDiffusionPipeline]
    device: torch.device
    precision: Precision
    folder: Path  # of these weights, as diffusers reads them

    @property
    def ours_first(self) -> Pipeline:
        """One of ours, for what all have in common."""
        return next(iter(self.ours.values()))

    def randn(self, *shape: int) -> Tensor:
        """The same numbers on every device, in the precision of the networks."""
        numbers = torch.randn(*shape, generator=generator(0, "benchmark", *shape))
        return numbers.to(self.device, DTYPES[self.precision])

    def compare(
        self,
        ours: Callable[[Pipeline], Tensor],
        theirs: Callable[[StableDiffusionPipeline], Tensor],
        *,
        compiled: bool = True,
    ) -> Comparison:
        """What has no gradients, by all or by those that are not compiled; equal as far as the precision goes."""
        mine: dict[str, Action] = {name: torch.no_grad()(lambda p=p: ours(p)) for name, p in self.ours.items()}
        others: dict[str, Action] = {name: torch.no_grad()(lambda p=p: theirs(p)) for name, p in self.theirs.items()}
        ways = {name: way for name, way in (mine | others).items() if compiled or not name.endswith(COMPILED)}
        return Comparison(ways, TOLERANCES[self.precision])


@contextmanager
def make_pair(
    recipe: Path, device: torch.device, *, precision: Precision = "float32", compiled: bool = False
) -> Iterator[Pair]:
    """Networks of a recipe with random weights, as ours and as those of diffusers; with `compiled` also compiled."""
    with tempfile.TemporaryDirectory() as name:
        write_weights(recipe, read_recipe(recipe / "ldm.yaml"), folder := Path(name))
        yield Pair(*load_pair(folder, device, precision, compiled=compiled), device, precision, folder)


def write_weights(recipe: Path, ldm: TrainLDMConfig, folder: Path) -> None:
    """Random weights of a recipe, with the U-Net that `ldm` describes, as diffusers reads them."""
    vae, clip = read_recipe(recipe / "vae.yaml").vae, recipe / "clip.yaml"
    architecture = read_recipe(clip).clip.architecture(ldm.data.resolution) if clip.is_file() else None
    text = combine_encoders([TextEncoder.random(ldm.text, architecture)])
    unet, diffusion = randomized(UNet(ldm.unet)), Diffusion(ldm.diffusion)
    write(ModelComponents(unet, diffusion, randomized(VAE(vae)), text, ldm.data.resolution), folder)


def load_pair(
    folder: Path, device: torch.device, precision: Precision, *, compiled: bool
) -> tuple[dict[str, Pipeline], dict[str, StableDiffusionPipeline]]:
    """What reads a folder of diffusers: ours, and theirs as it comes and as their documentation makes it fast."""
    dtype = DTYPES[precision]
    ours = {OURS: Pipeline.load(folder, device=device, precision=precision)}
    theirs = {THEIRS: StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)}
    if compiled:
        ours = {OURS + COMPILED: Pipeline.load(folder, device=device, precision=precision).compile(), **ours}
        fast = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        fast.fuse_qkv_projections()
        for network in (fast.unet, fast.vae):
            network.to(memory_format=torch.channels_last)
        mode = "reduce-overhead" if device.type == "cuda" else None
        fast.unet = torch.compile(fast.unet, mode=mode, fullgraph=True)
        fast.vae.decode = torch.compile(fast.vae.decode, mode=mode, fullgraph=True)
        theirs[THEIRS + COMPILED] = fast
    for pipeline in theirs.values():
        pipeline.set_progress_bar_config(disable=True)
    return ours, theirs


def randomized(network: Network) -> Network:
    """Without layers of zeros, behind which all networks are equal."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return network


# Networks.


def unet_forward(pair: Pair, batch: int) -> Comparison:
    """A forward pass, with a context of 77 tokens."""
    ours = pair.ours_first
    config, side = ours.unet.config, ours.resolution // ours.vae_factor
    z, context = pair.randn(batch, config.in_channels, side, side), pair.randn(batch, 77, config.context_dim)
    t = torch.full((batch,), 500.0, device=pair.device)
    return pair.compare(
        lambda pipeline: pipeline.unet(z, t, Conditioning(context)),
        lambda pipeline: pipeline.unet(z, t, context).sample,
    )


def vae_encode(pair: Pair, side: int) -> Comparison:
    """The mean of the posterior of an image."""
    image = pair.randn(1, vae_of(pair).image_channels, side, side).clamp(-1, 1)
    return pair.compare(
        lambda pipeline: pipeline.vae.encode(image).mean,  # type: ignore[union-attr]
        lambda pipeline: pipeline.vae.encode(image).latent_dist.mean,
        compiled=False,
    )


def vae_decode(pair: Pair, side: int) -> Comparison:
    """An image of a latent."""
    vae = vae_of(pair)
    latents = pair.randn(1, vae.latent_channels, *[side // vae.factor] * 2)
    return pair.compare(
        lambda pipeline: pipeline.vae.decode(latents),  # type: ignore[union-attr]
        lambda pipeline: pipeline.vae.decode(latents).sample,
    )


def vae_of(pair: Pair) -> Any:
    """The configuration of the VAE."""
    vae = pair.ours_first.vae
    assert vae is not None
    return vae.config


def encode_text(pair: Pair, batch: int) -> Comparison:
    """Hidden states of prompts, with their tokens."""
    prompts = [f"{PROMPT}, number {i}" for i in range(batch)]
    return pair.compare(
        lambda pipeline: pipeline.text.encode_prompts(prompts).hidden_states,  # type: ignore[union-attr]
        lambda pipeline: pipeline.encode_prompt(prompts, pair.device, 1, do_classifier_free_guidance=False)[0],
        compiled=False,
    )


# A prompt to an image.


def prompt_to_image(pair: Pair, steps: int = SAMPLING_STEPS) -> Comparison:
    """DDIM with guidance: from the same noise the image is the same, within 1 of 255 on average."""
    first = pair.ours_first
    side = first.resolution // first.vae_factor
    noise = initial_noise((first.unet.config.in_channels, side, side), [0]).to(pair.device, DTYPES[pair.precision])
    mine: dict[str, Any] = {"steps": steps, "guidance_scale": GUIDANCE_SCALE, "sampler": "ddim", "eta": 0.0, "seed": 0}
    others = {"num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE, "latents": noise, "eta": 0.0}
    found = pair.compare(
        lambda pipeline: pixels(pipeline(PROMPT, **mine)[0]),
        lambda pipeline: pixels(pipeline(PROMPT, **others).images[0]),
    )
    return found._replace(tolerance=1.0, difference=mean_difference)


def pixels(image: Image.Image) -> Tensor:
    """An image as numbers from 0 to 255."""
    return torch.from_numpy(np.asarray(image, np.float32))


# Processes.


def first_image(pair: Pair, steps: int = 1) -> Comparison:
    """From the start of a process on a CPU to the image on the disk; the noise is not the same."""

    def run(folder: Path, *words: str) -> Tensor:
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return pixels(Image.open(folder / "00000.png"))

    def ours() -> Tensor:
        with tempfile.TemporaryDirectory() as out:
            where = ("--model", str(pair.folder), "--out", out, "--device", "cpu")
            return run(Path(out), str(SCRIPTS / "txt2img.py"), PROMPT, "--steps", str(steps), *where)

    def theirs() -> Tensor:
        with tempfile.TemporaryDirectory() as out:
            return run(Path(out), "-c", THEIR_PROCESS, str(pair.folder), PROMPT, str(steps), f"{out}/00000.png")

    return Comparison({OURS: ours, THEIRS: theirs}, None, in_processes=True)


def first_step() -> Comparison:
    """From the start of a process to the first step of a VAE of shapes, against a process that loads torch alone."""

    def ours() -> Tensor:
        with tempfile.TemporaryDirectory() as name:
            log, recipe = Path(name) / "log.jsonl", str(CONFIGS / "shapes/vae.yaml")
            words = [
                sys.executable,
                str(SCRIPTS / "train_vae.py"),
                "--config",
                recipe,
                "--run",
                name,
                "--log-every",
                "1",
            ]
            with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while not (has_step := log.is_file() and log.stat().st_size > 0) and process.poll() is None:
                    time.sleep(0.01)
                process.kill()
            if not has_step:
                raise RuntimeError("train_vae.py took no step")
        return torch.zeros(())

    return Comparison({OURS: ours, "import torch": import_torch}, None, in_processes=True)


def help_text(script: str) -> Comparison:
    """`--help`, against a process that loads torch alone."""

    ways: dict[str, Action] = {OURS: lambda: run_python(str(SCRIPTS / script), "--help"), "import torch": import_torch}
    return Comparison(ways, None, in_processes=True)


def import_torch() -> Tensor:
    """What each process that uses torch takes."""
    return run_python("-c", "import torch")


def run_python(*words: str) -> Tensor:
    """A process whose output is of no interest."""
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return torch.zeros(())

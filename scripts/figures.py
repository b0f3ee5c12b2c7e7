"""Draw the pictures of the documentation with a trained model."""

from collections.abc import Sequence
from pathlib import Path

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import image_batches
from ldm.evaluation import figures
from ldm.imaging import captioned_grid
from ldm.io import model_dir
from ldm.pipeline import Pipeline

PROMPTS = (
    "a large red star in the center on a white background",
    "a small blue ring in the top left corner on a yellow background",
    "a large green triangle in the bottom right corner on a black background",
    "a small white cross in the center on a purple background",
    "a large orange circle in the top right corner on a blue background",
    "a small black square in the bottom left corner on an orange background",
    "a large purple ring in the center on a green background",
    "a small yellow star in the bottom right corner on a red background",
)


CHANGED = (
    "a large red circle in the top left corner on a blue background",
    "a large yellow star in the bottom right corner on a blue background",
    (
        "a large green circle in the top left corner on a blue background",
        "a large red star in the top left corner on a blue background",
        "a large red circle in the top left corner on a yellow background",
        "a small red circle in the top left corner on a blue background",
        "a large red circle in the top right corner on a blue background",
    ),
)


class FiguresConfig(ScriptConfig):
    """Settings of figures."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    out: Path = Path("docs/pictures")
    prompts: tuple[str, ...] = ()
    """draw these alone, one a row with the seeds 0 to 3, as prompts.png"""


def draw(config: FiguresConfig) -> None:
    """Write samples, noising, denoising, latents, guidance and changes as PNG files, or prompts alone."""
    folder = config.model or model_dir.latest_model("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder)
    config.out.mkdir(parents=True, exist_ok=True)
    if config.prompts:
        figures.prompts(pipeline, config.prompts).save(config.out / "prompts.png")
        return
    held_out = open_dataset(DataConfig(**pipeline.metadata["data"]), "test", seed=0)
    images = next(image_batches(held_out, held_out.evenly_spaced(3)))
    scale = pipeline.metadata["guidance_scale"]
    painted = [pipeline(prompt, guidance_scale=scale, seed=seed)[0] for seed, prompt in enumerate(PROMPTS)]
    captioned_grid(painted, PROMPTS, columns=4).save(config.out / "samples.png")
    figures.noising(images, pipeline.diffusion).save(config.out / "noising.png")
    figures.denoising(pipeline, PROMPTS[:3]).save(config.out / "denoising.png")
    figures.guidance(pipeline, PROMPTS[1], (0, 1, scale, 12)).save(config.out / "guidance.png")
    figures.edits(pipeline, *CHANGED).save(config.out / "changes.png")
    if pipeline.vae is not None:
        figures.latents(pipeline, images).save(config.out / "latents.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(FiguresConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        draw(config)


if __name__ == "__main__":
    main()

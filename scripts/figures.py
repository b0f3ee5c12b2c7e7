"""Draw the pictures of the documentation with a trained model."""

from collections.abc import Sequence
from pathlib import Path

from ldm import figures, folders
from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.data import DataConfig, open_dataset
from ldm.data.order import image_batches
from ldm.pictures import captioned
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


class Figures(ScriptConfig):
    """Settings of figures."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    out: Path = Path("docs/pictures")
    prompts: tuple[str, ...] = ()
    """draw these alone, one a row with the seeds 0 to 3, as prompts.png"""


def draw(config: Figures) -> None:
    """Write samples, noising, denoising, latents, guidance and changes as PNG files, or prompts alone."""
    folder = config.model or folders.newest("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder)
    config.out.mkdir(parents=True, exist_ok=True)
    if config.prompts:
        figures.prompts(pipeline, config.prompts).save(config.out / "prompts.png")
        return
    held_out = open_dataset(DataConfig(**pipeline.about["data"]), "test", seed=0)
    images = next(image_batches(held_out, held_out.spread(3)))
    scale = pipeline.about["guidance_scale"]
    painted = [pipeline(prompt, guidance_scale=scale, seed=seed)[0] for seed, prompt in enumerate(PROMPTS)]
    captioned(painted, PROMPTS, columns=4).save(config.out / "samples.png")
    figures.noising(images, pipeline.process).save(config.out / "noising.png")
    figures.denoising(pipeline, PROMPTS[:3]).save(config.out / "denoising.png")
    figures.guidance(pipeline, PROMPTS[1], (0, 1, scale, 12)).save(config.out / "guidance.png")
    figures.changes(pipeline, *CHANGED).save(config.out / "changes.png")
    if pipeline.vae is not None:
        figures.latents(pipeline, images).save(config.out / "latents.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Figures, argv, default=None, description=__doc__)
    with errors_for_people():
        draw(config)


if __name__ == "__main__":
    main()

"""Train a small OpenCLIP from nothing on the images and captions of a data set."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm import folders
from ldm.config import errors_for_people, parse
from ldm.data import DataConfig, collate, open_dataset
from ldm.data.order import first_samples
from ldm.keyed import Draws
from ldm.text.contrastive import CLIP, CLIPConfig, clip_loss, retrieval_accuracy
from ldm.training.loop import Batch, Fit, Hooks, Player, Stage, TrainingConfig, fit, gather_of, make_accelerator

DEFAULT = Path(__file__).parents[1] / "configs/shapes/clip.yaml"


class TrainCLIP(TrainingConfig):
    """Settings of train_clip."""

    run: Path = Path("runs/shapes/clip")
    data: DataConfig = DataConfig()
    clip: CLIPConfig = CLIPConfig()


def train(config: TrainCLIP, fit: Fit = fit) -> Path:
    """Build the stage and run it, with `fit` or with what looks at it in its place; returns the model folder."""
    if config.accumulate > 1:
        raise ValueError(
            "accumulate: the contrastive loss compares all images of a batch; leave it at 1 for train_clip"
        )
    if config.data.bucket_step:
        raise ValueError("data.bucket_step: the image tower takes squares; leave it at 0 for train_clip")
    accelerator = make_accelerator(config)
    data, held_out = (open_dataset(config.data, split, seed=config.seed) for split in ("train", "test"))
    accelerator.print(data.describe())
    clip = CLIP(config.clip.architecture(config.data.size))
    criterion = clip_loss(rank=accelerator.process_index, world=accelerator.num_processes)
    fixed = collate(first_samples(held_out, 128))

    def loss(module: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        ids = clip.tokenizer(batch["caption"]).to(batch["image"].device)
        return {"loss": criterion(**module(batch["image"], ids))}

    def validate() -> dict[str, float]:
        images = fixed["image"].to(accelerator.device)
        return {"validation_retrieval": retrieval_accuracy(clip, images, fixed["caption"])}

    def save_model(folder: Path) -> None:
        clip.save(folder)
        folders.write_model(folder, "text tower", {"data": config.data.source})

    stage = Stage(
        players=[Player("clip", clip, loss)],
        data=data,
        collate=collate,
        hooks=Hooks(
            validate=validate,
            sample=lambda: None,
            save_model=save_model,
            check=lambda: data.share_unreadable(gather_of(accelerator)),
        ),
        identity={"data": data.identity(), "clip": config.clip.to_dict()},
        order=data.order,
    )
    try:
        return fit(config, accelerator, stage)
    finally:
        accelerator.print(f"{data.report()}\n{held_out.report()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(TrainCLIP, argv, default=DEFAULT, description=__doc__)
    with errors_for_people():
        train(config)


if __name__ == "__main__":
    main()

"""Train a small OpenCLIP from nothing on the images and captions of a data set."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm.cli import exit_on_user_error, parse_cli
from ldm.data import DataConfig, collate, open_dataset
from ldm.data.batch_sampler import first_samples
from ldm.io import model_dir
from ldm.rng import StepRNG
from ldm.text.clip import CLIP, CLIPConfig, clip_loss, retrieval_accuracy
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator, make_gather
from ldm.training.stage import Batch, Fit, Stage, StageCallbacks, Trainable
from ldm.training.trainer import fit

DEFAULT = Path(__file__).parents[1] / "configs/shapes/clip.yaml"


class TrainCLIPConfig(TrainingConfig):
    """Settings of train_clip."""

    run: Path = Path("runs/shapes/clip")
    data: DataConfig = DataConfig()
    clip: CLIPConfig = CLIPConfig()


def train(config: TrainCLIPConfig, fit: Fit = fit) -> Path:
    """Build the stage and run it, with `fit` or with what looks at it in its place; returns the model folder."""
    if config.grad_accum_steps > 1:
        raise ValueError(
            "accumulate: the contrastive loss compares all images of a batch; leave it at 1 for train_clip"
        )
    if config.data.bucket_step:
        raise ValueError("data.bucket_step: the image tower takes squares; leave it at 0 for train_clip")
    accelerator = make_accelerator(config)
    data, held_out = (open_dataset(config.data, split, seed=config.seed) for split in ("train", "test"))
    accelerator.print(data.describe())
    clip = CLIP(config.clip.architecture(config.data.resolution))
    criterion = clip_loss(rank=accelerator.process_index, world=accelerator.num_processes)
    fixed = collate(first_samples(held_out, 128))

    def loss(module: nn.Module, batch: Batch, draws: StepRNG) -> dict[str, Tensor]:
        ids = clip.tokenizer(batch["caption"]).to(batch["image"].device)
        return {"loss": criterion(**module(batch["image"], ids))}

    def validate() -> dict[str, float]:
        images = fixed["image"].to(accelerator.device)
        return {"validation_retrieval": retrieval_accuracy(clip, images, fixed["caption"])}

    def save_model(folder: Path) -> None:
        clip.save(folder)
        model_dir.write_manifest(folder, "text tower", {"data": config.data.source})

    stage = Stage(
        trainables=[Trainable("clip", clip, loss)],
        data=data,
        collate=collate,
        hooks=StageCallbacks(
            validate=validate,
            sample=lambda: None,
            save_model=save_model,
            check=lambda: data.sync_unreadable(make_gather(accelerator)),
        ),
        fingerprint={"data": data.fingerprint(), "clip": config.clip.to_dict()},
        make_batch_sampler=data.make_batch_sampler,
    )
    try:
        return fit(config, accelerator, stage)
    finally:
        accelerator.print(f"{data.report()}\n{held_out.report()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(TrainCLIPConfig, argv, default=DEFAULT, description=__doc__)
    with exit_on_user_error():
        train(config)


if __name__ == "__main__":
    main()

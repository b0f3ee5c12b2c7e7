"""What several test files share: tiny recipes that train in seconds, a toy stage, and readers of what runs write."""

import io
import itertools
import json
import os
import random
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.cli import command, parse_cli
from ldm.config import CONFIGS
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.data.sources import shapes
from ldm.io.atomic import write_tensors
from ldm.planning.checks import DoctorCheck
from ldm.planning.doctor import examine
from ldm.ranks import Ranks
from ldm.rng import StepRNG
from ldm.stages import STAGES
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator
from ldm.training.stage import Batch, Networks, Stage, Trainable
from ldm.training.trainer import FitResult, Trainer, fit
from ldm.training.trainer import train as train_stage

# Tiny recipes.

# Not 10,000 images, where a test does not ask for a number.
num_rows = shapes.num_rows
shapes.num_rows = lambda split, *, pairs=False: num_rows(split, pairs=True) if pairs else 320
STAGE_NAMES = ("clip", "vae", "ldm")
for name in STAGE_NAMES:  # tests start from the recipe of shapes, which is the smallest
    STAGES[name].default = CONFIGS / f"shapes/{name}.yaml"
COMMON = "--steps 4 --batch-size 8 --warmup-steps 1 --data.resolution 16 --checkpoint-every 2 --log-every 1"
TINY = {
    "clip": "--clip.context-length 24 --clip.width 32 --clip.num-layers 1 --clip.num-heads 2 --clip.embed-dim 16",
    "vae": "--vae.base-channels 32 --vae.latent-channels 4",
    "ldm": "--sample-steps 2 --unet.patch-size 1 --unet.model-channels 32 --unet.channel-mult 1 2 "
    "--unet.transformer-depth 0 1 --unet.num-heads 2 2 --unet.in-channels 4 --unet.context-dim 32 --unet.pooled-dim 16",
}
OnStep = Callable[[Trainer], None]


def nothing(trainer: Trainer) -> None:
    """What happens after a step of a test that lets nothing happen."""


def tiny_flags(stage: str, run_dir: Path, *flags: str) -> list[str]:
    """The command line of the tiny recipe of a stage."""
    return ["--run", str(run_dir), *COMMON.split(), *TINY[stage].split(), *flags]


def train(
    stage: str,
    run_dir: Path,
    *flags: str,
    on_step: OnStep = nothing,
    wrap: Callable[[Stage], Stage] = lambda stage: stage,
) -> Path:
    """Train the tiny recipe in this process as the script does; returns the model folder.

    `on_step` is called after each step, `wrap` may change the stage that was built.
    """

    def action(config: Any) -> None:
        result: FitResult = train_stage(Wrapped(stage, wrap), config, fit=partial(fit, on_step=on_step))
        if result.exit_status:
            raise SystemExit(result.exit_status)

    command(STAGES[stage].Config, action, "", default=STAGES[stage].default)(tiny_flags(stage, run_dir, *flags))
    return run_dir / "model"


def on_ranks(count: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """What an action returns on each of several ranks, which are threads."""
    lists: list[list[Any]] = [[] for _ in range(count)]
    met = threading.Barrier(count)

    def gather(rank: int, own: list[Any]) -> list[Any]:
        lists[rank] = own
        met.wait()
        joined = list(itertools.chain(*lists))
        met.wait()
        return joined

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: action(Ranks(rank, count, partial(gather, rank))), range(count)))


def accelerator_on(device: torch.device) -> Any:
    """What stages ask of an accelerator."""
    values = {
        "device": device,
        "is_main_process": True,
        "process_index": 0,
        "num_processes": 1,
        "mixed_precision": "no",
    }
    return SimpleNamespace(
        **values,
        distributed_type=DistributedType.NO,
        scaler=None,
        print=print,
        wait_for_everyone=lambda: None,
        init_trackers=lambda *args, **options: None,
        prepare_optimizer=lambda optimizer: SimpleNamespace(
            optimizer=optimizer, param_groups=optimizer.param_groups, zero_grad=optimizer.zero_grad
        ),
        prepare_model=lambda module, evaluation_mode: module,
        autocast=nullcontext,
        no_sync=nullcontext,
        backward=lambda loss: loss.backward(),
        reduce=lambda values, kind: values,
    )


def build_stage(name: str, run: Path, *flags: str, device: torch.device) -> Any:
    """A tiny stage, with data, its trainables on the device as the loop puts them there."""
    stage_class = STAGES[name]
    quick = ["--no-cache-latents", "--sample-prompts", "a star"] if name == "ldm" else []
    argv = tiny_flags(name, run, *quick, *flags)
    config = parse_cli(stage_class.Config, argv, default=stage_class.default, description="")
    stage = stage_class.build(config, accelerator_on(device))
    stage.open_data(accelerator_on(device))
    for trainable in stage.trainables:
        trainable.module.to(device)
    return stage


def train_recipe(recipe: str, stage: str, run_dir: Path, *flags: str) -> Path:
    """Train a recipe of configs/ for one step of two samples; returns the model folder."""
    source = ["--config", str(CONFIGS / recipe / f"{stage}.yaml"), "--run", str(run_dir)]
    few = ["--steps", "1", "--batch-size", "2", "--warmup-steps", "0"]
    default = STAGES[stage].default
    action = partial(train_stage, STAGES[stage])
    command(STAGES[stage].Config, lambda c: action(c).exit_status, "", default=default)([*source, *few, *flags])
    return run_dir / "model"


def examine_tiny(
    stage: str,
    run_dir: Path,
    *flags: str,
    on_step: OnStep = nothing,
    wrap: Callable[[Stage], Stage] = lambda stage: stage,
) -> list[DoctorCheck]:
    """Run the doctor in this process on the tiny recipe."""
    config = parse_cli(STAGES[stage].Config, tiny_flags(stage, run_dir, *flags), default=STAGES[stage].default,
                       description="")  # fmt: skip
    train_step = Trainer.train_step

    def step(trainer: Trainer, batches: Any) -> None:
        train_step(trainer, batches)
        on_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        return examine(Wrapped(stage, wrap), config)


class Wrapped:
    """A stage class whose built stage goes through a function."""

    def __init__(self, stage: str, wrap: Callable[[Stage], Stage]) -> None:
        self.stage_class, self.wrap = STAGES[stage], wrap

    def build(self, config: Any, accelerator: Any) -> Stage:
        """The stage, wrapped."""
        return self.wrap(self.stage_class.build(config, accelerator))


def copy_stages_before(stage: str, runs: Path, target: Path) -> None:
    """Copy the finished runs that a stage needs."""
    for other in STAGE_NAMES[: STAGE_NAMES.index(stage)]:
        shutil.copytree(runs / other, target / other)


def signal_at(step: int, number: int = signal.SIGTERM) -> OnStep:
    """Send this process a signal after a step."""

    def send(trainer: Trainer) -> None:
        if trainer.state.step == step:
            os.kill(os.getpid(), number)

    return send


def latent_flags(runs: Path) -> list[str]:
    """Flags that cache latents with the tiny stages, in several files with several augmentations."""
    flags = f"--vae {runs}/vae/model --text.model local-dir:{runs}/clip/model --data.resolution 16 --data.random-flip"
    return [*flags.split(), "--augmentations-per-image", "2", "--images-per-file", "90"]


# What a run wrote.


def logged(run: Path, name: str) -> dict[int, float]:
    """A logged number by step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def losses(run_dir: Path) -> dict[int, float]:
    """The logged loss of each step."""
    return logged(run_dir, "loss")


def tensors_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as FILE/NAME -> tensor."""
    folder = run_dir / f"checkpoints/step-{step:06d}"
    return {f"{file.stem}/{k}": t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit-equal."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of the files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Files of others.


class Foreign(dict[str, Any]):
    """A class that is unknown where its pickle is read."""


def save_lightning(state: dict[str, Tensor], file: Path, **options: Any) -> None:
    """A checkpoint as PyTorch Lightning writes it: weights, and classes and numpy scalars beside them."""
    beside = {"global_step": np.int64(3), "hyper_parameters": Foreign(lr=np.float32(0.1)), "callbacks": {Foreign: {}}}
    torch.save({"state_dict": state, "epoch": 1, "optimizer_states": [{}], **beside}, file, **options)


# Data sets.


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(color: Any = (255, 0, 0), size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """An image of one colour; `size` is width and height."""
    return Image.new(mode, size, color)


def numbered_png(number: int) -> bytes:
    """A PNG file of 24 x 16 pixels, red by its number."""
    return encoded(plain((number % 256, number // 256, 0), (24, 16)))


def write_photos(folder: Path, count: int, *, caption: str = "photo {}", sides: Sequence[int] = (24, 30, 36)) -> Path:
    """PNG files of noise, whose heights and widths are `sides` in turn, each with a caption of its number."""
    draw = random.Random(0)
    for number in range(count):
        width, height = sides[number % len(sides)], sides[number // len(sides) % len(sides)]
        image = Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))
        image.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption.format(number))
    return folder


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], links: Sequence[str] = ()) -> None:
    """A tar of links to a file outside of it, then of files."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_set(folder: Path, *, tars: int = 6, rows: int = 20) -> Path:
    """Tars in which each row has an image of its own, whose number is its caption."""
    folder.mkdir()
    for shard in range(tars):
        numbers = range(shard * rows, (shard + 1) * rows)
        pairs = [((f"{i:05}.png", numbered_png(i)), (f"{i:05}.txt", b"%d" % i)) for i in numbers]
        write_tar(folder / f"{shard:03}.tar", [file for pair in pairs for file in pair])
    return folder


# A toy stage.


class ToyData(Dataset[dict[str, Tensor]]):
    """A toy regression set."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        return {"x": torch.tensor([key.index / 37, 1.0])}

    def make_batch_sampler(self, **cut: Any) -> EpochBatchSampler:
        return EpochBatchSampler(37, **cut)

    def sync(self, gather: Callable[[list[int]], list[int]]) -> None:
        """No image can be unreadable."""

    def report(self) -> str:
        return ""

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def item_names(self) -> Sequence[str]:
        return ()


class Toy(Stage):
    """A 2 -> 1 linear map; at steps in `poison` its loss is NaN, at step `jump` it is large."""

    def __init__(self, *, poison: Sequence[int] = (), jump: int | None = None, data: ToyData | None = None) -> None:
        self.model, self.poison, self.jump = nn.Linear(2, 1), poison, jump
        self.trainables, self.frozen = [Trainable("toy", self.model)], {}
        self.data = self.held_out = data or ToyData()

    def open_data(self, accelerator: Any) -> None:
        """A toy is built with its data."""

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        x = batch["x"].to(rng.device)
        error = networks["toy"](x + 0.01 * rng.randn("jitter", (2,))) - 3 * x[:, :1]
        factor = float("nan") if rng.step + 1 in self.poison else 1e4 if rng.step + 1 == self.jump else 1.0
        return {"loss": error.square().mean() * factor}

    def validate(self, ranks: Ranks) -> dict[str, float]:
        return {"validation_w": self.model.weight.sum().item()}

    def sample(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        """A toy has no model folder."""

    def next_command(self) -> str:
        return ""

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "toy"}

    def example_batch(self, count: int) -> Batch:
        return {"x": torch.rand(count, 2)}


def toy_gan() -> "ToyGAN":
    """A small generator and discriminator, the same at every call."""
    torch.manual_seed(0)
    return ToyGAN()


class ToyGAN(Stage):
    """Two trainables: each loss calls both networks and moves its own."""

    def __init__(self) -> None:
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.trainables = [Trainable("generator", self.generator), Trainable("discriminator", self.discriminator)]
        self.frozen, self.data, self.held_out = {}, ToyData(), ToyData()

    def open_data(self, accelerator: Any) -> None:
        """A toy is built with its data."""

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        x = batch["x"].to(rng.device)
        made = networks["generator"](x + 0.1 * rng.randn("jitter", (2,)))
        if name == "generator":
            return {"loss": (networks["discriminator"](made).float() - 1).square().mean()}
        real, fake = networks["discriminator"](x).float(), networks["discriminator"](made.detach()).float()
        return {"loss": (real - 1).square().mean() + fake.square().mean()}

    def validate(self, ranks: Ranks) -> dict[str, float]:
        return {"validation_w": self.generator[0].weight.sum().item()}

    def sample(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        write_tensors(folder / "generator.safetensors", self.generator.state_dict())

    def next_command(self) -> str:
        return ""

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "gan"}

    def example_batch(self, count: int) -> Batch:
        return {"x": torch.rand(count, 2)}


def toy(
    config: TrainingConfig,
    *,
    stage: Callable[[], Stage] = Toy,
    on_step: OnStep = nothing,
    fp16: bool = False,
    **settings: Any,
) -> FitResult:
    """Train a toy stage, by default `Toy(**settings)`, with `fit`; `fp16` scales the loss as fp16 does."""
    accelerator = make_accelerator(config)
    if fp16:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    return fit(config, accelerator, stage(**settings), on_step=on_step)


def toy_config(run_dir: Path, **values: Any) -> TrainingConfig:
    """Eight steps, a checkpoint after every third."""
    defaults = {"steps": 8, "batch_size": 12, "log_every": 1, "checkpoint_every": 3, "warmup_steps": 2}
    return TrainingConfig(run=run_dir, **{**defaults, "learning_rate": 0.1, **values})


# A full disk.


@contextmanager
def full_disk() -> Iterator[None]:
    """Let the system refuse to write more than 64 bytes to a file."""

    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Medical files.


def write_dicom(path: Path, values: np.ndarray, **fields: object) -> Path:
    """A file of 16 bits with these values and fields."""
    data = FileDataset(str(path), {}, preamble=b"\0" * 128)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = MRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "MR", "MONOCHROME2", 1
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.Rows, data.Columns = values.shape[-2:]
    data.PixelData = values.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path

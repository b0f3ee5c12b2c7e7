"""What a training says before its first step: its recipe and sizes, and what it could not learn from its data."""

from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator

from ldm.commands import quote, script_command
from ldm.config import relative
from ldm.data import ImageTextDataset
from ldm.data.batch_sampler import evenly_spaced, fitting_batch_size
from ldm.text.tokenizer import Tokenizer
from ldm.training.distributed import training_precision

CHECKED_IMAGES, CHECKED_CAPTIONS = 64, 1024  # evenly spread over the training split
GREY_LEVEL = 2 / 255  # of pixels in [-1, 1]


def announce(stage: Any, accelerator: Accelerator, *more: str) -> None:
    """Print what a stage with data is about to train, and what looks wrong; `more` are lines of the stage's own.

    ValueError: images that are all of one colour.
    """
    ranks = f"{accelerator.num_processes} ranks, " * (accelerator.num_processes > 1)
    device = f"{ranks}{accelerator.device.type}, {training_precision(accelerator)}"
    lines = [
        f"{recipe_line(stage)}; {device}",
        stage.data.describe(),
        *batch_notes(stage.data, stage.config.batch_size),
        *more,
    ]
    if isinstance(stage.data, ImageTextDataset) and not stage.data.is_sharded:
        lines += pixel_notes(stage.data)
    data, default = stage.config.data, stage.default
    made_for = {"pairs": "shapes"}.get(data.source, data.drawn or "images-64").split("+")[0]
    if _is_default(stage) and made_for != default.parent.name:
        recipe = relative(default.parents[1] / made_for / default.name)
        plan = f"{script_command('plan', launched=False)} --source {quote(data.source)}"
        lines.append(
            f"warning: the default recipe is made for {default.parent.name}; for {data.source} pass "
            f"--config {quote(recipe.as_posix())}, or the recipe that `{plan}` proposes"
        )
    for line in filter(None, lines):
        accelerator.print(line)


def recipe_line(stage: Any) -> str:
    """The file of a recipe, the parameters of each network, resolution, steps and batch."""
    config = stage.config
    file = relative(config.config) if config.config else "no file"
    name = f"{stage.default.parent.name}, the default recipe" if _is_default(stage) else file
    trained = [(trainable.name, trainable.module, "") for trainable in stage.trainables]
    networks = [*trained, *((name, module, " (frozen)") for name, module in stage.frozen.items())]
    sizes = [f"{name} {sum(p.numel() for p in module.parameters()):,}{frozen}" for name, module, frozen in networks]
    steps = f"{config.steps:,} steps of {config.batch_size} images of {config.data.resolution} pixels"
    return f"recipe: {name}; parameters: {', '.join(sizes)}; {steps}"


def _is_default(stage: Any) -> bool:
    file = stage.config.config
    return file is not None and file.resolve() == stage.default.resolve()


def batch_notes(data: Any, batch_size: int) -> list[str]:
    """A line where a step has more images than the set, or than a bucket."""
    size = len(data)
    if batch_size > size:
        taken = f"each step takes images more than once: --batch-size {fitting_batch_size(size)}"
        return [f"warning: --batch-size {batch_size} is more than the {size:,} training images, so {taken}"]
    counts = [] if data.groups is None else data.groups.bincount().tolist()
    if few := [count for count in counts if count < batch_size]:
        named = f"{len(few)} of {len(counts)} buckets have fewer images than a step of {batch_size}"
        return [f"{named} ({', '.join(map(str, few))}): their steps repeat images; lower --batch-size to avoid it"]
    return []


def pixel_notes(data: ImageTextDataset) -> list[str]:
    """Lines where images do not differ, or a channel of them is constant; ValueError: all are of one colour."""
    images = torch.cat(list(data.spread_images(CHECKED_IMAGES)))
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    constant = high - low <= 1.5 * GREY_LEVEL
    seen = f"{data.config.source}: {len(images)} of {len(data):,} training images were looked at"
    check = f"check them with `{script_command('check_data', launched=False)} {quote(data.config.source)}`"
    color = ", ".join(f"{255 * (value + 1) / 2:.0f}" for value in low.tolist())
    if constant.all():
        raise ValueError(f"{seen}, and all are of one colour ({color}), from which nothing can be learned: {check}")
    if (images == images[:1]).all():
        return [f"warning: {seen}, and all are equal, so nothing but this one can be learned: {check}"]
    if constant.any():
        numbers = ", ".join(str(i) for i in constant.nonzero().flatten().tolist())
        return [f"warning: {seen}, and channel {numbers} (of 0 to {len(low) - 1}) is constant in all of them: {check}"]
    return []


def equal_captions(data: ImageTextDataset, tokenizer: Tokenizer, batch_size: int) -> list[str]:
    """A line where captions meet equal ones in a batch, as the tower reads them: the loss takes them for different.

    None for shards, whose captions had to be downloaded first.
    """
    indices = [] if data.is_sharded else evenly_spaced(CHECKED_CAPTIONS, len(data))
    texts = [(data.source.captions[index] or [""])[0] for index in indices]
    counts = Counter(tuple(ids) for ids in tokenizer(texts).tolist())
    pairs = sum(count * (count - 1) for count in counts.values())
    others = (batch_size - 1) * pairs / max(1, len(texts) * (len(texts) - 1))  # in a batch, for each caption
    if others < 1:
        return []
    length, cut = tokenizer.context_length, len(set(texts)) > len(counts)
    remedy = f"the tower reads {length} tokens: raise --clip.context-length" if cut else "write captions that differ"
    if not cut and len(counts) > 1:
        remedy += ", or lower --batch-size"
    read = f"{len(counts):,} different texts in {len(texts):,} captions, as the tower reads them"
    wrong = f"each meets about {others:.0f} equal ones in a batch of {batch_size}, which the loss takes for wrong"
    return [f"warning: {read}: {wrong}; {remedy}"]

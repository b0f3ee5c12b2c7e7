"""Extractors, the networks whose features of images are compared, and files of features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ldm.io.atomic import write_tensors
from ldm.io.model_dir import model_kind
from ldm.io.tensors import check_finite, load_strict, read_tensors, weights_sha256
from ldm.pipeline import Pipeline
from ldm.text import TextConfig, TextEncoder
from ldm.text.image_tower import ImageTower
from ldm.text.weights import CONFIG_NAME, HUB, LOCAL, WEIGHTS_NAME

INCEPTION = "inception:"  # prefix of --extractor
CHOICES = "`local-dir:FOLDER`, `hf-hub:ORG/NAME`, `NAME:TAG` as ViT-B-32:laion2b_s34b_b79k, or `inception:FILE`"
FID_CLASSES = 1008  # of the Inception network with which FID was defined; torchvision's has 1000


class Normalization(NamedTuple):
    """What an extractor expects of an image."""

    side: int  # in pixels
    mean: Tensor  # (3,), of values in [0, 1]
    std: Tensor  # (3,)


@dataclass(frozen=True)
class Extractor:
    """A frozen network that turns images, and where it is a CLIP also captions, into features."""

    name: str  # as `--extractor` has it
    suffix: str  # of the names of its metrics; "self" for a tower that was trained here
    network: nn.Module
    expects: Normalization
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor] | None = None
    no_text: str = ""  # why a CLIP encodes no captions

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, whatever file they are from."""
        return weights_sha256(self.network)[:16]

    @property
    def resize(self) -> str:
        """How images are brought to its size (Parmar et al. 2022: the rule decides the value of a metric)."""
        return f"8 bits, bicubic with antialiasing to {self.expects.side} pixels"

    def identity(self) -> dict[str, str]:
        """What two evaluations, or a file of features and an evaluation, must have in common."""
        return {"extractor": self.suffix, "sha256": self.sha256, "resize": self.resize}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Square images (b, 1 or 3, h, w) in [-1, 1], in steps of 8 bits -> features (b, d) float32, on the CPU."""
        side, mean, std = self.expects
        device = next(self.network.parameters()).device
        x = ((images.to(device, torch.float32) + 1) / 2).expand(-1, 3, -1, -1)
        if x.shape[-1] != side:
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (values.to(device)[:, None, None] for values in (mean, std))
        return self.encode_image((x - mean) / std).float().cpu()

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """Captions -> features (b, d) float32, on the CPU, of a CLIP."""
        assert self.encode_text is not None
        return self.encode_text(captions).float().cpu()


def extract(extractor: Extractor, images: Tensor) -> Tensor:
    """Features (n, d) of images (n, c, h, w)."""
    return torch.cat([extractor(batch) for batch in images.split(64)])


# Opening.


def open_extractor(name: str, device: torch.device, own: str | None = None) -> Extractor:
    """The extractor that `--extractor` names; `own` is that of the model that is evaluated.

    ValueError: it is unknown, has no weights or no image tower, or its file does not fit.
    """
    if name.startswith(INCEPTION):
        extractor = open_inception(Path(name.removeprefix(INCEPTION)))
    else:
        extractor = open_clip_tower(name, own)
    extractor.network.requires_grad_(False).eval().to(device)
    return extractor


def own_extractor(pipeline: Pipeline) -> str | None:
    """The CLIP of whose text tower a model has its prompts, where it has an image tower; None where it has none."""
    if pipeline.text is None:
        return None
    encoder = pipeline.text.encoders[0]
    if encoder.model_id.startswith(LOCAL):
        return encoder.model_id if has_image_tower(Path(encoder.model_id.removeprefix(LOCAL))) else None
    if encoder.config.pretrained is not None:
        return f"{encoder.model_id}:{encoder.config.pretrained}"
    return encoder.model_id if encoder.model_id.startswith(HUB) else None


def has_image_tower(folder: Path) -> bool:
    """Whether a folder of open_clip has the weights of both towers."""
    weights = folder / WEIGHTS_NAME
    if not (folder / CONFIG_NAME).is_file() or not weights.is_file():
        return False
    with safe_open(weights, "pt") as file:
        return any(name.startswith("visual.") for name in file.keys())  # noqa: SIM118  (it is no dictionary)


def open_clip_tower(name: str, own: str | None) -> Extractor:
    """A CLIP: a folder, a hub id, or a published NAME:TAG. ValueError: see `open_extractor`."""
    model_id, _, tag = (name, "", "") if name.startswith((LOCAL, HUB)) else name.partition(":")
    try:
        image = ImageTower.load(model_id, tag or None)
    except ValueError as error:
        written = "" if name.startswith((LOCAL, HUB)) else " (NAME:TAG, as ViT-B-32:laion2b_s34b_b79k)"
        raise ValueError(f"--extractor {name}: {error}{written}") from None
    expects = Normalization(image.size[0], image.mean.flatten(), image.std.flatten())
    trained_here = name.startswith(LOCAL) and model_kind(Path(name.removeprefix(LOCAL))) == "text tower"
    suffix = "self" if trained_here or (name == own and name.startswith(LOCAL)) else "clip"
    try:
        text = TextEncoder.load(TextConfig(model=model_id, pretrained=tag or None))
    except ValueError as error:  # its images can be compared all the same
        return Extractor(name, suffix, image, expects, image.visual, no_text=f"clip_score is left out: {error}")

    def encode_text(captions: list[str]) -> Tensor:
        return text.encode_ids(text.tokenizer(captions)).pooled

    return Extractor(name, suffix, nn.ModuleList([image, text]), expects, image.visual, encode_text)


def open_inception(path: Path) -> Extractor:
    """Inception v3 (Szegedy et al. 2016) from a file: torchvision's weights, or those with which FID was defined.

    Its features are the 2048 that its classifier reads. The weights of FID (Heusel et al. 2017), as PyTorch files have
    them, are of a network with 1008 classes and other pooling.
    """
    from torchvision.models.inception import Inception3  # slow to import

    if not path.is_file():
        remedy = "download inception_v3_google-0cc3c7bd.pth of torchvision, or pt_inception-2015-12-05-6726825d.pth"
        raise ValueError(f"--extractor {INCEPTION}{path} has no weights, there is no such file: {remedy}")
    tensors = read_tensors(path, pickles=True)
    check_finite(tensors, path)
    classes = len(tensors["fc.bias"]) if "fc.bias" in tensors else 1000
    has_aux = any(name.startswith("AuxLogits.") for name in tensors)
    with torch.device("meta"):
        network = Inception3(num_classes=classes, aux_logits=has_aux, init_weights=False)
    counters = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in network.state_dict().items() if not t.ndim}
    load_strict(network, counters | tensors, path, assign=True)  # older files have no counters of batches
    network.fc, network.AuxLogits = nn.Identity(), None
    if classes == FID_CLASSES:
        use_fid_pooling(network)
    half = torch.full((3,), 0.5)
    return Extractor(f"{INCEPTION}{path}", "inception", network, Normalization(299, half, half), network)


def use_fid_pooling(network: nn.Module) -> None:
    """Pool as the network of FID does: averages leave the padding out, and the last block takes maxima."""
    blocks: dict[str, Any] = {name: block for name, block in network.named_children() if hasattr(block, "branch_pool")}
    last = blocks.pop("Mixed_7c")
    for block in blocks.values():
        block.branch_pool.register_forward_pre_hook(lambda conv, inputs: inputs[0] / _share_inside(inputs[0]))
    maxima: list[Tensor] = []
    last.register_forward_pre_hook(lambda block, inputs: maxima.append(F.max_pool2d(inputs[0], 3, 1, 1)))
    last.branch_pool.register_forward_pre_hook(lambda conv, inputs: maxima.pop())


def _share_inside(x: Tensor) -> Tensor:
    """The share of each 3 x 3 window that is not padding, (h, w)."""
    return F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)


# Files.


def write_features(path: Path, features: Tensor, extractor: Extractor, about: dict[str, str]) -> None:
    """Write features (n, d), and in the header whose they are and, as `about` says, of which images."""
    write_tensors(path, {"features": features}, {"name": extractor.name, **extractor.identity(), **about})


def read_features(path: Path, extractor: Extractor, about: dict[str, str]) -> Tensor:
    """Features (n, d). ValueError: those of another extractor or of other images, or no such file."""
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata() or {})
    if "features" not in tensors or "sha256" not in header:
        raise ValueError(f"--features {path} is no file of features: pass one that evaluate.py wrote, or a new name")
    for field, value in {**extractor.identity(), **about}.items():
        if header.get(field) != value:
            whose = f"{path} has features of {header.get('name')}, {field} {header.get(field)}"
            remedy = "pass another --features, or the same --extractor and images"
            raise ValueError(f"{whose}; here it is {extractor.name}, {field} {value}: {remedy}")
    return tensors["features"]

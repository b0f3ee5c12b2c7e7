"""How far images are from real ones, and from their captions: every measure of pixels and features."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.data.loader import sample_batches
from ldm.evaluation.estimates import Estimate, mean_ci
from ldm.evaluation.features import Extractor, extract, read_features, write_features
from ldm.evaluation.metrics import compare_features
from ldm.evaluation.subject import EvaluateConfig, Subject, data_sha256
from ldm.vae.losses import has_ssim, psnr, ssim


def vae_fidelity(images: Tensor, reconstructions: Tensor) -> dict[str, Estimate]:
    """PSNR (dB) and SSIM of reconstructed held-out images (n, c, h, w)."""
    scores = {"VAE PSNR, dB": psnr(reconstructions, images)}
    if has_ssim(images):
        scores["VAE SSIM"] = ssim(reconstructions, images)
    return {name: mean_ci(values.tolist()) for name, values in scores.items()}


def reference_features(subject: Subject, extractor: Extractor, config: EvaluateConfig) -> Tensor:
    """Features (m, d) of the real images: computed, or those in the file `--features`."""
    images: Iterator[Tensor] = iter(subject.images.split(64))
    about = {"reference": config.reference, "images": data_sha256(subject.held_out), "count": f"{len(subject.images)}"}
    if config.reference == "train":
        indices = subject.training.source.evenly_spaced(config.max_train_images or config.num_samples)
        about |= {"images": data_sha256(subject.training), "count": str(len(indices))}
        images = (batch["image"] for batch in sample_batches(subject.training, indices))
    if config.features is not None and config.features.exists():
        return read_features(config.features, extractor, about)
    features = torch.cat([extractor(batch) for batch in tqdm(images, "features of real images", unit="batch")])
    if config.features is not None:
        write_features(config.features, features, extractor, about)
    return features


def image_quality(
    subject: Subject, extractor: Extractor, reference: Tensor, generated: Tensor, config: EvaluateConfig
) -> dict[str, Estimate]:
    """What compares features of generated images with those of the reference (m, d), and with captions."""
    features, paired = extract(extractor, generated), config.reference == "test"
    found = compare_features(reference, features, name=f"{{}}_{extractor.suffix}", paired=paired)
    if extractor.encode_text and any(subject.captions):
        found |= {f"clip_score_{extractor.suffix}": clip_score(extractor, features, subject.captions)}
        real = reference if paired else extract(extractor, subject.images)
        found |= {f"clip_score_{extractor.suffix}, real images": clip_score(extractor, real, subject.captions)}
    return found


def other_real_images(
    subject: Subject, extractor: Extractor, reference: Tensor, config: EvaluateConfig
) -> dict[str, Estimate]:
    """What real images that are not in the reference get, which is what a perfect model would."""
    images = subject.images
    if config.reference == "test":
        indices = subject.training.source.evenly_spaced(len(images))
        images = torch.cat([batch["image"] for batch in sample_batches(subject.training, indices)])
    return compare_features(reference, extract(extractor, images), name=f"{{}}_{extractor.suffix}, real images")


def clip_score(extractor: Extractor, features: Tensor, captions: Sequence[str]) -> Estimate:
    """100 x the cosine of the features of images (n, d) and of their captions, where positive (Hessel et al. 2021)."""
    rows = [captions[first : first + 64] for first in range(0, len(captions), 64)]
    text = torch.cat([extractor.text(list(batch)) for batch in rows])
    return mean_ci((100 * F.cosine_similarity(features, text)).clamp_min(0).tolist())

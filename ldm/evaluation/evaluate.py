"""Measuring a trained model on any data: its VAE's fidelity, its images against real ones, and what it memorized."""

from pathlib import Path

from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.samplers import get_sampler
from ldm.evaluation.classifier import CLASSIFIER_VERSION
from ldm.evaluation.features import CHOICES, extract
from ldm.evaluation.memorization import Nearest, compare_distances, missing_percentiles, search_training, write_nearest
from ldm.evaluation.metrics import compare_features, missing_metrics
from ldm.evaluation.prompts import MARGIN, what_is_shown
from ldm.evaluation.quality import image_quality, other_real_images, reference_features, vae_fidelity
from ldm.evaluation.report import Report, compare, plot
from ldm.evaluation.subject import EvaluateConfig, Subject, data_sha256, generate, open_subject, reconstruct
from ldm.evaluation.sweep import sweep
from ldm.imaging import captioned_grid, save_image, tensor_to_pil
from ldm.io.atomic import check_folder
from ldm.io.tensors import sha256
from ldm.pipeline.generate import SHIPPED_MODEL
from ldm.pipeline.load import weights_file


def evaluate(config: EvaluateConfig) -> None:
    """Measure, print a table and write the report; or sweep, or compare two reports."""
    if config.compare:
        print(compare(*config.compare))
        return
    for sampler in (config.sampler, *config.sweep_samplers):
        get_sampler(sampler, None)
    folder, data = config.model, config.data
    if folder is None or not data.source:
        raise ValueError(f"{folder} does not name its data, as it was not trained here: pass --data.source")
    if config.out is None and folder.resolve() == SHIPPED_MODEL.resolve():
        raise ValueError(f"{folder} comes with ldm and stays as it is: pass --out, a folder for the report")
    out = folder.parent if config.out is None else config.out
    check_folder(out, "--out")
    subject = open_subject(folder, config)
    if config.sweep:
        report = start_report(subject, config)
        swept = "guidance_scale", "steps", "sampler"
        settings = {name: value for name, value in report.settings.items() if name not in swept}
        sweep(subject, config, out, {**report.model, **report.protocol, **settings})
        return
    report = measure(subject, config, out)
    report.write(out)
    print(report.table())


def measure(subject: Subject, config: EvaluateConfig, out: Path) -> Report:
    """All measures that the model, the data and the extractor allow; figures go into the folder `out`."""
    pipeline, extractor = subject.pipeline, subject.extractor
    report = start_report(subject, config)
    reference = None if extractor is None else reference_features(subject, extractor, config)
    if reference is not None:
        report.protocol["reference_images"] = len(reference)
    if pipeline.vae is not None:  # what the U-Net cannot beat
        reconstructions = reconstruct(subject, config)
        report.measures |= vae_fidelity(subject.images, reconstructions)
        if extractor and reference is not None:
            features = extract(extractor, reconstructions)
            paired = config.reference == "test"
            report.measures |= compare_features(reference, features, name=f"r{{}}_{extractor.suffix}", paired=paired)
    if pipeline.unet.config.cond_channels:
        report.notes.append("an inpainting model generates from images: only its VAE is measured")
        return checked(report)
    generated = generate(subject, subject.captions, config)
    if subject.drawn:
        report.measures |= what_is_shown(subject, generated, config)
    if extractor and reference is not None:
        report.protocol["training_sha256"] = data_sha256(subject.training)  # other real images are of it
        report.measures |= image_quality(subject, extractor, reference, generated, config)
        report.measures |= other_real_images(subject, extractor, reference, config)
        report.notes += missing_metrics(reference, generated).values()
    figures = {"samples": captioned_grid(tensor_to_pil(generated[:24]), subject.captions[:24], columns=8)}
    nearest: dict[str, dict[str, Nearest]] = {}
    if config.max_train_images:
        nearest, report.training, figures["pairs"] = search_training(subject, generated, config.max_train_images)
    for space, found in nearest.items():
        report.memorization[space] = compare_distances(*(found[name].distances for name in found))
    if nearest:
        report.notes += missing_percentiles(len(subject.images))
        write_nearest(subject, nearest, config.max_train_images, out / "nearest.json")
    if plot(report.measures, nearest, out / "evaluation.png"):
        report.figures.append("evaluation.png")
    for name, figure in figures.items():
        save_image(figure, out / f"{name}.png")
        report.figures.append(f"{name}.png")
    return checked(report)


def start_report(subject: Subject, config: EvaluateConfig) -> Report:
    """A report without measures, which says what they will depend on."""
    pipeline, extractor = subject.pipeline, subject.extractor
    scale = pipeline.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    report = Report(
        model={"model": str(subject.folder), "model_hash": sha256(weights_file(subject.folder))[:16]},
        protocol={
            "data_sha256": data_sha256(subject.held_out),
            "resolution": config.data.resolution,
            "channels": config.data.channels,
            "num_samples": len(subject.images),
            "reference": config.reference,
            **(extractor.identity() if extractor else {}),
            **({"classifier": CLASSIFIER_VERSION, "background_margin": MARGIN} if subject.drawn else {}),
        },
        settings={
            "data": config.data.source,
            **({"extractor_name": extractor.name} if extractor else {}),
            "guidance_scale": scale,
            "guidance_interval": pipeline.with_own_interval(GuidanceConfig()).interval,
            "steps": config.steps or pipeline.default_steps,
            "sampler": config.sampler,
            "precision": pipeline.precision,
            "seed": config.seed,
        },
    )
    if extractor is None:
        report.notes.append(f"features are not compared: the model has no image tower; pass --extractor: {CHOICES}")
    elif extractor.no_text and any(subject.captions):
        report.notes.append(extractor.no_text)
    return report


def checked(report: Report) -> Report:
    """ValueError where nothing was measured; notes are printed."""
    if not report.measures and not report.memorization:
        raise ValueError(f"{report.model['model']}: nothing can be measured: {'; '.join(report.notes)}")
    for note in report.notes:
        print(note)
    return report

"""Model folders: their model.json, whose fields ldm/pipeline/load.py has, and how the newest finished one is found."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ldm.io.atomic import write_text

MODEL_FORMAT, MODEL_FORMAT_1 = "ldm-model-2", "ldm-model-1"
VOCABULARY_FILES = {MODEL_FORMAT: "vocab.txt", MODEL_FORMAT_1: "words.txt"}
SCRIPTS = {"text tower": "train_clip", "vae": "train_vae", "pipeline": "train_ldm"}  # that make each kind
Manifest = TypeVar("Manifest")

# What fields are called now that ldm-model-1 called otherwise, by the part of the manifest that they are in.
TEXT_FIELDS = {
    "normalize": "final_layer_norm",
    "padding": "pad_token_id",
    "pooled": "use_pooled",
    "zero_empty": "zero_empty_prompt",
}
RENAMED_FIELDS = {
    "": {"process": "diffusion", "about": "metadata", "size": "resolution"},
    "data": {"size": "resolution", "flip": "random_flip", "streams": "shard_streams", "font": "emoji_font"},
    "text": TEXT_FIELDS,
    "second_text": TEXT_FIELDS,
    "unet": {
        "extra_channels": "cond_channels",
        "patch": "patch_size",
        "channels": "model_channels",
        "multipliers": "channel_mult",
        "blocks": "num_res_blocks",
        "depths": "transformer_depth",
        "middle_depth": "mid_transformer_depth",
        "heads": "num_heads",
        "context_width": "context_dim",
        "vector_width": "pooled_dim",
        "size_width": "size_embed_dim",
        "scale_shift": "scale_shift_norm",
        "coordinates": "coord_conv",
    },
    "vae": {
        "patch": "patch_size",
        "channels": "base_channels",
        "multipliers": "channel_mult",
        "blocks": "num_res_blocks",
        "attention": "mid_attention",
    },
    "diffusion": {"path": "noise_schedule", "times": "t_distribution", "log_normal": "log_normal_mean_std"},
}
# Its loss weightings, each with a field of its own for gamma.
LOSS_WEIGHTINGS = {"p2_gamma": "p2", "soft_min_snr_gamma": "soft_min_snr", "min_snr_gamma": "min_snr"}


def write_manifest(folder: Path, kind: str, values: dict[str, Any]) -> None:
    """Write model.json, which is last to appear: a folder that has it is finished."""
    write_text(folder / "model.json", json.dumps({"format": MODEL_FORMAT, "kind": kind, **values}, indent=2))


def read_manifest(folder: Path, kind: str, parse: Callable[..., Manifest]) -> Manifest:
    """What the `from_dict` of a manifest makes of model.json; ValueError: missing, or another kind or format."""
    path = folder / "model.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder (it has no model.json): pass RUN/model of a finished run")
    values = read_json(path)
    model_format, found_kind = values.pop("format", None), values.pop("kind", None)
    if model_format not in VOCABULARY_FILES:
        readable = " and ".join(VOCABULARY_FILES)
        raise ValueError(f"{path} has format {model_format}, expected {readable}: read it with the ldm that wrote it")
    if found_kind != kind:
        remedy = f"pass RUN/model of a finished {SCRIPTS[kind]} run"
        raise ValueError(f"{folder}: expected a {kind}, found a {found_kind}: {remedy}")
    if model_format == MODEL_FORMAT_1:
        values = _from_format_1(values)
    return parse(values, source=str(path))


def model_kind(folder: Path) -> str | None:
    """The kind of a model folder; None where it is not one of ours."""
    path = folder / "model.json"
    return str(read_json(path).get("kind")) if path.is_file() else None


def read_vocabulary(folder: Path) -> list[str]:
    """The words of the training captions, in order; ValueError when the file is missing."""
    return read_text(folder / VOCABULARY_FILES[read_json(folder / "model.json")["format"]]).split()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy or download the folder again")
    try:
        return dict(json.loads(path.read_bytes()))  # which tell their encoding
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: copy or download the folder again, or remove it") from None


def read_text(path: Path) -> str:
    """A UTF-8 text file; ValueError when it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: copy the folder again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def latest_model(kind: str, root: Path, *, script: str, otherwise: Path | None = None) -> Path:
    """The model folder of this kind below `root` that was finished last, or `otherwise` where there is none.

    ValueError: there is neither; it names the script that makes one.
    """
    paths = [path for path in _model_files(root) if read_json(path).get("kind") == kind]
    if paths:
        return max(paths, key=lambda path: path.stat().st_mtime).parent
    if otherwise is None:
        raise ValueError(f"no finished {kind} below {root}: run `{script}` first, or pass one")
    return otherwise


def _model_files(root: Path) -> Iterator[Path]:
    """Every model/model.json below a folder, also behind links, of which each is followed once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
        elif Path(folder).name == "model" and "model.json" in files:
            yield Path(folder) / "model.json"
        seen.add(real)


def _from_format_1(values: dict[str, Any], part: str = "") -> dict[str, Any]:
    """The values of a part of an ldm-model-1 manifest, and of the parts in it, as those of today."""
    names = RENAMED_FIELDS.get(part, {})
    values = {names.get(name, name): value for name, value in values.items()}
    values = {name: _from_format_1(v, name) if isinstance(v, dict) else v for name, v in values.items()}
    if part == "unet":
        values["norm_min_group_channels"] = 8  # which was not a setting
    if part == "diffusion":
        gammas = {kind: values.pop(name, None) for name, kind in LOSS_WEIGHTINGS.items()}
        kind = next((kind for kind, gamma in gammas.items() if gamma), "min_snr" if values.get("snr_floor") else None)
        values |= {"loss_weighting": kind, "gamma": gammas[kind]} if kind else {}
    return values

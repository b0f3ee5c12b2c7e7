"""TODO."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ldm.text.config import HUB, LOCAL
from ldm.text.tower import TextTower

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
# Settings of open_clip's text towers that this one does not have; any other value than these is refused.
SUPPORTED_TEXT_CFG = {
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
}


def _resolve_weights(source: str, pretrained: str | None) -> tuple[dict[str, Any], Path]:
    """Configuration and weights file of a tower; whatever is not on the disk is fetched from the hub."""
    if source.startswith(LOCAL):
        folder = Path(source.removeprefix(LOCAL))
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"text tower {source} has no {name}: train one with `accelerate launch scripts/train_clip.py`, "
                    "or name a folder that open_clip saved"
                )
        return _model_cfg(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download

        config, weights = (hf_hub_download(source.removeprefix(HUB), name) for name in (CONFIG_NAME, WEIGHTS_NAME))
        return _model_cfg(Path(config)), Path(weights)
    import open_clip  # slow, and needed for its list of models only

    cfg = open_clip.get_model_config(source)
    if cfg is None:
        raise ValueError(
            f"text.model {source!r} is no open_clip model; name one, `local-dir:FOLDER` or `hf-hub:ORG/NAME`"
        )
    tags = open_clip.list_pretrained_tags_by_model(source)
    if pretrained not in tags:
        raise ValueError(
            f"text.model {source} needs weights: set text.pretrained to one of {', '.join(tags)} (got {pretrained})"
        )
    entry = open_clip.get_pretrained_cfg(source, pretrained)
    cfg = cfg | {"quick_gelu": entry.get("quick_gelu", cfg.get("quick_gelu", False))}
    return cfg, Path(open_clip.download_pretrained(entry, prefer_hf_hub=True))


def _model_cfg(path: Path) -> dict[str, Any]:
    """The architecture in open_clip's configuration file; ValueError when there is none in it."""
    try:
        cfg = dict(json.loads(path.read_text())["model_cfg"])
        return cfg | {"embed_dim": cfg["embed_dim"], "text_cfg": dict(cfg["text_cfg"])}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} tells no text tower as open_clip's configuration does: save or fetch it again"
        ) from None


def _check_supported(cfg: dict[str, Any], source: str) -> None:
    text = cfg["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(f"text tower {source} is a Hugging Face transformer; only CLIP's own text tower can be read")
    for name, value in SUPPORTED_TEXT_CFG.items():
        if text.get(name, value) != value:
            raise ValueError(f"text tower {source} has {name}: {text[name]!r}; only {value!r} can be read")


def _load_weights(tower: TextTower, path: Path, source: str) -> None:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except SafetensorError as error:
        raise ValueError(
            f"text tower {source}: {path.name} can not be read ({error}); save or fetch it again"
        ) from None
    tensors = {name.removeprefix("text."): tensor.float() for name, tensor in tensors.items()}
    missing = [name for name in tower.state_dict() if name not in tensors]
    if missing:
        raise ValueError(f"text tower {source}: {path.name} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    tower.load_state_dict({name: tensors[name] for name in tower.state_dict()}, assign=True)

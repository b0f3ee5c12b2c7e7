"""Towers of a CLIP on disk, on the Hugging Face hub and in open_clip's list: found, checked and loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.io.model_dir import latest_model
from ldm.io.tensors import load_strict, read_tensors
from ldm.text.tower import TextTower

FIELDS = {"text": ("text.model", "text.pretrained"), "image": ("image tower", "its pretrained tag")}  # for messages
LOCAL, HUB, CONVERTED = "local-dir:", "hf-hub:", "converted"  # prefixes of `model`; a tower read from another format
CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
EMBEDDING, TOKEN_IDS = "token_embedding.weight", "token_embedding.ids"  # of a pruned tower: the rows of these ids alone
# Settings of open_clip's text towers and tokenizer that ours do not have, with the only value that is supported.
SUPPORTED_TEXT_CFG = {
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "reduction_mask": "",
}


def latest_tower(runs: Path, *, script: str) -> str:
    """The newest finished tower of `train_clip` below `runs`, as `model` names it; ValueError: none, run `script`."""
    return f"{LOCAL}{latest_model('text tower', runs, script=script)}"


def load_tower(model_id: str, pretrained: str | None = None) -> tuple[TextTower, Path]:
    """The tower of a `TextConfig.model` with its weights, and their file, downloaded where it is not on the disk.

    ValueError: an unknown name or tag, a failed download, an architecture that is not supported, a damaged file.
    """
    cfg, _, path = find_tower(model_id, pretrained)
    _check_supported(cfg, model_id)
    with torch.device("meta"):
        tower = TextTower(cfg)
    tensors = read_tensors(path, pickles=True)  # open_clip's own tags have them
    tensors = _unpack({name.removeprefix("text."): tensor for name, tensor in tensors.items()}, tower, path)
    load_strict(tower, {name: tensors[name] for name in tower.state_dict() if name in tensors}, path, assign=True)
    return tower, path


def tower_tensors(tower: TextTower) -> dict[str, Tensor]:
    """What a file of a tower holds: of a pruned one the embeddings of its tokens alone, with their ids."""
    tensors, ids = tower.state_dict(), tower.token_ids
    return tensors if ids is None else {**tensors, EMBEDDING: tensors[EMBEDDING][ids], TOKEN_IDS: ids}


def _unpack(tensors: dict[str, Tensor], tower: TextTower, path: Path) -> dict[str, Tensor]:
    """The tensors of a tower from those of its file, `path`; zeros stand for embeddings that it has not."""
    if TOKEN_IDS not in tensors:
        return tensors
    ids, rows = tensors[TOKEN_IDS], tensors.get(EMBEDDING, torch.empty(0))
    count, width = tower.token_embedding.weight.shape
    if ids.dtype != torch.int64 or rows.shape != (*ids.shape, width) or not ((ids >= 0) & (ids < count)).all():
        raise ValueError(f"{path}: {EMBEDDING} does not fit {TOKEN_IDS}: copy or download it again")
    tower.token_ids = ids
    return {**tensors, EMBEDDING: rows.new_zeros(count, width).index_copy(0, ids, rows)}


def find_tower(
    model_id: str, pretrained: str | None, *, kind: str = "text"
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """open_clip's `model_cfg` and `preprocess_cfg`, and the weights file; ValueError: see `load_tower`."""
    try:
        return _find(model_id, pretrained, kind)
    except OSError as error:
        reason = f"download failed ({' '.join(str(error).split())})"
        raise ValueError(f"{kind} tower {model_id}: {reason}: check the network or pass `local-dir:FOLDER`") from None


def _find(model_id: str, pretrained: str | None, kind: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    names = (CONFIG_NAME, WEIGHTS_NAME)
    if model_id.startswith(LOCAL):
        config, weights = (Path(model_id.removeprefix(LOCAL)) / name for name in names)
        if missing := [file.name for file in (config, weights) if not file.is_file()]:
            remedy = "train one with `accelerate launch scripts/train_clip.py`, or pass a folder that open_clip saved"
            raise ValueError(f"{kind} tower {model_id} has no {missing[0]}: {remedy}")
    elif model_id.startswith(HUB):
        from huggingface_hub import hf_hub_download

        config, weights = (Path(hf_hub_download(model_id.removeprefix(HUB), name)) for name in names)
    else:
        return _find_public(model_id, pretrained, kind)
    try:
        values = dict(json.loads(config.read_bytes()))
        cfg = dict(values["model_cfg"])
        key = {"text": "text_cfg", "image": "vision_cfg"}[kind]
        cfg |= {"embed_dim": cfg["embed_dim"], key: dict(cfg[key])}
        return cfg, dict(values.get("preprocess_cfg", {})), weights
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{config} has no model_cfg of a {kind} tower: save or download it again") from None


def public_architecture(name: str, *, kind: str = "text") -> dict[str, Any]:
    """open_clip's `model_cfg` of a published tower, without its weights; ValueError: there is none of this name."""
    import open_clip  # slow to import, and needed only for its list of models

    cfg = open_clip.get_model_config(name)
    if cfg is None:
        field = FIELDS[kind][0]
        raise ValueError(f"{field} {name!r} is not in open_clip: pass one, `local-dir:FOLDER` or `hf-hub:ORG/NAME`")
    return cfg


def _find_public(name: str, pretrained: str | None, kind: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    import open_clip

    cfg = public_architecture(name, kind=kind)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        field, tag = FIELDS[kind]
        raise ValueError(f"{field} {name}: set {tag} to one of {', '.join(tags)}, not {pretrained}")
    entry = open_clip.get_pretrained_cfg(name, pretrained)
    cfg = cfg | {"quick_gelu": entry.get("quick_gelu", cfg.get("quick_gelu", False))}
    return cfg, entry, Path(open_clip.download_pretrained(entry, prefer_hf_hub=True))


def _check_supported(cfg: dict[str, Any], model_id: str) -> None:
    text = cfg["text_cfg"] | (cfg["text_cfg"].get("tokenizer_kwargs") or {})
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(f"text tower {model_id} is a Hugging Face transformer: only CLIP's own is supported")
    for name, value in SUPPORTED_TEXT_CFG.items():
        if text.get(name, value) != value:
            raise ValueError(f"text tower {model_id} has {name} {text[name]!r}: only {value!r} is supported")

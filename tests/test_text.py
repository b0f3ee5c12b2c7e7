"""The text tower: agreement with open_clip, freezing, masks, messages."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.text import DualTextEncoder, TextConfig, TextEncoder, encode_for_cache, states_from_cache
from ldm.text.weights import CONFIG_NAME, WEIGHTS_NAME

PROMPTS = ["a red circle", "", "a very small blue ring in the top left corner, on white"]


@pytest.fixture
def folder(tiny_runs: Path) -> Path:
    return tiny_runs / "clip/model"


def load(folder: Path, **values: object) -> TextEncoder:
    return TextEncoder.load(TextConfig(model=f"local-dir:{folder}", **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize(("quick_gelu", "normalize"), [(False, True), (True, True), (False, False)])
def test_states_are_those_of_open_clip(layer: str, quick_gelu: bool, normalize: bool, tmp_path: Path) -> None:
    """Random weights, two layers: token states, mask and pooled vector against open_clip's own model and loader."""
    cfg = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**cfg).eval()  # type: ignore[arg-type]
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / WEIGHTS_NAME)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    with torch.no_grad():
        states = theirs.forward_intermediates(text=ids, normalize_intermediates=normalize, intermediates_only=True)
        pooled = theirs.encode_text(ids)
    ours = load(tmp_path, layer=layer, normalize=normalize)(PROMPTS)
    want = states["text_intermediates"][-1 if layer == "last" else -2]
    length = ours.tokens.shape[1]
    torch.testing.assert_close(ours.tokens, want[:, :length], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)
    ends = (ids == 49407).int().argmax(1) + 1
    assert ours.mask.sum(1).tolist() == ends.tolist() and length == ends.max()


@pytest.mark.parametrize("values", [{}, {"pad_token_id": 49407}, {"zero_empty_prompt": True, "use_pooled": True}])
@pytest.mark.parametrize("two", [False, True])
def test_states_that_are_kept_are_the_same(values: dict[str, Any], two: bool, folder: Path) -> None:
    """Kept one by one, or together, and put in batches of any length."""
    text: Any = load(folder, **values)
    text = DualTextEncoder(text, load(folder, layer="penultimate", **values)) if two else text
    ids = text.tokenize(PROMPTS)
    tokens, pooled = encode_for_cache(text, ids)
    alone = [encode_for_cache(text, ids[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(tokens, torch.cat([own for own, _ in alone]), rtol=1e-5, atol=1e-5)
    for chosen in ([0, 1], [2, 1], [1]):
        want, found = text.id_states(ids[chosen]), states_from_cache(text, ids[chosen], tokens[chosen], pooled[chosen])
        seen = torch.ones(want.tokens.shape[:2], dtype=torch.bool) if want.mask is None else want.mask
        assert (found.mask is None) == (want.mask is None) and (
            found.mask is None or torch.equal(found.mask, want.mask)
        )
        assert found.hidden_states.shape == want.tokens.shape
        torch.testing.assert_close(found.hidden_states[seen], want.tokens[seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.pooled, want.pooled, rtol=1e-5, atol=1e-5)


def test_two_towers_say_both(folder: Path) -> None:
    first, second = load(folder, padding=49407), load(folder, padding=0, layer="penultimate", pooled=True)
    both = DualTextEncoder(first, second)
    assert (both.width, both.pooled_dim) == (first.width + second.width, second.pooled_dim)
    for name in ("forward", "prompt_states"):
        a, b, states = (getattr(encoder, name)(PROMPTS) for encoder in (first, second, both))
        assert torch.equal(states.tokens, torch.cat([a.tokens, b.tokens], -1)) and states.mask is None
        assert torch.equal(states.pooled, b.pooled)
    with pytest.raises(ValueError, match="set the padding of both text towers, or of none"):
        DualTextEncoder(first, load(folder))
    second.tower.length = 20
    with pytest.raises(ValueError, match="the text towers take 24 and 20 tokens: choose two with one limit"):
        DualTextEncoder(first, second)


def test_a_configuration_that_tells_no_tower_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "text")
    for content in ("{", "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 3}}'):
        (tmp_path / "text" / CONFIG_NAME).write_text(content)
        with pytest.raises(ValueError, match="open_clip_config.json tells no text tower as open_clip's configuration"):
            load(tmp_path / "text")


def test_an_empty_prompt_can_be_zeros(folder: Path) -> None:
    zeros, plain = load(folder, zero_empty=True), load(folder)
    for name in ("forward", "prompt_states"):
        states, want = (getattr(encoder, name)(PROMPTS) for encoder in (zeros, plain))
        assert not states.tokens[1].any() and not states.pooled[1].any() and want.tokens[1].any()
        assert torch.equal(states.tokens[::2], want.tokens[::2]) and torch.equal(states.pooled[::2], want.pooled[::2])


def test_open_clip_loads_what_train_clip_saved(folder: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    saved = load_file(folder / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red circle"])
    torch.testing.assert_close(model.encode_text(ids), load(folder)(["a red circle"]).pooled, rtol=1e-5, atol=1e-5)


def test_frozen_means_frozen(folder: Path) -> None:
    text = load(folder)
    text.train()
    assert not any(module.training for module in text.modules())
    assert not any(p.requires_grad for p in text.parameters())
    assert not text(PROMPTS).tokens.requires_grad


def test_a_prompt_is_encoded_alike_in_every_company(folder: Path) -> None:
    text = load(folder)
    alone, together = text(PROMPTS[:1]), text(PROMPTS)
    length = alone.tokens.shape[1]
    torch.testing.assert_close(together.tokens[:1, :length], alone.tokens, rtol=0, atol=1e-6)
    assert together.mask[0].sum() == alone.mask.sum()


def test_a_cut_prompt_is_said_with_what_was_cut(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(folder).tokenize(["red " * 21 + "circle"])
        assert not caplog.records
        load(folder).tokenize(["red " * 22 + "circle", "a circle"])
    assert [r.getMessage() for r in caplog.records] == ["prompt has 23 tokens, the limit is 22; ignored: 'circle'"]


def test_a_tower_without_weights_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text())
    with pytest.raises(ValueError, match=r"has no open_clip_model.safetensors: train one with .*train_clip.py"):
        load(tmp_path)
    tensors = load_file(folder / WEIGHTS_NAME)
    del tensors["ln_final.weight"], tensors["text_projection"]
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(
        ValueError, match="lacks 2 tensors: ln_final.weight, text_projection|lacks 2 tensors: text_projection"
    ):
        load(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can not be read"):
        load(tmp_path)


def test_public_names_need_a_known_model_and_tag() -> None:
    with pytest.raises(ValueError, match="'ViT-Z-99' is no open_clip model"):
        TextEncoder.load(TextConfig(model="ViT-Z-99"))
    with pytest.raises(ValueError, match="set text.pretrained to one of laion2b_s32b_b79k"):
        TextEncoder.load(TextConfig(model="ViT-H-14"))


def test_towers_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (tmp_path / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes())
    for change, message in (
        ({"hf_model_name": "roberta-base"}, "is a Hugging Face transformer"),
        ({"pool_type": "last"}, "has pool_type: 'last'; only 'argmax' can be read"),
    ):
        changed = {**config["model_cfg"], "text_cfg": {**config["model_cfg"]["text_cfg"], **change}}
        (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_the_public_towers_have_their_published_sizes() -> None:
    from ldm.text.tower import TextTower

    for name, parameters in (("ViT-B-32", 63_428_096), ("ViT-H-14", 354_032_640)):
        with torch.device("meta"):
            tower = TextTower(open_clip.get_model_config(name))
        assert sum(p.numel() for p in tower.parameters()) == parameters


def test_a_short_prompt_of_many_tokens_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens are pieces of bytes: fourteen characters can be thirty-eight tokens."""
    text = load(folder)
    for _ in range(2):
        text.tokenize(["猫宇航员在月球上骑马跳舞唱歌"])
    assert [record.message.split(";")[0] for record in caplog.records] == ["prompt has 38 tokens, the limit is 22"]


def test_a_hub_out_of_reach_is_told() -> None:
    with pytest.raises(ValueError, match=r"text tower hf-hub:nobody/nothing can not be fetched .*local-dir:FOLDER"):
        TextEncoder.load(TextConfig(model="hf-hub:nobody/nothing"))

"""Text towers: agreement with open_clip, freezing, masks, caching, messages."""

import json
import shutil
from pathlib import Path
from typing import Any

import cache_latents
import open_clip
import pytest
import torch
from helpers import copy_stages_before, plain, train
from safetensors.torch import load_file, save_file

from ldm.rng import StepRNG
from ldm.stages.clip import CLIPStage, TrainCLIPConfig
from ldm.text import TextConditioner, TextConfig, TextEncoder, load_text_encoder
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextTower
from ldm.text.weights import CONFIG_NAME, WEIGHTS_NAME

PROMPTS = ["a red circle", "", "a very small blue ring in the top left corner, on white"]
METHODS = ["forward", "encode_prompts"]


@pytest.fixture
def folder(tiny_runs: Path) -> Path:
    return tiny_runs / "clip/model"


def load(folder: Path, **values: Any) -> TextConditioner:
    """A conditioner of one tower."""
    return TextConditioner(TextEncoder.load(TextConfig(model=f"local-dir:{folder}", **values)))


def pair(first: TextConditioner, second: TextConditioner) -> TextConditioner:
    """The towers of both."""
    return TextConditioner(*first.encoders, *second.encoders)


def write_config(folder: Path, like: Path, **text_cfg: object) -> None:
    """The configuration of another tower, with some settings changed."""
    cfg = json.loads((like / CONFIG_NAME).read_text())["model_cfg"]
    cfg["text_cfg"] |= text_cfg
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": cfg}))


# Against open_clip.


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize(("quick_gelu", "final_layer_norm"), [(False, True), (True, True), (False, False)])
def test_embeddings_are_those_of_open_clip(
    layer: str, quick_gelu: bool, final_layer_norm: bool, tmp_path: Path
) -> None:
    """Random weights, two layers: hidden states, mask and pooled embedding against open_clip's own model and loader."""
    cfg = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**cfg).eval()
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / WEIGHTS_NAME)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    with torch.no_grad():
        states = theirs.forward_intermediates(
            text=ids, normalize_intermediates=final_layer_norm, intermediates_only=True
        )
        pooled = theirs.encode_text(ids)
    ours = load(tmp_path, layer=layer, final_layer_norm=final_layer_norm)(PROMPTS)
    want = states["text_intermediates"][-1 if layer == "last" else -2]
    length = ours.hidden_states.shape[1]
    torch.testing.assert_close(ours.hidden_states, want[:, :length], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)
    ends = (ids == 49407).int().argmax(1) + 1
    assert ours.mask is not None and ours.mask.sum(1).tolist() == ends.tolist() and length == ends.max()


def test_open_clip_loads_what_train_clip_saved(folder: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    saved = load_file(folder / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red circle"])
    torch.testing.assert_close(model.encode_text(ids), load(folder)(["a red circle"]).pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"clean": "canonicalize"}])
def test_ids_are_those_of_open_clip(settings: dict[str, Any]) -> None:
    """Truncated or not."""
    prompts = [*PROMPTS, "Two  Stars; &amp; a ring!", "red " * 30, "猫宇航员在月球上骑马"]
    ours, theirs = Tokenizer(24, **settings), open_clip.SimpleTokenizer(context_length=24, **settings)
    assert torch.equal(ours(prompts), theirs(prompts))
    assert [ours.encode(prompt) for prompt in prompts] == [theirs.encode(prompt) for prompt in prompts]


def test_the_public_towers_have_their_published_sizes() -> None:
    for name, parameters in (("ViT-B-32", 63_428_096), ("ViT-H-14", 354_032_640)):
        with torch.device("meta"):
            tower = TextTower(open_clip.get_model_config(name))
        assert sum(p.numel() for p in tower.parameters()) == parameters


# Encoders.


def test_a_tower_is_frozen(folder: Path) -> None:
    text = load(folder)
    text.train()
    assert not any(module.training for module in text.modules())
    assert not any(p.requires_grad for p in text.parameters())
    assert not text(PROMPTS).hidden_states.requires_grad


def test_prompts_of_a_batch_do_not_see_each_other(folder: Path) -> None:
    text = load(folder)
    alone, together = text(PROMPTS[:1]), text(PROMPTS)
    length = alone.hidden_states.shape[1]
    torch.testing.assert_close(together.hidden_states[:1, :length], alone.hidden_states, rtol=0, atol=1e-6)
    assert together.mask[0].sum() == alone.mask.sum()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_prompt_can_be_zeros(method: str, folder: Path) -> None:
    zeros, plain = (getattr(load(folder, zero_empty_prompt=zero), method)(PROMPTS) for zero in (True, False))
    assert not zeros.hidden_states[1].any() and not zeros.pooled[1].any() and plain.hidden_states[1].any()
    assert torch.equal(zeros.hidden_states[::2], plain.hidden_states[::2])
    assert torch.equal(zeros.pooled[::2], plain.pooled[::2])


@pytest.mark.parametrize("method", METHODS)
def test_two_towers_are_concatenated(method: str, folder: Path) -> None:
    first = load(folder, pad_token_id=49407)
    second = load(folder, pad_token_id=0, layer="penultimate", use_pooled=True)
    both = pair(first, second)
    assert (both.width, both.pooled_dim) == (first.width + second.width, second.pooled_dim)
    a, b, joined = (getattr(encoder, method)(PROMPTS) for encoder in (first, second, both))
    assert torch.equal(joined.hidden_states, torch.cat([a.hidden_states, b.hidden_states], -1)) and joined.mask is None
    assert torch.equal(joined.pooled, b.pooled)


def test_two_towers_that_do_not_match_are_refused(folder: Path) -> None:
    first, second = load(folder), load(folder, pad_token_id=0)
    with pytest.raises(ValueError, match=r"pad_token_id.*text and second_text"):
        pair(first, second)
    first.encoders[0].tower.length = 20
    with pytest.raises(ValueError, match="context lengths 20 and 24.*choose equal"):
        pair(first, load(folder))


def conditioner(folder: Path, *, two: bool, **values: Any) -> TextConditioner:
    text = load(folder, **values)
    return pair(text, load(folder, layer="penultimate", **values)) if two else text


@pytest.mark.parametrize("values", [{}, {"pad_token_id": 49407}, {"zero_empty_prompt": True, "use_pooled": True}])
@pytest.mark.parametrize("two", [False, True])
def test_cached_embeddings_are_the_same(values: dict[str, Any], two: bool, folder: Path) -> None:
    """Encoded one by one, or together, and put in batches of any length."""
    text = conditioner(folder, two=two, **values)
    ids = text.tokenizer(PROMPTS)
    hidden_states, pooled = text.encode_for_cache(ids)
    alone = [text.encode_for_cache(ids[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(hidden_states, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for batch in ([0, 1], [2, 1], [1]):
        want = text.encode_ids(ids[batch])
        cached = text.states_from_cache(ids[batch], hidden_states[batch], pooled[batch])
        assert cached.hidden_states.shape == want.hidden_states.shape
        mask = torch.ones(want.hidden_states.shape[:2], dtype=torch.bool) if want.mask is None else want.mask
        assert (cached.mask is None) == (want.mask is None)
        assert cached.mask is None or torch.equal(cached.mask, mask)
        torch.testing.assert_close(cached.hidden_states[mask], want.hidden_states[mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cached.pooled, want.pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [{}, {"pad_token_id": 49407}, {"zero_empty_prompt": True, "use_pooled": True}])
@pytest.mark.parametrize("two", [False, True])
def test_nothing_waits_for_the_device(values: dict[str, Any], two: bool, folder: Path) -> None:
    """On the meta device no number can be read, so lengths must come from the ids on the CPU."""
    text = conditioner(folder, two=two, **values)
    ids, want = text.tokenizer(PROMPTS), text(PROMPTS)
    text.to("meta")
    hidden_states, pooled = text.encode_for_cache(ids)
    for embeddings in (text.encode_ids(ids), text.states_from_cache(ids, hidden_states, pooled)):
        for tensor, like in zip(embeddings, want, strict=True):
            if tensor is None or like is None:
                assert tensor is like is None
            else:
                assert tensor.is_meta and tensor.shape == like.shape


# Captions over the limit.


def test_captions_that_are_cut_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once each, the empty one not at all, and with what the first one loses; nothing is logged meanwhile."""
    tokenizer = load(folder).tokenizer
    tokenizer(["red " * 21 + "circle", ""])
    assert tokenizer.report() == ""
    for _ in range(2):
        tokenizer(["red " * 22 + "circle", "a circle", ""])
    report = tokenizer.report()
    assert "1 of 3 have over 24 tokens" in report and "without 'circle'" in report and "--clip.context-length" in report
    assert "\n" not in report and not caplog.records


def test_tokens_are_pieces_of_bytes(folder: Path) -> None:
    """Fourteen characters can be thirty-eight tokens."""
    tokenizer = load(folder).tokenizer
    tokenizer(["猫宇航员在月球上骑马跳舞唱歌"])
    assert "1 of 1 have over 24 tokens" in tokenizer.report()


def test_captions_are_read_ahead_unless_they_are_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.text.tokenizer.CACHED_CAPTIONS", 3)
    long = "red " * 23
    assert "1 of 2 have" in load(folder).tokenizer.read_ahead(["a circle", long], [long])
    tokenizer = load(folder).tokenizer
    assert tokenizer.read_ahead(["a", "b"], ["c", long]) == "" and tokenizer.read_ahead([]) == ""
    tokenizer([long])
    assert "1 of 1 have" in tokenizer.report()


@pytest.mark.parametrize("stage", ["clip", "ldm"])
def test_a_training_says_how_many_captions_are_cut(
    tiny_runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    """On one line at its start, on one at its end, and nowhere between."""
    photos = write_photos(tmp_path / "photos")
    copy_stages_before(stage, tiny_runs, tmp_path)
    capsys.readouterr()
    train(stage, tmp_path / stage, "--data.source", str(photos))
    printed = capsys.readouterr().out.splitlines()
    cut = [number for number, line in enumerate(printed) if "captions: 3 of 12 have over 24 tokens" in line]
    assert len(cut) == 2 and cut[0] < printed.index(f"configuration: {tmp_path / stage / 'config.yaml'}") < cut[1]
    assert not [record for record in caplog.records if "tokens" in record.getMessage()]


def test_cached_latents_remember_which_captions_were_cut(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    copy_stages_before("ldm", tiny_runs, tmp_path)
    flags = ["--data.source", str(photos), "--data.resolution", "16"]
    cache_latents.main([*flags, "--out", str(tmp_path / "latents")])
    assert capsys.readouterr().out.count("captions: 3 of 12 have over 24 tokens") == 2
    train("ldm", tmp_path / "ldm", "--data.source", str(photos), "--cached-latents", str(tmp_path / "latents"))
    assert capsys.readouterr().out.count("captions: 3 of 12 have over 24 tokens") == 1


def write_photos(folder: Path) -> Path:
    """Twelve images, three of them with a caption of over 24 tokens."""
    folder.mkdir()
    for number in range(12):
        plain((20 * number, 0, 0)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"{number} " + "red " * (30 if number < 3 else 3))
    return folder


# Loading.


def test_none_one_or_two_towers(tiny_runs: Path, folder: Path) -> None:
    latest, none = TextConfig(), TextConfig(model="none")
    assert load_text_encoder([none, none], tiny_runs, "") is None
    one = load_text_encoder([latest, none], tiny_runs, "")
    two = load_text_encoder([latest, latest], tiny_runs, "")
    assert one is not None and [encoder.model_id for encoder in one.encoders] == [f"local-dir:{folder}"]
    assert two is not None and [encoder.model_id for encoder in two.encoders] == [f"local-dir:{folder}"] * 2


def test_without_a_finished_tower_the_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"text tower.*{tmp_path}.*train it so"):
        load_text_encoder([TextConfig()], tmp_path, "train it so")


def test_the_contrastive_loss_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    texts = torch.nn.functional.normalize(images + 0.3 * torch.randn(64, 32), dim=1)
    features = {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(50.0)}
    stage = CLIPStage(TrainCLIPConfig(clip={"width": 32, "num_layers": 1, "num_heads": 2}))  # type: ignore[arg-type]
    batch: Any = {"image": torch.zeros(64, 3, 32, 32), "caption": ["a"] * 64}
    networks: Any = {"clip": lambda *_: features}
    exact, found = (_loss_under_autocast(stage, networks, batch, bf16=bf16) for bf16 in (False, True))
    assert found == pytest.approx(exact, rel=1e-5)


def _loss_under_autocast(stage: CLIPStage, networks: Any, batch: Any, *, bf16: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return stage.loss("clip", networks, batch, StepRNG(0, 0, range(64), 64, torch.device("cpu")))["loss"].item()


def test_a_random_tower_needs_no_file() -> None:
    """Its prompts are not trimmed, so that no shape depends on them; what follows their end stays masked."""
    cfg = {"embed_dim": 24, "text_cfg": {"context_length": 20, "width": 32, "heads": 2, "layers": 2}}
    text = TextConditioner(TextEncoder.random(TextConfig(model="latest", use_pooled=True), cfg))
    embeddings = text(["a star"])
    assert embeddings.hidden_states.shape == (1, 20, 32) and text.pooled_dim == 24
    assert embeddings.mask is not None and 3 < embeddings.mask.sum() < 20
    assert embeddings.hidden_states.isfinite().all()


def test_a_configuration_without_a_tower_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "text")
    for content in ("{", "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 3}}'):
        (tmp_path / "text" / CONFIG_NAME).write_text(content)
        with pytest.raises(ValueError, match=f"{CONFIG_NAME}.*model_cfg.*save or download it again"):
            load(tmp_path / "text")


def test_a_tower_without_weights_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text())
    with pytest.raises(ValueError, match=rf"has no {WEIGHTS_NAME}.*train_clip.py"):
        load(tmp_path)
    tensors = load_file(folder / WEIGHTS_NAME)
    del tensors["ln_final.weight"], tensors["text_projection"]
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(
        ValueError, match=rf"{WEIGHTS_NAME} does not fit .* 2 tensors differ: text_projection expected .*, got none"
    ):
        load(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME} is damaged.*download it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        ({"hf_model_name": "roberta-base"}, "Hugging Face transformer.*only CLIP's own"),
        ({"pool_type": "last"}, "pool_type 'last'.*only 'argmax'"),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "reduction_mask 'random'.*only ''"),
    ],
)
def test_unsupported_towers_are_refused(
    text_cfg: dict[str, object], message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes())
    write_config(tmp_path, folder, **text_cfg)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-Z-99", r"text.model 'ViT-Z-99'.*open_clip.*local-dir:FOLDER"),
        ("ViT-H-14", "text.model ViT-H-14.*set text.pretrained to one of laion2b_s32b_b79k.*not None"),
        ("hf-hub:nobody/nothing", "text tower hf-hub:nobody/nothing.*download failed.*local-dir:FOLDER"),
    ],
)
def test_public_towers_that_cannot_be_loaded(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder.load(TextConfig(model=model))

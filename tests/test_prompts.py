"""The syntax of prompts: weights, AND, long prompts, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.samplers import final_latents
from ldm.pipeline import Pipeline
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.text.prompt_weights import WeightedText, other_syntax, parse_weights, split_and, strip_weights


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("a ((red)) [cat]", [("a ", 1), ("red", 1.21), (" ", 1), ("cat", 1 / 1.1)]),
        ("(a (red:0.5) cat)", [("a ", 1.1), ("red", 0.55), (" cat", 1.1)]),
        (r"a \(red\) cat", [("a (red) cat", 1)]),
        (r"a\b", [(r"a\b", 1)]),
        ("a (red cat", [("a ", 1), ("red cat", 1.1)]),
        ("red) cat: 3", [("red) cat: 3", 1)]),
        ("[red:2]", [("red:2", 1 / 1.1)]),
        ("(red:-.5)", [("red", -0.5)]),
        ("()", [("", 1)]),
    ],
)
def test_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    parsed = parse_weights(prompt)
    assert [part.text for part in parsed] == [text for text, _ in parts]
    assert [part.weight for part in parsed] == pytest.approx([weight for _, weight in parts])


def test_numbers_without_decimals_and_unclosed_brackets() -> None:
    assert parse_weights("a (red:1.) [.5:") == [
        WeightedText("a ", 1.0),
        WeightedText("red", 1.0),
        WeightedText(" ", 1.0),
        WeightedText(".5:", 1 / 1.1),
    ]


@pytest.mark.parametrize("prompt", ["(cat:1001)", "(cat:-1001)", "(" * 100 + "cat", "a AND cat :1001"])
def test_weights_over_the_limit_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt has 'cat' with weight .*at most 1000"):
        [parse_weights(part.text) for part in split_and(prompt)]


def test_and_joins_prompts() -> None:
    assert split_and("a cat") == [("a cat", 1.0)]
    assert split_and("a cat AND a dog :0.5 AND SAND") == [("a cat", 1.0), ("a dog", 0.5), ("SAND", 1.0)]
    assert split_and("a AND b :1.") == [("a", 1.0), ("b", 1.0)]
    assert split_and("a clock: 3") == [("a clock: 3", 1.0)]
    assert strip_weights("a (red:1.3) cat AND [dog] :2").split() == ["a", "red", "cat", "dog"]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.3) cat AND [dog] :2, b: 3, a clock [red:green], 1|2, i < 3", []),
        (r"\[a|b\] \{c|d\} a break and_more snake_case__x", []),
        (
            "cat <lora:ink-v2.1:0.8> <LyCO:b:1:0.5><hypernet:c>",
            ["<lora:ink-v2.1:0.8>", "<LyCO:b:1:0.5>", "<hypernet:c>"],
        ),
        ("cat BREAK dog\nBREAK, x ADDCOL y AND_PERP z", ["BREAK", "BREAK", "ADDCOL", "AND_PERP"]),
        ("[a:b:0.5] [a::.25] [b:10] [ (a:1.2) : b : 3 ]", ["[a:b:0.5]", "[a::.25]", "[b:10]", "[ (a:1.2) : b : 3 ]"]),
        ("[a|b cat] {a|b} {c} __animals/big__", ["[a|b cat]", "{a|b}", "{c}", "__animals/big__"]),
        ("embedding:bad-hands-5, (embedding:x:1.2)", ["embedding:bad-hands-5", "embedding:x:1.2"]),
    ],
)
def test_syntax_of_other_programs_is_found(prompt: str, parts: list[str]) -> None:
    assert other_syntax(prompt) == parts


@pytest.fixture
def text(tiny_runs: Path) -> TextConditioner:
    """24 tokens, two of them start and end."""
    return TextConditioner(TextEncoder.load(TextConfig(model=f"local-dir:{tiny_runs}/clip/model")))


def test_a_prompt_without_syntax_is_encoded_as_in_training(text: TextConditioner) -> None:
    prompts = ["a red circle", "", "a very small blue ring in the corner"]
    for from_prompts, from_captions in zip(text.encode_prompts(prompts), text(prompts), strict=True):
        torch.testing.assert_close(from_prompts, from_captions)


def test_weights_multiply_the_hidden_states_of_their_words(text: TextConditioner) -> None:
    plain, weighted = (text.encode_prompts([p]).hidden_states[0] for p in ("a red circle", "a (red:1.5) circle"))
    ratio = (weighted / plain).mean(1)
    torch.testing.assert_close(ratio, torch.tensor([1, 1, 1.5, 1, 1.0]), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_encoded_in_chunks(text: TextConditioner) -> None:
    long = "red " * 22 + "circle"
    batch = text.encode_prompts([long, "a star"])
    chunks = text.encode_prompts(["red " * 22, "circle"])
    torch.testing.assert_close(batch.hidden_states[0, :24], chunks.hidden_states[0])
    torch.testing.assert_close(batch.hidden_states[0, 24:27], chunks.hidden_states[1, :3])
    assert batch.mask is not None and batch.mask.sum(1).tolist() == [24 + 3, 4]
    alone = text.encode_prompts(["a star"])
    torch.testing.assert_close(batch.hidden_states[1, :4], alone.hidden_states[0])
    torch.testing.assert_close(batch.pooled, torch.cat([chunks.pooled[:1], alone.pooled]))


def test_special_tokens_are_refused(text: TextConditioner) -> None:
    """However they are written."""
    escaped = ("&lt;end_of_text&gt;", "&amp;lt;START_OF_TEXT&amp;gt;", "＜end_of_text＞")
    for token in ("<end_of_text>", "<start_of_text>", *escaped):
        with pytest.raises(ValueError, match=r"prompt.*special token <(start|end)_of_text>: leave it out"):
            text.encode_prompts([f"a cat {token} a dog"])


def test_a_prompt_of_too_many_chunks_is_refused(text: TextConditioner) -> None:
    text.encode_prompts(["red " * 440])
    with pytest.raises(ValueError, match="prompt has 441 tokens, at most 440.*shorten it"):
        text.encode_prompts(["red " * 441])


# In the pipeline.


def pixels(pipeline: Pipeline, prompt: str, **more: object) -> np.ndarray:
    image = pipeline(prompt, seed=3, steps=4, guidance_scale=20.0, **more)[0]  # type: ignore[arg-type]
    return np.asarray(image, dtype=int)


def test_the_pipeline_reads_the_syntax(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    alone = pixels(pipeline, "a red circle")
    assert abs(pixels(pipeline, "a red circle AND a blue star :0") - alone).max() <= 1
    assert abs(pixels(pipeline, "a red circle :0.5 AND a red circle :0.5") - alone).max() <= 1
    assert abs(pixels(pipeline, "a red circle AND a blue star") - alone).max() > 1
    assert abs(pixels(pipeline, "a (red:90) circle") - alone).max() > 1
    assert pipeline.unseen_words("a (red:1.3) zebra AND [circle]") == ["zebra"]
    with pytest.raises(ValueError, match="special token <end_of_text>: leave it out"):
        pixels(pipeline, "a star <end_of_text> a ring")


def test_prompts_with_and_without_and_share_a_batch(tiny_model: Path) -> None:
    """Each image of a mixed batch is that of its own prompt."""
    pipeline = Pipeline.load(tiny_model)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle AND a blue star", "a ring"]
    call = {"seeds": [0, 1], "steps": 3, "guidance_scale": 3.0}
    both = final_latents(pipeline.stream(noise, prompts, [""] * 2, **call))  # type: ignore[arg-type]
    for i in range(2):
        own = {**call, "seeds": [i]}
        one = final_latents(pipeline.stream(noise[i : i + 1], prompts[i : i + 1], [""], **own))  # type: ignore[arg-type]
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-4)


def test_the_text_is_read_once_for_all_steps(tiny_model: Path) -> None:
    """Its keys and values do not change; the time does, and is embedded once in each call of the network."""
    pipeline = Pipeline.load(tiny_model)
    attention = next(m for name, m in pipeline.unet.named_modules() if name.endswith("cross_attention"))
    calls = []
    attention.to_k.register_forward_hook(lambda *_: calls.append("keys"))  # type: ignore[union-attr]
    pipeline.unet.time_embed.register_forward_hook(lambda *_: calls.append("times"))
    pipeline("a star", steps=5)
    assert calls.count("keys") == 1 and calls.count("times") == 5
    pipeline("a star", steps=5, sampler="dpmpp_sde")  # which calls the network twice in each step but the last
    assert calls.count("keys") == 2 and calls.count("times") == 5 + 9

"""txt2img: files, metadata, reproduction, messages."""

import io
import json
import shutil
from pathlib import Path

import pytest
import txt2img
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import ldm.pipeline.generate
from ldm.pipeline import Pipeline
from ldm.pipeline.generate import read_prompt_file
from ldm.pipeline.record import PNG_CHUNK, GenerationRecord, a1111_parameters, read_png


def generate(model: Path, out: Path, *flags: str) -> None:
    txt2img.main([*flags, "--model", str(model), "--out", str(out), "--steps", "2", "--device", "cpu"])


def reproduce(image: Path, *flags: str) -> None:
    txt2img.main(["--reproduce", str(image), "--out", str(image.parent / "again"), *flags])


def copy_with_other_weights(model: Path, folder: Path, factor: float = 0.9) -> Path:
    """A model folder whose U-Net is multiplied by a factor."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(model / "unet.safetensors")
    save_file({name: tensor * factor for name, tensor in tensors.items()}, folder / "unet.safetensors")
    return folder


def test_images_are_numbered_after_those_that_exist(tiny_model: Path, tmp_path: Path) -> None:
    generate(tiny_model, tmp_path, "a red circle")
    generate(tiny_model, tmp_path, "a red circle", "a blue star", "--num-images", "2", "--seed", "5")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "grid-00001.png"]
    assert "Seed: 6" in Image.open(tmp_path / "00004.png").text["parameters"]  # type: ignore[attr-defined]


def test_each_image_is_written_as_it_comes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was generated before a crash is on the disk, with its records."""
    call, batches = Pipeline.__call__, []

    def fail_in_third_batch(*args: object, **settings: object) -> list[Image.Image]:
        batches.append(settings["seed"])
        if len(batches) == 3:
            raise RuntimeError("out of memory")
        return call(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "__call__", fail_in_third_batch)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(tiny_model, tmp_path, "a star", "--num-images", "6", "--batch-size", "2")
    assert batches == [0, 2, 4]
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert [(record.seed, record.index) for record in map(read_png, files)] == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_metadata_is_conventional_and_complete(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--negative-prompt", "blurry", "--guidance-scale", "4", "--sampler", "ddim"]
    generate(tiny_model, tmp_path, "ein Stern, größer", *flags)
    text = Image.open(tmp_path / "00000.png").text  # type: ignore[attr-defined]
    lines = text["parameters"].split("\n")
    assert lines[:2] == ["ein Stern, größer", "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 2, Sampler: DDIM, CFG scale: 4.0, Seed: 0, Size: 16x16, Model hash: ")
    record = json.loads(text["ldm"])
    assert record["version"] == 2 and record["prompt"] == "ein Stern, größer" and record["sampler"] == "ddim"
    assert len(record["model_hash"]) == 64


def test_values_with_commas_colons_or_lines_are_quoted() -> None:
    size = {"width": 8, "height": 8, "num_images": 1, "index": 0}
    call = {"prompt": "p", "negative_prompt": "", "steps": 1, "sampler": "ddim", "guidance_scale": 1, "seed": 0}
    text = a1111_parameters(GenerationRecord(**call, **size, eta=0, model_hash="ab", model='a, b: "c"\n'))
    assert text.endswith('Model: "a, b: \\"c\\"\\n"')


@pytest.mark.parametrize(
    "flags", [[], ["--sampler", "ddpm"], ["--timesteps", "1,0.4"], ["--num-images", "3", "--batch-size", "2"]]
)
def test_reproduce_makes_the_same_file(flags: list[str], tiny_model: Path, tmp_path: Path) -> None:
    generate(tiny_model, tmp_path / "a", "a red circle", "--seed", "3", *flags)
    for file in (tmp_path / "a").glob("0*.png"):
        out = tmp_path / file.stem
        txt2img.main(["--reproduce", str(file), "--out", str(out)])
        assert (out / "00000.png").read_bytes() == file.read_bytes()


def test_guide_models_tiles_and_previews(tiny_model: Path, tmp_path: Path) -> None:
    """Each changes the images, or shows them, and is reproduced."""
    guide = copy_with_other_weights(tiny_model, tmp_path / "other")
    large = ["a star", "--width", "64", "--height", "64", "--num-images", "2"]
    for name, flags in {
        "plain": [],
        "guided": ["--guide-model", str(guide), "--guidance-scale", "3"],
        "tile": ["--vae-tile", "8"],
    }.items():
        generate(tiny_model, tmp_path / name, *large, *flags, "--preview")
        reproduce(tmp_path / name / "00001.png")
        assert (tmp_path / name / "again/00000.png").read_bytes() == (tmp_path / name / "00001.png").read_bytes()
        assert Image.open(tmp_path / name / "preview.png").size == (2 * 16 + 2, 16)  # two latents of 16 x 16
    images = [Image.open(tmp_path / name / "00000.png").tobytes() for name in ("plain", "guided", "tile")]
    assert len(set(images)) == 3
    copy_with_other_weights(tiny_model, guide, 0.8)
    with pytest.raises(SystemExit, match="other is not the guide model .*put that one back"):
        reproduce(tmp_path / "guided/00000.png")


def test_reproduce_needs_the_model_and_the_metadata(tiny_model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(SystemExit, match="plain.png: no generation metadata"):
        reproduce(plain)
    with pytest.raises(SystemExit, match="none.png: no such image"):
        reproduce(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SystemExit, match="text.png is not a readable PNG"):
        reproduce(tmp_path / "text.png")
    generate(tiny_model, tmp_path / "out", "a star")
    other = copy_with_other_weights(tiny_model, tmp_path / "other")
    with pytest.raises(SystemExit, match=f"another model .{tiny_model}.*--model"):
        reproduce(tmp_path / "out/00000.png", "--model", str(other))


def test_reproduce_takes_no_other_settings(tiny_model: Path, tmp_path: Path) -> None:
    generate(tiny_model, tmp_path, "a star")
    with pytest.raises(SystemExit, match="--reproduce .*00000.png: leave out steps"):
        reproduce(tmp_path / "00000.png", "--steps", "3")
    with pytest.raises(SystemExit, match="leave out prompts"):
        reproduce(tmp_path / "00000.png", "a red circle")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"version": 1, "prompt": "a star"}', "it was made by an older version of ldm .record 1, .* 2"),
        ('{"version": 3, "prompt": "a star"}', "it was made by a newer version of ldm .record 3, .* 2"),
        ('{"version": 2}', "its record is damaged"),
        ('{"version": "1"}', "its record is damaged"),
        ("{", "its record is damaged"),
        ("[]", "its record is damaged"),
    ],
)
def test_records_of_other_versions_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt(PNG_CHUNK, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(SystemExit, match=f"a.png cannot be reproduced: {reason}"):
        reproduce(tmp_path / "a.png")


def test_prompts_from_a_file_and_from_standard_input(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a star \n")
    generate(tiny_model, tmp_path / "a", "--prompt-file", str(tmp_path / "prompts.txt"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a ring\n"))
    generate(tiny_model, tmp_path / "b", "a cross", "--prompt-file", "-")

    def prompts(folder: Path) -> list[str]:
        records = [Image.open(p).text["ldm"] for p in sorted(folder.glob("0*.png"))]  # type: ignore[attr-defined]
        return [json.loads(record)["prompt"] for record in records]

    assert prompts(tmp_path / "a") == ["a red circle", "a star"]
    assert prompts(tmp_path / "b") == ["a cross", "a ring"]


def test_comments_blank_lines_and_encodings_of_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r"""`#` begins a comment, `\#` a prompt; the files of Windows have a byte order mark and CRLF."""
    text = "# shapes\r\n\r\na red circle\r\n  # no star\r\n\\#1 mug # blue\r\na\u2028b\r\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode("utf-8-sig"))
    assert read_prompt_file(str(tmp_path / "prompts.txt")) == ["a red circle", "#1 mug # blue", "a\u2028b"]
    assert "prompts.txt: 3 prompts, 2 lines of comment" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf# nothing\r\n")
    with pytest.raises(ValueError, match="prompts.txt is empty: write a prompt"):
        read_prompt_file(str(tmp_path / "prompts.txt"))


def test_prompts_that_are_no_text_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is generated."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größer".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(SystemExit, match="standard input is not UTF-8 text"):
        generate(tiny_model, tmp_path, "--prompt-file", "-")
    for flags in (["gr\udcf6\udcdfer"], ["a star", "--negative-prompt", "gr\udcf6\udcdfer"]):
        with pytest.raises(SystemExit, match=r"prompt 'gr\\udcf6\\udcdfer' is not UTF-8 text"):
            generate(tiny_model, tmp_path, *flags)


def test_syntax_of_other_programs_is_told_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all prompts together; weights and AND are read."""
    prompts = ["a star <lora:ink:0.8>", "a star <lora:ink:0.8>", "a (star:1.2) AND a ring BREAK [red]"]
    generate(tiny_model, tmp_path, *prompts, "--negative-prompt", "[a:b:0.5]", "--num-images", "2")
    told = [line for line in capsys.readouterr().err.splitlines() if "read as words" in line]
    assert len(told) == 1 and told[0].endswith(": <lora:ink:0.8>, BREAK, [a:b:0.5]")
    generate(tiny_model, tmp_path, *(f"a __{i}__" for i in range(12)))
    assert "__9__ and 2 more\n" in capsys.readouterr().err
    generate(tiny_model, tmp_path, "a (red:1.3) [star] AND a ring :0.5", r"\[a|b\] star: 3")
    assert "read as words" not in capsys.readouterr().err


def test_missing_and_empty_prompts_are_errors(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit, match="prompt file .*empty.txt is empty.*on each line"):
        generate(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "empty.txt"))
    with pytest.raises(SystemExit, match="prompt file .*none.txt does not exist"):
        generate(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "none.txt"))
    with pytest.raises(SystemExit, match="no prompt: .*txt2img.py"):
        generate(tiny_model, tmp_path)
    with pytest.raises(SystemExit, match="a prompt is empty"):
        generate(tiny_model, tmp_path, "a star", " ")
    with pytest.raises(SystemExit, match="sampler 'plms'.*ddpm, ddim"):
        generate(tiny_model, tmp_path, "a star", "--sampler", "plms")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(SystemExit, match="latin.txt is not .*UTF-8"):
        generate(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "latin.txt"))


def test_wrong_settings_are_errors(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file is a file: pass a folder"):
        generate(tiny_model, tmp_path / "file", "a star")
    with pytest.raises(SystemExit, match="timesteps '1,x'.*1,0.7,0.3"):
        generate(tiny_model, tmp_path, "a star", "--timesteps", "1,x")
    with pytest.raises(SystemExit, match="nowhere does not exist: pass a model folder"):
        generate(tmp_path / "nowhere", tmp_path, "a star")
    with pytest.raises(SystemExit, match="device cuda:99 cannot be used here .*: leave out --device"):
        txt2img.main(["a star", "--model", str(tiny_model), "--out", str(tmp_path), "--device", "cuda:99"])
    with pytest.raises(ValueError, match="interval 0.9 0.1"):
        txt2img.Txt2ImgConfig.from_dict({"guidance": {"interval": (0.9, 0.1)}}, source="x")
    with pytest.raises(ValueError, match="guidance_scale: .*finite"):
        txt2img.Txt2ImgConfig.from_dict({"guidance_scale": float("nan")}, source="x")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "vocab.txt").unlink()
    with pytest.raises(SystemExit, match="vocab.txt is missing: copy the folder again"):
        generate(model, tmp_path, "a star")


def test_words_never_seen_in_training_are_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_model, tmp_path, "a cat astronaut")
    assert "words never seen in training: cat, astronaut\n" in capsys.readouterr().err


def test_without_a_model_the_demo_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm.pipeline.generate, "SHIPPED_MODEL", tmp_path / "models/characters")
    with pytest.raises(SystemExit, match="no finished pipeline below runs: .*`make demo`"):
        txt2img.main(["a star"])


def test_zero_steps_are_an_error(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        txt2img.main(["a star", "--steps", "0"])
    assert "greater than or equal to 1" in capsys.readouterr().err

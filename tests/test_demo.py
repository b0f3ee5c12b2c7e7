"""The demo: what is finished is reused, what was stopped continues, and the report has all of it."""

import html.parser
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import demo as script
import make_figures
import psutil
import pytest
import torch
from helpers import plain, train
from PIL import Image, ImageOps

from ldm.config import CONFIGS, read_yaml
from ldm.data.sources.characters import held_out_pairs
from ldm.evaluation import demo, machine
from ldm.evaluation.figures import FiguresConfig, denoising_film, labelled_rows, sampling_states, save_film
from ldm.evaluation.html import to_html
from ldm.evaluation.machine import ConvShape, MachineSpeed, measure_machine, own_cores, recipe_conv
from ldm.pipeline import Pipeline

FIGURES = {"samples.png", "denoising.gif", "seeds.png", "losses.png"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the tiny recipes instead of the demo's, record the training scripts and their flags, and evaluate nothing."""
    recorded = []

    def run_script(script: str, *arguments: str, **environment: str) -> None:
        if script.startswith("train_"):
            assert arguments[0] == "--config" and Path(arguments[1]).parent == CONFIGS / "shapes"
            run, flags = Path(arguments[3]), arguments[4:]
            recorded.append(" ".join([*environment.values(), script, *flags]))
            train(script.removeprefix("train_").removesuffix(".py"), run, *flags)
        elif script == "evaluate.py":
            measure = {"value": 0.9, "low": 0.8, "high": 1.0, "samples": 7}
            path = Path(arguments[1]).parent / "evaluation.json"
            path.write_text(json.dumps({"measures": {"prompt accuracy, all": measure}}))
        elif script == "make_figures.py":
            for name in FIGURES - {"losses.png"}:
                plain().save(Path(arguments[5]) / name)

    minutes = itertools.count()
    monkeypatch.setattr(demo, "run_script", run_script)
    monkeypatch.setattr(demo, "clock", lambda: 60.0 * next(minutes))
    monkeypatch.setattr(demo, "free_cores", lambda: len(own_cores()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return recorded


def of_bf16(gain: float) -> MachineSpeed:
    """A machine that convolves so much faster in bf16."""
    return MachineSpeed("a processor", 2, "2.15", 200.0, 200.0, 200.0 * gain, "1024 x 1024", "3x3")


def test_a_second_demo_continues_or_reuses(
    calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--run", str(tmp_path), "--recipe", str(CONFIGS / "shapes")]
    monkeypatch.setattr(demo, "measure_machine", lambda conv: of_bf16(1.2))
    script.main(run)
    assert calls == ["train_clip.py", "train_vae.py", "train_ldm.py"]
    text = capsys.readouterr().out
    assert "90.0% of 7 unseen captions" in text and "try next" in text
    assert "GFLOP/s" in text.splitlines()[0], "what the machine is worth comes first"
    for file in ("report.html", *FIGURES):
        assert f"{tmp_path}/{file}" in text
    assert Image.open(tmp_path / "losses.png").size[0] > 100
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["total_minutes"] == 5

    script.main(run)
    assert len(calls) == 3
    again = json.loads((tmp_path / "report.json").read_text())
    assert again.pop("peak_memory_gib") >= report.pop("peak_memory_gib")  # of this process, which may have grown
    assert again == report

    del report["speed"]["conv_bf16_gflops"], report["threads"]  # as an earlier version wrote it
    (tmp_path / "report.json").write_text(json.dumps(report))
    script.main(run)
    assert json.loads((tmp_path / "report.json").read_text())["speed"] == again["speed"]


def test_a_demo_that_was_stopped_counts_all_of_its_time(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--run", str(tmp_path), "--recipe", str(CONFIGS / "shapes")]
    monkeypatch.setattr(demo, "measure_machine", lambda conv: of_bf16(1.2))
    run_script = demo.run_script

    def stopped(script: str, *arguments: str, **environment: str) -> None:
        run_script(script, *arguments, **environment)
        if script == "train_ldm.py":
            shutil.rmtree(tmp_path / "ldm/model")
            shutil.rmtree(tmp_path / "ldm/checkpoints/step-000004")
            raise ValueError("train_ldm.py ended with status 130")

    monkeypatch.setattr(demo, "run_script", stopped)
    with pytest.raises(SystemExit, match="status 130"):
        script.main(run)
    monkeypatch.setattr(demo, "run_script", run_script)
    script.main(run)
    assert calls[3:] == ["train_ldm.py --resume latest"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] == {"clip": 60, "vae": 60, "ldm": 120, "evaluate": 60, "figures": 60}
    shutil.rmtree(tmp_path / "ldm")
    script.main(run)
    assert json.loads((tmp_path / "report.json").read_text())["seconds"]["ldm"] == 60, "it was trained anew"


def test_the_unet_is_trained_in_bf16_where_that_is_faster(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "measure_machine", lambda conv: of_bf16(1.9))
    script.main(["--run", str(tmp_path), "--recipe", str(CONFIGS / "shapes")])
    assert calls == ["train_clip.py", "train_vae.py", "bf16 train_ldm.py"]


def test_a_stage_that_fails_stops_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate.py ended with status 1; `make demo` continues from there"):
        demo.run_script("evaluate.py", "--model", str(tmp_path))


def test_busy_cores_get_no_thread(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(demo, "own_cores", lambda: [0, 1, 2])
    monkeypatch.setattr(demo, "free_cores", lambda: 2)
    monkeypatch.setattr(demo, "measure_machine", lambda conv: of_bf16(1.2))
    run = ["--run", str(tmp_path), "--recipe", str(CONFIGS / "shapes")]
    script.main(run)
    assert calls == ["2 train_clip.py", "2 train_vae.py", "2 train_ldm.py"]
    assert "other processes keep 1 of 3 cores busy: one thread for each free core" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "report.json").read_text())["threads"].values()) == {2}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert demo.num_threads() == 3, "as the user says"


@pytest.mark.parametrize(
    ("cores", "percent", "free"),
    [
        ([0, 2, 3], [8.0, 100.0, 0.0, 12.0], 3),
        ([0, 2, 3], [100.0, 0.0, 4.0, 9.0], 2),
        ([0, 2, 3], [100.0, 100.0, 100.0, 100.0], 1),
        ([4, 5], [100.0, 0.0], 1),  # a container that lists its own cores alone
    ],
)
def test_free_cores(cores: list[int], percent: list[float], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_cores", lambda: cores)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: percent)
    assert machine.free_cores() == free


def test_every_caption_of_the_figures_is_of_a_held_out_pair() -> None:
    held_out = [
        re.compile(rf"an? {creature}\b.* {role}\b|an? {role} {creature}\b") for creature, role in held_out_pairs()
    ]
    for recipe in ("characters", "characters-emoji"):
        path = CONFIGS / recipe / "figures.yaml"
        figures = FiguresConfig.from_dict(read_yaml(path), source=str(path))
        assert figures.captions[0] == "a cat astronaut"
        for caption in (*figures.captions, figures.open_caption):
            assert any(pair.match(caption) for pair in held_out), caption


def test_a_run_of_other_data_is_not_reused(calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.yaml").write_text("data: {source: emoji}")
    with pytest.raises(SystemExit, match=r"clip was trained on emoji, not on characters of .*clip.yaml: .*--run"):
        script.main(["--run", str(tmp_path)])
    assert not calls
    with pytest.raises(SystemExit, match=r"nowhere/figures.yaml: no such configuration file"):
        script.main(["--run", str(tmp_path), "--recipe", "nowhere"])


class Addresses(html.parser.HTMLParser):
    """The addresses in a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_has_the_machine_all_measures_and_all_figures(tmp_path: Path) -> None:
    """In both forms; the page needs nothing beside it."""
    for name in FIGURES:
        plain().save(tmp_path / name)
    speed = measure_machine(ConvShape(batch=2, channels=8, side=4), seconds=0.01)._asdict()
    measures = {"prompt accuracy, all": {"value": 0.9, "low": 0.8, "high": 1.0, "samples": 7}}
    report = {"seconds": {"clip": 61.0, "evaluate": 9.0}, "threads": {"clip": 2, "evaluate": 1},
              "total_minutes": 1.2, "peak_memory_gib": 1.5,
              "machine": "Linux", "measures": measures, "speed": speed,
              "data": {"source": "shapes", "emoji_font": None}}  # fmt: skip
    figures = FiguresConfig(captions=("a red star",), open_caption="a blue star")
    demo.write_report(tmp_path, report, figures)
    text, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    parts = (speed["processor"], "GFLOP/s", "3x3, 8 channels, 4 x 4, batch 2", "prompt accuracy, all", "0.800 to 1.000")
    for part in (*parts, "1.5 GiB", "evaluate", "a blue star"):
        assert part in text and part in page, part
    assert text.index("GFLOP/s") < text.index("prompt accuracy")
    for name in FIGURES:
        assert f"]({name})" in text and (tmp_path / name).is_file()
    seen = Addresses(page)
    assert len(seen.addresses) == len(FIGURES) and {"table", "style", "title"} <= seen.tags
    assert all(address.startswith(("data:image/png;base64,", "data:image/gif;base64,")) for address in seen.addresses)
    assert "url(" not in page and "@import" not in page and "script" not in seen.tags
    assert "OpenMoji" not in text
    report["data"] = {"source": "characters", "emoji_font": None}
    assert "[OpenMoji](https://openmoji.org), under [CC BY-SA 4.0]" in demo.to_markdown(report, figures)


def test_a_page_is_escaped_and_titled() -> None:
    page = to_html("# A < B\n\ntext", Path())
    assert "<title>A &lt; B</title>" in page and "<p>text</p>" in page


def test_what_a_machine_is_worth() -> None:
    conv = recipe_conv(CONFIGS / "shapes")
    assert conv == ConvShape(batch=32, channels=128, side=4)
    assert conv.flop == 3 * 2 * 32 * 4 * 4 * 128 * 128 * 9
    speed = measure_machine(conv, seconds=0.02)
    assert speed.cores >= 1 and speed.processor
    assert all(0.1 < flops < 1e6 for flops in (speed.matmul_gflops, speed.conv_gflops, speed.conv_bf16_gflops))


def test_a_film_has_every_state_and_loops(tiny_model: Path, tmp_path: Path) -> None:
    pipeline, prompts = Pipeline.load(tiny_model), ["a red star", "a blue ring"]
    save_film(denoising_film(pipeline, prompts, steps=6), tmp_path / "film.gif")
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 4 and film.info["loop"] == 0, "0 is for ever"
    durations = []
    for index in range(film.n_frames):
        film.seek(index)
        durations.append(film.info["duration"])
    assert durations[0] == durations[-2] < durations[-1], "the last frame is held"


def test_a_film_of_64_pixels_is_below_a_mebibyte(tmp_path: Path) -> None:
    """Three prompts, shown as the film shows them, in 16 frames: z_t is pure noise in all of them, the guess is not."""
    draw = random.Random(0)
    pairs = [[Image.frombytes("RGB", (64, 64), draw.randbytes(3 * 64**2)), plain(size=(64, 64))] for _ in range(3)]
    frame = labelled_rows({f"prompt {i}": pair for i, pair in enumerate(pairs)}, width=150)
    save_film([ImageOps.invert(frame) if i % 2 else frame for i in range(16)], tmp_path / "film.gif")
    assert (tmp_path / "film.gif").stat().st_size < 2**20


def test_the_states_of_sampling_end_in_the_image(tiny_model: Path) -> None:
    pipeline, prompts = Pipeline.load(tiny_model), ["a red star", "a blue ring"]
    states = sampling_states(pipeline, prompts, steps=3)
    assert [state.t for state in states] == sorted((state.t for state in states), reverse=True)
    assert states[0].t == 1 and states[-1].t == 0
    unguided = pipeline.sample(prompts, range(2), steps=3, guidance_scale=1.0)
    assert torch.equal(pipeline.decode(states[-1].z), unguided)


def test_all_figures_of_a_model(tiny_model: Path, tmp_path: Path) -> None:
    texts = {"captions": ["a red star", "a blue ring", "a star"], "open_caption": "a star", "columns": 1}
    edit = {"image": "a red star", "wanted": "a blue star", "inverted": ["a ring", "a star"]}
    (tmp_path / "figures.yaml").write_text(json.dumps({**texts, "edit": edit}))
    make_figures.main(["--config", str(tmp_path / "figures.yaml"), "--model", str(tiny_model), "--out", str(tmp_path)])
    names = ("samples", "noising", "denoising", "seeds", "guidance", "edits", "latents")
    sizes = {name: Image.open(tmp_path / f"{name}.png").size for name in names}
    assert sizes["samples"][1] > 3 * sizes["samples"][0], "one below the other"
    assert sizes["seeds"][0] > 8 * 90 and sizes["seeds"][1] < 110, "eight beside each other"
    assert Image.open(tmp_path / "denoising.gif").n_frames == 16


def test_figures_of_a_model_that_does_not_name_its_data(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny_model)
    pipeline.components = pipeline.components._replace(metadata={})
    pipeline.save(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"model does not name its data.*--prompts") as caught:
        make_figures.main(flags)
    assert "\n" not in str(caught.value)
    make_figures.main([*flags, "--prompts", "a red star"])
    assert (tmp_path / "prompts.png").is_file()

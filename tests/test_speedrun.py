"""The table of records: seconds of all stages until held-out captions are obeyed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import candidates
import pytest
import speedrun
import speedrun_diffusers
import torch
from helpers import COMMON, TINY, copy_stages_before, train

from ldm.evaluation.machine import MachineSpeed
from ldm.training.stage import Stage
from ldm.training.trainer import Trainer

HEAD = "# Records\n\n<!-- measured -->\n"


def flags(stage: str) -> list[str]:
    """The tiny recipe of a stage."""
    words = f"{COMMON} {TINY[stage]}".split()
    return [f"--{stage}.{word[2:]}" if word.startswith("--") else word for word in words]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the speedrun on tiny recipes of shapes, where a given share of each batch of images is right."""
    monkeypatch.setattr(speedrun, "RESULTS", tmp_path / "speedrun.json")
    monkeypatch.setattr(speedrun, "RECORDS", tmp_path / "records.md")
    (tmp_path / "records.md").write_text(HEAD)
    machine = MachineSpeed("a processor", 2, "2.15", 200.0, 190.0, 380.0, "1024 x 1024", "3x3")
    monkeypatch.setattr(speedrun, "measure_machine", lambda conv: machine)
    monkeypatch.setattr(speedrun, "load_classifier", lambda *_: None)

    def run(name: str, right: float, *more: str, main: Callable[..., None] = speedrun.main) -> dict[str, Any]:
        def shown(classifier: None, images: Any, asked: list[Any]) -> dict[str, list[bool]]:
            return {"all": [i < right * len(asked) for i in range(len(asked))]}

        monkeypatch.setattr(speedrun, "attributes_shown", shown)
        words = ["--name", name, "--recipe", "configs/shapes", "--run", str(tmp_path / "runs"), "--seeds", "0"]
        words += ["--num-captions", "20", "--measure-every", "2"]
        main([*words, *flags("clip"), *flags("vae"), *flags("ldm"), *more])
        return json.loads((tmp_path / "speedrun.json").read_text())[name]["0"]

    return run


def test_a_run_ends_at_the_last_target_and_gets_a_row(record: Any, tmp_path: Path) -> None:
    seed = record("Everything right", 1.0)
    assert list(seed["curve"]) == ["2"], "training ends where the last target is reached"
    seconds, share = seed["curve"]["2"]
    assert share == 1 and seed["until"] == {"90%": seconds, "97%": seconds}
    assert seconds > seed["seconds"]["clip"] + seed["seconds"]["vae"]
    cells = (tmp_path / "records.md").read_text().splitlines()[-1].split(" | ")
    assert f"{seed['vae_psnr']:.1f}" in cells
    again = record("Half right", 0.5)
    assert again["seconds"] == seed["seconds"], "the text tower and the VAE are used again"
    assert again["until"] == {"90%": None, "97%": None} and list(again["curve"]) == ["2", "4"]
    record("Another VAE", 0.95, "--vae.steps", "5")
    assert [len(list((tmp_path / "runs").glob(f"{stage}-*"))) for stage in ("clip", "vae", "ldm")] == [1, 2, 3]
    rows = (tmp_path / "records.md").read_text()
    assert rows.startswith(HEAD)
    assert "| Everything right | **" in rows
    assert "| Half right | never (never) | never (never) | never | 50.0% after" in rows
    assert rows.splitlines()[-1].startswith("| Another VAE | **") and "| never (never) | never | 95.0% after" in rows
    assert "200, 190" in rows


def test_diffusers_trains_for_the_seconds_that_it_is_given(record: Any, tmp_path: Path) -> None:
    more = ["--vae-seconds", "1", "--unet-seconds", "2", "--ldm.data.resolution", "32", "--vae.data.resolution", "32"]
    seed = record("diffusers", 0.5, *more, main=speedrun_diffusers.main)
    [(steps, (seconds, share))] = seed["curve"].items()
    assert seed["steps"]["vae"] >= 1 and seed["steps"]["unet"] == int(steps) >= 1
    assert seconds > 3 and share == 0.5 and set(seed["until"].values()) == {None}
    assert "| diffusers | never (never) |" in (tmp_path / "records.md").read_text()


def test_a_stopwatch_leaves_out_what_does_not_count() -> None:
    watch = speedrun.Stopwatch()
    before = watch.seconds()
    time.sleep(0.05)
    watch.leave_out(before)
    assert before <= watch.seconds() < before + 0.05


def test_data_whose_truth_is_not_known_are_refused(record: Any) -> None:
    with pytest.raises(SystemExit, match=r"data.source emoji: what its captions ask for cannot be checked"):
        record("Emoji", 1.0, "--ldm.data.source", "emoji")


@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_a_candidate_changes_the_training(name: str, tiny_runs: Path, tmp_path: Path) -> None:
    images = []

    def generate(trainer: Trainer) -> None:
        if trainer.state.step == 4:
            pipeline = trainer.stage.pipeline  # type: ignore[attr-defined]
            trainer.with_ema_weights(lambda: images.append(pipeline.sample(["a red circle"], [0], steps=2)))

    def changed(stage: Stage) -> Stage:
        candidates.CANDIDATES[name](stage)  # type: ignore[arg-type]
        return stage

    copy_stages_before("ldm", tiny_runs, tmp_path)
    text = ["--text.model", f"local-dir:{tmp_path}/clip/model"]
    for run, wrap in (("as it is", lambda stage: stage), ("changed", changed)):
        train("ldm", tmp_path / run, *text, on_step=generate, wrap=wrap)
    assert not torch.equal(*images)


def test_a_candidate_that_is_not_there_is_named(record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        record("Misspelt", 1.0, "--candidate", "dispersion")
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "candidate dispersion: choose one of muon" in printed
    with pytest.raises(SystemExit, match="candidate: there is none for diffusers; leave it out"):
        record("diffusers", 1.0, "--candidate", "muon", main=speedrun_diffusers.main)

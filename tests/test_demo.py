"""The demo: what is finished is reused, what was stopped continues, and the report has all of it."""

import json
import shutil
from pathlib import Path

import demo as script
import pytest
from helpers import train
from PIL import Image

from ldm.evaluation import demo


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the tiny recipes instead of the demo's, record the training scripts and their flags, and evaluate nothing."""
    recorded = []

    def run_script(script: str, *arguments: str) -> float:
        if script.startswith("train_"):
            run, flags = Path(arguments[1]), arguments[2:]
            recorded.append(" ".join([script, *flags]))
            train(script.removeprefix("train_").removesuffix(".py"), run, *flags)
        elif script == "evaluate.py":
            measure = {"value": 0.9, "low": 0.8, "high": 1.0, "samples": 7}
            path = Path(arguments[1]).parent / "evaluation.json"
            path.write_text(json.dumps({"measures": {"prompt accuracy, all": measure}}))
        return 60.0

    monkeypatch.setattr(demo, "run_script", run_script)
    return recorded


def test_a_second_demo_continues_or_reuses(
    calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(tmp_path)]
    script.main(run)
    assert calls == ["train_clip.py", "train_vae.py", "train_ldm.py"]
    text = capsys.readouterr().out
    assert "90.0% of 7 unseen captions" in text and f"samples:   {tmp_path}/samples.png" in text and "try next" in text
    assert Image.open(tmp_path / "losses.png").size[0] > 100
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["total_minutes"] == 5

    script.main(run)
    assert len(calls) == 3
    again = json.loads((tmp_path / "report.json").read_text())
    assert again.pop("peak_memory_gib") >= report.pop("peak_memory_gib")  # of this process, which may have grown
    assert again == report

    shutil.rmtree(tmp_path / "ldm/model")
    shutil.rmtree(tmp_path / "ldm/checkpoints/step-000004")
    script.main(run)
    assert calls[3:] == ["train_ldm.py --resume latest"]


def test_a_stage_that_fails_stops_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate.py ended with status 1; `make demo` continues from there"):
        demo.run_script("evaluate.py", "--model", str(tmp_path))

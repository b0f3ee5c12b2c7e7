"""The scripts, one after the other, as a person runs them."""

import json
from pathlib import Path

import txt2img


def test_three_stages_make_a_model_that_paints(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    for stage in ("clip", "vae", "ldm"):
        run = tiny_runs / stage
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
        assert (run / "config.yaml").is_file()
        assert any((run / "tensorboard").rglob("events*"))
    assert (tiny_runs / "ldm/samples/step-000004.png").is_file()
    files = txt2img.paint(
        txt2img.Txt2Img(prompts=("a red circle",), model=tiny_model, out=tmp_path, num_images=2, steps=2)
    )
    assert [file.name for file in files] == ["00000.png", "00001.png", "grid-00000.png"]

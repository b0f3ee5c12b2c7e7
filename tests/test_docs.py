"""The commands and flags in the documentation are those of the scripts."""

import re
import shlex
import shutil
from pathlib import Path
from string import Template
from typing import Any

import pytest

from ldm.cli import parse_cli
from ldm.config import CONFIGS, flatten
from ldm.data.inspect import CheckDataConfig
from ldm.data.sources.phantom_files import ExportPhantomConfig
from ldm.evaluation.demo import DemoConfig
from ldm.evaluation.figures import FiguresConfig
from ldm.evaluation.subject import EvaluateConfig
from ldm.pipeline.convert import ConvertConfig
from ldm.pipeline.generate import Img2ImgConfig, Txt2ImgConfig
from ldm.planning.report import PlanConfig
from ldm.server.serve import ServeConfig
from ldm.stages import STAGES, split_stage
from ldm.stages.latents import CacheLatentsConfig
from ldm.stages.preview import DistillConfig

ROOT = Path(__file__).parents[1]
PAGES = (*ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md"))
DOCS = ("README.md", *sorted(str(file.relative_to(ROOT)) for file in PAGES))


class NoModelNeeded(EvaluateConfig):
    """The flags of evaluate, without the model whose own data are their defaults."""

    def values_below(self) -> dict[str, Any]:
        return {}


class DistillNoModel(DistillConfig):
    """The flags of distill_decoder, without the model likewise."""

    def values_below(self) -> dict[str, Any]:
        return {}


CONFIG_CLASSES = {  # of each script but doctor, which names the stage, and launch, which has none
    "cache_latents": CacheLatentsConfig,
    "check_data": CheckDataConfig,
    "convert": ConvertConfig,
    "demo": DemoConfig,
    "distill_decoder": DistillNoModel,
    "evaluate": NoModelNeeded,
    "export_phantom": ExportPhantomConfig,
    "img2img": Img2ImgConfig,
    "make_figures": FiguresConfig,
    "plan": PlanConfig,
    "serve": ServeConfig,
    "txt2img": Txt2ImgConfig,
    **{f"train_{name}": stage.Config for name, stage in STAGES.items()},
}
OTHER_FLAGS = {"help", "logdir", "mixed_precision", "num_processes", "quiet"}  # of no script alone


def commands(file: str) -> list[str]:
    """The command lines of a page, in blocks and within text: with its variables, and the first of alternatives."""
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^    .*\n", text, re.MULTILINE))
    found = re.findall(r"(?<=`)(?:python|accelerate)\s[^`]*scripts/[^`]*(?=`)", text)
    lines: list[str] = []
    variables: dict[str, str] = {}
    for line in [*blocks.replace("\\\n", " ").splitlines(), *(" ".join(inline.split()) for inline in found)]:
        if re.match(r"\s*[A-Z]+=", line):
            variables |= dict(word.split("=", 1) for word in shlex.split(line.replace(";", " ")))
        elif re.match(r"\s*(python|accelerate|torchrun)\b.*scripts/", line):
            line = Template(" ".join(line.split())).safe_substitute(variables)
            lines.append(re.sub(r"(\w)(\|\w+)+", r"\1", line))
    return lines


def test_the_pages_have_commands() -> None:
    assert len(commands("README.md")) >= 15 and len(commands("docs/training.md")) >= 14


@pytest.mark.parametrize(("file", "line"), [(file, line) for file in DOCS for line in commands(file)])
def test_every_command_is_one_that_the_script_takes(
    file: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flags, their values, and the recipe that it names; a run that it resumes is made up."""
    words = shlex.split(line, comments=True)
    script = next(word for word in reversed(words) if re.fullmatch(r"scripts/\w+\.py", word))
    flags = words[words.index(script) + 1 :]
    name, default = Path(script).stem, None
    if name == "doctor":
        stage, flags = split_stage(flags)
        cls, default = stage.Config, stage.default
    else:
        cls = CONFIG_CLASSES[name]
        default = STAGES[name.removeprefix("train_")].default if name.startswith("train_") else None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    if "--resume" in flags and "--config" not in flags:
        run = tmp_path / flags[flags.index("--run") + 1]
        run.mkdir(parents=True)
        shutil.copy(default, run / "config.yaml")
    parse_cli(cls, flags, default=default, description="")


@pytest.mark.parametrize("file", ["README.md", "docs/training.md"])
def test_every_flag_that_a_page_names_is_one_of_a_script(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    known = {key.replace("_", "-") for cls in CONFIG_CLASSES.values() for key in flatten(cls().to_dict())}
    known |= {key.split(".")[0] for key in known}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text)) - OTHER_FLAGS
    assert not {flag for flag in named if re.sub(r"(^|\.)no-", r"\1", flag) not in known}


def test_the_flags_that_everything_else_relies_on() -> None:
    """Scripts of others name these."""
    for name, stage in STAGES.items():
        assert {"config", "run", "steps", "checkpoint_every", "resume", "seed"} <= set(stage.Config.model_fields), name
    assert {"model", "out", "seed", "prompt_file", "num_images", "steps"} <= set(Txt2ImgConfig.model_fields)

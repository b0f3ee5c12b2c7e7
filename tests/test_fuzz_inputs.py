"""Whatever is in captions, tables, configurations, PNGs and prompts: it is read as meant, or refused in one line."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers import encoded, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import parse_cli
from ldm.config import CONFIGS, read_yaml, write_yaml
from ldm.data.inspect import TokenLimit, format_report, inspect_image
from ldm.data.sources.base import CAPTION_COLUMNS, ImageTextSource
from ldm.data.sources.folder import METADATA_FILES, open_images
from ldm.data.transforms import View
from ldm.evaluation.figures import FiguresConfig
from ldm.imaging import captioned_grid
from ldm.pipeline.record import PNG_CHUNK, GenerationRecord, read_png, save_png
from ldm.stages import STAGES
from ldm.stages.diffusion import TrainLDMConfig
from ldm.text.prompt_weights import MAX_WEIGHT, WeightedText, parse_weights, split_and, strip_weights
from ldm.text.tokenizer import Tokenizer

STABLE = settings(deadline=None, derandomize=True, max_examples=100)

Result = TypeVar("Result")
NAMES = ("a.png", "b  c.png", "sub/é.png")
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


# What may be in a file.

TEXTS = st.text(max_size=40) | st.text(alphabet=f'a"\\,:;\0\t{LINE_ENDS}', max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ODD_NAMES = st.sampled_from(
    ("../secret.png", "sub/../../secret.png", "a\0.png", "", ".", "C:\\secret.png", "x\ny", "A" * 9999)
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"file_name": st.sampled_from(NAMES) | ODD_NAMES | VALUES, "text": VALUES, "caption": VALUES}
    ),
    max_size=4,
)


class Changes(NamedTuple):
    """What happens to the bytes of a file: bits that flip, bytes that are inserted, and where it is cut off."""

    flipped: list[tuple[int, int]]
    inserted: list[tuple[int, bytes]]
    end: int | None

    def apply(self, whole: bytes) -> bytes:
        changed = bytearray(whole)
        for position, bit in self.flipped:
            changed[position % len(changed)] ^= 1 << bit
        for position, more in self.inserted:
            changed[position % len(changed) : 0] = more
        return bytes(changed[: self.end % len(changed)] if self.end is not None else changed)


POSITIONS = st.integers(0, 2**16)
CHANGES = st.builds(
    Changes,
    st.lists(st.tuples(POSITIONS, st.integers(0, 7)), max_size=4),
    st.lists(st.tuples(POSITIONS, st.binary(max_size=4)), max_size=1),
    st.none() | st.none() | POSITIONS,
)


def read_or_refuse(path: Path, read: Callable[[], Result]) -> Result | None:
    """What is read, or None for what is refused: in one line that names the file."""
    try:
        return read()
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error) and len(str(error)) < 60_000
        return None


def one_line(text: str) -> str:
    return " ".join(text.split())


# Image folders.


class Folder(NamedTuple):
    """Three images, one outside of the folder, and which files below it were opened."""

    root: Path
    opened: set[Path]

    def write(self, name: str, content: bytes) -> Path:
        for old in (*METADATA_FILES, "a.txt"):
            (self.root / old).unlink(missing_ok=True)
        (self.root / name).write_bytes(content)
        self.opened.clear()
        return self.root / name

    def captions(self) -> dict[str, list[str]]:
        """Those of every image; all that was opened must lie in the folder."""
        found = {
            name: list(captions)
            for part in self.parts()
            for name, captions in zip(part.names, part.captions, strict=True)
        }
        return {name: found[name] for name in NAMES}

    def parts(self) -> list[ImageTextSource]:
        parts = [open_images(str(self.root), split) for split in ("train", "test")]  # type: ignore[arg-type]
        assert sorted(name for part in parts for name in part.names) == sorted(NAMES)
        assert all(path.is_relative_to(self.root) for path in self.opened)
        return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root, opened = tmp_path_factory.mktemp("set") / "photos", set()
    (root / "sub").mkdir(parents=True)
    for name in (*NAMES, "../secret.png"):
        Image.new("RGB", (8, 8)).save(root / name)

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | Path) and str(root.parent) in str(args[0]):
            opened.add(Path(args[0]).resolve())

    sys.addaudithook(note)
    return Folder(root, opened)


@STABLE
@given(content=st.binary(max_size=40) | st.tuples(TEXTS, st.sampled_from(("utf-8", "utf-8-sig", "utf-16"))))
def test_sidecars(folder: Folder, content: bytes | tuple[str, str]) -> None:
    data = content if isinstance(content, bytes) else content[0].encode(content[1])
    found = read_or_refuse(folder.write("a.txt", data), folder.captions)
    try:
        text = one_line(data.decode("utf-8-sig"))
        assert found == {name: [text] if name == "a.png" and text else [] for name in NAMES}
    except UnicodeDecodeError:
        assert found is None


@STABLE
@given(
    rows=st.lists(st.tuples(st.sampled_from(NAMES), TEXTS), min_size=1, max_size=6),
    kind=st.sampled_from(METADATA_FILES),
    column=st.sampled_from(CAPTION_COLUMNS),
    escaped=st.booleans(),
)
def test_captions_come_back(folder: Folder, rows: list[tuple[str, str]], kind: str, column: str, escaped: bool) -> None:
    """From each kind of table, in order, on one line; names are taken as they are."""
    table = [{"file_name": name, column: text} for name, text in rows]
    folder.write(kind, tabled(kind, table, escaped=escaped))
    want = {name: [one_line(text) for other, text in rows if other == name and text.split()] for name in NAMES}
    assert folder.captions() == want


def tabled(kind: str, rows: list[dict[str, Any]], *, escaped: bool = True) -> bytes:
    """The bytes of a metadata file."""
    if kind.endswith("jsonl"):
        return "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode("utf-8", "surrogatepass")
    if kind.endswith("csv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


GOOD_ROWS = st.lists(st.fixed_dictionaries({"file_name": st.sampled_from(NAMES), "text": VALUES}), max_size=2)


@STABLE
@given(rows=ROWS | GOOD_ROWS, escaped=st.booleans())
def test_rows_of_any_kind(folder: Folder, rows: list[dict[str, Any]], escaped: bool) -> None:
    """Rows of images of the folder, with captions that are text, are read, and no others."""
    path = folder.write("metadata.jsonl", tabled("jsonl", rows, escaped=escaped))
    column = next((name for name in CAPTION_COLUMNS if any(name in row for row in rows)), None)
    valid = column is not None and all(row.get("file_name") in NAMES and is_text(row.get(column)) for row in rows)
    valid = valid and (escaped or "\\ud800" not in repr(rows))  # which is not UTF-8
    assert (read_or_refuse(path, folder.captions) is not None) == valid


def is_text(cell: Any) -> bool:
    """Whether a cell may be a caption or captions; nothing, and numbers, may."""
    cells = cell if isinstance(cell, list) else [cell]
    return all(value is None or (isinstance(value, str | int | float) and value != "\ud800") for value in cells)


GOOD = [{"file_name": name, "text": f'a "{name}", \n x'} for name in NAMES]


@STABLE
@given(kind=st.sampled_from(METADATA_FILES), changes=CHANGES)
def test_metadata_that_was_changed(folder: Folder, kind: str, changes: Changes) -> None:
    whole = tabled(kind, GOOD)
    folder.write(kind, whole)
    assert folder.captions() == {name: [one_line(f'a "{name}", x')] for name in NAMES}
    read_or_refuse(folder.write(kind, changes.apply(whole)), folder.captions)


@pytest.mark.parametrize(
    ("kind", "content", "want"),
    [
        ("metadata.jsonl", b"[" * 100_000, "line 1 is not a JSON object"),
        ("metadata.jsonl", b'[["file_name", "a.png"]]', "line 1 is not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}', r"a.png: the caption '\ud800' is not text"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": {"a": 1}}', "a.png: the caption {'a': 1} is not text"),
        (
            "metadata.jsonl",
            b'{"file_name": ["a.png"], "text": "x"}',
            "not there as PNG, JPEG or WEBP: ['a.png'];",
        ),
        ("metadata.jsonl", b'{"file_name": "../secret.png", "text": ""}', "WEBP: ../secret.png; add them, remove"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000, "(field larger than field limit (131072)); is a"),
        ("metadata.csv", b'file_name,text\na.png,"x\nb.png,y\n', "not CSV (unexpected end of data); is a quote"),
        ("metadata.csv", b"file_name,text\n", "no column file_name, or no row"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file_name": "a.png", "text": ["x", "y"]}', ["x", "y"]),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": NaN}', []),
    ],
)
def test_metadata_that_was_once_a_traceback(folder: Folder, kind: str, content: bytes, want: str | list[str]) -> None:
    path = folder.write(kind, content)
    if isinstance(want, list):
        assert folder.captions()["a.png"] == want
        return
    with pytest.raises(ValueError) as caught:
        folder.captions()
    assert str(path) in str(caught.value) and want in str(caught.value)


def test_a_name_of_another_encoding(tmp_path: Path) -> None:
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    source = open_images(str(tmp_path), "train")
    assert source.read(0, View((8, 8)), channels=3, side=8).original_size == (8, 8) and source.fingerprint()


# Inspecting a folder.

COUNT = Tokenizer(77).encode


@settings(STABLE, max_examples=40)
@given(kind=st.sampled_from(METADATA_FILES), changes=CHANGES, image=CHANGES, text=TEXTS)
def test_any_folder_is_inspected(folder: Folder, kind: str, changes: Changes, image: Changes, text: str) -> None:
    """With its captions in a contact sheet, and an image that was changed."""
    rows = [GOOD[0], {**GOOD[1], "text": text}, GOOD[2]]
    path, photo = folder.write(kind, tabled(kind, rows)), folder.root / "a.png"
    assert inspected(folder.parts()) == ("3 images, 0 unreadable", 3)
    path.write_bytes(changes.apply(path.read_bytes()))
    whole = photo.read_bytes()
    photo.write_bytes(image.apply(whole))
    try:
        parts = read_or_refuse(path, folder.parts) or []
        first_line, shown = inspected(parts)
    finally:
        photo.write_bytes(whole)
    total = 3 if parts else 0
    assert first_line in (f"{total} images, 0 unreadable", f"{total} images, 1 unreadable") and shown >= total - 1


def inspected(parts: list[ImageTextSource]) -> tuple[str, int]:
    """The first line of the report, and the number of images on the contact sheet."""
    images = [inspect_image(part, i, thumbnail=True) for part in parts for i in range(len(part.names))]
    shown = [(info.thumbnail, next(iter(info.captions), "")) for info in images if info.thumbnail]
    if shown:
        assert captioned_grid(*zip(*shown, strict=True), columns=2).width == 2 * 136 - 8
    limit = TokenLimit(77, lambda caption: len(COUNT(caption)), "a test")
    return next(format_report(images, size=8, limit=limit, enlarged=True)), len(shown)


# Tables of images.


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a table, with an image outside of it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "tables").mkdir()
    return tmp_path / "tables"


def table(path: Path, columns: dict[str, Any], features: Any = None) -> Path:
    """A parquet file whose features, as `datasets` writes them, may be anything."""
    rows = pyarrow.table(columns)
    if features is not None:
        rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(rows, path)
    return path


CELLS = [{"bytes": encoded(plain()), "path": None}] * 2


@pytest.mark.parametrize(
    "cell", [{"bytes": "{}", "path": None}, {"bytes": None, "path": "{}"}, {"bytes": None, "path": 5}]
)
def test_no_cell_of_a_table_opens_a_file_elsewhere(tables: Path, cell: dict[str, Any]) -> None:
    secret = str(tables.parent / "secret.png")
    filled = {key: value.format(secret) if isinstance(value, str) else value for key, value in cell.items()}
    path = table(tables / "a.parquet", {"image": [filled, filled]})
    for source in both_splits(path):
        with pytest.raises(ValueError, match="holds no image|leads out of"):
            source.read(0, View((8, 8)), channels=3, side=8)


@pytest.mark.parametrize(
    ("text", "features", "want"),
    [
        ([{"bytes": None, "path": "../secret.png"}] * 2, {"text": {"_type": "Image"}}, "row 0: the caption {'bytes"),
        ([b"x", b"y"], None, "row 0: the caption b'x' is not text; write text, or a list of texts"),
        ([[["x"]], [["y"]]], None, "row 0: the caption ['x'] is not text"),
        (pyarrow.array([2**62, 1], pyarrow.timestamp("us")), None, "column text is not text; write text, or lists"),
        (["x", "y"], {"text": {"_type": "None"}}, "not a parquet file, or damaged or empty"),
        (["x", "y"], [1], "not a parquet file, or damaged or empty"),
    ],
)
def test_captions_of_a_table_that_are_none(tables: Path, text: Any, features: Any, want: str) -> None:
    features = {"image": {"_type": "Image"}, **features} if isinstance(features, dict) else features
    path = table(tables / "a.parquet", {"image": CELLS, "text": text}, features)
    with pytest.raises(ValueError) as caught:
        open_images(str(path), "train")
    assert str(path) in str(caught.value) and want in str(caught.value) and "\n" not in str(caught.value)


@settings(STABLE, max_examples=25)
@given(changes=CHANGES, number=st.integers(0, 2**62))
def test_a_table_that_was_changed(tmp_path_factory: pytest.TempPathFactory, changes: Changes, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        path = table(tmp_path_factory.mktemp("tables") / f"{number}.parquet", {"image": CELLS, "text": ["x", "y"]})
        assert sorted(entry for part in both_splits(path) for entry in part.captions) == [["x"], ["y"]]
        path = path.rename(path.with_name(f"changed-{number}.parquet"))  # `datasets` caches what it has read
        path.write_bytes(changes.apply(path.read_bytes()))
        parts = read_or_refuse(path, lambda: both_splits(path))
    assert parts is None or sum(len(part.captions) for part in parts) == 2


def both_splits(path: Path) -> list[ImageTextSource]:
    return [open_images(str(path), "train"), open_images(str(path), "test")]


# Configurations.

FILES = sorted(CONFIGS.rglob("*.yaml"))
CLASSES = {name: stage.Config for name, stage in STAGES.items()} | {"figures": FiguresConfig}
REAL = [(CLASSES.get(path.stem, TrainLDMConfig), path.read_text()) for path in FILES]
SIGNS = st.text(alphabet="ab1:-{}[]&*!?|>%@`'\"#, \n\t.~=<\0é", max_size=40)
TAGS = ("!!int", "!!bool", "!!timestamp", "!!float", "!!binary", "!!set", "!!omap", "!!null", "!!python/name:os.system")


def read_config(text: str, cls: type[Any], path: Path) -> Any:
    """The configuration in a file, or None for one that is refused: in a line for each fault, with the file's name."""
    path.write_bytes(text.encode())
    try:
        return cls.from_dict(read_yaml(path), source=str(path))
    except ValueError as error:
        lines = str(error).splitlines()
        assert lines and all(line.startswith(f"{path}: ") for line in lines) and len(str(error)) < 60_000
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "file.yaml"


@settings(STABLE, max_examples=150)
@given(text=TEXTS | SIGNS | st.builds("{}: {} {}".format, SIGNS, st.sampled_from(TAGS), SIGNS))
def test_any_text_as_a_configuration(file: Path, text: str) -> None:
    read_config(text, TrainLDMConfig, file)


@STABLE
@given(real=st.sampled_from(REAL), changes=CHANGES)
def test_a_configuration_whose_text_was_changed(file: Path, real: tuple[type[Any], str], changes: Changes) -> None:
    cls, text = real
    assert read_config(text, cls, file) is not None
    read_config(changes.apply(text.encode()).decode("latin-1"), cls, file)


KEYS = TEXTS | st.integers() | st.none() | st.dates() | st.booleans()
YAML_VALUES = VALUES.filter(lambda value: "\\ud800" not in repr(value)) | st.dates() | st.binary(max_size=4)


@settings(STABLE, max_examples=200)
@given(real=st.sampled_from(REAL), data=st.data())
def test_a_configuration_with_other_keys_and_values(file: Path, real: tuple[type[Any], str], data: Any) -> None:
    """What is valid is written and read back as the same; what is not is refused."""
    cls, text = real
    values = yaml.safe_load(text)
    inner = [values, *(value for value in values.values() if isinstance(value, dict))]
    for _ in range(data.draw(st.integers(1, 2))):
        section = data.draw(st.sampled_from(inner))
        section[data.draw(st.sampled_from(sorted(section, key=str)) | KEYS)] = data.draw(YAML_VALUES)
    config = read_config(yaml.safe_dump(values, allow_unicode=True), cls, file)
    if config is not None and "nan" not in repr(config):  # which equals nothing
        write_yaml(file, config)
        assert cls.from_dict(read_yaml(file), source="again") == config


@settings(STABLE, max_examples=40)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "run": st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30),
            "resume": st.none() | TEXTS,
            "steps": st.integers(1),
            "seed": st.integers(),
            "learning_rate": st.floats(0, exclude_min=True),
            "betas": st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
            "sample_prompts": st.lists(TEXTS, max_size=3).map(tuple),
            "caption_dropout": st.floats(0, 1),
            "trackers": st.sampled_from([(), ("tensorboard",), ("tensorboard", "wandb")]),
        },
    )
)
def test_valid_configurations_come_back(file: Path, values: dict[str, Any]) -> None:
    config = TrainLDMConfig(**values)
    write_yaml(file, config)
    assert TrainLDMConfig.from_dict(read_yaml(file), source="again") == config
    assert parse_cli(TrainLDMConfig, ["--config", str(file)], default=None, description="") == config.model_copy(
        update={"config": file}
    )


def test_configurations_that_were_once_a_traceback(file: Path) -> None:
    made = file.parent / "made"
    deep, wide = "[" * 5_000, "a: &a [1]\n" + "".join(f"b{i}: &b{i} [{f'*b{i - 1}, ' * 9}]\n" for i in range(1, 30))
    for text in (
        "steps: 2001-99-99",
        "steps: !!int x",
        "steps: !!bool x",
        "steps: !!timestamp x",
        "steps: !!int ''",
        "? [1]\n: 2",
        deep,
        f"steps: !!python/object/apply:os.mkdir [{made}]",
        wide.replace("[*b0", "[*a").replace("*b0", "*a"),
        "&a {steps: *a}",
        '"a\\nb": 1',
    ):
        assert read_config(text, TrainLDMConfig, file) is None
        with pytest.raises(SystemExit) as caught:
            parse_cli(TrainLDMConfig, ["--config", str(file)], default=None, description="")
        assert all(line.startswith(f"error: {file}: ") for line in str(caught.value.code).splitlines())
    assert not made.exists()


# Images that hold how they were made.

RECORD = {
    "negative_prompt": "",
    "steps": 2,
    "guidance_scale": 2.0,
    "sampler": "ddim",
    "eta": None,
    "width": 8,
    "height": 8,
    "seed": 0,
    "num_images": 2,
    "index": 1,
    "model": "m",
    "model_hash": "h",
}


@STABLE
@given(prompt=TEXTS, negative=TEXTS, model=TEXTS)
def test_records_come_back(file: Path, prompt: str, negative: str, model: str) -> None:
    path = file.with_name("a.png")
    record = GenerationRecord(**{**RECORD, "prompt": prompt, "negative_prompt": negative, "model": model})  # type: ignore[arg-type]
    save_png(path, Image.new("RGB", (4, 4)), record)
    assert read_png(path) == record


@STABLE
@given(changes=CHANGES)
def test_a_generated_image_that_was_changed(file: Path, changes: Changes) -> None:
    path, record = file.with_name("b.png"), GenerationRecord(**RECORD, prompt="a")  # type: ignore[arg-type]
    save_png(path, Image.new("RGB", (4, 4)), record)
    assert read_png(path) == record
    path.write_bytes(changes.apply(path.read_bytes()))
    read_or_refuse(path, lambda: read_png(path))


@STABLE
@given(values=st.dictionaries(st.sampled_from([*GenerationRecord.model_fields, "zz"]), VALUES, max_size=2) | VALUES)
def test_a_record_of_any_kind(file: Path, values: Any) -> None:
    path, good = file.with_name("c.png"), {**RECORD, "prompt": "a"}
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunk(json.dumps(good)))
    assert read_png(path).prompt == "a"
    info = chunk(json.dumps({**good, **values} if isinstance(values, dict) else values))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    record = read_or_refuse(path, lambda: read_png(path))
    assert record is None or 0 <= record.index < record.num_images


def chunk(text: str) -> PngInfo:
    """The chunk that holds a record."""
    info = PngInfo()
    info.add_itxt(PNG_CHUNK, text)
    return info


# Prompts.

PROMPTS = st.text(max_size=60) | st.text(alphabet="a() [:1.]\\-+AND٣", max_size=40)
WEIGHTS = st.floats(-MAX_WEIGHT, MAX_WEIGHT).map(lambda weight: round(weight, 3))
WORDS = st.text(alphabet="abé ,.", min_size=1, max_size=8)


@settings(STABLE, max_examples=300)
@given(text=PROMPTS)
def test_any_prompt_is_read_or_weighs_too_much(text: str) -> None:
    try:
        found = [part for joined in split_and(text) for part in parse_weights(joined.text)]
        assert all(abs(part.weight) <= MAX_WEIGHT for part in found) and len(strip_weights(text)) <= len(text)
    except ValueError as error:
        assert f"at most {MAX_WEIGHT}" in str(error) and len(str(error).splitlines()) == 1
    escaped = "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in text)
    assert parse_weights(escaped) == [WeightedText(text, 1.0)]


@STABLE
@given(parts=st.lists(st.tuples(WORDS, WEIGHTS), min_size=1, max_size=5))
def test_weights_come_back(parts: list[tuple[str, float]]) -> None:
    assert parse_weights("".join(f"({text}:{weight:.3f})" for text, weight in parts)) == parts
    joined = [(f"{text} x", weight) for text, weight in [*parts, ("y", 1.0)]]
    assert [(part.text, part.weight) for part in split_and(" AND ".join(f"{t} :{w:.3f}" for t, w in joined))] == [
        (text.strip(), weight) for text, weight in joined
    ]


@pytest.mark.parametrize(
    "prompt", [f"(a:{'9' * 400})", "(" * 80 + "a", f"((a:0):{'9' * 400})", f"a :{'9' * 400} AND b"]
)
def test_a_weight_without_end_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=f"weight .*at most {MAX_WEIGHT}"):
        strip_weights(prompt)

"""What the server has written: images with their records, uploads, and the list of them, which outlives the process."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.config import Config
from ldm.imaging import decode_image, image_grid, save_image
from ldm.io.atomic import atomic_write, check_folder, disk_errors
from ldm.io.tensors import sha256
from ldm.pipeline.load import weights_file
from ldm.pipeline.record import PNG_CHUNK, GenerationRecord, parse_record, png_texts, save_png
from ldm.server.request import GenerationRequest, request_of

GRID_CHUNK = "ldm_grid"  # of a grid's PNG: the request for it
THUMBNAIL_SIDE = 256


class Entry(Config):
    """An image of the history."""

    id: str
    kind: Literal["image", "grid"] = "image"
    created: datetime
    width: int
    height: int
    settings: dict[str, Any]
    """the request for this image"""
    stopped_after: int | None = None
    film_steps: int = 0
    """how many steps its film has; 0 without one"""


class History:
    """A folder of images. Only what is listed in its history.jsonl is read, and found by id alone."""

    def __init__(self, folder: Path) -> None:
        check_folder(folder / "inputs", "--out")
        self.folder, self._lock = folder, Lock()
        self._list = folder / "history.jsonl"
        self._entries = {entry.id: entry for entry in self._read() if (folder / f"{entry.id}.png").is_file()}
        if self._list.is_file() and not self._list.read_bytes().endswith(b"\n"):  # cut off by the end of a process
            with self._list.open("a") as file:
                file.write("\n")

    def _read(self) -> list[Entry]:
        """The list, in which later lines of an image count, without those that are damaged."""
        entries = []
        for line in self._list.read_text("utf-8").split("\n") if self._list.is_file() else ():
            try:
                entry = Entry.model_validate_json(line)
            except ValueError:
                continue
            if entry.id.replace("-", "").isalnum():
                entries.append(entry)
        return entries

    def add(self, image: Image.Image, record: GenerationRecord, settings: dict[str, Any]) -> Entry:
        """Write a generated image with its record."""
        entry = self._new(image, settings, stopped_after=record.stopped_after)
        save_png(self.folder / f"{entry.id}.png", image, record)
        return self._append(entry)

    def add_film(self, entry: Entry, frames: list[Image.Image]) -> None:
        """Write the frames of the film of an image in a row."""
        save_image(image_grid(frames, columns=len(frames), gap=0), self.folder / f"{entry.id}-film.jpg")
        self._append(entry.model_copy(update={"film_steps": len(frames)}))

    def add_grid(self, image: Image.Image, settings: dict[str, Any]) -> Entry:
        """Write a grid with the request for it."""
        entry, info = self._new(image, settings, kind="grid"), PngInfo()
        info.add_itxt(GRID_CHUNK, json.dumps(settings, ensure_ascii=False))
        save_image(image, self.folder / f"{entry.id}.png", pnginfo=info)
        return self._append(entry)

    def _new(self, image: Image.Image, settings: dict[str, Any], **values: Any) -> Entry:
        now = datetime.now(UTC)
        return Entry(
            id=f"{now:%Y%m%d-%H%M%S-%f}",
            created=now,
            width=image.width,
            height=image.height,
            settings=settings,
            **values,
        )

    def _append(self, entry: Entry) -> Entry:
        with self._lock, disk_errors(self._list):
            with self._list.open("a", encoding="utf-8", newline="\n") as file:
                file.write(entry.model_dump_json() + "\n")
            self._entries[entry.id] = entry
        return entry

    def entries(self, *, before: str | None = None, limit: int) -> list[Entry]:
        """The newest, or the newest that are older than one of them; none where that one is unknown."""
        with self._lock:
            found = list(self._entries.values())[::-1]
        if before is not None:
            found = found[1 + next((i for i, entry in enumerate(found) if entry.id == before), len(found)) :]
        return found[:limit]

    def get(self, image_id: str) -> Entry | None:
        """An image by its id."""
        return self._entries.get(image_id)

    def file(self, image_id: str) -> Path | None:
        """The PNG of an image, where there is one of this id."""
        return self.folder / f"{image_id}.png" if image_id in self._entries else None

    def film_file(self, image_id: str) -> Path | None:
        """The frames of the film of an image, side by side."""
        entry = self._entries.get(image_id)
        return self.folder / f"{image_id}-film.jpg" if entry and entry.film_steps else None

    def thumbnail(self, image_id: str) -> bytes | None:
        """A small PNG of an image; None for an id that is unknown."""
        path = self.file(image_id)
        if path is None or not path.is_file():
            return None
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            return png_bytes(image)

    def read_settings(self, data: bytes, models: Mapping[str, Path]) -> tuple[dict[str, Any] | None, list[str]]:
        """The request that the metadata of an uploaded file amounts to, and what of it is not to be had here."""
        try:
            texts = png_texts(BytesIO(data))
        except ValueError:  # a JPEG
            return None, []
        notes = []
        try:
            if GRID_CHUNK in texts:
                settings = GenerationRequest.from_dict(json.loads(texts[GRID_CHUNK]), source="its metadata").to_dict()
            elif PNG_CHUNK in texts:
                record = parse_record(texts[PNG_CHUNK], "this image")
                settings = request_of(record)
                notes = _notes_of(record, models)
            else:
                return None, []
        except (ValueError, OSError, RecursionError) as error:
            return None, [f"its settings cannot be used here: {error}"]
        if settings["model"] not in models:
            notes.append(f"model {settings['model']} is not here: choose another")
            settings["model"] = None
        for name in ("image", "mask"):
            if settings[name] and self.input_file(settings[name]) is None:
                notes.append(f"the {name} that it was made with is not here: add image and mask again")
                settings |= {"image": None, "mask": None, "inversion_prompt": None, "outpaint": [0, 0, 0, 0]}
        return settings, notes

    # Uploads, whose id is the SHA-256 of the file that holds them here.

    def add_input(self, image: Image.Image) -> str:
        """Write an image to start from, or a mask, and return its id."""
        data = png_bytes(image)
        input_id = hashlib.sha256(data).hexdigest()
        with self._lock:
            if self.input_file(input_id) is None:
                with atomic_write(self.folder / f"inputs/{input_id}.png") as partial:
                    partial.write_bytes(data)
        return input_id

    def input_file(self, input_id: str) -> Path | None:
        """The PNG of an upload, where this server has written one of this id."""
        if len(input_id) != 64 or not set(input_id) <= set("0123456789abcdef"):
            return None
        path = self.folder / f"inputs/{input_id}.png"
        return path if path.is_file() and sha256(path) == input_id else None

    def find_input(self, image_id: str) -> str:
        """The id of an upload, or of a copy of an image of the history; ValueError: there is neither."""
        if self.input_file(image_id):
            return image_id
        path = self.file(image_id)
        if path is None or not path.is_file():
            raise ValueError(f"image {image_id} is not here: upload it again")
        return self.add_input(decode_image(path))


def _notes_of(record: GenerationRecord, models: Mapping[str, Path]) -> list[str]:
    """What of a record a request cannot say."""
    path = models.get(record.model)
    notes = []
    if path is not None and sha256(weights_file(path)) != record.model_hash:
        notes.append(f"model {record.model} is another one now")
    if record.guide_model:
        notes.append(f"it was guided by {record.guide_model}, which the page cannot do")
    if record.stopped_after:
        notes.append(f"it was stopped after step {record.stopped_after}: press Stop there to make the same")
    return notes


def png_bytes(image: Image.Image) -> bytes:
    """The file of an image."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

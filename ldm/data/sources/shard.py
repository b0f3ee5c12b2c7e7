"""The rows of a shard, read from begin to end: of a tar file, as webdataset has them, or of a parquet file."""

import contextlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet
from datasets.utils.file_utils import xopen

from ldm.data.sources.base import CAPTION_COLUMNS, ShardReadError, caption_column, one_line, parse_captions
from ldm.data.sources.encoded import SUFFIXES
from ldm.data.sources.table import image_column

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CAPTION_ENDINGS = ("txt", *CAPTION_COLUMNS)  # of the files in a tar that hold a caption
IMAGE_SUFFIX = re.compile(rf"^({'|'.join(suffix[1:] for suffix in SUFFIXES)})\.")  # of a caption in `a.png.txt`
IMAGE = ".image"  # the ending of an image in a sample, whatever its format
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 2**28, 2**20  # of a file in a tar that are read
ROWS_PER_BATCH = 32  # of a parquet file that are in memory at a time


class ShardRow(NamedTuple):
    """One image of a shard; `error` says why it cannot be used."""

    image: bytes | None
    captions: list[str]
    error: str | None


def is_tar(url: str) -> bool:
    """Whether a file is a tar, by its name."""
    return url.lower().endswith(TAR_SUFFIXES)


def count_shard_rows(url: str) -> int:
    """How many rows a shard has; a tar is read whole for it. ShardReadError when it cannot be read, or is cut off."""
    with _shard_errors(url):
        if is_tar(url):
            return sum(1 for _ in _tar_samples(url))
        with _open_url(url) as file:
            return pyarrow.parquet.read_metadata(file).num_rows


def first_bytes(url: str, count: int) -> bytes:
    """What a shard begins with. ShardReadError when it cannot be read."""
    with _shard_errors(url), _open_url(url) as file:
        content: bytes = file.read(count)
        return content


def read_rows(url: str) -> Iterator[ShardRow]:
    """The rows of a shard, in order. ShardReadError when it cannot be read, or is cut off."""
    with _shard_errors(url):
        for sample in _tar_samples(url) if is_tar(url) else _parquet_samples(url):
            try:
                image = _value(sample[IMAGE])
                image = image["bytes"] if isinstance(image, dict) else image  # no path in it is followed
                if not isinstance(image, bytes):
                    raise ValueError("holds no image")
                yield ShardRow(image, _captions(sample), None)
            except (ValueError, OverflowError) as error:
                yield ShardRow(None, [], str(error))


@contextlib.contextmanager
def _shard_errors(url: str) -> Iterator[None]:
    """Turn whatever reading a shard raises into a ShardReadError that names it."""
    try:
        yield
    except Exception as error:  # file systems and formats raise errors of many types
        text = one_line(error) or repr(error)
        raise ShardReadError(f"{url} cannot be read ({text}); repair it, or remove it from --data.source") from None


def _open_url(url: str) -> Any:
    """A file on any file system. `xopen` is fsspec's open, but tries again where the network fails."""
    streamed = url.startswith(("http", "hf:")) and is_tar(url)
    return xopen(url, "rb", **({"block_size": 0} if streamed else {}))  # 0: in one request


def _parquet_samples(url: str) -> Iterator[dict[str, Any]]:
    """The cells of the image and the caption, by the name of its column, of each row of a parquet file."""
    with _open_url(url) as file:
        table = pyarrow.parquet.ParquetFile(file)
        schema, features = table.schema_arrow, datasets.Features()
        for column in schema:
            with contextlib.suppress(ValueError, NotImplementedError):  # a type that it has no name for: not an image
                features |= datasets.Features.from_arrow_schema(pyarrow.schema([column], metadata=schema.metadata))
        image = image_column(features, url)
        captions = list(filter(None, [caption_column(features)]))
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=[image, *captions]):
            for row in range(batch.num_rows):
                yield {IMAGE: batch[image][row], **{name.lower(): batch[name][row] for name in captions}}


def _value(cell: Any) -> Any:
    """What a cell of arrow holds."""
    return cell.as_py() if isinstance(cell, pyarrow.Scalar) else cell


def _tar_samples(url: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar that have an image: each a run of files that have the same name up to the first dot."""
    with _open_url(url) as file, tarfile.open(fileobj=file, mode="r|*", bufsize=2**17) as tar:
        for _, files in itertools.groupby(_members(tar), key=lambda member: member[0]):
            sample: dict[str, bytes] = {}
            for _, ending, content in files:
                sample.setdefault(ending, content)
            if IMAGE in sample:
                yield sample
        # Two blocks of zeros end a tar. For tarfile a damaged header, or the end of the file, does as well.
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is damaged, or cut off")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Sample, ending and content of each image and caption, of large ones the first bytes; no links or hidden files."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        ending = IMAGE if f".{ending.lower()}".endswith(SUFFIXES) else IMAGE_SUFFIX.sub("", ending.lower())
        wanted = ending in (IMAGE, "json", *CAPTION_ENDINGS) and not name.startswith((".", "__"))
        if wanted and member.isfile() and (content := tar.extractfile(member)):
            yield f"{folder}/{stem}", ending, content.read(MAX_IMAGE_BYTES if ending == IMAGE else MAX_TEXT_BYTES)
        tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all


def _captions(sample: dict[str, Any]) -> list[str]:
    """The captions of a sample: of a text file or a column, or else of the JSON."""
    try:
        cell = next((_value(sample[name]) for name in CAPTION_ENDINGS if name in sample), None)
        if cell is None:
            values = json.loads(sample.get("json", b"{}"))
            cell = next((values[name] for name in CAPTION_COLUMNS if name in values), None)
        cell = cell.decode("utf-8-sig") if isinstance(cell, bytes) else cell
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its caption is not UTF-8, or not JSON") from None
    return parse_captions(cell, "its caption")

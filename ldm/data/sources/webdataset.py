"""TODO."""

import contextlib
import itertools
import json
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ldm.data.sources.base import (
    CAPTION_COLUMNS,
    as_caption_list,
    parse_captions,
)
from ldm.data.sources.decode import SUFFIXES
from ldm.data.sources.table import image_column

if TYPE_CHECKING:
    pass

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CAPTION_SUFFIXES = ("txt", *CAPTION_COLUMNS)  # endings of the files in a tar that hold a caption
MAX_IMAGE_BYTES = 2**28  # bytes of an encoded image, and of those in memory while a shard is fetched
MAX_TEXT_BYTES = 2**20  # bytes of a text
NAME_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    b"X",
)  # read into memory


ROWS_PER_CHUNK = 64  # rows that are in memory while a shard is fetched, or fewer large ones


class ShardReadError(ValueError):
    """A whole shard that can not be read, or not be kept, which no other image can stand in for."""


class Shard(NamedTuple):
    """A file of a set, and a name for its content."""

    url: str
    key: str


class ShardRow(NamedTuple):
    """What a shard says of one image; `error` says why it can not be used."""

    image: bytes | None
    captions: list[str]
    error: str | None


def _count(shard: Shard) -> int:
    with _shard_errors(shard.url):
        if shard.url.lower().endswith(TAR_SUFFIXES):
            return sum(1 for _ in _samples(shard.url))
        import pyarrow.parquet

        with _opened(shard.url) as file:
            told = pyarrow.parquet.read_metadata(file)
        groups = [told.row_group(i).num_rows for i in range(told.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != told.num_rows:
            raise ValueError("its counts of rows are damaged")
        return told.num_rows


def read_rows(url: str) -> Iterator[ShardRow]:
    """The rows of a shard. UnreadableShard when it can not be read, or is cut off."""
    with _shard_errors(url):
        yield from map(_tar_row, _samples(url)) if url.lower().endswith(TAR_SUFFIXES) else _parquet_rows(url)


@contextlib.contextmanager
def _shard_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (GeneratorExit, ShardReadError):
        raise
    except Exception as error:  # file systems and formats raise errors of many types
        raise ShardReadError(
            f"{url} can not be read ({_reason(error)}); repair it, or take it out of --data.source"
        ) from None


class StrictTarInfo(tarfile.TarInfo):
    """A header in a tar; one that is damaged or missing is an error, while tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block; zeros alone end a tar."""
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise ValueError(f"it is damaged, or cut off: {error}") from None
        if found.size < 0 or (found.type in NAME_HEADER_TYPES and found.size > MAX_TEXT_BYTES):
            raise ValueError(f"a header of it tells of {found.size:,} bytes")
        return found


def _samples(url: str) -> Iterator[dict[str, bytes]]:
    """The samples of a tar file that have an image.

    Each is a run of files that are named alike up to the first dot, by what follows it.
    """
    for _, files in itertools.groupby(_members(url), key=lambda member: _name(member[0])[0]):
        sample: dict[str, bytes] = {}
        for path, data in files:
            sample.setdefault(_name(path)[1], data)
        if _image_of(sample) is not None:
            yield sample


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of the images and captions in a tar, without hidden ones, and of large ones the begin."""
    with _opened(url) as file, tarfile.open(fileobj=file, mode="r|*", bufsize=2**17, tarinfo=StrictTarInfo) as tar:
        for member in tar:
            most, hidden = _max_bytes(_name(member.name)[1]), member.name.rpartition("/")[2].startswith((".", "__"))
            if member.isfile() and most and not hidden and (content := tar.extractfile(member)):
                yield member.name, content.read(most)
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all


def _name(path: str) -> tuple[str, str]:
    """Name of the sample, and ending, of a file in a tar."""
    folder, _, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _max_bytes(ending: str) -> int:
    """The bytes that are read of a file, by its ending; 0: it is neither image nor caption."""
    if f".{ending}".endswith(SUFFIXES):
        return MAX_IMAGE_BYTES
    return MAX_TEXT_BYTES if ending in (*CAPTION_SUFFIXES, "json") else 0


def _image_of(sample: dict[str, bytes]) -> bytes | None:
    return next((data for ending, data in sample.items() if f".{ending}".endswith(SUFFIXES)), None)


def _tar_row(sample: dict[str, bytes]) -> ShardRow:
    image = _image_of(sample)
    try:
        return ShardRow(image, _tar_captions(sample), None)
    except ValueError as error:
        return ShardRow(None, [], str(error))


def _tar_captions(sample: dict[str, bytes]) -> list[str]:
    try:
        for ending in CAPTION_SUFFIXES:
            if ending in sample:
                return _captions(sample[ending].decode("utf-8-sig"), "its text")
        told = json.loads(sample.get("json", b"{}"))
        found = next((told[name] for name in CAPTION_COLUMNS if name in told), None)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its caption is not UTF-8, or no JSON") from None
    return _captions(found, "its JSON")


def _captions(cell: Any, where: str) -> list[str]:
    return list(filter(None, as_caption_list(parse_captions(cell, where))))


def _parquet_rows(url: str) -> Iterator[ShardRow]:
    import datasets
    import pyarrow.parquet

    with _opened(url) as file:
        table = pyarrow.parquet.ParquetFile(file)
        schema, features = table.schema_arrow, datasets.Features()
        for column in schema:
            with contextlib.suppress(ValueError, NotImplementedError):  # a type that it has no name for: no image
                features |= datasets.Features.from_arrow_schema(pyarrow.schema([column], metadata=schema.metadata))
        image = image_column(features, url)
        caption = next((name for name in CAPTION_COLUMNS if name in features), None)
        columns = [image, *([caption] if caption else [])]
        for batch in table.iter_batches(ROWS_PER_CHUNK, columns=columns):
            for number in range(batch.num_rows):
                yield _parquet_row(*(batch[name][number] for name in columns))


def _parquet_row(cell: Any, *caption: Any) -> ShardRow:
    """A row from cells of arrow."""
    try:
        data = cell.as_py()
        data = data["bytes"] if isinstance(data, dict) else data  # no path that a stranger wrote is followed
        if not isinstance(data, bytes):
            raise ValueError("holds no image")
        return ShardRow(data, _captions(caption[0].as_py() if caption else None, "its row"), None)
    except UnicodeDecodeError:
        return ShardRow(None, [], "its caption is not UTF-8")
    except (ValueError, OverflowError) as error:
        return ShardRow(None, [], str(error))


def _opened(url: str) -> Any:
    from datasets.utils.file_utils import xopen  # fsspec's open, which tries again where the network fails

    through = url.startswith(("http", "hf:")) and url.lower().endswith(TAR_SUFFIXES)
    return xopen(url, "rb", **({"block_size": 0} if through else {}))  # 0: in one request from begin to end


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

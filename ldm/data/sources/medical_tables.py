"""What tables and templates add to medical slices: captions, and patients where files name none."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.sources.base import CAPTION_COLUMNS, parse_captions
from ldm.data.sources.captions import FILE_COLUMNS, PathIndex, find_sidecars, find_tables, read_rows, read_text
from ldm.data.sources.medical_scan import MAX_LISTED, Scan, positions
from ldm.medical.dicom import CAPTION_FIELDS
from ldm.medical.slices import Slice

KEYS = {  # columns of a table, by what their values name
    "file": FILE_COLUMNS,
    "series": ("series", "series_instance_uid", "seriesinstanceuid"),
    "study": ("study", "study_instance_uid", "studyinstanceuid"),
    "patient": ("patient", "patient_id", "patientid"),
}
TEMPLATE_FIELDS = (*CAPTION_FIELDS, "plane")


def add_tables(root: Path, found: Scan) -> list[Slice]:
    """The slices of a folder, with what its tables say of a file, one slice of it, a series, a study or a patient.

    Captions may also be in text files beside images. Rows on slices that are empty, and so left out, are passed over.

    ValueError: a table without a column for that or for a caption, or that names what is not there.
    """
    slices = list(found.slices)
    by_file = positions(slices, lambda item: item.path.relative_to(root).as_posix())
    by_id = {
        "series": positions(slices, lambda item: item.series.rsplit(" ", 1)[0]),
        "study": positions(slices, lambda item: item.study),
        "patient": positions(slices, lambda item: item.patient),
    }
    files, others = PathIndex(by_file), PathIndex(set(found.files) - set(by_file))
    for table in find_tables(found.files):
        rows, _ = read_rows(root / table)
        columns = {column for row in rows for column in row}
        keys = {key: name for key, names in KEYS.items() if (name := _first(names, columns))}
        key, caption = next(iter(keys), None), _first(CAPTION_COLUMNS, columns)
        if key is None or not (caption or (key == "file" and ("patient" in keys or "spacing" in columns))):
            remedy = "give it a column file_name, series, study or patient, and a column caption"
            raise ValueError(f"{root / table} says nothing that is understood: {remedy}")
        unknown = []
        for number, row in enumerate(rows, 1):
            value = _cell(row, keys[key])
            if key == "file":
                folder = PurePosixPath(table).parent
                members = by_file.get(files.find(value, folder) or "", [])
                known = members or others.find(value, folder)
            else:
                known = members = by_id[key].get(value, []) if value else []
            if not known:
                unknown.append(number)
            texts = parse_captions(row.get(caption), f"{root / table}: row {number}") if caption else []
            added: dict[str, Any] = {}
            if key == "file" and (patient := _cell(row, keys.get("patient", ""))):
                added["patient"] = patient
            if key == "file" and (spacing := _number(row, "spacing")):
                added["spacing"] = (spacing, spacing)
            which = _number(row, "slice")
            chosen = [index for index in members if which in (None, slices[index].index)]
            for index in chosen:
                slices[index] = replace(slices[index], captions=(*slices[index].captions, *texts), **added)
        if unknown:
            listed = ", ".join(map(str, unknown[:MAX_LISTED])) + (", ..." if len(unknown) > MAX_LISTED else "")
            remedy = "add its files, or remove the rows"
            raise ValueError(
                f"{root / table}: {len(unknown):,} rows name a {key} that is not there (rows {listed}): {remedy}"
            )
    files_without = sorted(name for name, members in by_file.items() if not slices[members[0]].captions)
    for name, text in find_sidecars(files_without, found.files).items():
        captions = tuple(parse_captions(read_text(root / text), "the text file of an image"))
        for index in by_file[name]:
            slices[index] = replace(slices[index], captions=captions)
    return slices


def _number(row: Mapping[str, Any], column: str) -> float | None:
    """A value as a number; None where there is none. ValueError: it is something else."""
    text = _cell(row, column)
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"a table has {column} {text[:20]!r}: write a number") from None


def _first(names: Sequence[str], columns: set[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A value as text; "" where there is none."""
    value = row.get(column)
    return "" if value is None or value != value else str(value).strip()


def add_template(slices: Sequence[Slice], template: str) -> list[Slice]:
    """With captions by the template, where there are none. ValueError: it names a field that it may not."""
    if not template:
        return list(slices)
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"data.caption_template {template!r}: {error}") from None
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"data.caption_template {template!r}: write fields as {{Modality}}, without a format")
    if unknown := [name for _, name, _, _ in parts if name not in TEMPLATE_FIELDS]:
        allowed = ", ".join(TEMPLATE_FIELDS)
        raise ValueError(f"data.caption_template: {unknown[0]!r} is no field that it can have: {allowed}")

    def fill(item: Slice) -> tuple[str, ...]:
        values = {**dict.fromkeys(TEMPLATE_FIELDS, ""), **item.fields, "plane": item.plane or ""}
        phrases = [" ".join(phrase.split()) for phrase in template.format_map(values).split(",")]
        return (", ".join(filter(None, phrases)),) if any(values[str(name)] for _, name, _, _ in parts) else ()

    return [item if item.captions else replace(item, captions=fill(item)) for item in slices]

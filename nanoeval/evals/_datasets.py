"""Rows of data sets: from a folder of files, else from the Hugging Face hub.

Knows no benchmark: each module of `nanoeval.evals` names the columns that it reads.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENV_DATASETS_DIR = "NANOEVAL_DATASETS_DIR"

# The commits whose scores this package's numbers are about.
PINNED_REVISIONS: Mapping[str, str] = {
    "openai/gsm8k": "cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
    "HuggingFaceM4/ChartQA": "b605b6e08b57faf4359aeb2fe6a3ca595f99b6c5",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
}


class DatasetError(RuntimeError):
    """A data set cannot be had, or is not what it should be; the message says what to do."""


class Rows(list[dict[str, Any]]):
    """The rows of one split, in their order, each a dict from column to plain value.

    `revision` is the hub's commit, None for files of one's own. `source` says where they came
    from, for reports. `folder` is what relative image paths in them are relative to.
    """

    revision: str | None = None
    source: str = ""
    folder: Path | None = None

    def image(self, value: Any) -> bytes:
        """The encoded image (PNG, JPEG, ...) that a column of these rows holds.

        `value` is what the hub's image columns hold, `{"bytes": ..., "path": ...}`; or, as suits
        JSON: base64, a data URL, or a path relative to the file of the rows.
        """
        return image_bytes(value, self.folder)


def load_rows(
    path: str, config: str | None = None, split: str = "test", revision: str | None = None
) -> Rows:
    """All rows of a split of the data set `path` ("org/name"). Blocks; call it in a thread.

    With $NANOEVAL_DATASETS_DIR set: `<dir>/<path>/<config or default>/<split>.jsonl` or
    `.parquet`, and never the network. Else the hub at `revision`, else at the pinned commit, else
    at the newest, whose commit the rows then name. Images stay encoded. Raises DatasetError, which
    names the folder to fill, the variable to set or the package to install.
    """
    folder = os.environ.get(ENV_DATASETS_DIR)
    if folder:
        rows = _load_files(Path(folder).expanduser(), path, config or "default", split)
    else:
        rows = _load_hub(path, config, split, revision or PINNED_REVISIONS.get(path))
    if not rows:
        raise DatasetError(f"{rows.source} has no rows; a split to evaluate needs at least one")
    return rows


def _load_files(root: Path, path: str, config: str, split: str) -> Rows:
    folder = root / path / config
    for name, read in ((f"{split}.jsonl", _read_jsonl), (f"{split}.parquet", _read_parquet)):
        file = folder / name
        if file.is_file():
            rows = Rows(read(file))
            rows.source, rows.folder = str(file), folder
            return rows
    raise DatasetError(
        f"no {split}.jsonl or {split}.parquet in {folder} ({_nearest_content(folder)});"
        f" put the split of {path} there, or unset {ENV_DATASETS_DIR} to load it from the hub"
    )


def _nearest_content(folder: Path) -> str:
    """What the folder holds, or the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{folder} holds {shown or 'nothing'}"


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DatasetError(
                    f"{file}, line {number} is a {type(row).__name__}; each line must be an"
                    ' object such as {"question": "..."}'
                )
            rows.append(row)
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError(
            f'reading {file} needs a package: pip install "nanoeval[datasets]"; or convert the file'
            " to .jsonl"
        ) from error
    try:
        table: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DatasetError(f"{file} is not a Parquet file: {error}") from error
    return table


def _load_hub(path: str, config: str | None, split: str, revision: str | None) -> Rows:
    asked = f"{path}, {config or 'default'}, {split}"
    elsewhere = (
        f"; or set {ENV_DATASETS_DIR} to a folder that holds"
        f" {path}/{config or 'default'}/{split}.jsonl"
    )
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DatasetError(
            f'loading {asked} needs a package: pip install "nanoeval[datasets]"{elsewhere}'
        ) from error
    try:
        if revision is None:
            revision = huggingface_hub.HfApi().dataset_info(path).sha
        dataset = datasets.load_dataset(path, config, split=split, revision=revision)
    # Beside its own errors the hub's client raises those of the HTTP library below it.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        hint = " (gated: accept its terms on the hub and set HF_TOKEN)" if _is_gated(error) else ""
        raise DatasetError(
            f"cannot load {asked} from the hub: {type(error).__name__}: {reason}{hint}; check the"
            f" name and the network{elsewhere}"
        ) from error
    # The Arrow form leaves images encoded as they were published.
    rows = Rows(dataset.with_format("arrow")[:].to_pylist())
    rows.source, rows.revision = f"{asked} at {revision}", revision
    return rows


def _is_gated(error: BaseException) -> bool:
    return "gated" in f"{type(error).__name__} {error}".lower()


def image_bytes(value: Any, folder: Path | None = None) -> bytes:
    """The encoded image that `value` holds; see `Rows.image` for its forms.

    Raises DatasetError when it is none of them, or its file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value:
        return _image_from_text(value, folder)
    if callable(getattr(value, "save", None)):  # a PIL image
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    raise DatasetError(
        f"an image column holds {type(value).__name__} {value!r:.60}; it must hold encoded bytes,"
        " base64, a data URL or a path"
    )


def _image_from_text(text: str, folder: Path | None) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    # A path is tried first: short names such as "cat" are valid base64 as well.
    elif len(text) < 1024 and (file := (folder or Path()) / text).is_file():
        return file.read_bytes()
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DatasetError(
            f"an image column holds {text[:60]!r}, which is neither base64 nor a file beneath"
            f" {folder or Path.cwd()}"
        ) from error


def image_media_type(data: bytes) -> str:
    """The media type of an encoded image, such as "image/png", told by its first bytes.

    Raises DatasetError for a form that no model is known to read.
    """
    signatures = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}
    for start, name in signatures.items():
        if data.startswith(start):
            return f"image/{name}"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise DatasetError(f"an image starts with {data[:8]!r}: not PNG, JPEG, GIF, BMP or WebP")

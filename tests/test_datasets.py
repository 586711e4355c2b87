"""Where rows of data sets come from, and what one reads when they do not."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoeval.evals import _datasets
from nanoeval.evals._datasets import DatasetError, Rows, image_bytes, image_media_type, load_rows

# The smallest PNG: one transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
NEEDS_DATASETS = 'pip install "nanoeval[datasets]"'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder that is in force."""
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path))
    return tmp_path


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_rows_come_from_the_folder_in_their_order(root: Path) -> None:
    """Question ids count rows, so an order that varies would mix up questions."""
    file = write(root / "org/name/main/test.jsonl", [{"n": i} for i in range(50)])
    rows = load_rows("org/name", "main", "test")
    assert [row["n"] for row in rows] == list(range(50))
    assert (rows.source, rows.revision) == (str(file), None)


def test_a_data_set_without_configs_lies_under_default(root: Path) -> None:
    """The hub calls the only config of a data set "default"."""
    write(root / "org/name/default/validation.jsonl", [{"n": 1}])
    assert load_rows("org/name", None, "validation") == [{"n": 1}]


def test_parquet_rows_equal_json_rows(root: Path) -> None:
    """People put the hub's Parquet files into the folder as they are."""
    pyarrow = pytest.importorskip("pyarrow", reason=NEEDS_DATASETS)
    from pyarrow import parquet

    row = {"question": "?", "choices": ["a", "b"], "image": {"bytes": PNG, "path": "x.png"}}
    (root / "org/name/default").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([row]), root / "org/name/default/test.parquet")
    rows = load_rows("org/name")
    assert rows == [row]
    assert rows.image(rows[0]["image"]) == PNG


def test_a_missing_split_says_which_folder_to_fill(root: Path) -> None:
    """A bare FileNotFoundError would leave open where the loader looked, and why there."""
    write(root / "org/name/main/train.jsonl", [{"n": 1}])
    with pytest.raises(DatasetError) as caught:
        load_rows("org/name", "main", "test")
    message = str(caught.value)
    assert f"no test.jsonl or test.parquet in {root}/org/name/main" in message
    assert "holds train.jsonl" in message
    assert "unset NANOEVAL_DATASETS_DIR" in message


def test_a_missing_folder_shows_the_nearest_one(root: Path) -> None:
    """A wrong config name is seen at once beside the right ones."""
    write(root / "org/name/main/test.jsonl", [{"n": 1}])
    with pytest.raises(DatasetError, match="org/name holds main"):
        load_rows("org/name", "mian")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": 1}\n{"n": \n', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 is a list; each line must be an object"),
        ("\n", "has no rows"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(root: Path, text: str, message: str) -> None:
    """A JSONDecodeError alone names neither the file nor the line."""
    write(root / "org/name/default/test.jsonl", []).write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        load_rows("org/name")
    assert "test.jsonl" in str(caught.value)


def test_a_damaged_parquet_file_is_named(root: Path) -> None:
    """A file cut in the middle of a download must not look like a bug of ours."""
    pytest.importorskip("pyarrow", reason=NEEDS_DATASETS)
    write(root / "org/name/default/test.parquet", [{"n": 1}])
    with pytest.raises(DatasetError, match=r"test\.parquet is not a Parquet file"):
        load_rows("org/name")


def test_a_missing_package_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` is an extra, so newcomers lack it."""
    monkeypatch.delenv("NANOEVAL_DATASETS_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r'pip install "nanoeval\[datasets\]"'):
        load_rows("org/name")


def test_a_missing_package_for_parquet_names_its_install_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet needs the extra even when nothing is downloaded."""
    write(root / "org/name/default/test.parquet", [])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r'pip install "nanoeval\[datasets\]"'):
        load_rows("org/name")


class FakeHub:
    """Stands for the hub's client, which tests cannot reach: what it was asked, what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
        datasets = pytest.importorskip("datasets", reason=NEEDS_DATASETS)
        import huggingface_hub

        monkeypatch.delenv("NANOEVAL_DATASETS_DIR", raising=False)
        self.asked: list[Any] = []
        self.error: Exception | None = None

        def load_dataset(path: str, config: str | None, *, split: str, revision: str) -> Any:
            self.asked.append((path, config, split, revision))
            if self.error is not None:
                raise self.error
            return datasets.Dataset.from_list(table)

        class Info:
            sha = "newest-commit"

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: Info())


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that changes under its name would change scores in silence."""
    hub = FakeHub(monkeypatch, [{"n": 1}])
    rows = load_rows("openai/gsm8k", "main")
    assert hub.asked == [
        ("openai/gsm8k", "main", "test", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c")
    ]
    assert rows.revision == "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"


def test_without_a_pin_the_newest_commit_is_loaded_by_name_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results must say on which version of the data they stand."""
    hub = FakeHub(monkeypatch, [{"n": 1}])
    assert load_rows("org/name", revision="mine").revision == "mine"
    rows = load_rows("org/name")
    assert [revision for *_, revision in hub.asked] == ["mine", "newest-commit"]
    assert (rows, rows.revision) == ([{"n": 1}], "newest-commit")
    assert "newest-commit" in rows.source


def test_images_of_the_hub_stay_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding and encoding anew would change the bytes that models are shown."""
    hub = FakeHub(monkeypatch, [])
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": PNG, "path": None}]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    rows = load_rows("org/name")
    assert rows.image(rows[0]["image"]) == PNG
    assert hub.asked == []


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters have no internet; the message must lead to the folder."""
    hub = FakeHub(monkeypatch, [])
    hub.error = ConnectionError("no route to host")
    with pytest.raises(DatasetError) as caught:
        load_rows("org/name", "main")
    assert "ConnectionError: no route to host" in str(caught.value)
    assert "set NANOEVAL_DATASETS_DIR to a folder that holds org/name/main/test.jsonl" in str(
        caught.value
    )
    assert caught.value.__cause__ is hub.error


def test_a_gated_data_set_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 401 alone does not say that terms have to be accepted."""
    hub = FakeHub(monkeypatch, [])
    hub.error = PermissionError("Dataset org/name is a gated dataset on the Hub.")
    with pytest.raises(DatasetError, match="accept its terms on the hub and set HF_TOKEN"):
        load_rows("org/name")


def test_every_form_of_an_image_gives_its_bytes(tmp_path: Path) -> None:
    """JSON holds no bytes, so people write base64, data URLs or paths beside the rows."""
    (tmp_path / "cat").write_bytes(PNG)
    rows = Rows([{"image": "cat"}])
    rows.folder = tmp_path
    text = base64.b64encode(PNG).decode()
    for value in (
        *(PNG, text, "cat", f"data:image/png;base64,{text}"),
        *({"bytes": PNG, "path": "gone.png"}, {"bytes": None, "path": "cat"}, {"bytes": text}),
    ):
        assert rows.image(value) == PNG


def test_a_pil_image_is_encoded_as_png() -> None:
    """Callers may hand over what they decoded themselves."""
    image = pytest.importorskip("PIL.Image", reason=NEEDS_DATASETS).new("RGB", (2, 2))
    assert image_media_type(image_bytes(image)) == "image/png"


@pytest.mark.parametrize("value", [None, 7, "gone.png", "", {"bytes": None, "path": None}])
def test_what_is_no_image_is_refused_with_its_value(value: Any) -> None:
    """A missing file must not be sent to a model as a broken image."""
    with pytest.raises(DatasetError, match="an image column holds"):
        image_bytes(value)


def test_image_types_are_told_by_content() -> None:
    """A JPEG sent as PNG is refused by strict servers."""
    assert image_media_type(PNG) == "image/png"
    assert image_media_type(b"\xff\xd8\xff\xe0rest") == "image/jpeg"
    assert image_media_type(b"RIFF1234WEBPrest") == "image/webp"
    with pytest.raises(DatasetError, match="not PNG, JPEG"):
        image_media_type(b"<svg>")


def test_pins_are_full_commits() -> None:
    """A branch or a short hash can move."""
    for revision in _datasets.PINNED_REVISIONS.values():
        assert len(revision) == 40
        int(revision, 16)

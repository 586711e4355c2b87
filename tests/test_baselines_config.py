"""The YAML files: what is accepted, and what a mistake in one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoeval.baselines.config import (
    ConfigError,
    HFModelConfig,
    ServerConfig,
    SuiteConfig,
    load_config,
    load_suite,
    validated,
)

yaml = pytest.importorskip("yaml", reason='pip install "nanoeval[hf]"')

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def usable(**changes: Any) -> dict[str, Any]:
    return {
        "task": "mmlu",
        "model": {"model_id": "org/name"},
        "report": {"output_dir": "out"},
        **changes,
    }


def write(folder: Path, data: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_examples_are_usable(path: Path) -> None:
    """An example that does not load is worse than none."""
    config = load_config(path)
    assert path.stem.startswith(config.task)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("suites/*.yaml")), ids=lambda p: p.stem)
def test_example_suites_are_usable(path: Path) -> None:
    """An example that does not load is worse than none."""
    suite, tasks = load_suite(path)
    assert len(tasks) == len(suite.tasks) >= 2


def test_there_is_an_example_for_every_task() -> None:
    """People start from a copy."""
    tasks = {load_config(path).task for path in EXAMPLES.glob("configs/*.yaml")}
    assert tasks == {"mmlu", "hellaswag", "mmmu_pro", "textvqa", "mme"}


def test_all_documented_keys_are_taken(tmp_path: Path) -> None:
    """The keys of the documented example, in YAML as people write it."""
    config = load_config(
        write(
            tmp_path,
            """
            task: mmlu
            model: {model_id: HuggingFaceTB/SmolVLM-256M-Instruct, is_vlm: false, dtype: bfloat16,
                    device: cuda, trust_remote_code: true, attn_impl: flash_attention_2,
                    batch_size: auto}
            scoring: {strategy: rank_ll, max_new_tokens: 8, seed: 123, normalize_by_length: false}
            report: {output_dir: artifacts/x, summary_filename: summary.json,
                     predictions_filename: predictions.jsonl, table_filename: metrics.csv,
                     plot_filename: accuracy.png, save_predictions: true, save_table: true,
                     save_plot: true}
            dataset: {split: test, subjects: [high_school_physics], subset_size: 100}
            """,
        )
    )
    assert isinstance(config.model, HFModelConfig)
    assert config.model.trust_remote_code
    assert not HFModelConfig(model_id="x").trust_remote_code
    server = load_config(write(tmp_path, usable(model={"base_url": "http://h/v1", "model": "m"})))
    assert isinstance(server.model, ServerConfig)


VISION = {"model_id": "org/name", "is_vlm": True}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (usable(datset={}), r"datset: there is no such key \(did you mean dataset\?\)"),
    "unknown model key": (
        usable(model={"model_id": "x", "is_vl": True}),
        r"model.is_vl: there is no such key .*allowed: model_id, revision, is_vlm",
    ),
    "unknown server key": (
        usable(model={"base_url": "u", "model": "x", "dtype": "auto"}),
        "model.dtype: there is no such key.*allowed: base_url, model, api_key_env",
    ),
    "wrong type": (usable(dataset={"subset_size": "10"}), "dataset.subset_size: .*not '10'"),
    "zero": (usable(dataset={"subset_size": 0}), "dataset.subset_size: .*greater.* 1, not 0"),
    "batch size": (usable(model={"model_id": "x", "batch_size": 0}), "batch_size: must be auto or"),
    "missing": (
        {key: value for key, value in usable().items() if key != "report"},
        "report: is missing",
    ),
    "unknown task": (usable(task="mmlo"), "task: .*'mmlu', 'hellaswag'.*not 'mmlo'"),
    "unknown subject": (
        usable(dataset={"subjects": ["hgh_school_physics"]}),
        "subjects.*'hgh_school_physics' is not known; the nearest: high_school_physics",
    ),
    "hellaswag has no letters": (
        usable(task="hellaswag", scoring={"strategy": "gen_letter"}),
        "strategy: hellaswag cannot do gen_letter; it can do rank_ll",
    ),
    "textvqa has no options": (
        usable(task="textvqa", model=VISION, scoring={"strategy": "rank_ll"}),
        "textvqa cannot do rank_ll; it can do gen_answer",
    ),
    "text model for images": (usable(task="mmmu_pro"), "is_vlm: mmmu_pro shows images"),
    "length of nothing": (
        usable(scoring={"strategy": "gen_letter", "normalize_by_length": True}),
        "normalize_by_length: only rank_ll",
    ),
    "subjects elsewhere": (
        usable(task="hellaswag", dataset={"subjects": ["anatomy"]}),
        "dataset.subjects: is for mmlu, not for hellaswag",
    ),
    "ranking images on a server": (
        usable(
            task="mmmu_pro",
            model={"base_url": "u", "model": "m"},
            scoring={"strategy": "rank_ll"},
        ),
        "no server gives log-probabilities after images",
    ),
    "two files of one name": (
        usable(report={"output_dir": "o", "table_filename": "summary.json"}),
        "report: the file names .* must all differ",
    ),
    "a path as a name": (
        usable(report={"output_dir": "o", "table_filename": "../x.csv"}),
        "must be a plain file name",
    ),
    "dtype": (usable(model={"model_id": "x", "dtype": "int3"}), "model.dtype: must be one of auto"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_file_key_and_what_is_allowed(name: str, tmp_path: Path) -> None:
    """A mistake that passes gives a report of something else than was asked."""
    data, message = MISTAKES[name]
    path = write(tmp_path, data)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert all(line.startswith(f"{path}: ") for line in str(raised.value).splitlines())
    assert isinstance(raised.value, ValueError)


def test_files_that_are_no_yaml_say_so(tmp_path: Path) -> None:
    """A traceback of the YAML library does not say which file."""
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is not YAML: .*line 1"):
        load_config(write(tmp_path, "task: [mmlu"))
    with pytest.raises(ConfigError, match="line 4: split: stands there twice"):
        load_config(write(tmp_path, "task: mmlu\ndataset:\n  split: test\n  split: dev\n"))
    with pytest.raises(ConfigError, match="holds NoneType; it must hold keys"):
        load_config(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_suite_tasks_inherit_what_they_leave_out() -> None:
    """A task that runs with another model than its suite says ruins the table."""
    suite = validated(
        {
            "output_dir": "out",
            "model": {"model_id": "shared"},
            "scoring": {"strategy": "gen_letter", "max_new_tokens": 3},
            "tasks": [
                {"task": "mmlu"},
                {"task": "hellaswag"},
                {
                    "task": "mmlu",
                    "name": "other",
                    "model": {"model_id": "own"},
                    "report": {"save_plot": False},
                },
            ],
        },
        SuiteConfig,
        "s",
    )
    tasks = suite.named_tasks()
    assert [config.model.model_id for config in tasks.values()] == ["shared", "shared", "own"]
    assert tasks["mmlu"].strategy == "gen_letter"
    # A strategy for the whole suite applies where it can; a task's own never gives way.
    assert tasks["hellaswag"].strategy == "rank_ll"
    assert tasks["other"].report.output_dir == "out/other"
    assert not tasks["other"].report.save_plot


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "mmlu"}, {"task": "mmlu"}], "tasks.1.name: there are two tasks 'mmlu'"),
        ([{"task": "mmlu", "modle": {}}], "tasks.0.modle: there is no such key"),
        (
            [{"task": "hellaswag", "scoring": {"strategy": "gen_letter"}}],
            "tasks.0: scoring.strategy: hellaswag cannot do gen_letter",
        ),
        ([], "tasks: .*at least 1 item"),
        ([{"task": "mmlu", "name": "a/b"}], "must be a plain folder name"),
    ],
)
def test_a_mistake_in_a_suite_names_its_entry(
    tasks: list[Any], message: str, tmp_path: Path
) -> None:
    """In a suite of ten tasks "the strategy is wrong" does not help."""
    suite = {"output_dir": "out", "model": {"model_id": "m"}, "tasks": tasks}
    with pytest.raises(ConfigError, match=message):
        load_suite(write(tmp_path, suite))


def test_a_suite_without_any_model_says_so(tmp_path: Path) -> None:
    """The engine would fail much later, on a model of None."""
    with pytest.raises(ConfigError, match="mmlu has no model"):
        load_suite(write(tmp_path, {"output_dir": "out", "tasks": [{"task": "mmlu"}]}))

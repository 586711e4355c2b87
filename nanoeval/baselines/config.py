"""The YAML of a baseline or a suite: its keys, defaults and rules. Loads no model and no data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from nanoeval.baselines.benchmarks import BENCHMARKS, Benchmark, Strategy, TaskName
from nanoeval.evals._choices import check_known
from nanoeval.models._hf_loading import DTYPES

T = TypeVar("T", bound=BaseModel)

INSTALL = 'pip install "nanoeval[hf]"'


class ConfigError(ValueError):
    """A configuration is not usable; the message names the file, the key and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class HFModelConfig(_Section):
    """A Hugging Face checkpoint; the fields are those of `nanoeval.models.hf.HFModel`."""

    model_id: str
    revision: str | None = None
    is_vlm: bool = False
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    attn_impl: str | None = None
    batch_size: Any = "auto"

    @field_validator("batch_size")
    @classmethod
    def _auto_or_positive(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"must be auto or a whole number from 1, not {value!r}")
        return value

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return value


class ServerConfig(_Section):
    """A model behind an OpenAI-compatible server. `api_key_env` names the variable of its key."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"


def _kind_of_model(value: Any) -> str:
    is_server = isinstance(value, ServerConfig) or (
        isinstance(value, Mapping) and "base_url" in value
    )
    return "server" if is_server else "checkpoint"


ModelConfig = Annotated[
    Annotated[HFModelConfig, Tag("checkpoint")] | Annotated[ServerConfig, Tag("server")],
    Discriminator(_kind_of_model),
]


class ScoringConfig(_Section):
    """How answers are had and judged. None = the benchmark's own default.

    Greedy decoding and ranking draw nothing at random; `seed` goes to servers and into the report.
    """

    strategy: Strategy | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int = 123
    normalize_by_length: bool = False


class ReportConfig(_Section):
    """What is written where. Names are those of files in `output_dir`."""

    output_dir: str
    summary_filename: str = "summary.json"
    predictions_filename: str = "predictions.jsonl"
    table_filename: str = "metrics.csv"
    plot_filename: str = "accuracy.png"
    save_predictions: bool = True
    save_table: bool = True
    save_plot: bool = True

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [
            self.summary_filename,
            self.predictions_filename,
            self.table_filename,
            self.plot_filename,
        ]
        for name in names:
            if not name or Path(name).name != name:
                raise ValueError(f"{name!r} must be a plain file name, without a folder")
        if len(set(names)) < len(names):
            raise ValueError(f"the file names {', '.join(names)} must all differ")
        return self


class DatasetConfig(_Section):
    """Which examples. `subset_size` is how many in all, None = every one."""

    split: str | None = None
    subset_size: Annotated[int, Field(ge=1)] | None = None
    revision: str | None = None
    subjects: Annotated[list[str], Field(min_length=1)] | None = None
    subset_name: str | None = None


class RunnerConfig(_Section):
    """How the run is carried out; see `nanoeval.RunnerArgs`. concurrency None = by the model."""

    concurrency: Annotated[int, Field(ge=1)] | None = None
    max_retries: Annotated[int, Field(ge=0)] = 3
    use_monitor: bool = False


class BaselineConfig(_Section):
    """One benchmark, one model, one report."""

    task: TaskName
    model: ModelConfig
    scoring: ScoringConfig = ScoringConfig()
    report: ReportConfig
    dataset: DatasetConfig = DatasetConfig()
    runner: RunnerConfig = RunnerConfig()

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark that `task` names."""
        return BENCHMARKS[self.task]

    @property
    def strategy(self) -> Strategy:
        """The strategy asked for, else the benchmark's first."""
        return self.scoring.strategy or self.benchmark.strategies[0]

    @property
    def split(self) -> str:
        """The split asked for, else the benchmark's own."""
        return self.dataset.split or self.benchmark.split

    @property
    def max_new_tokens(self) -> int:
        """The limit asked for, else the benchmark's own."""
        return self.scoring.max_new_tokens or self.benchmark.max_new_tokens

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        benchmark, model = self.benchmark, self.model
        if self.strategy not in benchmark.strategies:
            raise ValueError(
                f"scoring.strategy: {self.task} cannot do {self.strategy}; it can do"
                f" {' or '.join(benchmark.strategies)}"
            )
        if self.scoring.normalize_by_length and self.strategy != "rank_ll":
            raise ValueError("scoring.normalize_by_length: only rank_ll has lengths to divide by")
        if isinstance(model, HFModelConfig) and benchmark.sees and not model.is_vlm:
            raise ValueError(
                f"model.is_vlm: {self.task} shows images, so the model must be a vision-language"
                " one, with is_vlm: true"
            )
        if isinstance(model, ServerConfig) and benchmark.sees and self.strategy == "rank_ll":
            raise ValueError(
                "scoring.strategy: no server gives log-probabilities after images; use"
                f" {benchmark.strategies[0]}, or a checkpoint as model"
            )
        self._check_dataset()
        return self

    def _check_dataset(self) -> None:
        for key in ("subjects", "subset_name"):
            asked = getattr(self.dataset, key)
            if asked is None:
                continue
            if key not in self.benchmark.selects:
                owners = [name for name, b in BENCHMARKS.items() if key in b.selects]
                raise ValueError(f"dataset.{key}: is for {', '.join(owners)}, not for {self.task}")
            names = [asked] if isinstance(asked, str) else asked
            check_known(names, self.benchmark.selects[key], f"dataset.{key}:")
            if len(set(names)) < len(names):
                raise ValueError(f"dataset.{key}: names one twice")

    def load_examples(self) -> list[dict[str, Any]]:
        """The examples that `dataset` names, in order. Blocks."""
        chosen = {key: getattr(self.dataset, key) for key in self.benchmark.selects}
        return self.benchmark.load(
            split=self.split,
            subset_size=self.dataset.subset_size,
            revision=self.dataset.revision,
            **{key: value for key, value in chosen.items() if value is not None},
        )


class SuiteTaskConfig(_Section):
    """One task of a suite; what it leaves out comes from the suite. `name` tells it from others."""

    task: TaskName
    name: str | None = None
    model: ModelConfig | None = None
    scoring: ScoringConfig | None = None
    report: dict[str, Any] | None = None
    dataset: DatasetConfig = DatasetConfig()
    runner: RunnerConfig | None = None


class SuiteConfig(_Section):
    """Several tasks, which share `model`, `scoring` and `runner` where they have none of their own.

    Each task's report goes to `<output_dir>/<name>` unless its own `report` says otherwise.
    """

    output_dir: str
    model: ModelConfig | None = None
    scoring: ScoringConfig | None = None
    runner: RunnerConfig = RunnerConfig()
    tasks: Annotated[list[SuiteTaskConfig], Field(min_length=1)]

    def named_tasks(self) -> dict[str, BaselineConfig]:
        """A whole configuration for each task, by its name, in order.

        Raises ValueError, which names the entry, for one that is not usable or two of one name.
        """
        found: dict[str, BaselineConfig] = {}
        for index, entry in enumerate(self.tasks):
            name = entry.name or entry.task
            where = f"tasks.{index}"
            if name in found:
                raise ValueError(f"{where}.name: there are two tasks {name!r}; name one otherwise")
            if Path(name).name != name:
                raise ValueError(f"{where}.name: {name!r} must be a plain folder name")
            found[name] = validated(self._merged(entry, name), BaselineConfig, where)
        folders = [config.report.output_dir for config in found.values()]
        if len(set(folders)) < len(folders):
            raise ValueError("tasks: two of them have one report.output_dir")
        return found

    def _merged(self, entry: SuiteTaskConfig, name: str) -> dict[str, Any]:
        if entry.model is None and self.model is None:
            raise ValueError(f"tasks: {name} has no model, and the suite has none to inherit")
        scoring = entry.scoring or self._scoring_for(entry.task)
        return {
            "task": entry.task,
            "model": entry.model or self.model,
            "scoring": scoring,
            "report": {"output_dir": str(Path(self.output_dir) / name), **(entry.report or {})},
            "dataset": entry.dataset,
            "runner": entry.runner or self.runner,
        }

    def _scoring_for(self, task: str) -> ScoringConfig:
        """The suite's scoring; a strategy that the task does not have gives way to its own."""
        scoring = self.scoring or ScoringConfig()
        if scoring.strategy in (None, *BENCHMARKS[task].strategies):
            return scoring
        return scoring.model_copy(update={"strategy": None, "normalize_by_length": False})


def load_config(path: str | Path) -> BaselineConfig:
    """The configuration in a YAML file; ConfigError for one that is not usable."""
    return validated(_read_yaml(path), BaselineConfig, str(path))


def load_suite(path: str | Path) -> tuple[SuiteConfig, dict[str, BaselineConfig]]:
    """The suite in a YAML file with its tasks by name; ConfigError for one that is not usable."""
    suite = validated(_read_yaml(path), SuiteConfig, str(path))
    try:
        return suite, suite.named_tasks()
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def validated(data: Any, kind: type[T], where: str) -> T:
    """`data` as `kind`; ConfigError with one line for each thing that is wrong."""
    if isinstance(data, kind):
        return data
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [_explain(details, kind) for details in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def _read_yaml(path: str | Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyYAML: {INSTALL}") from error
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader), str(path))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}; it must hold keys and values")
    return data


def _refuse_repeated_keys(node: Any, where: str) -> None:
    """Raise ConfigError for a key that stands twice in one place, of which YAML keeps the last."""
    if node is None or isinstance(node.value, str):
        return
    keys: set[str] = set()
    for item in node.value:
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None and key.value in keys:
            line = key.start_mark.line + 1
            raise ConfigError(f"{where}: line {line}: {key.value}: stands there twice; leave one")
        if key is not None and isinstance(key.value, str):
            keys.add(key.value)
        _refuse_repeated_keys(value, where)


def _explain(details: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """One line: the key, what is wrong, what is allowed."""
    keys = [str(part) for part in details["loc"] if part not in {"checkpoint", "server"}]
    key = ".".join(keys)
    prefix = f"{key}: " if key else ""
    if details["type"] == "extra_forbidden":
        allowed = _keys_beside(details["loc"], kind)
        near = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{prefix}there is no such key{hint}; allowed: {', '.join(allowed)}"
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] == "missing":
        return f"{prefix}is missing"
    if details["type"] == "value_error":
        return f"{prefix}{message}"
    return f"{prefix}{message[:1].lower()}{message[1:]}, not {details['input']!r:.80}"


def _keys_beside(loc: Sequence[str | int], kind: type[BaseModel]) -> list[str]:
    """The keys that the section knows in which the unknown key at `loc` stands."""
    sections: dict[str, type[BaseModel]] = {
        "checkpoint": HFModelConfig,
        "server": ServerConfig,
        "scoring": ScoringConfig,
        "report": ReportConfig,
        "dataset": DatasetConfig,
        "runner": RunnerConfig,
        "tasks": SuiteTaskConfig,
    }
    section: type[BaseModel] = kind
    for part in loc[:-1]:
        section = sections.get(str(part), section)
    return list(section.model_fields)

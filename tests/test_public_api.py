"""The contract with evals that exist already: their imports, calls and defaults keep working."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import chz
import pytest
from pydantic import BaseModel, PrivateAttr, ValidationError

import nanoeval
from nanoeval.asyncio_utils import HasAsyncContextManager
from nanoeval.eval import (
    Eval,
    EvalSpec,
    RetryableSystemError,
    RolloutSystemError,
    RunnerArgs,
    SystemErrorsNotSupported,
    Task,
    assert_no_system_errors,
)
from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol, RunSpec
from nanoeval.solvers import mcq, mcq_api, short_answer

NAMES = {
    "nanoeval": "Eval EvalSpec RunnerArgs Task RolloutSystemError run validate",
    "nanoeval.eval": "Task Eval EvalSpec RunnerArgs RolloutSystemError RetryableSystemError"
    " SystemErrorsNotSupported assert_no_system_errors",
    "nanoeval.evaluation": "Task Eval EvalSpec RunnerArgs RolloutSystemError RetryableSystemError"
    " SystemErrorsNotSupported assert_no_system_errors run validate run_eval_in_database",
    "nanoeval.recorder_protocol": "RunSpec BasicRunSpec RecorderProtocol RecorderConfig uuid",
    "nanoeval.recorder": "RecorderProtocol get_recorder set_default_recorder dummy_recorder",
    "nanoeval.recorders": "json_recorder dummy_recorder",
    "nanoeval.json_recorder": "json_recorder JsonRecorderConfig JsonRecorder",
    "nanoeval.library_config": "LibraryConfig set_library_config get_library_config",
    "nanoeval.setup": "nanoeval_entrypoint nanoeval_logging global_exit_stack",
    "nanoeval.fs_paths": "database_dir stacktrace_root_dir writable_root_dir get_package_root",
    "nanoeval.asyncio_utils": "generator_with_cleanup gather_with_concurrency cancel_task"
    " HasAsyncContextManager HasAsyncContextManagerWithValue",
    "nanoeval.contrib.utils": "run_with_startup_timeout",
    "nanoeval.metrics.standard": "compute_default_metrics handle_system_errors_and_compute_metrics"
    " compute_default_metrics_on_correctness_without_answer_groups",
    "nanoeval.metrics.agents": "get_summary_error_aware",
    "nanoeval.solvers.mcq": "Question Answer MCQTask MCQSolver MockSolver MCQEval",
    "nanoeval.solvers.mcq_api": "OpenAIAPIMCQSolver MCQAPISolver",
    "nanoeval.solvers.short_answer": "Question Answer ShortAnswerTask ShortAnswerSolver MockSolver"
    " ShortAnswerEval",
    "nanoeval.examples._gpqa": "GPQAEval",
    "nanoeval.bin.resume": "resume main",
    "nanoeval.bin.concurrency": "main",
    "nanoeval.bin.mon": "main",
    "nanoeval.bin.sqlite": "main",
    "nanoeval.endpoint": "APIConfig TASKS run_task",
}

# Each as a caller may use it: parameters by position or by name as written, defaults included.
SIGNATURES = {
    "nanoeval.run": "spec",
    "nanoeval.validate": "spec",
    "nanoeval.evaluation.run_eval_in_database": "run_id",
    "nanoeval.bin.resume.resume": "run_set_id, resume_completed_evals=False",
    "nanoeval.eval.assert_no_system_errors": "results",
    "nanoeval.eval.Eval.get_name": "self",
    "nanoeval.eval.Eval.get_tasks": "self",
    "nanoeval.eval.Eval.evaluate": "self, task",
    "nanoeval.eval.Eval.get_summary": "self, results",
    "nanoeval.eval.Eval.get_full_summary": "self, results",
    "nanoeval.eval.Eval.process_invalid": "self, task",
    "nanoeval.eval.Eval.update_progress": "self, partial_results, pbar",
    "nanoeval.eval.Eval.self_test": "self",
    "nanoeval.eval.Eval._context": "self",
    "nanoeval.eval.EvalSpec.model_name": "self",
    "nanoeval.recorder_protocol.uuid": "",
    "nanoeval.recorder_protocol.RecorderConfig.factory": "self, spec, num_tasks",
    "nanoeval.recorder_protocol.RecorderConfig._make_default_run_spec": "self, spec",
    "nanoeval.recorder.get_recorder": "",
    "nanoeval.recorder.set_default_recorder": "rec, sample_id, group_id",
    "nanoeval.recorder.dummy_recorder": "log=True",
    "nanoeval.json_recorder.json_recorder": "",
    "nanoeval.library_config.get_library_config": "",
    "nanoeval.library_config.set_library_config": "hooks",
    "nanoeval.library_config.LibraryConfig.send_user_notification": "self, message, extra=None",
    "nanoeval.library_config.LibraryConfig.setup_logging": "self",
    "nanoeval.library_config.LibraryConfig.set_recorder_context": "self, rec, sample_id, group_id",
    "nanoeval.library_config.LibraryConfig.get_dummy_recorder": "self, log",
    "nanoeval.library_config.LibraryConfig.get_default_recorder": "self",
    "nanoeval.library_config.LibraryConfig.writable_root_dir": "self",
    "nanoeval.library_config.LibraryConfig.get_slack_tqdm": "self, username",
    "nanoeval.library_config.LibraryConfig.compute_default_metrics": (
        "self, samples_df, answer_group_correctness_df"
    ),
    "nanoeval.setup.nanoeval_entrypoint": "coro",
    "nanoeval.setup.nanoeval_logging": "",
    "nanoeval.fs_paths.database_dir": "",
    "nanoeval.fs_paths.stacktrace_root_dir": "",
    "nanoeval.fs_paths.writable_root_dir": "",
    "nanoeval.fs_paths.get_package_root": "",
    "nanoeval.asyncio_utils.generator_with_cleanup": "gen",
    "nanoeval.asyncio_utils.gather_with_concurrency": "coros, concurrency",
    "nanoeval.asyncio_utils.cancel_task": "fut",
    "nanoeval.contrib.utils.run_with_startup_timeout": "runtime, task, timeout",
    "nanoeval.metrics.standard.compute_default_metrics": (
        "samples_df, answer_group_correctness_df"
    ),
    "nanoeval.metrics.standard.handle_system_errors_and_compute_metrics": (
        "metrics_fn, results, process_invalid"
    ),
    "nanoeval.metrics.agents.get_summary_error_aware": "results",
    "nanoeval.solvers.mcq.MCQSolver.solve": "self, task",
    "nanoeval.solvers.mcq.MCQSolver.compute_extra_metrics": "self, results, n_consensus",
    "nanoeval.solvers.mcq.MCQEval._get_tasks": "self",
    "nanoeval.solvers.short_answer.ShortAnswerSolver.solve": "self, task",
}

RECORDER_METHODS = {
    "current_sample_id": "self",
    "current_group_id": "self",
    "as_default_recorder": "self, sample_id, group_id, **extra",
    "record_match": ("self, correct, *, expected=None, picked=None, prob_correct=None, **extra"),
    "record_sampling": "self, prompt, sampled, *, extra_allowed_metadata_fields=None, **extra",
    "record_sample_completed": "self, **extra",
    "record_error": "self, msg, error, **kwargs",
    "record_extra": "self, data",
    "record_final_report": "self, final_report",
    "evalboard_url": "self, view",
}
RECORDERS = {
    "nanoeval.recorder_protocol.RecorderProtocol",
    "nanoeval.json_recorder.JsonRecorder",
    "nanoeval._dummy_recorder.DummyRecorder",
}
SIGNATURES |= {
    f"{recorder}.{method}": parameters
    for recorder in sorted(RECORDERS)
    for method, parameters in RECORDER_METHODS.items()
}

COROUTINES = [
    "nanoeval.run",
    "nanoeval.validate",
    "nanoeval.evaluation.run_eval_in_database",
    "nanoeval.bin.resume.resume",
    *(
        f"nanoeval.eval.Eval.{name}"
        for name in [
            "get_tasks",
            "evaluate",
            "get_summary",
            "get_full_summary",
            "update_progress",
            "self_test",
        ]
    ),
    "nanoeval.eval.EvalSpec.model_name",
    "nanoeval.recorder_protocol.RecorderConfig.factory",
    "nanoeval.library_config.LibraryConfig.send_user_notification",
    "nanoeval.asyncio_utils.cancel_task",
    "nanoeval.metrics.standard.handle_system_errors_and_compute_metrics",
    "nanoeval.solvers.mcq.MCQSolver.solve",
    "nanoeval.solvers.mcq.MCQEval._get_tasks",
    "nanoeval.solvers.short_answer.ShortAnswerSolver.solve",
]


def find(dotted: str) -> Any:
    """The object of that name: the longest module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module: str) -> None:
    """An eval's import lines would fail."""
    for name in NAMES[module].split():
        assert hasattr(importlib.import_module(module), name), name


def test_the_package_lists_its_names() -> None:
    """`from nanoeval import *` would miss one."""
    assert set(NAMES["nanoeval"].split()) <= set(nanoeval.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_take_the_calls_of_existing_evals(name: str) -> None:
    """A call, or an override, by the documented parameters would raise TypeError."""
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None")).parameters
    actual = dict(inspect.signature(find(name)).parameters)
    for parameter in expected.values():
        assert parameter.name in actual
        ours = actual.pop(parameter.name)
        assert (ours.kind, ours.default) == (parameter.kind, parameter.default), parameter.name
    shared = [parameter for parameter in inspect.signature(find(name)).parameters]
    assert [p for p in shared if p in expected] == list(expected)
    for extra in actual.values():
        assert extra.default is not extra.empty, f"{extra.name} is a new required parameter"


@pytest.mark.parametrize("name", COROUTINES)
def test_what_is_awaited_can_be_awaited(name: str) -> None:
    """`await` on it would raise TypeError, or without it nothing would happen."""
    assert inspect.iscoroutinefunction(find(name))


RUNNER_DEFAULTS = {
    "concurrency": 4096,
    "experimental_use_multiprocessing": False,
    "num_processes": None,
    "shuffle": False,
    "n_tasks": None,
    "run_set_id": None,
    "recorder": None,
    "enable_slackbot": True,
    "slack_name": None,
    "model_name": None,
    "eval_set_name": None,
    "summary_interval": None,
    "use_monitor": False,
    "max_retries": 16,
    "should_backup": True,
    "rollout_timeout": None,
    "fail_on_error": True,
    "retry_backoff": 1.0,
}


def test_runner_args_defaults() -> None:
    """An existing eval would run with other limits than its authors meant."""
    args = RunnerArgs()
    assert {name: getattr(args, name) for name in RUNNER_DEFAULTS} == RUNNER_DEFAULTS


def test_a_plain_annotation_overrides_a_default() -> None:
    """Users' own RunnerArgs would be ignored, or refused by chz."""

    @chz.chz
    class Gentle(RunnerArgs):
        concurrency: int = 5
        model_name: str = "mine"

    assert (Gentle().concurrency, Gentle().model_name, Gentle().max_retries) == (5, "mine", 16)
    assert Gentle(concurrency=7).concurrency == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"concurrency": 0}, "concurrency=0 .*NANOEVAL_ALLOW_ZERO_CONCURRENCY"),
        ({"concurrency": -1}, "concurrency=-1"),
        ({"num_processes": 2}, "num_processes=2 needs experimental_use_multiprocessing=True"),
        (
            {"num_processes": 0, "experimental_use_multiprocessing": True},
            "num_processes=0 must be at least 1",
        ),
        ({"n_tasks": 0}, "n_tasks=0 must be at least 1"),
        ({"slack_name": "x", "enable_slackbot": False}, "slack_name='x' needs enable_slackbot"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"retry_backoff": -1.0}, "retry_backoff=-1.0"),
        ({"rollout_timeout": 0.0}, "rollout_timeout=0.0"),
        ({"summary_interval": -5.0}, "summary_interval=-5.0"),
        ({"fail_on_error": 1.5}, "fail_on_error=1.5"),
        ({"run_set_id": "a/b"}, "run_set_id='a/b'"),
        ({"run_set_id": ""}, "run_set_id=''"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_runner_args_name_field_and_value(values: dict[str, Any], message: str) -> None:
    """A typo on the command line would be found hours later, or never."""
    with pytest.raises(ValueError, match=message):
        RunnerArgs(**values)


def test_zero_concurrency_is_allowed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run could not be queued now and let go later."""
    monkeypatch.setenv("NANOEVAL_ALLOW_ZERO_CONCURRENCY", "1")
    assert RunnerArgs(concurrency=0).concurrency == 0
    assert RunnerArgs(concurrency=None).concurrency is None


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Each field's default, `...` where it is required."""
    return {
        name: ... if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
    }


TASK = {"question_id": ..., "attempt_id": 1, "retry_idx": 0}
TASK |= {"unsafe_skip_serialization_validation": False}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Task, TASK),
        (nanoeval.recorder_protocol.BasicRunSpec, {"run_id": ..., "run_set_id": ...}),
        (
            mcq.Question,
            {
                "question": ...,
                "answers": ...,
                "correct_indices": ...,
                "image": None,
                "seed": 42,
                "metadata": {},
                "allow_multiple_choices": False,
            },
        ),
        (mcq.Answer, {"correct": ..., "picked": ..., "metadata": {}}),
        (mcq.MCQTask, TASK | {"question": ...}),
        (short_answer.Question, {"question": ..., "metadata": {}}),
        (short_answer.Answer, {"answer": ..., "is_correct": None, "metadata": {}}),
        (short_answer.ShortAnswerTask, TASK | {"question": ...}),
    ],
)
def test_data_classes_have_their_fields(model: type[BaseModel], expected: dict[str, Any]) -> None:
    """A field under another name, or a new required one, would break every construction."""
    actual = fields_of(model)
    assert {name: actual.get(name, "missing") for name in expected} == expected
    assert not [n for n, value in actual.items() if value is ... and n not in expected]


def test_tasks_take_fields_and_private_attributes() -> None:
    """Existing tasks carry both."""

    class MyTask(Task):
        prompt: str
        _seen: int = PrivateAttr(default=3)

    task = MyTask(question_id="q", attempt_id=2, prompt="hi")
    assert (task.name, task._seen, task.prompt) == ("q.2", 3, "hi")
    with pytest.raises(ValidationError, match="contains a"):
        MyTask(question_id="a/b", prompt="hi")


def test_error_classes_relate_as_documented() -> None:
    """`except` clauses of existing solvers would catch other errors than before."""
    assert RetryableSystemError is RolloutSystemError
    assert issubclass(SystemErrorsNotSupported, ValueError)
    assert RolloutSystemError("slow down", retry_after=3.5).retry_after == 3.5
    assert RolloutSystemError("slow down").retry_after is None


def test_assert_no_system_errors_names_the_failed() -> None:
    """A summary without a rule for errors would count them as answers."""
    good = [(Task(question_id="a"), True)]
    assert assert_no_system_errors(good) == good
    bad = [*good, (Task(question_id="b"), RolloutSystemError("cut"))]
    with pytest.raises(SystemErrorsNotSupported, match=r"1 of 2 .*b\.1: RolloutSystemError: cut"):
        assert_no_system_errors(bad)


@chz.chz
class Yes(Eval[Task, bool]):
    def get_name(self) -> str:
        return "yes"


async def test_eval_spec_and_its_model_name() -> None:
    """Reports would name no model."""
    assert await EvalSpec(eval=Yes(), runner=RunnerArgs(model_name="m")).model_name() == "m"
    assert isinstance(Yes(), HasAsyncContextManager)


def test_a_users_recorder_fits_without_inheriting() -> None:
    """A recorder that only has the documented methods would be refused."""

    class Mine:
        run_spec = nanoeval.recorder_protocol.BasicRunSpec(run_id="r", run_set_id="s")

        def __enter__(self) -> Mine:
            return self

        def __exit__(self, *exc_info: Any) -> None: ...

    for method in RECORDER_METHODS:
        setattr(Mine, method, lambda self, *args, **kwargs: None)
    assert isinstance(Mine(), RecorderProtocol)
    assert isinstance(Mine.run_spec, RunSpec)
    assert issubclass(nanoeval.json_recorder.JsonRecorderConfig, RecorderConfig)
    config = nanoeval.json_recorder.JsonRecorderConfig(filename=Path("x.jsonl"))
    assert config.filename == Path("x.jsonl")


def parse_runner(*arguments: str) -> RunnerArgs:
    return chz.entrypoint(RunnerArgs, argv=list(arguments), allow_hyphens=True)


@pytest.mark.parametrize("factory", ["dummy_recorder", "json_recorder"])
def test_a_recorder_is_chosen_by_its_factorys_name(factory: str) -> None:
    """`runner.recorder=nanoeval.recorders:json_recorder` on a command line would fail."""
    runner = parse_runner(f"recorder=nanoeval.recorders:{factory}", "concurrency=None")
    assert isinstance(runner.recorder, RecorderConfig)
    assert runner.concurrency is None


def test_a_recorders_options_are_set_beside_it() -> None:
    """The file could be chosen in Python only."""
    runner = parse_runner(
        "recorder=nanoeval.recorders:json_recorder", "recorder.filename=/tmp/x.jsonl"
    )
    assert runner.recorder.filename == Path("/tmp/x.jsonl")  # type: ignore[union-attr]
    runner = parse_runner("recorder=nanoeval.recorders:dummy_recorder", "recorder.log=False")
    assert runner.recorder.log is False  # type: ignore[union-attr]


def test_solvers_and_evals_have_their_options() -> None:
    """Command lines and subclasses that set them would fail."""
    solver = mcq.MockSolver()
    assert mcq.MCQEval(solver=solver).n_consensus == 1
    assert mcq.MCQEval(solver=solver, n_consensus=3).solver is solver
    eval = short_answer.ShortAnswerEval(solver=short_answer.MockSolver())
    assert eval.samples_per_question == 1
    assert mcq_api.MCQAPISolver is mcq_api.OpenAIAPIMCQSolver
    assert "model" in chz.chz_fields(mcq_api.OpenAIAPIMCQSolver)


async def test_a_context_override_is_an_async_context_manager() -> None:
    """Evals that open a client in `_context` would never have it opened."""
    steps: list[str] = []

    @chz.chz
    class Opening(Yes):
        @asynccontextmanager
        async def _context(self) -> AsyncIterator[None]:
            steps.append("open")
            yield
            steps.append("close")

    async with Opening():
        assert steps == ["open"]
    assert steps == ["open", "close"]

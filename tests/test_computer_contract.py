"""The types that evals in the field are written against: tasks, steps, limits, timers, the eval."""

from __future__ import annotations

import asyncio
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import chz
import pytest
from pydantic import BaseModel, PrivateAttr, ValidationError

import nanoeval
from nanoeval.asyncio_utils import generator_with_cleanup
from nanoeval.contrib.utils import run_with_startup_timeout
from nanoeval.eval import EvalSpec, RetryableSystemError, RolloutSystemError, RunnerArgs
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    CommandFailedError,
    ComputerConfiguration,
    ComputerInterface,
    ComputerRuntime,
    ComputerSetupError,
    ExecutionResult,
    JupyterComputerInterface,
    JupyterExecutionResult,
    NetworkMode,
    RuntimeConfig,
    VolumeMount,
    valid_ipython_code,
)
from nanoeval.solvers.computer_tasks.limits import ActionLimitExceededError, LimitsHelper
from nanoeval.solvers.computer_tasks.pausable_timer import (
    NamedTimeoutError,
    PausableTimer,
    pause_all_pausable_timers,
)
from nanoeval.solvers.computer_tasks.simple_solver import DummySolver, SimpleSolver
from nanoeval.solvers.computer_tasks.solver import (
    DummyPythonCodingSolver,
    PythonCodingEval,
    PythonCodingSolver,
    strip_all_metadata,
)
from nanoeval.solvers.computer_tasks.steps import (
    Conversation,
    FinalResult,
    FinalResultSuccessful,
    FinalResultWithException,
    Step,
)
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade, SimpleJupyterTask
from tests.computer.fakes import PROMPT, AnswerTask, ScriptedComputer, ScriptedRuntime, recording

# ---- results of commands and cells


def test_non_utf8_output_stays_whole_and_is_shown_as_well_as_can_be() -> None:
    """Graders compare bytes; people read text."""
    result = ExecutionResult(output=b"\xff\x00ok", exit_code=0)
    assert result.output == b"\xff\x00ok"
    assert result.unicode_output_best_effort == "\ufffd\x00ok"


async def test_a_failed_check_tells_command_code_and_output() -> None:
    """Without all three, nobody can tell why a set-up failed."""
    computer = ScriptedComputer({"make": (b"no rule to make target", 2)})
    with pytest.raises(CommandFailedError, match=r"(?s)exited with 2.*make all.*no rule"):
        await computer.check_shell_command("make all")
    with pytest.raises(AssertionError):
        await computer.check_shell_command("make all")


def test_a_cells_value_is_parsed_where_it_is_a_literal() -> None:
    """Graders read scores out of it."""

    def parsed(text: str | None) -> Any:
        result = JupyterExecutionResult(status="success", output="", final_expression_output=text)
        return result.parsed_final_expression_output

    assert parsed("{'score': 0.5}") == {"score": 0.5}
    assert parsed(None) is None
    with pytest.raises(ValueError, match="not a Python literal"):
        parsed("<object object at 0x7f>")


def test_notebook_cells_with_magics_are_valid_code() -> None:
    """A SimpleJupyterTask may install packages in its set-up cell."""
    assert valid_ipython_code("%cd /tmp\n!ls -l\nif True:\n    !ls\nx = 1")
    assert not valid_ipython_code("if True print(1)")


# ---- what a task asks of its computer


def test_configuration_defaults_and_bad_values() -> None:
    """Evals lean on each default; a relative cwd would mean something else on each computer."""
    configuration = ComputerConfiguration(unknown_field=1)  # type: ignore[call-arg]
    assert configuration.cwd == "/root"
    assert configuration.network_mode is NetworkMode.NONE
    assert not configuration.allow_internet
    assert (configuration.resources.cpu, configuration.limits.memory) == (0.2, 1024)
    with pytest.deprecated_call():
        assert configuration.volumes_config == {}
    configuration.volumes_config = {"0": {"bind_source": "/a", "bind_dest": "/b"}}
    with pytest.raises(ValidationError, match="must be an absolute path"):
        ComputerConfiguration(cwd="work")


async def test_setup_names_the_gpus_directory_or_mount_that_is_missing() -> None:
    """Each missing thing has its own sentence, before the task's own set-up trips over it."""
    here = {"pwd -P": (b"/root\n", 0)}
    config = RuntimeConfig()
    await ComputerConfiguration().setup(ScriptedComputer(here), config)
    two_gpus = {"nvidia-smi": (b"GPU 0: H200\n", 0), **here}
    with pytest.raises(ComputerSetupError, match="num_gpus=2, but the computer shows 1"):
        await ComputerConfiguration(num_gpus=2).setup(ScriptedComputer(two_gpus), config)
    no_directory = {"cd /nowhere": (b"No such file", 1)}
    with pytest.raises(ComputerSetupError, match="cwd='/nowhere' is not a directory"):
        await ComputerConfiguration(cwd="/nowhere").setup(ScriptedComputer(no_directory), config)
    mounts = [VolumeMount(host_path="/data", container_path="/mnt/data")]
    no_mount = {"test -e": (b"", 1), **here}
    with pytest.raises(ComputerSetupError, match="/mnt/data' is not there"):
        await ComputerConfiguration(volume_mounts=mounts).setup(ScriptedComputer(no_mount), config)


async def test_a_runtime_config_of_its_own_needs_a_task_that_knows_it() -> None:
    """Otherwise settings would be dropped in silence."""

    @chz.chz
    class Special(RuntimeConfig):
        pass

    with pytest.raises(TypeError, match="knows no Special"):
        async with ScriptedRuntime(runtime_config=Special()).run(ComputerConfiguration()):
            pass


# ---- tasks


def test_a_prompt_is_checked() -> None:
    """An empty prompt, or a system message that fights the agent's own, is a mistake."""
    with pytest.raises(ValidationError, match="at least one message"):
        AnswerTask(prompt=[])
    with pytest.raises(ValidationError, match="system message"):
        AnswerTask(prompt=[{"role": "system", "content": "You are"}])
    with pytest.raises(ValidationError, match="Extra inputs"):
        AnswerTask(extra=1)  # type: ignore[call-arg]


@dataclass
class Detail:
    """Not a pydantic model, as in the field."""

    paper: str


class DetailedGrade(Grade):
    detail: Detail
    is_continuous: bool = True


class OldTask(ComputerTask):
    """Both methods in the older form."""

    _log: list[str] = PrivateAttr(default_factory=list)

    async def _setup(self, computer: ComputerInterface) -> None:  # type: ignore[override]
        self._log.append("setup")

    async def grade(self, computer: ComputerInterface) -> Grade:  # type: ignore[override]
        return DetailedGrade(score=0.5, grader_log="old", detail=Detail("a"))


class BadGraderTask(OldTask):
    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        return 0.7  # type: ignore[return-value]


async def test_methods_with_and_without_runtime_config_take_both_kinds_of_call() -> None:
    """Evals of different ages define and call them differently."""
    computer = ScriptedComputer({"pwd -P": (b"/root\n", 0)})
    old, new = OldTask(question_id="q", prompt=PROMPT), AnswerTask()
    await old.setup(computer, RuntimeConfig())
    await new.setup(computer)
    assert old._log == ["setup"]
    for call in (
        old.grade(computer, RuntimeConfig()),
        old.grade(computer),  # type: ignore[call-arg]
        new.grade(computer),  # type: ignore[call-arg]
        new.grade(computer, runtime_config=RuntimeConfig()),
    ):
        assert isinstance(await call, Grade)


class Mixin:
    """The older form, in a class that knows nothing of tasks."""

    async def _setup(self, computer: ComputerInterface) -> None:
        pass

    async def grade(self, computer: ComputerInterface, verbose: bool = False) -> Grade:
        return Grade(score=float(verbose), grader_log="")


class MixedTask(Mixin, ComputerTask):  # type: ignore[misc]
    pass


class ByKeywordTask(MixedTask):
    async def grade(self, computer: ComputerInterface, *, runtime_config: RuntimeConfig) -> Grade:
        return Grade(score=float(isinstance(runtime_config, RuntimeConfig)), grader_log="")


class AnyKeywordTask(MixedTask):
    async def grade(self, computer: ComputerInterface, **options: Any) -> Grade:
        return Grade(score=float(list(options) == ["runtime_config"]), grader_log="")


class ThirdTask(MixedTask):
    async def grade(self, computer: ComputerInterface, config: RuntimeConfig, **_: Any) -> Grade:
        return Grade(score=float(isinstance(config, RuntimeConfig)), grader_log="")


@pytest.mark.parametrize(
    ("cls", "score"), [(MixedTask, 0), (ByKeywordTask, 1), (AnyKeywordTask, 1), (ThirdTask, 1)]
)
async def test_runtime_config_goes_only_where_it_is_wanted(
    cls: type[ComputerTask], score: float
) -> None:
    """An option of the method's own would get the config, or the call would be refused."""
    computer = ScriptedComputer({"pwd -P": (b"/root\n", 0)})
    task = cls(question_id="q", prompt=PROMPT)
    await task.setup(computer, RuntimeConfig())
    assert (await task.grade(computer, RuntimeConfig())).score == score
    assert (await task.grade(computer)).score == score  # type: ignore[call-arg]


async def test_a_grader_that_returns_no_grade_is_named() -> None:
    """A bare number would fail far from its cause."""
    task = BadGraderTask(question_id="q", prompt=PROMPT)
    with pytest.raises(TypeError, match=r"BadGraderTask.grade returned float \('0.7'\)"):
        await task.grade(ScriptedComputer(), RuntimeConfig())


def test_a_task_survives_json_pickle_and_copy_as_its_own_class() -> None:
    """Tasks travel between processes, and through files of other tools."""
    task = AnswerTask(cwd="/work", environment={"A": "b"}, hints=["think"])
    data = task.model_dump()
    assert (data["__class_name__"], data["__module_name__"]) == (
        "AnswerTask",
        AnswerTask.__module__,
    )
    for restored in (
        ComputerTask.deserialize(json.loads(json.dumps(data))),
        AnswerTask.model_validate(data),
        pickle.loads(pickle.dumps(task)),
        task.model_copy(update={"attempt_id": 1}),
    ):
        assert type(restored) is AnswerTask
        assert (restored.cwd, restored.hints) == ("/work", ["think"])
    with pytest.raises(ValueError, match="__module_name__"):
        ComputerTask.deserialize({"prompt": PROMPT})
    with pytest.raises(ValueError, match="no class 'Gone'"):
        ComputerTask.deserialize({**data, "__class_name__": "Gone"})


async def test_pokes_need_a_task_that_can_tell_a_submission() -> None:
    """`supports_pokes` is what agents ask before they poke."""

    class Pokable(AnswerTask):
        async def check_for_valid_submission(
            self, computer: ComputerInterface, runtime_config: RuntimeConfig
        ) -> bool:
            return False

    assert not AnswerTask().supports_pokes
    assert Pokable().supports_pokes
    with pytest.raises(NotImplementedError, match="check_for_valid_submission"):
        await AnswerTask().check_for_valid_submission(ScriptedComputer(), RuntimeConfig())


def test_a_notebook_task_checks_its_cells_when_made() -> None:
    """A syntax error in a grader is found before an agent has worked for an hour."""
    with pytest.raises(ValidationError, match="not valid Python"):
        SimpleJupyterTask(question_id="q", prompt=PROMPT, setup_cell="x = 1", grader_cell="x ==")


# ---- steps and results


def test_older_steps_and_results_load() -> None:
    """Stored rollouts outlive the version that stored them."""
    old = {"schema_version": 0, "convo": {}, "elapsed": "PT1S"}
    ungraded = Step.model_validate({**old, "correct": False, "autograder_result": None})
    assert ungraded.grade is None
    assert ungraded.schema_version == 1
    assert ungraded.elapsed == timedelta(seconds=1)
    text = json.dumps({**old, "correct": True, "autograder_result": "fine"})
    graded = Step.model_validate_json(text)
    assert graded.correct
    assert graded.grade == Grade(score=1, grader_log="fine")
    result = FinalResult.model_validate({"correct": False, "grader_log": "", "schema_version": 0})
    assert result.grade == Grade(score=0, grader_log="")
    with pytest.raises(ValidationError, match="knows 0 to 1"):
        Step.model_validate({**old, "schema_version": 2, "grade": None})


def test_a_subclass_of_grade_keeps_its_fields_in_a_result() -> None:
    """Evals read their own fields back out of stored results."""
    grade = DetailedGrade(score=1, grader_log="", detail=Detail("x"))
    result = pickle.loads(pickle.dumps(FinalResult(grade=grade)))
    assert result.correct
    assert isinstance(result.grade, DetailedGrade)
    assert result.model_dump(mode="json")["grade"]["detail"] == {"paper": "x"}
    assert grade.dict()["score"] == 1
    assert FinalResultSuccessful is FinalResult
    assert not FinalResult(grade=Grade(score=0.5, grader_log="")).correct


# ---- limits and timers


async def test_exactly_max_actions_actions_pass() -> None:
    """One fewer was the older behaviour, and agents lost their last action to it."""
    async with LimitsHelper(max_actions=2).enforce_rollout_limits() as count_action:
        count_action()
        count_action()
        with pytest.raises(ActionLimitExceededError, match="Exceeded max actions = 2"):
            count_action()


def test_limits_that_cannot_hold_together_are_refused() -> None:
    """The message names field and value."""
    with pytest.raises(ValueError, match="total_sample_timeout=100"):
        LimitsHelper(total_sample_timeout=100)
    with pytest.raises(ValueError, match="grading_timeout=0"):
        LimitsHelper(grading_timeout=0)


async def test_a_named_timeout_is_told_from_any_other() -> None:
    """Agents end well at their own limit, and must not mistake another time-out for it."""
    limits = LimitsHelper()
    with pytest.raises(TimeoutError) as caught:
        async with limits.enforce_timeout("outer", 5), asyncio.timeout(0.01):
            await asyncio.sleep(5)
    assert type(caught.value) is TimeoutError
    with pytest.raises(NamedTimeoutError, match=r"Timeout inner of 0\.01 seconds") as named:
        async with limits.enforce_timeout("outer", 5), limits.enforce_timeout("inner", 0.01):
            await asyncio.sleep(5)
    assert named.value.timeout_type == "inner"
    assert str(pickle.loads(pickle.dumps(named.value))) == str(named.value)


async def test_paused_time_does_not_count() -> None:
    """A rollout does not lose its time to a rate limit, even where a task of its own waits."""
    async with PausableTimer("work", 0.2) as timer:

        async def wait_for_server() -> None:
            with pause_all_pausable_timers():
                await asyncio.sleep(0.3)

        await asyncio.create_task(wait_for_server())
        async with timer.pause():
            with timer.pause():
                await asyncio.sleep(0.1)
        assert timer.elapsed < 0.1
        assert 0.1 < timer.remaining <= 0.2


async def test_a_pause_does_not_stop_a_timer_for_good() -> None:
    """What follows the pause counts again."""

    async def pause_and_work() -> None:
        async with PausableTimer("work", 0.05) as timer:
            with timer.pause():
                await asyncio.sleep(0.1)
            await asyncio.sleep(5)

    with pytest.raises(NamedTimeoutError):
        await pause_and_work()


async def test_a_pause_holds_only_the_timers_around_it() -> None:
    """Rollouts in one process never disturb each other."""

    async def pausing() -> None:
        async with PausableTimer("a", 5):
            with pause_all_pausable_timers():
                await asyncio.sleep(0.2)

    async def other() -> None:
        async with PausableTimer("b", 0.05):
            await asyncio.sleep(5)

    results = await asyncio.gather(pausing(), other(), return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], NamedTimeoutError)


# ---- starting computers


async def test_startup_timeout_covers_the_start_alone() -> None:
    """A long rollout on a computer that started quickly is not cut short."""
    runtime = ScriptedRuntime()
    async with run_with_startup_timeout(runtime, AnswerTask(), 0.05) as computer:
        await asyncio.sleep(0.1)
        assert isinstance(computer, ComputerInterface)
    assert runtime.log == ["start", "runtime set-up", "stop"]
    slow = ScriptedRuntime(start_seconds=5)
    with pytest.raises(TimeoutError, match=r"not ready within 0.05 seconds"):
        async with run_with_startup_timeout(slow, AnswerTask(), 0.05):
            pass
    assert slow.log == ["start", "stop"]


async def test_an_error_in_the_block_stops_the_computer_and_passes_on() -> None:
    """The runtime sees how the block ended, and the caller the error itself."""
    runtime = ScriptedRuntime()
    with pytest.raises(KeyError):
        async with run_with_startup_timeout(runtime, AnswerTask(), 1):
            raise KeyError("mine")
    assert runtime.log[-1] == "stop"


# ---- the eval


def _conversation(n: int) -> Conversation:
    return Conversation(messages=[{"role": "user", "content": f"m{i}"} for i in range(n)])


@chz.chz
class ScriptedSolver(PythonCodingSolver):
    """Yields the items that it was given; raises those that are exceptions."""

    items: list[Any]

    def shortname(self) -> str:
        return "scripted"

    def get_additional_metrics(self) -> dict[str, Any]:
        return {"n_calls": 3}

    async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            yield item


@chz.chz
class ScriptedEval(PythonCodingEval):
    async def get_instances(self) -> list[ComputerTask]:
        return [AnswerTask(question_id="a"), AnswerTask(question_id="b")]


def _step(n: int) -> Step:
    return Step(convo=_conversation(n), grade=None, elapsed=timedelta(seconds=1))


def _final(n: int, score: float = 1, **flags: Any) -> FinalResult:
    grade = Grade(score=score, grader_log="log")
    return FinalResult(grade=grade, convo=_conversation(n), **flags)


def _contents(event: dict[str, Any]) -> list[str]:
    return [message["content"] for message in event["convo"]["messages"]]


async def test_attempts_count_from_0() -> None:
    """Stored results of older runs have these ids."""
    tasks = await ScriptedEval(n_tries=2).get_tasks()
    assert [task.name for task in tasks] == ["a.0", "b.0", "a.1", "b.1"]
    with pytest.raises(ValueError, match="n_tries=0"):
        ScriptedEval(n_tries=0)


async def test_steps_record_the_last_five_messages_and_the_result_all() -> None:
    """Records stay small, complete at the end, and show no message twice among the steps."""
    solver = ScriptedSolver(items=[_step(7), _step(8), _step(8), _final(9)])
    with recording() as recorder:
        result = await ScriptedEval(solver=solver).evaluate(AnswerTask())
    first, second, third, last = recorder.of_kind("extra")
    assert _contents(first) == ["m2", "m3", "m4", "m5", "m6"]
    assert _contents(second) == ["m7"]
    assert _contents(third) == []
    assert _contents(last) == [f"m{i}" for i in range(9)]
    assert recorder.of_kind("match") == [{"correct": True}]
    assert len(result.convo.messages) == 9, "recording must not change the result"


async def test_pretty_records_hold_each_message_once() -> None:
    """Even equal messages: the second is another message; and another rollout starts afresh."""
    again = {"role": "user", "content": "go on"}
    messages = [again, {"role": "assistant", "content": "x"}, again]
    step = Step(convo=Conversation(messages=messages), grade=None, elapsed=timedelta())
    items = [step, FinalResult(grade=Grade(score=0, grader_log="log"), convo=step.convo)]
    pretty = ScriptedEval(solver=ScriptedSolver(items=items), record_pretty=True, log_at_end=True)
    for _ in range(2):
        with recording() as recorder:
            await pretty.evaluate(AnswerTask())
        sampled = [event["sampled"] for event in recorder.of_kind("sampling")]
        assert sampled == ["go on", "x", "go on", "log"]
        assert recorder.of_kind("match") == [{"correct": False}]


async def test_a_solver_without_a_final_result_is_named() -> None:
    """The eval's author has to know which solver, on which task."""
    with recording(), pytest.raises(ValueError, match="scripted ended without a FinalResult"):
        await ScriptedEval(solver=ScriptedSolver(items=[_step(1)])).evaluate(AnswerTask())
    outdated = FinalResultWithException.from_exception(KeyError("x"), None)
    with recording(), pytest.raises(TypeError, match="RolloutSystemError instead"):
        await ScriptedEval(solver=ScriptedSolver(items=[outdated])).evaluate(AnswerTask())


async def test_a_cancellation_from_inside_is_retried_and_one_from_outside_is_not() -> None:
    """Ctrl-C must end the run; a solver's own cancelled task must not."""
    inside = ScriptedEval(solver=ScriptedSolver(items=[asyncio.CancelledError()]))
    with recording():
        with pytest.raises(RetryableSystemError, match="cancelled from within"):
            await inside.evaluate(AnswerTask())

        @chz.chz
        class Sleeping(DummyPythonCodingSolver):
            async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
                await asyncio.sleep(5)
                yield _final(1)

        rollout = asyncio.create_task(ScriptedEval(solver=Sleeping()).evaluate(AnswerTask()))
        await asyncio.sleep(0.01)
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout


async def test_summary_separates_right_wrong_and_broken() -> None:
    """Errors are no wrong answers: they count as such only in metrics_including_errors."""
    a, b, c, d = (AnswerTask(question_id=name) for name in "abcd")
    results: list[Any] = [
        (a, _final(2)),
        (b, _final(4, score=0, max_steps_reached=True)),
        (c, _final(6, score=0.5)),
        (d, RolloutSystemError("engine gone")),
    ]
    eval = ScriptedEval(solver=ScriptedSolver(items=[]))
    summary = await eval.get_full_summary(results)
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["metrics_including_errors"]["accuracy"] == pytest.approx(1 / 4)
    stats = summary["length_stats"]
    assert stats["convo_len_percentiles"] == [3.0, 4.0, 5.0]
    assert stats["frac_correct"] == stats["frac_max_steps"] == pytest.approx(1 / 3)
    assert stats["frac_model_ended"] == pytest.approx(1 / 3)
    assert stats["frac_max_time"] == stats["frac_max_tokens"] == 0
    assert summary["solver"] == {"n_calls": 3}
    assert not eval.process_invalid(a).correct
    assert (await eval.get_full_summary([]))["length_stats"] == {}


async def test_progress_shows_right_broken_and_wrong() -> None:
    """What a person looks at while a run goes on."""

    class Bar:
        shown: dict[str, int]

        def set_postfix(self, **shown: int) -> None:
            self.shown = shown

    bar = Bar()
    results: list[Any] = [
        (AnswerTask(), _final(1)),
        (AnswerTask(), _final(1, score=0)),
        (AnswerTask(), RolloutSystemError("x")),
    ]
    await ScriptedEval().update_progress(results, bar)
    assert bar.shown == {"corr": 1, "errs": 1, "fail": 1}


async def test_an_eval_tests_itself() -> None:
    """`self_test` is what evals in the field call in their own tests."""
    await ScriptedEval().self_test()


class Message(BaseModel):
    metadata: dict[str, Any]


class Chat(BaseModel):
    metadata: dict[str, Any]
    messages: list[Message]


def test_stripping_metadata_leaves_the_argument_alone() -> None:
    """Rollouts go on with the conversation that was recorded."""
    metadata = {"keep": 1, "drop": 2}
    chat = Chat(metadata=metadata, messages=[Message(metadata=metadata)])
    stripped = strip_all_metadata(chat, ["keep"])
    assert stripped.metadata == stripped.messages[0].metadata == {"keep": 1}
    assert chat.metadata == chat.messages[0].metadata == {"keep": 1, "drop": 2}
    assert strip_all_metadata(chat).metadata == {}


async def test_a_simple_solver_turns_every_failure_into_a_retry() -> None:
    """A failed start says nothing about the model."""

    @chz.chz
    class Failing(SimpleSolver):
        def shortname(self) -> str:
            return "failing"

        async def solve(self, task: ComputerTask, computer: ComputerInterface) -> None:
            raise KeyError("lost")

    async def results(solver: SimpleSolver) -> list[Any]:
        return [item async for item in solver.run(AnswerTask())]

    with pytest.raises(RolloutSystemError, match=r"failing failed on answer\.1: KeyError: 'lost'"):
        await results(Failing(runtime=ScriptedRuntime()))
    with pytest.raises(RolloutSystemError, match=r"timeout=0\.05"):
        await results(DummySolver(runtime=ScriptedRuntime(start_seconds=5), timeout=0.05))
    (result,) = await results(DummySolver(runtime=ScriptedRuntime()))
    assert result.grade.score == 0


# ---- the shapes that evals in the field have


class FieldComputerBase(ScriptedComputer, ABC):
    """As the field has it: an abstract class between the interface and a chz class."""

    @property
    @abstractmethod
    def _machine(self) -> str: ...


@chz.chz
class FieldComputer(FieldComputerBase, JupyterComputerInterface):
    machine: str

    @property
    def _machine(self) -> str:
        return self.machine

    async def execute(self, code: str, timeout: int = 120) -> JupyterExecutionResult:
        return JupyterExecutionResult(
            status="success",
            output=code,
            final_expression_output=None,
            in_kernel_exception=None,
            system_exception=None,
        )


@chz.chz
class FieldSolver(PythonCodingSolver):
    computer_runtime: ComputerRuntime = chz.field(default_factory=ScriptedRuntime)
    runtime_config: RuntimeConfig = chz.field(default_factory=RuntimeConfig)

    def shortname(self) -> str:
        return "field"

    async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        async with run_with_startup_timeout(self.computer_runtime, task, 5) as computer:
            grade = await task.grade(computer, self.runtime_config)
        yield FinalResult(grade=grade)


@chz.chz
class FieldEval(PythonCodingEval):
    split: str = chz.field(default="all", doc="Which tasks.")

    @chz.init_property
    def run_group_id(self) -> str:
        return f"group_{self.solver.shortname()}"

    def get_name(self) -> str:
        return f"field-{self.split}"

    async def get_instances(self) -> list[ComputerTask]:
        return [AnswerTask(question_id=f"q{i}", attempt_id=i) for i in range(2)]

    async def get_tasks(self) -> list[ComputerTask]:
        return await self.get_instances()

    async def evaluate(self, task: ComputerTask) -> FinalResult:
        async with generator_with_cleanup(self.solver.run(task)) as steps:
            async for step in steps:
                if isinstance(step, FinalResult):
                    return step
        raise ValueError("no result")

    async def get_full_summary(self, results: list[Any]) -> dict[str, Any]:
        summary = await super().get_full_summary(results)
        return {**summary, "group": self.run_group_id, "n_tries": self.n_tries}


async def test_evals_of_the_fields_shape_run_unchanged() -> None:
    """Own computers, runtimes in solvers, evals that override nearly everything."""
    summary = await nanoeval.run(
        EvalSpec(
            eval=FieldEval(solver=FieldSolver()),
            runner=RunnerArgs(concurrency=2, enable_slackbot=False),
        )
    )
    assert (summary["group"], summary["n_tries"]) == ("group_field", 1)
    assert summary["aggregations"]["num_incorrect"] == 2
    cell = await FieldComputer(machine="m").check_execute("1")
    assert cell.output == "1"

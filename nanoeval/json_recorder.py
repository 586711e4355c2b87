"""The default recorder: one JSON line per event, in one file per run. Knows no engine.

Each line holds `timestamp` (UTC, ISO 8601), `record_type` (run_started, sampling, match, extra,
error, sample_completed or final_report), `sample_id` (the question id) and `group_id`
(`"{attempt_id}.{retry_idx}"`), both null outside a rollout, then the event's own fields.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import chz

from nanoeval._jsonl import encode_line, utc_timestamp
from nanoeval._line_writer import LineWriter
from nanoeval._outcomes import message_of
from nanoeval._recorder_base import RecorderBase, event_time
from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol, RunSpec

if TYPE_CHECKING:
    from nanoeval.eval import EvalSpec

ENV_LOG_DIR = "NANOEVAL_LOG_DIR"


class JsonRecorder(RecorderBase):
    """Appends the events of a run to `filename`.

    Calls come from any thread and never wait for the disk. A value is encoded within the call:
    changing it later does not change the record. Pickling keeps the run's ids and the file's name;
    the copies of all processes append whole lines to the one file, and so does a resumed run.
    Every kind of message metadata is kept, so `extra_allowed_metadata_fields` adds nothing.
    """

    def __init__(self, run_spec: RunSpec, filename: Path | str) -> None:
        self.run_spec = run_spec
        # Other processes may have other working directories.
        self.filename = Path(filename).absolute()
        self._writer = LineWriter(self.filename)
        self._n_entered = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"run_spec": self.run_spec, "filename": self.filename}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __enter__(self) -> Self:
        """Open the file. Raises OSError where it cannot be written."""
        self.check_writable()
        self._n_entered += 1
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Write what is queued. Events that could not be written are logged as one error."""
        self._n_entered -= 1
        if self._n_entered == 0:
            self._writer.close()
        else:
            self._writer.flush()

    def record_match(
        self,
        correct: bool,
        *,
        expected: Any = None,
        picked: Any = None,
        prob_correct: Any = None,
        **extra: Any,
    ) -> None:
        """Record a verdict."""
        verdict = {
            "correct": correct,
            "expected": expected,
            "picked": picked,
            "prob_correct": prob_correct,
        }
        self._record("match", verdict, extra)

    def record_sampling(
        self,
        prompt: Any,
        sampled: Any,
        *,
        extra_allowed_metadata_fields: list[str] | None = None,
        **extra: Any,
    ) -> None:
        """Record one call of a model."""
        self._record("sampling", {"prompt": prompt, "sampled": sampled}, extra)

    def record_sample_completed(self, **extra: Any) -> None:
        """Record that the rollout is over; `status` is "completed" unless `extra` has one."""
        self._record("sample_completed", {"status": extra.pop("status", "completed")}, extra)

    def record_error(self, msg: str, error: Exception | None, **kwargs: Any) -> None:
        """Record an error with its type and traceback."""
        if error is not None:
            kwargs.setdefault("error_type", type(error).__name__)
            if "traceback" not in kwargs:
                kwargs["traceback"] = "".join(traceback.format_exception(error))
        message = None if error is None else message_of(error)
        self._record("error", {"message": msg, "error": message}, kwargs)

    def record_extra(self, data: Any) -> None:
        """Record anything else."""
        self._record("extra", {"data": data}, {})

    def record_final_report(self, final_report: Any) -> None:
        """Record the run's summary."""
        self._record("final_report", {"final_report": final_report}, {})

    def record_run_started(self, **extra: Any) -> None:
        """Record the run's ids, and what else is worth a place in the first line."""
        self._record("run_started", {"run_spec": self.run_spec}, extra)

    def check_writable(self) -> None:
        """Create the file and its folder where missing. Raises OSError where that fails."""
        self._writer.check()

    def evalboard_url(self, view: Literal["run", "monitor"]) -> str | None:
        """None: a file has no address."""
        return None

    def _record(self, record_type: str, fields: dict[str, Any], extra: dict[str, Any]) -> None:
        scope = self.current_rollout()
        record: dict[str, Any] = {
            "timestamp": utc_timestamp(event_time.get()),
            "record_type": record_type,
            "sample_id": (scope.sample_id or None) if scope else None,
            "group_id": (scope.group_id or None) if scope else None,
            **fields,
        }
        for more in (scope.extra if scope else None, extra):
            if more:
                # A caller's field never hides one of ours.
                record.update({f"extra_{k}" if k in record else k: v for k, v in more.items()})
        self._writer.add(encode_line(record))


@chz.chz
class JsonRecorderConfig(RecorderConfig):
    """Builds the JSON-lines recorder of a run."""

    filename: Path | None = chz.field(
        default=None,
        doc="The file to append to; None = a new one in $NANOEVAL_LOG_DIR, else in ./records.",
    )

    async def factory(self, spec: EvalSpec, num_tasks: int) -> RecorderProtocol:
        """Build the recorder and record that the run started.

        Raises OSError, with the path and the remedy, where the file cannot be written.
        """
        run_spec = self._make_default_run_spec(spec)
        eval_name = spec.eval.get_name()
        recorder = JsonRecorder(run_spec, self.filename or _new_file(eval_name, run_spec.run_id))
        await asyncio.to_thread(recorder.check_writable)
        recorder.record_run_started(
            eval_name=eval_name, model_name=await spec.model_name(), num_tasks=num_tasks
        )
        return recorder


def json_recorder(filename: Path | None = None) -> RecorderConfig:
    """A recorder that writes one JSON line per event; see `JsonRecorderConfig`."""
    return JsonRecorderConfig(filename=filename)


def _new_file(eval_name: str, run_id: str) -> Path:
    """A name that sorts by time and tells runs apart."""
    started = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    name = re.sub(r"[^\w.-]+", "_", eval_name)[:60]
    return Path(os.environ.get(ENV_LOG_DIR) or "records") / f"{started}_{name}_{run_id}.jsonl"

"""The recorder that keeps nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Self

import chz

from nanoeval._recorder_base import RecorderBase
from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol, RunSpec

if TYPE_CHECKING:
    from nanoeval.eval import EvalSpec

logger = logging.getLogger(__name__)


class DummyRecorder(RecorderBase):
    """Keeps nothing. With `log`, samplings are logged at INFO."""

    def __init__(self, run_spec: RunSpec, log: bool = False) -> None:
        self.run_spec = run_spec
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def record_match(
        self,
        correct: bool,
        *,
        expected: Any = None,
        picked: Any = None,
        prob_correct: Any = None,
        **extra: Any,
    ) -> None:
        """Does nothing."""

    def record_sampling(
        self,
        prompt: Any,
        sampled: Any,
        *,
        extra_allowed_metadata_fields: list[str] | None = None,
        **extra: Any,
    ) -> None:
        """Log what was sampled, where logging was asked for."""
        if self._log:
            logger.info("sampling: %s", sampled)

    def record_sample_completed(self, **extra: Any) -> None:
        """Does nothing."""

    def record_error(self, msg: str, error: Exception | None, **kwargs: Any) -> None:
        """Does nothing."""

    def record_extra(self, data: Any) -> None:
        """Does nothing."""

    def record_final_report(self, final_report: Any) -> None:
        """Does nothing."""

    def evalboard_url(self, view: Literal["run", "monitor"]) -> str | None:
        """None: there is nothing to look at."""
        return None


@chz.chz
class DummyRecorderConfig(RecorderConfig):
    """Builds a recorder that keeps nothing."""

    log: bool = chz.field(default=False, doc="Log samplings at INFO.")

    async def factory(self, spec: EvalSpec, num_tasks: int) -> RecorderProtocol:
        """Build the recorder of one run."""
        return DummyRecorder(self._make_default_run_spec(spec), log=self.log)

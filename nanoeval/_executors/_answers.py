"""How an order to a worker in another process ends, and what the driver is told of it."""

from __future__ import annotations

import asyncio

# A worker whose event loop has not seen a stop for so long, in seconds, is killed: a rollout blocks
# it. One that has seen it may clean up for as long as it needs.
STOP_WITHIN = 2.0


def errors_to_tell(error: BaseException, was_stopped: bool) -> list[BaseException]:
    """What `error`, which ended an order, is to the driver: nothing where a stop was ordered.

    Anything else is told, for the driver takes silence to mean that the eval is done.
    """
    if isinstance(error, asyncio.CancelledError) and was_stopped:
        return []
    if isinstance(error, ExceptionGroup):
        return list(error.exceptions)
    if isinstance(error, Exception):
        return [error]
    # As they are, these would end the driver's event loop, or look like Ctrl-C.
    told = RuntimeError(
        f"{error!r} ended a worker: the eval's own code raised it, or cancelled tasks that are not"
        " its own"
    )
    told.__cause__ = error
    return [told]

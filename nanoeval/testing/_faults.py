"""What can go wrong with a server, and when it does. Knows no HTTP."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoeval.testing._script import Request

KINDS = {
    "cut": "the connection is closed in the middle of the reply",
    "disconnect": "the connection is closed before the first byte of a reply",
    "hang": "the reply never comes",
    "malformed": "the reply breaks off in the middle of its JSON",
    "empty_choices": "the list of choices is empty",
    "null_content": "the content of the message is null",
    "no_usage": "the reply does not count tokens",
    "error_body": "status 200 with an error object instead of a reply",
}


@dataclass(frozen=True)
class Fault:
    """A failure, and which requests it hits: a share, some by number, or all.

    `kind` is an HTTP status from 400 to 599 (as a string) or one of `KINDS`. With `rate` it hits
    that share of all tries, chosen by a hash of seed, request body and try number, so that a
    repeated run meets the same failures; with `requests` it hits the requests of these numbers
    (from 1); with neither, every request. `first_tries` spares later tries of the same body.
    """

    kind: str
    rate: float | None = None
    requests: Collection[int] = ()
    first_tries: int | None = None
    # Seconds in the header of a 429 or 503; None = no such header.
    retry_after: float | None = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.status is None:
            near = difflib.get_close_matches(self.kind, KINDS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"fault {self.kind!r} is not known{hint}; use an HTTP status from 400 to 599 or"
                f" one of {', '.join(KINDS)}"
            )
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"fault {self.kind}: rate={self.rate} must be a share from 0 to 1")
        if self.rate is not None and self.requests:
            raise ValueError(f"fault {self.kind}: set either rate or requests, not both")
        if self.first_tries is not None and self.first_tries < 1:
            raise ValueError(
                f"fault {self.kind}: first_tries={self.first_tries} must be at least 1"
            )

    @property
    def status(self) -> int | None:
        """The HTTP status, None for a fault of another kind."""
        is_status = self.kind.isdecimal() and 400 <= int(self.kind) <= 599
        return int(self.kind) if is_status else None

    @classmethod
    def parse(cls, text: str, retry_after: float | None = 1.0) -> Fault:
        """A fault from `KIND` (every request), `KIND:RATE` or `KIND@NUMBER,NUMBER,...`."""
        try:
            if ":" in text:
                kind, _, rate = text.partition(":")
                return cls(kind.strip(), rate=float(rate), retry_after=retry_after)
            kind, _, numbers = text.partition("@")
            chosen = frozenset(int(number) for number in numbers.split(",")) if numbers else ()
            return cls(kind.strip(), requests=chosen, retry_after=retry_after)
        except ValueError as error:
            raise ValueError(
                f"fault {text!r} cannot be read: {error}; write KIND, KIND:RATE or"
                " KIND@NUMBER,NUMBER, such as 429:0.05"
            ) from error


FaultRule = Callable[["Request"], Fault | None]


class FaultPlan:
    """Decides which fault, if any, a request meets. The shares of `rate` add up."""

    def __init__(self, faults: Sequence[Fault | str | FaultRule], seed: int) -> None:
        self._rules = [Fault.parse(f) if isinstance(f, str) else f for f in faults]
        self._key = str(seed).encode()
        rates = [f.rate for f in self._rules if isinstance(f, Fault) and f.rate is not None]
        self._has_rates = bool(rates)
        if sum(rates) > 1 + 1e-9:
            raise ValueError(f"the rates of all faults add up to {sum(rates):g}, which exceeds 1")

    def choose(self, request: Request, content: bytes) -> Fault | None:
        """The first fault that hits; `content` identifies the request's body."""
        draw = self._draw(content, request.try_number) if self._has_rates else 0.0
        share = 0.0
        for rule in self._rules:
            if not isinstance(rule, Fault):
                chosen = rule(request)
                if chosen is not None:
                    return chosen
                continue
            low, share = share, share + (rule.rate or 0.0)
            if rule.first_tries is not None and request.try_number > rule.first_tries:
                continue
            if rule.rate is not None:
                if low <= draw < share:
                    return rule
            elif not rule.requests or request.number in rule.requests:
                return rule
        return None

    def _draw(self, content: bytes, try_number: int) -> float:
        """A number in [0, 1) that depends on the seed, the body and the try alone."""
        digest = blake2b(b"%d %s" % (try_number, content), key=self._key[:64], digest_size=7)
        return int.from_bytes(digest.digest()) / 2**56

"""The store keeps every task exactly once, whatever is interleaved."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanoeval import _schema
from nanoeval._database_file import BackupSource, StoreError, check_database
from nanoeval._heartbeat import Heartbeat
from nanoeval._store import (
    Claim,
    DuplicateTaskError,
    Finish,
    NewTask,
    Store,
    diagnose,
)


def new_tasks(n: int, first: int = 0) -> list[NewTask]:
    return [NewTask(f"q{i}", 1, 0, None, f"task {i}".encode()) for i in range(first, first + n)]


@contextlib.asynccontextmanager
async def open_store(
    path: Path, n_tasks: int = 0, concurrency: int | None = None, lease: float = 60
) -> Any:
    """A store with one running eval of `n_tasks` and one executor: (store, eval id, executor)."""
    async with Store(path, lease) as store:
        await store.create_run_set(path.stem, "test")
        executor_id = await store.add_executor("driver")
        eval_id = await store.add_eval("eval", "model", concurrency, b"spec")
        await store.add_tasks(eval_id, 0, new_tasks(n_tasks))
        await store.start_eval(eval_id, "run", None, None)
        yield store, eval_id, executor_id


def scored(claim: Claim, payload: bytes = b"result") -> Finish:
    return Finish(claim, _schema.SCORED, 1.0, 2.0, payload, 1.0, "true")


async def all_results(store: Store, eval_id: int) -> list[tuple[bytes, bytes]]:
    counted = await store.counted(eval_id)
    return [pair async for batch in store.results(counted) for pair in batch]


async def test_claims_come_in_order_and_once(tmp_path: Path) -> None:
    """A task would run twice, or the last before the first."""
    async with open_store(tmp_path / "s.db", 10) as (store, eval_id, executor_id):
        first = await store.exchange(executor_id, eval_id, [], 4)
        second = await store.exchange(executor_id, eval_id, [], 100)
        claims = first.claims() + second.claims()
        assert [claim.question_id for claim in claims] == [f"q{i}" for i in range(10)]
        assert [claim.payload for claim in claims] == [f"task {i}".encode() for i in range(10)]


async def test_an_answer_to_a_claim_that_was_taken_back_is_dropped(tmp_path: Path) -> None:
    """A rollout would be counted twice."""
    async with open_store(tmp_path / "s.db", 1) as (store, eval_id, executor_id):
        (old,) = (await store.exchange(executor_id, eval_id, [], 1)).claims()
        await store.release(executor_id, eval_id)
        (new,) = (await store.exchange(executor_id, eval_id, [], 1)).claims()
        after = await store.exchange(executor_id, eval_id, [scored(old, b"late")], 0)
        assert after.progress.num_scored == 0
        after = await store.exchange(executor_id, eval_id, [scored(new), scored(old, b"late")], 0)
        assert after.progress.num_scored == 1
        assert await all_results(store, eval_id) == [(b"task 0", b"result")]


async def test_an_executor_past_its_lease_loses_its_claims(tmp_path: Path) -> None:
    """Tasks of a machine that went away would never run."""
    async with open_store(tmp_path / "s.db", 2, lease=0.05) as (store, eval_id, executor_id):
        claims = (await store.exchange(executor_id, eval_id, [], 2)).claims()
        await asyncio.sleep(0.1)
        await store.reap(losses=1)
        answer = await store.exchange(executor_id, eval_id, [scored(claims[0])], 0)
        assert answer.is_lease_lost
        again = (await store.exchange(executor_id, eval_id, [], 2)).claims()
        assert [claim.losses for claim in again] == [1, 1]


async def test_a_heartbeat_keeps_the_lease(tmp_path: Path) -> None:
    """A rollout longer than a lease could never end."""
    path = tmp_path / "s.db"
    async with open_store(path, 1, lease=0.3) as (store, eval_id, executor_id):
        with Heartbeat(path, executor_id, 0.3, lambda process, n: None):
            (claim,) = (await store.exchange(executor_id, eval_id, [], 1)).claims()
            await asyncio.sleep(1.0)
            answer = await store.exchange(executor_id, eval_id, [scored(claim)], 0)
            assert answer.progress.num_scored == 1


async def test_retries_wait_until_they_are_due(tmp_path: Path) -> None:
    """A server that limits rates would be hammered."""
    async with open_store(tmp_path / "s.db", 1) as (store, eval_id, executor_id):
        (claim,) = (await store.exchange(executor_id, eval_id, [], 1)).claims()
        due = time.time() + 0.3
        retry = Finish(claim, _schema.RETRIED, 1.0, 2.0, retry_payload=b"again", not_before=due)
        answer = await store.exchange(executor_id, eval_id, [retry], 1)
        assert answer.claims() == []
        assert answer.next_due == pytest.approx(due)
        await asyncio.sleep(0.35)
        (claim,) = (await store.exchange(executor_id, eval_id, [], 1)).claims()
        assert (claim.retry_idx, claim.payload) == (1, b"again")


async def test_a_database_of_an_earlier_version_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun before an upgrade could not be resumed after it, or would exceed its limit."""
    path = tmp_path / "s.db"
    async with open_store(path, 6, concurrency=4) as (store, eval_id, executor_id):
        await store.exchange(executor_id, eval_id, [], 3)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP INDEX task_lost")
        for column in ("num_running", "definitions", "folders"):
            db.execute(f"ALTER TABLE eval DROP COLUMN {column}")
        db.execute("UPDATE run_set SET definitions = x'c0de'")
        db.execute("PRAGMA user_version = 1")
    async with Store(path, 60) as store:
        assert (await store.progress(eval_id)).num_running == 3
        assert await store.definitions(eval_id) == b"\xc0\xde"
        other = await store.add_executor("worker")
        assert (await store.exchange(other, eval_id, [], 3)).num_claims == 1


async def test_those_whose_executor_died_run_last_and_in_ever_smaller_groups(
    tmp_path: Path,
) -> None:
    """A rollout that kills its process would take those beside it along, until all have failed."""
    async with open_store(tmp_path / "s.db", 600) as (store, eval_id, _):
        sizes = []
        for _ in range(7):
            executor_id = await store.add_executor("worker")
            sizes.append((await store.exchange(executor_id, eval_id, [], 500)).num_claims)
            await store.end_executor(executor_id, "process died", losses=1)
        assert sizes == [500, 100, 256, 256, 88, 32, 32]
        executor_id = await store.add_executor("worker")
        for expected in (32, 0):
            claims = (await store.exchange(executor_id, eval_id, [], 500)).claims()
            assert (len(claims), {claim.losses for claim in claims} - {2}) == (expected, set())


async def test_after_a_sleep_of_the_machine_nobody_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed lid, or a clock that was set, would cost all rollouts in flight elsewhere."""
    async with open_store(tmp_path / "s.db", 4, lease=1) as (store, eval_id, driver_id):
        other = await store.add_executor("worker")
        await store.exchange(other, eval_id, [], 2)
        dead: list[Any] = []
        with contextlib.ExitStack() as beating:
            beating.enter_context(
                Heartbeat(store.path, driver_id, 1, lambda *death: dead.append(death))
            )
            await asyncio.sleep(0.1)
            beating.enter_context(Heartbeat(store.path, other, 1))
            await asyncio.sleep(0.25)
            now = time.time
            monkeypatch.setattr(time, "time", lambda: now() + 3600)
            await asyncio.sleep(1.2)
        assert dead == []
        assert (await store.progress(eval_id)).num_running == 2


async def test_duplicates_are_named(tmp_path: Path) -> None:
    """A question listed twice would be dropped in silence."""
    async with open_store(tmp_path / "s.db", 3) as (store, eval_id, _):
        await store.refuse_duplicates(eval_id)
        await store.add_tasks(eval_id, 3, new_tasks(2, first=1))
        with pytest.raises(DuplicateTaskError, match=r"\('q1', 1\), \('q2', 1\)"):
            await store.refuse_duplicates(eval_id)


async def test_one_process_never_takes_what_another_could_do(tmp_path: Path) -> None:
    """Of two processes one would stand idle."""
    async with open_store(tmp_path / "s.db", 100) as (store, eval_id, executor_id):
        answer = await store.exchange(executor_id, eval_id, [], 100, num_sharers=2)
        assert len(answer.claims()) == 25


async def test_a_backup_is_whole_while_the_database_is_in_use(tmp_path: Path) -> None:
    """What a reboot leaves would be half a run."""
    path, copy = tmp_path / "s.db", tmp_path / "backups" / "s.db"
    async with open_store(path, 5000) as (store, eval_id, executor_id):
        claims = (await store.exchange(executor_id, eval_id, [], 5000)).claims()
        source = BackupSource(path)
        copying = asyncio.create_task(asyncio.to_thread(source.back_up, copy))
        for first in range(0, 5000, 100):
            done = [scored(claim) for claim in claims[first : first + 100]]
            await store.exchange(executor_id, eval_id, done, 0)
        await copying
        source.close()
    check_database(copy)
    async with Store(copy, 60) as store:
        progress = await store.progress(eval_id)
        assert progress.num_scored == len(await all_results(store, eval_id))
        assert progress.num_scored + progress.num_running == 5000


async def test_a_database_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    """What looks at a deleted run would leave an empty one behind, and hide the backup."""
    path = tmp_path / "s.db"
    with pytest.raises(StoreError, match="is gone: somebody deleted it"):
        async with Store(path, 60, may_create=False):
            pass
    with Heartbeat(path, 1, 0.1):
        await asyncio.sleep(0.2)
    with pytest.raises(sqlite3.OperationalError):
        diagnose(path, 1, stalls=1)
    assert list(tmp_path.iterdir()) == []


async def test_a_closed_store_and_a_folder_that_is_missing_say_so(tmp_path: Path) -> None:
    """SQLite's own words ("unable to open") help nobody."""
    with pytest.raises((StoreError, FileNotFoundError)):
        async with Store(tmp_path / "nowhere" / "s.db", 60):
            pass


class StoreMachine(RuleBasedStateMachine):
    """Adds, claims, finishes, fails, expires, requeues and reopens, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "s.db")
        self.loop = asyncio.new_event_loop()
        self.n_tasks = 0
        self.concurrency: int | None = None
        self.executors: dict[int, list[Claim]] = {}
        self.lost: list[tuple[int, Claim]] = []
        self.accepted: Counter[str] = Counter()

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @initialize(n=st.integers(1, 12), concurrency=st.none() | st.integers(1, 5))
    def begin(self, n: int, concurrency: int | None) -> None:
        self.concurrency = concurrency
        self.do(self._open())
        self.eval_id = self.do(self.store.add_eval("eval", "model", concurrency, b""))
        self.n_tasks = n
        self.do(self.store.add_tasks(self.eval_id, 0, new_tasks(n)))
        self.do(self.store.start_eval(self.eval_id, "run", None, None))
        self.add_executor()

    async def _open(self) -> None:
        self.store = await Store(self.path, 3600).__aenter__()

    @rule()
    def add_executor(self) -> None:
        if len(self.executors) < 4:
            self.executors[self.do(self.store.add_executor("worker"))] = []

    @rule(data=st.data(), wanted=st.integers(0, 6), sharers=st.integers(1, 3))
    def exchange(self, data: st.DataObject, wanted: int, sharers: int) -> None:
        """Hand in some claims, in several ways, and some answers to claims that are void."""
        executor_id = data.draw(st.sampled_from(sorted(self.executors)))
        held = self.executors[executor_id]
        chosen = [claim for claim in held if data.draw(st.booleans())]
        finishes = [self._finish(data, claim) for claim in chosen]
        late = [claim for owner, claim in self.lost if owner == executor_id]
        finishes += [scored(claim, b"late") for claim in late]
        random.Random(len(finishes)).shuffle(finishes)
        answer = self.do(self.store.exchange(executor_id, self.eval_id, finishes, wanted, sharers))
        for finish in finishes:
            if finish.claim in chosen and finish.state in (_schema.SCORED, _schema.FAILED):
                self.accepted[finish.claim.question_id] += 1
        self.executors[executor_id] = [c for c in held if c not in chosen] + answer.claims()
        assert len(answer.claims()) <= wanted

    def _finish(self, data: st.DataObject, claim: Claim) -> Finish:
        kind = data.draw(st.sampled_from(["scored", "failed", "retried", "put back"]))
        if kind == "scored":
            return scored(claim)
        if kind == "failed":
            return Finish(claim, _schema.FAILED, 1.0, 2.0, b"error", error_type="E")
        if kind == "retried":
            return Finish(claim, _schema.RETRIED, 1.0, 2.0, retry_payload=claim.payload)
        return Finish(claim, _schema.QUEUED, 1.0, 2.0, error_type="E")

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        executor_id = data.draw(st.sampled_from(sorted(self.executors)))
        self.do(self.store.release(executor_id, self.eval_id))
        self._lose(executor_id)

    @precondition(lambda self: len(self.executors) > 1)
    @rule(data=st.data())
    def end_executor(self, data: st.DataObject) -> None:
        executor_id = data.draw(st.sampled_from(sorted(self.executors)))
        self.do(self.store.end_executor(executor_id, "died", losses=1))
        self._lose(executor_id)
        del self.executors[executor_id]

    def _lose(self, executor_id: int) -> None:
        self.lost += [(executor_id, claim) for claim in self.executors[executor_id]]
        self.executors[executor_id] = []

    @rule()
    def reopen(self) -> None:
        self.do(self.store.__aexit__())
        self.do(self._open())

    @invariant()
    def every_task_is_somewhere_exactly_once(self) -> None:
        if not self.n_tasks:
            return
        progress = self.do(self.store.progress(self.eval_id))
        results = self.do(all_results(self.store, self.eval_id))
        held = [claim for claims in self.executors.values() for claim in claims]
        assert progress.num_done == len(results) == sum(self.accepted.values())
        assert max(self.accepted.values(), default=0) <= 1
        assert len({task for task, _ in results}) == len(results)
        assert b"late" not in {result for _, result in results}
        assert progress.num_running == len(held)
        assert len({claim.task_id for claim in held}) == len(held)
        if self.concurrency is not None:
            assert progress.num_running <= self.concurrency

    def teardown(self) -> None:
        try:
            if self.n_tasks:
                self._finish_everything()
        finally:
            # A writer left open would keep the interpreter from ending.
            if self.n_tasks:
                self.do(self.store.__aexit__())
            self.loop.close()
        self.folder.cleanup()

    def _finish_everything(self) -> None:
        """From wherever it got to, the rest can be done and nothing is missing."""
        for executor_id in self.executors:
            self.do(self.store.release(executor_id, self.eval_id))
        executor_id = self.do(self.store.add_executor("driver"))
        claims: list[Claim] = []
        while True:
            finishes = [scored(claim) for claim in claims]
            answer = self.do(self.store.exchange(executor_id, self.eval_id, finishes, 100))
            claims = answer.claims()
            if not claims:
                break
        results = self.do(all_results(self.store, self.eval_id))
        assert [task for task, _ in results] == [new.payload for new in new_tasks(self.n_tasks)]


StoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreMachine = pytest.mark.slow(pytest.mark.timeout(180)(StoreMachine.TestCase))

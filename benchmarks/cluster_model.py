"""A discrete-event model of nanoeval on a Ray cluster; `simulate_cluster.py` has the scenarios.

The driver's node has one database and one desk, an actor that takes in finished rollouts and hands
out claims. Every worker actor keeps its places filled with rollouts and has one call to the desk
under way at most, as `Worker` does; whatever finishes meanwhile rides on its next call. A call
passes, first come first served, through the network to the driver's node, the desk, the driver's
recorder, the database, the desk again and the network back. Each of these does one thing at a time.
An actor with nothing to hand in asks for news every `poll` seconds. Nodes fail; what they held is
queued again when their lease has run out.

Left out: what Ray needs for itself, retries, and that the last tasks of a run are spread more
thinly. Between desk, recorder and database no time is lost to Python's lock: they are taken to be
processes, or threads that leave it to one another.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

# In the order in which a call meets them.
STATIONS = ("network in", "desk", "recorder", "database", "network out")


@dataclass(frozen=True)
class Costs:
    """Seconds of one processor core each, and bytes.

    The defaults are what `simulate_cluster.py --measure` found on 2 cores of an AMD EPYC.
    """

    transaction: float = 2.62e-04
    transaction_per_rollout: float = 9.49e-06
    # It was 5e-08 when each transaction counted the claims in flight.
    transaction_per_claim_held: float = 8.32e-11
    transaction_per_byte: float = 2.82e-09
    heartbeat: float = 1.38e-05
    # A look for executors that died, by the driver alone, for each that there is.
    heartbeat_per_actor: float = 2.86e-05
    desk_per_call: float = 4.11e-04
    desk_per_rollout: float = 2.90e-06
    desk_per_byte: float = 1.26e-10
    record_per_event: float = 5.73e-06
    record_per_byte: float = 2.38e-09
    # On its actor's event loop; and more if it waits for something.
    worker_per_rollout: float = 1.02e-05
    worker_per_wait: float = 1.18e-05
    queue_per_row: float = 4.06e-06
    duplicates_per_row: float = 5.77e-07
    backup_per_byte: float = 9.91e-10
    check_per_byte: float = 1.08e-09
    summary_per_row: float = 2.73e-06
    # Beside the pickles of task and result.
    file_bytes_per_rollout: float = 1.72e02


@dataclass(frozen=True)
class Cluster:
    """What is simulated. `seconds` is the mean of a log-normal; 0 = rollouts that return at once.

    Events are what a rollout records, on their way to the driver's recorder.
    """

    nodes: int
    seconds: float
    actors_per_node: int = 8
    places_per_actor: int = 64  # of rollouts in flight
    sigma: float = 1.0
    task_bytes: int = 500
    result_bytes: int = 2_000
    events: int = 3
    event_bytes: int = 1_000
    batch: int = 1_024
    poll: float = 0.25
    lease: float = 15.0
    is_loss_seen_at_once: bool = False
    seconds_between_failures: float = 86_400.0  # of one node
    restart: float = 60.0
    latency: float = 0.0005
    bandwidth: float = 1.25e9  # bytes per second each way: 10 Gbit/s
    # Whether calls that find the database at work share its next transaction.
    do_calls_share_transactions: bool = False
    # Whether every actor's heartbeat looks for the dead, as worker processes' do, or the driver's.
    do_all_look_for_dead: bool = False

    @property
    def num_actors(self) -> int:
        return self.nodes * self.actors_per_node

    @property
    def in_flight(self) -> int:
        return self.places_per_actor * self.num_actors

    @property
    def ideal(self) -> float:
        """Rollouts per second with nothing but their own durations."""
        return self.in_flight / self.seconds if self.seconds else math.inf


class Station:
    """Does one thing at a time, first come first served."""

    def __init__(self) -> None:
        self.busy = 0.0
        self._free_at = 0.0

    def next_start(self, now: float) -> float:
        """When what arrives `now` has its turn."""
        return max(now, self._free_at)

    def serve(self, now: float, seconds: float) -> float:
        """When what arrives `now` and takes `seconds` is done."""
        self._free_at = self.next_start(now) + seconds
        self.busy += seconds
        return self._free_at


@dataclass(eq=False)
class Actor:
    """One life of a worker actor. `held` are its claims as the database knows them."""

    held: set[int] = field(default_factory=set)
    num_running: int = 0
    finished: list[int] = field(default_factory=list)
    num_calls: int = 0
    is_calling: bool = False
    is_alive: bool = True
    is_known_dead: bool = False
    loop: Station = field(default_factory=Station)


# What takes time yields the moment at which it goes on.
Process = Iterator[float]


class Simulation:
    """A cluster from its steady state on; `num_tasks` (None = endless) starts it from nothing."""

    def __init__(
        self, cluster: Cluster, costs: Costs, num_tasks: int | None = None, seed: int = 0
    ) -> None:
        self.cluster, self.costs, self.num_tasks = cluster, costs, num_tasks
        self.now = 0.0
        self.num_ended = self.num_lost = self.num_failures = self.num_calls = 0
        self.times_ended: Counter[int] = Counter()
        self.stations = {name: Station() for name in STATIONS}
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._next_task = itertools.count()
        self._requeued: deque[int] = deque()
        self._num_claimed = 0
        self._next_transaction = 0.0
        for _ in range(cluster.nodes):
            self._run(self._node())
        self._run(self._heartbeats(Actor(), is_driver=True))

    def run_until(self, time: float) -> None:
        """Go on to `time`, or to the end of the last task."""
        while self._agenda and self._agenda[0][0] <= time and not self.is_done:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        if not self.is_done:
            self.now = time

    @property
    def is_done(self) -> bool:
        return self.num_ended == self.num_tasks

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._order), action))

    def _run(self, process: Process) -> None:
        time = next(process, None)
        if time is not None:
            self._at(time, partial(self._run, process))

    def _serve(self, name: str, seconds: float) -> float:
        return self.stations[name].serve(self.now, seconds)

    def _node(self) -> Process:
        """The lives of a node: its actors start, work and die together."""
        is_under_way = self.num_tasks is None
        while True:
            actors = [Actor() for _ in range(self.cluster.actors_per_node)]
            for actor in actors:
                if is_under_way:
                    self._put_to_work(actor)
                self._run(self._heartbeats(actor))
                self._call(actor)
            is_under_way = False
            yield self.now + self._random.expovariate(1 / self.cluster.seconds_between_failures)
            self.num_failures += 1
            for actor in actors:
                actor.is_alive = False
                self._run(self._bury(actor))
            yield self.now + self.cluster.restart

    def _bury(self, actor: Actor) -> Process:
        """What a dead actor held is queued again once its death is seen."""
        yield self.now + (0.0 if self.cluster.is_loss_seen_at_once else self.cluster.lease)
        actor.is_known_dead = True
        self.num_lost += len(actor.held)
        self._num_claimed -= len(actor.held)
        self._requeued.extend(sorted(actor.held))
        actor.held.clear()

    def _heartbeats(self, actor: Actor, is_driver: bool = False) -> Process:
        interval = min(self.cluster.lease / 4, 2.0)
        yield self.now + interval * self._random.random()
        beat = self.costs.heartbeat
        if is_driver or self.cluster.do_all_look_for_dead:
            beat += self.costs.heartbeat_per_actor * self.cluster.num_actors
        while actor.is_alive:
            next_at = self.now + interval
            if not is_driver:
                yield self._serve("desk", self.costs.desk_per_call)
            yield max(next_at, self._serve("database", beat))

    def _put_to_work(self, actor: Actor) -> None:
        """Give an actor rollouts that are under way, each at a moment of its life that is drawn.

        The rollouts that one meets at any moment are the longer ones: their log-normal's mu is
        greater by sigma squared.
        """
        for task in self._claim(actor, self.cluster.places_per_actor):
            rest = self._duration(self.cluster.sigma**2) * self._random.random()
            self._at(rest, partial(self._finish, actor, task))

    def _duration(self, more_mu: float = 0.0) -> float:
        if not self.cluster.seconds:
            return 0.0
        mu = math.log(self.cluster.seconds) - self.cluster.sigma**2 / 2
        return self._random.lognormvariate(mu + more_mu, self.cluster.sigma)

    def _finish(self, actor: Actor, task: int) -> None:
        if actor.is_alive:
            actor.num_running -= 1
            actor.finished.append(task)
            if not actor.is_calling:
                self._call(actor)

    def _call(self, actor: Actor) -> None:
        actor.is_calling = True
        actor.num_calls += 1
        self.num_calls += 1
        self._run(self._exchange(actor))

    def _exchange(self, actor: Actor) -> Process:
        """One call: hand in what is finished and take new claims for the free places."""
        cluster, costs = self.cluster, self.costs
        wanted = min(cluster.batch, cluster.places_per_actor - actor.num_running)
        finished, actor.finished = actor.finished, []
        num_events = len(finished) * cluster.events
        event_bytes, result_bytes = (
            num_events * cluster.event_bytes,
            len(finished) * cluster.result_bytes,
        )
        up = result_bytes + event_bytes
        yield self._serve("network in", up / cluster.bandwidth) + cluster.latency
        taking_in = costs.desk_per_rollout * len(finished) / 2 + costs.desk_per_byte * up
        yield self._serve("desk", costs.desk_per_call + taking_in)
        recording = costs.record_per_event * num_events + costs.record_per_byte * event_bytes
        yield self._serve("recorder", recording)
        # What happens in the database happens in the order of arrival, so it may be noted at once.
        self._commit(actor, finished)
        claims = self._claim(actor, wanted)
        down = len(claims) * cluster.task_bytes
        yield self._serve(
            "database",
            self._transaction()
            + costs.transaction_per_rollout * (len(finished) + len(claims)) / 2
            + costs.transaction_per_byte * (result_bytes + down),
        )
        giving_out = costs.desk_per_rollout * len(claims) / 2 + costs.desk_per_byte * down
        yield self._serve("desk", giving_out)
        yield self._serve("network out", down / cluster.bandwidth) + cluster.latency
        if actor.is_alive:
            self._go_on(actor, claims)

    def _transaction(self) -> float:
        """What a transaction costs beside its rollouts; nothing for a call that joins another's."""
        if self.cluster.do_calls_share_transactions and self.now < self._next_transaction:
            return 0.0
        self._next_transaction = self.stations["database"].next_start(self.now)
        costs = self.costs
        return costs.transaction + costs.transaction_per_claim_held * self._num_claimed

    def _commit(self, actor: Actor, finished: list[int]) -> None:
        """Count what is finished; the late answers of the dead find no claim, and are dropped."""
        accepted = actor.held.intersection(finished)
        actor.held -= accepted
        self._num_claimed -= len(accepted)
        self.num_ended += len(accepted)
        if self.num_tasks is not None:
            self.times_ended.update(accepted)

    def _claim(self, actor: Actor, wanted: int) -> list[int]:
        free = min(wanted, self.cluster.in_flight - self._num_claimed)
        claims: list[int] = []
        while len(claims) < free and not actor.is_known_dead:
            task = self._requeued.popleft() if self._requeued else next(self._next_task)
            if self.num_tasks is not None and task >= self.num_tasks:
                break
            claims.append(task)
        actor.held.update(claims)
        self._num_claimed += len(claims)
        actor.num_running += len(claims)
        return claims

    def _go_on(self, actor: Actor, claims: list[int]) -> None:
        """Start what was claimed. Call again at once, when something ends, or to ask for news."""
        costs = self.costs
        cpu = costs.worker_per_rollout + (costs.worker_per_wait if self.cluster.seconds else 0.0)
        for task in claims:
            begun = actor.loop.serve(self.now, cpu)
            self._at(begun + self._duration(), partial(self._finish, actor, task))
        actor.is_calling = False
        if actor.finished or len(claims) == self.cluster.batch:
            self._call(actor)
        else:
            asked = partial(self._ask_for_news, actor, actor.num_calls)
            self._at(self.now + self.cluster.poll, asked)

    def _ask_for_news(self, actor: Actor, num_calls: int) -> None:
        if actor.is_alive and actor.num_calls == num_calls:
            self._call(actor)

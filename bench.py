"""`make bench`: what this project costs, next to the plain way and to the least it could cost.

Starts a RabbitMQ, a Redis and orchestrators of its own, measures, prints one table, writes it to
`bench-results/bench.json` and draws `example/bench.svg`. `--only NAME` measures one group.

The plain way is what one would write with Celery alone: dicts merged row by row, one `send_task`
per job, on a connection that is kept; its agents are plain Celery workers, and are told to go. The
floor of merging is `csv.reader` and an `orjson.dumps` per row; that of sending is the same bytes,
made beforehand, written to the socket until all are confirmed; that of a start is its imports. CPU
is user and system time; a MB is 10**6 bytes. Redis writes to its disk before it answers, as it does
in the chart. What stands beside neither has "none" for a ratio, and says something of this machine.
"""

import argparse
import csv
import io
import json
import math
import os
import platform
import re
import resource
import select
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import psutil
import redis
from amqp.exceptions import NotFound
from celery import Celery
from kombu import Connection, Exchange, Queue

import agent
import app
import merge
import test_app
from test_app import Servers, wait_for

HERE = Path(__file__).parent
JOB = {
    "url": "https://example.org/",
    "request": {"method": "GET", "timeout_seconds": 5, "headers": {"Accept": "text/html"}},
    "proxy": {"proxy_location": "US", "verify_ip": 1},
    "steps": ["open", "wait", "save"],
    "tags": ["a", "b"],
}
#: Notes the agents' processes, and when every so manieth job begins and ends, and by whom.
SCRIPT = """
import os, time
import redis
store = redis.Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]))
run_id, index = agent_message["run_id"], agent_message["targetted_agent"]
app.conf.worker_pool = agent_message["pool"]
store.hset("pids:" + run_id, index, os.getpid())

@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    number = job["targetted_job"]
    noted = number % job["every"] == 0
    if noted:
        store.hset("begins:" + run_id, number, time.time())
        store.hset("by:" + run_id, number, index)
    time.sleep(job["seconds"][number % len(job["seconds"])])
    if noted:
        store.hset("ends:" + run_id, number, time.time())
"""


@dataclass(frozen=True)
class Row:
    """One figure. A rate is wanted at `limit` or above, everything else at or below it.

    The unit `times` is that of what is a ratio already.
    """

    figure: str
    unit: str
    ours: float
    limit: float | None = None
    target: str = ""  #: what the limit is, where it is no plain number
    plain: float | None = None
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is what it should be."""
        if self.limit is None:
            return True
        return self.ours >= self.limit if self.unit == "jobs/s" else self.ours <= self.limit

    @property
    def ratio(self) -> str:
        """What it is beside the floor or, where there is none, the plain way."""
        name, other = ("plain way", self.plain) if self.floor is None else ("floor", self.floor)
        if self.unit == "times":
            return "itself"
        return f"{shown(self.ours / other)} x {name}" if other else "none"


class Orchestrator(test_app.Orchestrator):
    """An orchestrator in a process of its own, as people start it."""

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        times = self.running.cpu_times()
        return float(times.user + times.system)

    def memory(self, what: str = "VmHWM") -> float:
        """MB of resident memory: VmHWM, its peak, or VmRSS, as it is now."""
        return megabytes(Path(f"/proc/{self.running.pid}/status").read_text(), what)


def megabytes(status: str, what: str) -> float:
    """A size in a process's status as Linux shows it, in MB."""
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


class Bench:
    """The servers, the clients that the bench has of them, and what the picture shows."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.http = httpx.Client(timeout=600)
        self.redis = redis.Redis(port=servers.redis_port)
        self.connection = Connection(servers.url)
        self.plain = Celery("plain", broker=servers.url, set_as_current=False), self.redis
        self.environment = {
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(servers.redis_port),
            "RABBITMQ_URL": servers.url,
        }
        os.environ["REDIS_HOST_VAR_ENV"] = "127.0.0.1"  # for agents, also in this process
        os.environ["REDIS_PORT_VAR_ENV"] = str(servers.redis_port)
        self.seconds: dict[str, dict[int, float]] = {}  #: by way and number of jobs
        self.runs: list[str] = []
        plain_start(*self.plain, self.run(10))  # connects, and imports what Celery imports late

    @property
    def settings(self) -> app.Settings:
        """Those of an orchestrator that starts no agents."""
        return app.Settings.read(self.environment | {"AGENT_COMMAND": ""})

    def run(
        self, jobs: int, agents: int = 1, script: str = "pass\n", pool: str = "prefork", **job: Any
    ) -> dict[str, bytes]:
        """The parts of a POST of a new run, `runs[-1]`, with a CSV row per job."""
        self.runs.append(f"r{os.urandom(5).hex()}")
        message = {"image_name": "agent", "number_of_jobs": jobs, "number_of_agents": agents}
        template = {
            "run_message": message | {"run_id": self.runs[-1]},
            "default_agent_message": {"pool": pool},
            "default_job_message": JOB | job,
        }
        rows = "".join(
            f'{i},https://example.org/{i},"{{""headers"": {{""X-Number"": ""{i}""}}}}"\n'
            for i in range(jobs)
        )
        return {
            "configtemplate": json.dumps(template).encode(),
            "data_job": f"targetted_job,url,request\n{rows}".encode(),
            "data_agent": b"",
            "python_code": script.encode(),
        }

    def post(self, orchestrator: Orchestrator, parts: dict[str, bytes]) -> float:
        """Post a run. Returns seconds."""
        files = {name: (name, value) for name, value in parts.items()}
        begun = time.perf_counter()
        answer = self.http.post(f"{orchestrator.url}/bot/start", files=files)
        seconds = time.perf_counter() - begun
        assert answer.status_code == 200, answer.text
        return seconds

    def ready(self) -> int:
        """Messages in the last run's queue."""
        with self.connection.channel() as channel:
            return int(channel.queue_declare(self.runs[-1], passive=True).message_count)

    def connections(self, process: psutil.Process) -> int:
        """How many connections to RabbitMQ a process has."""
        found = (each.raddr for each in process.net_connections("tcp"))
        return sum(bool(address) and address.port == self.servers.amqp_port for address in found)

    def noted(self, name: str) -> dict[int, float]:
        """What the last run's agents have noted: `pids` by agent; `begins`, `by`, `ends` by job."""
        found = self.redis.hgetall(f"{name}:{self.runs[-1]}")
        return {int(key): float(value) for key, value in found.items()}

    def processes(self, count: int) -> list[psutil.Process]:
        """The last run's agents, once all of them have started."""
        wait_for("the agents", lambda: len(self.noted("pids")) == count)
        return [psutil.Process(int(pid)) for _, pid in sorted(self.noted("pids").items())]

    def ended(self, jobs: int) -> float:
        """When the last of so many jobs of the last run ended, once it has."""
        wait_for("the jobs", lambda: len(self.noted("ends")) == jobs)
        return max(self.noted("ends").values())

    @contextmanager
    def orchestrator(self, **environment: str) -> Iterator[Orchestrator]:
        """A new orchestrator, without agents unless told. Nothing is left of it or its runs."""
        with tempfile.TemporaryDirectory() as folder:
            # An empty value lets Python keep what it compiles, as it does by default.
            own = {"AGENT_COMMAND": "", "MONITOR_INTERVAL_MS": "", "PYTHONDONTWRITEBYTECODE": ""}
            made = Orchestrator(self.environment | own | environment, Path(folder, "log"))
            made.start()
            try:
                yield made
            finally:
                made.stop()
                self.forget()

    @contextmanager
    def plain_agents(
        self, parts: dict[str, bytes], count: int
    ) -> Iterator[tuple[list[psutil.Process], float]]:
        """A run of the plain way, with agents that nobody tells to end; when they were started."""
        plain_start(*self.plain, parts)
        own = os.environ | {"RUN_ID": self.runs[-1], "RABBITMQ_URL": self.servers.url}
        command = [sys.executable, str(HERE / "agent.py")]
        started, begun = [], time.time()
        for index in range(count):
            indexed, null = own | {"POD_INDEX": str(index)}, subprocess.DEVNULL
            started.append(psutil.Popen(command, env=indexed, stdout=null, stderr=null))
        try:
            yield self.processes(count), begun
        finally:
            for process in started:
                for each in [*process.children(), process] if process.poll() is None else []:
                    each.kill()
                process.wait()
            self.forget()

    def forget(self) -> None:
        """Delete all queues, exchanges and keys."""
        with self.connection.channel() as channel:
            for run_id in self.runs:
                channel.queue_delete(run_id)
                channel.exchange_delete(run_id)
        self.runs.clear()
        self.redis.flushall()


def timed(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Call a function. Returns seconds of wall time, and of this process's CPU."""
    begun, used = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - begun, time.process_time() - used


def medians(measured: Sequence[tuple[float, ...]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*measured, strict=True)]


# The plain way


def deep(default: Any, override: Any) -> Any:
    """`override` merged onto `default`."""
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return override
    merged = {k: deep(default[k], v) if k in default else v for k, v in override.items()}
    return {**default, **merged}


def plain_jobs(parts: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """The job messages of a run."""
    template = json.loads(parts["configtemplate"])
    for row in csv.DictReader(io.StringIO(parts["data_job"].decode())):
        index = int(row.pop("targetted_job"))
        values = {k: json.loads(v) if v[:1] in ("{", "[") else v for k, v in row.items() if v}
        ids = {"run_id": template["run_message"]["run_id"], "targetted_job": index}
        yield {**deep(template["default_job_message"], values), **ids}


def plain_start(celery: Celery, store: "redis.Redis", parts: dict[str, bytes]) -> None:
    """Store the configs and send the jobs of a run."""
    template = json.loads(parts["configtemplate"])
    run = template["run_message"]
    for index in range(run["number_of_agents"]):
        config = {**template["default_agent_message"], "code": parts["python_code"].decode()}
        config |= {"run_id": run["run_id"], "targetted_agent": index}
        store.set(f"{run['run_id']}{index}", json.dumps(config))
    for job in plain_jobs(parts):
        celery.send_task(merge.TASK, args=[job], queue=run["run_id"])


# The floor


def floor_merge(parts: dict[str, bytes]) -> None:
    """Read the rows and write a message for each, the cells as they stand."""
    reader = csv.reader(io.StringIO(parts["data_job"].decode()))
    next(reader)
    for index, url, request in reader:
        orjson.dumps({**JOB, "url": url, "request": request, "targetted_job": index})


def frames(channel: Any, message: Any, run_id: str) -> bytes:
    """A message to a run's queue as AMQP 0-9-1 writes it: frames of method, header and body."""
    method = struct.pack(">HHHBB", 60, 40, 0, 0, len(run_id)) + run_id.encode() + b"\0"
    body = message.body if isinstance(message.body, bytes) else message.body.encode()
    header = struct.pack(">HHQ", 60, 0, len(body)) + message._serialize_properties()
    payloads = enumerate((method, header, body), 1)
    number = channel.channel_id
    return b"".join(struct.pack(">BHI", k, number, len(p)) + p + b"\xce" for k, p in payloads)


def message_of(bench: Bench, orchestrator: Orchestrator, channel: Any) -> Any:
    """The job message of a new run, which is taken out of its queue."""
    bench.post(orchestrator, bench.run(1))
    return channel.basic_get(bench.runs[-1], no_ack=True)


def write_confirmed(wire: socket.socket, one: bytes, count: int) -> None:
    """Write a message `count` times, 5,000 at most ahead of the confirmations, and await these."""
    sent, first, others, rest = 0, 0, set[int](), b""
    while (confirmed := first + len(others)) < count:
        writes = sent < min(count, confirmed + 5000)
        if writes:
            many = min(64, count - sent)
            wire.sendall(one * many)
            sent += many
        if not select.select([wire], [], [], 0 if writes else 60)[0]:
            assert writes, "the broker does not confirm"
            continue
        rest += wire.recv(65536)
        whole = len(rest) // 21 * 21  # each a frame that holds a basic.ack
        for *_, method, tag, multiple, _ in struct.iter_unpack(">BHIHHQBB", rest[:whole]):
            assert method == 80, "the broker refuses a message, or blocks its clients"
            first, others = (tag, {t for t in others if t > tag}) if multiple else (first, others)
            others |= set() if multiple else {tag}
        rest = rest[whole:]


def floor_send(bench: Bench, orchestrator: Orchestrator, count: int) -> tuple[float, float]:
    """Send a job message `count` times. Returns seconds of wall time and of CPU."""
    # By default the client gives up where RabbitMQ, which is flooded here, reads nothing for 1 s.
    patient = {"socket_settings": {socket.TCP_USER_TIMEOUT: 60_000}}
    with Connection(bench.servers.url, transport_options=patient) as connection:
        channel = connection.channel()
        message = message_of(bench, orchestrator, channel)
        channel.confirm_select()
        one, wire = frames(channel, message, bench.runs[-1]), connection.connection.transport.sock
        seconds = timed(write_confirmed, wire, one, count)
    assert bench.ready() == count
    return seconds


def floor_start(bench: Bench, message: Any, jobs: int, run: bytes, config: bytes) -> None:
    """Claim an id, store ten configs, send the jobs, commit; awaits what has to be known before."""
    bench.runs.append(run_id := f"r{os.urandom(5).hex()}")
    for method in ("queue_declare", "exchange_declare"):
        with suppress(NotFound), bench.connection.channel() as channel:
            declare = getattr(channel, method)
            declare(run_id, **{"type": "direct"} if "exchange" in method else {}, passive=True)
    bench.redis.eval(app.Registry.REPLACE, 1, "floor", run_id, "", run)
    pipe = bench.redis.pipeline()
    for index in range(10):
        pipe.set(merge.config_key(run_id, index), config, nx=True)
    pipe.execute()
    with bench.connection.channel() as channel:
        channel.queue_declare(run_id, durable=True, auto_delete=False, nowait=True)
        channel.confirm_select(nowait=True)
        wire = bench.connection.connection.transport.sock
        write_confirmed(wire, frames(channel, message, run_id), jobs)
    assert bench.ready() == jobs
    bench.redis.hset("floor", run_id, run)


def floor_push(queues: "redis.Redis", queue: str, count: int) -> None:
    """Push a job message onto another list of the same Redis `count` times, 500 at once."""
    batch: Any = [queues.lindex(queue, 0)] * 500
    for _ in range(count // 500):
        queues.lpush("floor", *batch)


# The figures


def sending(bench: Bench) -> list[Row]:
    """A run of 20,000 jobs to RabbitMQ."""
    with bench.orchestrator() as orchestrator:
        floor = partial(floor_send, bench, orchestrator, 20_000)
        rows = sent(bench, orchestrator, bench.plain, bench.ready, floor, "RabbitMQ")
    return [
        replace(rows[0], limit=(rows[0].floor or 0) / 1.3, target="1 / 1.3 of the floor"),
        rows[1],
    ]


def sending_embedded(bench: Bench) -> list[Row]:
    """The same to the embedded Valkey; its floor is a copy of one message, again and again."""
    with bench.orchestrator(**dict.fromkeys(bench.environment, "")) as orchestrator:
        store = orchestrator.store()
        port = store.connection_pool.connection_kwargs["port"]
        celery = Celery("plain", broker=f"redis://127.0.0.1:{port}/1", set_as_current=False)
        queues = redis.Redis(port=port, db=1)
        return sent(
            bench,
            orchestrator,
            (celery, store),
            lambda: queues.llen(bench.runs[-1]),
            lambda: timed(floor_push, queues, bench.runs[-1], 20_000),
            "embedded",
        )


def sent(
    bench: Bench,
    orchestrator: Orchestrator,
    plain: tuple[Celery, "redis.Redis"],
    ready: Callable[[], object],
    floor: Callable[[], tuple[float, float]],
    broker: str,
) -> list[Row]:
    """20,000 jobs, a quarter of them the plain way: wall time and CPU, medians of three."""
    jobs, measured = 20_000, []
    bench.post(orchestrator, bench.run(10))
    plain_start(*plain, bench.run(10))
    for _ in range(3):
        used = orchestrator.cpu()
        ours = bench.post(orchestrator, bench.run(jobs)), orchestrator.cpu() - used
        assert ready() == jobs
        least = floor()
        quarter = timed(plain_start, *plain, bench.run(jobs // 4))
        measured.append((*ours, *(4 * seconds for seconds in quarter), *least))
    seconds = medians(measured)
    rate, *rates = (jobs / wall for wall in seconds[::2])
    work, *works = (used / jobs * 1e6 for used in seconds[1::2])
    figure, times = f"jobs sent per second, 20,000 in a run ({broker})", "3 times the plain way"
    return [
        Row(figure, "jobs/s", rate, 3 * rates[0], times, *rates),
        Row(f"client CPU per job sent ({broker})", "µs", work, 15, "", *works),
    ]


def merging(bench: Bench) -> list[Row]:
    """Merge and serialise, in this process: CPU, the best of three."""

    def ours(parts: dict[str, bytes]) -> None:
        jobs = merge.parse_run(parts, "generated", merge.Limits(), agent.ending, app.examine).jobs
        for job in jobs:
            jobs.encode(job)

    def plain(parts: dict[str, bytes]) -> None:
        for job in plain_jobs(parts):
            json.dumps(job)

    def best(way: Callable[[dict[str, bytes]], None], parts: dict[str, bytes]) -> float:
        return min(timed(way, parts)[1] for _ in range(3))

    parts = bench.run(100_000)
    hundred, plainly, floor = best(ours, parts), best(plain, parts), best(floor_merge, parts)
    million = timed(ours, bench.run(1_000_000))[1]
    figure = "merge and serialise 100,000 jobs and rows"
    return [
        Row(figure, "s", hundred, 3 * floor, "3 times the floor", plainly, floor),
        Row("the same for 1,000,000, in times that", "times", million / hundred, 12),
    ]


def dispatch(bench: Bench) -> list[Row]:
    """A POST of ten jobs to a million, each to a new orchestrator: time, and peak memory."""
    way: dict[int, float] = {}  # seconds, by number of jobs
    ours, plain, floor, peak = (way.copy() for _ in range(4))
    for jobs in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        with bench.orchestrator() as orchestrator:
            bench.post(orchestrator, bench.run(10))
            parts = bench.run(jobs)
            ours[jobs] = bench.post(orchestrator, parts)
            peak[jobs] = orchestrator.memory()
            assert bench.ready() == jobs
            with bench.connection.channel() as channel:  # two million are more than it takes
                channel.queue_purge(bench.runs[-1])
            floor[jobs] = timed(floor_merge, parts)[0] + floor_send(bench, orchestrator, jobs)[0]
            if jobs <= 10_000:  # the others take minutes
                plain[jobs] = timed(plain_start, *bench.plain, bench.run(jobs))[0]
    bench.seconds = {"one send_task per job": plain, "this project": ours, "floor": floor}
    times, floor_times = (way[1_000_000] / way[100_000] for way in (ours, floor))
    most = 1.3 * floor[1_000_000], "1.3 times the floor", None, floor[1_000_000]
    growth = max(12, 1.2 * floor_times), "12, or 1.2 times the floor's", None, floor_times
    return [
        Row("POST of 1,000,000 jobs and rows", "s", ours[1_000_000], *most),
        Row("the same, in times that of 100,000", "times", times, *growth),
        Row("the same, peak memory", "MB", peak[1_000_000], 300),
        Row("POST of 100,000 jobs and rows, peak memory", "MB", peak[100_000], 80),
    ]


def small(bench: Bench) -> list[Row]:
    """A small run, again and again."""
    measured = []
    with bench.orchestrator() as orchestrator, bench.connection.channel() as channel:
        message = message_of(bench, orchestrator, channel)
        bench.post(orchestrator, bench.run(100, 10))
        for _ in range(30):
            ours = bench.post(orchestrator, bench.run(100, 10))
            run = bench.redis.hget(app.Registry.RUNS, bench.runs[-1])
            config = bench.redis.get(merge.config_key(bench.runs[-1], 9))
            plain, _ = timed(plain_start, *bench.plain, bench.run(100, 10))
            merged, _ = timed(floor_merge, bench.run(100))
            floor, _ = timed(floor_start, bench, message, 100, run, config)
            measured.append((ours * 1000, plain * 1000, (merged + floor) * 1000))
    ours, plain, floor = medians(measured)
    limit = floor + 10, "10 ms and the floor"
    return [Row("POST of 10 agents and 100 jobs", "ms", ours, *limit, plain, floor)]


def ending(bench: Bench) -> list[Row]:
    """To the first job of two agents, and from the last to the exit of both: medians of three.

    The plain way: two workers from their start, and where they idle from SIGTERM.
    """
    rows = []
    job: Any = {"seconds": [0.5], "every": 1}
    for pool in ("prefork", "solo", "threads"):
        measured = []
        for _ in range(3):
            with bench.orchestrator(AGENT_COMMAND=app.AGENT) as orchestrator:
                bench.post(orchestrator, bench.run(6, 2, SCRIPT, pool, **job))
                answered, processes = time.time(), bench.processes(2)
                last = bench.ended(6)
                ours = min(bench.noted("begins").values()) - answered, exit_of(processes) - last
            with bench.plain_agents(bench.run(6, 2, SCRIPT, pool, **job), 2) as (processes, begun):
                bench.ended(6)
                first = min(bench.noted("begins").values()) - begun
                time.sleep(1)
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                told = time.time()
                measured.append((*ours, first, exit_of(processes) - told))
        begins, leaves, *plain = medians(measured)
        for figure, wait, other in (
            ("200 to the first job begun", begins, plain[0]),
            ("last job to the exit of the last agent", leaves, plain[1]),
        ):
            limit = other + 1, "the plain way and 1 s"
            rows.append(Row(f"{figure} ({pool})", "s", wait, *limit, other))
    return rows


def exit_of(processes: list[psutil.Process]) -> float:
    """When the last of these processes has ended: Unix time."""
    for process in processes:
        process.wait(60)
    return time.time()


def idling(bench: Bench) -> list[Row]:
    """Two agents and two jobs, one of which takes long: when the agent without a job leaves."""
    with bench.orchestrator(AGENT_COMMAND=app.AGENT) as orchestrator:
        bench.post(orchestrator, bench.run(2, 2, SCRIPT, seconds=[1, 20], every=1))
        processes = bench.processes(2)
        ended = bench.ended(1)
        first = int(bench.noted("by")[0])
        wait = exit_of([processes[first]]) - ended
        assert processes[1 - first].is_running() and len(bench.noted("ends")) == 1
    return [Row("an idle agent leaves while another works, after", "s", wait, 10)]


def chatter(bench: Bench) -> list[Row]:
    """8 and 16 agents at work, each at one long job: what the broker has to do for them."""
    rows = []
    for count in (8, 16):
        job: Any = {"seconds": [600], "every": 1}
        before, _ = counted(bench.servers)
        with bench.orchestrator(AGENT_COMMAND=app.AGENT) as orchestrator:
            bench.post(orchestrator, bench.run(count, count, SCRIPT, **job))
            ours = load(bench, bench.processes(count), before)
        with bench.plain_agents(bench.run(count, count, SCRIPT, **job), count) as (processes, _):
            plain = load(bench, processes, before)
        for (figure, wanted), mine, other in zip(LOAD.items(), ours, plain, strict=True):
            rows.append(Row(f"{figure}, {count} agents at work", "", mine, wanted, "", other))
    return rows


LOAD = {"messages delivered per second beside jobs": 0, "queues": 1, "connections per agent": 2}


def load(bench: Bench, processes: list[psutil.Process], before: int) -> tuple[float, float, float]:
    """Messages per second, queues that were not there before, and connections per agent."""
    wait_for("the jobs", lambda: len(bench.noted("by")) == len(processes))
    time.sleep(2)  # for what they tell one another at their start
    begun, (_, first) = time.monotonic(), counted(bench.servers)
    time.sleep(10)
    seconds, (queues, last) = time.monotonic() - begun, counted(bench.servers)
    connections = sum(map(bench.connections, processes))
    return (last - first) / seconds, queues - before, connections / len(processes)


def counted(servers: Servers) -> tuple[int, int]:
    """The queues of the broker, and the messages that it has ever delivered."""
    found = servers.rabbitmqctl(
        "eval",
        """{rabbit_amqqueue:count(), lists:sum([maps:get(messages_delivered_total, C, 0)
        || C <- maps:values(rabbit_global_counters:overview())])}.""",
    )
    queues, delivered = map(int, re.findall("[0-9]+", found))
    return queues, delivered


class LightAgent:
    """An agent without a process: all that one says to Redis and RabbitMQ, and jobs of no time.

    It asks for its end when it has been without a job for the ending's interval.
    """

    def __init__(self, bench: Bench, index: int) -> None:
        run_id = bench.runs[-1]
        os.environ["POD_INDEX"] = str(index)
        self.ending, self.empty = agent.Ending(run_id, {}), 0
        assert self.ending.redis.get(merge.config_key(run_id, index))
        self.connection = Connection(bench.servers.url)
        channel = self.connection.channel()
        Queue(run_id, Exchange(run_id), routing_key=run_id)(channel).declare()
        channel.basic_qos(0, 1, False)
        channel.basic_consume(run_id, callback=self.work)
        self.wire = self.connection.connection.transport.sock
        self.next_look = time.monotonic() + agent.Ending.INTERVAL

    def work(self, message: Any) -> None:
        """A job was delivered."""
        note_job(self.ending, json.loads(message.body))
        message.channel.basic_ack(message.delivery_tag)
        self.empty, self.next_look = 0, time.monotonic() + agent.Ending.INTERVAL

    def leaves(self) -> bool:
        """Whether it has left: it looks when it is time, and twice in a row found nothing."""
        if self.next_look > time.monotonic():
            return False
        self.next_look = time.monotonic() + agent.Ending.INTERVAL
        queued = self.ending.queued(SimpleNamespace(connection=self.connection))
        self.empty = 0 if queued else self.empty + 1
        if self.empty < 2:
            return False
        self.connection.release()
        self.ending.redis.close()
        return True


def work_off(agents: list[LightAgent]) -> None:
    """Let agents do jobs, one after the other, until all have left."""
    with selectors.DefaultSelector() as selector:
        for each in agents:
            selector.register(each.wire, selectors.EVENT_READ, each)
        while keys := list(selector.get_map().values()):
            for key, _ in selector.select(0.01):
                key.data.connection.drain_events(timeout=10)
            for key in keys:
                if key.data.leaves():
                    selector.unregister(key.fileobj)


def fleet(bench: Bench) -> list[Row]:
    """125 to 1,000 light agents, all connected at once, with a large script and five jobs each."""
    sizes, script, measured = (125, 250, 500, 1000), "# a large script\n" * 12_000, []
    for count in sizes:
        with bench.orchestrator() as orchestrator:
            bench.post(orchestrator, bench.run(10))
            _, delivered = counted(bench.servers)
            commands = bench.redis.info("stats")["total_commands_processed"]
            bench.post(orchestrator, bench.run(5 * count, count, script))
            used, begun = orchestrator.cpu(), time.monotonic()
            light = [LightAgent(bench, index) for index in range(count)]
            assert bench.connections(psutil.Process()) > count
            work_off(light)
            wait_for("the end", partial(orchestrator.events, "run succeeded"))
            share = (orchestrator.cpu() - used) / (time.monotonic() - begun) * 100
            commands = bench.redis.info("stats")["total_commands_processed"] - commands
            beside = counted(bench.servers)[1] - delivered - 5 * count
            measured.append((beside, commands, share, orchestrator.memory()))
    figures = (
        ("messages delivered beside jobs", "", 0),
        ("commands to Redis", "", None),
        ("CPU of the orchestrator behind the POST", "% of a core", 5),
        ("peak memory of the orchestrator", "MB", 80),
    )
    rows = []
    for (name, unit, wanted), found in zip(figures, zip(*measured, strict=True), strict=True):
        rows.append(Row(f"{name}, 1,000 agents with 5 jobs each", unit, found[-1], wanted))
        if all(found):
            steepest = max(large / less for less, large in pairwise(found))
            rows.append(Row("the same, in times that of half as many", "times", steepest, 2.1))
    return rows


def looking(bench: Bench) -> list[Row]:
    """GET of a run of a million jobs, in flight and ended, with a thousand failures listed."""
    jobs, settings = 1_000_000, bench.settings
    registry = app.Registry(settings)
    for ended in (0, int(time.time())):
        parts = bench.run(1) | {"data_job": b""}
        parts["configtemplate"] = parts["configtemplate"].replace(b'jobs": 1', b'jobs": 1000000')
        run = merge.parse_run(parts, "", settings, agent.ending, app.examine)
        phase = app.Phase.FINISHED if ended else app.Phase.RUNNING
        record = replace(app.new_record(run, settings), phase=phase, ended=ended)
        registry.enter(app.manifest(run, record, settings), record)
        told = json.dumps({"error": "E" * 500, "agent": 1})
        listed: Any = dict.fromkeys(range(0, jobs, 1000), told)
        bench.redis.hset(registry.key("failures", run.run_id), mapping=listed)
        for name, byte in (("sent", b"\xff"), ("succeeded", b"\xaa"), ("failed", b"\x11")):
            bench.redis.set(registry.key(name, run.run_id), byte * (jobs // 8))
    with bench.orchestrator() as orchestrator:
        seconds = []
        for run_id in bench.runs[-2:]:
            url = f"{orchestrator.url}/bot/start?run_id={run_id}"
            answer = bench.http.get(url).json()
            assert answer["jobs"] == jobs and len(answer["failures"]) == 1000
            seconds.append(statistics.median(timed(bench.http.get, url)[0] for _ in range(30)))
    figure = "GET of a run of 1,000,000 jobs and 1,000 failures"
    named = zip(("in flight", "ended"), seconds, strict=True)
    return [Row(f"{figure}, {name}", "ms", each * 1000, 50) for name, each in named]


def notes(bench: Bench) -> list[Row]:
    """What the ending does for a job that succeeds, in this process: median of 2,000 jobs."""
    ending, taken = agent.Ending("r", {}), []
    for index in range(2000):
        payload: Any = [{"run_id": "r", "targetted_job": index}], {}, {}
        taken.append(timed(note_job, ending, payload)[0])
    assert bench.redis.bitcount(ending.succeeded) == len(taken)
    bench.forget()
    return [Row("notes of a job, in its agent", "ms", statistics.median(taken) * 1000, 1)]


def note_job(ending: agent.Ending, payload: Any) -> None:
    """What the ending does in the course of a job that succeeds."""
    task = SimpleNamespace(request=SimpleNamespace(id=os.urandom(8).hex()))
    assert not ending.settled(SimpleNamespace(payload=payload, delivery_info={}))
    ending.on_begin(task.request.id, payload[0])
    ending.on_success(task)
    ending.on_end(task.request.id, "SUCCESS")


def monitor(bench: Bench) -> list[Row]:
    """500 runs whose jobs nobody takes: one look, in this process."""
    orchestrator = app.Orchestrator(bench.settings)
    for _ in range(500):
        run = merge.parse_run(bench.run(1), "", bench.settings, agent.ending, app.examine)
        orchestrator.start_run(run)
    watching = app.Monitor(orchestrator)
    watching.tick()
    assert not watching.waiting, "Redis or RabbitMQ did not answer the monitor in time"
    running = [each for each, _ in orchestrator.records() if each.phase == app.Phase.RUNNING]
    assert len(running) == 500, f"{len(running)} runs of 500 are in flight"
    wall, used = medians([timed(watching.tick) for _ in range(10)])
    bench.forget()
    return [
        Row("one look at 500 runs in flight", "s", wall, 1),
        Row("CPU of one look a second", "% of a core", used * 100, 5),
    ]


def starting(bench: Bench) -> list[Row]:
    """`import app` and the first answer of /health, medians of three."""
    measured = []
    with bench.orchestrator():
        pass  # compiles what has never been imported
    for _ in range(3):
        with bench.orchestrator() as orchestrator:
            bench.http.get(f"{orchestrator.url}/health").raise_for_status()
            measured.append((orchestrator.cpu(), orchestrator.memory("VmRSS")))
    floors = [floor_import() for _ in range(3)]
    (seconds, resident), (floor, floor_resident) = medians(measured), medians(floors)
    return [
        Row("start of the orchestrator, CPU", "s", seconds, 0.25, "", None, floor),
        Row("the same, resident memory", "MB", resident, 50, "", None, floor_resident),
    ]


def floor_import() -> tuple[float, float]:
    """Import what any such server needs: seconds of CPU, and MB of resident memory."""
    program = "import time, celery.app, kombu, orjson, redis, starlette.applications, uvicorn\n"
    program += "print(time.process_time(), open('/proc/self/status').read())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    return float(told.split()[0]), megabytes(told, "VmRSS")


GROUPS = (
    sending,
    sending_embedded,
    merging,
    dispatch,
    small,
    ending,
    idling,
    looking,
    notes,
    monitor,
    starting,
    chatter,
    fleet,
)


# The table and the picture


def shown(value: float | None, unit: str = "") -> str:
    """A number with three digits that count."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    digits = 0 if value == int(value) else digits
    return f"{value:,.{digits}f} {unit}".strip()


def table(rows: list[Row]) -> str:
    """The figures as Markdown."""
    lines: list[tuple[str, ...]] = [("", "here", "plain way", "floor", "ratio", "wanted")]
    for row in rows:
        unit = "" if row.unit in ("jobs/s", "times") else row.unit
        sign = "at least " if row.unit == "jobs/s" else "at most "
        wanted = sign + (row.target or shown(row.limit, unit)) if row.limit is not None else ""
        wanted += "" if row.met else ": MISSED"
        numbers = (shown(number, unit) for number in (row.ours, row.plain, row.floor))
        lines.append((row.figure, *numbers, row.ratio, wanted))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    text.insert(1, "|".join("-" * (width + 2) for width in widths)[1:-1])
    return "\n".join(f"| {line} |" for line in text).replace("| -", "|--").replace("- |", "--|")


def draw(seconds: dict[str, dict[int, float]]) -> str:
    """Seconds against number of jobs, both logarithmic, as SVG."""

    def x(jobs: float) -> float:
        return 70 + (math.log10(jobs) - 1) * 112

    def y(value: float) -> float:
        return 400 - (math.log10(value) + 3) * 60

    grid = 'stroke="#ddd"/><text'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 460" font-size="13" '
        'font-family="sans-serif" fill="#333"><rect width="680" height="460" fill="white"/>',
        '<text x="70" y="28" font-size="16">Seconds until all jobs of a run are sent</text>',
        '<text x="350" y="445" text-anchor="middle">jobs, each with a row of the CSV</text>',
    ]
    for power in range(1, 7):
        at = f"{x(10**power):.0f}"
        text = f'x="{at}" y="420" text-anchor="middle">{10**power:,}</text>'
        lines.append(f'<path d="M{at} 50v350" {grid} {text}')
    for power in range(-3, 3):
        at = f"{y(10.0**power):.0f}"
        text = f'x="62" y="{at}" dy="4" text-anchor="end">{10.0**power:g}</text>'
        lines.append(f'<path d="M70 {at}h560" {grid} {text}')
    for number, (way, points) in enumerate(seconds.items()):
        colour = ("#c2410c", "#1d4ed8", "#6b7280")[number]
        path = " ".join(f"{x(jobs):.1f},{y(value):.1f}" for jobs, value in points.items())
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="84" y="{62 + 16 * number}" fill="{colour}">{way}</text>')
    return "\n".join([*lines, "</svg>\n"])


def main() -> int:
    """Measure and report. Returns the exit code: 1 where something could not be measured."""
    names = [group.__name__ for group in GROUPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=names, action="append", help="measure this group only")
    chosen = parser.parse_args().only or names
    rows: list[Row] = []
    failed = 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # RabbitMQ and Redis inherit it
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        servers = Servers(Path(folder))
        try:
            servers.start_redis()
            servers.start_rabbitmq()
            bench = Bench(servers)
            for group in (group for group in GROUPS if group.__name__ in chosen):
                begun = time.monotonic()
                try:
                    rows += group(bench)
                except (AssertionError, OSError, redis.RedisError, httpx.HTTPError) as error:
                    failed = 1
                    print(f"{group.__name__} could not be measured: {error}", file=sys.stderr)
                print(f"{group.__name__}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
        finally:
            servers.stop()
    print(table(rows))
    results = HERE / "bench-results"
    results.mkdir(exist_ok=True)
    content = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "figures": [{**asdict(row), "met": row.met} for row in rows],
        "seconds": bench.seconds,
    }
    (results / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    if bench.seconds:
        (HERE / "example" / "bench.svg").write_text(draw(bench.seconds))
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: what this project costs, next to the plain way and to the least it could cost.

Starts a RabbitMQ, a Redis and orchestrators of its own, measures, prints one table, writes it to
`bench-results/bench.json` and draws `example/bench.svg`. `--only NAME` measures one group.

The plain way is what one would write with Celery alone: dicts merged row by row, one `send_task`
per job, on a connection that is kept; its agents are plain Celery workers, and are told to go. The
floor of merging is `csv.reader` and an `orjson.dumps` per row; that of sending is the same bytes,
made beforehand, written to the socket, with one confirmation at the end. CPU is user and system
time; a MB is 10**6 bytes. Redis writes to its disk before it answers, as it does in the chart.
"""

import argparse
import csv
import io
import json
import math
import os
import platform
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import psutil
import redis
from celery import Celery
from kombu import Connection

import agent
import app
import merge
from test_app import RABBITMQ, Servers, answers, free_port, wait_for

HERE = Path(__file__).parent
JOB = {
    "url": "https://example.org/",
    "request": {"method": "GET", "timeout_seconds": 5, "headers": {"Accept": "text/html"}},
    "proxy": {"proxy_location": "US", "verify_ip": 1},
    "steps": ["open", "wait", "save"],
    "tags": ["a", "b"],
}
#: Notes the agents' processes, and when every so manieth job begins and ends.
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
        store.hset("by:" + run_id, number, index)
    time.sleep(job["seconds"][number % len(job["seconds"])])
    if noted:
        store.hset("ends:" + run_id, number, time.time())
"""


@dataclass(frozen=True)
class Row:
    """One figure. A rate is wanted at `limit` or above, everything else at or below it."""

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


class Orchestrator:
    """An orchestrator in a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        port, self.log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{port}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS", "RABBIT"))}
        kept |= {"HOST": "127.0.0.1", "PORT": str(port), "AGENT_LOGS": str(folder)}
        # An empty value lets Python keep what it compiles, as it does by default.
        kept |= {"LOG_FORMAT": "json", "PYTHONDONTWRITEBYTECODE": ""}
        with self.log.open("wb") as log:
            command = [sys.executable, str(HERE / "app.py")]
            self.process = psutil.Popen(command, env=kept | environment, stdout=log, stderr=log)
        wait_for("the orchestrator", lambda: answers(port) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def memory(self, what: str = "VmHWM") -> float:
        """MB of resident memory: VmHWM, its peak, or VmRSS, as it is now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6

    def store(self) -> int:
        """The port of its Redis."""
        lines = map(json.loads, self.log.read_text().splitlines())
        [address] = [line["redis"] for line in lines if "redis" in line]
        return int(address.split(":")[1])


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

    def noted(self, name: str) -> dict[int, float]:
        """What the last run's agents have noted: `pids` by agent, `by` and `ends` by job."""
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
            own = self.environment | {"AGENT_COMMAND": ""} | environment
            made = Orchestrator(Path(folder), own)
            try:
                yield made
            finally:
                made.process.terminate()
                made.process.wait(60)
                self.forget()

    @contextmanager
    def plain_agents(self, parts: dict[str, bytes], count: int) -> Iterator[list[psutil.Process]]:
        """A run of the plain way, with agents that nobody has told when to end."""
        plain_start(*self.plain, parts)
        own = {
            "REDIS_HOST_VAR_ENV": "127.0.0.1",
            "REDIS_PORT_VAR_ENV": self.environment["REDIS_PORT"],
        }
        own |= {**os.environ, "RUN_ID": self.runs[-1], "RABBITMQ_URL": self.servers.url}
        command = [sys.executable, str(HERE / "agent.py")]
        started = []
        for index in range(count):
            indexed, null = own | {"POD_INDEX": str(index)}, subprocess.DEVNULL
            started.append(psutil.Popen(command, env=indexed, stdout=null, stderr=null))
        try:
            yield self.processes(count)
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


def frames(channel: Any, message: Any, queue: str) -> bytes:
    """A message to a queue as AMQP 0-9-1 writes it: frames of method, header and body."""
    method = struct.pack(">HHHBB", 60, 40, 0, 0, len(queue)) + queue.encode() + b"\0"
    body = message.body if isinstance(message.body, bytes) else message.body.encode()
    header = struct.pack(">HHQ", 60, 0, len(body)) + message._serialize_properties()
    payloads = enumerate((method, header, body), 1)
    number = channel.channel_id
    return b"".join(struct.pack(">BHI", k, number, len(p)) + p + b"\xce" for k, p in payloads)


def floor_send(bench: Bench, count: int) -> tuple[float, float]:
    """Write a job message `count` times. Returns seconds of wall time and of CPU."""
    plain_start(*bench.plain, bench.run(1))
    queue = bench.runs[-1]
    wait_for("the message", bench.ready)
    # By default the client gives up where RabbitMQ, which is flooded here, reads nothing for 1 s.
    patient = {"socket_settings": {socket.TCP_USER_TIMEOUT: 60_000}}
    with Connection(bench.servers.url, transport_options=patient) as connection:
        channel = connection.channel()
        message = channel.basic_get(queue, no_ack=True)
        one, write = frames(channel, message, queue), connection.connection.transport.write

        def send() -> None:
            for _ in range((count - 1) // 64):
                write(one * 64)
            write(one * ((count - 1) % 64))
            channel.basic_publish_confirm(message, routing_key=queue)

        seconds = timed(send)
    assert bench.ready() == count
    return seconds


def floor_push(queues: "redis.Redis", queue: str, count: int) -> None:
    """Push a job message onto another list of the same Redis `count` times, 500 at once."""
    batch: Any = [queues.lindex(queue, 0)] * 500
    for _ in range(count // 500):
        queues.lpush("floor", *batch)


# The figures


def sending(bench: Bench) -> list[Row]:
    """20,000 jobs: wall time and the client's CPU, medians of three."""
    jobs = 20_000
    measured = []
    with bench.orchestrator() as orchestrator:
        bench.post(orchestrator, bench.run(10))
        for _ in range(3):
            used = orchestrator.cpu()
            ours = bench.post(orchestrator, bench.run(jobs)), orchestrator.cpu() - used
            assert bench.ready() == jobs
            plain = timed(plain_start, *bench.plain, bench.run(jobs))
            measured.append((*ours, *plain, *floor_send(bench, jobs)))
    return sent("RabbitMQ", jobs, measured)


def sending_embedded(bench: Bench) -> list[Row]:
    """The same where the broker is the embedded Valkey."""
    jobs = 20_000
    measured = []
    with bench.orchestrator(**dict.fromkeys(bench.environment, "")) as orchestrator:
        port = orchestrator.store()
        store, queues = redis.Redis(port=port), redis.Redis(port=port, db=1)
        celery = Celery("plain", broker=f"redis://127.0.0.1:{port}/1", set_as_current=False)
        bench.post(orchestrator, bench.run(10))
        plain_start(celery, store, bench.run(10))
        for _ in range(3):
            used = orchestrator.cpu()
            ours = bench.post(orchestrator, bench.run(jobs)), orchestrator.cpu() - used
            assert queues.llen(bench.runs[-1]) == jobs
            plain = timed(plain_start, celery, store, bench.run(jobs))
            measured.append((*ours, *plain, *timed(floor_push, queues, bench.runs[-1], jobs)))
    return sent("embedded", jobs, measured)


def sent(broker: str, jobs: int, measured: Sequence[tuple[float, ...]]) -> list[Row]:
    """Wall time and CPU of this project, the plain way and the floor, as rows."""
    seconds = medians(measured)
    rate, plain_rate, floor_rate = (jobs / wall for wall in seconds[::2])
    work, *works = (used / jobs * 1e6 for used in seconds[1::2])
    times = "3 times the plain way"
    figure = f"jobs sent per second, 20,000 in a run ({broker})"
    return [
        Row(figure, "jobs/s", rate, 3 * plain_rate, times, plain_rate, floor_rate),
        Row(f"client CPU per job sent ({broker})", "µs", work, None, "", *works),
    ]


def merging(bench: Bench) -> list[Row]:
    """Merge and serialise, in this process: CPU, the best of three."""

    def ours(parts: dict[str, bytes]) -> None:
        jobs = merge.parse_run(parts, "generated", merge.Limits()).jobs
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
        Row(figure, "s", hundred, 5 * floor, "5 times the floor", plainly, floor),
        Row("the same for 1,000,000, in times that", "", million / hundred, 12),
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
        if jobs <= 100_000:  # a million takes minutes
            floor[jobs] = timed(floor_merge, parts)[0] + floor_send(bench, jobs)[0]
            plain[jobs] = timed(plain_start, *bench.plain, bench.run(jobs))[0]
        bench.forget()
    bench.seconds = {"one send_task per job": plain, "this project": ours, "floor": floor}
    times = ours[1_000_000] / ours[100_000]
    return [
        Row("POST of 1,000,000 jobs and rows", "s", ours[1_000_000]),
        Row("the same, in times that of 100,000", "", times, 12),
        Row("the same, peak memory", "MB", peak[1_000_000], 300),
        Row("POST of 100,000 jobs and rows, peak memory", "MB", peak[100_000]),
    ]


def agents(bench: Bench) -> list[Row]:
    """A thousand agents that get one large script."""
    script = "# a large script\n" * (200_000 // 17)
    with bench.orchestrator() as orchestrator:
        seconds = bench.post(orchestrator, bench.run(1, 1000, script))
        assert bench.redis.strlen(f"{bench.runs[-1]}999") > len(script)
        peak = orchestrator.memory()
    figure = "POST of 1,000 agents with a 200 KB script"
    return [Row(figure, "s", seconds), Row("the same, peak memory", "MB", peak)]


def small(bench: Bench) -> list[Row]:
    """A small run, again and again."""
    measured = []
    with bench.orchestrator() as orchestrator:
        bench.post(orchestrator, bench.run(100, 10))
        for _ in range(30):
            ours = bench.post(orchestrator, bench.run(100, 10))
            plain, _ = timed(plain_start, *bench.plain, bench.run(100, 10))
            merged, _ = timed(floor_merge, bench.run(100))
            measured.append((ours, plain, merged + floor_send(bench, 100)[0]))
    ours, *others = (seconds * 1000 for seconds in medians(measured))
    return [Row("POST of 10 agents and 100 jobs", "ms", ours, None, "", *others)]


def ending(bench: Bench) -> list[Row]:
    """From the last job to the exit of the last of two agents, medians of three.

    The plain way: two workers that idle, from SIGTERM to the exit of the last.
    """
    rows = []
    job: Any = {"seconds": [0.5], "every": 1}
    for pool in ("prefork", "solo", "threads"):
        ours, plain = [], []
        for _ in range(3):
            with bench.orchestrator(AGENT_COMMAND=app.AGENT) as orchestrator:
                bench.post(orchestrator, bench.run(6, 2, SCRIPT, pool, **job))
                processes = bench.processes(2)
                last = bench.ended(6)
                ours.append(exit_of(processes) - last)
            with bench.plain_agents(bench.run(6, 2, SCRIPT, pool, **job), 2) as processes:
                bench.ended(6)
                time.sleep(1)
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                told = time.time()
                plain.append(exit_of(processes) - told)
        wait, plain_wait = statistics.median(ours), statistics.median(plain)
        figure = f"last job to the exit of the last agent ({pool})"
        rows.append(Row(figure, "s", wait, plain_wait + 1, "the plain way and 1 s", plain_wait))
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
    manage = management(bench.servers)
    rows = []
    for count in (8, 16):
        job: Any = {"seconds": [600], "every": 1}
        with bench.orchestrator(AGENT_COMMAND=app.AGENT) as orchestrator:
            before = len(manage("queues"))
            bench.post(orchestrator, bench.run(count, count, SCRIPT, **job))
            ours = load(bench, manage, bench.processes(count), before)
        before = len(manage("queues"))
        with bench.plain_agents(bench.run(count, count, SCRIPT, **job), count) as processes:
            plain = load(bench, manage, processes, before)
        for (figure, wanted), mine, other in zip(LOAD.items(), ours, plain, strict=True):
            rows.append(Row(f"{figure}, {count} agents at work", "", mine, wanted, "", other))
    return rows


LOAD = {"messages delivered per second beside jobs": 0, "queues": 1, "connections per agent": 2}


def load(
    bench: Bench, manage: Callable[[str], Any], processes: list[psutil.Process], before: int
) -> tuple[float, float, float]:
    """Messages per second, queues that were not there before, and connections per agent."""
    wait_for("the jobs", lambda: len(bench.noted("by")) == len(processes))
    time.sleep(8)  # the statistics are five seconds old at most
    delivered, seconds = [], 10
    for pause in (seconds, 0):
        delivered.append(manage("overview")["message_stats"]["deliver_get"])
        time.sleep(pause)
    port = bench.servers.amqp_port
    found = [c for p in processes for c in p.net_connections() if c.raddr and c.raddr.port == port]
    rate = (delivered[1] - delivered[0]) / seconds
    return rate, len(manage("queues")) - before, len(found) / len(processes)


def management(servers: Servers) -> Callable[[str], Any]:
    """Enable RabbitMQ's management plugin. Returns what asks its HTTP API."""
    port = free_port()
    listener = f'[{{port, {port}}}, {{ip, "127.0.0.1"}}], [{{persistent, true}}]'
    servers.rabbitmqctl(
        "eval", f"application:set_env(rabbitmq_management, tcp_config, {listener})."
    )
    command = [str(RABBITMQ.with_name("rabbitmq-plugins")), "enable", "rabbitmq_management"]
    subprocess.run(command, env=servers.environment, check=True, stdout=subprocess.DEVNULL)
    client = httpx.Client(auth=("guest", "guest"))
    return lambda what: client.get(f"http://127.0.0.1:{port}/api/{what}").json()


def looking(bench: Bench) -> list[Row]:
    """GET of a run of a million jobs, in flight and ended, with a thousand failures listed."""
    jobs, settings = 1_000_000, bench.settings
    registry = app.Registry(settings)
    for ended in (0, int(time.time())):
        parts = bench.run(1) | {"data_job": b""}
        parts["configtemplate"] = parts["configtemplate"].replace(b'jobs": 1', b'jobs": 1000000')
        run = merge.parse_run(parts, "", settings.limits)
        phase = app.Phase.FINISHED if ended else app.Phase.RUNNING
        record = replace(app.new_record(run, 60), phase=phase, ended=ended)
        registry.enter(app.manifest(run, record, settings), record)
        told = json.dumps({"error": "E" * 500, "agent": 1})
        listed: Any = dict.fromkeys(range(0, jobs, 1000), told)
        bench.redis.hset(registry.note("failures", run.run_id), mapping=listed)
        for name, byte in (("sent", b"\xff"), ("succeeded", b"\xaa"), ("failed", b"\x11")):
            bench.redis.set(registry.note(name, run.run_id), byte * (jobs // 8))
    with bench.orchestrator() as orchestrator:
        seconds = []
        for run_id in bench.runs[-2:]:
            url = f"{orchestrator.url}/bot/start?run_id={run_id}"
            answer = bench.http.get(url).json()
            assert answer["jobs"] == jobs and len(answer["failures"]) == 1000
            seconds.append(statistics.median(timed(bench.http.get, url)[0] for _ in range(30)))
    figure = "GET of a run of 1,000,000 jobs and 1,000 failures"
    return [
        Row(f"{figure}, in flight", "ms", seconds[0] * 1000, 50),
        Row(f"{figure}, ended", "ms", seconds[1] * 1000, 50),
    ]


def notes(bench: Bench) -> list[Row]:
    """What the ending does for a job that succeeds, in this process: median of 2,000 jobs."""
    host, port = bench.environment["REDIS_HOST"], bench.environment["REDIS_PORT"]
    os.environ |= {"REDIS_HOST_VAR_ENV": host, "REDIS_PORT_VAR_ENV": port}
    ending, taken = agent.Ending("r", {}), []
    for index in range(2000):
        arguments = [{"run_id": "r", "targetted_job": index}]
        message = SimpleNamespace(payload=(arguments, {}, {}), delivery_info={})
        task = SimpleNamespace(request=SimpleNamespace(id=str(index)))
        begun = time.perf_counter()
        assert not ending.settled(message)
        ending.on_begin(str(index), arguments)
        ending.on_success(task)
        ending.on_end(str(index), "SUCCESS")
        taken.append(time.perf_counter() - begun)
    assert bench.redis.bitcount(ending.succeeded) == len(taken)
    bench.forget()
    return [Row("notes of a job, in its agent", "ms", statistics.median(taken) * 1000, 1)]


def monitor(bench: Bench) -> list[Row]:
    """500 runs whose jobs nobody takes: one look, in this process."""
    orchestrator = app.Orchestrator(bench.settings)
    for _ in range(500):
        run = merge.parse_run(bench.run(1), "", bench.settings.limits, agent.ending)
        orchestrator.start_run(run)
    watching = app.Monitor(orchestrator)
    watching.tick()
    assert len(watching.watches) == 500 and not watching.waiting
    wall, used = medians([timed(watching.tick) for _ in range(10)])
    bench.forget()
    return [
        Row("one look at 500 runs in flight", "s", wall, 1),
        Row("CPU of one look a second", "% of a core", used * 100, 10),
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
    seconds, resident = medians(measured)
    return [
        Row("start of the orchestrator, CPU", "s", seconds, 0.6),
        Row("the same, resident memory", "MB", resident, 60),
    ]


GROUPS = (
    sending,
    sending_embedded,
    merging,
    dispatch,
    agents,
    small,
    ending,
    idling,
    looking,
    notes,
    monitor,
    starting,
    chatter,  # the last, since it puts the management plugin into the server
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
    lines: list[tuple[str, ...]] = [("", "here", "plain way", "floor", "wanted")]
    for row in rows:
        unit = "" if row.unit == "jobs/s" else row.unit
        sign = "at least " if row.unit == "jobs/s" else "at most "
        wanted = sign + (row.target or shown(row.limit, unit)) if row.limit is not None else ""
        numbers = (shown(number, unit) for number in (row.ours, row.plain, row.floor))
        lines.append((row.figure, *numbers, wanted + (": MISSED" if not row.met else "")))
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
        for jobs, value in points.items():
            title = f"<title>{way}: {jobs:,} jobs in {shown(value)} s</title>"
            spot = f'cx="{x(jobs):.1f}" cy="{y(value):.1f}" r="4" fill="{colour}"'
            lines.append(f"<circle {spot}>{title}</circle>")
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
                except (AssertionError, httpx.HTTPError) as error:
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

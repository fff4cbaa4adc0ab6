"""`make bench`: what this project costs, next to the plain way and to the least it could cost.

Starts a RabbitMQ, a Redis and orchestrators of its own, measures, prints one table, writes it to
`bench-results/bench.json` and draws `example/bench.svg`. `--only NAME` measures one group.

The plain way is what one would write with Celery alone: dicts merged row by row, one `send_task`
per job, on a connection that is kept. The floor of merging is `csv.reader` and an `orjson.dumps`
per row; that of sending is the same bytes, made beforehand, written to the socket, with one
confirmation at the end. CPU is user and system time; a MB is 10**6 bytes.
"""

import argparse
import csv
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import amqp
import httpx
import orjson
import psutil
import redis
from celery import Celery
from kombu import Connection
from kombu.pidbox import Mailbox

import app
import merge
from settings import Settings
from test_app import Orchestrator, Servers, form, new_run_id, real, wait_for

HERE = Path(__file__).parent
TASK = "tasks.consume_message"
INTERVAL = 1.0  #: seconds between two ticks of the monitor, as it is by default

JOB = {
    "url": "https://example.org/",
    "request": {"method": "GET", "timeout_seconds": 5, "headers": {"Accept": "text/html"}},
    "proxy": {"proxy_location": "US", "verify_ip": 1},
    "steps": ["open", "wait", "save"],
    "tags": ["a", "b"],
}
NOTES_ENDS = """
import os, time
import redis
results = redis.Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]))

@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    time.sleep(1)
    results.rpush("ends:" + job["run_id"], time.time())
"""


@dataclass(frozen=True)
class Row:
    """One figure. It is met at or below `limit`, a rate at or above it."""

    figure: str
    unit: str
    ours: float
    limit: float
    target: str = ""  #: what the limit is, where it is no plain number
    plain: float | None = None
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is what it should be."""
        return self.ours >= self.limit if self.unit == "jobs/s" else self.ours <= self.limit

    @property
    def ratio(self) -> float | None:
        """How many times better than the plain way."""
        if self.plain is None:
            return None
        return self.ours / self.plain if self.unit == "jobs/s" else self.plain / self.ours


class Bench:
    """The servers, the clients that the bench has of them, and what the picture shows."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.http = httpx.Client(timeout=600)
        self.redis = redis.Redis(port=servers.redis_port)
        self.connection = Connection(servers.url)
        self.celery = Celery("plain", broker=servers.url, set_as_current=False)
        self.seconds: dict[str, dict[int, float]] = {}  #: by way and number of jobs
        self.runs: list[str] = []
        plain_start(self, self.run(10))  # connects, and imports what Celery imports late

    def run(self, jobs: int, agents: int = 1, script: str = "pass\n") -> dict[str, bytes]:
        """The parts of a POST of a new run, `runs[-1]`, with a CSV row per job."""
        self.runs.append(new_run_id())
        counts = {"number_of_jobs": jobs, "number_of_agents": agents, "run_id": self.runs[-1]}
        rows = "".join(
            f'{i},https://example.org/{i},"{{""headers"": {{""X-Number"": ""{i}""}}}}"\n'
            for i in range(jobs)
        )
        rows = "targetted_job,url,request\n" + rows
        return form(run=counts, job=JOB, jobs_csv=rows, script=script)

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

    @contextmanager
    def orchestrator(self, **environment: str) -> Iterator[Orchestrator]:
        """A new orchestrator. At the end nothing is left of it or its runs."""
        with tempfile.TemporaryDirectory() as folder:
            # An empty value lets Python keep what it compiles, as it does by default.
            environment |= {**real(self.servers), "PYTHONDONTWRITEBYTECODE": ""}
            made = Orchestrator(environment, Path(folder) / "log")
            made.start()
            try:
                yield made
            finally:
                made.stop()
                self.forget()

    def forget(self) -> None:
        """Delete all queues and keys."""
        with self.connection.channel() as channel:
            for run_id in self.runs:
                channel.queue_delete(run_id)
        self.runs.clear()
        self.redis.flushall()


def cpu(orchestrator: Orchestrator) -> float:
    """Seconds of CPU that an orchestrator has used."""
    assert orchestrator.process is not None
    times = psutil.Process(orchestrator.process.pid).cpu_times()
    return float(times.user + times.system)


def memory(orchestrator: Orchestrator, what: str = "VmHWM") -> float:
    """MB of resident memory: VmHWM, its peak, or VmRSS, as it is now."""
    assert orchestrator.process is not None
    status = Path(f"/proc/{orchestrator.process.pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


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


def plain_start(bench: Bench, parts: dict[str, bytes]) -> None:
    """Store the configs and send the jobs of a run."""
    template = json.loads(parts["configtemplate"])
    run = template["run_message"]
    for index in range(run["number_of_agents"]):
        config = {**template["default_agent_message"], "code": parts["python_code"].decode()}
        config |= {"run_id": run["run_id"], "targetted_agent": index}
        bench.redis.set(f"{run['run_id']}{index}", json.dumps(config))
    for job in plain_jobs(parts):
        bench.celery.send_task(TASK, args=[job], queue=run["run_id"])


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
    plain_start(bench, bench.run(1))
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


# The figures


def sending(bench: Bench) -> list[Row]:
    """20,000 jobs: wall time and the client's CPU, medians of three."""
    jobs = 20_000
    measured = []
    with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
        bench.post(orchestrator, bench.run(10))
        for _ in range(3):
            used = cpu(orchestrator)
            ours = bench.post(orchestrator, bench.run(jobs)), cpu(orchestrator) - used
            assert bench.ready() == jobs
            plain = timed(plain_start, bench, bench.run(jobs))
            measured.append((*ours, *plain, *floor_send(bench, jobs)))
    seconds = medians(measured)
    rate, plain_rate, floor_rate = (jobs / wall for wall in seconds[::2])
    work, plain_work, floor_work = (used / jobs * 1e6 for used in seconds[1::2])
    times, seventh = "4 times the plain way", "a seventh of the plain way"
    figure = "jobs sent, 20,000 in a run"
    return [
        Row(figure, "jobs/s", rate, 4 * plain_rate, times, plain_rate, floor_rate),
        Row("client CPU per job sent", "µs", work, plain_work / 7, seventh, plain_work, floor_work),
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
    large, plainly, floor = (best(way, parts) for way in (ours, plain, floor_merge))
    small = best(ours, bench.run(10_000))
    figure = "merge and serialise, 100,000 jobs and rows"
    return [
        Row(figure, "s", large, 4 * floor, "4 times the floor", plainly, floor),
        Row("the same, in times that of 10,000", "", large / small, 12),
    ]


def dispatch(bench: Bench) -> list[Row]:
    """A POST of ten jobs to a million, each to a new orchestrator: time, and peak memory."""
    way: dict[int, float] = {}  # seconds, by number of jobs
    ours, plain, floor, peak = (way.copy() for _ in range(4))
    for jobs in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
            bench.post(orchestrator, bench.run(10))
            parts = bench.run(jobs)
            ours[jobs] = bench.post(orchestrator, parts)
            peak[jobs] = memory(orchestrator)
            assert bench.ready() == jobs
        if jobs <= 100_000:  # a million takes minutes
            floor[jobs] = timed(floor_merge, parts)[0] + floor_send(bench, jobs)[0]
            plain[jobs] = timed(plain_start, bench, bench.run(jobs))[0]
        bench.forget()
    bench.seconds = {"one send_task per job": plain, "this project": ours, "floor": floor}
    return [
        Row("POST of 1,000,000 jobs and rows, peak memory", "MB", peak[1_000_000], 600),
        Row("POST of 100,000 jobs and rows, peak memory", "MB", peak[100_000], 200),
    ]


def agents(bench: Bench) -> list[Row]:
    """A thousand agents that get one large script."""
    script = "# a large script\n" * (200_000 // 17)
    with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
        bench.post(orchestrator, bench.run(1, 1000, script))
        assert bench.redis.strlen(f"{bench.runs[-1]}999") > len(script)
        peak = memory(orchestrator)
    return [Row("1,000 agents with a 200 KB script, peak memory", "MB", peak, 150)]


def small(bench: Bench) -> list[Row]:
    """A small run, again and again."""
    measured = []
    with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
        bench.post(orchestrator, bench.run(100, 10))
        for _ in range(30):
            ours = bench.post(orchestrator, bench.run(100, 10))
            plain, _ = timed(plain_start, bench, bench.run(100, 10))
            merged, _ = timed(floor_merge, bench.run(100))
            measured.append((ours, plain, merged + floor_send(bench, 100)[0]))
    ours, plain, floor = (seconds * 1000 for seconds in medians(measured))
    figure, tenth = "POST of 10 agents and 100 jobs", "a tenth of the plain way"
    return [
        Row(f"{figure}, agents not counted", "ms", ours, 20, "", plain, floor),
        Row("the same, against the plain way", "ms", ours, plain / 10, tenth, plain, floor),
    ]


def ending(bench: Bench) -> list[Row]:
    """From the end of the last job to that of the last agent: two agents, median of five runs."""
    waits = []
    with bench.orchestrator() as orchestrator:

        def ends() -> list[float]:
            return [float(end) for end in bench.redis.lrange(f"ends:{bench.runs[-1]}", 0, -1)]

        for _ in range(5):
            bench.post(orchestrator, bench.run(6, 2, NOTES_ENDS))
            wait_for("the last agent's exit", lambda: len(ends()) == 6 and not orchestrator.pids())
            waits.append(time.time() - max(ends()))
    figure = "from the end of the last job to the exit of the last agent"
    return [Row(figure, "s", statistics.median(waits), 5)]


def monitor(bench: Bench) -> list[Row]:
    """500 runs whose jobs nobody takes: CPU of the orchestrator, and a monitor's ticks."""
    seconds = 20
    with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
        for _ in range(500):
            bench.post(orchestrator, bench.run(1))
        time.sleep(3 * INTERVAL)
        used = cpu(orchestrator)
        time.sleep(seconds)
        share = (cpu(orchestrator) - used) / seconds * 100
        watching = taken_over(bench, orchestrator, 500)
        tick = statistics.median(timed(watching.tick)[0] for _ in range(5))
    return [
        Row("monitor tick with 500 runs in flight", "s", tick, 1),
        Row("the same, CPU of the orchestrator", "% of a core", share, 10),
    ]


def taken_over(bench: Bench, orchestrator: Orchestrator, runs: int) -> app.Monitor:
    """A monitor in this process, which has taken over the runs of an orchestrator."""
    assert orchestrator.process is not None
    orchestrator.process.kill()
    orchestrator.process.wait()
    for owner in bench.redis.keys("armada:owner:*"):  # else it is waited for
        bench.redis.delete(owner)
    seen: set[str] = set()

    def note(record: logging.LogRecord) -> bool:
        seen.add(getattr(record, "fields", {}).get("run_id", ""))
        return False

    log = logging.getLogger("armada")
    log.addFilter(note)
    log.setLevel(logging.INFO)
    settings = Settings.read({**real(bench.servers), "AGENT_COMMAND": ""})
    watching = app.Monitor(app.Orchestrator(settings))
    watching.tick()  # takes them over, and logs the progress of each
    watching.tick()
    log.removeFilter(note)
    assert len(seen) == runs, f"the monitor looked at {len(seen)} runs of {runs}"
    return watching


def draining(bench: Bench) -> list[Row]:
    """A thousand workers, simulated in one process: ticks from the last job until all have left."""
    with bench.orchestrator(AGENT_COMMAND="") as orchestrator:
        bench.post(orchestrator, bench.run(3000, 1000))
        watching = taken_over(bench, orchestrator, 1)
        spawn = multiprocessing.get_context("spawn")
        done = spawn.Semaphore(0)
        given = bench.servers.url, bench.runs[-1], 1000, done
        workers = spawn.Process(target=work_and_leave, args=given, daemon=True)
        workers.start()
        for _ in range(3000):
            assert done.acquire(timeout=60), "the simulated workers do not work"
        ticks = 0
        while workers.is_alive():
            assert ticks < 30, "the workers have not been told to stop"
            watching.tick()
            ticks += 1
            workers.join(INTERVAL)
    assert workers.exitcode == 0
    return [Row("a drained run with 1,000 workers recognised and stopped", "ticks", ticks, 3)]


def work_and_leave(url: str, run_id: str, count: int, done: Any) -> None:
    """Be the workers of a run: do its jobs, answer, leave when told. `done` is a semaphore."""
    mailbox = Mailbox(merge.control_exchange(run_id), type="fanout")
    working: dict[str, Any] = {}  # consumer tag of the mailbox, by name
    held: list[Any] = []
    ready = False  # until all workers are there, each holds its first job
    # Answers go over a second connection: waiting there must not take the next question.
    with Connection(url) as connection, Connection(url) as answering:
        channel, answers = connection.channel(), answering.channel()
        channel.basic_qos(0, 1, False)

        def finish() -> None:
            while held:
                channel.basic_ack(held.pop().delivery_tag)
                done.release()

        def work(message: Any) -> None:
            held.append(message)
            if ready:
                finish()

        def leave(name: str) -> None:
            if name in working:
                channel.basic_cancel(name, nowait=True)
                channel.basic_cancel(working.pop(name), nowait=True)

        def reply(data: dict[str, Any], exchange: str, routing_key: str, ticket: str) -> None:
            # As kombu does it, for less: a thousand workers have more than one core.
            properties = {"content_type": "application/json", "content_encoding": "utf-8"}
            headers = {"ticket": ticket, "clock": 1}
            message = amqp.Message(json.dumps(data), application_headers=headers, **properties)
            answers.basic_publish(message, exchange, routing_key)

        handlers: dict[str, Any] = {"shutdown": leave}
        handlers |= dict.fromkeys(("active", "reserved", "scheduled"), lambda name: [])
        for name in (f"celery@worker{index}" for index in range(count)):
            node = mailbox.Node(name, name, answers, handlers)
            node.reply = reply
            [working[name]] = node.listen(channel)._active_tags.values()
        for name in working:
            channel.basic_consume(run_id, callback=work, consumer_tag=name)
        ready = True
        finish()
        while working:
            connection.drain_events(timeout=60)


def starting(bench: Bench) -> list[Row]:
    """`import app` and the first answer of /health, medians of three."""
    measured = []
    with bench.orchestrator():
        pass  # compiles what has never been imported
    for _ in range(3):
        with bench.orchestrator() as orchestrator:
            bench.http.get(f"{orchestrator.url}/health").raise_for_status()
            measured.append((cpu(orchestrator), memory(orchestrator, "VmRSS")))
    seconds, resident = medians(measured)
    return [
        Row("import app and first answer of /health, CPU", "s", seconds, 0.6),
        Row("the same, resident memory", "MB", resident, 60),
    ]


GROUPS = (sending, merging, dispatch, agents, small, ending, monitor, draining, starting)


# The table and the picture


def shown(value: float | None) -> str:
    """A number with three digits that count."""
    if value is None:
        return ""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value))) if value else 0}f}"


def table(rows: list[Row]) -> str:
    """The figures as Markdown."""
    lines = [("figure", "this project", "plain way", "ratio", "floor", "target", "met")]
    for row in rows:
        sign = "at least" if row.unit == "jobs/s" else "at most"
        target = f"{sign} {row.target or shown(row.limit)}"
        numbers = f"{shown(row.ours)} {row.unit}", shown(row.plain), shown(row.ratio)
        met = "yes" if row.met else "MISSED"
        lines.append((row.figure, *numbers, shown(row.floor), target, met))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in text)


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
        "figures": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows],
        "seconds": bench.seconds,
    }
    (results / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    if bench.seconds:
        (HERE / "example" / "bench.svg").write_text(draw(bench.seconds))
    return failed


if __name__ == "__main__":
    sys.exit(main())

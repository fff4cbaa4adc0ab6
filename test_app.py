"""What the orchestrator does, in the order of a run's life. Real servers, real agents.

Tests look at what landed: in Redis, in the queue, in the process table.
"""

import base64
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import resource
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
from dataclasses import dataclass, field, replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx
import kubernetes_validate  # type: ignore[import-untyped]
import orjson
import psutil
import pytest
import redis
import yaml
from celery import Celery
from celery.utils.saferepr import saferepr
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kombu import Connection

import broker as broker_module
import fleet
import merge
import registry
from merge import Invalid, Json, Limits, Run, parse_run
from registry import Record, Registry
from settings import Settings

HERE = Path(__file__).parent
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

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
    time.sleep(float(job.get("seconds", 0)))
    results.hincrby(key, job["targetted_job"], 1)
    results.hset(f"by:{job['run_id']}", job["targetted_job"], agent_message["targetted_agent"])
    if job.get("evict"):
        os.kill(os.getppid(), 15)
"""


def free_port() -> int:
    """A free port below those that outgoing connections are given, which might take it first."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_for[T](what: str, look: Callable[[], T], seconds: float = 90) -> T:
    """Wait until `look` returns something true."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return seen


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


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

    def start_redis(self) -> None:
        options = ["--port", str(self.redis_port), "--bind", "127.0.0.1", "--appendonly", "yes"]
        options += ["--dir", str(self.folder), "--save", "", "--appendfsync", "always"]
        self.redis = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        wait_for("Redis", lambda: answers(self.redis_port))

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
        with Connection(self.url, connect_timeout=2) as connection:
            try:
                connection.connect()
            except (OSError, ConnectionError):
                return False
            return True

    def rabbitmqctl(self, *arguments: str) -> str:
        command = [str(RABBITMQ.with_name("rabbitmqctl")), *arguments]
        run = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, timeout=60, text=True
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
        for process in psutil.process_iter(["name", "environ"]):
            if (process.info["environ"] or {}).get("ERL_EPMD_PORT") == str(self.epmd):
                process.kill()


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


@dataclass
class Orchestrator:
    """An orchestrator in a process of its own."""

    environment: dict[str, str]
    log: Path
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS", "RABBIT"))}
        environment |= {"HOST": "127.0.0.1", "PORT": str(self.port), "LOG_FORMAT": "json"}
        environment["MONITOR_INTERVAL_MS"] = "100"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "app.py"],
                env=environment | self.environment,
                stderr=log,
                stdout=log,
            )
        process = self.process
        wait_for("the orchestrator", lambda: answers(self.port) or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()

    def events(self, name: str = "") -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith('{"time"')]
        return [event for event in found if name in event["event"]]

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
        return httpx.post(f"{self.url}/bot/start", files=files, params=params, timeout=120)

    def stop(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


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
    return parse_run(form(**parts), "generated", Limits())


def problems(**parts: Any) -> list[merge.Problem]:
    with pytest.raises(Invalid) as caught:
        parsed(**parts)
    return caught.value.problems


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Orchestrator]]:
    """Start orchestrators; at the end they stop, and leave no process behind."""
    started: list[Orchestrator] = []

    def one(**environment: str) -> Orchestrator:
        made = Orchestrator(environment, tmp_path / f"log{len(started)}")
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


@pytest.fixture(params=["embedded", "real"])
def orchestrator(
    request: pytest.FixtureRequest, start: Callable[..., Orchestrator]
) -> Orchestrator:
    if request.param == "embedded":
        return start()
    return start(**real(request.getfixturevalue("servers")))


def ended(orchestrator: Orchestrator, run_id: str) -> bool:
    return not orchestrator.store().hexists("armada:runs", run_id)


def assert_done(orchestrator: Orchestrator, run_id: str, jobs: int, exactly: bool = True) -> None:
    """The run ends; each job ran, and every agent ended as it was told; nothing is left."""
    events = orchestrator.events

    def stopped() -> list[dict[str, Any]]:
        return [event for event in events("run stopped") if event["run_id"] == run_id]

    wait_for(f"the end of {run_id}", stopped)
    done = orchestrator.store().hgetall(f"done:{run_id}")
    assert set(done) == {str(index) for index in range(jobs)}
    if exactly:
        assert set(done.values()) == {"1"}
    assert [event["agents_failed"] for event in stopped()] == [0]
    assert_nothing_left(orchestrator, run_id)


def agents_of(run_id: str) -> list[psutil.Process]:
    """What is in the process table of a run."""
    processes = psutil.process_iter(["environ"])
    return [p for p in processes if (p.info["environ"] or {}).get("RUN_ID") == run_id]


def assert_nothing_left(orchestrator: Orchestrator, run_id: str) -> None:
    """The process table, Redis and the broker are empty of a run."""
    wait_for(f"{run_id} to be forgotten", lambda: ended(orchestrator, run_id))
    assert not agents_of(run_id)
    results = {f"{kind}:{run_id}" for kind in ("done", "begun", "by", "tried")}
    assert set(orchestrator.store().keys(f"*{run_id}*")) <= results
    if url := orchestrator.environment.get("RABBITMQ_URL"):
        with Connection(url) as connection:
            control = f"armada.{run_id}"
            for name in (
                run_id,
                f"{control}.pidbox",
                f"reply.{control}.pidbox",
                f"{control}.events",
            ):
                with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                    connection.channel().exchange_declare(name, "direct", passive=True)
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().queue_declare(run_id, passive=True)


# Merging


def test_an_object_merges_key_by_key_and_anything_else_replaces() -> None:
    default = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    merged = merge.merge(default, {"a": {"c": [3]}, "e": {}})
    assert merged == {"a": {"b": 1, "c": [3]}, "d": 1, "e": {}}
    assert default == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


keys = st.sampled_from("abcd") | st.text(max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=15,
)
objects = st.dictionaries(keys, values, max_size=4)


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
    run = parsed(run={"run_id": "id", "number_of_jobs": count}, job=default, jobs_csv=posted)
    assert list(run.jobs) == expected
    assert [orjson.loads(run.jobs.encode(job)) for job in run.jobs] == expected
    assert list(run.jobs) == expected  # and once more, for nothing has been changed
    said = [warning for warning in run.warnings if "no index" in warning]
    assert [warning.split()[1] for warning in said] == ([str(outside)] if outside else [])


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
    run = parsed(run={"number_of_jobs": len(rows)}, jobs_csv=text)
    for job, override in zip(run.jobs, overrides, strict=False):
        mine = {key: model_value(cell) for key, cell in override.items() if cell}
        assert {key: job[key] for key in job if key in "xyz"} == mine


def test_rows_are_selected_by_target_and_cells_are_parsed_only_where_they_are_json() -> None:
    run = parsed(
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
        run = parsed(jobs_csv=f"targetted_job,a,v,w\n3,{before},{cell}{end}")
        job = list(run.jobs)[3]
        assert (job["v"], job["w"]) == (value, "9")


def test_a_column_counted_from_one_is_read_so_with_a_warning() -> None:
    run = parsed(jobs_csv="targetted_job,v\n1,a\n6,b\n")
    assert [job.get("v") for job in run.jobs] == ["a", None, None, None, None, "b"]
    assert "counted from 1" in run.warnings[0]


def test_what_is_probably_a_slip_is_taken_as_it_stands_with_a_warning() -> None:
    run = parsed(jobs_csv="target_job,v\n5,a\n", script="print('no task')")
    assert next(iter(run.jobs))["target_job"] == "5"
    script, column = run.warnings
    assert "never names tasks.consume_message" in script
    assert "'target_job'" in column and "'targetted_job'" in column


def test_rows_outside_the_count_are_ignored_with_a_warning() -> None:
    run = parsed(jobs_csv="targetted_job,v\n0,a\n6,b\n9,c\n-1,d\n,\n")
    assert [job.get("v") for job in run.jobs] == ["a", None, None, None, None, None]
    assert run.warnings == ["data_job: 3 rows target no index below 6, ignored"]
    run = parsed(jobs_csv="v\n" + "a\n" * 7)
    assert run.warnings == ["data_job: 1 row targets no index below 6, ignored"]


def test_messages_encoded_share_by_share_are_what_orjson_makes() -> None:
    long = {"s": "é" * 600, "t": {"a": ["x" * 600]}}
    run = parsed(
        agent=long, job={"u": {"a": [1]}, "n": 1, **long}, jobs_csv='u,t\n{"b": 1},\n,{"a": 2}\n'
    )
    for messages in (run.jobs, run.configs):
        for message in messages:
            assert messages.encode(message) == orjson.dumps(message)


def test_a_thousand_rows_in_any_order_reach_their_messages() -> None:
    order = [(index * 7) % 1000 for index in range(1000)]
    text = "targetted_job,v\n" + "".join(f'{i},"v\n{i}"\n' for i in order)
    run = parsed(run={"number_of_jobs": 1000}, jobs_csv=text)
    assert [job["v"] for job in run.jobs] == [f"v\n{index}" for index in range(1000)]


def test_runs_collide_where_a_config_key_would_be_the_same() -> None:
    for one, agents, other in (("a", 11, "a1"), ("a", 10, "a1"), ("a", 99, "a0"), ("b", 9, "a")):
        keys = {merge.config_key(one, index) for index in range(agents)}
        others = {merge.config_key(other, index) for index in range(5)}
        assert merge.collide(one, agents, other, 5) == bool(keys & others)
        assert merge.collide(other, 5, one, agents) == bool(keys & others)


@pytest.mark.parametrize("where", ["posted", "template"])
def test_the_isolating_line_is_appended_to_every_script(where: str) -> None:
    own = {"script": None, "agent": {"code": "import os"}}
    run = parsed(
        agents_csv='targetted_agent,code\n1,"x = 1"\n',
        **({"script": "import os"} if where == "posted" else own),
    )
    codes = [config["code"] for config in run.configs]
    assert codes[0] == "import os" + merge.isolation("generated")
    assert codes[1].rstrip() == "x = 1" + merge.isolation("generated").rstrip()
    assert "app.conf.control_exchange = 'armada.generated'" in codes[0]


def test_configtune_replaces_whole_strings_with_the_values_own_type() -> None:
    run = parsed(
        run={"number_of_jobs": "$env_N"},
        job={"a": ["$env_X", "$env_NO", "x$env_X", "$env_a-b"]},
        configtune=b'{"N": 3, "X": {"y": null}, "a-b": "$env_X"}',
    )
    assert len(run.jobs) == 3
    assert next(iter(run.jobs))["a"] == [{"y": None}, "$env_NO", "x$env_X", "$env_X"]


# Bad input


#: what the runs of these tests may hold, and how an orchestrator is told so
SMALL = Limits(16, 1000, 100_000, 20, 64, "lower it, or raise LOCAL_MAX_AGENTS")
SMALL_SETTINGS = {"MAX_JOBS": "1000", "MAX_MESSAGE_BYTES": "100000", "MAX_COLUMNS": "20"}
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


BAD = [
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
    in_template("a template in UTF-16", 400, ":1:1", "UTF-16; save", "{}".encode("utf-16")),
    in_template("a template in Latin-1", 400, ":2:5", "0xe9 is not UTF-8", b'{\n"caf\xe9": 1}'),
    in_template("a NUL byte in the template", 400, ":1:8", "NUL byte", '{"a": "\0"}'),
    in_template("a template that is an array", 422, "", "object, not an array", "[]"),
    in_template("a template that is null", 422, "", "must be a JSON object, not null", "null"),
    in_template("a template too large", 413, "", "at most 1248576", "{}" + " " * 1_300_000),
    in_template("a key that stands twice", 422, " a", "stands 2 times", '{"a": 1, "a": 2}'),
    in_template("a lone surrogate that stands twice", 422, r" \\ud800", "2 times", SURROGATES),
    in_template("brackets without end", 422, "", "deeper than 64 levels", "[" * 99_999),
    in_template("nesting of 65 levels", 422, r" a(\.0)+", "deeper than 64", f'{{"a": {NEST}}}'),
    in_template("a template without sections", 422, " default_job_message", "is missing", "{}"),
    in_template("a section that is null", 422, " run_message", "is null", '{"run_message": null}'),
    in_template("an integer of 5,000 digits", 422, " a", "64 bits", f'{{"a": {"9" * 5000}}}'),
    in_job("a default message that is an array", "", "is an array; it must be an object", [1]),
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
    in_run("more jobs than are allowed", "at most 1000 here (ask", number_of_jobs=1001),
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
    in_template("no count", 422, " .*number_of_jobs", "but is missing", '{"run_message": {}}'),
    bad("a configtune that is an array", 422, "configtune", "not an array", configtune="[1]"),
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
    in_own_script("a script that is a number", "code must be a string, not a number", 5),
    in_own_script("a template's script that does not compile", "(line 2)", "x\n)"),
    in_own_script("a template's script with a NUL byte", "null bytes", "x\0"),
    in_script("a script that does not compile", ":2:5", "does not compile", "x = 1\nif x\n"),
    in_script("a script for Python 2", ":1:1", "print", "print 1"),
    in_script("a script with tabs and spaces", ":3:.+", "tabs", "if 1:\n\tx\n        y\n"),
    in_script("a script nested without end", "(:1:1)?", "does not compile", "-" * 99_999 + "1"),
    in_script("a script with a NUL byte", ":2:2", "NUL byte", "x\ny\0"),
    bad("a script in Latin-1", 422, "python_code:1:4", "0xe9", python_code=b"x='\xe9'"),
    bad(
        "requirements that are not text",
        422,
        "requirements_txt:1:1",
        "UTF-8",
        requirements_txt=b"\xff",
    ),
    in_jobs("a CSV in UTF-16", ":1:1", "UTF-16; save it as UTF-8", "a,b\n".encode("utf-16")),
    in_jobs(
        "a CSV in UTF-16 without a mark", ":1:2", "NUL byte; save", "a,b\n".encode("utf-16-le")
    ),
    in_jobs("a CSV in Latin-1", ":3:2", "0xe9 is not UTF-8", b"a\n\xc3\xa9\nx\xe9\n"),
    in_jobs("a CSV with semicolons", ":1", "semicolons; save the file with commas", "a;b\n1;2\n"),
    in_jobs("a CSV with tabs", ":1", "tabs; save the file with commas", "a\tb\n1\t2\n"),
    in_jobs("a NUL byte in a CSV", ":2:2", "NUL byte", "a\nx\0\n"),
    in_jobs("lines that end as on old Macs", ":1", "end lines with LF or CRLF", "a\rb\r"),
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
    in_jobs("a column that stands twice", ":1 a", "'a' stands twice", "a,b, a\n1,2,3\n"),
    in_jobs("a column without a name", ":1", "column 2 has no name", "a, ,b\n1,2,3\n"),
    in_jobs("a run_id column", ":1 run_id", "cannot be overridden; remove it", "run_id,a\nx,1\n"),
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
    in_jobs("JSON of 1,000 levels", ":2", "deeper than 64", f"a\n{'[' * 1000}{']' * 1000}\n"),
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
        "not an array",
        data_agent="code\n[1]\n",
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
        parse_run(bad_form(parts), "generated", SMALL)
    return caught.value


def place(problem: merge.Problem) -> str:
    found = [problem.part, problem.line, problem.column]
    shown = ":".join(str(item) for item in found if item is not None)
    return f"{shown} {problem.field}" if problem.field else shown


@pytest.mark.parametrize(("status", "where", "words", "parts"), BAD)
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
        "python_code:1:5",
        "data_agent:1 run_id",
        "data_agent:1",
        f"data_job:2 {T}",
        "data_job:3",
        "data_job:4",
        "requirements_txt:1:1",
    ]


def test_a_file_that_is_wrong_throughout_is_answered_with_its_first_thousand_problems() -> None:
    found = refused({"data_job": "a\n" + "1,2\n" * 100_000}).problems
    assert [problem.line for problem in found[:-1]] == list(range(2, 1002))
    assert "more problems than the 1000 listed" in found[-1].message


def test_what_a_problem_quotes_is_cut_short() -> None:
    long = "é" * 50_000
    for parts in ({"run": {"run_id": long}}, {"data_job": f"{long},{long}\n"}):
        assert len(orjson.dumps([p.as_json() for p in refused(parts).problems])) < 3000


# Hostile clients


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """An orchestrator with small limits, a folder for what is temporary, and agents that sleep."""
    folder = tmp_path_factory.mktemp("besieged")
    (folder / "tmp").mkdir()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    limits = {"MAX_UPLOAD_BYTES": "1500000", "MAX_SCRIPT_BYTES": "200000", **SMALL_SETTINGS}
    made = Orchestrator(
        {"TMPDIR": str(folder / "tmp"), "AGENT_COMMAND": "sleep 1000", **limits}, folder / "log"
    )
    made.start()
    # The first run makes the monitor open its mailbox, which stays in Redis from then on.
    assert made.post().status_code == 200
    wait_for("the monitor", lambda: made.events("run progress"))
    yield made
    below = made.pids()
    made.stop()
    wait_for_the_end_of(below)
    assert "Traceback" not in made.log.read_text()


def traces(orchestrator: Orchestrator) -> dict[str, Any]:
    """What a start touches: Redis, the queues (which are in its second database), processes."""
    assert orchestrator.process is not None
    children = psutil.Process(orchestrator.process.pid).children()
    found: dict[str, Any] = {"processes": sorted(child.pid for child in children)}
    address = orchestrator.store().connection_pool.connection_kwargs
    for number, kind in enumerate(("", "queue ")):
        store = redis.Redis(address["host"], address["port"], db=number)
        names = [os.fsdecode(name) for name in store.scan_iter()]
        pipe = store.pipeline()
        for name in names:
            pipe.dump(name)
        found |= {kind + name: dump for name, dump in zip(names, pipe.execute(), strict=True)}
    return {name: seen for name, seen in found.items() if not name.startswith("armada:owner:")}


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
) -> bytes:
    """A whole request as it goes over the wire."""
    head = line + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += b"" if kind is None else b"content-type: " + kind + b"\r\n"
    return head + b"content-length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def connected(orchestrator: Orchestrator) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", orchestrator.port), timeout=60)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def answer_to(client: socket.socket) -> tuple[int, bytes]:
    """The answer that comes, its status and body; 0 where the connection is closed without one."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


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


@pytest.mark.servers
def test_bad_input_is_answered_with_all_that_was_found_and_touches_nothing(
    besieged: Orchestrator,
) -> None:
    before = traces(besieged)
    for case in BAD:
        status, parts = case.values[0], case.values[3]
        got, body = exchange(besieged, request(multipart(bad_form(parts))))
        answer, found = json.loads(body), [p.as_json() for p in refused(parts).problems]
        assert (got, answer["errors"]) == (status, found), case.id
        assert answer["detail"].startswith(found[0]["message"])
    assert traces(besieged) == before


GOOD, LARGE = multipart(form()), multipart(form(requirements_txt=b"#" * 65537))
WRONG: list[tuple[str, int, str, bytes]] = [
    ("JSON", 400, "multipart/form-data", request(b"{}", kind=b"application/json")),
    ("no content type", 400, "must be multipart", request(GOOD, kind=None)),
    ("no boundary", 400, "with a boundary", request(GOOD, kind=b"multipart/form-data")),
    ("another boundary", 400, "", request(GOOD, kind=FORM + b"other")),
    ("a long boundary", 400, "", request(GOOD, kind=FORM + b"x" * 999)),
    ("odd bytes as boundary", 400, "", request(GOOD, kind=FORM + b'"\xe9"')),
    ("an empty body", 400, "closing boundary", request(b"")),
    ("a body that ends early", 400, "closing boundary", request(GOOD[:-20])),
    ("no parts", 422, "configtemplate is missing", request(b"--frontier--\r\n")),
    ("a part twice", 422, "stands twice", request(GOOD.replace(b"data_job", b"data_agent"))),
    ("a part without name", 422, "", request(GOOD.replace(b'; name="data_job"', b""))),
    ("a name of 1 MB", 400, "", request(multipart({"x" * 10**6: b""}))),
    ("a part of 99 headers", 400, "", request(GOOD.replace(b"\r\n\r\n", b"\r\nx: y" * 99))),
    ("a large upload", 413, "MAX_UPLOAD_BYTES", request(multipart({"x": b"a" * 1_600_000}))),
    ("a large script", 413, "MAX_SCRIPT_BYTES", request(multipart(form(script="#" * 200_001)))),
    ("large requirements", 413, "MAX_REQUIREMENTS_BYTES", request(LARGE)),
    (
        "a dry run of maybe",
        422,
        "not 'maybe'",
        request(GOOD, line=b"POST /bot/start?dry_run=maybe"),
    ),
    ("a dry run of nothing", 422, "true or false", request(GOOD, line=b"POST /bot/start?dry_run=")),
    ("another method", 405, "", request(GOOD, line=b"PUT /bot/start")),
    ("another path", 404, "", request(GOOD, line=b"POST /bot")),
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


odd = (
    values | st.floats() | st.sampled_from([0, 10**30, "\ud800", "$env_A", {"\udfff": 1}, "x" * 64])
)
snippets = st.lists(
    st.sampled_from([*'",\n{[]}:a0\\é', "\r\n", '""', T, "code", "{}", "\ufeff", "\0", "1e999"])
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
        "data_job": written(draw(tables())[2]).encode(),
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
    assert besieged.process is not None
    process, tmp = psutil.Process(besieged.process.pid), besieged.environment["TMPDIR"]
    chance, before, seen = random.Random(20), traces(besieged), Counter[int]()
    body = multipart(form(jobs_csv=f'{T},u\n1,"{{""a"": 1}}"\n', requirements_txt=b"six"))
    kinds = [FORM + b"frontier"] * 9 + [FORM + b'"', b"\xff", FORM[:-1] + b"*=utf-8''%ff"]
    for number in range(400):
        if number == 100:  # what is made once has been made
            files, memory = process.num_fds(), process.memory_info().rss
        data = request(mutated(chance, body), kind=chance.choice(kinds), line=DRY)
        seen[exchange(besieged, data)[0]] += 1
    assert set(seen) <= {200, 400, 413, 422}, seen
    assert min(seen[200], seen[400], seen[422]) > 10, seen
    assert process.memory_info().rss - memory < 20 * 2**20
    wait_for("all connections to be closed", lambda: process.num_fds() <= files + 2)
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
    assert besieged.process is not None
    process, before = psutil.Process(besieged.process.pid), traces(besieged)
    whole, files = request(multipart(form(jobs_csv="x\n" * 150_000))), process.num_fds()
    for number in range(100):
        with connected(besieged) as client:
            client.sendall(whole[: len(whole) * (number + 1) // 101])
            if number % 2:  # leave with a reset rather than an end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for("all connections to be closed", lambda: process.num_fds() <= files + 2)
    assert_untouched(besieged, before)


@pytest.mark.servers
def test_a_thousand_parts_are_passed_over(besieged: Orchestrator) -> None:
    many = {f"x{number}": b"y" * 100 for number in range(1000)}
    status, body = exchange(besieged, request(multipart({**many, **form()}), line=DRY))
    assert status == 200, body
    assert exchange(besieged, request(multipart(many), line=DRY))[0] == 422


@pytest.mark.servers
def test_a_thousand_idle_connections_keep_nobody_out(besieged: Orchestrator) -> None:
    starts = [b"", b"POST /bot", request(b"")[:60], request(GOOD)[:-1]]
    before = traces(besieged)
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            stack.enter_context(connected(besieged)).sendall(starts[number % 4])
        assert serves(besieged)
        assert httpx.get(f"{besieged.url}/health?ready", timeout=60).status_code == 200
    assert_untouched(besieged, before)


# The answer


@pytest.mark.servers
def test_a_dry_run_shows_everything_and_touches_nothing(orchestrator: Orchestrator) -> None:
    answer = orchestrator.post(dry_run=True, agents_csv="v\nx\n").json()
    assert [config.get("v") for config in answer["agent_configs"]] == ["x", None]
    assert len(answer["job_messages"]) == 6
    assert answer["kubernetes_job"]["spec"]["completions"] == 2
    assert "guest" not in json.dumps(answer["kubernetes_job"])
    assert not orchestrator.store().exists("armada:runs", f"{answer['run_uuid']}0")


@pytest.mark.servers
def test_errors_are_json_and_leave_nothing_behind(start: Callable[..., Orchestrator]) -> None:
    orchestrator = start(MAX_UPLOAD_BYTES="100000", MAX_REQUIREMENTS_BYTES="10")
    url = f"{orchestrator.url}/bot/start"
    assert httpx.post(url, json={}).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, content=b"--x\r\nnonsense", headers=broken).status_code == 400
    assert orchestrator.post(jobs_csv="a" * 200000).status_code == 413
    assert orchestrator.post(requirements_txt=b"x" * 11).status_code == 413
    refused = orchestrator.post(run={"number_of_agents": 17})
    assert refused.status_code == 422
    assert "LOCAL_MAX_AGENTS" in refused.json()["detail"]
    assert refused.json()["errors"][0]["field"] == "run_message.number_of_agents"
    assert orchestrator.store().keys("*") == orchestrator.store().keys("armada:owner:*")


@pytest.mark.servers
def test_a_token_is_required_where_one_is_set(start: Callable[..., Orchestrator]) -> None:
    orchestrator = start(API_TOKEN="secret-token")
    refused = orchestrator.post()
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    files = {name: (name, value) for name, value in form().items()}
    headers = {"authorization": "Bearer secret-token"}
    url = f"{orchestrator.url}/bot/start?dry_run=1"
    assert httpx.post(url, files=files, headers=headers).status_code == 200
    assert httpx.get(f"{orchestrator.url}/health").status_code == 200
    assert "secret-token" not in orchestrator.log.read_text()


# What is put where


@pytest.mark.servers
def test_configs_and_messages_land_as_foreign_agents_expect_them(
    start: Callable[..., Orchestrator], servers: Servers
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
        run={"run_id": run_id, "number_of_jobs": 3},
        agent={"a": 1},
        job=tricky,
        jobs_csv='q,long\nother,\n,"' + "y" * 3000 + '"\n',
    )
    assert answer.json() == {"run_uuid": run_id, "agents": 2, "jobs": 3, "warnings": []}
    store = orchestrator.store()
    config = json.loads(store.get(f"{run_id}1") or "")
    code = config.pop("code")
    assert code.startswith(SCRIPT)
    assert config == {"a": 1, "run_id": run_id, "targetted_agent": 1}
    ours = Celery(broker=servers.url, set_as_current=False)
    plain = f"plain-{run_id}"
    with ours.connection_for_write() as connection:
        jobs, twins = connection.SimpleQueue(run_id), connection.SimpleQueue(plain)
        got = [jobs.get(timeout=10) for _ in range(3)]
        for message in got:
            # As Celery itself would have sent it: only ids, origin and names may differ.
            job = message.decode()[0][0]
            ours.send_task("tasks.consume_message", args=[job], queue=plain)
            twin = twins.get(timeout=10)
            assert message.decode() == twin.decode()
            ids = {"id", "root_id", "origin"}  # and reply_to, which names the sending thread
            assert message.headers.keys() == twin.headers.keys()
            for key in message.headers.keys() - ids:
                assert message.headers[key] == twin.headers[key], key
            changing = {"correlation_id", "application_headers", "reply_to"}
            assert message.properties.keys() == twin.properties.keys()
            for key in message.properties.keys() - changing:
                assert message.properties[key] == twin.properties[key], key
            assert message.properties["correlation_id"] == message.headers["id"]
            twin.ack()
        assert [message.decode()[0][0]["targetted_job"] for message in got] == [0, 1, 2]
        assert len({message.headers["id"] for message in got}) == 3
        jobs.close()
        twins.close()
        connection.default_channel.queue_delete(plain)
        connection.default_channel.queue_delete(run_id)
    store.delete(f"{run_id}0", f"{run_id}1", "armada:runs")


@given(objects, objects)
@hypothesis_settings(deadline=None)
def test_a_job_is_shown_as_celery_would_show_it(default: Any, override: Any) -> None:
    job = merge.merge(default, override)
    shown = broker_module.ArgsRepr(default).of(job)
    assert shown == saferepr([job], 1024, 3)


def test_the_manifest_is_what_the_contract_says() -> None:
    run = parsed(run={"run_id": "r"}, requirements_txt=b"six")
    settings = Settings.read(
        {"RABBITMQ_URL": "amqp://u:hidden@h", "BACKEND_URL": "http://b", "DISTRIB": "minikube"}
    )
    job = fleet.manifest(run, "claim", settings)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert job["metadata"]["name"] == "agent-r"
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["suspend"] is True
    assert pod["containers"][0]["image"] == "armadasvc/agent:latest"
    assert pod["containers"][0]["imagePullPolicy"] == "Never"
    environment = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert environment["RUN_ID"]["value"] == "r"
    assert environment["REQUIREMENTS_TXT"]["value"] == "c2l4"
    assert "fieldRef" in environment["POD_INDEX"]["valueFrom"]
    assert pod["automountServiceAccountToken"] is False
    assert "hidden" not in json.dumps(job)


def a_record(run_id: str) -> Record:
    return Record(
        run_id=run_id,
        claim="c",
        owner="o",
        phase=registry.Phase.STARTING,
        agents=2,
        jobs=6,
        k8s_job=f"agent-{run_id}",
    )


def test_a_record_of_a_version_that_knows_more_can_be_read() -> None:
    record = a_record("r")
    stored = json.loads(record.dump()) | {"colour": "blue"}
    assert Record.load(json.dumps(stored)) == record


@pytest.mark.servers
def test_agents_are_made_from_no_manifest_that_somebody_else_has_written(servers: Servers) -> None:
    settings = Settings(redis_host="127.0.0.1", redis_port=servers.redis_port, api_token="secret")
    store, record = Registry(settings), a_record(new_run_id())
    store.claim(record, {"spec": 1}, queue_exists=False)
    assert store.manifest(record.run_id) == {"spec": 1}
    key, stranger = f"armada:manifest:{record.run_id}", Registry(replace(settings, api_token=""))
    store.redis.set(key, stranger.sealed(b'{"spec": 2}'))
    assert store.manifest(record.run_id) is None
    store.forget(record)
    assert not store.redis.exists(key)
    store.leave(record.owner)


# A whole run


@pytest.mark.servers
def test_a_run_does_every_job_once_and_its_agents_stop(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id}, jobs_csv="retry\n\n3\n")
    assert answer.status_code == 200, answer.text
    assert orchestrator.post(run={"run_id": run_id}).status_code == 409
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_one_of_twenty_posts_of_one_run_id_wins(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    with ThreadPoolExecutor(20) as pool:
        posts = pool.map(lambda _: orchestrator.post(run={"run_id": run_id}), range(20))
        statuses = sorted(answer.status_code for answer in posts)
    assert statuses == [200] + [409] * 19
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_twenty_runs_at_once_keep_to_themselves(orchestrator: Orchestrator) -> None:
    count = 20 if "RABBITMQ_URL" in orchestrator.environment else 3
    ids = [new_run_id() for _ in range(count)]

    def post(number: int) -> httpx.Response:
        run = {"run_id": ids[number], "number_of_agents": 1, "number_of_jobs": 4 + number}
        return orchestrator.post(run=run, job={"seconds": number % 3 / 4})

    with ThreadPoolExecutor(count) as pool:
        assert [answer.status_code for answer in pool.map(post, range(count))] == [200] * count
    for number, run_id in enumerate(ids):
        assert_done(orchestrator, run_id, 4 + number)


# Faults


class Proxy:
    """Stands before a server, and fails as a server or a network does, at a chosen moment."""

    def __init__(self, server: int) -> None:
        self.server, self.port = server, free_port()
        self.listener: socket.socket | None = None
        self.at(b"", lambda: None)
        self.open: set[socket.socket] = set()
        self.flows = threading.Event()
        self.mend()

    def at(self, moment: bytes, do: Callable[[], object], answer: bool = False) -> threading.Event:
        """Call `do` when a client sends these bytes, before they are passed on, or before their
        answer is. Returns what is set afterwards."""
        self.asker: socket.socket | None = None
        self.do, self.answer, self.done = do, answer, threading.Event()
        self.moment = moment
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
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self.pass_on, args=[*ends], daemon=True).start()

    def pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        sent = b""
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                sent = sent[-500:] + data
                if self.moment and self.moment in sent:
                    self.moment, self.asker = b"", source
                if self.asker is (sink if self.answer else source):
                    self.asker = None
                    self.do()
                    self.done.set()
                self.flows.wait()
                sink.sendall(data)
        self.open.discard(source)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class Proxied:
    """An orchestrator with a proxy before each of its servers; agents go there directly."""

    def __init__(
        self, servers: Servers, start: Callable[..., Orchestrator], **environment: str
    ) -> None:
        self.redis, self.rabbitmq = Proxy(servers.redis_port), Proxy(servers.amqp_port)
        direct = [f"REDIS_PORT_VAR_ENV={servers.redis_port}", f"RABBITMQ_URL={servers.url}"]
        self.orchestrator = start(
            REDIS_HOST="127.0.0.1",
            REDIS_PORT=str(self.redis.port),
            RABBITMQ_URL=servers.url.replace(str(servers.amqp_port), str(self.rabbitmq.port)),
            AGENT_COMMAND=shlex.join(["env", *direct, sys.executable, str(HERE / "agent.py")]),
            **{"TIMEOUT": "1", **environment},
        )

    def at(
        self, step: str, run_id: str, do: str | Callable[[], object], answer: bool = False
    ) -> threading.Event:
        """See `Proxy.at`; where `do` is a string, the proxy's own method of that name."""
        server, moment = moments(run_id)[step]
        proxy: Proxy = getattr(self, server)
        return proxy.at(moment, getattr(proxy, do) if isinstance(do, str) else do, answer)

    def mend(self) -> None:
        self.redis.mend()
        self.rabbitmq.mend()


def hear(orchestrator: Orchestrator, event: str, times: int = 1) -> None:
    """Wait until an orchestrator has logged something so often."""
    wait_for(f"the log to say {event}", lambda: len(orchestrator.events(event)) >= times)


def workers(orchestrator: Orchestrator, run_id: str) -> int:
    """How many there were when an orchestrator looked last."""
    looks = [e for e in orchestrator.events("run progress") if e["run_id"] == run_id]
    return int(looks[-1]["workers"]) if looks else 0


def moments(run_id: str) -> dict[str, tuple[str, bytes]]:
    """What an orchestrator sends in each step of a run's life, and to which server."""
    name = run_id.encode()
    queue = b"\0\0" + bytes([len(name)]) + name
    return {
        # AMQP 0-9-1: class and method, what is reserved, names, flags
        "look for the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\x01"),
        "claim the run": ("redis", b'"phase":"starting"'),
        "store the configs": ("redis", b"\r\n" + name + b"0\r\n"),
        "declare the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\2"),
        "send the jobs": ("rabbitmq", b"\0\x3c\0\x28\0\0" + queue[1:]),
        "commit the run": ("redis", b'"phase":"running"'),
        "drop the agents": ("redis", b'"phase":"restarting"'),
        "start agents anew": ("redis", b'"phase":"running"'),
        "drain the run": ("redis", b'"phase":"drained"'),
        "delete the queue": ("rabbitmq", b"\0\x32\0\x28" + queue),
        "forget the run": ("redis", b"HDEL\r\n$11\r\narmada:runs\r\n$9\r\n" + name),
    }


START = list(moments(""))[:6]
END = list(moments(""))[6:]


@pytest.fixture(scope="session")
def shared(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One that many tests use. Its Redis is its own, lest it take over the runs of others."""
    folder = tmp_path_factory.mktemp("shared")
    own = replace(servers, folder=folder, redis_port=free_port())
    own.start_redis()

    def start(**environment: str) -> Orchestrator:
        made = Orchestrator(environment, folder / "log")
        made.start()
        return made

    made = Proxied(own, start)
    yield made
    made.orchestrator.stop()
    own.kill_redis()
    assert not made.orchestrator.events("monitor failed")


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
        assert gone.is_set()
    finally:
        shared.mend()
    if posted.status_code == 200:
        assert how == "reset"
        assert_done(orchestrator, run_id, 2)
        return
    assert posted.status_code == 503
    name = {"redis": "Redis", "rabbitmq": "RabbitMQ"}[moments(run_id)[step][0]]
    assert posted.json()["detail"].startswith(name)
    told = [e for e in orchestrator.events("run not started") if e["run_id"] == run_id]
    assert [event["error"] for event in told] == [posted.json()["detail"]]
    assert_nothing_left(orchestrator, run_id)
    assert not orchestrator.store().exists(f"done:{run_id}", f"begun:{run_id}")


@pytest.mark.servers
def test_a_run_goes_on_when_a_server_goes_at_any_step_of_its_end(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    proxied, run_id = Proxied(servers, start), new_run_id()
    orchestrator = proxied.orchestrator
    # Gone before it does a thing, or silent when it has done it.
    steps = [(step, how, how == "hush") for step in END for how in ("cut", "hush")]
    step, how, answer = steps[0]
    gone = proxied.at(step, run_id, how, answer)
    run = {"run_id": run_id, "number_of_agents": 1, "number_of_jobs": 2}
    assert orchestrator.post(run=run, jobs_csv="evict\nonce\n").status_code == 200
    for (step, _, _), following in itertools.zip_longest(steps, steps[1:]):
        assert gone.wait(60), step
        ready = httpx.get(f"{orchestrator.url}/health?ready", timeout=60)
        assert (ready.status_code, ready.json()["failing"]) == (503, [moments("")[step][0]])
        assert len(orchestrator.running.children()) <= 1
        if following:
            step, how, answer = following
            gone = proxied.at(step, run_id, how, answer)
        proxied.mend()
    assert_nothing_left(orchestrator, run_id)
    assert set(orchestrator.store().hgetall(f"done:{run_id}")) == {"0", "1"}


@pytest.mark.servers
def test_an_orchestrator_may_be_there_before_its_servers(shared: Proxied) -> None:
    orchestrator, run_id = shared.orchestrator, new_run_id()
    orchestrator.stop()
    shared.redis.cut()
    shared.rabbitmq.cut()
    try:
        orchestrator.start()
        assert httpx.get(f"{orchestrator.url}/health").status_code == 200
        ready = httpx.get(f"{orchestrator.url}/health?ready", timeout=60)
        assert (ready.status_code, ready.json()["failing"]) == (503, ["redis", "rabbitmq"])
        assert orchestrator.post(run={"run_id": run_id}).status_code == 503
        shared.rabbitmq.mend()
        refused = orchestrator.post(run={"run_id": run_id})
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith("Redis")
    finally:
        shared.mend()
    assert httpx.get(f"{orchestrator.url}/health?ready", timeout=60).status_code == 200
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
@pytest.mark.parametrize(
    ("server", "step"), [("redis", "store the configs"), ("rabbitmq", "send the jobs")]
)
def test_a_server_killed_in_a_run_and_in_a_post_harms_neither(
    start: Callable[..., Orchestrator], servers: Servers, server: str, step: str
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
        assert killed.is_set()
        hear(orchestrator, "monitor waits")
        ready = httpx.get(f"{orchestrator.url}/health?ready", timeout=60)
        assert (ready.status_code, ready.json()["failing"]) == (503, [server])
    finally:
        getattr(servers, f"start_{server}")()
    assert_done(orchestrator, going, 20, exactly=False)
    assert len(orchestrator.events("monitor waits")) == 1
    assert httpx.get(f"{orchestrator.url}/health?ready", timeout=60).status_code == 200
    for run_id in (sending, late):
        assert_nothing_left(orchestrator, run_id)
        assert not orchestrator.store().exists(f"begun:{run_id}")


@pytest.mark.servers
def test_a_broker_that_blocks_publishers_gives_503_and_the_start_is_undone(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator, run_id = start(**real(servers, TIMEOUT="1")), new_run_id()
    servers.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        answer = orchestrator.post(run={"run_id": run_id})
        assert answer.status_code == 503
        assert "memory or disk alarm" in answer.json()["detail"]
    finally:
        servers.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    assert_nothing_left(orchestrator, run_id)
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_job_whose_agent_is_killed_is_done_by_another(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 4}
    assert orchestrator.post(run=run, job={"seconds": 1}).status_code == 200
    store = orchestrator.store()
    begun = wait_for("a job", lambda: store.hgetall(f"begun:{run_id}"))
    os.killpg(int(next(iter(begun.values()))), signal.SIGKILL)
    wait_for("the end", lambda: ended(orchestrator, run_id))
    assert set(store.hgetall(f"done:{run_id}")) == set("0123")
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_a_job_is_not_lost_whose_agent_is_killed_while_it_ends(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    """As when an eviction's grace period is over: SIGTERM, then SIGKILL."""
    orchestrator, run_id = start(**real(servers)), new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 1}
    assert orchestrator.post(run=run, job={"seconds": 6}).status_code == 200
    store = orchestrator.store()
    wait_for("two workers", lambda: workers(orchestrator, run_id) == 2)
    agent = int(wait_for("the job", lambda: store.hget(f"begun:{run_id}", "0")) or 0)
    os.kill(agent, signal.SIGTERM)
    hear(orchestrator, "run drained")  # who is ending neither consumes nor answers
    assert not store.exists(f"done:{run_id}")
    os.killpg(agent, signal.SIGKILL)
    wait_for("the end", lambda: ended(orchestrator, run_id))
    assert store.hgetall(f"done:{run_id}") == {"0": "1"}
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_agents_are_started_anew_when_all_have_gone_with_jobs_left(
    orchestrator: Orchestrator,
) -> None:
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}, job={"seconds": 1}).status_code == 200
    store = orchestrator.store()
    wait_for("two agents", lambda: len(set(store.hvals(f"begun:{run_id}"))) == 2)
    for pid in set(store.hvals(f"begun:{run_id}")):
        psutil.Process(int(pid)).terminate()
    assert_done(orchestrator, run_id, 6, exactly=False)
    assert orchestrator.events("agents started anew")


@pytest.mark.servers
def test_agents_that_end_again_and_again_fail_the_run_with_its_jobs_kept(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, MAX_RESTARTS="1", KEEP_FAILED="3"))
    crashing, evicted = new_run_id(), new_run_id()
    assert orchestrator.post(run={"run_id": crashing}, script="1 / 0").status_code == 200
    run = {"run_id": evicted, "number_of_agents": 1}
    assert orchestrator.post(run=run, job={"evict": True}).status_code == 200
    for run_id, left, agents_failed in ((crashing, 6, 2), (evicted, 4, 0)):

        def failed(run_id: str = run_id) -> list[dict[str, Any]]:
            return [e for e in orchestrator.events("run failed") if e["run_id"] == run_id]

        [event] = wait_for(f"the failure of {run_id}", failed)
        assert (event["jobs_left"], event["agents_failed"]) == (left, agents_failed)
        with Connection(servers.url) as connection:
            kept = connection.default_channel.queue_declare(run_id, passive=True)
        assert kept.message_count == left
        assert_nothing_left(orchestrator, run_id)
    assert orchestrator.store().hgetall(f"done:{evicted}") == {"0": "1", "1": "1"}


@pytest.mark.servers
def test_agents_end_with_an_orchestrator_that_is_killed(
    start: Callable[..., Orchestrator],
) -> None:
    orchestrator = start()
    assert orchestrator.post(job={"seconds": 60}).status_code == 200
    store = orchestrator.store()
    wait_for("a job", lambda: store.keys("begun:*"))
    below = orchestrator.pids()
    assert len(below) > 4
    orchestrator.running.kill()
    wait_for_the_end_of(below)


def gone(orchestrator: Orchestrator, run_id: str) -> None:
    """Let the time be over for which the owner of a run counts as alive after its last word."""
    store = orchestrator.store()
    owner = json.loads(store.hget("armada:runs", run_id) or "")["owner"]
    assert 0 < store.pttl(f"armada:owner:{owner}") <= 15_000
    store.delete(f"armada:owner:{owner}")


@pytest.mark.servers
def test_a_run_is_whole_or_undone_after_its_orchestrator_was_killed_at_any_step(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    proxied = Proxied(servers, start)
    orchestrator = proxied.orchestrator
    for step in START[1:]:
        run_id = new_run_id()
        proxied.at(step, run_id, orchestrator.running.kill, answer=True)
        with pytest.raises(httpx.TransportError):
            orchestrator.post(run={"run_id": run_id})
        assert orchestrator.process and orchestrator.process.wait(60) == -signal.SIGKILL
        gone(orchestrator, run_id)
        orchestrator.start()
        if step != "commit the run":
            assert_nothing_left(orchestrator, run_id)
            assert orchestrator.events("run undone")[-1]["run_id"] == run_id
            assert not orchestrator.store().exists(f"begun:{run_id}")
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{run_id}"))
    below = orchestrator.pids()
    orchestrator.running.kill()
    wait_for_the_end_of(below)
    gone(orchestrator, run_id)
    orchestrator.start()
    assert_done(orchestrator, run_id, 6, exactly=False)


@pytest.mark.servers
def test_a_post_is_finished_by_an_orchestrator_that_is_told_to_stop(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    proxied, run_id = Proxied(servers, start, TIMEOUT="30"), new_run_id()
    orchestrator, held, release = proxied.orchestrator, threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(60)

    proxied.at("send the jobs", run_id, hold)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(orchestrator.post, run={"run_id": run_id}, job={"seconds": 1})
        assert held.wait(60)
        assert orchestrator.post(run={"run_id": run_id}).status_code == 409
        orchestrator.running.terminate()
        wait_for("it to take no more", lambda: not answers(orchestrator.port))
        release.set()
        assert first.result().status_code == 200
    assert orchestrator.process and orchestrator.process.wait(60) == 0
    assert orchestrator.events("orchestrator stopped")
    assert not agents_of(run_id)
    orchestrator.start()
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{run_id}"))
    orchestrator.stop()
    assert not agents_of(run_id)
    orchestrator.start()
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_two_orchestrators_share_redis_and_rabbitmq(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    two = [start(**real(servers, AGENT_COMMAND="", IDLE_FORGET="1")) for _ in range(2)]
    run_id, name, left = new_run_id(), new_run_id(), new_run_id()
    posts: list[dict[str, Any]] = [{"run_id": run_id}] * 20
    posts += [{"run_id": name, "number_of_agents": 11}, {"run_id": f"{name}1"}] * 4
    with ThreadPoolExecutor(len(posts)) as pool:
        answers = list(pool.map(lambda n: two[n % 3 % 2].post(run=posts[n]), range(len(posts))))
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses[:20]) == [200] + [409] * 19
    assert sorted(statuses[20:]) == [200] + [409] * 7
    won = posts[statuses.index(200, 20)]["run_id"]
    agents = [agent_by_hand(servers, posted, 0) for posted in (run_id, won)]
    assert [agent.wait(60) for agent in agents] == [0, 0]
    for posted in (run_id, won):
        [owner] = [o for o in two if any(e["run_id"] == posted for e in o.events("run started"))]
        assert_done(owner, posted, 6)
    assert not any(one.events("run taken over") for one in two)

    assert two[0].post(run={"run_id": left}, job={"seconds": 0.3}).status_code == 200
    agent = agent_by_hand(servers, left, 0)
    wait_for("a job", lambda: two[0].store().hgetall(f"begun:{left}"))
    two[0].stop()
    assert agent.wait(60) == 0
    assert_done(two[1], left, 6)
    assert two[1].events("run taken over")


@pytest.mark.servers
def test_a_run_changes_hands_where_its_orchestrator_stands_still_and_not_after_an_outage(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    one, two = (Proxied(servers, start) for _ in range(2))
    orchestrator, other = one.orchestrator, two.orchestrator
    run_id, process = new_run_id(), orchestrator.running
    stopped = one.at("store the configs", run_id, process.suspend)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(orchestrator.post, run={"run_id": run_id})
        assert stopped.wait(60)
        try:
            assert not other.events("run taken over")
            gone(other, run_id)
            hear(other, "run undone")
        finally:
            process.resume()
        assert first.result().status_code == 503
    assert_nothing_left(other, run_id)

    run = {"run_id": run_id, "number_of_agents": 1}
    assert orchestrator.post(run=run, job={"seconds": 0.5}).status_code == 200
    wait_for("a job", lambda: other.store().hgetall(f"begun:{run_id}"))
    for proxied in (one, two):
        proxied.redis.cut()
        hear(proxied.orchestrator, "monitor waits")
    direct = redis.Redis(port=servers.redis_port)
    direct.delete(*direct.keys("armada:owner:*"))  # as an outage of 15 s does
    two.mend()
    hear(other, "monitor goes on")
    one.mend()
    assert_done(orchestrator, run_id, 6)
    assert len(other.events("run taken over")) == 1


@pytest.mark.servers
def test_a_client_that_goes_away_leaves_no_run_or_a_whole_one(shared: Proxied) -> None:
    orchestrator, part, whole = shared.orchestrator, new_run_id(), new_run_id()

    def sent(run_id: str) -> bytes:
        files = {name: (name, value) for name, value in form(run={"run_id": run_id}).items()}
        request = httpx.Request("POST", f"{orchestrator.url}/bot/start", files=files)
        headers = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
        return f"POST /bot/start HTTP/1.1\r\n{headers}\r\n".encode() + request.read()

    for most in (len(sent(part)) // 2, -10):
        with socket.create_connection(("127.0.0.1", orchestrator.port)) as client:
            client.sendall(sent(part)[:most])
    with socket.create_connection(("127.0.0.1", orchestrator.port)) as client:
        shared.at("claim the run", whole, client.close)
        client.sendall(sent(whole))
        assert_done(orchestrator, whole, 6)
    begun = {event["run_id"] for event in orchestrator.events("run starting")}
    assert whole in begun and part not in begun


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


@pytest.mark.servers
def test_an_agent_started_by_hand_does_its_jobs_and_is_stopped(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND="", IDLE_FORGET="2"))
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    agent = agent_by_hand(servers, run_id, 0)
    assert agent.wait(60) == 0
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_busy_and_silent_agents_are_waited_for_and_a_late_one_is_stopped(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND="", IDLE_FORGET="20"))
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 1}
    assert orchestrator.post(run=run, job={"retry": 4, "seconds": 4}).status_code == 200
    agents = [agent_by_hand(servers, run_id, index) for index in range(2)]
    store = orchestrator.store()
    wait_for("both workers", lambda: workers(orchestrator, run_id) == 2)
    wait_for("the job's retry", lambda: store.hexists(f"tried:{run_id}", "0"))
    agents[1].send_signal(signal.SIGSTOP)
    time.sleep(6)  # what is tested: an agent that is silent for some seconds
    assert not orchestrator.events("run drained")
    agents[1].send_signal(signal.SIGCONT)
    wait_for("the end of the job", lambda: store.hget(f"done:{run_id}", "0") == "1")
    assert [agent.wait(60) for agent in agents] == [0, 0]
    assert orchestrator.events("run drained")
    assert agent_by_hand(servers, run_id, 1).wait(60) == 0
    assert store.hgetall(f"done:{run_id}") == {"0": "1"}
    with Connection(servers.url) as connection:
        connection.default_channel.queue_delete(run_id)
    assert_nothing_left(orchestrator, run_id)


@pytest.mark.servers
def test_parts_may_be_files_or_plain_fields(start: Callable[..., Orchestrator]) -> None:
    orchestrator = start()
    parts = form(run={"run_id": "same"}, jobs_csv="v\nx\n")
    as_fields = {name: (None, value) for name, value in parts.items()}
    url = f"{orchestrator.url}/bot/start?dry_run=true"
    answer = httpx.post(url, files=as_fields).json()
    assert (
        answer == orchestrator.post(dry_run=True, run={"run_id": "same"}, jobs_csv="v\nx\n").json()
    )
    assert answer["job_messages"][0]["v"] == "x"


# The README


README = (HERE / "README.md").read_text()


def test_the_readmes_table_holds_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \| .* \|$", README, re.MULTILINE)
    told: dict[str, str] = {}
    for names, defaults in rows:
        listed = re.findall("`([A-Z_]+)`", names)
        values = defaults.split(", ") if len(listed) > 1 else [defaults]
        told |= dict(zip(listed, values * len(listed) if len(values) == 1 else values, strict=True))
    known = [known for known in dataclasses.fields(Settings) if known.name != "pod_template"]
    assert set(told) == {known.name.upper() for known in known}
    for setting in known:
        if isinstance(setting.default, int):
            assert told[setting.name.upper()] == str(setting.default)


def test_what_the_readme_links_to_and_makes_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        assert (HERE / target).exists(), target
    for target in set(re.findall(r"`make ([a-z0-9-]+)", README)):
        subprocess.run(["make", "-n", target], cwd=HERE, check=True, capture_output=True)


def in_bash(command: str, orchestrator: Orchestrator, folder: Path) -> str:
    """What a command of the README prints, with another port."""
    text = command.replace("curl", "curl -sS").replace("http://localhost:8080", orchestrator.url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, check=True, capture_output=True
    )
    return done.stdout.decode()


@pytest.mark.servers
def test_the_readmes_curl_and_the_run_that_it_teaches_do_what_it_says(
    start: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    orchestrator = start()
    example, mine = re.findall(r"```bash\n(curl.*?)```", README, re.DOTALL)
    posted = json.loads(in_bash(example, orchestrator, HERE))
    shown = re.search(r"The answer is `(.*?)`", README)
    assert shown
    assert posted | {"run_uuid": "..."} == json.loads(shown[1])
    assert_done_by_example(orchestrator, posted)

    (tmp_path / "my").mkdir()
    for name, content in re.findall(r"`my/(\S+)`.*?```\w+\n(.*?)```", README, re.DOTALL):
        (tmp_path / "my" / name).write_text(content)
    dry, real = re.findall("curl.*?script.py", mine, re.DOTALL)
    merged = json.loads(in_bash(dry, orchestrator, tmp_path))
    language, job = re.findall(r"(?:language|last job is)\s`(\{.*?\})`[,.]", README)
    assert merged["agent_configs"][1]["language"] == json.loads(language)
    assert merged["job_messages"][3] | {"run_id": "..."} == json.loads(job)
    run_id = json.loads(in_bash(real, orchestrator, tmp_path))["run_uuid"]
    wait_for("the end", lambda: ended(orchestrator, run_id))
    said: dict[str, str] = orchestrator.store().hgetall(f"greetings:{run_id}")  # type: ignore[assignment]  # decoded
    assert {job: text.split()[1] for job, text in said.items()} == {
        "0": "world!", "1": "Ada!", "2": "world!", "3": "Grace!"
    }  # fmt: skip
    assert said["1"].split().count("Ada!") == 2


def assert_done_by_example(orchestrator: Orchestrator, posted: Json) -> None:
    wait_for("the end", lambda: ended(orchestrator, posted["run_uuid"]))
    assert orchestrator.store().hlen(f"example:{posted['run_uuid']}") == posted["jobs"]


@pytest.mark.servers
def test_the_demo_ends_as_the_readme_shows() -> None:
    done = subprocess.run(
        [sys.executable, "example/demo.py"], cwd=HERE, check=True, capture_output=True, timeout=170
    )
    shown = re.search(r"It ends like this:\n\n```\n(.*?)```", README, re.DOTALL)
    assert shown
    told, said = shown[1].splitlines(), done.stdout.decode().splitlines()
    assert said[-1] == told[-1] == "All jobs ran and all agents stopped."
    assert [line.split() for line in said if line.startswith("job ")] == [told[2].split()]
    assert re.fullmatch(r"24/24 jobs done, 0 left, \d agents, \d+ s", told[0])
    assert any(re.fullmatch(r"24/24 jobs done, 0 left, \d agents, \d+ s", line) for line in said)


# Kubernetes


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

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


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
RUN_LABEL = "armada.services/run-id"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
#: Of a Job's spec; Kubernetes lets a template change only before the Job has ever run.
IMMUTABLE = ["selector", "template", "completions", "completionMode", "backoffLimitPerIndex"]
IMMUTABLE += ["podFailurePolicy", "podReplacementPolicy"]


class FakeCluster:
    """What the orchestrator meets of a cluster: an API server on loopback with one namespace.

    It plays the Job controller and the kubelet as well: each pod of a Job that is not suspended is
    a real agent, a process with the environment that the manifest gives it. Left out are the
    controllers' delays. Written by hand, since the mock servers on PyPI judge nothing: kmock 0.8
    knows no selector, page, uid or precondition, and keeps an object that it was told to refuse.
    """

    def __init__(self, folder: Path, role: set[str], secrets: dict[str, dict[str, str]]) -> None:
        self.port = free_port()
        self.role, self.secrets = role, secrets
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(KUBECONFIG.format(port=self.port))
        self.agent_command = [sys.executable, str(HERE / "agent.py")]
        self.jobs: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}  #: finished ones stay until their Job goes
        self.events: list[Json] = []
        self.calls: list[str] = []  #: "create jobs", "list pods", ... as they came
        #: call -> what to do with its body before it takes effect, and with its answer after
        self.before: dict[str, Callable[[Json], object]] = {}
        self.after: dict[str, Callable[[Json], object]] = {}
        #: index -> "crash", "Unschedulable", or the reason that its container waits for
        self.trouble: dict[int, str] = {}
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
        """Status and body. Raises `Lost`."""
        if not self.awake.is_set():
            self.awake.wait()
            raise Lost
        with self.lock:
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
                result = act(name, query, body)
                self.after.get(call, dict)(result)
                return (201 if verb == "create" else 200), json.dumps(result).encode()
            except Refusal as refusal:
                status: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}}
                status |= {"status": "Failure", "message": str(refusal)}
                status |= {"reason": refusal.reason, "code": refusal.code}
                return refusal.code, json.dumps(status).encode()

    def create_job(self, _: None, query: dict[str, str], job: Json) -> Json:
        validate_strictly(job, query)
        name = job["metadata"]["name"]
        if name in self.jobs:
            raise Refusal(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        metadata = job["metadata"]
        metadata |= {"uid": str(uuid.uuid4()), "namespace": "armada", "creationTimestamp": now()}
        self.jobs[name] = job | {"status": {}}
        return self.jobs[name]

    def patch_job(self, name: str, query: dict[str, str], patch: Json) -> Json:
        job = self.find_job(name, patch.get("metadata", {}).pop("uid", None))
        patched: Json = merge_patch(job, patch)
        validate_strictly(patched, query)
        for key in IMMUTABLE:
            if patched["spec"].get(key) != job["spec"].get(key):
                raise Refusal(422, "Invalid", f'Job "{name}" is invalid: spec.{key} is immutable')
        self.jobs[name] = patched
        return patched

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
        return page("Job", self.jobs.values(), query)

    def list_pod(self, _: None, query: dict[str, str], body: Json) -> Json:
        return page("Pod", self.pods.values(), query)

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
        return [p for p in self.pods.values() if p["metadata"]["ownerReferences"][0]["uid"] == uid]

    def run_job(self, job: Json) -> None:
        spec, status, pods = job["spec"], job["status"], self.pods_of(job)
        if "Complete" in conditions(job) or "Failed" in conditions(job):
            ttl = spec.get("ttlSecondsAfterFinished")
            if ttl is not None and age(status["conditions"][-1]["lastTransitionTime"]) > ttl:
                options = {"propagationPolicy": "Background"}
                self.delete_job(job["metadata"]["name"], {}, options)
            return
        if spec.get("suspend"):
            return
        status.setdefault("startTime", now())
        done = {index_of(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}
        crashed = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
        counted = Counter(index_of(p) for p in crashed if "DisruptionTarget" not in conditions(p))
        given_up = {i for i, times in counted.items() if times > spec["backoffLimitPerIndex"]}
        live = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        overdue = age(status["startTime"]) > spec.get("activeDeadlineSeconds", math.inf)
        open_indexes = set(range(spec["completions"])) - done - given_up
        if open_indexes and overdue:
            fault = "DeadlineExceeded", "Job was active longer than specified deadline"
            status["conditions"] = [condition("FailureTarget", *fault)]
            for pod in live:
                self.terminate(pod)
            if not live:
                status["conditions"].append(condition("Failed", *fault))
        elif open_indexes:
            for index in sorted(open_indexes - {index_of(pod) for pod in live}):
                live.append(self.make_pod(job, index))
        elif given_up:
            fault = "FailedIndexes", "Job has failed indexes"
            status["conditions"] = [condition(c, *fault) for c in ("FailureTarget", "Failed")]
        else:
            reached = "CompletionsReached", "Reached expected number of succeeded pods"
            status["conditions"] = [condition("SuccessCriteriaMet", *reached)]
            status["conditions"].append(condition("Complete", *reached))
            status["completionTime"] = now()
        counts = {"active": len(live), "succeeded": len(done), "failed": len(crashed)}
        for name, count in counts.items():
            status.pop(name, None)
            status |= {name: count} if count else {}  # zero is left out, as by the API server
        status["ready"] = sum(pod["status"]["phase"] == "Running" for pod in live)
        status["terminating"] = sum("deletionTimestamp" in pod["metadata"] for pod in live)
        status["completedIndexes"], status["failedIndexes"] = ranges(done), ranges(given_up)

    def make_pod(self, job: Json, index: int) -> Json:
        template, owner = copy.deepcopy(job["spec"]["template"]), job["metadata"]
        name = f"{owner['name']}-{index}-{uuid.uuid4().hex[:5]}"
        metadata = {"labels": {}, "annotations": {}} | template["metadata"]
        metadata |= {"name": name, "namespace": "armada", "creationTimestamp": now()}
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": owner["name"]}
        metadata["ownerReferences"] = [reference | {"uid": owner["uid"], "controller": True}]
        metadata["annotations"][COMPLETION_INDEX] = str(index)
        metadata["labels"] |= {COMPLETION_INDEX: str(index), "job-name": owner["name"]}
        metadata["labels"] |= {"batch.kubernetes.io/job-name": owner["name"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self.pods[name] = pod | {"status": {"phase": "Pending"}}
        return self.pods[name]

    def run_pod(self, pod: Json) -> None:
        name, status = pod["metadata"]["name"], pod["status"]
        deleted = "deletionTimestamp" in pod["metadata"]
        if status["phase"] == "Pending":
            if deleted:
                finish(pod, 137)
            else:
                self.start_pod(pod)
        elif status["phase"] == "Running":
            code = self.processes[name].poll()
            if code is not None:
                finish(pod, code if code >= 0 else 128 - code)
            elif deleted and age(pod["metadata"]["deletionTimestamp"]) > 30:
                self.processes[name].kill()
        elif pod["metadata"]["ownerReferences"][0]["uid"] not in {
            job["metadata"]["uid"] for job in self.jobs.values()
        }:
            del self.pods[name]

    def start_pod(self, pod: Json) -> None:
        trouble = self.trouble.get(index_of(pod), "")
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
            command = [sys.executable, "-c", "exit(1)"] if trouble else self.agent_command
            self.processes[pod["metadata"]["name"]] = subprocess.Popen(
                command, env=environment, start_new_session=True
            )
            pod["status"]["phase"] = "Running"
            set_container(pod, {"running": {"startedAt": now()}})

    def agent_environment(self, pod: Json) -> dict[str, str] | None:
        """Beside PATH and HOME, what the manifest says; None where a Secret is missing."""
        [agent] = [c for c in pod["spec"]["containers"] if c["name"] == "agent"]
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
        for variable in agent["env"]:
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
        """Delete a pod: SIGTERM, and 30 s to go."""
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = now()
            if pod["status"]["phase"] == "Running":
                self.processes[pod["metadata"]["name"]].terminate()

    # The operator

    def evict(self, run_id: str, *indexes: int) -> None:
        """What a node that is drained does to its pods."""
        with self.lock:
            job = self.job(run_id)
            assert job is not None
            for pod in self.pods_of(job):
                if index_of(pod) in indexes and pod["status"]["phase"] == "Running":
                    evicted = condition("DisruptionTarget", "EvictionByEvictionAPI", "evicted")
                    pod["status"].setdefault("conditions", []).append(evicted)
                    self.terminate(pod)

    def job(self, run_id: str) -> Json | None:
        """A run's Job as it is now."""
        with self.lock:
            found = [j for j in self.jobs.values() if j["metadata"]["labels"][RUN_LABEL] == run_id]
            return copy.deepcopy(found[0]) if found else None

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
        """The reasons of the Events on a run's Jobs, in their order."""
        return [e["reason"] for e in self.events if e["involvedObject"]["name"].endswith(run_id)]

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


def index_of(pod: Json) -> int:
    return int(pod["metadata"]["annotations"][COMPLETION_INDEX])


def condition(kind: str, reason: str, message: str, status: str = "True") -> Json:
    found = {"type": kind, "status": status, "reason": reason, "message": message}
    return found | {"lastTransitionTime": now()}


def conditions(thing: Json) -> set[str]:
    """The types of its conditions that are true."""
    found = thing["status"].get("conditions", [])
    return {one["type"] for one in found if one["status"] == "True"}


def set_container(pod: Json, state: Json) -> None:
    found = {"name": "agent", "state": state, "ready": "running" in state, "restartCount": 0}
    pod["status"]["containerStatuses"] = [found | {"image": "agent", "imageID": ""}]


def finish(pod: Json, code: int) -> None:
    pod["status"]["phase"] = "Failed" if code else "Succeeded"
    reason = "Error" if code else "Completed"
    set_container(pod, {"terminated": {"exitCode": code, "reason": reason, "finishedAt": now()}})


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
    chosen = [item for item in items if selected(item, query)]
    start, limit = int(query.get("continue", 0)), int(query.get("limit") or len(chosen) or 1)
    metadata = {"resourceVersion": "1"}
    if start + limit < len(chosen):
        metadata["continue"] = str(start + limit)
    version = "batch/v1" if kind == "Job" else "v1"
    shown = chosen[start : start + limit]
    return {"kind": f"{kind}List", "apiVersion": version, "metadata": metadata, "items": shown}


def selected(item: Json, query: dict[str, str]) -> bool:
    """Whether label and field selectors choose it: `=` and `in` are known."""
    labels = item["metadata"].get("labels", {})
    for term in re.findall(r"[^,(]+(?:\([^)]*\))?", query.get("labelSelector", "")):
        found = re.fullmatch(r"([\w./-]+)(?:=([\w.-]+)| in \(([^)]*)\))?", term.strip())
        if found is None:
            raise Refusal(400, "BadRequest", f"unable to parse requirement: {term}")
        key, value, several = found.groups()
        allowed = [value] if value else (several or labels.get(key, "")).split(",")
        if key not in labels or labels[key] not in allowed:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = term.partition("=")
        if key not in ("status.phase", "metadata.name") or item["kind"] != "Pod":
            raise Refusal(400, "BadRequest", f"field label not supported: {key}")
        part, _, name = key.partition(".")
        if item[part][name] != value:
            return False
    return True


@pytest.fixture(scope="session")
def role() -> set[str]:
    """The calls that the chart's Role allows, such as "create jobs"."""
    command = [sys.executable, str(HERE / "chart" / "render.py")]
    text = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
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
def distant(
    servers: Servers, cluster: FakeCluster, start: Callable[..., Orchestrator]
) -> Callable[..., Orchestrator]:
    """Start orchestrators that have their agents in the cluster."""

    def one(**more: str) -> Orchestrator:
        settings = {"PLATFORM": "distant", "KUBECONFIG": str(cluster.kubeconfig), "TIMEOUT": "3"}
        settings |= {"MONITOR_INTERVAL_MS": "200", "KUBERNETES_INTERVAL_MS": "300"}
        return start(**real(servers, **settings | more))

    return one


def ready(servers: Servers, run_id: str) -> int | None:
    """How many jobs of a run no agent has; None where there is no queue."""
    with Connection(servers.url) as connection:
        try:
            return int(connection.default_channel.queue_declare(run_id, passive=True).message_count)
        except connection.channel_errors:
            return None


def left_of(servers: Servers, run_id: str) -> set[str]:
    """What there is of a run in Redis and RabbitMQ, beside what its own script has put there."""
    store = redis.Redis(port=servers.redis_port, decode_responses=True)
    left = {str(key) for key in store.keys(f"{run_id}*")}
    if store.hexists("armada:runs", run_id):
        left.add("its record")
    if ready(servers, run_id) is not None:
        left.add("its queue")
    control = f"armada.{run_id}"
    for name in (run_id, f"{control}.pidbox", f"reply.{control}.pidbox", f"{control}.events"):
        with Connection(servers.url) as connection, contextlib.suppress(connection.channel_errors):
            connection.default_channel.exchange_declare(name, "direct", passive=True)
            left.add(f"the exchange {name}")
    return left


def wait_for_phase(cluster: FakeCluster, run_id: str, phase: str) -> None:
    wait_for(f"{run_id} {phase}", lambda: cluster.annotation(run_id, "phase") == phase)


def wait_until_undone(servers: Servers, cluster: FakeCluster, run_id: str) -> None:
    wait_for("the undoing", lambda: not left_of(servers, run_id) and not cluster.job(run_id))
    wait_for("the end of its agents", lambda: not cluster.live())


#: An agent that does nothing, where a test is about something else.
IDLE = ["sleep", "1000"]


def begun(orchestrator: Orchestrator, run_id: str, agents: int = 1) -> None:
    """Wait until so many agents have begun a job."""
    store = orchestrator.store()
    wait_for("jobs to begin", lambda: len(set(store.hvals(f"begun:{run_id}"))) >= agents)


# The manifest


SETTINGS = {"RABBITMQ_URL": "amqp://user:hidden@h", "PLATFORM": "distant"}
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


def job_of(environment: dict[str, str], template: Json, **parts: Any) -> Json:
    settings = replace(Settings.read(SETTINGS | environment), pod_template=template)
    return fleet.manifest(parsed(**{"run": {"run_id": "r"}} | parts), "claim", settings)


@pytest.mark.parametrize("template", [{}, POD_TEMPLATE], ids=["plain", "pod template"])
@pytest.mark.parametrize("distrib", ["kube", "minikube"])
@pytest.mark.parametrize("version", ["1.30", "1.36"])
def test_the_manifest_is_valid_to_the_letter(template: Json, distrib: str, version: str) -> None:
    environment = {"DISTRIB": distrib, "IMAGE_PULL_SECRETS": "a, b", "BACKEND_URL": "http://b"}
    job = job_of(environment, template, requirements_txt=b"six")
    kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    secrets = [{"name": "a"}, {"name": "b"}] if distrib == "kube" else None
    assert pod.get("imagePullSecrets") == secrets
    policy = {"kube": "Always", "minikube": "Never"}[distrib]
    [agent] = [one for one in pod["containers"] if one["name"] == "agent"]
    assert agent["imagePullPolicy"] == policy


def test_the_pod_template_is_merged_by_key_and_by_name_and_other_lists_replace() -> None:
    plain = job_of({"BACKEND_URL": "http://b"}, {})["spec"]["template"]
    before = json.dumps(POD_TEMPLATE)
    job = job_of({"BACKEND_URL": "http://b"}, POD_TEMPLATE)
    assert json.dumps(POD_TEMPLATE) == before
    merged = job["spec"]["template"]
    assert merged["metadata"]["labels"] == {**plain["metadata"]["labels"], "team": "red"}
    spec, plain_spec = merged["spec"], plain["spec"]
    assert spec["securityContext"] == {**plain_spec["securityContext"], "runAsUser": 1000}
    assert (spec["topologySpreadConstraints"], spec["restartPolicy"]) == ([], "Never")
    assert spec["automountServiceAccountToken"] is False
    containers = {one["name"]: one for one in spec["containers"]}
    assert containers.keys() == {"agent", "proxy"}
    agent, [plain_agent] = containers["agent"], plain_spec["containers"]
    assert agent["image"] == plain_agent["image"]
    assert agent["resources"] == {**plain_agent["resources"], "limits": {"memory": "1Gi"}}
    assert agent["securityContext"]["capabilities"] == {"drop": ["NET_RAW"]}
    assert agent["securityContext"]["allowPrivilegeEscalation"] is False
    variables = {one["name"]: one for one in agent["env"]}
    assert len(variables) == len(agent["env"]) == len(plain_agent["env"]) + 1
    assert variables["BACKEND_URL"]["value"] == "http://other"
    assert variables["HOME"]["value"] == "/tmp"
    assert "secretKeyRef" in variables["RABBITMQ_URL"]["valueFrom"]


def test_a_pod_template_may_take_a_variable_from_a_secret_instead() -> None:
    source = {"secretKeyRef": {"name": "backend", "key": "url"}}
    variable = {"name": "BACKEND_URL", "valueFrom": source}
    template = {"spec": {"containers": [{"name": "agent", "env": [variable]}]}}
    job = job_of({"BACKEND_URL": "http://b"}, template)
    [agent] = job["spec"]["template"]["spec"]["containers"]
    assert [one for one in agent["env"] if one["name"] == "BACKEND_URL"] == [variable]
    kubernetes_validate.validate(job, "1.36", strict=True)


# A distant run


def finished_job(run_id: str) -> Json:
    """What is kept of a run that is over."""
    job = job_of({}, {}, run={"run_id": run_id})
    job["metadata"]["annotations"]["armada.services/phase"] = "stopped"
    job["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": "armada", "creationTimestamp": now()}
    complete = condition("Complete", "CompletionsReached", "Reached expected number of succeeded")
    return job | {"status": {"conditions": [complete], "succeeded": 2, "completedIndexes": "0,1"}}


@pytest.mark.servers
def test_a_distant_run_does_every_job_once_and_its_kubernetes_job_completes(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    others = {f"agent-old{number}": finished_job(f"old{number}") for number in range(3)}
    cluster.jobs |= copy.deepcopy(others)
    orchestrator = distant()
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_agents": 3, "number_of_jobs": 9}
    assert orchestrator.post(run=run).status_code == 200
    assert_done(orchestrator, run_id, 9)
    assert not left_of(servers, run_id)
    wait_for_phase(cluster, run_id, "stopped")
    job = cluster.job(run_id)
    assert job is not None
    assert job["metadata"]["name"] == f"agent-{run_id}"
    assert "Complete" in conditions(job)
    assert cluster.annotation(run_id, "jobs") == "9"
    assert cluster.annotation(run_id, "jobs-left") == "0"
    assert cluster.told(run_id) == ["Started", "Drained", "Stopped"]
    assert {e["involvedObject"]["uid"] for e in cluster.events} == {job["metadata"]["uid"]}
    assert "guest" not in json.dumps([job, cluster.events])
    assert others.items() <= cluster.jobs.items()
    # Its Kubernetes Job stays for inspection, and keeps its name.
    again = orchestrator.post(run=run)
    assert again.status_code == 409, again.text
    assert not left_of(servers, run_id)
    assert cluster.job(run_id) == job


@pytest.mark.servers
def test_no_agent_is_started_before_the_last_job_is_sent(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    run_id = new_run_id()
    seen = []

    def look(patch: Json) -> None:
        if patch.get("spec", {}).get("suspend") is False:
            record = json.loads(str(orchestrator.store().hget("armada:runs", run_id)))
            configs = len(orchestrator.store().keys(f"{run_id}*"))
            seen.append((ready(servers, run_id), configs, record["phase"], len(cluster.pods)))

    cluster.before["patch jobs"] = look
    run = {"run_id": run_id, "number_of_jobs": 500}
    assert orchestrator.post(run=run).status_code == 200
    assert seen == [(500, 2, "running", 0)]
    wait_for("both agents", lambda: len(cluster.live()) == 2)


@pytest.mark.servers
def test_agents_find_exactly_the_environment_of_the_contract(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers, tmp_path: Path
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
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
    }
    assert sorted(one.pop("POD_INDEX") for one in found) == ["0", "1"]
    assert found == [expected, expected]
    assert servers.url not in json.dumps(cluster.job(run_id))


@pytest.mark.servers
def test_two_orchestrators_share_their_runs(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    both = [distant(), distant()]
    ids = [new_run_id() for _ in both]
    for orchestrator, run_id in zip(both, ids, strict=True):
        assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    for orchestrator, run_id in zip(both, ids, strict=True):
        wait_for_phase(cluster, run_id, "stopped")
        assert_done(orchestrator, run_id, 6)
        assert not left_of(servers, run_id)
        assert cluster.told(run_id) == ["Started", "Drained", "Stopped"]
    assert len(both[0].events("run stopped")) == len(both[1].events("run stopped")) == 1


# Refusals of the API server, each at one call


REFUSALS: dict[str, tuple[str, Refusal, int]] = {
    "forbidden": ("create jobs", Refusal(403, "Forbidden", "jobs.batch is forbidden: User x"), 502),
    "quota": ("create jobs", Refusal(403, "Forbidden", "exceeded quota: q, requested 1"), 502),
    "invalid": ("create jobs", Refusal(422, "Invalid", "spec.template: Invalid value"), 502),
    "taken": ("create jobs", Refusal(409, "AlreadyExists", "jobs.batch agent-r already"), 409),
    "broken": ("create jobs", Refusal(500, "InternalError", "failed calling webhook"), 502),
    "unavailable": ("create jobs", Refusal(503, "ServiceUnavailable", "starting up"), 503),
    "no right to resume": ("patch jobs", Refusal(403, "Forbidden", "cannot patch resource"), 502),
    "broken at resume": ("patch jobs", Refusal(500, "InternalError", "etcdserver: time out"), 502),
}


@pytest.mark.servers
def test_what_the_api_server_refuses_is_answered_in_its_words_and_undone(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
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
        assert not left_of(servers, run_id), name
        assert not cluster.jobs, name
    assert not cluster.processes
    cluster.before = {}
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200


@pytest.mark.servers
def test_a_pod_template_with_an_unknown_field_is_refused_by_name(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "template.json").write_text('{"spec": {"nodeSelektor": {"a": "b"}}}')
    orchestrator = distant(AGENT_POD_TEMPLATE=str(tmp_path / "template.json"))
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 502, answer.text
    assert "nodeSelektor" in answer.json()["detail"]
    assert not left_of(servers, run_id)


@pytest.mark.servers
@pytest.mark.parametrize("call", ["create jobs", "patch jobs", "create events"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_is_undone_once_an_api_server_that_died_in_it_is_back(
    distant: Callable[..., Orchestrator],
    cluster: FakeCluster,
    servers: Servers,
    call: str,
    when: str,
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    run_id = new_run_id()
    hooks = {"before": cluster.before, "after": cluster.after}[when]
    hooks[call] = cluster.die
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 503, answer.text
    assert "Kubernetes" in answer.json()["detail"]
    assert bool(cluster.job(run_id)) == ((call, when) != ("create jobs", "before"))
    hooks.clear()
    cluster.up()
    wait_until_undone(servers, cluster, run_id)


@pytest.mark.servers
@pytest.mark.parametrize("how", ["down", "silent"])
def test_without_an_api_server_a_post_is_refused_and_readiness_says_so(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers, how: str
) -> None:
    orchestrator = distant(TIMEOUT="1")
    run_id = new_run_id()
    if how == "down":
        cluster.down()
    else:
        cluster.awake.clear()
    answer = orchestrator.post(run={"run_id": run_id})
    assert answer.status_code == 503, answer.text
    assert "Kubernetes" in answer.json()["detail"]
    ready = httpx.get(f"{orchestrator.url}/health?ready", timeout=60)
    assert (ready.status_code, ready.json()["failing"]) == (503, ["kubernetes"])
    assert httpx.get(f"{orchestrator.url}/health", timeout=60).status_code == 200
    if how == "down":
        cluster.up()
    else:
        cluster.awake.set()
    wait_until_undone(servers, cluster, run_id)
    assert httpx.get(f"{orchestrator.url}/health?ready", timeout=60).status_code == 200


# Faults in the course of a distant run


@pytest.mark.servers
def test_deleting_the_kubernetes_job_cancels_the_run(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 40}
    assert orchestrator.post(run=run, job={"seconds": 1}).status_code == 200
    begun(orchestrator, run_id)
    exchanges = {f"the exchange {name}" for name in (run_id, f"armada.{run_id}.pidbox")}
    kept = {f"{run_id}0", f"{run_id}1", "its record", "its queue"}
    assert left_of(servers, run_id) >= kept | exchanges
    cluster.delete(run_id)
    wait_for("the end", lambda: orchestrator.events("run cancelled"))
    wait_until_undone(servers, cluster, run_id)
    assert not orchestrator.events("run failed") + orchestrator.events("agents started anew")
    assert cluster.calls.count("create jobs") == 1


@pytest.mark.servers
def test_agents_that_were_all_evicted_are_created_anew_for_the_jobs_left(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}, job={"seconds": 1}).status_code == 200
    begun(orchestrator, run_id, agents=2)
    first = cluster.job(run_id)
    cluster.evict(run_id, 0, 1)
    assert_done(orchestrator, run_id, 6, exactly=False)
    wait_for_phase(cluster, run_id, "stopped")
    second = cluster.job(run_id)
    assert first is not None and second is not None
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    assert cluster.told(run_id) == ["Started", "Recreated", "Drained", "Stopped"]
    assert len(orchestrator.events("agents started anew")) == 1
    assert not left_of(servers, run_id)


@pytest.mark.servers
def test_agents_are_not_created_anew_without_end(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(MAX_RESTARTS="1")
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 20}
    assert orchestrator.post(run=run, job={"seconds": 0.5}).status_code == 200
    for agents in (2, 4):
        begun(orchestrator, run_id, agents)
        cluster.evict(run_id, 0, 1)
    wait_for("the Event", lambda: "Failed" in cluster.told(run_id))
    [failed] = orchestrator.events("run failed")
    done = orchestrator.store().hlen(f"done:{run_id}")
    assert failed["jobs_left"] == ready(servers, run_id) == 20 - done
    assert cluster.told(run_id) == ["Started", "Recreated", "Failed"]


@pytest.mark.servers
def test_a_run_whose_agents_all_crash_fails_and_keeps_its_jobs_until_its_kubernetes_job_goes(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.trouble = {0: "crash", 1: "crash"}
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    wait_for("the Event", lambda: "Failed" in cluster.told(run_id))
    assert "6 of 6 jobs left" in cluster.events[-1]["message"]
    assert cluster.annotation(run_id, "phase") == "failed"
    assert cluster.annotation(run_id, "jobs-left") == "6"
    [failed] = orchestrator.events("run failed")
    assert failed["jobs_left"] == ready(servers, run_id) == 6
    assert cluster.calls.count("create jobs") == 2  # a second chance, and no third
    assert len(cluster.processes) == 16  # each index once, and three times more, twice
    cluster.delete(run_id)
    wait_for("the end of what was kept", lambda: not left_of(servers, run_id))
    assert not orchestrator.events("run cancelled")


@pytest.mark.servers
def test_an_agent_that_crashes_again_and_again_is_told_of_and_does_not_harm_the_others(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.trouble = {1: "crash"}
    run_id = new_run_id()
    store = orchestrator.store()
    hold = """    while not results.exists(f"go:{job['run_id']}"): time.sleep(0.1)\n"""
    answer = orchestrator.post(
        run={"run_id": run_id, "number_of_agents": 3, "number_of_jobs": 8},
        script=SCRIPT.replace("    time.sleep(", f"{hold}    time.sleep("),
    )
    assert answer.status_code == 200
    wait_for("the Event", lambda: "AgentsFailing" in cluster.told(run_id))
    assert cluster.events[-1]["type"] == "Warning"
    store.set(f"go:{run_id}", 1)
    wait_for("the end", lambda: ended(orchestrator, run_id))
    assert store.hgetall(f"done:{run_id}") == {str(index): "1" for index in range(8)}
    wait_for_phase(cluster, run_id, "stopped")
    assert cluster.told(run_id) == ["Started", "AgentsFailing", "Drained", "Stopped"]
    job = cluster.job(run_id)
    assert job is not None
    assert (job["status"]["completedIndexes"], job["status"]["failedIndexes"]) == ("0,2", "1")
    assert not left_of(servers, run_id)


@pytest.mark.servers
def test_runs_end_within_a_minute_of_their_last_job_though_some_agents_never_start(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.trouble = {1: "ErrImagePull", 2: "Unschedulable"}
    idles, evicted = new_run_id(), new_run_id()
    for run_id in (idles, evicted):
        run = {"run_id": run_id, "number_of_agents": 3, "number_of_jobs": 1}
        assert orchestrator.post(run=run, job={"seconds": 2}).status_code == 200
        begun(orchestrator, run_id)
    cluster.evict(evicted, 0)  # it finishes its job first
    store = orchestrator.store()
    both = idles, evicted
    wait_for("both jobs", lambda: all(store.hlen(f"done:{run_id}") for run_id in both))
    wait_for("both ends", lambda: all(ended(orchestrator, run_id) for run_id in both), 60)
    for run_id in both:
        wait_for_phase(cluster, run_id, "stopped-without-all-agents")
        told = [e for e in cluster.events if e["involvedObject"]["name"].endswith(run_id)]
        [waiting] = [e for e in told if e["reason"] == "AgentsNotStarting"]
        assert waiting["type"] == "Warning"
        assert "ErrImagePull" in waiting["message"] and "Unschedulable" in waiting["message"]
        assert not left_of(servers, run_id)
    assert not [pod for pod in cluster.pods.values() if pod["status"]["phase"] == "Pending"]


@pytest.mark.servers
def test_a_run_goes_on_while_the_api_server_is_down(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}, job={"seconds": 0.5}).status_code == 200
    begun(orchestrator, run_id)
    cluster.down()
    wait_for("the monitor's word", lambda: orchestrator.events("monitor waits"))
    store = orchestrator.store()
    wait_for("all jobs", lambda: store.hlen(f"done:{run_id}") == 6)
    cluster.up()
    assert_done(orchestrator, run_id, 6)
    wait_for_phase(cluster, run_id, "stopped")
    assert len(orchestrator.events("monitor waits")) == 1
    assert len(orchestrator.events("monitor goes on")) == 1
    assert cluster.told(run_id)[-1] == "Stopped"


def die_at(orchestrator: Orchestrator) -> Callable[[Json], None]:
    """A hook of a cluster: the orchestrator is killed in this call, before or after its effect."""

    def kill(body: Json) -> None:
        assert orchestrator.process is not None
        orchestrator.process.kill()
        orchestrator.process.wait()
        # What else takes 15 s: that nobody has heard of it.
        orchestrator.store().delete(*orchestrator.store().keys("armada:owner:*"))
        raise Lost

    return kill


@pytest.mark.servers
def test_what_an_orchestrator_that_was_killed_had_only_begun_to_start_is_undone(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    first = distant()
    run_id = new_run_id()
    cluster.after["create jobs"] = die_at(first)
    with pytest.raises(httpx.TransportError):
        first.post(run={"run_id": run_id})
    job = cluster.job(run_id)
    assert job is not None and job["spec"]["suspend"] is True
    second = distant()
    wait_until_undone(servers, cluster, run_id)
    assert len(second.events("run taken over")) == 1


@pytest.mark.servers
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_was_committed_goes_on_whenever_its_orchestrator_is_killed(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers, when: str
) -> None:
    first = distant()
    run_id = new_run_id()
    hooks = {"before": cluster.before, "after": cluster.after}[when]
    hooks["patch jobs"] = die_at(first)
    with pytest.raises(httpx.TransportError):
        first.post(run={"run_id": run_id})
    hooks.clear()
    second = distant()
    assert_done(second, run_id, 6)
    wait_for_phase(cluster, run_id, "stopped")
    assert cluster.calls.count("create jobs") == 1
    assert not left_of(servers, run_id)


@pytest.mark.servers
def test_an_orchestrator_that_is_told_to_stop_leaves_its_runs_to_the_next(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    first = distant()
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 12}
    assert first.post(run=run, job={"seconds": 0.5}).status_code == 200
    begun(first, run_id, agents=2)
    first.stop()
    assert len(cluster.live()) == 2
    assert not first.store().keys("armada:owner:*")  # so that the next need not wait
    second = distant()
    assert_done(second, run_id, 12)
    assert cluster.calls.count("create jobs") == 1
    assert not left_of(servers, run_id)


@pytest.mark.servers
def test_a_kubernetes_job_that_goes_as_soon_as_it_has_ended_was_not_cancelled(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant(TTL_SECONDS_AFTER_FINISHED="0", KUBERNETES_INTERVAL_MS="3000")
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    assert_done(orchestrator, run_id, 6)
    assert cluster.job(run_id) is None
    assert not orchestrator.events("run cancelled")
    assert not left_of(servers, run_id)


# What the orchestrator asks of the API server


@pytest.mark.servers
def test_thirty_agents_cost_no_more_calls_than_three(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    made = []
    for agents in (3, 30):
        cluster.calls.clear()
        run_id = new_run_id()
        run = {"run_id": run_id, "number_of_agents": agents}
        assert orchestrator.post(run=run).status_code == 200
        wait_for("some looks", lambda: cluster.calls.count("list jobs") >= 8)
        assert len(cluster.live()) == agents
        cluster.delete(run_id)
        wait_until_undone(servers, cluster, run_id)
        made.append(Counter(cluster.calls))
    few, many = made
    assert many["list pods"] <= many["list jobs"]
    for counted in made:
        del counted["list jobs"], counted["list pods"]  # as often as there was time for
    assert few == many


@pytest.mark.servers
def test_the_charts_role_allows_the_calls_that_are_made_and_no_others(
    distant: Callable[..., Orchestrator], cluster: FakeCluster, servers: Servers, role: set[str]
) -> None:
    orchestrator = distant()
    cluster.agent_command = IDLE
    cluster.trouble = {0: "ContainerCreating", 1: "ImagePullBackOff"}
    assert orchestrator.post().status_code == 200
    wait_for("a look at the pods", lambda: "list pods" in cluster.calls)
    cluster.before["patch jobs"] = Refusal(500, "InternalError", "once")
    assert orchestrator.post().status_code == 502
    assert set(cluster.calls) == role


# Soak


class Soak:
    """Random runs under random kills, for as long as is set: `make soak`.

    Two orchestrators share a Redis and a RabbitMQ. One thing is killed at a time, and started again
    after a while; what is posted meanwhile goes on.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance, self.servers = random.Random(seed), Servers(folder)
        environment = real(self.servers, TIMEOUT="3", MAX_RESTARTS="1000", LOCAL_MAX_AGENTS="3")
        self.orchestrators = [Orchestrator(environment, folder / f"log{n}") for n in range(2)]
        self.pool = ThreadPoolExecutor(8)
        self.posts: dict[str, tuple[int, Future[int]]] = {}  # run id -> jobs, status (0: none came)
        self.began = time.monotonic()
        self.did: Counter[str] = Counter()

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {what}", flush=True)
        self.did[what.split()[0]] += 1

    def store(self) -> "redis.Redis":
        return redis.Redis(port=self.servers.redis_port, decode_responses=True)

    def post(self) -> None:
        run_id, chance = new_run_id(), self.chance
        run = {"run_id": run_id, "number_of_agents": chance.randint(1, 3)}
        run["number_of_jobs"] = jobs = chance.choice([2, 10, 50, 5000])
        job = {"seconds": 0 if jobs == 5000 else chance.uniform(0, 0.5)}
        orchestrator = chance.choice(self.orchestrators)

        def status() -> int:
            try:
                answer = orchestrator.post(run=run, job=job, jobs_csv="retry\n\n1\n")
            except httpx.TransportError as error:
                self.say(f"unanswered: {error!r}")
                return 0
            return answer.status_code

        self.posts[run_id] = jobs, self.pool.submit(status)
        self.say(f"posted {run_id}: {jobs} jobs, {run['number_of_agents']} agents")

    def kill_agent(self) -> None:
        name = self.chance.choice(["SIGTERM", "SIGKILL"])
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            watchers = [child for one in self.orchestrators for child in one.running.children()]
            agents = [agent for watcher in watchers for agent in watcher.children()]
            if not agents:
                return
            agent = self.chance.choice(agents)
            if name == "SIGKILL":
                os.killpg(agent.pid, signal.SIGKILL)  # with the process that does the jobs
            else:
                agent.terminate()
            self.say(f"agents: {name}")

    def kill_orchestrator(self) -> None:
        orchestrator = self.chance.choice(self.orchestrators)
        name = self.chance.choice(["SIGTERM", "SIGKILL"])
        orchestrator.running.send_signal(getattr(signal, name))
        self.say(f"orchestrators: {name}")
        assert orchestrator.process and orchestrator.process.wait(60) is not None
        time.sleep(self.chance.choice([0, 2, 20]))  # in which the other takes over, or not
        orchestrator.start()

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
        for orchestrator in self.orchestrators:
            orchestrator.start()
        faults = [self.kill_agent] * 5 + [
            self.kill_orchestrator,
            self.kill_rabbitmq,
            self.kill_redis,
        ]
        while time.monotonic() - self.began < seconds:
            if self.store().hlen("armada:runs") < 4:
                self.post()
            time.sleep(self.chance.uniform(0, 3))  # the next fault may come in this POST
            self.chance.choice(faults)()
        self.say("waiting for the runs to end")
        wait_for("the end", lambda: not self.store().hlen("armada:runs"), 300)
        return self.count()

    def count(self) -> bool:
        lost = wrong = 0
        for run_id, (jobs, post) in self.posts.items():
            answer = {200: "done", 503: "refused", 0: "unanswered"}[post.result()]
            self.did[answer] += 1
            done = set(self.store().hkeys(f"done:{run_id}"))
            left = {str(index) for index in range(jobs)} - done
            wrongs = {"done": left, "refused": done, "unanswered": left and done}[answer]
            if wrongs:
                print(f"{run_id} was to be {answer}: {len(left)} jobs left, {len(done)} done")
                lost, wrong = lost + len(left), wrong + 1
            assert_nothing_left(self.orchestrators[0], run_id)
        for orchestrator in self.orchestrators:
            orchestrator.stop()
            wrong += len(orchestrator.events("monitor failed"))
        for kind in ("queues", "exchanges"):
            listed = self.servers.rabbitmqctl("-q", "--no-table-headers", f"list_{kind}", "name")
            names = {name for name in listed.split() if not name.startswith("amq.")}
            wrong += len(names)
            print(f"{kind} left: {names or 'none'}")
        print(dict(self.did))
        print(f"{lost} jobs lost, {wrong} faults")
        return not wrong

    def stop(self) -> None:
        for orchestrator in self.orchestrators:
            orchestrator.stop()
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

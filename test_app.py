"""What the orchestrator does, in the order of a run's life. Real servers, real agents.

Tests look at what landed: in Redis, in the queue, in the process table.
"""

import contextlib
import csv
import io
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest
import redis
from celery import Celery
from celery.utils.saferepr import saferepr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kombu import Connection

import broker as broker_module
import fleet
import merge
from merge import Invalid, Limits, Run, parse_run
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
"""


def free_port() -> int:
    """A port that nobody gets by chance: below those that the system hands to clients."""
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

    def rabbitmqctl(self, *arguments: str) -> None:
        command = [str(RABBITMQ.with_name("rabbitmqctl")), *arguments]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

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

    def pids(self) -> list[int]:
        """This process and all below it."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children]

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


def assert_nothing_left(orchestrator: Orchestrator, run_id: str) -> None:
    """The process table, Redis and the broker are empty of a run."""
    wait_for(f"{run_id} to be forgotten", lambda: ended(orchestrator, run_id))
    processes = psutil.process_iter(["cmdline", "environ"])
    agents = [
        p.info["cmdline"] for p in processes if (p.info["environ"] or {}).get("RUN_ID") == run_id
    ]
    assert not agents
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


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
objects = st.dictionaries(st.text(), values, max_size=4)


@given(objects, objects)
def test_merging_keeps_its_laws(default: Any, override: Any) -> None:
    before = orjson.dumps(default) if _dumps(default) else None
    once = merge.merge(default, override)
    assert merge.merge(once, override) == once
    assert merge.merge(default, {}) is default
    assert all(once[key] is default[key] for key in default if key not in override)
    assert before is None or orjson.dumps(default) == before


def _dumps(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


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


def test_a_column_counted_from_one_is_read_so_with_a_warning() -> None:
    run = parsed(jobs_csv="targetted_job,v\n1,a\n6,b\n")
    assert [job.get("v") for job in run.jobs] == ["a", None, None, None, None, "b"]
    assert "counted from 1" in run.warnings[0]


def test_rows_outside_the_count_are_ignored_with_a_warning() -> None:
    run = parsed(jobs_csv="targetted_job,v\n0,a\n6,b\n9,c\n")
    assert [job.get("v") for job in run.jobs] == ["a", None, None, None, None, None]
    assert "2 rows target no index below 6" in run.warnings[0]


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(
    lambda text: text and text[0] not in "{["
) | st.dictionaries(st.text("abc", min_size=1), st.integers(0, 99) | st.text("x,\" '{")).map(
    json.dumps
)


@given(st.lists(st.tuples(cells, cells), max_size=6), st.booleans())
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_a_spreadsheet_writes_is_read_back(rows: Any, windows: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n" if windows else "\n")
    writer.writerows([("x", "y"), *rows])
    run = parsed(jobs_csv=text.getvalue())
    for job, row in zip(run.jobs, rows, strict=False):
        for key, cell in zip("xy", row, strict=True):
            assert job[key] == (merge._cell_value(cell) if cell[0] == "{" else cell)


def test_messages_encoded_share_by_share_are_what_orjson_makes() -> None:
    run = parsed(job={"u": {"a": [1]}, "s": "é", "n": 1}, jobs_csv='u\n{"b": 1}\n')
    for messages in (run.jobs, run.configs):
        for message in messages:
            assert orjson.loads(messages.encode(message)) == message


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


def test_the_isolating_line_is_appended_to_every_script() -> None:
    run = parsed(agents_csv='targetted_agent,code\n1,"x = 1"\n', script="import os")
    codes = [config["code"] for config in run.configs]
    assert codes[0].splitlines()[0] == "import os"
    assert codes[1].splitlines()[0] == "x = 1"
    assert all("app.conf.control_exchange = 'armada.generated'" in code for code in codes)


def test_configtune_replaces_whole_strings_with_the_values_own_type() -> None:
    run = parsed(
        run={"number_of_jobs": "$env_N"},
        job={"a": ["$env_X", "$env_NO", "x$env_X"]},
        configtune=b'{"N": 3, "X": {"y": null}}',
    )
    assert len(run.jobs) == 3
    assert next(iter(run.jobs))["a"] == [{"y": None}, "$env_NO", "x$env_X"]


# Bad input: expected status, part, words of the message


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("count of 0", {"run": {"number_of_jobs": 0}}, 422, "an integer from 1"),
    ("count of -1", {"run": {"number_of_jobs": -1}}, 422, "not -1"),
    ("count of 1.5", {"run": {"number_of_agents": 1.5}}, 422, "not 1.5"),
    ("count true", {"run": {"number_of_agents": True}}, 422, "not true"),
    ("count in quotes", {"run": {"number_of_agents": "3"}}, 422, "without quotes"),
    ("too many jobs", {"run": {"number_of_jobs": 10**7}}, 422, "at most 1000000"),
    ("image in upper case", {"run": {"image_name": "Agent"}}, 422, "DNS label"),
    ("version a number", {"run": {"image_version": 1}}, 422, "Docker tag"),
    ("memory of 512 MB", {"run": {"agent_memory": "512 MB"}}, 422, "512Mi"),
    ("memory a number", {"run": {"agent_memory": 512}}, 422, "in quotes"),
    ("cpu of zero", {"run": {"agent_cpu": "0m"}}, 422, "more than zero"),
    ("run id with a slash", {"run": {"run_id": "a/b"}}, 422, "DNS label"),
    ("run id of 60", {"run": {"run_id": "a" * 60}}, 422, "63"),
    ("no script", {"script": None}, 422, "no script"),
    ("code a number", {"script": None, "agent": {"code": 5}}, 422, "must be a string"),
    ("script that does not compile", {"script": "x = 1\nif x\n"}, 422, "line 2"),
    ("script with a NUL byte", {"script": "x\0"}, 422, "NUL"),
    ("a lone surrogate", {"job": {"a": "\ud800"}}, 422, "surrogate"),
    ("an integer of 65 bits", {"job": {"a": 2**65}}, 422, "64 bits"),
    ("not JSON", {"configtemplate": b'{"a": 1,}'}, 400, "line 1, column"),
    ("NaN", {"configtemplate": b'{"a":\n NaN}'}, 400, "NaN is not JSON"),
    ("1e999", {"configtune": b'{"a": 1e999}'}, 422, "too large"),
    ("a list", {"configtemplate": b"[]"}, 422, "must be a JSON object"),
    ("duplicated keys", {"configtune": b'{"a": 1, "a": 2}'}, 422, "stands twice"),
    ("deep nesting", {"configtune": b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"}, 422, "deeper"),
    ("very deep", {"configtune": b"[" * 99999}, 422, "deeper"),
    ("UTF-16", {"data_job": "a,b\n".encode("utf-16")}, 422, "UTF-16"),
    ("Latin-1", {"data_job": b"a\n\xe9\n"}, 422, "0xe9"),
    ("semicolons", {"jobs_csv": "a;b\n1;2\n"}, 422, "semicolons"),
    ("a NUL byte", {"jobs_csv": "a\nx\0\n"}, 422, "NUL"),
    ("old Mac lines", {"jobs_csv": "a\rb\r"}, 422, "carriage return"),
    ("an open quote", {"jobs_csv": 'a,b\n1,"x\n2,y\n'}, 422, "never closes"),
    ("a quote inside", {"jobs_csv": 'a,b\n1,"x"y\n'}, 422, "closing quote"),
    ("two rows for one", {"jobs_csv": "targetted_job,a\n1,x\n1,y\n"}, 422, "second row"),
    ("target not a number", {"jobs_csv": "targetted_job,a\nx,1\n"}, 422, "whole number"),
    ("target of 1.5", {"jobs_csv": "targetted_job,a\n1.5,1\n"}, 422, "whole number"),
    ("column twice", {"jobs_csv": "a,a\n1,2\n"}, 422, "stands twice"),
    ("column without name", {"jobs_csv": "a,\n1,2\n"}, 422, "no name"),
    ("a run_id column", {"jobs_csv": "run_id\nx\n"}, 422, "cannot be overridden"),
    ("more cells than columns", {"jobs_csv": "a\n1,2\n"}, 422, "2 cells in 1"),
    ("code of one agent", {"agents_csv": "code\nif x\n"}, 422, "does not compile"),
    ("requirements not text", {"requirements_txt": b"\xff\xff"}, 422, "UTF-8"),
]


@pytest.mark.parametrize(
    ("parts", "status", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_with_what_is_wrong(
    parts: dict[str, Any], status: int, words: str
) -> None:
    with pytest.raises(Invalid) as caught:
        parsed(**parts)
    assert caught.value.status == status
    assert any(words in problem.message for problem in caught.value.problems)


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    found = problems(
        run={"number_of_jobs": 0, "image_name": "A"},
        jobs_csv="targetted_job,a\nx,1\n0,1,2\n",
    )
    where = {(p.part, p.line, p.field) for p in found}
    assert where == {
        ("configtemplate", None, "run_message.number_of_jobs"),
        ("configtemplate", None, "run_message.image_name"),
        ("data_job", 2, "targetted_job"),
        ("data_job", 3, None),
    }


def test_a_merged_message_over_its_limit_is_413() -> None:
    limits = Limits(message=1000)
    big = form(jobs_csv="a\n" + "x" * 2000 + "\n", script="")
    big["python_code"] = b"x"
    with pytest.raises(Invalid) as caught:
        parse_run(big, "id", limits)
    assert caught.value.status == 413
    assert "MAX_MESSAGE_BYTES" in str(caught.value)


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


# A whole run


@pytest.mark.servers
def test_a_run_does_every_job_once_and_its_agents_stop(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    answer = orchestrator.post(run={"run_id": run_id}, jobs_csv="retry\n\n3\n")
    assert answer.status_code == 200, answer.text
    assert orchestrator.post(run={"run_id": run_id}).status_code == 409
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_three_runs_at_once_keep_to_themselves(orchestrator: Orchestrator) -> None:
    ids = [f"r{number}-{uuid.uuid4().hex[:6]}" for number in range(3)]
    seconds = ("0", "1", "2")
    for run_id, length in zip(ids, seconds, strict=True):
        run = {"run_id": run_id, "number_of_jobs": 8}
        assert orchestrator.post(run=run, job={"seconds": length}).status_code == 200
    for run_id in ids:
        assert_done(orchestrator, run_id, 8)


@pytest.mark.servers
def test_one_of_twenty_posts_of_one_run_id_wins(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    with ThreadPoolExecutor(20) as pool:
        posts = pool.map(lambda _: orchestrator.post(run={"run_id": run_id}), range(20))
        statuses = sorted(answer.status_code for answer in posts)
    assert statuses == [200] + [409] * 19
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_run_leaves_nothing_in_rabbitmq(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers))
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    assert_done(orchestrator, run_id, 6)
    with Connection(servers.url) as connection:
        names = (f"armada.{run_id}.pidbox", f"reply.armada.{run_id}.pidbox", run_id)
        for name in (*names, f"armada.{run_id}.events"):
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().exchange_declare(name, "direct", passive=True)
        with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
            connection.channel().queue_declare(run_id, passive=True)


# Faults


class Proxy:
    """Stands before a server, and fails as a server or a network does, at a chosen moment."""

    def __init__(self, server: int) -> None:
        self.server, self.port = server, free_port()
        self.listener: socket.socket | None = None
        self.answer, self.done = False, threading.Event()
        self.open: set[socket.socket] = set()
        self.flows = threading.Event()
        self.mend()

    def at(self, moment: bytes, do: Callable[[], object], answer: bool = False) -> threading.Event:
        """Call `do` when a client sends these bytes, before they are passed on, or before their
        answer is. Returns what is set afterwards."""
        self.moment, self.do, self.answer, self.done = moment, do, answer, threading.Event()
        return self.done

    def mend(self) -> None:
        """Let everything pass."""
        self.moment = b""
        self.asker: socket.socket | None = None
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
                server = socket.create_connection(("127.0.0.1", self.server))
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


@dataclass
class Proxied:
    """An orchestrator with a proxy before each of its servers."""

    orchestrator: Orchestrator
    redis: Proxy
    rabbitmq: Proxy

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


def moments(run_id: str) -> dict[str, tuple[str, bytes]]:
    """What an orchestrator sends in each step of a run's life, and to which server."""
    name = run_id.encode()
    queue = b"\0\0" + bytes([len(name)]) + name
    return {
        # AMQP 0-9-1: class and method, what is reserved, names, flags
        "look for the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\x09"),
        "claim the run": ("redis", b'"phase":"starting"'),
        "store the configs": ("redis", b"\r\n" + name + b"0\r\n"),
        "declare the queue": ("rabbitmq", b"\0\x32\0\x0a" + queue + b"\2"),
        "send the jobs": ("rabbitmq", b"\0\x3c\0\x28\0\0" + queue[1:]),
        "commit the run": ("redis", b'"phase":"running"'),
        "drop the agents": ("redis", b'"phase":"restarting"'),
        "start agents anew": ("redis", b'"phase":"running"'),
        "drain the run": ("redis", b'"phase":"drained"'),
        "delete the queue": ("rabbitmq", b"\0\x32\0\x28" + queue),
        "forget the run": ("redis", b"HDEL\r\n$11\r\narmada:runs\r\n"),
    }


START = list(moments(""))[:6]
END = list(moments(""))[6:]


def proxied(servers: Servers, start: Callable[..., Orchestrator], **more: str) -> Proxied:
    """Agents go to the servers without a detour."""
    redis_proxy, rabbitmq_proxy = Proxy(servers.redis_port), Proxy(servers.amqp_port)
    direct = {"REDIS_PORT_VAR_ENV": str(servers.redis_port), "RABBITMQ_URL": servers.url}
    command = ["env", *(f"{key}={value}" for key, value in direct.items())]
    environment = {
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(redis_proxy.port),
        "RABBITMQ_URL": servers.url.replace(str(servers.amqp_port), str(rabbitmq_proxy.port)),
        "AGENT_COMMAND": shlex.join([*command, sys.executable, str(HERE / "agent.py")]),
        "TIMEOUT": "1",
        **more,
    }
    return Proxied(start(**environment), redis_proxy, rabbitmq_proxy)


@pytest.fixture(scope="session")
def shared(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One that many tests in a row use."""

    def start(**environment: str) -> Orchestrator:
        made = Orchestrator(environment, tmp_path_factory.mktemp("shared") / "log")
        made.start()
        return made

    made = proxied(servers, start)
    yield made
    made.mend()
    made.orchestrator.stop()


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
    assert_nothing_left(orchestrator, run_id)
    assert not orchestrator.store().exists(f"done:{run_id}", f"begun:{run_id}")


@pytest.mark.servers
def test_a_second_post_does_not_disturb_a_start_that_goes_on(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, AGENT_COMMAND=""))
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 60_000}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(orchestrator.post, run=run)
        wait_for("the claim", lambda: orchestrator.store().hexists("armada:runs", run_id))
        assert orchestrator.post(run={"run_id": run_id}).status_code == 409
        assert first.result().status_code == 200
    with Connection(servers.url) as connection:
        found = connection.default_channel.queue_declare(run_id, passive=True)
        assert found.message_count == 60_000
        connection.default_channel.queue_delete(run_id)
    wait_for("the end", lambda: ended(orchestrator, run_id))


@pytest.mark.servers
def test_a_broker_killed_while_jobs_are_sent_leaves_nothing_once_it_is_back(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, TIMEOUT="5"))
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 200_000}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(orchestrator.post, run=run)
        wait_for("the configs", lambda: orchestrator.store().exists(f"{run_id}1"))
        servers.kill_rabbitmq()
        answer = first.result()
    assert answer.status_code == 503
    assert "RabbitMQ" in answer.json()["detail"]
    servers.start_rabbitmq()
    wait_for("the undoing", lambda: ended(orchestrator, run_id))
    assert not orchestrator.store().keys(f"{run_id}*")
    connection = Connection(servers.url)
    with connection, pytest.raises(connection.channel_errors, match="NOT_FOUND"):
        connection.channel().queue_declare(run_id, passive=True)


@pytest.mark.servers
def test_a_broker_that_blocks_publishers_gives_503_and_the_start_is_undone(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, TIMEOUT="3"))
    run_id = new_run_id()
    servers.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        answer = orchestrator.post(run={"run_id": run_id})
        assert answer.status_code == 503
        assert "memory or disk alarm" in answer.json()["detail"]
    finally:
        servers.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    wait_for("the undoing", lambda: ended(orchestrator, run_id))
    assert orchestrator.post(run={"run_id": run_id}).status_code == 200
    assert_done(orchestrator, run_id, 6)


@pytest.mark.servers
def test_a_job_whose_agent_is_killed_is_done_by_another(orchestrator: Orchestrator) -> None:
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 4}
    assert orchestrator.post(run=run, job={"seconds": 2}).status_code == 200
    store = orchestrator.store()
    begun = wait_for("a job", lambda: store.hgetall(f"begun:{run_id}"))
    for child in psutil.Process(int(next(iter(begun.values())))).children():
        child.kill()
    psutil.Process(int(next(iter(begun.values())))).kill()
    wait_for("the end", lambda: ended(orchestrator, run_id))
    assert set(store.hgetall(f"done:{run_id}")) == set("0123")


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
def test_agents_that_crash_for_good_fail_the_run_with_its_jobs_kept(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    orchestrator = start(**real(servers, MAX_RESTARTS="1", KEEP_FAILED="3"))
    run_id = new_run_id()
    assert orchestrator.post(run={"run_id": run_id}, script="1 / 0").status_code == 200
    failed = wait_for("the failure", lambda: orchestrator.events("run failed"))
    assert failed[0]["jobs_left"] == 6
    assert failed[0]["agents_failed"] == 2
    wait_for("the end", lambda: ended(orchestrator, run_id))


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
    assert orchestrator.process is not None
    orchestrator.process.kill()
    wait_for_the_end_of(below)


@pytest.mark.servers
def test_a_run_goes_on_after_its_orchestrator_was_killed(
    start: Callable[..., Orchestrator], servers: Servers
) -> None:
    first = start(**real(servers))
    run_id = new_run_id()
    assert first.post(run={"run_id": run_id}, job={"seconds": 1}).status_code == 200
    wait_for("a job", lambda: first.store().hgetall(f"begun:{run_id}"))
    assert first.process is not None
    first.process.kill()
    second = start(**real(servers))
    assert_done(second, run_id, 6, exactly=False)
    assert second.events("run taken over")


@pytest.mark.servers
@pytest.mark.parametrize("server", ["redis", "rabbitmq"])
def test_a_run_outlives_a_restart_of_its_servers(
    start: Callable[..., Orchestrator], servers: Servers, server: str
) -> None:
    orchestrator = start(**real(servers))
    run_id = new_run_id()
    run = {"run_id": run_id, "number_of_jobs": 10}
    assert orchestrator.post(run=run, job={"seconds": 1}).status_code == 200
    wait_for("a job", lambda: orchestrator.store().hgetall(f"begun:{run_id}"))
    getattr(servers, f"kill_{server}")()
    wait_for("the monitor's word", lambda: orchestrator.events("monitor waits"))
    ready = httpx.get(f"{orchestrator.url}/health?ready", timeout=60)
    assert (ready.status_code, ready.json()["failing"]) == (503, [server])
    refused = orchestrator.post()
    assert refused.status_code == 503
    assert {"redis": "Redis", "rabbitmq": "RabbitMQ"}[server] in refused.json()["detail"]
    getattr(servers, f"start_{server}")()
    wait_for("the end", lambda: ended(orchestrator, run_id), 150)
    done = set(orchestrator.store().hgetall(f"done:{run_id}"))
    assert len(done) == 10
    assert len(orchestrator.events("monitor waits")) == 1
    assert httpx.get(f"{orchestrator.url}/health?ready", timeout=60).status_code == 200
    wait_for("an empty registry", lambda: not orchestrator.store().hlen("armada:runs"))


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
    assert set(orchestrator.store().hgetall(f"done:{run_id}")) == set("012345")
    wait_for("the run to be forgotten", lambda: ended(orchestrator, run_id))


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

    def workers() -> bool:
        return any(event.get("workers") == 2 for event in orchestrator.events("run progress"))

    wait_for("both workers", workers)
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
    wait_for("the run to be forgotten", lambda: ended(orchestrator, run_id))


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

"""What happens inside an agent: the reference agent, and the ending of every script.

The reference agent installs its requirements, fetches its config, executes its script and is a
Celery worker from then on. It relies on nothing but its environment (RUN_ID, POD_INDEX,
REDIS_HOST_VAR_ENV, REDIS_PORT_VAR_ENV, RABBITMQ_URL and, where given, REQUIREMENTS_TXT); a script
that works here works in any other agent of the platform.

The ending is appended to every script, and gives the worker that executes it, whichever that is, a
burst mode: it ends by itself when there is nothing left to do, and notes what became of its jobs.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable


class Ending:
    """Ends a worker when its run is drained, and notes in Redis what became of each job.

    Its source is what scripts get, so it imports what it needs where it needs it, and is written
    for every Celery from 5.2 on and Python from 3.8 on. Whatever it does, no job depends on it: a
    job is in the queue, or held unacknowledged by a live connection, or has been noted.
    """

    INTERVAL = 0.3  # seconds between two looks; two in a row must find nothing
    PATIENCE = 15.0  # seconds for which a Redis that is away is waited for with an outcome
    TRIES = 3  # times that a job may take its agent down with it
    LISTED = 1000  # failures that are told with their reason

    def __init__(self, run_id: str, script: dict[str, Any]) -> None:
        """`script` is the namespace of the script."""
        import linecache
        import logging

        import redis

        host, port = os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"])
        self.run_id = run_id
        self.index = os.environ.get("POD_INDEX", "")
        self.redis = redis.Redis(host, port, socket_timeout=5, socket_connect_timeout=5)
        if hasattr(self.redis, "set_retry"):  # `ask` tries again itself, and knows when to stop
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            self.redis.set_retry(Retry(NoBackoff(), 0))
        self.succeeded = "armada:succeeded:" + run_id
        self.failed = "armada:failed:" + run_id
        self.failures = "armada:failures:" + run_id
        self.begun = "armada:begun:" + run_id
        self.log = logging.getLogger("armada")
        self.told_to_go = False
        self.connections = self.empty = 0
        self.lost: Any = None  # a connection that is to be replaced
        self.jobs: dict[str, int] = {}  # index by task id, at work in this process
        config = script.get("agent_message")
        if isinstance(config, dict) and isinstance(code := config.get("code"), str):
            # So that tracebacks show the script's own lines.
            linecache.cache["<string>"] = (len(code), None, code.splitlines(True), "<string>")

    def connect(self) -> None:
        """Connect the signals. Not later than here: a prefork child has those of its fork."""
        from celery import signals

        for each, receiver in (
            (signals.celeryd_init, self.on_init),
            (signals.worker_shutting_down, self.on_told_to_go),
            (signals.worker_shutdown, self.on_shutdown),
            (signals.task_prerun, self.on_begin),
            (signals.task_postrun, self.on_end),
            (signals.task_success, self.on_success),
            (signals.task_failure, self.on_failure),
            (signals.task_unknown, self.on_unknown),
        ):
            each.connect(receiver, weak=False)

    # The worker

    def on_init(self, instance: Any, conf: Any, options: Any = None, **_: Any) -> None:
        """The worker is about to be built. Here, since a script may have rebound `app`."""
        from celery import bootsteps
        from celery.worker import consumer as parts

        ending = self

        class Drain(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                ending.on_connection(consumer)
                self.timer = consumer.timer.call_repeatedly(
                    ending.INTERVAL, ending.on_time, (consumer,)
                )

            def stop(self, consumer: Any) -> None:
                if timer := getattr(self, "timer", None):
                    timer.cancel()

        # N agents would send one another N * N messages, and nobody asks the workers anything. The
        # connection for events, which hangs where a broker falls silent, is only made with -E.
        listened_to = (options or {}).get("task_events") or conf.worker_send_task_events
        unheard = () if listened_to else (parts.Heart, parts.Events)
        for part in (parts.Gossip, parts.Mingle, *unheard):
            part.include_if = lambda *_: False
        conf.worker_enable_remote_control = False
        conf.task_default_queue = self.run_id  # where the jobs that jobs send are done
        instance.app.steps["consumer"].add(Drain)

    def on_connection(self, consumer: Any) -> None:
        """Celery has made its strategies, anew for each connection: how a message becomes a job."""
        self.connections += 1
        self.empty = 0
        for name, strategy in list(consumer.strategies.items()):
            consumer.strategies[name] = self.judging(strategy)

    def on_time(self, consumer: Any) -> None:
        """Look from the loop that owns the connection, whichever thread the timer runs in."""
        if consumer.hub:
            self.look(consumer)
        else:
            consumer.call_soon(self.look_from_synloop, consumer)

    def look_from_synloop(self, consumer: Any) -> None:
        """Look from gevent's loop, which only logs what is raised here: so let its reading fail."""
        connection = consumer.connection
        if connection is self.lost:
            return
        try:
            self.look(consumer)
        except connection.connection_errors as error:
            reason = ConnectionResetError(f"the connection to the broker is lost: {error!r}")

            def drain_events(**_: Any) -> None:
                raise reason

            connection.drain_events = drain_events
            self.lost = connection

    def look(self, consumer: Any) -> None:
        """End the worker when it holds nothing and the queue is empty, twice in a row."""
        from celery.worker import state

        # Asking the broker may bring a job in.
        busy = self.holds(consumer) or self.queued(consumer) or self.holds(consumer)
        self.empty = 0 if busy else self.empty + 1
        if self.empty >= 2 and state.should_stop is None:
            state.should_stop = 0
            if not consumer.hub:  # this loop would wait two more seconds for messages
                state.maybe_shutdown()

    def holds(self, consumer: Any) -> bool:
        """Whether the worker has a job. Asks in the direction in which a job moves."""
        from types import SimpleNamespace

        from celery.worker import control, state

        asked = SimpleNamespace(consumer=consumer, tset=set)
        if control.scheduled(asked):
            return True
        if any(bucket and bucket.contents for bucket in consumer.task_buckets.values()):
            return True
        return bool(control.reserved(asked)) or any(map(self.active, list(state.active_requests)))

    def active(self, request: Any) -> bool:
        """Whether a request is at work.

        Celery 5.6 keeps an early acknowledged one for ever whose connection was cut meanwhile.
        """
        index = self.index_of(request.info()["args"])
        return self.connections == 1 or (index is not None and not self.noted(index))

    def queued(self, consumer: Any) -> bool:
        """Whether the queue has a job. One that is missing has none; any doubt means yes.

        Raises an error that makes Celery connect anew where the broker is silent (for 5 s) or gone.
        """
        connection = consumer.connection
        if not connection.connected:  # kombu would open one that Celery does not read from
            raise ConnectionResetError("the connection to the broker is lost")
        transport = getattr(connection.connection, "transport", None)  # py-amqp's
        try:
            if not transport:  # Redis; one channel more would stop Celery 5.3 from consuming
                return self.ready(connection.default_channel)
            # A channel of its own: a missing queue closes it.
            with transport.having_timeout(5), connection.channel() as channel:
                return self.ready(channel)
        except connection.channel_errors as error:
            return "no queue" not in str(error)

    def ready(self, channel: Any) -> bool:
        """Whether messages wait in the queue. Raises a channel error where there is no queue."""
        return bool(channel.queue_declare(self.run_id, passive=True).message_count)

    def on_told_to_go(self, **_: Any) -> None:
        """SIGTERM: an eviction, a node drain, a scale-down."""
        self.told_to_go = True

    def on_shutdown(self, sender: Any, **_: Any) -> None:
        """All is done that a worker does. Kubernetes replaces no pod that ends with 0."""
        # Celery's own code too: `worker_main` and the command of 5.2 drop it.
        if code := 143 if self.told_to_go else sender.exitcode:
            raise SystemExit(code)

    # The jobs

    def index_of(self, args: Any) -> int | None:
        """The index of the job that a task was called with; None where it is no job of the run."""
        job = args[0] if isinstance(args, (list, tuple)) and args else None
        if not isinstance(job, dict) or job.get("run_id") != self.run_id:
            return None
        index = job.get("targetted_job")
        return index if type(index) is int and index >= 0 else None

    def judging(self, strategy: Callable[..., Any]) -> Callable[..., Any]:
        """A strategy that judges each delivery before it becomes a job."""

        def judge(message: Any, *rest: Any, **more: Any) -> Any:
            if not self.settled(message):
                return strategy(message, *rest, **more)
            message.ack()
            return None

        return judge

    def settled(self, message: Any) -> bool:
        """Whether a delivery is not to be done: it has succeeded, or took its agents with it."""
        payload = message.payload
        index = self.index_of(payload[0] if isinstance(payload, (list, tuple)) else None)
        if index is None:
            return False
        answer = self.ask(lambda pipe: pipe.getbit(self.succeeded, index).hget(self.begun, index))
        succeeded, begun = answer or (0, None)
        if succeeded:
            self.log.warning("job %s came again and has succeeded: not repeated", index)
            return True
        if not message.delivery_info.get("redelivered") or int(begun or 0) < self.TRIES:
            return False
        self.note(index, f"quarantined: {self.TRIES} agents ended in the middle of it")
        return True

    def on_begin(self, task_id: str, args: Any = None, **_: Any) -> None:
        """A job begins; what has begun and never ends has taken its agent down."""
        index = self.index_of(args)
        if index is not None:
            self.jobs[task_id] = index  # the script may change what it was called with
            self.ask(lambda pipe: pipe.hincrby(self.begun, index, 1))

    def on_end(self, task_id: str, state: Any = None, **_: Any) -> None:
        """A job ends, its outcome noted or not: that of a retry comes later."""
        index = self.jobs.pop(task_id, None)
        if index is None or state in ("SUCCESS", "FAILURE"):
            return
        if state in ("IGNORED", "REJECTED"):
            self.note(index, f"it raised Celery's {'Ignore' if state == 'IGNORED' else 'Reject'}")
        else:
            self.ask(lambda pipe: pipe.hdel(self.begun, index))

    def on_success(self, sender: Any, **_: Any) -> None:
        """A job returned."""
        self.note(self.jobs.get(sender.request.id), None)

    def on_failure(self, task_id: str, exception: Any, args: Any = None, **_: Any) -> None:
        """A job raised, exceeded its time, or lost its process."""
        index = self.jobs.get(task_id, self.index_of(args))
        try:
            error = f"{type(exception).__name__}: {exception}"
        except Exception:  # its own __str__ raised
            error = type(exception).__name__
        if index is not None:
            self.log.error("job %s failed: %s", index, error)
        self.note(index, error)

    def on_unknown(self, message: Any, name: str, **_: Any) -> None:
        """Celery has discarded a job that it knows no task for."""
        payload = message.payload
        args = payload.get("args") if isinstance(payload, dict) else payload[0]
        self.note(self.index_of(args), f"NotRegistered: the script registers no task {name!r}")

    # The notes

    def note(self, index: int | None, error: str | None) -> None:
        """Note an outcome: success where there is no error. What has succeeded stays so."""
        if index is None:
            return
        if error is None:

            def write(pipe: Any) -> None:
                pipe.setbit(self.succeeded, index, 1).setbit(self.failed, index, 0)
                pipe.hdel(self.failures, index).hdel(self.begun, index)
        else:
            error = error[:500].encode(errors="replace").decode()  # no half of a surrogate pair
            told = json.dumps({"error": error, "agent": self.index})
            answer = self.ask(
                lambda pipe: pipe.getbit(self.succeeded, index).hlen(self.failures), self.PATIENCE
            )
            succeeded, listed = answer or (0, 0)

            def write(pipe: Any) -> None:
                pipe.hdel(self.begun, index)
                if not succeeded:
                    pipe.setbit(self.failed, index, 1)
                    if listed < self.LISTED:
                        pipe.hset(self.failures, index, told)

        if self.ask(write, self.PATIENCE) is None:
            self.log.error("job %s: its outcome could not be noted in Redis", index)

    def noted(self, index: int) -> bool:
        """Whether a job has an outcome."""
        bits = self.ask(lambda pipe: pipe.getbit(self.succeeded, index).getbit(self.failed, index))
        return any(bits or ())

    def ask(self, commands: Callable[[Any], object], patience: float = 1.0) -> Any:
        """What Redis answers to commands; None where it is away for `patience` seconds."""
        import time

        import redis

        end = time.monotonic() + patience
        tries = 0
        while True:
            tries += 1
            try:
                pipe = self.redis.pipeline()
                commands(pipe)
                return pipe.execute()
            except redis.RedisError as error:
                # The next try on a new connection: this one may lead to a server that was replaced.
                self.redis.connection_pool.disconnect()
                refused = isinstance(error, redis.ResponseError)
                over = tries > 1 and time.monotonic() > end
                if over or (refused and "READONLY" not in str(error)):
                    self.log.warning("Redis: %s", error)
                    return None
            time.sleep(0.2)


ending_source = functools.cache(lambda: inspect.getsource(Ending))


def ending(run_id: str) -> str:
    """What is appended to a script. It has names of its own, and leaves the script's alone."""
    source = f"""from __future__ import annotations
import json, os
{ending_source()}
Ending({run_id!r}, script).connect()
"""
    # A script may call something of its own `exec` or `compile`.
    run = f'b.exec(b.compile({source!r}, "<ending>", "exec"), {{"script": b.globals()}})'
    return f'\n(lambda b: {run})(__import__("builtins"))\n'


def install_requirements(folder: str) -> None:
    """Install the run's requirements into `folder` and make them importable, here and in children.

    Ends the process when pip fails, with pip's own last words.
    """
    encoded = os.environ.get("REQUIREMENTS_TXT")
    if not encoded:
        return
    path = os.path.join(folder, "requirements.txt")
    with open(path, "wb") as file:
        file.write(base64.b64decode(encoded))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore"]
    command += ["--target", folder, "--requirement", path]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=900)
    sys.stderr.write(result.stderr)
    if result.returncode:
        words = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        raise SystemExit(f"the requirements cannot be installed: {words[-1] if words else ''}")
    sys.path.insert(0, folder)


def fetch_config(run_id: str, index: str) -> dict[str, Any]:
    """This agent's config. Ends the process where there is none."""
    import redis
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    host, port = os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"])
    # Some minutes of patience: Redis may just be starting again.
    retry = Retry(ConstantBackoff(5), 60)
    stored = redis.Redis(host, port, socket_timeout=30, retry=retry).get(f"{run_id}{index}")
    if stored is None:
        raise SystemExit(f"no config {run_id}{index} in Redis at {host}:{port}")
    config: dict[str, Any] = json.loads(stored)
    return config | {"pod_index": index}  # as the platform's own agents have it


def main() -> None:
    """Be one agent of one run. Ends with Celery's own exit code, 0 when the run is drained."""
    from celery import Celery

    # Until the worker sets its own: the first process of a container ignores SIGTERM by default.
    # Not 0, or Kubernetes would count the agent as completed and start no other in its place.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_id, index = os.environ["RUN_ID"], os.environ["POD_INDEX"]
    with tempfile.TemporaryDirectory(prefix="agent-") as folder:
        install_requirements(folder)
        config = fetch_config(run_id, index)
        app = Celery("agent", broker=os.environ["RABBITMQ_URL"])
        try:
            exec(config["code"], {"app": app, "agent_message": config})
        except SystemExit as end:
            what = "without an error" if end.code in (None, 0) else "by itself"
            raise SystemExit(
                f"SystemExit({end.code or 0}) at start: the script ended {what}"
            ) from None
        # Not app.start(): it drops the exit code of the worker.
        worker = app.Worker(
            queues=[run_id],
            hostname=f"worker{index}",
            concurrency=1,
            prefetch_multiplier=1,
            loglevel="WARNING",
            quiet=True,
        )
        worker.start()
        sys.exit(worker.exitcode)


def tail(path: str) -> str:
    """The last 4 KiB of a file, which may be large."""
    with open(path, "rb") as file:
        with contextlib.suppress(OSError):  # it is shorter
            file.seek(-4096, os.SEEK_END)
        return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """The last line that says anything; 500 characters at most."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1][:500] if said else ""


class Supervisor:
    """Runs the agents of a run on this machine as Kubernetes would, each with its POD_INDEX.

    One that crashes is started again, `retries` times with a growing delay; so is one that was told
    to go (143) by others. For each that has ended for good there is a byte on standard output: `x`
    if it crashed, else `.`; what it prints goes to a file of its own in `folder`, or nowhere. On
    standard error is a line for each crash: its last words and its exit code.

    SIGTERM is handed on to the agents alone, as in a pod: a worker takes a job whose process was
    ended by a signal for a failed one. `grace` seconds later they are killed, and at once when
    standard input ends: with the orchestrator, however that ends.
    """

    def __init__(self, retries: int, grace: float, folder: str, command: list[str]) -> None:
        import ctypes

        self.retries, self.grace, self.folder, self.command = retries, grace, folder, command
        self.told, self.closed = threading.Event(), threading.Event()
        self.current: dict[int, subprocess.Popen[bytes]] = {}
        self.kernel = ctypes.CDLL(None)

    def supervise(self, agents: int) -> None:
        """Run so many agents, and end the process when all of them have ended."""
        signal.signal(signal.SIGTERM, self.on_told_to_go)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self.guard, daemon=True).start()
        threads = [threading.Thread(target=self.run, args=(index,)) for index in range(agents)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)

    def on_told_to_go(self, *_: object) -> None:
        """SIGTERM."""
        # A second one within this one would wait for its lock. (Agents inherit what is ignored.)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.told.set()
        for process in list(self.current.values()):
            process.terminate()
        threading.Timer(self.grace, self.kill).start()

    def guard(self) -> None:
        """Wait for the end of standard input."""
        sys.stdin.buffer.read()
        self.kill()
        self.told.set()

    def kill(self) -> None:
        """Kill all agents there are, and those that are just being started."""
        self.closed.set()
        for process in list(self.current.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, index: int) -> None:
        """Run one agent until it has ended for good."""
        crashes, ended = 0, b"x"
        path = os.path.join(self.folder, f"agent-{index}.log") if self.folder else os.devnull
        try:
            while not (self.told.is_set() or self.closed.is_set()):
                try:
                    os.makedirs(self.folder or ".", exist_ok=True)
                    made = tempfile.TemporaryDirectory(prefix="armada-", ignore_cleanup_errors=True)
                    with made as temporary, open(path, "ab") as output:
                        code = self.attempt(index, temporary, output)
                except OSError as error:
                    print(f"the agent cannot be started: {error}", file=sys.stderr, flush=True)
                    code = 1
                if code not in (0, 143):
                    crashes += 1
                    words = last_line(tail(path)) if self.folder else ""
                    print(f"{words}, exit code {code}", file=sys.stderr, flush=True)
                if code == 0 or crashes > self.retries:
                    break
                self.told.wait(2**crashes)
            ended = b"x" if crashes > self.retries else b"."
        finally:
            os.write(1, ended)

    def attempt(self, index: int, temporary: str, output: BinaryIO) -> int:
        """Start an agent once, and wait for its exit code."""
        process = self.current[index] = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "POD_INDEX": str(index), "TMPDIR": temporary},
            start_new_session=True,  # a process group of its own, which ends with it
            preexec_fn=self.die_with_parent,
        )
        if self.told.is_set():
            process.terminate()
        if self.closed.is_set():
            self.kill()
        code = process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        del self.current[index]
        return code if code >= 0 else 128 - code

    def die_with_parent(self) -> None:
        """Have the kernel kill an agent whose supervisor has been killed (Linux alone)."""
        if hasattr(self.kernel, "prctl"):  # what counts is the thread that started it
            self.kernel.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def examine(script: str) -> dict[str, Any]:
    """Tell whether `script` compiles, and by its syntax tree registers the task of jobs.

    Returns `error` (None where it compiles), which names the line, the file of a bundle that the
    line is in (its files begin as in `# == x.py ==`) and what stands there, where they are known;
    `line` and `column`, from 1; and `task`.
    """
    import ast
    import re
    import warnings

    task = "tasks.consume_message"
    found: dict[str, Any] = {"error": None, "line": None, "column": None, "task": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(script, "script", "exec", dont_inherit=True)
            nodes = ast.walk(ast.parse(script if task in script else ""))
        # A name that is no constant may well be that of the task, as the script holds it.
        names = (n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "name")
        found["task"] = any(getattr(name, "value", task) == task for name in names)
    except SyntaxError as error:
        lines = script.replace("\r\n", "\n").replace("\r", "\n").split("\n")[: error.lineno or 0]
        begins = re.compile(r"\s*#\W*(?:file\W+)?([\w./-]+\.py)\W*")
        files = ((own, begins.fullmatch(text[:120])) for own, text in enumerate(lines[-2::-1], 1))
        file = next((f", line {own} of {match[1]}" for own, match in files if match), "")
        where = f" (line {error.lineno}{file})" if lines else ""
        text = f": {lines[-1].strip()}" if lines and lines[-1].strip() else ""
        found |= {"error": f"{error.msg}{where}{text}", "column": error.offset}
        found["line"] = error.lineno or None
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        found["error"] = str(error) or type(error).__name__
    return found


def examine_all() -> None:
    """`examine` each script of a JSON array from standard input, a line of JSON for each.

    Python's compiler may crash on a script, or take gigabytes for it: for this a process of its
    own, which has 10 s of CPU and 1 GiB of memory for all of them.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    for script in json.load(sys.stdin):
        print(json.dumps(examine(script)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["supervise"]:
        count, tries, seconds, logs, *program = sys.argv[2:]
        Supervisor(int(tries), float(seconds), logs, program).supervise(int(count))
    elif sys.argv[1:2] == ["examine"]:
        examine_all()
    else:
        main()

"""What `make demo`, `start`, `follow`, `status` and `cancel` do, over plain HTTP.

    client.py demo | start [FOLDER] | follow RUN | status | cancel RUN

URL names the orchestrator, TARGET_URL what the example's jobs ask, and TOKEN is the API_TOKEN: in
the environment, since everybody can read a process list. Exits with 0 only where all is well, which
means that every job of the run that it followed has succeeded; with 130 after Ctrl-C.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

EXAMPLE = Path(__file__).parent
HERE = "http://localhost:8080"
LIMIT = 150  # seconds that the demo may take
STILL = 3  # seconds without the end of a job after which it is told what goes on
LISTED = 30  # indexes that are shown
PATIENCE = 60  # seconds for which a run is followed while nothing answers
FILES = {
    "configtemplate": "template.json",
    "data_job": "jobs.csv",
    "data_agent": "agents.csv",
    "python_code": "script.py",
    "requirements_txt": "requirements.txt",
    "configtune": "configtune.json",
}

type Json = dict[str, Any]


class Trouble(Exception):
    """What went wrong, and what to do, for people."""


class Away(Trouble):
    """Nothing answers, or what the orchestrator depends on does not: that may pass."""


class Orchestrator:
    """An orchestrator, over HTTP."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self.hint = hint(url)
        try:
            near = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
            self.client = httpx.Client(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx.Timeout(30, connect=10),
                trust_env=not near,  # no proxy leads to this machine
            )
        except ValueError as error:
            raise Trouble(f"URL={url} is no address: {error}") from None

    def call(self, method: str, **options: Any) -> httpx.Response:
        """Ask /bot/start, and raise `Trouble` for everything but 200."""
        try:
            response = self.client.request(method, f"{self.url}/bot/start", **options)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise Trouble(f"URL={self.url} is no address like {HERE}: {error}") from None
        except httpx.ConnectError as error:
            text = f"Nothing answers at {self.url} ({error}). Does `make run` serve there? Another"
            raise Away(f"{text} address: URL=http://HOST:PORT.") from None
        except httpx.TransportError as error:
            text = f"{self.url} did not answer ({error or type(error).__name__})."
            if method == "POST":
                text += f" The run may have been started: `make status{self.hint}` tells."
            raise Away(text) from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            text = f"{self.url} answered {response.status_code}, and not as an orchestrator does."
            raise (Away if response.status_code >= 500 else Trouble)(f"{text} Is URL right?")
        if response.status_code != 200:
            raise self.refusal(response.status_code, answer)
        return response

    def refusal(self, status: int, answer: Json) -> Trouble:
        """What an answer other than 200 means."""
        text = f"Refused ({status}): {answer.get('detail')}"
        if errors := answer.get("errors"):
            text = f"Refused ({status}), nothing was started:"
            text += "".join(f"\n  {shown_problem(error)}" for error in errors)
        if status == 401:
            text += "\nIts API_TOKEN goes into the environment: export TOKEN=..."
        if status == 404:
            text += f"\n`make status{self.hint}` lists the runs that are known."
        if status == 409 and (known := re.search(r"a run (\S+) exists \(([\w-]+)\)", text)):
            run_id, phase = known.groups()
            does = "attaches to it" if phase in ("starting", "running") else "shows it"
            text += f"\n`{self.again(run_id)}` {does}."
            if "DELETE" in text:
                text += f"\n`make cancel{self.hint} RUN={run_id}` drops it, and frees the id."
        return Away(text) if status in (502, 503, 504) else Trouble(text)

    def again(self, run_id: str) -> str:
        """How to attach to a run."""
        return f"make follow{self.hint} RUN={run_id}"


def hint(url: str) -> str:
    """What a make command needs to come to an orchestrator."""
    return "" if url.rstrip("/") == HERE else f" URL={url.rstrip('/')}"


def shown_problem(error: Json) -> str:
    """One of the problems that were found, where an editor can go to."""
    place = [str(FILES.get(error["part"], error["part"]))]
    place += [f"{name} {error[name]}" for name in ("line", "column") if name in error]
    place += [error["field"]] if "field" in error else []
    return f"{', '.join(place)}: {error['message']}"


def table(rows: Iterable[Json], columns: tuple[str, ...]) -> None:
    """A line per row, as wide as it needs."""
    shown = (tuple("" if row.get(c) is None else str(row[c]) for c in columns) for row in rows)
    cells = [columns, *shown]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(line).rstrip())


def progress(run: Json, now: datetime, moves: bool) -> str:
    """Where a run stands, and while no job ends what it is doing."""
    done = run["succeeded"] + run["failed"]
    if run["ended"]:
        doing = ""
    elif run["phase"] == "cancelled":
        doing = "is cancelled, and its agents end"
    elif not run["left"]:
        doing = "every job is done, and its agents end"
    elif not done:
        doing = run["doing"] or "waits for the first job to end"
    else:
        doing = "" if moves else run["doing"]
    end = datetime.fromisoformat(run["ended"]) if run["ended"] else now
    seconds = int((end - started(run)).total_seconds())
    text = f"{done}/{run['jobs']} jobs done, {run['failed']} failed, {run['left']} left, "
    text += f"{run['agents']} agents, {seconds} s"
    text += f", agents made anew {run['restarts']} x" if run["restarts"] else ""
    return f"{text}: {plain(doing)}" if doing else text


def started(run: Json) -> datetime:
    """When a run was started."""
    return datetime.fromisoformat(run["started"])


class Display:
    """A bar that moves on a terminal; elsewhere a line whenever something has changed."""

    def __init__(self) -> None:
        self.last: object = None

    def show(self, run: Json, text: str) -> None:
        """Show where the run stands."""
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1  # a full line would wrap
            width = max(0, min(20, columns - len(text) - 1))
            full = width * (run["succeeded"] + run["failed"]) // run["jobs"]
            bar = f"{'█' * full}{'░' * (width - full)} {text}".lstrip()
            print(f"\r{bar[:columns]}\x1b[K", end="", flush=True)
        else:
            changed = re.sub(r"\d+ s", "", text, count=1)
            if changed != self.last:
                print(text, flush=True)
            self.last = changed

    def end(self) -> None:
        """Leave the line."""
        if sys.stdout.isatty():
            print(flush=True)


def follow(orchestrator: Orchestrator, run_id: str, limit: float = 0) -> Json:
    """Show a run until it has ended, and return what it ended as."""
    display, begun = Display(), time.monotonic()
    run: Json = {}
    heard = moved = begun
    try:
        while not run.get("ended"):
            if limit and time.monotonic() - begun > limit:
                raise Trouble(f"The run did not end in {limit:.0f} s.")
            try:
                response = orchestrator.call("GET", params={"run_id": run_id})
            except Away as away:
                if not run or time.monotonic() - heard > PATIENCE:
                    text = f"{away}\nOnce it does: `{orchestrator.again(run_id)}`" if run else away
                    raise Trouble(str(text)) from None
                display.show(run, "the orchestrator does not answer; trying again ...")
            else:
                last, run, heard = run, response.json(), time.monotonic()
                if run["left"] != last.get("left"):
                    moved = heard
                now = datetime.now(UTC)
                with contextlib.suppress(LookupError, ValueError):  # the server's own clock
                    now = max(parsedate_to_datetime(response.headers["date"]), started(run))
                display.show(run, progress(run, now, heard - moved < STILL))
            if not run.get("ended"):
                time.sleep(0.5)
    finally:
        display.end()
    return run


RESULT = ("job", "agent", "status", "milliseconds", "size", "user_agent", "name")


def results(output: str) -> list[Json]:
    """What the example's jobs have printed, where this machine has their agents' output."""
    found = {}
    for file in sorted(Path(output).glob("agent-*.log")):
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # another script's own words
                row = json.loads(line[line.index("{") :])
                if set(row) == set(RESULT):
                    found[int(row["job"])] = row
    return [found[job] for job in sorted(found)]


def plain(text: str) -> str:
    """What others have written, in one line and without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


def verdict(run: Json) -> int:
    """Show what a run ended as. Returns the exit code."""
    if found := results(run["output"]):
        print()
        table(found, RESULT)
        print()
    if run["phase"] == "succeeded":
        print(f"Run {run['run_uuid']} succeeded: all {run['jobs']} jobs.")
        return 0
    unaccounted = run["unaccounted"]
    finished = run["phase"] == "finished-with-failures"
    text = f"Run {run['run_uuid']} ended as {run['phase']}: of {run['jobs']} jobs "
    text += f"{run['succeeded']} succeeded, {run['failed']} failed"
    if run["left"]:
        text += f", {run['left']} {'are unaccounted for' if finished else 'are left'}"
    print(f"{text}.")
    if run["cause"]:
        print(f"  Why: {plain(run['cause'])}")
    for cause in run["causes"]:
        example = f"for example job {cause['targetted_job']}"
        print(f"  {cause['jobs']} x {plain(cause['error'])} ({example})")
    if finished and unaccounted:
        print(f"  Unaccounted for: {listed(unaccounted)}")
    again = [failure["targetted_job"] for failure in run["failures"]] + unaccounted
    if 0 < len(again) <= LISTED:
        print(f'  To repeat these alone, in run_message: "only_jobs": [{listed(again)}]')
    elif again:
        print("  To repeat these alone: see only_jobs in the README")
    if run["phase"] != "cancelled":  # of which nothing is kept
        print(f"  Output of its agents: {run['output']}")
    return 1


def listed(indexes: list[int]) -> str:
    """The first indexes."""
    more = ", ..." if len(indexes) > LISTED else ""
    return ", ".join(map(str, sorted(indexes)[:LISTED])) + more


def form(folder: Path, target: str) -> dict[str, tuple[str, bytes]]:
    """The parts of a POST, from the files of a folder; CSV files that are missing are empty."""
    if not (folder / FILES["configtemplate"]).is_file():
        text = f"{folder / FILES['configtemplate']} is missing."
        raise Trouble(f"{text} The README's 'Write your own run' says which files make a run.")
    try:
        files = {
            part: (name, (folder / name).read_bytes())
            for part, name in FILES.items()
            if (folder / name).exists()
        }
    except OSError as error:
        raise Trouble(f"{error.filename} cannot be read: {error.strerror}") from None
    files = {part: (FILES[part], b"") for part in ("data_job", "data_agent")} | files
    if folder.resolve() == EXAMPLE.resolve():
        files["configtune"] = (FILES["configtune"], json.dumps({"URL": target}).encode())
    return files


def start(orchestrator: Orchestrator, folder: Path, target: str) -> Json:
    """Post a run. Returns the answer."""
    parts = form(folder, target)
    answer: Json = orchestrator.call("POST", files=parts, timeout=httpx.Timeout(600)).json()
    print(f"Run {answer['run_uuid']}: {answer['jobs']} jobs for {answer['agents']} agents")
    for warning in answer["warnings"]:
        print(f"Warning: {warning}")
    sys.stdout.flush()
    return answer


def watched(orchestrator: Orchestrator, run_id: str) -> int:
    """Follow a run that goes on without us. Returns the exit code."""
    try:
        return verdict(follow(orchestrator, run_id))
    except KeyboardInterrupt:
        print(f"The run goes on. To attach to it again: {orchestrator.again(run_id)}")
        return 130


def status(orchestrator: Orchestrator) -> int:
    """List the runs. Returns the exit code."""
    runs = orchestrator.call("GET").json()["runs"]
    if not runs:
        print(f"{orchestrator.url} has no run in flight, and none that has just ended.")
        return 0
    counts = ("phase", "jobs", "succeeded", "failed", "left", "agents", "restarts")
    table(runs, ("run_uuid", *counts, "started", "ended"))
    return 0


def cancel(orchestrator: Orchestrator, run_id: str) -> int:
    """Cancel a run, or drop what is kept of one. Returns the exit code."""
    run = orchestrator.call("DELETE", params={"run_id": run_id}).json()
    done = f"{run['succeeded']} of {run['jobs']} jobs had succeeded"
    if run["phase"] != "cancelled":
        print(f"Run {run_id} had ended as {run['phase']}; what was kept of it is dropped.")
    elif run["ended"]:
        print(f"Run {run_id} is cancelled; {done}.")
    else:
        text = f"Run {run_id} is being cancelled; {done}. Its agents are ending:"
        print(f"{text} {orchestrator.again(run_id)}")
    return 0


def demo() -> int:
    """Serve, run the example, show its results, shut down. Returns the exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = ("REDIS_", "RABBITMQ_", "API_", "AGENT_", "PLATFORM", "CORS_", "LOCAL_", "MAX_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    folder = Path(tempfile.mkdtemp(prefix="armada-demo-"))
    environment |= {"HOST": "127.0.0.1", "PORT": str(port), "AGENT_LOGS": str(folder / "agents")}
    print("Starting an orchestrator with its embedded Valkey ...", flush=True)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # so that what is started below ends as well
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    code, log = 1, folder / "orchestrator.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, EXAMPLE.parent / "app.py"],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        orchestrator = Orchestrator(f"http://127.0.0.1:{port}")
        while not serves(port):
            if process.poll() is not None:
                raise Trouble(f"The orchestrator did not start:\n{log.read_text()[-2000:].strip()}")
            time.sleep(0.1)
        answer = start(orchestrator, EXAMPLE, f"{orchestrator.url}/health")
        code = verdict(follow(orchestrator, answer["run_uuid"], LIMIT))
    except KeyboardInterrupt:
        print("Ending the demo, its run and its orchestrator.", flush=True)
        code = 130
    finally:
        process.terminate()
        process.wait(60)
        if code == 1:
            print(f"The logs of the demo are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


def serves(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def command(name: str, given: str) -> int:
    """Do what the command line says. Returns the exit code."""
    if name == "demo":
        return demo()
    orchestrator = Orchestrator(os.environ.get("URL") or HERE, os.environ.get("TOKEN", "").strip())
    if name == "status":
        return status(orchestrator)
    if name == "start":
        target = os.environ.get("TARGET_URL") or f"{orchestrator.url}/health"
        answer = start(orchestrator, Path(given) if given else EXAMPLE, target)
        return watched(orchestrator, answer["run_uuid"])
    if not given:
        raise Trouble(
            f"Which run? make {name} RUN=ID; `make status{orchestrator.hint}` lists them."
        )
    return watched(orchestrator, given) if name == "follow" else cancel(orchestrator, given)


def main() -> int:
    """Returns the exit code."""
    name, given = [*sys.argv[1:], "", ""][:2]
    if name not in ("demo", "start", "follow", "status", "cancel"):
        print(__doc__)
        return 2
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a bar needs no UTF-8
    try:
        code = command(name, given)
        sys.stdout.flush()
        return code
    except Trouble as trouble:
        sys.stdout.flush()
        print(trouble, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = f"`make status{hint(os.environ.get('URL') or HERE)}` tells whether a run goes on."
        print(f"\nInterrupted. {text}" if name != "demo" else "\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())

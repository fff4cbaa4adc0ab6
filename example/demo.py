"""`make demo`: serve, post the example, watch it to its end, show the results, shut down.

Exits with 0 only if every job ran and every agent stopped. `make start` pipes an orchestrator's
answer into `demo.py --follow URL`, which shows it, and the run's progress where its Redis can be
reached from here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import redis

HERE = Path(__file__).parent
LIMIT = 110  # seconds that the demo may take


def events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """The orchestrator's log, event by event; what agents print between is passed over."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{"):
            yield json.loads(line)


def post(url: str, dry_run: bool = False) -> httpx.Response:
    """Post the example."""
    names = {
        "configtemplate": "template.json",
        "data_job": "jobs.csv",
        "data_agent": "agents.csv",
        "python_code": "script.py",
        "requirements_txt": "requirements.txt",
    }
    files = {part: (name, (HERE / name).read_bytes()) for part, name in names.items()}
    files["configtune"] = ("configtune.json", json.dumps({"URL": f"{url}/health"}).encode())
    headers = {"Authorization": f"Bearer {token}"} if (token := os.environ.get("TOKEN")) else {}
    params = {"dry_run": "true"} if dry_run else {}
    url = f"{url}/bot/start"
    return httpx.post(url, files=files, headers=headers, params=params, timeout=60)


def show(done: int, jobs: int, agents: int, begun: float) -> None:
    """A progress bar on a terminal, a line elsewhere."""
    text = f"{done}/{jobs} jobs done, {jobs - done} left, {agents} agents, "
    text += f"{time.monotonic() - begun:.0f} s"
    if sys.stdout.isatty():
        full = 30 * done // jobs
        print(f"\r{'█' * full}{'░' * (30 - full)} {text}\x1b[K", end="", flush=True)
    else:
        print(text, flush=True)


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """A line per row, as wide as it needs."""
    cells = [columns, *(tuple(str(row.get(c, "")) for c in columns) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(line).rstrip())


def results(store: redis.Redis, run_id: str) -> list[dict[str, Any]]:
    """Show what the jobs of a run have measured; returns it."""
    found = [json.loads(value) for value in store.hvals(f"example:{run_id}")]
    found.sort(key=lambda result: int(result["job"]))
    print()
    table(found, ("job", "agent", "status", "milliseconds", "size", "user_agent", "name"))
    return found


def verdict(complete: bool) -> int:
    """Say how a run ended. Returns the exit code."""
    print("All jobs ran and all agents stopped." if complete else "The run is not complete.")
    return 0 if complete else 1


def follow(url: str) -> int:
    """Show an orchestrator's answer and, where possible, the run's progress and results."""
    text = sys.stdin.read()
    try:
        answer = json.loads(text)
    except ValueError:
        print(
            text or f"{url} did not answer; does `make run` serve there? Else: make start URL=..."
        )
        return 1
    if "run_uuid" not in answer:
        print(f"Refused: {answer.get('detail')}")
        if errors := answer.get("errors"):
            table(errors, ("part", "line", "column", "field", "message"))
        return 1
    run_id, jobs, agents = answer["run_uuid"], answer["jobs"], answer["agents"]
    print(f"Run {run_id}: {jobs} jobs for {agents} agents")
    for warning in answer["warnings"]:
        print(f"Warning: {warning}")
    # A dry run tells what agents would find in their environment: also where Redis is.
    pod = post(url, dry_run=True).json()["kubernetes_job"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    told = {item["name"]: item.get("value", "") for item in container["env"]}
    host, port = told["REDIS_HOST_VAR_ENV"], int(told["REDIS_PORT_VAR_ENV"])
    store = redis.Redis(host, port, socket_connect_timeout=2, socket_timeout=5)
    begun = time.monotonic()
    shown = -1
    try:
        while store.hexists("armada:runs", run_id):
            done = int(store.hlen(f"example:{run_id}"))
            if done != shown or sys.stdout.isatty():
                show(done, jobs, agents, begun)
            shown = done
            time.sleep(0.5)
    except redis.RedisError:
        print("It runs in a cluster: `make status` shows its progress.")
        return 0
    return verdict(len(results(store, run_id)) == jobs)


def main() -> int:
    """Run the demo. Returns the exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), "LOG_FORMAT": "json"}
    for name in ("REDIS_HOST", "RABBITMQ_URL", "API_TOKEN", "AGENT_COMMAND", "PLATFORM"):
        environment.pop(name, None)
    print("Starting the orchestrator with its embedded Valkey ...", flush=True)
    process = subprocess.Popen(
        [sys.executable, HERE.parent / "app.py"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    signal.signal(signal.SIGALRM, lambda *_: process.kill())
    signal.alarm(LIMIT)
    begun = time.monotonic()
    run: dict[str, Any] = {}
    done: list[dict[str, Any]] = []
    failed = 1
    try:
        for event in events(process):
            if event["event"] == "orchestrator started":
                store = redis.Redis("127.0.0.1", int(event["redis"].split(":")[1]))
            elif event["event"].startswith("Uvicorn running"):
                run = post(f"http://127.0.0.1:{port}").raise_for_status().json()
                print(f"Run {run['run_uuid']}: {run['jobs']} jobs for {run['agents']} agents")
            elif event["event"] == "run progress":
                count = int(store.hlen(f"example:{event['run_id']}"))
                show(count, run["jobs"], event["agents"], begun)
            elif event["event"] in ("run stopped", "run failed"):
                done = results(store, event["run_id"])
                failed = event["agents_failed"] + (event["event"] == "run failed")
                break
    finally:
        process.terminate()
        process.communicate()
    return verdict(bool(run) and len(done) == run["jobs"] and failed == 0)


if __name__ == "__main__":
    sys.exit(follow(sys.argv[2]) if sys.argv[1:2] == ["--follow"] else main())

"""`make demo`: serve, post the example, watch it to its end, show the results, shut down.

Exits with 0 only if every job ran and every agent stopped.
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


def post(url: str) -> dict[str, Any]:
    """Post the example. Raises httpx errors."""
    names = {
        "configtemplate": "template.json",
        "data_job": "jobs.csv",
        "data_agent": "agents.csv",
        "python_code": "script.py",
        "requirements_txt": "requirements.txt",
    }
    files = {part: (name, (HERE / name).read_bytes()) for part, name in names.items()}
    files["configtune"] = ("configtune.json", json.dumps({"URL": f"{url}/health"}).encode())
    answer = httpx.post(f"{url}/bot/start", files=files, timeout=60)
    answer.raise_for_status()
    return dict(answer.json())


def show(done: int, jobs: int, agents: int, begun: float) -> None:
    """A progress bar on a terminal, a line elsewhere."""
    text = f"{done}/{jobs} jobs done, {jobs - done} left, {agents} agents, "
    text += f"{time.monotonic() - begun:.0f} s"
    if sys.stdout.isatty():
        bar = "#" * (30 * done // jobs)
        print(f"\r[{bar:<30}] {text}\x1b[K", end="", flush=True)
    else:
        print(text, flush=True)


def table(results: list[dict[str, Any]]) -> None:
    """The results, a line per job."""
    columns = ("job", "agent", "status", "milliseconds", "size", "user_agent", "name")
    rows = [columns, *(tuple(str(result[c]) for c in columns) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)))


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
    results: list[dict[str, Any]] = []
    failed = 1
    try:
        for event in events(process):
            if event["event"] == "orchestrator started":
                store = redis.Redis("127.0.0.1", int(event["redis"].split(":")[1]))
            elif event["event"].startswith("Uvicorn running"):
                run = post(f"http://127.0.0.1:{port}")
                print(f"Run {run['run_uuid']}: {run['jobs']} jobs for {run['agents']} agents")
            elif event["event"] == "run progress":
                done = store.hlen(f"example:{event['run_id']}")
                show(int(done), run["jobs"], event["agents"], begun)
            elif event["event"] in ("run stopped", "run failed"):
                stored = store.hgetall(f"example:{event['run_id']}").values()
                results = sorted((json.loads(v) for v in stored), key=lambda r: int(r["job"]))
                failed = event["agents_failed"] + (event["event"] == "run failed")
                break
    finally:
        process.terminate()
        process.communicate()
    print()
    table(results)
    complete = bool(run) and len(results) == run["jobs"] and failed == 0
    print("All jobs ran and all agents stopped." if complete else "The run is not complete.")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

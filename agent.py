"""The reference agent: installs its requirements, fetches its config, does jobs until told to stop.

It relies on nothing but its environment (RUN_ID, POD_INDEX, REDIS_HOST_VAR_ENV,
REDIS_PORT_VAR_ENV, RABBITMQ_URL and, where given, REQUIREMENTS_TXT); a script that works here
works in any other agent of the platform.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile

import redis
from celery import Celery
from redis.backoff import ConstantBackoff
from redis.retry import Retry


def install_requirements(folder: str) -> None:
    """Install the run's requirements into `folder` and make them importable, here and in children.

    Raises `subprocess.CalledProcessError` when pip fails: an agent without them does no job.
    """
    encoded = os.environ.get("REQUIREMENTS_TXT")
    if not encoded:
        return
    path = os.path.join(folder, "requirements.txt")
    with open(path, "wb") as file:
        file.write(base64.b64decode(encoded))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--target", folder, "--requirement", path]
    subprocess.run(command, check=True, timeout=900)
    sys.path.insert(0, folder)


def main() -> None:
    """Be one agent of one run. Ends with exit code 0 when the orchestrator says so."""
    # Until the worker sets its own: the first process of a container ignores SIGTERM by default.
    # Not 0, or Kubernetes would count the agent as completed and start no other in its place.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_id, index = os.environ["RUN_ID"], os.environ["POD_INDEX"]
    with tempfile.TemporaryDirectory(prefix="agent-") as folder:
        install_requirements(folder)
        host, port = os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"])
        # Some minutes of patience: Redis may just be starting again.
        retry = Retry(ConstantBackoff(5), 60)
        stored = redis.Redis(host, port, socket_timeout=30, retry=retry).get(f"{run_id}{index}")
        if stored is None:
            raise SystemExit(f"no config {run_id}{index} in Redis at {host}:{port}")
        config = json.loads(stored)
        app = Celery("agent", broker=os.environ["RABBITMQ_URL"])
        exec(config["code"], {"app": app, "agent_message": config})
        app.worker_main(
            [
                "--quiet",
                "worker",
                f"--queues={run_id}",
                "--concurrency=1",
                "--prefetch-multiplier=1",
                f"--hostname=worker{index}",
                "--loglevel=WARNING",
            ]
        )


if __name__ == "__main__":
    main()

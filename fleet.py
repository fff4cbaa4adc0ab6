"""The agents of a run: the pods of a Kubernetes Indexed Job, or child processes.

Both are made from the same manifest, so that an agent finds the same environment wherever it runs.
"""

import base64
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

import merge
from merge import Json, Run
from registry import Phase, Record
from settings import Settings, say

RUN_LABEL = "armada.services/run-id"
MANAGED_BY = {"app.kubernetes.io/managed-by": "armada-orchestrator"}
OURS = ("labelSelector", "app.kubernetes.io/managed-by=armada-orchestrator")
ANNOTATION = "armada.services/"
type Query = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What one look tells of a run's agents."""

    live: int = 0  #: agents that exist and have not ended
    failed: int = 0  #: times that an agent has ended with an exit code other than 0
    unready: int = 0  #: live agents that have not started
    missed: int = 0  #: agents that had not started when all were ended
    ended: bool = False  #: no agent is left, and none will come by itself
    hopeless: bool = False  #: all agents have failed for good; others would as well
    suspended: bool = False  #: created, and not started yet
    deleted: bool = False  #: somebody has deleted them, to cancel the run
    trouble: dict[str, str] = field(default_factory=dict)  #: why agents fail: cause -> a sentence


class Agents:
    """What the orchestrator does with agents. Each method may be called again when it failed."""

    name = "Agents"
    by_hand = False  #: whether users start the agents, so that `look` finds none
    refusals: tuple[type[Exception], ...] = ()  #: raised where the platform answers, and says no
    errors: tuple[type[Exception], ...] = ()  #: what the methods raise, `refusals` among them

    def create(self, record: Record, k8s_job: Json) -> None:
        """Reserve what agents need, so that refusals come first; none runs yet."""

    def start(self, record: Record, k8s_job: Json) -> None:
        """Let the agents run that `create` has prepared."""
        raise NotImplementedError

    def restart(self, record: Record, k8s_job: Json) -> None:
        """Put new agents in the place of those that have ended."""
        self.start(record, k8s_job)

    def look(self, records: list[Record]) -> dict[str, Fleet]:
        """What there is of each run's agents."""
        raise NotImplementedError

    def end(self, record: Record, fleet: Fleet) -> None:
        """End agents that do not stop when told; is called until they have ended."""
        raise NotImplementedError

    def delete(self, record: Record) -> None:
        """Undo `create` and `start`, and nothing that another start of the same run made."""
        raise NotImplementedError

    def tell(self, record: Record, phase: str, left: int, event: str = "", text: str = "") -> None:
        """Show a run's progress, with an event if there is one, where the platform's users look."""

    def forget(self, record: Record) -> None:
        """The run is over, and its agents have ended."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise one of `errors` unless the platform answers."""

    def close(self) -> None:
        """End what must not outlive this process."""


def manifest(run: Run, claim: str, settings: Settings) -> Json:
    """The Kubernetes Job of a run; no password in it.

    An index whose agent crashes is tried three more times, and counts against no other index;
    evictions and node drains count against none. `podReplacementPolicy: Failed` is the only one
    that Kubernetes allows beside a pod failure policy, and it keeps the node name worker{index}
    unique within a run: no two agents of one index exist at once.
    """
    agents, jobs = len(run.configs), len(run.jobs)
    labels = {"app": run.image_name, **MANAGED_BY, RUN_LABEL: run.run_id}
    noted = notes(claim=claim, phase=Phase.STARTING, jobs=jobs, jobs_left=jobs, restarts=0)
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": run.k8s_job, "labels": labels, **noted},
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": agents,
            "parallelism": agents,
            "backoffLimitPerIndex": 3,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": disrupted}]},
            "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
            "template": pod_template(run, labels, settings),
        },
    }


def notes(**values: object) -> Json:
    """Metadata of a Kubernetes Job that has these annotations; `_` in a name becomes `-`."""
    names = {name: ANNOTATION + name.replace("_", "-") for name in values}
    return {"annotations": {names[name]: str(value) for name, value in values.items()}}


def pod_template(run: Run, labels: Json, settings: Settings) -> Json:
    """The PodTemplateSpec of a run's agents, with the operator's own over it."""
    minikube = settings.distrib == "minikube"
    container = {
        "name": "agent",
        "image": f"{settings.docker_hub_username}/{run.image_name}:{run.image_version}",
        "imagePullPolicy": "Never" if minikube else "Always",
        "env": environment(run, settings),
        "resources": {"requests": {"cpu": run.agent_cpu, "memory": run.agent_memory}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {RUN_LABEL: run.run_id}},
    }
    spec: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "topologySpreadConstraints": [spread],
        "containers": [container],
    }
    if settings.image_pull_secrets and not minikube:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    made: Json = overlay({"metadata": {"labels": labels}, "spec": spec}, settings.pod_template)
    return made


def environment(run: Run, settings: Settings) -> list[Json]:
    """The environment of an agent; what is not set is left out."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    secret, _, key = settings.agent_rabbitmq_secret.partition("/")
    plain = {
        "RUN_ID": run.run_id,
        "REDIS_HOST_VAR_ENV": settings.redis_host,
        "REDIS_PORT_VAR_ENV": str(settings.redis_port),
        "BACKEND_URL": settings.backend_url,
        "PROXY_PROVIDER_URL": settings.proxy_provider_url,
        "FINGERPRINT_PROVIDER_URL": settings.fingerprint_provider_url,
        "REQUIREMENTS_TXT": base64.b64encode(run.requirements.encode()).decode(),
    }
    return [
        {"name": "POD_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "RABBITMQ_URL", "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}},
        *({"name": name, "value": value} for name, value in plain.items() if value),
    ]


def overlay(base: Any, over: Any) -> Any:
    """`over` merged over `base`: as run messages are, and lists of named objects by `name`."""
    if isinstance(base, dict) and isinstance(over, dict):
        if "valueFrom" in over:  # a variable has either a value or a source
            base = {key: value for key, value in base.items() if key != "value"}
        elif "value" in over:
            base = {key: value for key, value in base.items() if key != "valueFrom"}
        return base | {key: overlay(base.get(key), value) for key, value in over.items()}
    if _named(base) and _named(over):
        items = {item["name"]: item for item in base}
        items |= {item["name"]: overlay(items.get(item["name"], {}), item) for item in over}
        return list(items.values())
    return over


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and "name" in v for v in value)


#: Runs a command in a process group and a temporary folder of its own, and ends the whole group
#: when the command ends or when its own standard input does: with the orchestrator, however that
#: ends. SIGTERM is handed on to the command alone, as in a pod: a worker ends the process that does
#: its job when that is done, and takes a job whose process was ended by a signal for a failed one.
GUARD = """
import os, signal, subprocess, sys, tempfile, threading
with tempfile.TemporaryDirectory(prefix="armada-", ignore_cleanup_errors=True) as folder:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "TMPDIR": folder})
    def end():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def guard():
        sys.stdin.buffer.read()
        end()
    threading.Thread(target=guard, daemon=True).start()
    code = process.wait()
    end()
os._exit(code if code >= 0 else 128 - code)
"""


def guarded(
    command: list[str], environment: dict[str, str], stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process at the latest, whichever way that ends."""
    # -I keeps an agent's PYTHONPATH and folder away from the guard itself.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD, *command],
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=environment,
        start_new_session=True,
    )


class LocalAgents(Agents):
    """Agents as child processes of the orchestrator; none where AGENT_COMMAND is empty."""

    GRACE = 10.0  #: seconds between SIGTERM and SIGKILL
    #: What agents keep of the orchestrator's own environment; PIP_* as well.
    KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "USER", "SSL_CERT_FILE", "TMPDIR")
    name = "This machine"
    errors = (OSError,)

    def __init__(self, settings: Settings) -> None:
        self.command = shlex.split(settings.agent_command)
        self.by_hand = not self.command
        self.rabbitmq_url = settings.rabbitmq_url
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.ending: dict[str, float] = {}  #: run id -> when SIGTERM was sent (monotonic seconds)

    def start(self, record: Record, k8s_job: Json) -> None:
        """Start one process per index, with the environment that a pod would get.

        Called again, it goes on behind those that it has started, unless all have ended.
        """
        if self.by_hand:
            return
        base = {k: v for k, v in os.environ.items() if k in self.KEPT or k.startswith("PIP_")}
        [container] = k8s_job["spec"]["template"]["spec"]["containers"]
        base |= {item["name"]: item["value"] for item in container["env"] if "value" in item}
        base["RABBITMQ_URL"] = self.rabbitmq_url
        started = self.processes.setdefault(record.run_id, [])
        if not any(process.poll() is None for process in started):
            started.clear()
        for index in range(len(started), record.agents):
            started.append(guarded(self.command, base | {"POD_INDEX": str(index)}))

    def look(self, records: list[Record]) -> dict[str, Fleet]:
        """Poll each process."""
        fleets = {}
        for record in records:
            codes = [process.poll() for process in self.processes.get(record.run_id, [])]
            live, failed = codes.count(None), sum(code not in (None, 0) for code in codes)
            fleets[record.run_id] = Fleet(live, failed, ended=not live)
        return fleets

    def end(self, record: Record, fleet: Fleet) -> None:
        """SIGTERM, and SIGKILL when called again `GRACE` seconds later."""
        since = self.ending.setdefault(record.run_id, time.monotonic())
        if time.monotonic() - since > self.GRACE:
            self.kill(self.processes.get(record.run_id, []))
        else:
            self.terminate(self.processes.get(record.run_id, []))

    def terminate(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """SIGTERM to those that have not ended."""
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self, processes: list[subprocess.Popen[bytes]], seconds: float = 0) -> None:
        """SIGKILL to those that have not ended in so many seconds."""
        end = time.monotonic() + seconds
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            assert process.stdin is not None
            process.stdin.close()  # the guard kills what is left
        for process in processes:
            process.wait(10)

    def delete(self, record: Record) -> None:
        """SIGKILL, at once."""
        self.kill(self.processes.pop(record.run_id, []))
        self.ending.pop(record.run_id, None)

    def forget(self, record: Record) -> None:
        """End what may be left; forget the processes."""
        self.delete(record)

    def close(self) -> None:
        """End all agents of all runs, with `GRACE` seconds for all together."""
        left = [process for processes in self.processes.values() for process in processes]
        self.terminate(left)
        self.kill(left, self.GRACE)


class KubernetesUnreachable(Exception):
    """The API server cannot be reached, or has not answered in time."""


class KubernetesRefused(Exception):
    """The API server refused, with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status


class KubernetesAgents(Agents):
    """Agents as the pods of one Indexed Job per run."""

    PODS_INTERVAL = 3  #: intervals between two looks at pods, for those that fail or do not start
    name = "Kubernetes"
    refusals = (KubernetesRefused,)
    errors = (KubernetesRefused, KubernetesUnreachable)

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError where there is neither a cluster around nor a kubeconfig."""
        # The client is large, and of no use to PLATFORM=local.
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError

        self.unreachable = HTTPError
        namespace = "default"
        try:
            config.load_incluster_config()
            account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
            namespace = account.read_text().strip()
        except config.ConfigException:
            try:
                config.load_kube_config()
                context = config.list_kube_config_contexts()[1]["context"]
            except (config.ConfigException, OSError) as error:
                raise ValueError(f"PLATFORM=distant finds no Kubernetes: {error}") from error
            namespace = context.get("namespace") or namespace
        configuration = client.Configuration.get_default_copy()
        configuration.retries = False
        self.client = client.ApiClient(configuration)
        self.timeout, self.interval = settings.timeout, settings.kubernetes_interval_ms / 1000
        self.namespace = settings.namespace or namespace
        self.seen: dict[str, Json] = {}  #: Kubernetes Jobs by name, as they were last looked at
        self.trouble: dict[str, dict[str, str]] = {}
        self.next_look = self.next_pods = 0.0  #: monotonic seconds

    def call(self, method: str, what: str, body: Json | None = None, query: Query = ()) -> Json:
        """One call of the API, as JSON.

        Not through the client's typed methods: they refuse what their version does not know, and
        a pod template may be newer.
        """
        group = "/apis/batch/v1" if what.startswith("jobs") else "/api/v1"
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = self.client.param_serialize(
            method,
            f"{group}/namespaces/{self.namespace}/{what}",
            query_params=list(query),
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self.client.call_api(*request, _request_timeout=(self.timeout, self.timeout))
            data = response.read()
        except self.unreachable as error:
            raise KubernetesUnreachable(str(error)) from error
        try:
            answer: Json = orjson.loads(data)
        except ValueError:
            answer = {"message": data[:200].decode("utf-8", "replace")}
        if response.status >= 400:
            reason = answer.get("reason") or response.reason or ""
            raise KubernetesRefused(response.status, reason, str(answer.get("message", "")))
        return answer

    def pages(self, what: str, *query: tuple[str, str]) -> Iterator[Json]:
        """List objects, page by page."""
        token = ""
        while True:
            page = self.call("GET", what, query=[*query, ("limit", "500"), ("continue", token)])
            yield from page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return

    def create(self, record: Record, k8s_job: Json) -> None:
        """Create the Job, suspended; unknown fields of the pod template are refused."""
        self.seen[record.k8s_job] = self.call(
            "POST", "jobs", k8s_job, [("fieldValidation", "Strict")]
        )

    def start(self, record: Record, k8s_job: Json) -> None:
        """Resume the Job."""
        self.patch(record, {"spec": {"suspend": False}, "metadata": notes(phase=Phase.RUNNING)})
        self.event(record, "Started", f"{record.jobs} jobs are queued for {record.agents} agents")

    def restart(self, record: Record, k8s_job: Json) -> None:
        """Replace the Job by a new one, unless that has been done."""
        for old in self.pages("jobs", ("labelSelector", f"{RUN_LABEL}={record.run_id}")):
            noted = old["metadata"].get("annotations", {})
            if noted.get(f"{ANNOTATION}claim") != record.claim:
                continue
            if noted.get(f"{ANNOTATION}restarts") == str(record.restarts):
                self.seen[record.k8s_job] = old
                return
            self.remove(old)
        noted = notes(phase=Phase.RUNNING, restarts=record.restarts)
        self.create(record, merge.merge(k8s_job, {"spec": {"suspend": False}, "metadata": noted}))
        text = f"agents created anew for the jobs left, restart {record.restarts}"
        self.event(record, "Recreated", text, "Warning")

    def remove(self, k8s_job: Json) -> None:
        """Delete this very Job and its pods, if it is still there."""
        metadata = k8s_job["metadata"]
        body = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        try:
            self.call("DELETE", f"jobs/{metadata['name']}", body)
        except KubernetesRefused as error:
            if error.status not in (404, 409):  # gone, or another Job of that name
                raise

    def patch(self, record: Record, changes: Json) -> None:
        """Change a run's Job, if it is still there."""
        name = record.k8s_job
        if name not in self.seen:
            return
        try:
            self.seen[name] = self.call("PATCH", f"jobs/{name}", changes)
        except KubernetesRefused as error:
            if error.status != 404:
                raise

    def look(self, records: list[Record]) -> dict[str, Fleet]:
        """List the Jobs at the interval that is set, and when one is missed."""
        wanted = [r.k8s_job for r in records if r.phase in (Phase.RUNNING, Phase.DRAINED)]
        if time.monotonic() >= self.next_look or not self.seen.keys() >= set(wanted):
            k8s_jobs = self.pages("jobs", OURS)
            self.seen = {found["metadata"]["name"]: found for found in k8s_jobs}
            self.next_look = time.monotonic() + self.interval
        fleets = {record.run_id: self.fleet(record) for record in records}
        if time.monotonic() >= self.next_pods:
            self.next_pods = time.monotonic() + self.PODS_INTERVAL * self.interval
            self.trouble = {}
            if any(fleet.unready for fleet in fleets.values()):
                self.find_trouble("Pending", "not-starting")
            if any(fleet.failed and not fleet.ended for fleet in fleets.values()):
                self.find_trouble("Failed", "failing")
        return fleets

    def fleet(self, record: Record) -> Fleet:
        """What a Job's status tells."""
        k8s_job = self.seen.get(record.k8s_job)
        if k8s_job is None or k8s_job["metadata"].get("deletionTimestamp"):
            return Fleet(ended=True, deleted=True)
        status: Json = k8s_job.get("status", {})
        true = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
        active, failed = status.get("active", 0), status.get("failed", 0)
        noted = k8s_job["metadata"].get("annotations", {})
        return Fleet(
            live=active,
            failed=failed,
            unready=max(0, active - status.get("ready", 0)),
            ended="Complete" in true or "Failed" in true,
            hopeless=true.get("Failed", {}).get("reason") not in (None, "DeadlineExceeded")
            and not status.get("succeeded"),
            missed=int(noted.get(f"{ANNOTATION}missed", 0)),
            suspended=k8s_job["spec"].get("suspend", False)
            and noted.get(f"{ANNOTATION}phase") == Phase.STARTING,
            trouble=self.trouble.get(record.run_id, {}),
        )

    def find_trouble(self, phase: str, cause: str) -> None:
        """Note why pods in this phase do not start, or have failed. One call, one page."""
        page = self.call(
            "GET",
            "pods",
            query=[OURS, ("fieldSelector", f"status.phase={phase}"), ("limit", "500")],
        )
        reasons: dict[str, Counter[str]] = {}
        for pod in page["items"]:
            if reason := pod_trouble(pod["status"]):
                run_id = pod["metadata"]["labels"].get(RUN_LABEL, "")
                reasons.setdefault(run_id, Counter())[reason] += 1
        for run_id, counted in reasons.items():
            text = "; ".join(f"{number} x {reason}" for reason, number in counted.most_common(3))
            self.trouble.setdefault(run_id, {})[cause] = text

    def end(self, record: Record, fleet: Fleet) -> None:
        """Have the Job controller end the pods; the Job then says DeadlineExceeded."""
        k8s_job = self.seen[record.k8s_job]
        if k8s_job["spec"].get("suspend"):
            self.remove(k8s_job)  # a Job that somebody has suspended knows no deadline
        elif "activeDeadlineSeconds" not in k8s_job["spec"]:
            noted = notes(missed=fleet.unready)
            self.patch(record, {"spec": {"activeDeadlineSeconds": 1}, "metadata": noted})

    def delete(self, record: Record) -> None:
        """Delete the Job that this start of the run has created."""
        for k8s_job in self.pages("jobs", ("labelSelector", f"{RUN_LABEL}={record.run_id}")):
            noted = k8s_job["metadata"].get("annotations", {})
            if noted.get(f"{ANNOTATION}claim") == record.claim:
                self.remove(k8s_job)
        self.seen.pop(record.k8s_job, None)

    def tell(self, record: Record, phase: str, left: int, event: str = "", text: str = "") -> None:
        """Annotations on the Job, and an Event."""
        try:
            self.patch(record, {"metadata": notes(phase=phase, jobs_left=left)})
        except KubernetesRefused as error:
            say("annotation refused", logging.WARNING, run_id=record.run_id, error=error)
        if event:
            normal = event in ("Drained", "Stopped")
            self.event(record, event, text, "Normal" if normal else "Warning")

    def event(self, record: Record, reason: str, text: str, kind: str = "Normal") -> None:
        """An Event on the Job. One that the API refuses is not worth a run."""
        metadata = self.seen.get(record.k8s_job, {}).get("metadata", {})
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        body = {
            "metadata": {"generateName": f"{record.k8s_job}."},
            "involvedObject": {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": record.k8s_job,
                "namespace": self.namespace,
                "uid": metadata.get("uid", ""),
            },
            "type": kind,
            "reason": reason,
            "message": text[:1000],
            "source": {"component": "armada-orchestrator"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            self.call("POST", "events", body)
        except KubernetesRefused as error:
            say("event refused", logging.WARNING, run_id=record.run_id, error=error)

    def forget(self, record: Record) -> None:
        """The Job stays for a while, for inspection."""
        self.seen.pop(record.k8s_job, None)

    def check(self) -> None:
        """List one Job."""
        self.call("GET", "jobs", query=[("limit", "1")])


def pod_trouble(status: Json) -> str:
    """Why a pod does not run; empty where it is only about to."""
    for container in status.get("containerStatuses", []):
        state: Json = container.get("state", {})
        waiting, ended = state.get("waiting", {}), state.get("terminated", {})
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
        if ended:
            return f"{ended.get('reason', 'Error')}, exit code {ended.get('exitCode')}"
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message', '')}"
    return str(status.get("reason", ""))

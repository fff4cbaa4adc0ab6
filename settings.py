"""What the operator sets, and how events are logged."""

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from merge import Json, Limits

log = logging.getLogger("armada")
MIB = 2**20
AMQP = ("amqp://", "amqps://", "pyamqp://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Each is an environment variable of the same name in upper case; the README tells them all."""

    platform: str = "local"
    distrib: str = "kube"
    namespace: str = ""
    host: str = ""
    port: int = 8080
    log_format: str = ""
    api_token: str = ""
    api_token_file: str = ""
    cors_origins: tuple[str, ...] = ("http://localhost:3000",)
    redis_host: str = ""
    redis_port: int = 6379
    rabbitmq_url: str = ""
    backend_url: str = ""
    proxy_provider_url: str = ""
    fingerprint_provider_url: str = ""
    docker_hub_username: str = "armadasvc"
    image_pull_secrets: tuple[str, ...] = ()
    agent_rabbitmq_secret: str = "armada-rabbitmq/url"
    agent_pod_template: str = ""
    ttl_seconds_after_finished: int = 86400
    agent_command: str = shlex.join([sys.executable, str(Path(__file__).with_name("agent.py"))])
    local_max_agents: int = 16
    max_restarts: int = 5
    monitor_interval_ms: int = 1000
    kubernetes_interval_ms: int = 5000
    timeout: int = 10  #: seconds
    idle_forget: int = 300  #: seconds
    keep_failed: int = 86400  #: seconds
    max_upload_bytes: int = 128 * MIB
    max_script_bytes: int = 8 * MIB
    max_requirements_bytes: int = 64 * 1024
    max_agents: int = 10_000
    max_jobs: int = 1_000_000
    max_message_bytes: int = 8 * MIB
    max_columns: int = 1000
    max_depth: int = 64
    max_concurrent_starts: int = 4
    #: What AGENT_POD_TEMPLATE holds; the last, as it is no variable of its own.
    pod_template: Json = field(default_factory=dict)

    @classmethod
    def read(cls, env: Mapping[str, str]) -> "Settings":
        """Take the settings from the environment. Raises ValueError that names the wrong one."""
        given: Json = {}
        for known in fields(cls)[:-1]:
            name, default = known.name.upper(), known.default
            text = env.get(name)
            if text is None or (text == "" and name not in ("AGENT_COMMAND", "CORS_ORIGINS")):
                continue
            if isinstance(default, int):
                if not text.isdecimal():
                    raise ValueError(f"{name} must be a whole number from 0, not {text!r}")
                given[known.name] = int(text)
            elif isinstance(default, tuple):
                given[known.name] = tuple(part.strip() for part in text.split(",") if part.strip())
            else:
                given[known.name] = text
        settings = cls(**given)
        if not settings.max_concurrent_starts:
            raise ValueError("MAX_CONCURRENT_STARTS must be at least 1")
        for name, value, choices in (
            ("PLATFORM", settings.platform, ("local", "distant")),
            ("DISTRIB", settings.distrib, ("kube", "minikube")),
            ("LOG_FORMAT", settings.log_format, ("", "text", "json")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if settings.local:
            command = shlex.split(settings.agent_command)
            if command and not shutil.which(command[0]):
                raise ValueError(f"AGENT_COMMAND: there is no program {command[0]!r}")
        elif settings.rabbitmq_url and not settings.rabbitmq_url.startswith(AMQP):
            raise ValueError("RABBITMQ_URL must be an amqp:// address for PLATFORM=distant")
        if settings.api_token_file:
            token = _read_file("API_TOKEN_FILE", settings.api_token_file).strip()
            settings = replace(settings, api_token=token)
        if settings.agent_pod_template:
            settings = replace(settings, pod_template=read_template(settings.agent_pod_template))
        return settings

    @property
    def local(self) -> bool:
        """Whether agents are child processes."""
        return self.platform == "local"

    @property
    def limits(self) -> Limits:
        """What one run may hold."""
        agents, hint = self.max_agents, "ask the operator to raise MAX_AGENTS"
        if self.local and self.agent_command and self.local_max_agents < agents:
            agents, hint = self.local_max_agents, "lower it, or raise LOCAL_MAX_AGENTS"
        return Limits(
            agents=agents,
            agents_hint=hint,
            jobs=self.max_jobs,
            message=self.max_message_bytes,
            columns=self.max_columns,
            depth=self.max_depth,
        )

    def scrub(self, text: str) -> str:
        """`text` without the token and the broker's password."""
        password = urlsplit(self.rabbitmq_url).password or ""
        for secret in {self.api_token, password, unquote(password)} - {""}:
            text = text.replace(secret, "***")
        return text


def _read_file(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={path} cannot be read: {error}") from error


def read_template(path: str) -> Json:
    """The operator's PodTemplateSpec, YAML or JSON. Raises ValueError that names the file."""
    import yaml  # it comes with the kubernetes client

    try:
        template = yaml.safe_load(_read_file("AGENT_POD_TEMPLATE", path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"AGENT_POD_TEMPLATE={path} is not YAML: {error}") from error
    if not isinstance(template, dict) or not template.keys() <= {"metadata", "spec"}:
        text = "must be a PodTemplateSpec, an object with metadata and spec"
        raise ValueError(f"AGENT_POD_TEMPLATE={path} {text}")
    return template


def say(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log one event of a run's or the orchestrator's life."""
    log.log(level, event, extra={"fields": fields})


class LogLine(logging.Formatter):
    """One line per event: key=value, or JSON. Secrets are taken out here, for all events."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.as_json = settings.log_format == "json" or (not settings.log_format and contained())

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z"
        line: Json = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if self.as_json:
            return self.settings.scrub(json.dumps(line, default=str))
        shown = {key: str(value) for key, value in line.items()}
        plain = (v if v and not set(v) & set(' "=\n') else json.dumps(v) for v in shown.values())
        return self.settings.scrub(" ".join(map("=".join, zip(shown, plain, strict=True))))


def configure_logging(settings: Settings) -> None:
    """One line per event on standard error, uvicorn's included; /health is not logged."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine(settings))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    access = logging.getLogger("uvicorn.access")
    access.addFilter(lambda record: " /health" not in record.getMessage())
    logging.getLogger("amqp").setLevel(logging.WARNING)


def contained() -> bool:
    """Whether this process runs in a container."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or os.path.exists("/.dockerenv")

"""What the chart promises, checked on what the real Helm engine makes of it. No cluster needed."""

import base64
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import redis
import render as engine
import yaml
from render import CHART, Manifest, render

EXTERNAL = {
    "redis": {"enabled": False},
    "externalRedis": {"host": "redis.example.org", "port": 6380},
    "rabbitmq": {"enabled": False},
    "externalRabbitmq": {"existingSecret": "broker", "key": "amqp-url"},
}
VARIANTS: dict[str, Manifest] = {
    "defaults": {},
    "minikube": {"distrib": "minikube", "image": {"tag": "dev"}},
    "two replicas": {"replicas": 2},
    "external servers": EXTERNAL,
    "secrets of one's own": {
        "apiToken": {"existingSecret": "my-token"},
        "rabbitmq": {"existingSecret": "my-rabbitmq"},
    },
    "nothing kept, nothing guarded": {
        "apiToken": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "redis": {"persistence": {"enabled": False}},
        "rabbitmq": {"persistence": {"enabled": False}},
    },
    "everything set": {
        "dockerHubUsername": "me",
        "image": {"repository": "example.org/o", "tag": "1", "pullSecrets": ["pull"]},
        "replicas": 3,
        "env": {"MAX_JOBS": 1_000_000, "TIMEOUT": "20"},
        "corsOrigins": ["http://localhost:3000", "https://armada.example.org"],
        "backendUrl": "http://backend:8000",
        "proxyProviderUrl": "http://proxies:8001",
        "fingerprintProviderUrl": "http://fingerprints:8002",
        "agent": {
            "imagePullSecrets": ["one", "two"],
            "ttlSecondsAfterFinished": 1_000_000,
            "podTemplate": {
                "metadata": {"annotations": {"example.org/team": "red"}},
                "spec": {
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [
                        {"name": "agent", "env": [{"name": "HOME", "value": "/home/me"}]},
                        {"name": "proxy", "image": "proxy:1"},
                    ],
                },
            },
        },
        "redis": {"persistence": {"storageClass": "fast", "size": "10Gi"}},
        "networkPolicy": {"ingressNamespace": "ingress-nginx"},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "armada.example.org",
            "tlsSecret": "armada-tls",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "128m"},
        },
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    },
}
everywhere = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())


@functools.cache
def rendered(values: str) -> list[Manifest]:
    return engine.manifests(json.loads(values))


def manifests(values: Manifest | None = None) -> list[Manifest]:
    """Every object that the chart makes of these values. Rendered once: not to be changed."""
    return rendered(json.dumps(values or {}, sort_keys=True))


def objects(kind: str, values: Manifest | None = None) -> dict[str, Manifest]:
    """The objects of a kind by name."""
    return {m["metadata"]["name"]: m for m in manifests(values) if m["kind"] == kind}


def names_of(found: list[Manifest]) -> set[tuple[str, str]]:
    return {(manifest["kind"], manifest["metadata"]["name"]) for manifest in found}


def pod_templates(values: Manifest | None = None) -> dict[str, Manifest]:
    """Every pod that the chart itself starts, by name, as {metadata, spec}."""
    found = {}
    for manifest in manifests(values):
        if manifest["kind"] == "Pod":
            found[manifest["metadata"]["name"]] = manifest
        elif "template" in manifest.get("spec", {}):
            found[manifest["metadata"]["name"]] = manifest["spec"]["template"]
    return found


def servers(values: Manifest | None = None) -> dict[str, Manifest]:
    """The pods that stay: all but that of `helm test`."""
    return {n: p for n, p in pod_templates(values).items() if not n.endswith("-test")}


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def environment(values: Manifest | None = None) -> dict[str, Any]:
    """The orchestrator's environment; a reference to a Secret as `name/key`."""
    variables = {}
    for variable in container(pod_templates(values)["armada-orchestrator"])["env"]:
        source = variable.get("valueFrom", {})
        secret = source.get("secretKeyRef")
        variables[variable["name"]] = (
            f"{secret['name']}/{secret['key']}" if secret else variable.get("value", source)
        )
    return variables


def agent_template(values: Manifest | None = None) -> Manifest:
    """The pod template that the orchestrator merges over its agents' manifest."""
    text = objects("ConfigMap", values)["armada-agent-pod-template"]["data"]["pod-template.yaml"]
    template: Manifest = yaml.safe_load(text)
    return template


def agent_env(values: Manifest | None = None) -> dict[str, Manifest]:
    (agent,) = [c for c in agent_template(values)["spec"]["containers"] if c["name"] == "agent"]
    variables = {variable["name"]: variable for variable in agent["env"]}
    assert len(variables) == len(agent["env"])
    return variables


def secret_data(values: Manifest | None = None) -> dict[str, str]:
    """What the chart's Secrets hold, decoded, by `name/key`."""
    return {
        f"{name}/{key}": base64.b64decode(value).decode()
        for name, secret in objects("Secret", values).items()
        for key, value in secret["data"].items()
    }


# What Helm and Kubernetes accept


@everywhere
def test_helm_lint_strict_finds_nothing(values: Manifest) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    found = [m for m in report["messages"] if m["error"] != "icon is recommended"]
    assert report["total_charts_linted"] == 1
    assert (found, report["errors"]) == ([], [])


@pytest.mark.parametrize("version", ["1.30", "1.36"])
@everywhere
def test_every_manifest_is_valid_to_the_letter(values: Manifest, version: str) -> None:
    for manifest in manifests(values):
        kubernetes_validate.validate(manifest, version, strict=True)


@everywhere
def test_the_agents_pod_template_is_a_pod_template(values: Manifest) -> None:
    template = agent_template(values)
    for each in template["spec"]["containers"]:
        each.setdefault("image", "set-by-the-orchestrator")
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template},
        "1.36",
        strict=True,
    )


@everywhere
def test_no_two_objects_have_the_same_name(values: Manifest) -> None:
    assert len(names_of(manifests(values))) == len(manifests(values))


def test_names_fit_their_limits_whatever_the_release_is_called() -> None:
    for manifest in engine.manifests(release="a" * 53):
        name = manifest["metadata"]["name"]
        # A StatefulSet's pods carry its name, a dash and a hash of ten characters as a label.
        assert len(name) <= (52 if manifest["kind"] == "StatefulSet" else 63), name


@everywhere
def test_every_reference_inside_the_release_resolves(values: Manifest) -> None:
    names = names_of(manifests(values))
    given = {"my-token", "my-rabbitmq", "broker"}
    for pod in pod_templates(values).values():
        spec, only = pod["spec"], container(pod)
        account = spec.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in names
        for variable in only.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert ("Secret", secret["name"]) in names or secret["name"] in given
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
    for manifest in manifests(values):
        if manifest["kind"] == "StatefulSet":
            assert ("Service", manifest["spec"]["serviceName"]) in names


@everywhere
def test_every_mount_has_its_volume(values: Manifest) -> None:
    for manifest in manifests(values):
        if "template" not in manifest.get("spec", {}):
            continue
        spec = manifest["spec"]["template"]["spec"]
        claims = [c["metadata"]["name"] for c in manifest["spec"].get("volumeClaimTemplates", [])]
        volumes = [v["name"] for v in spec["volumes"]] + claims
        mounted = [m["name"] for m in spec["containers"][0]["volumeMounts"]]
        assert sorted(volumes) == sorted(mounted)


# Names that front ends and agents know


def test_a_release_named_armada_has_the_host_names_that_others_expect() -> None:
    ports = {
        name: [port["port"] for port in service["spec"]["ports"]]
        for name, service in objects("Service").items()
    }
    assert ports == {
        "armada-orchestrator": [8080],
        "armada-redis": [6379],
        "armada-rabbitmq": [5672, 15672],
    }


@everywhere
def test_every_service_reaches_one_kind_of_pod_on_ports_it_opens(values: Manifest) -> None:
    for name, service in objects("Service", values).items():
        selector = service["spec"]["selector"].items()
        (pod,) = [
            pod
            for pod in pod_templates(values).values()
            if selector <= pod["metadata"]["labels"].items()
        ]
        opened = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
        wanted = {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}
        assert opened == wanted, name


def test_two_releases_in_a_namespace_leave_one_another_alone() -> None:
    """Agents apart, which belong to runs."""
    others = engine.manifests(release="other")
    assert not names_of(others) & names_of(manifests())
    labels = [pod["metadata"]["labels"].items() for pod in pod_templates().values()]
    for spec in [m["spec"] for m in others if "spec" in m]:
        selector = spec.get("selector", spec.get("podSelector", {}))
        wanted = selector.get("matchLabels", selector).items()
        assert not wanted or not any(wanted <= own for own in labels), selector


# The orchestrator


def test_the_orchestrator_gets_the_settings_it_reads() -> None:
    assert environment() == {
        "PLATFORM": "distant",
        "DISTRIB": "kube",
        "HOST": "0.0.0.0",
        "PORT": "8080",
        "NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
        "LOG_FORMAT": "json",
        "REDIS_HOST": "armada-redis",
        "REDIS_PORT": "6379",
        "RABBITMQ_URL": "armada-rabbitmq/url",
        "AGENT_RABBITMQ_SECRET": "armada-rabbitmq/url",
        "AGENT_POD_TEMPLATE": "/etc/armada/pod-template.yaml",
        "DOCKER_HUB_USERNAME": "armadasvc",
        "TTL_SECONDS_AFTER_FINISHED": "86400",
        "CORS_ORIGINS": "",
        "API_TOKEN": "armada-api-token/token",
    }


def test_values_reach_the_orchestrator_as_written() -> None:
    assert environment(VARIANTS["everything set"]) == environment() | {
        "DOCKER_HUB_USERNAME": "me",
        "MAX_JOBS": "1000000",
        "TIMEOUT": "20",
        "TTL_SECONDS_AFTER_FINISHED": "1000000",
        "CORS_ORIGINS": "http://localhost:3000,https://armada.example.org",
        "BACKEND_URL": "http://backend:8000",
        "PROXY_PROVIDER_URL": "http://proxies:8001",
        "FINGERPRINT_PROVIDER_URL": "http://fingerprints:8002",
        "IMAGE_PULL_SECRETS": "one,two",
    }


def test_without_a_token_the_orchestrator_answers_to_the_names_of_its_service() -> None:
    assert "ALLOWED_HOSTS" not in environment()
    bare: Manifest = {"apiToken": {"enabled": False}}
    own = ["", ".test", ".test.svc", ".test.svc.cluster.local"]
    hosts = [f"armada-orchestrator{suffix}" for suffix in own]
    assert environment(bare)["ALLOWED_HOSTS"].split(",") == hosts
    more = bare | {"env": {"ALLOWED_HOSTS": "a.example.org, b.example.org"}}
    more["ingress"] = {"enabled": True, "host": "armada.example.org"}
    found = environment(more)["ALLOWED_HOSTS"].replace(" ", "").split(",")
    assert found == [*hosts, "armada.example.org", "a.example.org", "b.example.org"]


def test_uploads_find_room_and_do_not_fill_the_node() -> None:
    def room(values: Manifest) -> int:
        pod = pod_templates(values)["armada-orchestrator"]
        mounts = {m["mountPath"]: m for m in container(pod)["volumeMounts"]}
        assert not mounts["/tmp"].get("readOnly")
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        return int(volumes[mounts["/tmp"]["name"]]["emptyDir"]["sizeLimit"])

    assert room({}) == 2 * 4 * 128 * MIB
    assert room({"env": {"MAX_UPLOAD_BYTES": 10**9}}) == 8 * 10**9
    assert room({"env": {"MAX_UPLOAD_BYTES": "1000", "MAX_CONCURRENT_STARTS": 1}}) == 2000


@everywhere
def test_no_variable_is_set_twice(values: Manifest) -> None:
    for pod in pod_templates(values).values():
        names = [variable["name"] for variable in container(pod).get("env", [])]
        assert len(names) == len(set(names))


def test_the_pod_template_is_mounted_where_the_setting_says_and_a_change_restarts_the_pods() -> (
    None
):
    pod = pod_templates()["armada-orchestrator"]
    mounts = {m["mountPath"]: m["name"] for m in container(pod)["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert volumes[mounts["/etc/armada"]]["configMap"]["name"] == "armada-agent-pod-template"
    changed = pod_templates({"agent": {"podTemplate": {"spec": {"hostNetwork": False}}}})
    assert (
        pod["metadata"]["annotations"] != changed["armada-orchestrator"]["metadata"]["annotations"]
    )


def test_liveness_asks_no_dependency_and_readiness_asks_all() -> None:
    only = container(pod_templates()["armada-orchestrator"])
    paths = {name: only[name]["httpGet"]["path"] for name in only if name.endswith("Probe")}
    assert paths == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/health?ready",
    }
    # Which takes up to 5 s to say that something is silent.
    assert only["readinessProbe"]["timeoutSeconds"] >= 10


def test_the_orchestrator_has_time_to_shut_down() -> None:
    pod = pod_templates()["armada-orchestrator"]
    pause = container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 60 + pause


def test_an_upgrade_takes_no_orchestrator_away_before_its_successor_is_ready() -> None:
    strategy = objects("Deployment")["armada-orchestrator"]["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize(("replicas", "budgets"), [(1, 0), (2, 1), (5, 1)])
def test_a_disruption_budget_exists_only_with_more_than_one_replica(
    replicas: int, budgets: int
) -> None:
    values = {"replicas": replicas}
    deployment = objects("Deployment", values)["armada-orchestrator"]["spec"]
    assert deployment["replicas"] == replicas
    found = [
        budget["spec"]["maxUnavailable"]
        for budget in objects("PodDisruptionBudget", values).values()
    ]
    assert found == [1] * budgets
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "one node must do for all replicas"


def test_images_come_from_the_account_or_from_where_the_values_say() -> None:
    def image(values: Manifest) -> tuple[str, str]:
        only = container(pod_templates(values)["armada-orchestrator"])
        return only["image"], only["imagePullPolicy"]

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert image({}) == (f"armadasvc/armada-orchestrator:{version}", "IfNotPresent")
    assert image({"dockerHubUsername": "me"}) == (
        f"me/armada-orchestrator:{version}",
        "IfNotPresent",
    )
    assert image({"image": {"repository": "example.org/o", "tag": "2"}}) == (
        "example.org/o:2",
        "IfNotPresent",
    )
    minikube = {"distrib": "minikube", "image": {"tag": "dev"}}
    assert image(minikube) == ("armadasvc/armada-orchestrator:dev", "Never")


def test_an_ingress_exists_only_when_asked_for() -> None:
    assert objects("Ingress") == {}
    spec = objects("Ingress", VARIANTS["everything set"])["armada-orchestrator"]["spec"]
    (rule,) = spec["rules"]
    (path,) = rule["http"]["paths"]
    service = {"name": "armada-orchestrator", "port": {"name": "http"}}
    assert (rule["host"], path["backend"]["service"]) == ("armada.example.org", service)
    assert (path["path"], path["pathType"]) == ("/", "Prefix")
    assert spec["tls"] == [{"hosts": ["armada.example.org"], "secretName": "armada-tls"}]


# Least privilege


def test_the_role_has_exactly_the_verbs_that_the_orchestrator_uses() -> None:
    (role,) = objects("Role").values()
    allowed = {
        (group, resource): sorted(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert allowed == {
        ("batch", "jobs"): ["create", "delete", "list", "patch"],
        ("", "pods"): ["list"],
        ("", "events"): ["create", "list"],
    }
    assert not objects("ClusterRole")


def test_only_the_orchestrators_account_has_the_role() -> None:
    (binding,) = objects("RoleBinding").values()
    account = {"kind": "ServiceAccount", "name": "armada-orchestrator", "namespace": "test"}
    assert binding["subjects"] == [account]
    assert binding["roleRef"]["name"] == "armada-orchestrator"
    assert pod_templates()["armada-orchestrator"]["spec"]["serviceAccountName"] == (
        "armada-orchestrator"
    )


@everywhere
def test_no_pod_but_the_orchestrators_gets_a_token(values: Manifest) -> None:
    for name, pod in pod_templates(values).items():
        assert pod["spec"]["automountServiceAccountToken"] is (name == "armada-orchestrator")
    for account in objects("ServiceAccount", values).values():
        assert account["automountServiceAccountToken"] is False


@everywhere
def test_every_pod_passes_the_restricted_standard_on_a_read_only_root(values: Manifest) -> None:
    for name, pod in pod_templates(values).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}, name
        for volume in spec.get("volumes", []):
            assert volume.keys() - {"name"} <= {"configMap", "emptyDir"}, name
        only = container(pod)
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert all("hostPort" not in port for port in only.get("ports", [])), name


@everywhere
def test_every_container_has_requests_and_a_memory_limit(values: Manifest) -> None:
    for pod in pod_templates(values).values():
        resources = container(pod)["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert "memory" in resources["limits"]


# The agents


def test_agents_run_as_uid_1000_under_an_account_of_their_own() -> None:
    spec = agent_template()["spec"]
    assert spec["serviceAccountName"] == "armada-agent"
    assert "armada-agent" in objects("ServiceAccount")
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
    }
    assert spec["enableServiceLinks"] is False


def test_agents_take_sql_server_settings_from_a_secret_that_may_be_missing() -> None:
    variables = agent_env()
    assert variables.pop("HOME")["value"] == "/tmp"
    assert variables == {
        name: {
            "name": name,
            "valueFrom": {
                "secretKeyRef": {"name": "armada-sql-server-secret", "key": name, "optional": True}
            },
        }
        for name in ("SQL_SERVER_NAME", "SQL_SERVER_DB", "SQL_SERVER_USER", "SQL_SERVER_PASSWORD")
    }


def test_the_operators_pod_template_wins_and_loses_nothing_of_the_charts() -> None:
    template = agent_template(VARIANTS["everything set"])
    spec = template["spec"]
    assert template["metadata"] == {"annotations": {"example.org/team": "red"}}
    assert spec["serviceAccountName"] == "armada-agent"
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert [c["name"] for c in spec["containers"]] == ["agent", "proxy"]
    variables = agent_env(VARIANTS["everything set"])
    assert variables["HOME"]["value"] == "/home/me"
    assert len(variables) == 5


def test_the_operator_can_replace_what_the_chart_adds() -> None:
    spec = {
        "serviceAccountName": "mine",
        "securityContext": {"runAsNonRoot": False, "runAsUser": None},
        "containers": [{"name": "agent", "env": [{"name": "SQL_SERVER_DB", "value": "test"}]}],
    }
    values = {"agent": {"podTemplate": {"spec": spec}}}
    merged = agent_template(values)["spec"]
    assert merged["serviceAccountName"] == "mine"
    assert merged["securityContext"]["runAsNonRoot"] is False
    assert "runAsUser" not in merged["securityContext"]
    assert agent_env(values)["SQL_SERVER_DB"] == {"name": "SQL_SERVER_DB", "value": "test"}
    emptied = agent_template({"agent": {"podTemplate": {"spec": None}}})["spec"]
    assert emptied["serviceAccountName"] == "armada-agent"


# Secrets


@everywhere
def test_no_password_appears_outside_its_secret(values: Manifest) -> None:
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(values, name="armada")
    documents = [d for text in texts.values() for d in text.split("\n---\n")]
    secrets = [yaml.safe_load(d) for d in documents if re.search("^kind: Secret$", d, re.M)]
    others = [d for d in documents if not re.search("^kind: Secret$", d, re.M)]
    passwords = [
        base64.b64decode(secret["data"][key]).decode()
        for secret in secrets
        for key in ("password", "token")
        if key in secret["data"]
    ]
    for password in passwords:
        assert len(password) == 32
        assert not any(password in document for document in others)


@everywhere
def test_no_variable_that_is_secret_has_a_value_in_clear(values: Manifest) -> None:
    secret = re.compile("PASS|TOKEN$|RABBITMQ_URL")
    variables = [v for pod in pod_templates(values).values() for v in container(pod).get("env", [])]
    for variable in [*variables, *agent_env(values).values()]:
        assert "value" not in variable or not secret.search(variable["name"]), variable["name"]


def test_generated_secrets_are_new_in_every_installation() -> None:
    first = secret_data()
    rendered.cache_clear()
    second = secret_data()
    assert first.keys() == {
        "armada-api-token/token",
        "armada-rabbitmq/password",
        "armada-rabbitmq/url",
    }
    assert not set(first.values()) & set(second.values())


def test_the_broker_and_its_clients_are_given_the_same_password() -> None:
    data = secret_data()
    password = data["armada-rabbitmq/password"]
    assert data["armada-rabbitmq/url"] == f"amqp://armada:{password}@armada-rabbitmq:5672"
    variables = {v["name"]: v for v in container(pod_templates()["armada-rabbitmq"])["env"]}
    assert variables["RABBITMQ_DEFAULT_USER"]["value"] == "armada"
    assert variables["RABBITMQ_DEFAULT_PASS"]["valueFrom"]["secretKeyRef"] == {
        "name": "armada-rabbitmq",
        "key": "password",
    }


class InstalledSecrets(BaseHTTPRequestHandler):
    """As much of an API server as Helm's `lookup` asks for: discovery, and Secrets by name."""

    found: dict[str, dict[str, str]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        answer: Manifest = {"kind": "Status", "apiVersion": "v1", "code": 404, "reason": "NotFound"}
        if path == "/api/v1":
            secrets = {"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
            answer = {"kind": "APIResourceList", "groupVersion": "v1", "resources": [secrets]}
        elif path.startswith("/api/v1/namespaces/test/secrets/") and name in self.found:
            data = {k: base64.b64encode(v.encode()).decode() for k, v in self.found[name].items()}
            answer = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": name}}
            answer |= {"data": data}
        body = json.dumps(answer).encode()
        self.send_response(answer.get("code", 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def installed() -> Iterator[helm_python.Config]:
    """A cluster in which an earlier revision of the release left its Secrets."""
    InstalledSecrets.found = {
        "armada-api-token": {"token": "the-token"},
        "armada-rabbitmq": {"password": "the-password", "url": "amqp://old"},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), InstalledSecrets)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {}}],
        "clusters": [
            {
                "name": "test",
                "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"},
            }
        ],
    }
    with helm_python.Config(kubeconfig_content=yaml.safe_dump(kubeconfig)) as config:
        yield config
    server.shutdown()
    server.server_close()


def test_an_upgrade_keeps_generated_passwords(installed: helm_python.Config) -> None:
    with helm_python.Chart.load(CHART) as chart:
        texts = installed.render(chart, name="armada", namespace="test", is_upgrade=True)
    data = {
        manifest["metadata"]["name"]: {
            key: base64.b64decode(value).decode() for key, value in manifest["data"].items()
        }
        for text in texts.values()
        for manifest in (yaml.safe_load_all(text) if "kind: Secret" in text else [])
        if manifest["kind"] == "Secret"
    }
    assert data == {
        "armada-api-token": {"token": "the-token"},
        "armada-rabbitmq": {
            "password": "the-password",
            "url": "amqp://armada:the-password@armada-rabbitmq:5672",
        },
    }


def test_secrets_of_ones_own_are_used_and_none_are_generated() -> None:
    values = VARIANTS["secrets of one's own"]
    assert objects("Secret", values) == {}
    assert environment(values)["API_TOKEN"] == "my-token/token"
    assert environment(values)["RABBITMQ_URL"] == "my-rabbitmq/url"
    assert environment(values)["AGENT_RABBITMQ_SECRET"] == "my-rabbitmq/url"


def test_without_a_token_there_is_none_to_read() -> None:
    values = {"apiToken": {"enabled": False}}
    assert "API_TOKEN" not in environment(values)
    assert "armada-api-token" not in objects("Secret", values)


# Redis and RabbitMQ


def redis_options(values: Manifest | None = None) -> dict[str, str]:
    arguments = container(pod_templates(values)["armada-redis"])["args"]
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def rabbitmq_settings(values: Manifest | None = None) -> dict[str, str]:
    text = objects("ConfigMap", values)["armada-rabbitmq"]["data"]["90-armada.conf"]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split(" = ") for line in lines)


def test_redis_keeps_its_file_on_the_volume_and_never_drops_a_key() -> None:
    options = redis_options()
    assert options["--maxmemory-policy"] == "noeviction"
    only = container(pod_templates()["armada-redis"])
    mounts = {m["mountPath"]: m["name"] for m in only["volumeMounts"]}
    assert mounts[options["--dir"]] == "data"


@pytest.mark.servers
@pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")
def test_what_redis_has_answered_survives_its_being_killed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    only = container(pod_templates()["armada-redis"])
    arguments = [str(tmp_path) if a == "/data" else a for a in only["args"]]
    command = [*only["command"], *arguments, "--port", str(port), "--bind", "127.0.0.1"]
    client = redis.Redis(port=port)

    def start() -> "subprocess.Popen[bytes]":
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(300):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None
                time.sleep(0.05)
        return server

    for expected in (None, b"kept"):
        server = start()
        try:
            assert client.get("run") == expected
            client.set("run", "kept")
            assert client.config_get("appendfsync")["appendfsync"] == "always"
        finally:
            server.kill()
            server.wait()


MIB = 2**20


@pytest.mark.parametrize(
    ("limit", "in_bytes"),
    [("512Mi", 512 * MIB), ("1.5Gi", 1536 * MIB), ("2G", 2 * 10**9), (1_000_000_000, 10**9)],
)
def test_redis_and_rabbitmq_refuse_before_they_are_killed_for_their_memory(
    limit: str | int, in_bytes: int
) -> None:
    resources = {"resources": {"limits": {"memory": limit}}}
    values = {"redis": resources, "rabbitmq": resources}
    assert int(redis_options(values)["--maxmemory"]) == in_bytes * 75 // 100
    watermark = int(rabbitmq_settings(values)["vm_memory_high_watermark.absolute"])
    assert watermark == in_bytes * 60 // 100


def test_without_a_memory_limit_there_is_nothing_to_stay_below() -> None:
    resources = {"resources": {"limits": None}}
    values = {"redis": resources, "rabbitmq": resources}
    assert "--maxmemory" not in redis_options(values)
    assert "vm_memory_high_watermark.absolute" not in rabbitmq_settings(values)


def test_rabbitmq_waits_for_long_jobs_and_permits_the_queues_of_celerys_own_tools() -> None:
    settings = rabbitmq_settings()
    assert settings["deprecated_features.permit.transient_nonexcl_queues"] == "true"
    # A day at least; a timer of the Erlang machine holds 32 bits.
    assert 86_400_000 <= int(settings["consumer_timeout"]) < 2**32
    assert settings["disk_free_limit.absolute"] == "500MB"


def test_the_user_that_agents_share_does_not_administrate_the_broker() -> None:
    tags = {k for k in rabbitmq_settings() if k.startswith("default_user_tags.")}
    assert tags == {"default_user_tags.monitoring"}


def test_rabbitmq_gets_as_many_open_files_as_it_needs_and_is_allowed(tmp_path: Path) -> None:
    only = container(pod_templates()["armada-rabbitmq"])
    entrypoint = tmp_path / "docker-entrypoint.sh"
    entrypoint.write_text('#!/bin/sh\nulimit -n; echo "$@"\n')
    entrypoint.chmod(0o755)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for allowed in (1000, min(hard, 70_000)):
        found = subprocess.run(
            [*only["command"], *only["args"]],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            preexec_fn=functools.partial(
                resource.setrlimit, resource.RLIMIT_NOFILE, (100, allowed)
            ),
        )
        assert found.stdout.split() == [str(min(allowed, 65536)), "rabbitmq-server"]


def test_rabbitmqs_settings_are_added_to_the_images_and_do_not_replace_them() -> None:
    mounts = container(pod_templates()["armada-rabbitmq"])["volumeMounts"]
    assert [m for m in mounts if m["mountPath"].startswith("/etc/rabbitmq")] == [
        {
            "name": "config",
            "mountPath": "/etc/rabbitmq/conf.d/90-armada.conf",
            "subPath": "90-armada.conf",
            "readOnly": True,
        }
    ]


@pytest.mark.parametrize(
    ("name", "uid", "paths"),
    [
        ("armada-orchestrator", 1000, ["/tmp"]),
        ("armada-redis", 999, ["/data", "/tmp"]),
        ("armada-rabbitmq", 999, ["/tmp", "/var/lib/rabbitmq", "/var/log/rabbitmq"]),
    ],
)
def test_each_server_writes_where_its_image_does_as_the_user_that_its_image_knows(
    name: str, uid: int, paths: list[str]
) -> None:
    pod = pod_templates()[name]
    context = pod["spec"]["securityContext"]
    assert [context[k] for k in ("runAsUser", "runAsGroup", "fsGroup")] == [uid] * 3
    mounts = container(pod)["volumeMounts"]
    assert sorted(m["mountPath"] for m in mounts if not m.get("readOnly")) == paths


def test_rabbitmq_has_time_to_write_what_it_holds() -> None:
    """It took six seconds with empty queues."""
    assert pod_templates()["armada-rabbitmq"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_erlang_cookie_is_written_beside_the_volume_and_not_on_it() -> None:
    only = container(pod_templates()["armada-rabbitmq"])
    home = next(v["value"] for v in only["env"] if v["name"] == "HOME")
    mounts = {m["mountPath"]: m["name"] for m in only["volumeMounts"]}
    assert mounts["/var/lib/rabbitmq"] == "data"
    assert mounts[home] == "tmp"


HANDLERS = ("exec", "httpGet", "tcpSocket")


@everywhere
def test_every_server_is_probed_and_cheaply(values: Manifest) -> None:
    for name, pod in servers(values).items():
        only = container(pod)
        probes = {key: probe for key, probe in only.items() if key.endswith("Probe")}
        assert {"livenessProbe", "readinessProbe"} <= probes.keys(), name
        ports = {port["name"] for port in only["ports"]}
        for probe in probes.values():
            ((kind, asked),) = [(k, probe[k]) for k in HANDLERS if k in probe]
            assert kind == "exec" or asked["port"] in ports, name
        patience = [probes["livenessProbe"][k] for k in ("periodSeconds", "failureThreshold")]
        assert patience[0] * patience[1] >= 60, f"{name} is killed when it is merely slow"
        assert "rabbitmq-diagnostics" not in json.dumps(only), name


def test_a_server_that_reads_a_large_volume_is_given_ten_minutes() -> None:
    """RabbitMQ opens its port when it has read its queues; Redis at once."""
    probe = container(pod_templates()["armada-rabbitmq"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
    assert "tcpSocket" in container(pod_templates()["armada-redis"])["livenessProbe"]


def test_placement_and_pull_secrets_reach_every_pod_of_the_chart() -> None:
    values = VARIANTS["everything set"]
    for pod in pod_templates(values).values():
        spec = pod["spec"]
        assert spec["nodeSelector"] == values["nodeSelector"]
        assert spec["tolerations"] == values["tolerations"]
        assert spec["imagePullSecrets"] == [{"name": "pull"}]
        assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize(("name", "size"), [("armada-redis", "4Gi"), ("armada-rabbitmq", "8Gi")])
def test_volumes_outlive_pods_but_not_the_release(name: str, size: str) -> None:
    spec = objects("StatefulSet")[name]["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == size
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert "storageClassName" not in claim["spec"]
    policy = spec["persistentVolumeClaimRetentionPolicy"]
    assert policy == {"whenDeleted": "Delete", "whenScaled": "Retain"}


def test_volumes_take_the_class_and_size_of_the_values_or_are_left_out() -> None:
    (claim,) = objects("StatefulSet", VARIANTS["everything set"])["armada-redis"]["spec"][
        "volumeClaimTemplates"
    ]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "10Gi"
    for manifest in objects("StatefulSet", VARIANTS["nothing kept, nothing guarded"]).values():
        assert "volumeClaimTemplates" not in manifest["spec"]


def test_a_rollback_replaces_a_pod_that_never_became_ready() -> None:
    for manifest in objects("StatefulSet").values():
        assert manifest["spec"]["podManagementPolicy"] == "Parallel"


def test_external_servers_replace_those_of_the_chart() -> None:
    assert objects("StatefulSet", EXTERNAL) == {}
    assert objects("Service", EXTERNAL).keys() == {"armada-orchestrator"}
    assert objects("Secret", EXTERNAL).keys() == {"armada-api-token"}
    assert objects("NetworkPolicy", EXTERNAL).keys() == {"armada-orchestrator", "armada-agent"}
    assert environment(EXTERNAL) == environment() | {
        "REDIS_HOST": "redis.example.org",
        "REDIS_PORT": "6380",
        "RABBITMQ_URL": "broker/amqp-url",
        "AGENT_RABBITMQ_SECRET": "broker/amqp-url",
    }


# The network


def test_redis_and_rabbitmq_are_reached_from_orchestrator_and_agents_only() -> None:
    orchestrator = pod_templates()["armada-orchestrator"]["metadata"]["labels"]
    for name, port in (("armada-redis", 6379), ("armada-rabbitmq", 5672)):
        spec = objects("NetworkPolicy")[name]["spec"]
        labels = pod_templates()[name]["metadata"]["labels"]
        assert spec["podSelector"]["matchLabels"].items() <= labels.items()
        (rule,) = spec["ingress"]
        assert rule["ports"] == [{"port": port}]
        own, agents = (source["podSelector"]["matchLabels"] for source in rule["from"])
        assert own.items() <= orchestrator.items()
        assert agents == {"app.kubernetes.io/managed-by": "armada-orchestrator"}


def test_nobody_reaches_an_agent_and_an_agent_reaches_whom_it_likes() -> None:
    assert objects("NetworkPolicy")["armada-agent"]["spec"] == {
        "podSelector": {"matchLabels": {"app.kubernetes.io/managed-by": "armada-orchestrator"}},
        "policyTypes": ["Ingress"],
    }


def test_the_orchestrator_is_reached_from_its_namespace_and_that_of_the_ingress() -> None:
    def sources(values: Manifest) -> Any:
        (rule,) = objects("NetworkPolicy", values)["armada-orchestrator"]["spec"]["ingress"]
        assert rule["ports"] == [{"port": 8080}]
        return rule["from"]

    assert sources({}) == [{"podSelector": {}}]
    assert sources({"networkPolicy": {"ingressNamespace": "web"}}) == [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}},
    ]


def test_network_policies_can_be_left_to_others() -> None:
    assert objects("NetworkPolicy", {"networkPolicy": {"enabled": False}}) == {}


# What a person sees


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"redis": {"persistance": {}}}, "persistance"),
        ({"agent": {"podTemplate": {"spce": {}}}}, "spce"),
        ({"agent": {"podTemplate": {"spec": {"containers": [{"env": []}]}}}}, "name"),
        ({"distrib": "docker"}, "distrib"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": "2"}, "replicas"),
        ({"replicas": 1.5}, "replicas"),
        ({"env": {"lower": "x"}}, "lower"),
        ({"env": {"REDIS_HOST": "x"}}, "REDIS_HOST"),
        ({"env": {"LIST": []}}, "LIST"),
        ({"backendUrl": "backend:8000"}, "backendUrl"),
        ({"corsOrigins": "http://localhost:3000"}, "corsOrigins"),
        ({"corsOrigins": ["http://localhost:3000/"]}, "corsOrigins"),
        ({"resources": {"limits": {"memory": "512 MB"}}}, "memory"),
        ({"redis": {"image": "redis"}}, "image"),
        ({"image": {"tag": "a b"}}, "tag"),
        ({"agent": {"imagePullSecrets": [{"name": "x"}]}}, "imagePullSecrets"),
        ({"agent": {"imagePullSecrets": ["Not_A_Name"]}}, "imagePullSecrets"),
        ({"externalRedis": {"port": 70000}}, "port"),
        ({"nodeSelector": {"gpu": True}}, "gpu"),
        ({"tolerations": ["all"]}, "tolerations"),
        ({"redis": {"enabled": False}}, "externalRedis.host must be set"),
        ({"rabbitmq": {"enabled": False}}, "externalRabbitmq.existingSecret must be set"),
        ({"ingress": {"enabled": True}}, "ingress.host must be set"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(values: Manifest, words: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(words)):
        render(values)


def test_the_schema_lets_no_unknown_key_through_anywhere() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    free = {"global", "env", "quantities", "strings", "metadata", "spec"}

    def check(name: str, node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and name not in free | {"items"}:
                assert node.get("additionalProperties") is False, name
            for key, child in node.items():
                check(key, child)

    check("", schema)


def test_the_chart_can_be_part_of_another() -> None:
    assert manifests({"global": {"anything": 1}})


def values_by_path(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of values.yaml by its dotted path; maps without keys are values."""
    if not isinstance(node, dict) or not node or prefix.split(".")[-1] in DOCUMENTED_WHOLE:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, child in node.items():
        found |= values_by_path(child, f"{prefix}.{key}".lstrip("."))
    return found


DOCUMENTED_WHOLE = ("resources", "podTemplate")


def test_there_are_few_values_and_each_is_in_the_readmes_table_with_its_default() -> None:
    text = (CHART / "values.yaml").read_text()
    assert len(text.splitlines()) < 120
    _, _, table = (CHART / "README.md").read_text().partition("## Values")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*?) \|", table.partition("##")[0], re.M))
    documented = {path: default.strip("`") for path, default in rows.items()}

    def shown(path: str, value: Any) -> str:
        if path.split(".")[-1] in DOCUMENTED_WHOLE:
            return "see values.yaml"
        return json.dumps(value) if not isinstance(value, str) else value or '""'

    assert documented == {
        path: shown(path, value) for path, value in values_by_path(yaml.safe_load(text)).items()
    }


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    grouped = ("backendUrl", "proxyProviderUrl", "fingerprintProviderUrl")
    for above, line in zip(["", *lines], lines, strict=False):
        key, _, value = line.partition(":")
        is_value = value.strip() and "#" not in key and not key.startswith("      ")
        if is_value and key not in grouped and key.strip() not in ("requests", "limits"):
            assert above.strip().startswith("#"), line


def notes(values: Manifest | None = None) -> str:
    return render(values)["templates/NOTES.txt"]


def test_the_notes_say_how_to_reach_it_read_the_token_and_start_a_run() -> None:
    text = notes()
    assert "kubectl port-forward -n test svc/armada-orchestrator 8080:8080" in text
    assert "kubectl get secret armada-api-token -n test -o jsonpath='{.data.token}'" in text
    target = "http://armada-orchestrator:8080/health"
    assert f"make start URL=http://localhost:8080 TARGET_URL={target}\n" in text
    assert "curl http://localhost:8080/bot/start" in text
    assert "Authorization: Bearer $TOKEN" in text
    for part in ("configtemplate", "data_job", "data_agent", "python_code", "requirements_txt"):
        assert f"-F {part}=@" in text
    assert 'curl -H "Authorization: Bearer $TOKEN" http://localhost:8080/bot/start\n' in text
    one = '"http://localhost:8080/bot/start?run_id=ID"\n'
    assert f'curl -H "Authorization: Bearer $TOKEN" {one}' in text
    assert f'curl -H "Authorization: Bearer $TOKEN" -X DELETE {one}' in text
    for target in ("status", "follow", "cancel"):
        assert f"make {target} URL=http://localhost:8080" in text
    assert "WARNING" not in text


def test_the_notes_follow_the_values() -> None:
    behind_ingress = notes(VARIANTS["everything set"])
    assert "curl https://armada.example.org/bot/start" in behind_ingress
    assert "port-forward" not in behind_ingress
    assert "get secret my-token" in notes(VARIANTS["secrets of one's own"])
    bare = notes(VARIANTS["nothing kept, nothing guarded"])
    assert "Bearer" not in bare
    assert "TOKEN" not in bare
    for value in ("apiToken.enabled", "networkPolicy.enabled", "persistence"):
        assert f"WARNING: {value}" in bare


class Readiness(BaseHTTPRequestHandler):
    """Answers the statuses of `script` in their order, the last one for ever."""

    script: list[int]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.script[0])
        self.end_headers()
        self.wfile.write(b"failing: redis" if self.script[0] == 503 else b"ready")
        self.script[1:] and self.script.pop(0)

    log_message = InstalledSecrets.log_message


@pytest.mark.parametrize(
    ("script", "exit_code", "shown"),
    [([503, 200], 0, ["503", "failing: redis", "ready"]), ([503], 1, ["failing: redis"])],
)
def test_helm_test_waits_for_readiness_and_says_what_is_missing(
    script: list[int], exit_code: int, shown: list[str]
) -> None:
    pod = pod_templates()["armada-orchestrator-test"]
    assert pod["metadata"]["annotations"] == {
        "helm.sh/hook": "test",
        # Helm uninstalls no hook: a pod that is not deleted on success would stay.
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
    }
    assert pod["spec"]["restartPolicy"] == "Never"
    Readiness.script, Readiness.asked = script, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Readiness) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        python, *options, program = container(pod)["command"]
        assert python == "python"
        assert "armada-orchestrator:8080" in program
        here = program.replace("armada-orchestrator:8080", f"127.0.0.1:{server.server_port}")
        if exit_code:
            here = here.replace("+ 60", "+ 0")
        command = [sys.executable, *options, here]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert set(Readiness.asked) == {"/health?ready"}
    assert found.returncode == exit_code
    for text in shown:
        assert text in found.stdout


def test_no_part_of_the_tests_is_packaged() -> None:
    with helm_python.Chart.load(CHART) as chart:
        assert {file["name"] for file in chart.files} == {".helmignore", "README.md"}


# The images


def test_one_dockerfile_makes_two_images_that_run_as_a_numbered_user_and_get_signals() -> None:
    text = (CHART.parent / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\S+)$", text, re.M)
    assert targets[-1] == "orchestrator"
    assert "agent" in targets
    assert re.findall(r"^USER (.*)$", text, re.M) == ["1000:1000", "root", "1000:1000"]
    commands = [json.loads(line) for line in re.findall(r"^CMD (.*)$", text, re.M)]
    assert commands == [["python", "agent.py"], ["python", "-m", "app"]]
    copied = set(" ".join(re.findall(r"^COPY (.*) \S+$", text, re.M)).split())
    kept = set(re.findall(r"^!(.*)$", (CHART.parent / ".dockerignore").read_text(), re.M))
    assert copied == kept == {"app.py", "merge.py", "agent.py", "requirements.txt"}
    (hashed,) = re.findall(r"^IMAGE_FILES := (.*)$", (CHART / "deploy.mk").read_text(), re.M)
    assert set(hashed.split()) == copied | {"Dockerfile"}


def test_no_target_of_make_is_defined_twice() -> None:
    texts = [(CHART.parent / "Makefile").read_text(), (CHART / "deploy.mk").read_text()]
    targets = [t for text in texts for t in re.findall(r"^([a-z0-9-]+):.*##", text, re.M)]
    assert len(targets) == len(set(targets))
    assert {"deploy", "undeploy", "status", "follow", "cancel", "k8s-jobs"} <= set(targets)


def test_an_agent_that_is_ended_before_its_first_job_does_not_count_as_completed() -> None:
    """143, as a shell says it; without a handler the first process of a container would go on."""
    agent = CHART.parent / "agent.py"
    with socket.create_server(("127.0.0.1", 0)) as index:
        environment = {
            **os.environ,
            "RUN_ID": "r",
            "POD_INDEX": "0",
            "REQUIREMENTS_TXT": base64.b64encode(b"humanize").decode(),
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
        }
        process = subprocess.Popen([sys.executable, agent], env=environment)
        index.settimeout(60)
        with index.accept()[0]:  # pip waits for an answer that does not come
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143

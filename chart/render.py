"""Render this chart with the Helm engine that `helm-python-sdk` carries; no helm binary needed.

As a program: writes the manifests of a release `armada` to standard output, for the policy scanner.
"""

import sys
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parent

Manifest = dict[str, Any]


def render(values: Manifest | None = None, *, release: str = "armada") -> dict[str, str]:
    """Each template's text by its path inside the chart, e.g. `templates/NOTES.txt`.

    Raises `helm_python.HelmError` where the schema or a template refuses the values.
    """
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values or {}, name=release, namespace="test")
    return {path.partition("/")[2]: text for path, text in rendered.items()}


def manifests(values: Manifest | None = None, *, release: str = "armada") -> list[Manifest]:
    """Every Kubernetes object that the chart makes of these values, hooks included."""
    texts = render(values, release=release)
    texts.pop("templates/NOTES.txt")
    return [m for text in texts.values() for m in yaml.safe_load_all(text) if m]


if __name__ == "__main__":
    installed = manifests(
        {"replicas": 2, "ingress": {"enabled": True, "host": "armada.example.org"}}
    )
    for manifest in installed:
        manifest["metadata"]["namespace"] = "armada"  # as an installation does
    yaml.safe_dump_all(installed, sys.stdout)

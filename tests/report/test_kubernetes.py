"""deploy/kubernetes: each field is one Kubernetes has, and the objects fit each other and the program.

The shapes below are those of the API (apps/v1 and v1 of Kubernetes 1.37, monitoring.coreos.com/v1) for the fields we
use: a field that is not written here fails, so that a slip of the pen is not ignored by the cluster in silence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
Shape = Any
"""A type; a list of one shape; a dict of fields, those that must be there ending in ``!``; ``{str: shape}``."""

_NAMED = {"name!": str, "labels": {str: str}}
_PROBE = {
    "httpGet!": {"path!": str, "port!": (int, str)}, "periodSeconds": int, "timeoutSeconds": int,
    "failureThreshold": int,
}  # fmt: skip
_CONTAINER = {
    "name!": str, "image!": str, "args": [str], "env": [{"name!": str, "value": str}],
    "ports": [{"name": str, "containerPort!": int}],
    "startupProbe": _PROBE, "livenessProbe": _PROBE, "readinessProbe": _PROBE,
    "resources": {"requests": {str: str}, "limits": {str: str}},
    "securityContext": {
        "allowPrivilegeEscalation": bool, "readOnlyRootFilesystem": bool, "capabilities": {"drop": [str]},
    },
    "volumeMounts": [{"name!": str, "mountPath!": str, "subPath": str, "readOnly": bool}],
}  # fmt: skip
_POD = {
    "automountServiceAccountToken": bool, "terminationGracePeriodSeconds": int,
    "securityContext": {
        "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "seccompProfile": {"type!": str},
    },
    "containers!": [_CONTAINER],
    "volumes": [
        {
            "name!": str, "persistentVolumeClaim": {"claimName!": str}, "configMap": {"name": str},
            "secret": {"secretName": str, "defaultMode": int}, "emptyDir": {},
        }
    ],
}  # fmt: skip
_RULE = {
    "alert!": str, "expr!": str, "for": str, "labels": {str: str}, "annotations": {str: str},
}  # fmt: skip
SHAPES: dict[tuple[str, str], Shape] = {
    ("apps/v1", "Deployment"): {
        "replicas": int, "strategy": {"type": str}, "selector!": {"matchLabels": {str: str}},
        "template!": {"metadata": {"labels": {str: str}}, "spec": _POD},
    },
    ("v1", "Service"): {
        "selector": {str: str}, "ports": [{"name": str, "port!": int, "targetPort": (int, str)}],
    },
    ("v1", "PersistentVolumeClaim"): {"accessModes": [str], "resources": {"requests": {str: str}}},
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "selector!": {"matchLabels": {str: str}},
        "endpoints!": [
            {
                "port": str, "path": str, "interval": str, "scrapeTimeout": str,
                "authorization": {"type": str, "credentials": {"name": str, "key!": str}},
            }
        ],
    },
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"groups": [{"name!": str, "interval": str, "rules": [_RULE]}]},
}  # fmt: skip


def faults(value: Any, shape: Shape, place: str = "") -> list[str]:
    """Where a value is not of its shape."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [f for i, v in enumerate(value) for f in faults(v, shape[0], f"{place}[{i}]")]
    if not isinstance(shape, dict):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        return [] if type(value) in kinds else [f"{place}: {value!r}"]
    if not isinstance(value, dict):
        return [f"{place} is no mapping"]
    if str in shape:
        return [
            f
            for k, v in value.items()
            for f in [*faults(k, str, place), *faults(v, shape[str], f"{place}.{k}")]
        ]
    fields = {name.removesuffix("!"): field for name, field in shape.items()}
    found = [
        f"{place}.{name[:-1]} is missing" for name in shape if name.endswith("!") and name[:-1] not in value
    ]
    for name, field in value.items():
        found += (
            faults(field, fields[name], f"{place}.{name}")
            if name in fields
            else [f"{place}.{name} is unknown"]
        )
    return found


def objects() -> dict[str, dict[str, Any]]:
    """Every object by its kind."""
    found: dict[str, dict[str, Any]] = {}
    for name in kustomization()["resources"]:
        for one in yaml.safe_load_all((FOLDER / name).read_text()):
            assert one["kind"] not in found
            found[one["kind"]] = one
    return found


def kustomization() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return found


def test_each_object_has_its_shape() -> None:
    for one in objects().values():
        spec = SHAPES[one["apiVersion"], one["kind"]]
        whole = {"apiVersion!": str, "kind!": str, "metadata!": _NAMED, "spec!": spec}
        assert faults(one, whole, one["kind"]) == []
    assert set(objects()) == {kind for _, kind in SHAPES}


def test_the_check_finds_a_slip() -> None:
    shape = SHAPES["apps/v1", "Deployment"]
    good = objects()["Deployment"]["spec"]
    assert faults({**good, "replica": 1}, shape) == [".replica is unknown"]
    assert faults({**good, "replicas": "1"}, shape) == [".replicas: '1'"]
    assert faults({k: v for k, v in good.items() if k != "template"}, shape) == [".template is missing"]
    assert faults({**good, "strategy": []}, shape) == [".strategy is no mapping"]


def test_objects_fit_each_other() -> None:
    found = objects()
    deployment, service, monitor = (
        found["Deployment"]["spec"],
        found["Service"],
        found["ServiceMonitor"]["spec"],
    )
    pod = deployment["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = {p["name"] for p in container["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports
    assert {e["port"] for e in monitor["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    assert {container[f"{p}Probe"]["httpGet"]["port"] for p in ("startup", "liveness", "readiness")} <= ports
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for v in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    ]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    made = {g["name"] for g in kustomization()["configMapGenerator"]}
    assert {v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v} <= made
    assert container["image"] in {i["name"] for i in kustomization()["images"]}
    # One process owns the folder.
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")


def test_the_program_takes_what_the_deployment_gives_it() -> None:
    import typer

    from pertoken.cli import app
    from pertoken.web._ask import router
    from pertoken.web.exporter import router as exporter

    (container,) = objects()["Deployment"]["spec"]["template"]["spec"]["containers"]
    verb, *options = container["args"]
    command = getattr(typer.main.get_command(app), "commands")[verb]  # noqa: B009
    given = command.make_context(verb, list(options)).params
    assert given["port"] == container["ports"][0]["containerPort"]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert str(given["data"]) == mounts["data"]
    assert mounts["tokens"] == f"{given['data']}/tokens.json"
    assert str(given["fleet"].parent) == mounts["fleet"]
    paths = {getattr(route, "path", "") for route in (*router.routes, *exporter.routes)}
    asked = {container[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "liveness", "readiness")}
    assert asked | {e["path"] for e in objects()["ServiceMonitor"]["spec"]["endpoints"]} <= paths


def test_what_kustomize_gathers_is_there() -> None:
    from pertoken.fleet import load_fleet

    files = [FOLDER / name for g in kustomization()["configMapGenerator"] for name in g["files"]]
    boards = sorted(path for path in files if path.suffix == ".json")
    assert boards == sorted((FOLDER / "dashboards").glob("*.json"))
    assert sum(path.stat().st_size for path in boards) < 1_000_000, "a ConfigMap holds 1 MiB"
    assert {json.loads(path.read_text())["uid"] for path in boards} == {path.stem for path in boards}
    assert load_fleet(FOLDER / "fleet.yaml").pools.keys() == {"h100"}
    secrets = {"pertoken-tokens", "pertoken-prometheus"}
    text = (FOLDER.parents[1] / "docs" / "grafana.md").read_text(encoding="utf-8")
    assert all(name in text for name in secrets)


def test_its_rules_are_sound_to_promtool(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "the Debian package prometheus is missing: python tests/system_packages.py"
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(objects()["PrometheusRule"]["spec"]))
    done = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr

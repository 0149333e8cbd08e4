"""deploy/kubernetes: each field is one Kubernetes has, and the objects fit each other and the program.

Kubernetes' own objects are checked against its published schemas (kubernetes-validate). The Prometheus operator's
(monitoring.coreos.com/v1) have shapes of the fields we use: a field that is not written here fails, so that a slip of
the pen is not ignored by the cluster in silence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

VERSION = "1.37"
FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
Shape = Any
"""A type; a list of one shape; a dict of fields, those that must be there ending in ``!``; ``{str: shape}``."""

_NAMED = {"name!": str, "labels": {str: str}}
_RULE = {
    "alert!": str, "expr!": str, "for": str, "labels": {str: str}, "annotations": {str: str},
}  # fmt: skip
SHAPES: dict[tuple[str, str], Shape] = {
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


OPERATORS = [kind for _, kind in SHAPES]


@pytest.mark.parametrize("kind", ["Deployment", "Service", "PersistentVolumeClaim"])
def test_kubernetes_knows_every_field(kind: str) -> None:
    kubernetes_validate.validate(objects()[kind], VERSION, strict=True)


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_operator_knows_every_field(kind: str) -> None:
    one = objects()[kind]
    spec = SHAPES[one["apiVersion"], kind]
    whole = {"apiVersion!": str, "kind!": str, "metadata!": _NAMED, "spec!": spec}
    assert faults(one, whole, kind) == []


def test_every_object_is_checked() -> None:
    assert set(objects()) == {"Deployment", "Service", "PersistentVolumeClaim", *OPERATORS}


def test_the_checks_find_a_slip() -> None:
    slip = {**objects()["Deployment"], "spec": {**objects()["Deployment"]["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(slip, VERSION, strict=True)
    shape = SHAPES["monitoring.coreos.com/v1", "ServiceMonitor"]
    good = objects()["ServiceMonitor"]["spec"]
    assert faults({**good, "endpoint": []}, shape) == [".endpoint is unknown"]
    assert faults({**good, "endpoints": {}}, shape) == [".endpoints is no list"]
    assert faults({k: v for k, v in good.items() if k != "endpoints"}, shape) == [".endpoints is missing"]
    assert faults({**good, "selector": []}, shape) == [".selector is no mapping"]


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

"""Manifests: valid against the schemas of Kubernetes and KubeRay, and closed to the outside."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "cluster" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
SCHEMAS = "RAYTRAIN_TEST_KUBERAY_SCHEMAS"
"""A folder with rayclusters.json and rayjobs.json: of every API version, the OpenAPI schema of KubeRay."""
KUBERNETES = "1.33"

Object = dict[str, Any]


def as_written() -> list[Object]:
    """The objects of the files, with what kustomize replaces in them."""
    objects = [
        one
        for name in KUSTOMIZATION["resources"]
        for one in yaml.safe_load_all((FOLDER / name).read_text())
    ]
    cluster, job = (
        next(one for one in objects if one["kind"] == kind) for kind in ("RayCluster", "RayJob")
    )
    job["spec"]["rayClusterSpec"] = copy.deepcopy(cluster["spec"])
    return objects


OBJECTS = as_written()
CORE = [one for one in OBJECTS if not one["apiVersion"].startswith("ray.io/")]
RAY = [one for one in OBJECTS if one["apiVersion"].startswith("ray.io/")]


def name_of(one: Object) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


def ray_spec(one: Object) -> Object:
    return one["spec"] if one["kind"] == "RayCluster" else one["spec"]["rayClusterSpec"]


def pods() -> Iterator[tuple[str, Object]]:
    """Every template of a pod, by name."""
    for one in CORE:
        if one["kind"] == "Deployment":
            yield name_of(one), one["spec"]["template"]["spec"]
    for one in RAY:
        spec = ray_spec(one)
        yield f"{name_of(one)}-head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name_of(one)}-{group['groupName']}", group["template"]["spec"]


PODS = dict(pods())


def unknown(value: Any, schema: Object, path: str = "") -> Iterator[str]:
    """Fields that a schema does not name: an API server drops them silently."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from unknown(one, schema.get("items", {}), f"{path}[{number}]")
    elif isinstance(value, dict) and "properties" in schema:
        for key, one in value.items():
            if key not in schema["properties"]:
                yield f"{path}.{key}"
            yield from unknown(one, schema["properties"].get(key, {}), f"{path}.{key}")


@pytest.mark.parametrize("one", CORE, ids=name_of)
def test_kubernetes_takes_them(one: Object) -> None:
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_kubernetes_takes_their_pods(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": PODS[name]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("one", RAY, ids=name_of)
def test_kuberay_takes_them(one: Object) -> None:
    if SCHEMAS not in os.environ:
        pytest.skip(f"{SCHEMAS} is not set")
    file = Path(os.environ[SCHEMAS]) / f"{one['kind'].lower()}s.json"
    schema = json.loads(file.read_text())["v1"]
    jsonschema.validate(one, schema)
    assert not list(unknown(one["spec"], schema["properties"]["spec"]))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("kueue", [False, True])
def test_kustomize_makes_the_same_of_them(tmp_path: Path, kueue: bool) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    if kueue:
        file = folder / "kustomization.yaml"
        file.write_text(file.read_text().replace("# components:", "components:"))
    built = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    )
    objects = {name_of(one): one for one in yaml.safe_load_all(built.stdout)}
    assert objects.keys() == {name_of(one) for one in OBJECTS} | {"ConfigMap-sweep"}
    job, cluster = objects["RayJob-sweep"], objects["RayCluster-raytrain"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert cluster["spec"]["enableInTreeAutoscaling"] is not kueue
    for one in (job, cluster):
        assert ("kueue.x-k8s.io/queue-name" in one["metadata"]["labels"]) is kueue
    assert {one["metadata"].get("namespace") for one in objects.values()} == {None, "raytrain"}
    assert "image: raytrain\n" not in built.stdout


def test_every_image_is_a_parameter() -> None:
    images = {container["image"] for pod in PODS.values() for container in pod["containers"]}
    assert images == {image["name"] for image in KUSTOMIZATION["images"]}


def test_every_object_is_in_one_part() -> None:
    parts = {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in OBJECTS}
    assert parts == {"services", "cluster", "sweep"}


@pytest.mark.parametrize("name", PODS)
def test_pods_have_no_privileges(name: str) -> None:
    """What the policy `restricted`, which the namespace enforces, requires."""
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("one", RAY, ids=name_of)
def test_ray_has_a_token_and_the_version_that_is_installed(one: Object) -> None:
    spec = ray_spec(one)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_services_are_internal_and_have_pods() -> None:
    labels = [
        one["spec"]["template"]["metadata"]["labels"]
        for one in CORE
        if one["kind"] == "Deployment"
    ]
    services = [one["spec"] for one in CORE if one["kind"] == "Service"]
    assert len(services) == 2
    for service in services:
        assert service["type"] == "ClusterIP"
        assert service["selector"] in labels


def test_nothing_is_reached_that_no_policy_allows() -> None:
    policies = {
        one["metadata"]["name"]: one["spec"] for one in CORE if one["kind"] == "NetworkPolicy"
    }
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    ports = {
        name: [port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])]
        for name, spec in policies.items()
        if name != "default-deny"
    }
    assert ports == {"ray": [8265], "mlflow": [5000], "postgres": [5432]}
    for name in ports:
        assert all(rule["from"] for rule in policies[name]["ingress"])


def test_secrets_are_references() -> None:
    assert not any(one["kind"] == "Secret" for one in OBJECTS)
    for pod in PODS.values():
        for variable in (
            one for container in pod["containers"] for one in container.get("env", [])
        ):
            secret = any(
                word in variable["name"] for word in ("PASSWORD", "SECRET", "TOKEN", "KEY")
            )
            assert not (secret and "value" in variable), variable["name"]
    for text in (file.read_text() for file in FOLDER.rglob("*.yaml")):
        assert "://raytrain:" not in text


def test_the_job_reads_its_parameters_from_the_config_map() -> None:
    (sweep,) = KUSTOMIZATION["configMapGenerator"]
    variables = {literal.partition("=")[0] for literal in sweep["literals"]}
    (job,) = (one for one in RAY if one["kind"] == "RayJob")
    entry = job["spec"]["entrypoint"]
    used = {word.strip('"$') for word in entry.replace("=", " ").split() if "$" in word}
    assert variables - used == {"MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert used < variables
    head = PODS["RayJob-sweep-head"]["containers"][0]
    assert {"configMapRef": {"name": "sweep"}} in head["envFrom"]
    assert job["spec"]["submissionMode"] == "HTTPMode"  # another shell would expand the variables

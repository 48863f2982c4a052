"""deploy/kubernetes: manifests follow Kubernetes' schemas, and fit lowlat's options and each other.

Schemas are those of kubernetes-validate; of custom resources, pod templates are validated.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lowlat.replicas.options import GRACE_SECONDS, ReplicaOptions
from lowlat.serve.routes.operations import GETS
from tests.test_deploy import serve_options

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy/kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
VERSION = "1.33"
"""Minor version of Kubernetes; lifecycle's sleep came with 1.30."""
SHUTDOWN_SECONDS = 10
"""Time for a process to end after a drain."""
CUSTOM = {"LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1", "RayService": "ray.io/v1"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Pod templates anywhere within a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        else:
            for each in value.values():
                yield from templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from templates(each)


def named(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    return (each for each in documents(path) if each["kind"] == kind)


def pods(path: Path) -> list[dict[str, Any]]:
    return [template for document in documents(path) for template in templates(document)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_manifests_follow_the_schemas(path: Path) -> None:
    for document in documents(path):
        kind = document["kind"]
        if kind in CUSTOM:
            assert document["apiVersion"] == CUSTOM[kind]
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)
    for template in pods(path):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_selectors_volumes_and_services_match(path: Path) -> None:
    templated = pods(path)
    labels = [template["metadata"]["labels"] for template in templated]
    for service in named(path, "Service"):
        selector = dict(service["spec"]["selector"])
        selector.pop("leaderworkerset.sigs.k8s.io/worker-index", None)  # set by its controller
        assert any(selector.items() <= each.items() for each in labels)
    for policy in (*named(path, "NetworkPolicy"), *named(path, "PodDisruptionBudget")):
        spec = policy["spec"]
        wanted = spec.get("podSelector", spec.get("selector"))["matchLabels"]
        assert all(wanted.items() <= each.items() for each in labels)
    claims = {
        claim["metadata"]["name"]
        for each in named(path, "StatefulSet")
        for claim in each["spec"]["volumeClaimTemplates"]
    }
    for template in templated:
        volumes = {volume["name"] for volume in template["spec"]["volumes"]} | claims
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    services = {each["metadata"]["name"] for each in named(path, "Service")}
    for each in named(path, "StatefulSet"):
        assert each["spec"]["serviceName"] in services


@pytest.mark.parametrize("name", ["statefulset", "leaderworkerset"])
def test_pods_give_known_options_and_probe_known_paths(name: str) -> None:
    paths = {get.path for get in GETS}
    options = serve_options()
    launcher = {"--nnodes", "--nproc-per-node", "--node-rank", "--rdzv-backend", "--rdzv-endpoint"}
    for template in pods(FOLDER / f"{name}.yaml"):
        (container,) = template["spec"]["containers"]
        given = {part.split("=")[0] for part in container["args"] if part.startswith("--")}
        assert given <= options | launcher | {"--shutdown-timeout"}
        if "ports" in container:  # the process with HTTP
            assert {port["name"] for port in container["ports"]} == {"http"}
            probes = {key: container[key]["httpGet"] for key in container if key.endswith("Probe")}
            assert probes["readinessProbe"]["path"] == "/ready"
            assert probes["livenessProbe"]["path"] == probes["startupProbe"]["path"] == "/health"
            assert {get["path"] for get in probes.values()} <= paths


def option(container: dict[str, Any], name: str) -> float:
    (value,) = (part.split("=")[1] for part in container["args"] if part.startswith(f"{name}="))
    return float(value)


@pytest.mark.parametrize("name", ["statefulset", "leaderworkerset"])
def test_running_requests_have_the_time_to_finish(name: str) -> None:
    for template in pods(FOLDER / f"{name}.yaml"):
        (container,) = template["spec"]["containers"]
        drain = option(container, "--drain-seconds")
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = template["spec"]["terminationGracePeriodSeconds"]
        if "ports" in container:
            assert pause + drain + SHUTDOWN_SECONDS <= grace
            first = pause
        else:  # a worker computes until the drain has ended
            assert first + drain < pause < grace
        if name == "leaderworkerset":
            assert drain < option(container, "--shutdown-timeout")


def test_groups_start_as_many_processes_as_their_layout_has() -> None:
    (group,) = named(FOLDER / "leaderworkerset.yaml", "LeaderWorkerSet")
    parts = group["spec"]["leaderWorkerTemplate"]
    for name in ("leaderTemplate", "workerTemplate"):
        args = parts[name]["spec"]["containers"][0]["args"]
        assert f"--parallel=pipeline={parts['size']}" in args and "--nproc-per-node=1" in args


@pytest.mark.parametrize(("extras", "has_wget"), [("serve", False), ("ray", True)])
def test_the_image_with_ray_has_wget_for_kuberays_probes(
    tmp_path: Path, extras: str, has_wget: bool
) -> None:
    final = (ROOT / "deploy/Containerfile").read_text().split("FROM ${BASE}\n")[1]
    (command,) = re.findall(r"^RUN (case.+?esac)$", final, re.MULTILINE | re.DOTALL)
    (tmp_path / "apt-get").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "apt-get").chmod(0o755)
    command = command.replace("/var/lib/apt/lists", str(tmp_path / "lists"))
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXTRAS": extras}
    done = subprocess.run(["sh", "-ec", command], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("install" in done.stdout and "wget" in done.stdout) == has_wget


def test_the_ray_application_takes_its_arguments() -> None:
    (service,) = named(FOLDER / "rayservice.yaml", "RayService")
    (found,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, function = found["import_path"].split(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f"\ndef {function}(options: ReplicaOptions)" in source
    options = ReplicaOptions.model_validate(found["args"])
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert options.replicas == workers["replicas"] == workers["maxReplicas"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.drain_seconds + GRACE_SECONDS < grace

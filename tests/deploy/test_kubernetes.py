"""The manifests: each object by its schema, all of them against each other, and what the router's pod
runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.config_file import load_config

ROOT = Path(__file__).parent.parent.parent
HERE = ROOT / "deploy" / "kubernetes"

Object = dict[str, Any]


def objects(kind: str = "") -> list[Object]:
    named = yaml.safe_load((HERE / "kustomization.yaml").read_text())["resources"]
    found = [one for name in named for one in yaml.safe_load_all((HERE / name).read_text())]
    return [one for one in found if not kind or one["kind"] == kind]


def pods() -> dict[str, Object]:
    """Templates, by the component that they say they are."""
    (cluster,) = objects("RayCluster")
    spec = cluster["spec"]
    templates = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one for one in templates}


def container_of(template: Object) -> Object:
    (container,) = template["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def chosen(selector: dict[str, str]) -> set[str]:
    """Components of the pods that a selector finds."""
    found = {name: template["metadata"]["labels"].items() for name, template in pods().items()}
    return {name for name, labels in found.items() if selector.items() <= labels}


def test_every_file_is_named() -> None:
    named = yaml.safe_load((HERE / "kustomization.yaml").read_text())
    files = {*named["resources"], *named["configMapGenerator"][0]["files"], "kustomization.yaml"}
    assert files == {path.name for path in HERE.iterdir()}


@pytest.mark.parametrize("kind", ["Namespace", "Service", "PodDisruptionBudget", "NetworkPolicy"])
def test_kubernetes_own_objects_have_their_schema(kind: str) -> None:
    assert objects(kind)
    for one in objects(kind):
        kubernetes_validate.validate(one, "1.33", strict=True)


@pytest.mark.parametrize("component", ["router", "prefill", "decode"])
def test_the_templates_are_pods(component: str) -> None:
    template = pods()[component]
    metadata = {"name": "x", **template["metadata"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(json.loads(json.dumps(pod)), "1.33", strict=True)
    mounts = {mount["name"] for mount in container_of(template)["volumeMounts"]}
    assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}
    context = container_of(template)["securityContext"]
    assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert template["spec"]["securityContext"]["runAsNonRoot"]


def test_ray_is_the_one_that_is_pinned_and_asks_for_a_token() -> None:
    (cluster,) = objects("RayCluster")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert cluster["spec"]["rayVersion"] == pinned["ray"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_each_pool_has_its_group_of_pods() -> None:
    config = load_config(HERE / "prelay.yaml", [])
    (cluster,) = objects("RayCluster")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == {name for name, pool in config.pools.items() if pool.replicas}
    for name, group in groups.items():
        pool, parameters = config.pools[name], group["rayStartParams"]
        (resources,) = shlex.split(parameters["resources"])  # it stands in a command line
        assert json.loads(resources) == {name: 1000}
        assert group["replicas"] >= 2, "or the budget of disruptions lets none of them go"
        assert pool.resources == {name: 1.0}
        cpus = int(parameters["num-cpus"])
        assert group["replicas"] * (cpus // (pool.num_ranks * pool.threads)) >= pool.replicas
        limits = container_of(group["template"])["resources"]
        assert limits["limits"] == limits["requests"], "guaranteed, so that cores may be its own"
        assert int(limits["limits"]["cpu"]) == cpus
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_paths_of_the_configuration_are_mounted_where_they_are_needed() -> None:
    config = load_config(HERE / "prelay.yaml", [])
    assert config.tls.internal is not None
    assert config.model.path is not None
    for template in pods().values():
        mounted = [mount["mountPath"] for mount in container_of(template)["volumeMounts"]]
        for path in (config.tls.internal, config.model.path):
            assert any(path.is_relative_to(mount) for mount in mounted), path


def test_ports_are_those_that_the_router_listens_on() -> None:
    config = load_config(HERE / "prelay.yaml", [])
    ports = {port["name"]: port["containerPort"] for port in container_of(pods()["router"])["ports"]}
    for name in ("http", "grpc", "metrics"):
        assert getattr(config.router, name) == f"0.0.0.0:{ports[name]}"
    assert config.router.admin.startswith("127.0.0.1:"), "nobody reaches it from outside of the pod"
    for service in objects("Service"):
        assert chosen(service["spec"]["selector"]) == {"router"}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container_of(pods()["router"])[probe]["httpGet"]["port"] in ports


def test_names_are_those_that_a_ray_cluster_names() -> None:
    """kustomize rewrites a generated name in kinds that it knows, of which RayCluster is none."""
    found = yaml.safe_load((HERE / "kustomization.yaml").read_text())
    assert found["generatorOptions"] == {"disableNameSuffixHash": True}
    named = {
        volume["configMap"]["name"]
        for template in pods().values()
        for volume in template["spec"]["volumes"]
        if "configMap" in volume
    }
    assert named == {one["name"] for one in found["configMapGenerator"]}


def test_nodes_are_waited_for() -> None:
    config = load_config(HERE / "prelay.yaml", [])
    assert config.ray.wait_s >= 300, "images are pulled while the head waits"


@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_a_worker_pod_starts_ray_with_quoted_words(component: str, tmp_path: Path) -> None:
    script = tmp_path / "ray"
    script.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    container = container_of(pods()[component])
    (cluster,) = objects("RayCluster")
    (group,) = [one for one in cluster["spec"]["workerGroupSpecs"] if one["groupName"] == component]
    start = f"ray start --address=head:6379 --resources={group['rayStartParams']['resources']} --block"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": start}
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words == ["start", "--address=head:6379", f'--resources={{"{component}": 1000}}', "--block"]


def test_every_component_has_its_budget_and_one_policy_covers_all() -> None:
    budgets = [chosen(one["spec"]["selector"]["matchLabels"]) for one in objects("PodDisruptionBudget")]
    assert sorted(budgets, key=str) == [{"decode"}, {"prefill"}, {"router"}]
    policies = {one["metadata"]["name"]: one["spec"] for one in objects("NetworkPolicy")}
    inside, clients = policies["prelay-inside"], policies["prelay-clients"]
    everybody = set(pods())
    assert chosen(inside["podSelector"]["matchLabels"]) == everybody
    assert chosen(inside["ingress"][0]["from"][0]["podSelector"]["matchLabels"]) == everybody
    assert chosen(clients["podSelector"]["matchLabels"]) == {"router"}
    assert [port["port"] for port in clients["ingress"][0]["ports"]] == ["http", "grpc"]


def test_prometheus_finds_the_router_and_whom_it_lists() -> None:
    (monitor,) = objects("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [one for one in objects("Service") if wanted <= one["metadata"]["labels"].items()]
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    (scrape,) = objects("ScrapeConfig")
    namespace = yaml.safe_load((HERE / "kustomization.yaml").read_text())["namespace"]
    where = (
        f"http://{service['metadata']['name']}.{namespace}.svc:{service['spec']['ports'][0]['port']}/targets"
    )
    assert scrape["spec"]["httpSDConfigs"][0]["url"] == where
    jobs = {
        rule["replacement"]
        for one in (monitor["spec"]["endpoints"][0], scrape["spec"])
        for rule in one["relabelings"]
        if rule["targetLabel"] == "job"
    }
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert jobs == {job["job_name"] for job in prometheus["scrape_configs"]}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command of the router's container, with a `ray` and a `prelay` that write down what they were
    told."""
    for name, body in (
        ("ray", '[ "$1" = health-check ] || exec sleep 60\n[ -e asked ]; was=$?; touch asked; exit $was'),
        ("prelay", "trap 'echo prelay ends >> calls; exit 0' TERM; sleep 60 & wait $!"),
    ):
        script = tmp_path / name
        noted = f'[ "$1" = health-check ] || echo {name} "$@" >> calls'
        script.write_text(f"#!/bin/bash\ncd {tmp_path}\n{noted}\n{body}\n")
        script.chmod(0o755)
    container = container_of(pods()["router"])
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "POD_IP": "10.1.2.3",
        "KUBERAY_GEN_RAY_START_CMD": "ray start --head --resources='{\"a\": 1}' --block",
    }  # fmt: skip
    process = subprocess.Popen(
        [*container["command"], *container["args"]], env=environment, start_new_session=True
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_head_starts_ray_then_prelay_and_passes_the_end_on(
    head: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    while not calls.exists() or "prelay" not in calls.read_text():
        assert head.poll() is None
        time.sleep(0.02)
    assert calls.read_text().splitlines() == [
        'ray start --head --resources={"a": 1} --block',
        "prelay serve /etc/prelay/prelay.yaml --ray-address 10.1.2.3:6379",
    ]
    assert (tmp_path / "asked").exists(), "not before Ray is healthy"
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=10)
    assert calls.read_text().splitlines()[-1] == "prelay ends"


def test_the_head_ends_when_prelay_does(head: subprocess.Popen[bytes], tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    while not calls.exists() or "prelay" not in calls.read_text():
        time.sleep(0.02)
    # A shell's child is a second one like it until it is `sleep`.
    while len(serving := _pids_of("--ray-address\0" + "10.1.2.3:6379\0")) != 1:
        time.sleep(0.02)
    os.kill(serving[0], signal.SIGTERM)
    assert head.wait(timeout=10) == 0, "with prelay's exit code"


def _pids_of(end: str) -> list[int]:
    """Of processes whose command ends so."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _command_of(pid).endswith(end)]


def _command_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""

"""The yaml files have what Kubernetes and torchrun need. (That both end in local.sh's torchrun line: test_scripts.)"""

from typing import Any

import pytest
import yaml

from rpo_megatron.training.signals import STOPPED
from tests.launch.shell import LAUNCH

SETTINGS = {"NODES", "NODE_ADDRESS", "RUN_ID", "MAX_RESTARTS"}
"""Variables of node.sh that both say; the others come from the Job's index or the operator."""


def documents(kind: str) -> list[Any]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / f"{kind}.yaml").read_text()))


def check_pod(spec: dict[str, Any]) -> dict[str, Any]:
    """What holds for the pods of both; gives the variables of the container."""
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert "persistentVolumeClaim" in mounts["/shared"]
    assert all(word.split("=")[-1].startswith("/shared/") for word in container["args"][1:])
    assert spec["terminationGracePeriodSeconds"] >= 300
    assert container["resources"]["limits"]["nvidia.com/gpu"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert len(variables) == len(container["env"])
    assert variables.keys() >= SETTINGS
    assert all(isinstance(entry.get("value", ""), str) for entry in variables.values()), "Kubernetes refuses numbers"
    return variables


def test_job() -> None:
    """Catches a Service that selects nothing, a node 0 by a name that does not exist, and a number of nodes that is
    changed in one place only."""
    service, job = documents("job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    variables = check_pod(pod)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"]["value"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    host, _, _ = variables["RENDEZVOUS"]["value"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    rank = variables["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    codes = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [[STOPPED]]
    assert pod["containers"][0]["command"] == ["launch/node.sh"]


def test_pytorchjob() -> None:
    """Catches a container that the operator does not find, and NODES that is not master plus workers."""
    (job,) = documents("pytorchjob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for kind in ("Master", "Worker"):
        pod = replicas[kind]["template"]["spec"]
        variables = check_pod(pod)
        assert pod["containers"][0]["name"] == "pytorch"
        assert int(variables["NODES"]["value"]) == 1 + replicas["Worker"]["replicas"]


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
def test_node_settings_are_those_of_the_script(kind: str) -> None:
    """Catches a variable in the yaml that node.sh does not read."""
    script = (LAUNCH / "node.sh").read_text()
    spec = documents(kind)[-1]["spec"]
    pod = (spec["pytorchReplicaSpecs"]["Master"] if kind == "pytorchjob" else spec)["template"]["spec"]
    for entry in pod["containers"][0]["env"]:
        assert f"${{{entry['name']}:-" in script, entry["name"]

"""What a Kubernetes cluster is given: manifests by their schemas, and by what they let pods do.

KubeRay's own kinds have no schema in any package: their fields are held against those of KubeRay 1.5, written down here, and
the pods inside them against Kubernetes' schema. Patches are applied as kustomize applies them.
"""

import ipaddress
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lidit import cli
from lidit.cli import parse_config
from pipelines import preprocess

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = ROOT / "infra" / "kubernetes"
SCHEMA = "1.37"
CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "suspend", "managedBy", "headServiceAnnotations", "gcsFaultToleranceOptions",
}  # fmt: skip
HEAD_FIELDS = {"serviceType", "rayStartParams", "template", "headService", "enableIngress"}
GROUP_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams", "template", "numOfHosts",
    "scaleStrategy", "suspend",
}  # fmt: skip
AUTOSCALER_FIELDS = {
    "version", "idleTimeoutSeconds", "upscalingMode", "resources", "securityContext", "image", "imagePullPolicy", "env",
    "envFrom", "volumeMounts",
}  # fmt: skip
JOB_FIELDS = {
    "clusterSelector", "rayClusterSpec", "submissionMode", "entrypoint", "runtimeEnvYAML", "jobId", "metadata", "backoffLimit",
    "activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "suspend", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "submitterPodTemplate", "submitterConfig",
}  # fmt: skip
LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
pytestmark = pytest.mark.unit


def documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def build(folder: Path) -> list[dict]:
    """What `kubectl kustomize` gives, for the parts of it that are used here."""
    import jsonpatch

    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    used = {
        "apiVersion",
        "kind",
        "namespace",
        "labels",
        "resources",
        "patches",
        "configMapGenerator",
        "generatorOptions",
        "images",
    }
    assert set(config) <= used
    made: list[dict] = []
    for name in config.get("resources", []):
        made += build(folder / name) if (folder / name).is_dir() else documents(folder / name)
    for entry in config.get("configMapGenerator", []):
        assert config["generatorOptions"]["disableNameSuffixHash"]
        files = dict(text.split("=") for text in entry["files"])
        data = {key: (folder / path).read_text() for key, path in files.items()}
        made.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data})
    for patch in config.get("patches", []):
        target = patch["target"]
        version = "/".join(part for part in (target.get("group"), target["version"]) if part)
        hit = [
            d
            for d in made
            if (d["apiVersion"], d["kind"], d["metadata"]["name"]) == (version, target["kind"], target["name"])
        ]
        assert len(hit) == 1, f"{target} is not there once"
        changed = jsonpatch.apply_patch(hit[0], yaml.safe_load(patch["patch"]))
        hit[0].clear()
        hit[0].update(changed)
    for image in config.get("images", []):
        for container in (container for document in made for container in containers(document)):
            if container["image"].partition(":")[0] == image["name"]:
                name = image.get("newName", image["name"])
                container["image"] = f"{name}@{image['digest']}" if "digest" in image else f"{name}:{image['newTag']}"
    for document in made:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = config["namespace"]
    return made


def containers(part: Any) -> list[dict]:
    """Every container at any depth of a document."""
    if isinstance(part, list):
        return [found for each in part for found in containers(each)]
    if not isinstance(part, dict):
        return []
    return [*part.get("containers", []), *(found for each in part.values() for found in containers(each))]


def of_kind(made: list[dict], kind: str) -> dict:
    (found,) = [document for document in made if document["kind"] == kind]
    return found


def validate(document: dict) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, SCHEMA, strict=True)


def check_pod(template: dict) -> None:
    """Kubernetes' own schema, and what pods of a namespace with the restricted standard must be like."""
    validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False, "Kubernetes' token is for the autoscaler alone"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in spec["containers"]:
        assert container["securityContext"] == LOCKED
        assert container["resources"]["requests"] and container["resources"]["limits"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "emptyDir" in mounts["/tmp"], "nothing else can be written"
        assert ":" in container["image"] and not container["image"].endswith(":latest")
    check_disk(spec)


def check_disk(spec: dict) -> None:
    """What a pod may write is bounded, and the node has to have it."""
    folders = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
    assert all("sizeLimit" in folder for folder in folders), "a full node evicts everybody's pods"
    on_disk = sum(gib(folder["sizeLimit"]) for folder in folders if folder.get("medium") != "Memory")
    for kind in ("requests", "limits"):
        room = sum(gib(container["resources"][kind]["ephemeral-storage"]) for container in spec["containers"])
        assert on_disk <= room + 1, f"{on_disk} GiB of folders, {kind} of {room} GiB (the autoscaler brings 1 more)"


def gib(size: str) -> int:
    assert size.endswith("Gi")
    return int(size[:-2])


def check_cluster(spec: dict) -> None:
    assert set(spec) <= CLUSTER_FIELDS and spec["authOptions"] == {"mode": "token"}
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS and set(spec["headGroupSpec"]) <= HEAD_FIELDS
    assert spec["rayVersion"] == pinned("ray"), "the version of the image"
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    check_pod(head["template"])
    assert len({group["groupName"] for group in spec["workerGroupSpecs"]}) == len(spec["workerGroupSpecs"])
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS and 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"])
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], (
            "Ray tells its resources by the limits"
        )
        wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert wants_gpu == (group["groupName"] != "cpu")
        spot = any(toleration["key"] == "lidit/spot" for toleration in group["template"]["spec"]["tolerations"])
        assert spot == (group["groupName"] != "train"), "training is not for spot"


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


# -- Kubernetes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["base", "overlays/small", "overlays/large"])
def test_everything_fits_its_schema(folder):
    made = build(KUBERNETES / folder)
    kinds = sorted({document["kind"] for document in made})
    assert kinds == ["ConfigMap", "CronJob", "Namespace", "NetworkPolicy", "RayCluster", "ServiceAccount"]
    for document in made:
        if document["apiVersion"] != "ray.io/v1":
            validate(document)
    cluster = of_kind(made, "RayCluster")
    assert set(cluster) == {"apiVersion", "kind", "metadata", "spec"}
    check_cluster(cluster["spec"])


def test_overlays_differ_in_size_alone():
    def sizes(folder: str) -> dict[str, int]:
        spec = of_kind(build(KUBERNETES / folder), "RayCluster")["spec"]
        return {group["groupName"]: group["maxReplicas"] for group in spec["workerGroupSpecs"]}

    assert sizes("overlays/small") == {"cpu": 1, "gpu": 1} and sizes("overlays/large") == {
        "cpu": 64,
        "gpu": 64,
        "train": 8,
    }
    assert of_kind(build(KUBERNETES / "overlays/small"), "CronJob")["spec"]["suspend"] is True


def test_the_scheduled_job():
    made = build(KUBERNETES / "base")
    cron, cluster = of_kind(made, "CronJob")["spec"], of_kind(made, "RayCluster")
    assert cron["concurrencyPolicy"] == "Forbid"
    pod = cron["jobTemplate"]["spec"]["template"]
    check_pod(pod)
    (container,) = pod["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    assert command[:2] == ["python", "/home/ray/lidit/infra/submit.py"] and (ROOT / "infra/submit.py").exists()
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in command
    env = {entry["name"]: entry for entry in container["env"]}
    # All pods of one Job submit under one name, and a pod has the time to stop its driver before the next one begins.
    assert command[command.index("--name") + 1] == "$(JOB_NAME)"
    label = env["JOB_NAME"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['batch.kubernetes.io/job-name']"
    assert cron["jobTemplate"]["spec"]["podReplacementPolicy"] == "Failed"
    assert pod["spec"]["terminationGracePeriodSeconds"] > 60
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": cluster["metadata"]["name"],
        "key": "auth_token",
    }
    # The config that the driver reads on the head is the one of the map, and lidit understands it.
    path = Path(command[-1])
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts["config"] == str(path.parent) and path.name in of_kind(made, "ConfigMap")["data"]
    config = parse_config("preprocess", preprocess, ["--config", str(KUBERNETES / "base" / "preprocess-config.yaml")])
    assert config.if_busy == "wait" and config.wait_seconds > 900


def test_kubernetes_own_token_is_the_autoscalers_alone():
    """KubeRay adds the container `autoscaler` to the head's pod; `autoscalerOptions` say what it mounts."""
    from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_CA_CERT_PATH, IN_CLUSTER_TOKEN_PATH

    made = build(KUBERNETES / "base")
    accounts = {d["metadata"]["name"]: d for d in made if d["kind"] == "ServiceAccount"}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    spec = of_kind(made, "RayCluster")["spec"]
    pods = [spec["headGroupSpec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    pods += [of_kind(made, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
    holders = []
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] in accounts
        tokens = {volume["name"] for volume in pod["volumes"] if "serviceAccountToken" in json.dumps(volume)}
        holders += [each["name"] for each in pod["containers"] if tokens & {m["name"] for m in each["volumeMounts"]}]
    assert holders == [], "where the drivers and the hostile images are"

    options, head = spec["autoscalerOptions"], pods[0]
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in options["volumeMounts"]}
    folder = str(Path(IN_CLUSTER_TOKEN_PATH).parent)
    files = [path for source in volumes[mounts[folder]]["projected"]["sources"] for path in paths_of(source)]
    assert {IN_CLUSTER_TOKEN_PATH, IN_CLUSTER_CA_CERT_PATH} <= {f"{folder}/{path}" for path in files}
    # With mounts at /tmp/ray, KubeRay adds no folder of its own there, which would have no limit.
    shared = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts["/tmp/ray"] == shared["/tmp/ray"] and options["securityContext"] == LOCKED


def paths_of(source: dict) -> list[str]:
    (kind,) = source.values()
    return [kind["path"]] if "path" in kind else [item["path"] for item in kind["items"]]


# -- who may speak to whom ------------------------------------------------------------------------------------------------

HEAD = ("lidit", {"ray.io/cluster": "lidit", "ray.io/node-type": "head"})
WORKER = ("lidit", {"ray.io/cluster": "lidit", "ray.io/node-type": "worker"})
SUBMIT = ("lidit", {"lidit/role": "submit"})
STRANGER = ("lidit", {"app": "somebody"})
OPERATOR = ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
DNS = ("kube-system", {"k8s-app": "kube-dns"})
PROMETHEUS = ("monitoring", {"app": "prometheus"})
RAY_PORTS = (6379, 8076, 10001, 29500, 52365)


def passes(made: list[dict], source: Any, target: Any, port: int, protocol: str = "TCP") -> bool:
    """Whether a packet may go, by the meaning of NetworkPolicies: a pod that is selected may do only what a policy allows."""
    policies = [document["spec"] for document in made if document["kind"] == "NetworkPolicy"]
    out = isinstance(source, str) or _open(policies, "Egress", source, target, port, protocol)
    return out and (isinstance(target, str) or _open(policies, "Ingress", target, source, port, protocol))


def _open(policies: list[dict], way: str, pod: tuple, peer: Any, port: int, protocol: str) -> bool:
    if pod[0] != "lidit":
        return True  # policies of this namespace say nothing about it
    mine = [policy for policy in policies if way in policy["policyTypes"] and _selects(policy["podSelector"], pod[1])]
    side = {"Ingress": "from", "Egress": "to"}[way]
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    return not mine or any(
        any(_is_peer(each, peer) for each in rule[side])
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for rule in rules
    )


def _selects(selector: dict, labels: dict) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def _is_peer(rule: dict, peer: Any) -> bool:
    if isinstance(peer, str):
        here = ipaddress.ip_address(peer)
        nets = [ipaddress.ip_network(net) for net in rule.get("ipBlock", {}).get("except", [])]
        inside = "ipBlock" in rule and here in ipaddress.ip_network(rule["ipBlock"]["cidr"])
        return inside and not any(here in net for net in nets)
    if "ipBlock" in rule:
        return False
    namespace = {"kubernetes.io/metadata.name": peer[0]}
    same = peer[0] == "lidit" if "namespaceSelector" not in rule else _selects(rule["namespaceSelector"], namespace)
    return same and _selects(rule.get("podSelector", {}), peer[1])


@pytest.mark.parametrize("folder", ["base", "overlays/small", "overlays/large"])
def test_what_the_cluster_needs_to_reach(folder):
    made = build(KUBERNETES / folder)
    for pod in (HEAD, WORKER):
        assert all(passes(made, pod, other, port) for other in (HEAD, WORKER) for port in RAY_PORTS), "Ray, NCCL, gloo"
        assert passes(made, pod, "52.216.8.3", 443), "S3"
        assert passes(made, pod, DNS, 53, "UDP") and passes(made, pod, DNS, 53)
        assert passes(made, PROMETHEUS, pod, 8080)
    assert passes(made, OPERATOR, HEAD, 8265) and passes(made, SUBMIT, HEAD, 8265) and passes(made, SUBMIT, DNS, 53)
    assert passes(made, HEAD, "172.20.0.1", 443), "the autoscaler asks Kubernetes"


@pytest.mark.parametrize("folder", ["base", "overlays/small", "overlays/large"])
def test_what_nobody_may_reach(folder):
    made = build(KUBERNETES / folder)
    everybody = (HEAD, WORKER, SUBMIT, STRANGER)
    for port in (80, 443):
        assert not any(passes(made, pod, "169.254.169.254", port) for pod in everybody), "the machine's own role"
    assert not any(passes(made, WORKER, "172.20.0.1", port) for port in (443, 6443)), "Kubernetes"
    assert not any(passes(made, pod, "192.168.1.9", 443) for pod in everybody), "what else is in the company's network"
    assert not any(passes(made, pod, "8.8.8.8", port) for pod in everybody for port in (22, 53, 80, 6667))
    assert not passes(made, SUBMIT, "52.216.8.3", 443)
    for outsider in (OPERATOR, STRANGER, SUBMIT, PROMETHEUS, ("default", {})):
        assert not any(passes(made, outsider, pod, port) for pod in (HEAD, WORKER) for port in RAY_PORTS)
    for outsider in (STRANGER, PROMETHEUS, ("kuberay-system", {"app": "else"}), ("default", {})):
        assert not passes(made, outsider, HEAD, 8265)


def test_no_credential_in_any_manifest():
    paths = [path for path in [*(ROOT / "infra").rglob("*"), ROOT / "ray_cluster.yaml"] if path.is_file()]
    text = "\n".join(path.read_text() for path in paths if path.suffix in (".yaml", ".yml", ".json", ""))
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|SECRET_ACCESS_KEY|BEGIN [A-Z ]*PRIVATE KEY", text, re.IGNORECASE)


@pytest.mark.parametrize("path", sorted((KUBERNETES / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job(path):
    (job,) = documents(path)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"][
        "generateName"
    ] == f"{path.stem}-"
    assert set(job["spec"]) <= JOB_FIELDS and job["spec"]["submissionMode"] in ("HTTPMode", "K8sJobMode")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "lidit"}
    assert not {"shutdownAfterJobFinishes", "rayClusterSpec", "backoffLimit"} & set(job["spec"]), (
        "not with clusterSelector"
    )
    words = job["spec"]["entrypoint"].split()
    if words[:3] == ["python", "-m", "lidit.cli"]:
        check_command(words[3], words[4:])
    else:
        assert words[:2] == ["python", "/home/ray/lidit/infra/preflight.py"] and {"--store", "--all-nodes"} <= set(
            words
        )


def check_command(job: str, argv: list[str]) -> None:
    """The job's own parser takes the flags; a config file is one of those that the base puts on the head."""
    import importlib

    argv = [word.replace("/etc/lidit/", f"{KUBERNETES}/base/").replace(".yaml", "-config.yaml") for word in argv]
    parse_config(job, importlib.import_module(cli.JOBS[job][0]), argv)


# -- images by digest -----------------------------------------------------------------------------------------------------


def kustomize(folder: Path) -> str:
    """What is applied: by kubectl where it is installed."""
    if shutil.which("kubectl") is None:
        return yaml.safe_dump_all(build(folder))
    command = ["kubectl", "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", ["base", "overlays/small", "overlays/large"])
def test_what_is_checked_is_what_kustomize_makes(folder):
    def by_name(made: list[dict]) -> dict[tuple[str, str], dict]:
        return {(document["kind"], document["metadata"]["name"]): document.get("spec") for document in made}

    made = [document for document in yaml.safe_load_all(kustomize(KUBERNETES / folder)) if document]
    assert by_name(made) == by_name(build(KUBERNETES / folder))


def test_manifests_with_tags_are_refused(tmp_path):
    def check(*files: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "infra/pinned.py"), *map(str, files)]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    tree = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, tree)
    overlay = tree / "overlays/large"
    loose = check(text=kustomize(overlay))
    assert (
        loose.returncode == 1 and "lidit/lidit:0.1.0: taken by its tag" in loose.stderr and "imagetools" in loose.stderr
    )
    page = (ROOT / "docs/cluster.md").read_text()
    (block,) = re.findall(r"```yaml\n(images:\n.*?)```", page, re.DOTALL)
    digest = "sha256:" + 64 * "0"
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write(block.replace("sha256:...", digest))
    text = kustomize(overlay)
    assert check(text=text).returncode == 0 and len(re.findall(rf"image: REGISTRY/lidit@{digest}", text)) == 5
    assert check(ROOT / "ray_cluster.yaml").returncode == 1 and check(text="{}").returncode == 1

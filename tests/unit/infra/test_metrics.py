"""Dashboard, alerts and documentation name only metrics that something exports, and every one that lidit exports is drawn."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipelines.engine.job_metrics import COUNTED
from trainer.monitor.metrics import EXPORTED, STEP_GAUGE

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "infra/grafana/lidit.json").read_text())
ALERTS = yaml.safe_load((ROOT / "infra/prometheus/alerts.yml").read_text())
OURS = {f"ray_lidit_{name}_total" for name in COUNTED} | {f"ray_{STEP_GAUGE}"}
OURS |= {f"ray_lidit_{kind}_{name}" for kind, names in EXPORTED.items() for name in names}
OTHERS = {  # of Ray itself, and of kube-state-metrics
    "ray_node_gpus_utilization",
    "ray_cluster_active_nodes",
    "kube_job_status_failed",
    "kube_cronjob_status_last_successful_time",
}
NOT_DRAWN = {"ray_lidit_train_tokens_per_second", "ray_lidit_train_memory_gb"}
pytestmark = pytest.mark.unit


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|kube)_\w+", expression))


def test_the_dashboard_draws_what_is_exported():
    drawn = set().union(*(names(target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]))
    assert drawn - OTHERS <= OURS and OURS - drawn == NOT_DRAWN


def test_the_dashboard_is_whole():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places) and all(x + w <= 24 for x, _, w, _ in places)
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= known
    for panel in panels:
        assert panel["title"] and panel["description"] and panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


def test_alerts_ask_for_what_is_exported():
    (group,) = ALERTS["groups"]
    for rule in group["rules"]:
        assert names(rule["expr"]) and names(rule["expr"]) <= OURS | OTHERS, rule["alert"]
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"} and rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_every_alert_is_in_the_runbook():
    book = (ROOT / "docs/operations.md").read_text()
    (group,) = ALERTS["groups"]
    assert [rule["alert"] for rule in group["rules"] if rule["alert"] not in book] == []


def test_the_scrape_config():
    config = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())
    assert [(ROOT / "infra/prometheus" / name).exists() for name in config["rule_files"]] == [True]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["ray"]["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    labels = [rule["source_labels"][0] for rule in jobs["ray-kubernetes"]["relabel_configs"]]
    assert "__meta_kubernetes_pod_label_ray_io_cluster" in labels

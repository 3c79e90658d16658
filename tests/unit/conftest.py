"""What unit tests of several packages share."""

import pytest


@pytest.fixture
def recorded(monkeypatch):
    """(metric, value, labels) of everything that would go to Ray."""
    import ray.util.metrics

    calls = []
    monkeypatch.setattr(
        ray.util.metrics.Metric,
        "_record",
        lambda self, value, tags=None: calls.append((self.info["name"], value, self._get_final_tags(tags))),
    )
    return calls

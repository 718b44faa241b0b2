"""OpenTelemetry: what its readers get of saves, and that a reader which hangs or raises changes nothing."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import core as prometheus

from stager import Checkpointer, FailedEvent, LeftRunningError, OpenTelemetryMetrics, SaveReport, SaveState
from tests.faults import Faults

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "on_save_error": "warn"}}
STATE = {"x": torch.ones(1000)}


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    metrics = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else []
    return {metric.name: list(metric.data.data_points) for metric in metrics}


def test_histograms_bytes_failures_and_age(run_dir: Path, faults: Faults) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    metrics = OpenTelemetryMetrics(provider, {"run": "gpt"})
    assert points(reader).get("stager.checkpoint.age", []) == []  # nothing is committed yet
    with Checkpointer(run_dir, CONFIG, on_event=metrics) as ckpt:
        handles = [ckpt.save(step, STATE) for step in range(3)]
        assert [handle.upload_completion.result().step for handle in handles] == [0, 1, 2]
        faults.arm("part.write", "errno EIO")
        assert ckpt.save(3, STATE).upload_completion.exception() is not None
        committed = [handle.report for handle in handles]
    metrics(FailedEvent(report=SaveReport(9, SaveState.FAILED), error=LeftRunningError("workers finish it")))
    found = points(reader)
    for name in ("blocked", "staged", "committed"):
        (point,) = found[f"stager.save.{name}"]
        assert point.count == 3 and point.attributes == {"run": "gpt"}
        assert point.sum == pytest.approx(sum(getattr(report, f"{name}_secs") for report in committed))
        assert 0.001 in point.explicit_bounds
    (written,) = found["stager.save.written"]
    assert written.value == sum(report.written_bytes or 0 for report in committed)
    (failures,) = found["stager.save.failures"]
    assert failures.value == 1 and failures.attributes["error.type"] == "StorageError"
    (age,) = found["stager.checkpoint.age"]
    assert age.value >= 0
    provider.shutdown()


def test_prometheus_reads_them(run_dir: Path) -> None:
    reader = PrometheusMetricReader()
    prometheus.REGISTRY.unregister(reader._collector)
    registry = CollectorRegistry()
    registry.register(reader._collector)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with Checkpointer(run_dir, CONFIG, on_event=OpenTelemetryMetrics(provider)) as ckpt:
        ckpt.save(0, STATE)
    text = generate_latest(registry).decode()
    assert "stager_save_blocked_seconds_count" in text and "stager_save_written_bytes_total" in text
    assert "stager_checkpoint_age_seconds" in text


class _Stuck(MetricExporter):
    """An exporter whose server does not answer, or answers with an error."""

    def __init__(self, released: threading.Event | None) -> None:
        super().__init__()
        self.reached = threading.Event()
        self._released = released

    def export(self, *_: Any, **__: Any) -> MetricExportResult:
        self.reached.set()
        if self._released is None:
            raise ConnectionError("no server")
        self._released.wait()
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        pass


@pytest.mark.parametrize("hangs", [True, False])
def test_an_exporter_that_hangs_or_raises_changes_nothing(run_dir: Path, hangs: bool) -> None:
    """1. the exporter is stuck in the export of the first save. 2. further saves are committed. 3. close() returns."""
    released = threading.Event()
    exporter = _Stuck(released if hangs else None)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=1)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with Checkpointer(run_dir, CONFIG, on_event=OpenTelemetryMetrics(provider)) as ckpt:
        ckpt.save(0, STATE).upload_completion.result()
        exporter.reached.wait()
        handles = [ckpt.save(step, STATE) for step in (1, 2)]
    assert [handle.state for handle in handles] == [SaveState.COMMITTED] * 2
    released.set()
    provider.shutdown()


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'stager\[otel\]'"):
        OpenTelemetryMetrics()

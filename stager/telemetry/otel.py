"""A listener that gives the figures of saves to OpenTelemetry: ``ckpt.listen(OpenTelemetryMetrics())``.

Needs the extra ``otel``. Exporters (Prometheus, OTLP) belong to the program: they read the instruments in threads of their
own, so that one which hangs or raises is not seen by a save, and not even by this listener.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stager.telemetry.event import CommittedEvent, Event, FailedEvent
from stager.workers.errors import LeftRunningError

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

_BUCKETS_SECS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class OpenTelemetryMetrics:
    """Records finished saves in OpenTelemetry's instruments. Of several ranks, each records its own part.

        stager.save.blocked, .staged, .committed   histograms, seconds since ``save()`` was called
        stager.save.written                        counter, bytes that were written
        stager.save.failures                       counter, with the type of the error as ``error.type``
        stager.checkpoint.age                      gauge, seconds since the last commit that this listener has heard of

    Args:
        meter_provider: of OpenTelemetry; None: the global one.
        attributes: of every measurement, such as the name of the run or the rank.

    Raises:
        ImportError: ``opentelemetry-api`` is not installed.
    """

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        try:
            from opentelemetry import metrics
        except ImportError as error:
            raise ImportError("OpenTelemetryMetrics needs opentelemetry-api: pip install 'stager[otel]'") from error
        self._attributes: dict[str, Any] = dict(attributes or {})
        self._observation: type[Observation] = metrics.Observation
        self._committed_at: float | None = None
        meter = metrics.get_meter("stager", meter_provider=meter_provider)
        self._histograms = {
            name: meter.create_histogram(
                f"stager.save.{name}",
                unit="s",
                description=f"seconds from the call of save() {until}",
                explicit_bucket_boundaries_advisory=_BUCKETS_SECS,
            )
            for name, until in (
                ("blocked", "until it returned"),
                ("staged", "until the snapshot was whole and handed over"),
                ("committed", "until the checkpoint was visible"),
            )
        }
        self._written = meter.create_counter(
            "stager.save.written", unit="By", description="bytes of checkpoints written"
        )
        self._failures = meter.create_counter("stager.save.failures", unit="1", description="saves that failed")
        meter.create_observable_gauge(
            "stager.checkpoint.age", [self._age], unit="s", description="seconds since the last commit"
        )

    def __call__(self, event: Event) -> None:
        """Record an event."""
        if isinstance(event, CommittedEvent):
            self._committed_at = event.time
            for name, histogram in self._histograms.items():
                secs = getattr(event.report, f"{name}_secs")
                if secs is not None:
                    histogram.record(secs, self._attributes)
            self._written.add(event.report.written_bytes or 0, self._attributes)
        elif isinstance(event, FailedEvent) and not isinstance(event.error, LeftRunningError):
            self._failures.add(1, {**self._attributes, "error.type": type(event.error).__name__})

    def _age(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._committed_at is not None:
            yield self._observation(max(0.0, time.time() - self._committed_at), self._attributes)

"""What is recorded about saves, and who gets it.

Reading order: ``timeline.py`` (timings and notes of one save), ``report.py`` (what a save cost), ``event.py`` (what happens
to the checkpoints of a run), ``listeners.py`` (who gets the events), and the listeners that come with stager: ``sinks.py``
(JSON lines and traces) and ``otel.py`` (OpenTelemetry).
"""

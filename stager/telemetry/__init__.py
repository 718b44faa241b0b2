"""What is recorded about saves.

Reading order: ``event.py`` (timed events and notes), ``report.py`` (what a save cost), ``sinks.py`` (JSON lines and traces).
"""

"""``stager doctor``: is this host fit for stager, and what do its limits mean for it?

Reading order: ``finding.py`` (what a check says), ``report.py`` (all checks, in order). Each check is a function from
values to a :class:`Finding`, and reads nothing itself, so that tests can show it any host; the values come from
``probes.py`` and ``target_probe.py``.
"""

from stager.doctor.finding import Finding, Status
from stager.doctor.report import run_checks

__all__ = ["Finding", "Status", "run_checks"]

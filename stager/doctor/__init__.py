"""``stager doctor``: can stager work on this host, and what do the host's limits mean?

Reading order: ``finding.py`` (the result of a check), ``report.py`` (all checks, in order). Each check is a function from
values to a :class:`Finding`. It reads nothing itself, so that tests can show it any host. ``probes.py`` and
``target_probe.py`` get the values.
"""

from stager.doctor.finding import Finding, Status
from stager.doctor.report import run_checks

__all__ = ["Finding", "Status", "run_checks"]

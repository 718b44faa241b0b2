"""stager in real frameworks."""

import os

# Before a test imports a framework, which reads it then: TRL's telemetry goes out by a thread that outlives a test.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

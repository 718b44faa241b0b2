"""What users do with a loaded state dict."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.workload import Workload


def copy_into(workload: Workload, loaded: dict[str, Any]) -> None:
    import torch

    for name, target in workload.objects.items():
        if isinstance(target, dict):
            with torch.no_grad():
                for key, tensor in target.items():
                    tensor.copy_(loaded[name][key])
        else:
            target.load_state_dict(loaded[name])

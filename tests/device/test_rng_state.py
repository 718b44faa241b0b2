"""The generators of devices are part of an ``RngState``."""

from __future__ import annotations

from pathlib import Path

import torch

from stager import Checkpointer, RngState


def test_generators_of_all_devices_continue_from_a_checkpoint(run_dir: Path, device: torch.device) -> None:
    devices = [torch.device(device.type, index) for index in range(torch.accelerator.device_count())]
    with Checkpointer(run_dir) as ckpt:
        for one in devices:
            torch.rand(one.index + 1, device=one)  # each generator is at another place
        ckpt.save(1, {"rng": RngState()})
        expected = [torch.rand(5, device=one).cpu() for one in devices]
        ckpt.load(into={"rng": RngState()})
        drawn = [torch.rand(5, device=one).cpu() for one in devices]
    assert all(map(torch.equal, drawn, expected))
    assert len(RngState().state_dict()["devices"]) == len(devices)

"""Read the GPU's energy counter, if there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch


def energy_counter(device: torch.device | str) -> Callable[[], float] | None:
    """Joules that the GPU has used since its driver was loaded: take the difference of two readings.

    They are the whole device's, whoever uses it. The driver renews the reading only every so many milliseconds: measure
    over seconds. None off CUDA, without the module `pynvml` (package nvidia-ml-py), and where NVML does not know the
    device or its energy.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    # NVML counts all devices of the machine, torch only those it was shown: the UUID means the same to both.
    uuid = torch.cuda.get_device_properties(device).uuid

    def joules() -> float:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # from millijoules

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        joules()
    except pynvml.NVMLError:
        return None
    return joules

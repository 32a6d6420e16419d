"""Which device is computed on: a name as people write it, what is there, what it is quick in.

DeviceError(FlowreelError, ValueError)    a device that is unknown or not there
"""

from __future__ import annotations

import torch

from flowreel.errors import FlowreelError

DEVICES = ("auto", "cpu", "cuda", "mps")


class DeviceError(FlowreelError, ValueError):
    """A device that is unknown, or that this machine or this build of torch does not have."""


def device_of(name: str = "auto") -> torch.device:
    """The device of a name; `auto` is an accelerator where there is one, else the CPU.

    >>> device_of("cpu")
    device(type='cpu')

    Raises:
        DeviceError: an unknown name, or a device that is not there.
    """
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise DeviceError(f"unknown device {name!r}: allowed are {', '.join(DEVICES)} and cuda:N")
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    device = torch.device(name)
    if kind != "cpu" and (found is None or found.type != kind):
        raise DeviceError(
            f"device {name!r}: torch {torch.__version__} finds no {kind} here; use cpu, or install "
            "a build of torch for it (`make setup GPU=1` on Linux)"
        )
    count = torch.accelerator.device_count() if kind != "cpu" else 1
    if (device.index or 0) >= count:
        raise DeviceError(f"device {name!r}: this machine has {count} of them, numbered from 0")
    return device


def has_quick_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bf16 by instructions of its own.

    GPUs since Ampere do, and CPUs with AMX (twice as quick as fp32 there,
    `python -m benchmarks.training_step`). Others would make bf16 of fp32 and lose by it.

    >>> has_quick_bf16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return False

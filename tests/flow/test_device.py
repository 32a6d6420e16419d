"""A device is what the machine has, or a message that says what to do."""

from __future__ import annotations

import pytest
import torch

from flow.device import DeviceError, device_of


def test_auto_is_an_accelerator_where_there_is_one() -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    assert device_of("auto") == (found or torch.device("cpu"))


def test_an_unknown_device_is_named_with_what_is_allowed() -> None:
    with pytest.raises(DeviceError, match="unknown device 'gpu': allowed are auto, cpu, cuda"):
        device_of("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_said_with_the_next_step() -> None:
    with pytest.raises(DeviceError, match="finds no cuda here; use cpu"):
        device_of("cuda")

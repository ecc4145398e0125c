"""Between the host and a teacher's device, without either waiting for the other.

Enters: tensors. Leaves: a `Landing`, which has the host's copy once it is there. Costs: on a GPU a pinned buffer of the
copy's size and one event; on a CPU nothing, the tensor itself is handed on.

A pass over a batch is queued slice by slice, and each slice's results leave as soon as they are computed; who reads
them waits for that slice's event alone. `.cpu()`, `.item()` and a plain `.to(device)` would each stop the host until
everything queued has run, and the device then until the host has queued more. torch keeps a pinned buffer, and the
device's memory that it was copied from, until the copy is over, also where nobody holds them any longer.
"""

from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """What torch.cuda.Event is."""

    def synchronize(self) -> None:
        """Return once what was queued before it has run."""


class Landing:
    """A copy on its way to the host: what it brings is there after `wait`, and can be had by nothing else."""

    def __init__(self, host: Tensor, arrival: Event | None = None) -> None:
        self._host, self._arrival = host, arrival

    def wait(self) -> Tensor:
        """The copy, on the CPU."""
        if self._arrival is not None:
            self._arrival.synchronize()
            self._arrival = None
        return self._host


def to_host(values: Tensor) -> Landing:
    """Send a tensor to the host. On a CPU it is no copy: give a tensor that nobody changes afterwards."""
    if values.device.type != "cuda":
        return Landing(values.cpu())
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(values.device))
    return Landing(host, arrival)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to a device; what is queued there after it finds it arrived."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type == "cuda")

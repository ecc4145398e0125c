"""Random generators of a process as tensors and plain numbers: torch, Python, numpy.

Enters: the process's generators. Leaves: tensors and JSON, and back. Costs: 10 KiB. Pickle is the usual way to
save them and is not allowed here.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed torch on all devices, Python and numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON-able rest) of all generators now."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
    }
    for number in range(torch.cuda.device_count()):
        tensors[f"cuda{number}"] = torch.cuda.get_rng_state(number)
    rest = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    return tensors, rest


def restore(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Put all generators where `capture` found them; GPUs that this machine lacks are left out."""
    random.setstate((rest["python"]["version"], tuple(tensors["python"].tolist()), rest["python"]["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": rest["numpy"]["pos"]},
            "has_gauss": rest["numpy"]["has_gauss"],
            "gauss": rest["numpy"]["gauss"],
        }
    )
    torch.set_rng_state(tensors["torch"])
    for number in range(torch.cuda.device_count()):
        if f"cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{number}"], number)

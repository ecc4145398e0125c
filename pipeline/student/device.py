"""The device that a student trains on.

Enters: the recipe's choice, which of several processes this is. Leaves: a torch device, or RecipeError. Costs: a look
at the GPUs.
"""

import torch

from stillroom.pipeline.student.places import Place
from stillroom.storage.errors import RecipeError


def choose_device(choice: str, place: Place = Place()) -> torch.device:  # noqa: B008 - frozen
    """auto: the first GPU, or the CPU; of several processes on a machine, to each a GPU of its own. Raises RecipeError
    if the device asked for is not there."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(choice)
    if place.world > 1 and choice != "cpu":
        if choice != "cuda":
            raise RecipeError(
                f"device is {choice}, and there are {place.world} processes, which take GPUs by their number, or the "
                "CPU: set device to auto, cuda or cpu, or train.processes to 1"
            )
        if place.locals > torch.cuda.device_count():
            raise RecipeError(
                f"{place.locals} processes of the training on this machine, {torch.cuda.device_count()} GPUs: each "
                "needs its own; set train.processes to the number of GPUs, or device to cpu"
            )
        return torch.device("cuda", place.local)
    there = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type]:
        raise RecipeError(
            f"device {choice} is not there (GPUs: {torch.cuda.device_count()}); set device to auto or cpu"
        )
    return device

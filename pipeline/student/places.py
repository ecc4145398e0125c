"""Which of several processes this one is, as torchrun and `launcher` say it.

Enters: the environment. Leaves: a `Place`. Costs: nothing; no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: Where the ranks of `launcher` meet, a URL for torch.distributed; torchrun has MASTER_ADDR and MASTER_PORT instead.
RENDEZVOUS = "STILLROOM_RENDEZVOUS"


@dataclass(frozen=True)
class Place:
    """rank: of `world` processes. local, locals: the same on this machine. told: whether something started us as a
    rank, also as the only one. launched: whether that is `launcher`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    locals: int = 1
    told: bool = False
    launched: bool = False

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> "Place":
        """Alone unless both rank and meeting point are there: schedulers set some of these for other uses."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in environment for name in names) or not {RENDEZVOUS, "MASTER_ADDR"} & environment.keys():
            return Place()
        rank, world, local = (int(environment[name]) for name in names)
        here = int(environment.get("LOCAL_WORLD_SIZE", world))
        return Place(rank, world, local, here, told=True, launched=RENDEZVOUS in environment)

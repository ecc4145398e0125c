"""The contract between teacher and student: the public names. The rest of the room is private.

Names load on first use: a student must be able to read a store without importing the commit log.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.storage.manifest import Manifest as Manifest
    from stillroom.storage.store import Store as Store
    from stillroom.storage.store import create_store as create_store
    from stillroom.storage.store import open_store as open_store
    from stillroom.storage.stream import Stream as Stream

_HOME = {
    "Manifest": "manifest",
    "Store": "store",
    "create_store": "store",
    "open_store": "store",
    "Stream": "stream",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"stillroom.storage has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"stillroom.storage.{_HOME[name]}"), name)

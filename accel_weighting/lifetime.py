"""How long a weighter lives. Its construction leaves nothing behind that keeps a model or an accelerator alive.

Accelerate saves what is registered with it, in order; so a weighter's place goes when the weighter goes, and a weighter
that is built anew on the same heads takes the place of the one before.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


def weakly(thing: T | None) -> Callable[[], T | None]:
    """A reference to ``thing`` that does not keep it alive, where Python knows such references of it."""
    if thing is None:
        return lambda: None
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


class Checkpointed(Protocol):
    """An object with a state to save."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


class Registration:
    """A weighter's place among the objects that an accelerator saves.

    Args:
        weighter: The weighter, which is not kept alive.
        accelerator: The accelerator, likewise; None: there is no place.
        instead_of: The registration of a weighter whose place it takes, or None.
    """

    def __init__(self, weighter: Checkpointed, accelerator: Any, instead_of: Registration | None = None) -> None:
        self._accelerator = weakly(accelerator)
        self._entry: _Entry | None = None
        if accelerator is None:
            return
        self._entry = _Entry(weighter)
        place = None if instead_of is None else instead_of.remove()
        accelerator.register_for_checkpointing(self._entry)
        objects = getattr(accelerator, "_custom_objects", None)
        if place is not None and objects is not None:
            objects.insert(place, objects.pop())
        weakref.finalize(weighter, self.remove).atexit = False

    def remove(self) -> int | None:
        """Gives the place up and returns its index."""
        accelerator, entry = self._accelerator(), self._entry
        objects = getattr(accelerator, "_custom_objects", [])
        place = next((i for i, registered in enumerate(objects) if registered is entry), None)
        if place is not None:
            with contextlib.suppress(IndexError):
                del objects[place]
        return place


class _Entry:
    """What is registered: the weighter, as long as it lives."""

    def __init__(self, weighter: Checkpointed) -> None:
        self._weighter = weakref.ref(weighter)

    def state_dict(self) -> dict[str, Any]:
        """Of the weighter."""
        return self._alive().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into the weighter."""
        self._alive().load_state_dict(state)

    def _alive(self) -> Checkpointed:
        weighter = self._weighter()
        assert weighter is not None  # or else the entry would have gone with it
        return weighter

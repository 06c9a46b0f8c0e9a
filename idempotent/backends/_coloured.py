"""Backends that reach their store by one link for sync callers and another for async ones."""

import copy
from typing import ClassVar, Generic, Self, TypeVar, cast

from idempotent.backends.base import Backend
from idempotent.errors import BackendError

__all__ = ["Coloured"]

L = TypeVar("L")


class Coloured(Backend, Generic[L]):
    """A backend with a view for each colour that its links serve. The views share everything but the link."""

    _takes: ClassVar[dict[str, str]]
    """What it is to be made from to serve a colour."""
    _colour: str
    _link: L

    def _connect(self, links: dict[str, L]) -> None:
        """Be the view of the first of the `links`, by colour."""
        self._links = links
        self._colour, self._link = next(iter(links.items()))
        self._views: dict[str, Coloured[L]] = {self._colour: self}

    def blocking(self) -> Backend:
        return self._view("sync")

    def asynchronous(self) -> Backend:
        return self._view("async")

    def within(self, seconds: float) -> Backend:
        if seconds >= self.timeout:
            return self
        view = copy.copy(self)  # the two share everything else
        view.timeout = seconds
        return view

    def _view(self, colour: str) -> Self:
        view = self._views.get(colour)
        if view is None:
            if colour not in self._links:
                raise BackendError(
                    f"this {type(self).__name__} was made for {self._colour} code and cannot serve {colour} functions;"
                    f" give it {self._takes[colour]}, or a URL, which serves both"
                )
            view = copy.copy(self)
            view._colour, view._link = colour, self._links[colour]
            self._views[colour] = view
        return cast("Self", view)

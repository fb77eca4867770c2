"""A handle on one array inside a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuckpt.errors import NotCheckpointed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Saved"]


class Saved:
    """One array that a budget holds, made by `CheckpointBudget.save`.

    When do the bytes go back? The handle holds the pool's block, and so does every view that `load()` gave out, along with
    whatever was made from such a view without copying (slices, transposes, DLPack imports). The block returns to the pool,
    and its bytes leave the budget, at the moment when the last of these is gone: `free()` (or collecting the handle) ends the
    handle's own hold at once, a view that outlives it keeps the bytes, charged, until it dies too. So a view never looks at
    memory that somebody else was given, and the books never say less than what is held. Under `hold="account"` the handle
    holds the array itself; after `free()` its bytes are off the books even if the caller still has the array, which was
    never the budget's.
    """

    __slots__ = ("__weakref__", "_load", "_release", "nbytes", "what")

    def __init__(self, load: Callable[[], Any], release: Callable[[], None] | None, nbytes: int, what: str) -> None:
        self._load: Callable[[], Any] | None = load
        self._release = release
        self.nbytes = nbytes  # as charged: the pool's footprint
        self.what = what

    def load(self) -> Any:
        """The array: same library, dtype, shape and values. Raises `NotCheckpointed` after `free()`.

        Under `hold="pool"` it is a zero-copy view onto the pool's block, so what is written into it is there in the next
        `load()` as well; a torch tensor comes back detached, a repeated (broadcast) dimension is repeated again.
        Under `hold="account"` it is the very array that was saved.
        """
        load = self._load
        if load is None:
            raise NotCheckpointed(f"{self.what!r} was freed and cannot be loaded; load() before free()")
        return load()

    def free(self) -> None:
        """End this handle's hold on the bytes. The second time does nothing."""
        release, self._load, self._release = self._release, None, None
        if release is not None:
            release()

    def __repr__(self) -> str:
        state = "freed" if self._load is None else f"{self.nbytes} bytes"
        return f"Saved({state}, {self.what!r})"

"""What checkpointed layers hold and recompute, in bytes, counted by the layers themselves.

A tracker observes and refuses nothing; the cap is `CheckpointBudget`'s. One tracker may be shared by any number of layers
and threads: every change happens under one lock, so the peak is the true one.
"""

from __future__ import annotations

import threading

from gpuckpt.checks import check_int

__all__ = ["MemoryUsageTracker"]


class MemoryUsageTracker:
    """Bytes of stored activations, of gradients, of what was recomputed, and the peak of the first two together.

    >>> tracker = MemoryUsageTracker()
    >>> tracker.record_stored_activation(4096)
    >>> tracker.record_gradient(1024)
    >>> tracker.release_stored_activation(4096)
    >>> tracker.stored_activation_bytes, tracker.peak_bytes
    (0, 5120)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored_bytes = 0
        self._recomputed_bytes = 0
        self._gradient_bytes = 0
        self._peak_bytes = 0

    @property
    def stored_activation_bytes(self) -> int:
        """Bytes of activations that are stored now."""
        return self._stored_bytes

    @property
    def recomputed_bytes(self) -> int:
        """Bytes of all activations recomputed since the start or the last `reset`."""
        return self._recomputed_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that are held now."""
        return self._gradient_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest sum of stored activations and gradients at any instant."""
        return self._peak_bytes

    def record_stored_activation(self, nbytes: int) -> None:
        """An activation of `nbytes` is stored from now on."""
        nbytes = check_int(nbytes, "nbytes")
        with self._lock:
            self._stored_bytes += nbytes
            self._peak_bytes = max(self._peak_bytes, self._stored_bytes + self._gradient_bytes)

    def release_stored_activation(self, nbytes: int) -> None:
        """A stored activation of `nbytes` is gone. Never goes below zero."""
        nbytes = check_int(nbytes, "nbytes")
        with self._lock:
            self._stored_bytes = max(0, self._stored_bytes - nbytes)

    def record_recomputed(self, nbytes: int) -> None:
        """An activation of `nbytes` was computed again."""
        nbytes = check_int(nbytes, "nbytes")
        with self._lock:
            self._recomputed_bytes += nbytes

    def record_gradient(self, nbytes: int) -> None:
        """Gradients of `nbytes` are held from now on."""
        nbytes = check_int(nbytes, "nbytes")
        with self._lock:
            self._gradient_bytes += nbytes
            self._peak_bytes = max(self._peak_bytes, self._stored_bytes + self._gradient_bytes)

    def release_gradient(self, nbytes: int) -> None:
        """Gradients of `nbytes` are gone: used up by an update, or replaced. Never goes below zero."""
        nbytes = check_int(nbytes, "nbytes")
        with self._lock:
            self._gradient_bytes = max(0, self._gradient_bytes - nbytes)

    def reset(self) -> None:
        """Set everything to zero. Call it between steps: a release of what was stored before it would be taken off again."""
        with self._lock:
            self._stored_bytes = self._recomputed_bytes = self._gradient_bytes = self._peak_bytes = 0

    def summary(self) -> str:
        """One line in whole KiB, rounded down, of one instant."""
        with self._lock:
            stored, recomputed = self._stored_bytes // 1024, self._recomputed_bytes // 1024
            gradients, peak = self._gradient_bytes // 1024, self._peak_bytes // 1024
        return (
            f"MemoryUsage {{ stored_activations: {stored} KiB, recomputed: {recomputed} KiB, "
            f"gradients: {gradients} KiB, peak: {peak} KiB }}"
        )

    def __repr__(self) -> str:
        return self.summary()

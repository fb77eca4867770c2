"""`MemoryUsageTracker`: exact numbers, also under threads."""

from __future__ import annotations

import threading

import pytest

from gpuckpt.memory import MemoryUsageTracker


def numbers(tracker: MemoryUsageTracker) -> tuple[int, int, int, int]:
    return tracker.stored_activation_bytes, tracker.recomputed_bytes, tracker.gradient_bytes, tracker.peak_bytes


def test_the_peak_is_of_stored_and_gradients_together() -> None:
    tracker = MemoryUsageTracker()
    tracker.record_stored_activation(100)
    tracker.record_gradient(50)
    tracker.release_stored_activation(100)
    tracker.record_recomputed(1000)
    tracker.record_gradient(20)
    assert numbers(tracker) == (0, 1000, 70, 150)
    tracker.release_gradient(70)
    tracker.record_stored_activation(151)
    assert numbers(tracker) == (151, 1000, 0, 151)
    tracker.reset()
    assert numbers(tracker) == (0, 0, 0, 0)


def test_nothing_goes_below_zero() -> None:
    tracker = MemoryUsageTracker()
    tracker.record_stored_activation(5)
    tracker.release_stored_activation(7)
    tracker.release_gradient(1)
    assert numbers(tracker) == (0, 0, 0, 5)
    tracker.record_stored_activation(3)
    assert tracker.stored_activation_bytes == 3
    for record in (tracker.record_stored_activation, tracker.record_gradient, tracker.record_recomputed):
        with pytest.raises(ValueError, match="nbytes is -1"):
            record(-1)


def test_the_summary_in_kib() -> None:
    tracker = MemoryUsageTracker()
    tracker.record_stored_activation(4096)
    tracker.record_recomputed(2047)
    tracker.record_gradient(1024)
    assert tracker.summary() == (
        "MemoryUsage { stored_activations: 4 KiB, recomputed: 1 KiB, gradients: 1 KiB, peak: 5 KiB }"
    )


def test_the_peak_is_exact_under_threads() -> None:
    """Eight threads hold 3 + 2 bytes each at one instant, and never more: the peak is exactly 40."""
    tracker = MemoryUsageTracker()
    meeting = threading.Barrier(8)

    def work() -> None:
        for _ in range(100):
            tracker.record_stored_activation(3)
            tracker.record_gradient(2)
            tracker.record_recomputed(1)
            meeting.wait()
            tracker.release_gradient(2)
            tracker.release_stored_activation(3)
            meeting.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(tracker) == (0, 800, 0, 40)

"""A few threads of our own that run shares of one job and wait for each other after each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

__all__ = ["Team"]


class Team:
    """`size` threads, the calling one among them, between `with` and its end.

    Each solve has a team of its own, so solves in several threads at once do not meet. A team of one starts no thread.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self._others = ThreadPoolExecutor(self.size - 1, "gpuckpt-solver") if self.size > 1 else None

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._others is not None:
            self._others.shutdown()

    def run(self, function: Callable[..., object], *args: Any) -> None:
        """`function(*args, share, size)` for every share 0..size-1, and return when all are done; the first error is raised.

        Threads take shares as they come, and one that has not woken up by the time all are taken is not waited for.
        """
        left = iter(range(self.size))

        def work() -> None:
            # Taking the next share is one operation of the interpreter: no share is taken twice.
            for share in left:
                function(*args, share, self.size)

        others = [] if self._others is None else [self._others.submit(work) for _ in range(self.size - 1)]
        try:
            work()
        finally:
            started = [other for other in others if not other.cancel()]
            for other in started:
                other.exception()
        for other in started:
            other.result()

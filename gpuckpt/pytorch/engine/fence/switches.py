"""Settings of torch that change what an operator does or which kernel runs: as they were in forward, during a recompute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuckpt.pytorch._torch_internals import function_modes, library_switches, pop_function_mode, push_function_mode

__all__ = ["Switches", "settings"]

_cuda = torch.backends.cuda


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_deterministic,
    ),
    *library_switches,
)

_READ = [get for get, _ in _SWITCHES]


def settings() -> tuple[Any, ...]:
    """The settings of torch that decide which kernels run, and with them what is saved."""
    return tuple([get() for get in _READ])


class Switches:
    """The settings at one moment, autocast's for the device `kinds`, and the torch function modes that are entered (such as
    `with torch.device(...)`)."""

    __slots__ = ("_autocast", "_modes", "_values")

    def __init__(self, kinds: Sequence[str]) -> None:
        self._values = [get() for get in _READ]
        self._modes = function_modes()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
        ]

    def enter(self) -> Callable[[], None]:
        """Set everything as it was; returns what puts back what is now."""
        changed = []
        current = [get() for get in _READ]
        if current != self._values:
            for (_, put), now, value in zip(_SWITCHES, current, self._values, strict=True):
                if now != value:
                    put(value)
                    changed.append((put, now))
        missing = []
        if self._modes:
            entered = function_modes()
            missing = [mode for mode in self._modes if not any(mode is other for other in entered)]
        for mode in missing:
            push_function_mode(mode)
        casts = [
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
            for kind, dtype, enabled, cache in self._autocast
            if enabled or torch.is_autocast_enabled(kind)
        ]
        for cast in casts:
            cast.__enter__()

        def leave() -> None:
            for cast in reversed(casts):
                cast.__exit__(None, None, None)
            for _ in missing:
                pop_function_mode()
            for put, now in changed:
                put(now)

        return leave

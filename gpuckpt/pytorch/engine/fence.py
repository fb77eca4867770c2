"""What a piece of work sees besides its arguments, and how it sees the same when it runs again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Environment"]


class Environment:
    """What a function sees besides its arguments: random number generators and autocast."""

    __slots__ = ("_autocast", "_cpu_rng", "_device_rng")

    def __init__(self, tensors: Sequence[torch.Tensor], preserve_rng_state: bool) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        if not devices and torch.cuda.is_initialized():
            devices = {torch.device("cuda", torch.cuda.current_device())}
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
        ]
        self._cpu_rng = torch.get_rng_state() if preserve_rng_state else None
        self._device_rng = (
            [(device, _rng_of(device).get_rng_state(device)) for device in devices] if preserve_rng_state else []
        )

    def restored(self) -> _Restored:
        """The same environment once more; the generators continue afterwards as if nothing had been drawn."""
        return _Restored(self)


class _Restored:
    """The context of a replay. No `ExitStack`: its tracebacks are cycles, which would keep a failed replay's tensors."""

    __slots__ = ("_autocast", "_cpu_rng", "_device_rng", "_environment")

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __enter__(self) -> None:
        before = self._environment
        self._cpu_rng = None if before._cpu_rng is None else torch.get_rng_state()
        self._device_rng = [(device, _rng_of(device).get_rng_state(device)) for device, _ in before._device_rng]
        if before._cpu_rng is not None:
            torch.set_rng_state(before._cpu_rng)
        for device, state in before._device_rng:
            _rng_of(device).set_rng_state(state, device)
        self._autocast = [
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
            for kind, dtype, enabled, cache in before._autocast
        ]
        for context in self._autocast:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._autocast):
            context.__exit__(*error)
        for device, state in self._device_rng:
            _rng_of(device).set_rng_state(state, device)
        if self._cpu_rng is not None:
            torch.set_rng_state(self._cpu_rng)


def _rng_of(device: torch.device) -> Any:
    return torch.get_device_module(device)

"""The data of `gpuckpt train`: bytes of files, by default the source text of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Batches", "read_text"]

_MOST_BYTES = 16 * 2**20  # plenty for a demonstration; more files are left unread


def read_text(paths: Sequence[Path], context: int) -> Tensor:
    """All bytes of `paths` (files, or folders with everything in them) as one uint8 tensor of at most 16 MiB.

    No paths: the Python files of the standard library. Raises `FileNotFoundError` for a missing path, `ValueError` for no
    data or less than one context of it.
    """
    files = list(_files(paths)) if paths else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: list[bytes] = []
    total_bytes = 0
    for file in files:
        if total_bytes >= _MOST_BYTES:
            break
        parts.append(file.read_bytes())
        total_bytes += len(parts[-1])
    data = b"".join(parts)[:_MOST_BYTES]
    where = ", ".join(map(str, paths)) or "the standard library's folder"
    if not data:
        raise ValueError(f"--data: no bytes in {where}; give a file or a folder with text in it")
    if len(data) < context + 1:
        raise ValueError(
            f"--data: {len(data)} bytes in {where}, and one context of {context} needs {context + 1}; "
            "give more text or a smaller --context"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"--data {path}: no such file or folder")


class Batches:
    """Batch number i, the same for the same seed: (tokens, targets), both int64 of shape (batch, context)."""

    def __init__(self, data: Tensor, batch: int, context: int, seed: int, device: torch.device) -> None:
        self._data = data
        self._batch = batch
        self._context = context
        self._seed = seed
        self._device = device

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        starts = torch.randint(len(self._data) - self._context, (self._batch, 1), generator=generator)
        window = self._data[starts + torch.arange(self._context + 1)].to(self._device, torch.int64)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

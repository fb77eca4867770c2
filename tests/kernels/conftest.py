"""Shared by the kernel tests: the calibrated comparison, odd memory layouts, and mutated copies of the kernels."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import gpuckpt.kernels


@pytest.fixture(scope="session")
def as_good_as_torch() -> Callable[..., None]:
    """check(got, truth, torchs): max |got - truth| < 2 max |torchs - truth| + 1e-6, with truth in fp64.

    torchs is what torch computes from the same inputs in the same dtype. NaN anywhere (an element never written) fails.
    """

    def check(got: Tensor, truth: Tensor, torchs: Tensor, what: str = "result") -> None:
        assert truth.dtype == torch.float64, "the truth must be computed in fp64"
        assert got.shape == truth.shape == torchs.shape
        if got.numel() == 0:
            return
        error = (got.double() - truth).abs().max().item()
        own = (torchs.double() - truth).abs().max().item()
        assert error < 2 * own + 1e-6, (
            f"{what}: error {error:.3g}; torch's own {own:.3g}, so the bound is {2 * own + 1e-6:.3g}"
        )

    return check


LAYOUTS = ("dense", "transposed", "padded", "strided", "zero")


@pytest.fixture(scope="session")
def lay_out() -> Callable[[Tensor, str], Tensor]:
    """lay_out(t, layout): a tensor with t's values (for "zero": t's first row everywhere) and a layout of LAYOUTS."""

    def view(t: Tensor, layout: str) -> Tensor:
        if layout == "dense" or t.numel() == 0:
            return t.contiguous()
        if layout == "zero":
            return t[:1].expand_as(t)
        if t.dim() == 1:
            wide = torch.full((2 * t.numel() + 1,), float("nan"), dtype=t.dtype)
            out = wide[1::2]
        elif layout == "transposed":
            out = torch.empty(t.shape[::-1], dtype=t.dtype).t()
        elif layout == "padded":
            out = torch.full((t.shape[0] + 2, t.shape[1] + 3), float("nan"), dtype=t.dtype)[1:-1, 2:-1]
        else:
            out = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"), dtype=t.dtype)[::2, 1::3]
        out.copy_(t)
        return out

    return view


@pytest.fixture
def mutant(tmp_path: Path) -> Iterator[Callable[[str, str, str], ModuleType]]:
    """mutant(module, old, new): the kernels package again, with `old` replaced by `new` in one of its modules, in whatever room.

    Returns the package; its modules are imported as attributes on demand through importlib. `old` has to occur.
    """
    made: list[str] = []
    sys.path.insert(0, str(tmp_path))

    def make(module: str, old: str, new: str) -> ModuleType:
        name = f"mutant_kernels_{tmp_path.name}_{len(made)}"
        home = Path(gpuckpt.kernels.__file__).parent
        shutil.copytree(home, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        (source,) = (tmp_path / name).rglob(f"{module}.py")
        text = source.read_text()
        assert old in text, f"{module}.py no longer contains {old!r}; adapt the mutation"
        source.write_text(text.replace(old, new))
        made.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield make
    sys.path.remove(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] in made]:
        del sys.modules[name]

"""Two ranks on gloo: the same plan, and the gradients of the plain run, where blocks have collectives inside."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from gpuckpt import fit

RANKS = 2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


class TensorParallel(nn.Module):
    """A block whose two halves of the hidden width are on two ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, hidden), nn.Linear(hidden, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(all_reduce(self.b(torch.tanh(self.a(x)))))


def tensor_parallel(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = nn.Sequential(*[TensorParallel(64 if i % 2 else 48) for i in range(10)])
    plain = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 16 * 32).reshape(16, 32)
    plain(x).square().mean().backward()
    probe = fit(model, x, "16MiB")
    least, most = probe.plan.certificate.smallest_budget_bytes, probe.plan.certificate.peak_bytes
    probe.unfit()
    plans, equal = [], []
    for share in (0.0, 0.2, 0.4, 0.6):
        fitted = fit(model, x, int(least + share * (most - least)))
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        plans.append(repr(fitted.plan.tree))
        equal.append(
            all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        )
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
        fitted.unfit()
    return {"plans": plans, "equal": equal}


def data_parallel(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(6)])
    twin = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 16 * 32).reshape(16, 32) * (rank + 1)
    probe = fit(model, x, "16MiB")
    least = probe.plan.certificate.smallest_budget_bytes
    probe.unfit()
    fitted = fit(model, x, 2 * least)
    ours, plain = DistributedDataParallel(model), DistributedDataParallel(twin)
    for _ in range(2):
        for wrapped in (ours, plain):
            wrapped.zero_grad(set_to_none=True)
            wrapped(x).square().mean().backward()
    equal = [torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    assert 0 < fitted.budget.peak_bytes <= 2 * least
    return {"plans": [repr(fitted.plan.tree)], "equal": equal}


CASES = {"tensor_parallel": tensor_parallel, "data_parallel": data_parallel}


def _run(rank: int, case: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        torch.save(CASES[case](rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_ranks_run_one_plan(case: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(_run, (case, port, str(tmp_path)), nprocs=RANKS, join=False)
    try:
        for _ in range(60):
            if context.join(timeout=2):
                break
        else:
            pytest.fail("the ranks wait for each other")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert all(all(rank["equal"]) for rank in found)
    assert found[0]["plans"] == found[1]["plans"]

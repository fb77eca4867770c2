"""Parts "pools" and "streams": both holds, host budgets and policies with tensors of the device; blocks on several streams."""

from __future__ import annotations

import copy
from typing import Any

import torch

import gpuckpt
from gpu_parts.common import Context, Facts


def _model(context: Context) -> tuple[torch.nn.Module, torch.Tensor, int]:
    """Blocks in a row, their input, and the bytes of all block inputs."""
    depth, rows, width = (6, 64, 32) if context.dry else (8, 4096, 1024)
    blocks = [gpuckpt.nn.FusedMLP(width, 4 * width) for _ in range(depth)]
    model = torch.nn.Sequential(*blocks).to(context.device)
    x = torch.randn(rows, width, device=context.device, requires_grad=True)
    return model, x, depth * x.numel() * 4


def _gradients(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])


def pools(context: Context) -> None:
    """fit in both holds, with and without a host budget; each policy of a full budget; a pool that draws from torch."""
    model, x, inputs_bytes = _model(context)
    expected = _gradients(model, x)

    def fitted(hold: str, share: float, host: int | None) -> Facts:
        own = copy.deepcopy(model)
        fit = gpuckpt.fit(own, x, budget=int(share * inputs_bytes) + (1 << 20), hold=hold, host_budget=host)
        found = [_gradients(own, x) for _ in range(3)][-1]
        context.sync()
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        kept = fit.measured_peak_bytes <= fit.promised_peak_bytes and fit.budget.used_bytes == 0
        facts = {"measured_bytes": fit.measured_peak_bytes, "promised_bytes": fit.promised_peak_bytes}
        return {"ok": same and kept, "same_bits": same, **facts, "host_bytes": fit.promised_host_peak_bytes}

    for hold in ("account", "pool"):
        for share, host in ((0.5, None), (0.5, 64 * inputs_bytes), (0.3, 64 * inputs_bytes)):
            name = f"fit hold={hold} {share:.0%} of the inputs, host budget: {host is not None}"
            context.item(name, lambda hold=hold, share=share, host=host: fitted(hold, share, host))

    def over(policy: str, allocator: Any = None) -> Facts:
        options: dict[str, Any] = {"over_cap": (policy,)}
        if policy == "spill":
            options["spill_to"] = gpuckpt.CheckpointBudget(64 * inputs_bytes, device="cpu", hold="pool")
        if policy == "compress":
            options["storage_dtype"] = "float16"
        cap_bytes = (2 if policy == "raise" else 1) * int(0.6 * inputs_bytes) + (1 << 20)
        budget = gpuckpt.CheckpointBudget(cap_bytes, device=context.device, hold="pool", allocator=allocator, **options)
        with budget:
            loss = model(x).square().mean()
        found = torch.autograd.grad(loss, [x, *model.parameters()])
        context.sync()
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        del loss, found
        kept = budget.peak_bytes <= budget.max_bytes and budget.used_bytes == 0
        return {"ok": kept and (same or policy == "compress"), "same_bits": same, "peak_bytes": budget.peak_bytes}

    for policy in ("raise", "spill", "compress"):
        context.item(f"a full pool: {policy}", lambda policy=policy: over(policy))
    if not context.dry:
        from gpuckpt.memory.adapters.torch import torch_allocator

        context.item("a pool that draws from torch's allocator", lambda: over("raise", torch_allocator()))


def streams(context: Context) -> None:
    """Readers and writers on other streams, and a captured step. Needs a device: nothing overlaps on the CPU."""
    if context.dry:
        context.say("left out", left_out="no streams on the CPU")
        return
    context.item("a reader on a side stream", lambda: _race(context))
    context.item("a step under a spilling plan, on the default stream and on another", lambda: _on_two_streams(context))
    context.item("a CUDA graph is refused a block and a seed, and captures a linear", lambda: _capture(context))


def _race(context: Context) -> Facts:
    """Memory that is wanted back at once while a reader on another stream, behind slow work, has not begun."""
    side, slow = torch.cuda.Stream(), torch.empty(1 << 28, device="cuda")
    budget, wrong, turns = gpuckpt.CheckpointBudget("64MiB", device="cuda", hold="pool"), 0, 100
    for turn in range(turns):
        source = torch.full((4 << 20,), float(turn), device="cuda")
        saved = budget.save(source)
        with torch.cuda.stream(side):
            view = saved.load()
            slow.normal_()
            total = view.sum(dtype=torch.float64)
        del view, source
        saved.free()
        other = budget.save(torch.full((4 << 20,), -1.0, device="cuda"))
        side.synchronize()
        wrong += total.item() != float(turn) * (4 << 20)
        del other
    return {"ok": wrong == 0, "wrong": wrong, "of": turns}


def _on_two_streams(context: Context) -> Facts:
    model = torch.nn.Sequential(*[gpuckpt.nn.FusedMLP(512, 2048) for _ in range(8)]).cuda()
    x, expected = torch.randn(2048, 512, device="cuda"), None
    fitted = gpuckpt.fit(model, x, budget="12MiB", hold="pool", host_budget="1GiB")
    side = torch.cuda.Stream()
    for stream in (torch.cuda.default_stream(), side, side):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = torch.autograd.grad(fitted(x).square().mean(), list(model.parameters()))
        torch.cuda.synchronize()
        expected = expected or found
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return {"ok": False}
    return {"ok": fitted.measured_peak_bytes <= fitted.promised_peak_bytes}


def _capture(context: Context) -> Facts:
    from gpuckpt import functional as G

    budget = gpuckpt.CheckpointBudget("1MiB", device="cuda", hold="pool")
    x, w = context.leaf(64, 64), context.leaf(64, 64)
    y, refused = G.linear(x, w, activation="gelu"), []
    refusals = (
        lambda: budget.take(512, "block"),
        lambda: G.linear(x, w, dropout=0.5),
        lambda: gpuckpt.checkpoint(torch.sin, x),
    )
    for work in refusals:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            refused.append("CUDA graph" in str(error))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = G.linear(x, w, activation="gelu")
    graph.replay()
    torch.cuda.synchronize()
    return {"ok": refused == [True, True, True] and torch.equal(replayed, y), "refused": refused}

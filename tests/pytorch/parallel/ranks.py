"""Starts ranks of a function on gloo, within a time limit: a hang is a failure, and not a wait."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_ranks = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

# Ranks are forked off a server that has imported all this: a rank then starts in milliseconds.
_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "gpuckpt.pytorch.fit",
    "tests.pytorch.parallel.models",
]


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2, limit_s: float = 60.0) -> list[Any]:
    """What `function(rank, *args)` returned on each of `ranks` ranks. Fails the test, with every rank's traceback, where one
    raised or has not ended after `limit_s` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, ranks, folder, limit_s, theirs, function, args))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            found = _gather(pipes, limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if all(kind == "returned" for kind, _ in found):
            return [value for _, value in found]
        stacks = [Path(folder, f"{rank}.stack") for rank in range(ranks)]
        told = [
            value if kind != "silent" else path.read_text() for (kind, value), path in zip(found, stacks, strict=True)
        ]
        kinds = [f"rank {rank} {kind}:\n{text}" for rank, ((kind, _), text) in enumerate(zip(found, told, strict=True))]
        pytest.fail(f"{function.__name__} on {ranks} ranks, limit {limit_s} s\n" + "\n".join(kinds), pytrace=False)


def _gather(pipes: list[Connection], limit_s: float) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("silent", "")] * len(pipes)
    end_s = time.monotonic() + limit_s + 2
    missing = dict(zip(pipes, range(len(pipes)), strict=True))
    while missing and (left_s := end_s - time.monotonic()) > 0:
        for pipe in wait(list(missing), left_s):
            rank = missing.pop(pipe)
            try:
                found[rank] = pipe.recv()
            except EOFError:
                found[rank] = ("died", "")
            if found[rank][0] != "returned":  # the others may wait for it: they have a moment to say so
                end_s = min(end_s, time.monotonic() + 5)
    return found


def _rank(
    rank: int, ranks: int, folder: str, limit_s: float, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    with Path(folder, f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(limit_s, file=stack)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=limit_s + 10),
            )
            found = "returned", function(rank, *args)
            dist.barrier()  # nobody leaves while others still talk to it
        except BaseException:
            found = "raised", traceback.format_exc()
        pipe.send(found)
    sys.stdout.flush()
    os._exit(0)

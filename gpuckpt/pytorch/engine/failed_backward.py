"""What a failed backward leaves behind, and how to get rid of it.

When a node's backward raises, autograd's engine keeps other nodes that were ready to run in the calling thread's queue, with
all that they saved, until a later backward on that thread happens to come across them (torch 2.13). For a budget those are
bytes that cannot be used or freed. The queue hands out nodes by descending sequence number and drops those of a failed
backward, so running one node with the lowest number there is empties it.
"""

from __future__ import annotations

import sys
import threading

import torch

from gpuckpt.pytorch._torch_internals import graph_task_id, run_backward

__all__ = ["drop_stale_nodes", "drop_stale_nodes_after"]

_lowest: list[torch.Tensor] = []


def drop_stale_nodes() -> None:
    """Empty the calling thread's queue of nodes whose backward failed. Does nothing inside a backward."""
    if graph_task_id() >= 0 or torch.is_inference_mode_enabled():
        return
    if not _lowest:
        # A thread counts its nodes from 0.
        thread = threading.Thread(target=_make_lowest)
        thread.start()
        thread.join()
    leaf, root, grad = _lowest
    run_backward((root,), (grad,), False, False, (leaf,), True, accumulate_grad=False)


def _make_lowest() -> None:
    leaf = torch.zeros((), device="cpu", requires_grad=True)
    _lowest[:] = leaf, leaf.clone(), torch.ones((), device="cpu")


class _Sweeper:
    """Empties the queue when it dies."""

    def __del__(self) -> None:
        if not sys.is_finalizing():
            drop_stale_nodes()


def drop_stale_nodes_after(error: BaseException) -> BaseException:
    """Have the queue emptied as soon as `error` is not referenced any more, which is after the backward that it ends."""
    if graph_task_id() >= 0:
        error.__dict__.setdefault("_gpuckpt_sweeper", _Sweeper())
    return error

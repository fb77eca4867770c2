"""One plan for the ranks whose collectives meet inside of a model.

A collective inside a block (tensor parallelism, FSDP2, SyncBatchNorm, an all-to-all) runs again when the block is recomputed, and
has to meet the same block's on the other ranks: ranks that recompute different blocks get wrong numbers, or wait for ever. What
tells plans apart is seconds, which every rank measures on its own clock, and sizes, where batches differ. So these ranks plan
together, once: the seconds of the lowest of them, the smallest budget and the most bytes of any decide, and a refusal is the same
on all. A rank that meets another length alone runs it under that plan, asks nobody, and is promised no more than the cap.

Which ranks these are is seen: process groups of sharded parameters, and of collectives that the forward was observed to call.
DistributedDataParallel talks outside of the blocks: its ranks plan together in `fit`, and each for itself from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpuckpt.errors import BudgetExceeded, CheckpointError, InvalidChain, InvalidPlan
from gpuckpt.planning import Chain, Plan, certify, simulate
from gpuckpt.pytorch._torch_internals import sharded_parameters

__all__ = ["Ranks", "ranks_of"]


class _RankReport(NamedTuple):
    """What a rank has measured, or why it could not; and the bytes that it has for it."""

    chain: Chain | Exception
    max_bytes: int


@dataclass(frozen=True)
class Ranks:
    """The ranks that plan a model together, by the process groups that connect them. `inside`: they meet in the model's forward.
    Without groups this rank is alone."""

    groups: tuple[Any, ...] = ()
    inside: bool = False

    def plan(self, chain: Chain | Exception, max_bytes: int, make: Callable[[Chain, int], Plan]) -> Plan:
        """This rank's certificate for the plan of all: what `make` makes of the most bytes of any, within the smallest budget.

        A collective where there are groups: two `all_gather_object` in each. Raises, on all ranks in the same words, what one of
        them was refused: `BudgetExceeded`, or what is given in the place of a chain.
        """
        if not self.groups:
            if isinstance(chain, Exception):
                raise chain
            return make(chain, max_bytes)
        reports = self._exchange(_RankReport(chain, max_bytes))
        first = min(reports)
        ours = _decide(reports, make) if torch.distributed.get_rank() == first else None
        decided = self._exchange(ours)[first]
        if isinstance(decided, Exception):
            if isinstance(chain, Exception) and not isinstance(chain, CheckpointError):
                raise chain  # the user's own, with its traceback
            raise decided
        assert isinstance(chain, Chain), "a rank without one is refused, and all with it"
        plan = Plan.from_json(decided)
        return plan if plan.fingerprint == chain.fingerprint() else certify(chain, plan.tree, max_bytes, plan.strategy)

    def _exchange(self, value: Any) -> dict[int, Any]:
        """By rank what each has. Through a mesh of several dimensions what was heard in one group is told in the next."""
        found = {torch.distributed.get_rank(): value}
        for group in self.groups:
            parts: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(parts, found, group=group)
            for part in parts:
                found.update(part)
        return found


def ranks_of(model: nn.Module, seen: Iterable[Any] = (), group: Any = None) -> Ranks:
    """The ranks that `model` is connected with. `seen`: process groups of collectives that its forward called; `group`: ranks
    that are to plan together besides."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return Ranks()
    inside = _by_name([*_groups_of_parameters(model), *seen])
    around = [module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return Ranks(tuple(_by_name([*inside, *around, *([] if group is None else [group])])), bool(inside))


def _by_name(groups: Iterable[Any]) -> list[Any]:
    return list({group.group_name: group for group in groups if group.size() > 1}.values())


def _groups_of_parameters(model: nn.Module) -> list[Any]:
    from torch.distributed.tensor import DTensor

    tensors = [*model.parameters(), *model.buffers()]
    tensors += [sharded.tensor for module in model.modules() for sharded in sharded_parameters(module)]
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def _decide(reports: dict[int, _RankReport], make: Callable[[Chain, int], Plan]) -> str | Exception:
    """The plan of all, as JSON; or what all are told instead."""
    for rank, report in sorted(reports.items()):
        if isinstance(report.chain, Exception):
            error = report.chain
            if isinstance(error, InvalidChain | InvalidPlan):
                return type(error)(f"rank {rank}: {error}")
            return CheckpointError(f"the model failed on rank {rank}: {type(error).__name__}: {error}")
    chains = {rank: report.chain for rank, report in sorted(reports.items()) if isinstance(report.chain, Chain)}
    max_bytes = min(report.max_bytes for report in reports.values())
    try:
        return _plan_for_all(chains, max_bytes, make).to_json()
    except CheckpointError as error:
        if isinstance(error, BudgetExceeded):
            ranks = ", ".join(map(str, chains))
            error.hint += f"; ranks {ranks} plan together, within the smallest budget and for the most bytes of any"
        return error


def _plan_for_all(chains: dict[int, Chain], max_bytes: int, make: Callable[[Chain, int], Plan]) -> Plan:
    first, chain = next(iter(chains.items()))
    for rank, other in chains.items():
        if [stage.name for stage in other.stages] != [stage.name for stage in chain.stages]:
            raise InvalidChain(
                f"rank {rank} measured {len(other)} stages, {_named(other)}, where rank {first} measured {len(chain)}, "
                f"{_named(chain)}; ranks that plan together run the same stages"
            )
    if len({tuple([stage.ids for stage in other.stages]) for other in chains.values()}) == 1:
        most = tuple(map(max, *(other.storages for other in chains.values()))) if len(chains) > 1 else chain.storages
        columns = zip(*(other.stages for other in chains.values()), strict=True)  # of each stage what every rank has
        stages = [replace(column[0], recomputable=all(stage.recomputable for stage in column)) for column in columns]
        return make(replace(chain, stages=tuple(stages), storages=most), max_bytes)
    # Some ranks save what others do not: the plan of one of them that all can run.
    needs = []
    for candidate in {other.fingerprint(): other for other in chains.values()}.values():
        plan = make(candidate, max_bytes)
        try:
            peak_bytes = max(simulate(other, plan.tree).peak_bytes for other in chains.values())
        except InvalidPlan:
            continue
        if peak_bytes <= max_bytes:
            return plan
        needs.append(peak_bytes)
    if not needs:
        raise InvalidChain("ranks that plan together cannot recompute the same stages")
    raise BudgetExceeded(min(needs), max_bytes, "no plan of one rank holds less on the others")


def _named(chain: Chain) -> str:
    return f"{chain.stages[0].name!r} to {chain.stages[-1].name!r}"

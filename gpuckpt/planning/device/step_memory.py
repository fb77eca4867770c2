"""The bytes of a whole step on one device, as a chain under a plan, its parameters, an optimizer and a layout make them.

Weights and optimizer state are there all the time (from the second step on). A gradient comes when backward has gone through the
stage that its parameter belongs to (how many of them are there at the worst moment of that backward has been measured:
`Stage.gradients_bytes`), and stays until the optimizer has stepped and set it to None. So a step has two high
points: somewhere in backward, where activations are still held and some gradients are there, and the optimizer's step, with every
gradient and no activation. The first is planned: see `gpuckpt.planning.device.gradients`. Where the optimizer steps in backward
there is only that one.

Of FSDP2 the full weights of a block and of the one fetched ahead count as workspace, and its full gradients twice (as backward
leaves them, and as reduce_scatter reads them). What belongs to no block stays gathered, and its gradients whole, all through the
step. Buffers of NCCL, the CUDA context and fragmentation are not known: `SET_ASIDE_BYTES` is for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.device.gradients import Gradient, plan_total, stages_of, stages_within, with_gradients
from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.planning.device.optimizers import OptimizerCosts
from gpuckpt.planning.device.parameters import CUDA_BLOCK_BYTES, ParameterShape, rounded_bytes
from gpuckpt.planning.device.pipeline_ranks import least_in_flight, plan_in_flight
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.planner import smallest_budget

__all__ = ["LOSS_BYTES", "SET_ASIDE_BYTES", "SET_ASIDE_NCCL_BYTES", "StepMemory", "StepPlan"]

SET_ASIDE_BYTES = 3 << 29
"""1.5 GiB: a card of "80 GB" offers programs some 79.1 GiB of its 80 (as torch's out-of-memory messages quote it), a CUDA context
with torch's kernels takes about half a GiB, cuBLAS a few dozen MiB. A margin, not a measurement: no GPU has run this yet."""

_ENGINE = "numba"  # which has to be imported; whoever asks what a device holds asks dozens of times

LOSS_BYTES = 2 * CUDA_BLOCK_BYTES
"""The loss and its gradient, there until backward has ended."""

SET_ASIDE_NCCL_BYTES = 1 << 30
"""1 GiB more where ranks talk to each other: NCCL's channels and buffers."""


@dataclass(frozen=True)
class StepMemory:
    """A training step of one rank.

    Args:
        chain: of forward and backward, without gradients of parameters.
        parameters: all of them, as a rank of tensor parallelism has them.
        buffers_bytes: bytes of buffers and inputs.
        given: ids of the inputs that autograd saves, which are counted in `buffers_bytes`.
        in_backward: whether each parameter's gradient goes into the optimizer as soon as it has come, and is let go.
        in_flight: micro-batches that the rank holds at once, one of them at its peak. Gradients are then there from the first
            micro-batch on.
    """

    chain: Chain
    parameters: tuple[ParameterShape, ...]
    optimizer: OptimizerCosts
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    buffers_bytes: int = 0
    given: frozenset[int] = frozenset()
    in_backward: bool = False
    in_flight: int = 0

    @cached_property
    def weights(self) -> list[int]:
        """Bytes of each weight that stays, a shard of it under FSDP."""
        return [p.shard_numel(self.layout.fsdp) * p.item_bytes for p in self.parameters]

    @cached_property
    def state(self) -> list[int]:
        """Bytes of each tensor of the optimizer's state."""
        ranks, costs = self.layout.fsdp, self.optimizer
        return [size for p in self._trained for size in costs.state(p.shard_numel(ranks), p.item_bytes)]

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, as large as the weights that are trained; when backward has ended they are there together, unless
        the optimizer steps in it."""
        return sum(p.shard_numel(self.layout.fsdp) * p.item_bytes for p in self._trained)

    @cached_property
    def gathered_bytes(self) -> int:
        """Full weights outside of blocks that FSDP keeps for the whole step."""
        if self.layout.fsdp == 1:
            return 0
        stages = self._stages
        return rounded_bytes(p.numel * p.item_bytes for p, s in zip(self.parameters, stages, strict=True) if s is None)

    @cached_property
    def resident_bytes(self) -> int:
        """What is there all through a step: weights, optimizer state, buffers, as the allocator rounds them."""
        return rounded_bytes(self.weights) + rounded_bytes(self.state) + self.gathered_bytes + self.buffers_bytes

    @property
    def rounding_bytes(self) -> int:
        """What of `resident_bytes` is rounding."""
        return self.resident_bytes - sum(self.weights) - sum(self.state) - self.gathered_bytes - self.buffers_bytes

    @property
    def set_aside_bytes(self) -> int:
        """For what cannot be known beforehand."""
        return SET_ASIDE_BYTES + (SET_ASIDE_NCCL_BYTES if self.layout.devices > 1 else 0)

    @property
    def optimizer_peak_bytes(self) -> int:
        """Beyond `resident_bytes`, while the optimizer steps: every gradient, and its temporaries. 0 if it steps in backward."""
        if self.in_backward:
            return 0
        gradients = [p.shard_numel(self.layout.fsdp) * p.item_bytes for p in self._trained]
        return rounded_bytes(gradients) + rounded_bytes(map(self._step_bytes, self._trained))

    @property
    def optimizer_moved_bytes(self) -> int:
        """Bytes that the optimizer's step reads and writes."""
        ranks, costs = self.layout.fsdp, self.optimizer
        return sum(costs.moved_bytes(p.shard_numel(ranks), p.item_bytes) for p in self._trained)

    @cached_property
    def chain_with_gradients(self) -> Chain:
        """The chain, each stage's workspace with the gradients that are there in its backward, and what FSDP gathers for it.
        Inputs that autograd saves are counted with the other inputs."""
        stages, sharded, last = list(self.chain.stages), self.layout.fsdp > 1, len(self.chain) - 1
        gradients: list[Gradient] = []
        always_bytes = LOSS_BYTES
        whole = [0] * len(stages)  # whole: bytes of a block's full weights
        for parameter, stage, shard in zip(self.parameters, self._stages, self.weights, strict=True):
            full = parameter.numel * parameter.item_bytes
            nbytes = rounded_bytes([full if sharded and stage is None else shard])
            if stage is not None:
                whole[stage] += full
            if parameter.trained:
                at = (
                    ((0, last) if parameter.tied else (0,) if parameter.first else (last,))
                    if stage is None
                    else (stage,)
                )
                stays, step_bytes = not self.in_backward, self._step_bytes(parameter)
                if self.in_flight:
                    always_bytes += nbytes
                    stays, step_bytes = False, 0
                gradients.append(Gradient(at, nbytes, stays, step_bytes))
        if sharded:
            for number, full in enumerate(whole):
                if (
                    full
                ):  # which is gathered, and its gradient before and after it is reduced; the next block's comes already
                    ahead = max((whole[n] for n in (number - 1, number + 1) if 0 <= n <= last), default=0)
                    stages[number] = replace(stages[number], gradients_bytes=3 * full + ahead)
        storages = tuple([0 if i in self.given else size for i, size in enumerate(self.chain.storages)])
        counted = replace(self.chain, stages=tuple(stages), storages=storages)
        return with_gradients(counted, gradients, always_bytes=always_bytes)

    def plan(self, budget_bytes: int, strategy: str = "optimal") -> StepPlan:
        """The fastest plan whose whole step stays within `budget_bytes` of the device.

        Raises `BudgetExceeded`, whose `need` is the smallest budget that would do.
        """
        fixed = self.resident_bytes + self.set_aside_bytes
        least = fixed + self.optimizer_peak_bytes
        left = max(0, budget_bytes - fixed)
        try:
            if self.in_flight:
                plan = plan_in_flight(self.chain, self.chain_with_gradients, self.in_flight, left, strategy)
            else:
                plan = plan_total(self.chain, self.chain_with_gradients, left, strategy, engine=_ENGINE)
        except BudgetExceeded as error:
            raise BudgetExceeded(max(least, fixed + error.need), budget_bytes, "of a whole step") from None
        if least > budget_bytes:
            need = max(least, fixed + plan.certificate.smallest_budget_bytes)
            raise BudgetExceeded(need, budget_bytes, "of a whole step")
        return StepPlan(self, plan, budget_bytes)

    def smallest_moving_bytes(self) -> int:
        """The fewest bytes that forward and backward can do with beyond `resident_bytes`, under any plan."""
        if self.in_flight:
            return least_in_flight(self.chain_with_gradients, self.in_flight)
        return smallest_budget(self.chain_with_gradients, "total", engine=_ENGINE)

    @property
    def least_bytes(self) -> int:
        """The smallest budget that the whole step could do with, under any plan."""
        moving = max(self.optimizer_peak_bytes, self.smallest_moving_bytes())
        return self.resident_bytes + self.set_aside_bytes + moving

    @property
    def _trained(self) -> list[ParameterShape]:
        return [parameter for parameter in self.parameters if parameter.trained]

    def _step_bytes(self, parameter: ParameterShape) -> int:
        return self.optimizer.step_bytes(parameter.shard_numel(self.layout.fsdp), parameter.item_bytes)

    @cached_property
    def _stages(self) -> list[int | None]:
        """The stage of each parameter; None for what belongs to no block."""
        known = stages_of(self.chain)
        return [next(iter(stages_within(parameter.name, known)), None) for parameter in self.parameters]


@dataclass(frozen=True)
class StepPlan:
    """A plan for a whole step, and what it comes to.

    `peak_bytes`: the most bytes of the device that the step takes, what is set aside included.
    """

    memory: StepMemory
    plan: Plan
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        memory = self.memory
        moving = max(self.plan.certificate.total_peak_bytes, memory.optimizer_peak_bytes)
        return memory.resident_bytes + memory.set_aside_bytes + moving

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that any plan would fit in."""
        memory = self.memory
        moving = max(self.plan.certificate.smallest_budget_bytes, memory.optimizer_peak_bytes)
        return memory.resident_bytes + memory.set_aside_bytes + moving

    def step_s(self, bytes_per_s: float) -> float:
        """Seconds of forward, backward and the optimizer's step, which is as long as its bytes take at `bytes_per_s`."""
        return self.plan.certificate.step_s + self.memory.optimizer_moved_bytes / bytes_per_s

"""`Terms`: what `fit` was asked for, and the budgets that come of it once the model's device, or what it saves, is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from gpuckpt.budget import CheckpointBudget
from gpuckpt.checks import check_choice, check_flag, check_int, shown
from gpuckpt.memory import Budget
from gpuckpt.planning import STRATEGIES, Plan
from gpuckpt.pytorch.engine.verify import Verify, check_verify
from gpuckpt.pytorch.profiling.measure import MOST_REPEATS
from gpuckpt.pytorch.whole_device.device_scope import DeviceScope
from gpuckpt.pytorch.whole_device.optimizer_step import optimizers_of
from gpuckpt.units import parse_bytes

__all__ = ["Terms"]

_SHARE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*%\s*")
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Terms:
    """The arguments of `fit`, by their names there. Raises what `fit` raises for those that make no sense."""

    budget: Budget | int | str
    strategy: str
    hold: str
    preserve_rng_state: bool
    verify: Verify | None
    repeats: int
    host_budget: Budget | int | str | None
    live: int
    strict: bool
    group: Any
    plan: Plan | None
    stages: Sequence[str]
    scope: str = "saved"
    optimizer: Any = None

    def __post_init__(self) -> None:
        check_choice(self.strategy, "strategy", ("optimal", *STRATEGIES))
        check_choice(self.hold, "hold", ("account", "pool"))
        check_choice(self.scope, "scope", ("saved", "device"))
        check_flag(self.preserve_rng_state, "preserve_rng_state")
        check_flag(self.strict, "strict")
        check_int(self.repeats, "repeats", 1, MOST_REPEATS)
        if not isinstance(self.live, int) or isinstance(self.live, bool) or self.live < 1:
            raise ValueError(
                f"live={shown(self.live)}: expected how many forwards wait for their backward at a time, 1 or more"
            )
        check_verify(self.verify)
        if self.group is not None and not hasattr(self.group, "group_name"):
            raise TypeError(
                f"group={shown(self.group)}: expected a process group of torch.distributed that this rank is a part of"
            )
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise TypeError(
                f"plan={shown(self.plan)}: expected a gpuckpt.Plan; one that was saved is read by Plan.from_json(text)"
            )
        listed = isinstance(self.stages, Sequence) and not isinstance(self.stages, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.stages):
            raise TypeError(
                f"stages={shown(self.stages)}: expected patterns of modules' names, such as ['encoder.layers.*']"
            )
        self._check_scope()
        if self.share is None and not isinstance(self.budget, Budget):
            parse_bytes(self.budget, "budget")
        if isinstance(self.host_budget, Budget):
            self._check_host(self.host_budget)
        elif self.host_budget is not None:
            parse_bytes(self.host_budget, "host_budget")

    @property
    def share(self) -> Fraction | None:
        """Of a budget like "40%" what part of a plain step's peak it is. Raises `ValueError` for none at all, or more."""
        found = _SHARE.fullmatch(self.budget) if isinstance(self.budget, str) else None
        if found is None:
            return None
        share = Fraction(found[1]) / 100
        if not 0 < share <= 1:
            raise ValueError(
                f"budget={shown(self.budget)}: expected a share of what a plain step holds, above 0% and up to 100%"
            )
        return share

    def device_scope(self, model: nn.Module) -> DeviceScope | None:
        """What the whole step of `model` has to fit in; None where the budget is for what autograd saves alone."""
        if self.scope == "saved":
            return None
        assert not isinstance(self.budget, Budget), "refused by _check_scope"
        return DeviceScope(model, optimizers_of(self.optimizer), parse_bytes(self.budget, "budget"))

    def budget_for(self, model: nn.Module, plain_bytes: int | None = None, device: DeviceScope | None = None) -> Budget:
        """The budget, on the model's device: with a scope for the `device` what that leaves. A share is without end until
        `plain_bytes` is known, which a plain step holds."""
        if isinstance(self.budget, Budget):
            return self.budget
        max_bytes: int | str = self.budget if device is None else device.left_bytes
        if (share := self.share) is not None:
            max_bytes = _ENDLESS if plain_bytes is None else int(share * plain_bytes * self.live)
        place = next((parameter.device for parameter in model.parameters()), None)
        # Where a step holds more than its plan promised, frames drop what they can compute again.
        over_cap = "raise" if self.strict else "recompute"
        return CheckpointBudget(max_bytes, device=place, hold=self.hold, over_cap=over_cap)

    def host_budget_for(self, budget: Budget) -> Budget | None:
        """The budget on the host to spill to, pinned where it feeds a CUDA device; None without one."""
        if self.host_budget is None or isinstance(self.host_budget, Budget):
            return self.host_budget
        allocator = None
        if budget.device != "cpu":
            from gpuckpt.memory.pools.cupy import pinned_buffer

            allocator = pinned_buffer
        return CheckpointBudget(self.host_budget, device="cpu", hold="pool", allocator=allocator)

    def _check_scope(self) -> None:
        """Raises `TypeError` or `ValueError` for what does not go with the scope."""
        if self.scope == "saved":
            if self.optimizer is not None:
                raise ValueError('optimizer= is for scope="device"; a budget for what autograd saves has no use for it')
            return
        optimizers_of(self.optimizer)
        if isinstance(self.budget, Budget) or self.share is not None:
            raise TypeError(
                f'budget={shown(self.budget)}: scope="device" expects the bytes of the device, such as "70GiB"'
            )
        if self.hold == "pool":
            raise ValueError('scope="device" plans tensors where they are: expected hold="account", not "pool"')
        if self.group is not None:
            raise ValueError('scope="device" plans the one device of this rank: group= does not go with it')

    def _check_host(self, host: Budget) -> None:
        """Raises `ValueError` for a budget that is not on the host, keeps no copies, is `budget` itself, or the one that `budget`
        spills to when it is full: no plan would promise the peak there."""
        if host is self.budget:
            raise ValueError("host_budget is the budget itself; spilling needs a second one")
        if isinstance(self.budget, Budget) and host is self.budget.spill_to:
            raise ValueError("host_budget is the budget's own spill_to; what is spilled by plan needs one of its own")
        if host.device != "cpu" or host.hold != "pool":
            raise ValueError(
                f"host_budget is on {host.device!r} with hold={host.hold!r}; expected a size, or "
                'CheckpointBudget(..., device="cpu", hold="pool")'
            )

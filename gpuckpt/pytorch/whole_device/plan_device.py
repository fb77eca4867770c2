"""`plan_device`: whether a training step of a Hugging Face model fits a device, under which plan, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuckpt.checks import check_flag, check_int
from gpuckpt.errors import BudgetExceeded
from gpuckpt.kernels.audit.roofline import Device
from gpuckpt.kernels.audit.roofline import device as device_called
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.device.interpolate import chain_at
from gpuckpt.planning.device.largest import largest_fitting
from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.planning.device.optimizers import optimizer_called
from gpuckpt.planning.device.step_memory import StepMemory, StepPlan
from gpuckpt.planning.variants import LINK_BYTES_PER_S, with_spill
from gpuckpt.pytorch.whole_device.hub_model import HubModel
from gpuckpt.units import parse_bytes

__all__ = ["DevicePlan", "Lever", "plan_device"]

DEFAULT_CONTEXT = 4096
_CONTEXT_STEP = 128
_MOST = 1 << 24  # samples or tokens: nobody asks for more, and a search has to end
_LINK = "pcie-gen5-x16"
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Lever:
    """What another choice would come to, all else being equal. `smallest_bytes`: the least of the device that a step could take;
    `peak_bytes`, `step_s`: of its plan, None where that does not fit or there is none."""

    name: str
    smallest_bytes: int
    peak_bytes: int | None
    step_s: float | None


@dataclass(frozen=True)
class DevicePlan:
    """A model, a batch and a device, and what comes of them.

    Attributes:
        memory: the bytes of a step, by kind.
        found: the plan; None where nothing fits.
        need_bytes: the smallest budget that would do.
        budget_bytes: of the device, for everything.
    """

    model: HubModel
    device: Device
    batch: int
    context: int | None
    budget_bytes: int
    memory: StepMemory
    found: StepPlan | None
    need_bytes: int

    @property
    def fits(self) -> bool:
        return self.found is not None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step by the roofline, a bound from below; transfers between devices are left out."""
        return None if self.found is None else self.found.step_s(self.device.bytes_per_s)

    @property
    def samples(self) -> int:
        """Samples that all devices together take in one step."""
        return self.batch * self.model.layout.fsdp

    def largest_batch(self) -> int:
        """The most samples a device and step that fit the budget; 0 if not one does."""
        return self._largest(
            lambda batch: self.model.chain(batch, self.context, self.device.name),
            (self.batch, 2 * self.batch),
            _MOST,
            1,
        )

    def longest_context(self) -> int | None:
        """The most tokens a sample that fit the budget with this batch: a multiple of 128, but where a table of positions sets an
        end. 0 if not even those fit; None for a model whose samples have no length."""
        if self.context is None:
            return None
        limit, hard = self.model.context_limit
        shorter = (self.context, max(2, self.context // 2), max(1, self.context // 4))
        sizes = shorter if hard else (self.context, 2 * self.context, 3 * self.context)
        return self._largest(
            lambda context: self.model.chain(self.batch, context, self.device.name),
            sizes,
            limit if hard and limit else _MOST,
            1 if hard else _CONTEXT_STEP,
        )

    def fewest_gpus(self) -> int | None:
        """The fewest devices that hold the step with this batch on each, FSDP over 1, 2, 4, ... of them; None if not 1,024 do."""
        layout = self.model.layout
        for fsdp in (1 << power for power in range(11)):
            memory = replace(self.memory, layout=replace(layout, fsdp=fsdp))
            fixed = memory.resident_bytes + memory.set_aside_bytes
            if fixed + memory.optimizer_peak_bytes > self.budget_bytes:
                continue
            if fixed + memory.smallest_moving_bytes() <= self.budget_bytes:
                return fsdp * layout.tp
        return None

    def levers(self) -> list[Lever]:
        """What recomputing, offloading, an 8-bit optimizer, a fused loss and more ranks would each buy."""
        memory, layout = self.memory, self.model.layout
        found = [
            self._lever("keep everything", memory, strategy="none"),
            self._lever("recompute every block", memory, strategy="every"),
            self._lever(f"offload to the host ({_LINK})", replace(memory, chain=self._spilling())),
        ]
        if self.memory.optimizer.name.startswith("adamw") and self.memory.optimizer.name != "adamw-8bit":
            found.append(self._lever("8-bit AdamW", replace(memory, optimizer=optimizer_called("adamw-8bit"))))
        fused = self._with_fused_loss()
        if fused is not None:
            found.append(self._lever("fused output layer and loss", fused))
        ranks = max(8, 2 * layout.fsdp)
        found.append(self._lever(f"FSDP over {ranks} devices", replace(memory, layout=replace(layout, fsdp=ranks))))
        return found

    def _spilling(self) -> Chain:
        return with_spill(self.memory.chain, LINK_BYTES_PER_S[_LINK])

    def _lever(self, name: str, memory: StepMemory, strategy: str = "optimal") -> Lever:
        try:
            # A classic strategy offers one plan: what it takes is its price, whether that fits or not.
            found = memory.plan(self.budget_bytes if strategy == "optimal" else _ENDLESS, strategy)
        except BudgetExceeded as error:
            return Lever(name, error.need, None, None)
        smallest_bytes = found.smallest_bytes if strategy == "optimal" else found.peak_bytes
        peak_bytes = found.peak_bytes if found.peak_bytes <= self.budget_bytes else None
        return Lever(name, smallest_bytes, peak_bytes, found.step_s(self.device.bytes_per_s))

    def _with_fused_loss(self) -> StepMemory | None:
        try:
            model = self.model.with_fused_loss()
        except ValueError:
            return None
        chain = model.chain(self.batch, self.context, self.device.name)
        return replace(self.memory, chain=chain, parameters=model.parameters)

    def _largest(self, measured: Callable[[int], Chain], sizes: tuple[int, ...], limit: int, step: int) -> int:
        """The largest size that fits: found by chains that are interpolated between measured ones, and then measured itself."""
        memory = self.memory
        left = self.budget_bytes - memory.resident_bytes - memory.set_aside_bytes
        if left < memory.optimizer_peak_bytes:
            return 0
        chains = {sizes[0]: memory.chain}

        def chain_of(size: int) -> Chain:
            if size not in chains:
                chains[size] = measured(size)
            return chains[size]

        def need(size: int) -> int:
            return replace(memory, chain=chain_of(size)).smallest_moving_bytes()

        likely_needs: dict[int, int] = {}

        def likely_need(size: int) -> int:
            known, further = sizes, sizes[0] + sizes[-1]
            # A batch of one takes other ways through a model.
            if sizes[-1] < further <= limit and _options_differ(chain_of(sizes[0]), chain_of(sizes[1])):
                known = (*sizes[1:], further)
            chain = chain_at(size, known, list(map(chain_of, known)))
            chain = chain_of(size) if chain is None else chain
            likely_needs[size] = replace(memory, chain=chain).smallest_moving_bytes()
            return likely_needs[size]

        likely = largest_fitting(likely_need, left, 0, sizes[0], limit=limit, step=step)
        if likely == 0 or need(likely) == likely_needs[likely]:
            return likely
        return largest_fitting(need, left, 0, likely, limit=limit, step=step)


def _options_differ(one: Chain, other: Chain) -> bool:
    return [stage.ids for stage in one.stages] != [stage.ids for stage in other.stages]


def plan_device(
    source: str | Path | Mapping[str, Any],
    *,
    batch: int = 1,
    context: int | None = None,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    device: str = "H100 SXM",
    parallel: str | ParallelLayout = "",
    budget: int | str | None = None,
    fused_loss: bool = False,
) -> DevicePlan:
    """Plan a whole training step of a Hugging Face model, from its configuration alone: no weights, no download, no device.

    Args:
        source: a config.json of a causal language model, an encoder, an encoder-decoder or an image model, or its contents.
        batch: samples a device and step.
        context: tokens a sample; by default 4096, or as many as the model has positions. Images have none.
        dtype: "bf16", "fp16" or "fp32", of weights, gradients and activations.
        optimizer: a name in `gpuckpt.planning.device.optimizers.OPTIMIZERS`.
        device: one of `gpuckpt.kernels.audit.roofline.DEVICES`, for its memory and its roofline.
        parallel: a `ParallelLayout`, or as text: "fsdp=8,tp=2".
        budget: bytes of the device for everything; by default all of its memory.
        fused_loss: plan with `gpuckpt.functional.linear_cross_entropy` in place of the output layer and the loss.

    Weights, gradients and optimizer state are counted exactly, as the caching allocator rounds them; activations as autograd
    saves them, by the CPU's rules. What cannot be known is set aside: see `gpuckpt.planning.device.step_memory`.

    >>> config = {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "n_layer": 3, "vocab_size": 97, "bos_token_id": 0}
    >>> planned = plan_device({**config, "eos_token_id": 0}, context=32)
    >>> planned.fits, planned.model.parameter_count == (97 + 1024) * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64
    (True, True)

    Raises `ValueError` for what cannot be (an architecture, a dtype, sizes or a layout that do not fit together), and
    `BackendUnavailable` without transformers. A step that does not fit is no error: the plan says so.
    """
    check_flag(fused_loss, "fused_loss")
    batch = check_int(batch, "batch", None, _MOST)
    context = None if context is None else check_int(context, "context", None, _MOST)
    layout = parallel if isinstance(parallel, ParallelLayout) else ParallelLayout.parse(parallel)
    on, costs = device_called(device), optimizer_called(optimizer)
    budget_bytes = on.memory_bytes if budget is None else parse_bytes(budget, "budget")
    model = HubModel(source, dtype, layout, fused_loss=fused_loss)
    if context is None and model.reads_tokens:
        limit, _ = model.context_limit
        context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    chain = model.chain(batch, context, on.name)
    memory = StepMemory(chain, model.parameters, costs, layout, model.buffers_bytes(batch, context), model.given)
    try:
        found = memory.plan(budget_bytes)
        need_bytes = found.smallest_bytes
    except BudgetExceeded as error:
        found, need_bytes = None, int(error.need)
    return DevicePlan(model, on, batch, context, budget_bytes, memory, found, need_bytes)

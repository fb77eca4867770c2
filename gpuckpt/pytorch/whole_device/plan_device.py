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
from gpuckpt.planning.device.pipeline_ranks import cut_blocks
from gpuckpt.planning.device.ranked_step import RankedPlan, RankedStep
from gpuckpt.planning.device.step_memory import StepMemory, StepPlan
from gpuckpt.planning.variants import LINK_BYTES_PER_S, with_spill
from gpuckpt.pytorch.whole_device.factory_model import Factory, FactoryModel
from gpuckpt.pytorch.whole_device.hub_model import HubModel, dtype_called
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
        whole: the bytes of a step, by kind, as one device would hold them, or each of those that share its layers.
        step: the same by rank of the pipeline; one rank where there is none.
        planned: a plan for every rank; None where nothing fits.
        need_bytes: the smallest budget that would do.
        budget_bytes: of the device, for everything.
    """

    model: HubModel | FactoryModel
    device: Device
    batch: int
    context: int | None
    budget_bytes: int
    whole: StepMemory
    step: RankedStep
    planned: RankedPlan | None
    need_bytes: int

    @property
    def fits(self) -> bool:
        return self.planned is not None

    @property
    def tightest(self) -> int:
        """The rank of the pipeline whose device is fullest, or would have to be."""
        if self.planned is not None:
            return self.planned.tightest
        memories = self.step.memories
        return max(range(len(memories)), key=lambda rank: memories[rank].least_bytes)

    @property
    def memory(self) -> StepMemory:
        """Bytes of the tightest rank."""
        return self.step.memories[self.tightest]

    @property
    def found(self) -> StepPlan | None:
        """The tightest rank's plan."""
        return None if self.planned is None else self.planned.plans[self.tightest]

    @property
    def step_s(self) -> float | None:
        """Seconds of a step by the roofline, a bound from below; transfers between devices are left out."""
        return None if self.planned is None else self.planned.step_s(self.device.bytes_per_s)

    @property
    def samples(self) -> int:
        """Samples that all devices together take in one step."""
        return self.batch * self.model.layout.fsdp * self.step.micro_batches

    def largest_batch(self) -> int:
        """The most samples a device and step that fit the budget; 0 if not one does."""
        return self._largest(
            lambda batch: (batch, self.context),
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
            lambda context: (self.batch, context),
            sizes,
            limit if hard and limit else _MOST,
            1 if hard else _CONTEXT_STEP,
        )

    def fewest_gpus(self) -> int | None:
        """The fewest devices that hold the step with this batch on each, FSDP over 1, 2, 4, ... of them; None if not 1,024 do."""
        layout = self.model.layout
        for fsdp in (1 << power for power in range(11)):
            step = self.step.each(lambda memory, n=fsdp: replace(memory, layout=replace(layout, fsdp=n)))  # type: ignore[misc]
            if step.optimizer_bytes <= self.budget_bytes and step.least_bytes <= self.budget_bytes:
                return fsdp * layout.tp * layout.pp
        return None

    def levers(self) -> list[Lever]:
        """What recomputing, offloading, an 8-bit optimizer, a fused loss and more ranks would each buy."""
        step, layout = self.step, self.model.layout
        found = [
            self._lever("keep everything", step, strategy="none"),
            self._lever("recompute every block", step, strategy="every"),
        ]
        if layout.pp == 1:
            link = LINK_BYTES_PER_S[_LINK]
            spilling = step.each(lambda memory: replace(memory, chain=with_spill(memory.chain, link)))
            found.append(self._lever(f"offload to the host ({_LINK})", spilling))
        optimizer = self.whole.optimizer.name
        if optimizer.startswith("adamw") and optimizer != "adamw-8bit":
            smaller = optimizer_called("adamw-8bit")
            found.append(self._lever("8-bit AdamW", step.each(lambda memory: replace(memory, optimizer=smaller))))
        fused = self._with_fused_loss()
        if fused is not None:
            found.append(self._lever("fused output layer and loss", fused))
        more = replace(layout, fsdp=max(8, 2 * layout.fsdp))
        sharded = step.each(lambda memory: replace(memory, layout=more))
        found.append(self._lever(f"FSDP over {more.fsdp} devices", sharded))
        return found

    def _lever(self, name: str, step: RankedStep, strategy: str = "optimal") -> Lever:
        try:
            # A classic strategy offers one plan: what it takes is its price, whether that fits or not.
            planned = step.plan(self.budget_bytes if strategy == "optimal" else _ENDLESS, strategy)
        except BudgetExceeded as error:
            return Lever(name, error.need, None, None)
        highest_bytes = planned.plans[planned.tightest].peak_bytes
        smallest_bytes = planned.smallest_bytes if strategy == "optimal" else highest_bytes
        peak_bytes = highest_bytes if highest_bytes <= self.budget_bytes else None
        return Lever(name, smallest_bytes, peak_bytes, planned.step_s(self.device.bytes_per_s))

    def _with_fused_loss(self) -> RankedStep | None:
        try:
            model = self.model.with_fused_loss()
        except ValueError:
            return None
        chain = model.chain(self.batch, self.context, self.device.name)
        whole = replace(self.whole, chain=chain, parameters=model.parameters)
        return _over_ranks(model, whole, self.step.micro_batches)

    def _largest(
        self, step_of: Callable[[int], tuple[int, int | None]], sizes: tuple[int, ...], limit: int, step: int
    ) -> int:
        """The largest size that fits: found by chains that are interpolated between measured ones, and then measured itself."""
        if self.step.optimizer_bytes > self.budget_bytes:
            return 0
        chains = {sizes[0]: self.whole.chain}

        def least_bytes(size: int, chain: Chain) -> int:
            whole = replace(self.whole, chain=chain, buffers_bytes=self.model.buffers_bytes(*step_of(size)))
            return _over_ranks(self.model, whole, self.step.micro_batches).least_bytes

        def chain_of(size: int) -> Chain:
            if size not in chains:
                chains[size] = self.model.chain(*step_of(size), self.device.name)
            return chains[size]

        def need(size: int) -> int:
            return least_bytes(size, chain_of(size))

        likely_needs: dict[int, int] = {}

        def likely_need(size: int) -> int:
            known, further = sizes, sizes[0] + sizes[-1]
            # A batch of one takes other ways through a model.
            if sizes[-1] < further <= limit and _options_differ(chain_of(sizes[0]), chain_of(sizes[1])):
                known = (*sizes[1:], further)
            chain = chain_at(size, known, list(map(chain_of, known)))
            chain = chain_of(size) if chain is None else chain
            likely_needs[size] = least_bytes(size, chain)
            return likely_needs[size]

        likely = largest_fitting(likely_need, self.budget_bytes, 0, sizes[0], limit=limit, step=step)
        if likely == 0 or need(likely) == likely_needs[likely]:
            return likely
        return largest_fitting(need, self.budget_bytes, 0, likely, limit=limit, step=step)


def _over_ranks(model: HubModel | FactoryModel, whole: StepMemory, micro_batches: int) -> RankedStep:
    """The step over the ranks of the model's layout."""
    if model.layout.pp == 1:
        return RankedStep((whole,))
    cuts = cut_blocks(whole.chain, *model.pipeline_blocks, model.layout.pp)
    return RankedStep.split(whole, cuts, micro_batches)


def _options_differ(one: Chain, other: Chain) -> bool:
    return [stage.ids for stage in one.stages] != [stage.ids for stage in other.stages]


def plan_device(
    source: str | Path | Mapping[str, Any] | Factory,
    *,
    batch: int = 1,
    context: int | None = None,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    device: str = "H100 SXM",
    parallel: str | ParallelLayout = "",
    budget: int | str | None = None,
    fused_loss: bool = False,
    micro_batches: int = 8,
) -> DevicePlan:
    """Plan a whole training step of a model, from its configuration or what makes it: no weights, no download, no device.

    Args:
        source: a config.json of a causal language model, an encoder, an encoder-decoder or an image model, or its contents. Or a
            function of a batch and a context (None where none is given) that makes a model and an example to call it with, as
            `measure` takes it; it is called on the meta device.
        batch: samples a device and step.
        context: tokens a sample; by default 4096, or as many as the model has positions. Images have none.
        dtype: "bf16", "fp16" or "fp32", of weights, gradients and activations.
        optimizer: a name in `gpuckpt.planning.device.optimizers.OPTIMIZERS`.
        device: one of `gpuckpt.kernels.audit.roofline.DEVICES`, for its memory and its roofline.
        parallel: a `ParallelLayout`, or as text: "fsdp=8,tp=2,pp=4".
        budget: bytes of the device for everything; by default all of its memory.
        fused_loss: plan with `gpuckpt.functional.linear_cross_entropy` in place of the output layer and the loss.
        micro_batches: with pp, how many a step (1F1B), each of `batch` samples; the plan is that of the tightest rank.

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
    check_int(micro_batches, "micro_batches", 1)
    batch = check_int(batch, "batch", None, _MOST)
    context = None if context is None else check_int(context, "context", None, _MOST)
    layout = parallel if isinstance(parallel, ParallelLayout) else ParallelLayout.parse(parallel)
    on, costs = device_called(device), optimizer_called(optimizer)
    budget_bytes = on.memory_bytes if budget is None else parse_bytes(budget, "budget")
    model: HubModel | FactoryModel
    if callable(source):
        model = FactoryModel(source, dtype, dtype_called(dtype), layout, batch, context)
        if fused_loss:
            model.with_fused_loss()  # which says why not
    else:
        model = HubModel(source, dtype, layout, fused_loss=fused_loss)
        if context is None and model.reads_tokens:
            limit, _ = model.context_limit
            context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    chain = model.chain(batch, context, on.name)
    memory = StepMemory(chain, model.parameters, costs, layout, model.buffers_bytes(batch, context), model.given)
    step = _over_ranks(model, memory, micro_batches)
    try:
        planned = step.plan(budget_bytes)
        need_bytes = planned.smallest_bytes
    except BudgetExceeded as error:
        planned, need_bytes = None, int(error.need)
    return DevicePlan(model, on, batch, context, budget_bytes, memory, step, planned, need_bytes)

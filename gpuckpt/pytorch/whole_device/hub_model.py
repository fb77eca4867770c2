"""`HubModel`: a Hugging Face model by its configuration, as one rank computes it; its parameters, and its chain for any batch.

Equal blocks are measured once. The model is built whole (on the meta device, where that costs no memory) to count its parameters
and to see with what period its blocks repeat; measured is one that is cut to two periods, and its chain is extended to the whole.
Where the two periods turn out unlike, three are tried, then the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuckpt.checks import shown
from gpuckpt.errors import CheckpointError, InvalidChain
from gpuckpt.kernels.audit.roofline import device as device_called
from gpuckpt.planning import Chain
from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.planning.device.parameters import ParameterShape, rounded_bytes
from gpuckpt.planning.device.repeated_blocks import extend_chain, fewest_blocks, find_period
from gpuckpt.pytorch.profiling.measure import run_fake
from gpuckpt.pytorch.whole_device.fused_loss import FusedLossModel
from gpuckpt.pytorch.whole_device.hub_config import (
    DEPTHS,
    build,
    example_inputs,
    longest_context,
    one_sequence_a_sample,
    read_config,
    reads_tokens,
    split_config,
    with_depths,
)

__all__ = ["DTYPES", "HubModel", "dtype_called"]

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_CUDA_UNIT_BYTES = 512


def dtype_called(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPES`. Raises `ValueError` for another."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype {shown(name)}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class _Blocks:
    """An nn.ModuleList of blocks: its name with a dot, how many, and how they repeat (see `find_period`)."""

    name: str
    count: int
    first: int
    period: int


class HubModel:
    """The model of a configuration, as one rank of a layout holds and computes it.

    Args:
        source: a config.json, or its contents.
        dtype: "bf16", "fp16" or "fp32", of weights and activations.
        layout: over how many devices; only tensor parallelism changes what a rank computes.
        fused_loss: whether the output layer and the loss are `gpuckpt.functional.linear_cross_entropy`.

    Raises `ValueError` for what cannot be: an unknown architecture or dtype, sizes or a layout that do not fit together.
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, Any],
        dtype: str = "bf16",
        layout: ParallelLayout | None = None,
        *,
        fused_loss: bool = False,
    ) -> None:
        self.dtype = dtype_called(dtype)
        self.layout = layout or ParallelLayout()
        self.source, self.dtype_name = source, dtype
        self.config = read_config(source)
        self.fused_loss = fused_loss
        self._local = split_config(self.config, self.layout.tp)
        self.whole = build(self.config, self.dtype)
        self._rank = self.whole if self.layout.tp == 1 else build(self._local, self.dtype)
        self.given: frozenset[int] = frozenset()  # of the latest chain, ids of inputs that its first stage saves
        self._cut: Any = None
        self._depths: dict[int, tuple[int, int]] = {}  # number of blocks -> how they repeat
        for blocks in _block_lists(self._rank, self._local):
            first, period = self._depths.get(blocks.count, (1, 1))
            self._depths[blocks.count] = max(first, blocks.first), math.lcm(period, blocks.period)
        if self.layout.pp > 1:
            _ = self.pipeline_blocks  # which says what is allowed, before anything is measured
        if fused_loss:
            FusedLossModel(self._rank)  # which says why, where a model has no such loss

    @property
    def name(self) -> str:
        return type(self.whole).__name__

    @property
    def parameter_count(self) -> int:
        """Of the whole model, each shared one counted once."""
        return sum(parameter.numel() for parameter in self.whole.parameters())

    @property
    def reads_tokens(self) -> bool:
        """Whether its samples have a length."""
        return reads_tokens(self.whole)

    @cached_property
    def context_limit(self) -> tuple[int | None, bool]:
        """(tokens a sample that the configuration names, whether more are impossible)."""
        return longest_context(self.whole)

    @cached_property
    def parameters(self) -> tuple[ParameterShape, ...]:
        """Each parameter as a rank of tensor parallelism has it, with the name that it has in the model."""
        local = {name: tuple(each.shape) for name, each in self._rank.named_parameters()}
        prefix = "model." if self.fused_loss else ""
        head = self.whole.get_output_embeddings() if hasattr(self.whole, "get_output_embeddings") else None
        late = {id(parameter) for parameter in (head.parameters() if head is not None else ())}
        names = tuple(blocks.name for blocks in self._lists)
        before, found = True, []
        for name, parameter in self.whole.named_parameters():
            before = before and not name.startswith(names)
            shape = local[name]
            if shape == parameter.shape and self.layout.tp > 1 and _is_split(self.whole, name):
                shape = (
                    -(-shape[0] // self.layout.tp),
                    *shape[1:],
                )  # an embedding or a head, whose logits are gathered
            tied = id(parameter) in late
            found.append(
                ParameterShape(
                    prefix + name,
                    shape,
                    parameter.element_size(),
                    before and not tied,
                    parameter.requires_grad,
                    before and tied,
                )
            )
        return tuple(found)

    def chain(self, batch: int, context: int | None, device: str = "H100 SXM") -> Chain:
        """The chain of one step of a rank: `batch` samples of `context` tokens, seconds by the roofline of `device`.

        Raises `ValueError` for fewer than one sample or token, or a context longer than a table of positions.
        """
        self.check_sizes(batch, context)
        prefix = "model." if self.fused_loss else ""
        while True:
            try:
                with one_sequence_a_sample():
                    chain = self._measured(batch, context, device)
            except (CheckpointError, ValueError):
                raise
            except Exception as error:  # a forward that fails, for whatever reason it has
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                step = f"{batch} samples of {context} tokens in {self.dtype_name}"
                raise ValueError(f"{self.name} cannot run {step}: {reason}") from None
            try:
                for blocks in self._lists:
                    first, period = self._depths[blocks.count]
                    chain = extend_chain(chain, prefix + blocks.name, first, period, blocks.count)
                return chain
            except InvalidChain:
                if self._cut is self._rank:
                    raise
                self._cut = None
                for count, (first, period) in self._depths.items():  # one period later what is shared may be there
                    longer = first + 3 * period <= count and first <= 1 + period
                    self._depths[count] = (first + period, period) if longer else (count, 1)

    @property
    def pipeline_blocks(self) -> tuple[str, int]:
        """How names of the blocks begin that a pipeline deals out, and how many there are.

        Raises `ValueError` for a model that has two lists of them, as an encoder with a decoder.
        """
        if len(self._lists) != 1:
            raise ValueError(
                f"pp={self.layout.pp}: {self.name} has {len(self._lists)} lists of blocks, and a pipeline is planned for one; "
                "allowed is pp=1"
            )
        (blocks,) = self._lists
        if blocks.count % self.layout.pp:
            allowed = [n for n in range(1, blocks.count + 1) if blocks.count % n == 0]
            raise ValueError(
                f"pp={self.layout.pp} does not divide {blocks.count} blocks; allowed are {', '.join(map(str, allowed))}"
            )
        return ("model." if self.fused_loss else "") + blocks.name, blocks.count

    def with_fused_loss(self) -> HubModel:
        """The same model with a fused output layer and loss. Raises `ValueError` where it has no such form."""
        return HubModel(self.source, self.dtype_name, self.layout, fused_loss=True)

    def buffers_bytes(self, batch: int, context: int | None) -> int:
        """Bytes of the model's buffers and of one step's inputs, as an allocator rounds them."""
        tensors = [*self.whole.buffers(), *example_inputs(self.whole, batch, context).values()]
        return rounded_bytes(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check_sizes(self, batch: int, context: int | None) -> None:
        """Raises `ValueError` for a step that cannot be."""
        if batch < 1:
            raise ValueError(f"batch is {batch}: expected at least 1")
        if not self.reads_tokens:
            if context is not None:
                raise ValueError(f"context is {context}: {self.name} reads images, which have no length")
            return
        limit, hard = self.context_limit
        if context is None or context < 1:
            raise ValueError(f"context is {context}: expected at least 1 token")
        if hard and limit is not None and context > limit:
            raise ValueError(f"context is {context}: {self.name} has {limit} positions, and no more tokens a sample")

    @cached_property
    def _lists(self) -> list[_Blocks]:
        return _block_lists(self._rank, self._local)

    def _measured(self, batch: int, context: int | None, device: str) -> Chain:
        if self._cut is None:
            fewer = {count: fewest_blocks(count, *repeat) for count, repeat in self._depths.items()}
            same = all(count == few for count, few in fewer.items())
            self._cut = self._rank if same else build(with_depths(self._local, fewer), self.dtype)
        inputs = example_inputs(self._cut, batch, context)
        model = FusedLossModel(self._cut) if self.fused_loss else self._cut
        measured = run_fake(model, (), inputs, _CUDA_UNIT_BYTES, device_called(device))
        chain = measured.chain
        self.given = measured.given.intersection(chain.stages[0].saves)
        if not self.fused_loss:
            return chain
        last = chain.stages[-1]
        last = replace(last, workspace_bytes=last.workspace_bytes + model.scratch_bytes(batch * (context or 1)))
        return replace(chain, stages=(*chain.stages[:-1], last))


def _block_lists(model: nn.Module, config: Any) -> list[_Blocks]:
    """Lists of blocks whose number the configuration names, in calling order as far as names tell."""
    lists = []
    counts = {count for count in _depths_of(config) if count > 1}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            kinds = [_kind(block, config, number, len(module)) for number, block in enumerate(module)]
            lists.append(_Blocks(f"{name}.", len(module), *find_period(kinds)))
    return lists


def _depths_of(config: Any) -> set[int]:
    return {getattr(config, name) for name in DEPTHS if isinstance(getattr(config, name, None), int)}


def _kind(block: nn.Module, config: Any, number: int, count: int) -> tuple[Any, ...]:
    """What tells one kind of block from another: classes, parameters, plain settings, and its entries in the config's lists."""
    lists = [value[number] for value in vars(config).values() if isinstance(value, list) and len(value) == count]
    settings = [
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not key.startswith("_") and "idx" not in key
    ]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    return type(block), tuple(shapes), tuple(settings), repr(lists)


def _is_split(model: nn.Module, parameter: str) -> bool:
    """Whether transformers' plan splits a module that is no part of the blocks."""
    return parameter.rpartition(".")[0] in (getattr(model, "_tp_plan", None) or {})

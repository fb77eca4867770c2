"""Further ways to keep a stage, for the solver to choose from.

`with_spill` adds to every stage the option to keep what it saves in host memory, or what one of its other options holds, the
rest of which is made again, and to the frames that start with it that to keep their input there. At a plan's top level
transfers overlap the work of other stages, as `simulate` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

from gpuckpt.checks import check_number, shown
from gpuckpt.planning.chain import Chain, Stage, Variant, check_chain

__all__ = ["LINK_BYTES_PER_S", "ON_HOST", "with_spill"]

ON_HOST = "@host"
"""How the name of an option ends that holds on the host what the option named before holds on the device."""


_LEAST_BYTES_PER_S = 1e-3
_MOST_LATENCY_S = 1e9

LINK_BYTES_PER_S = {
    "pcie-gen3-x16": 15.75e9,
    "pcie-gen4-x16": 31.5e9,
    "pcie-gen5-x16": 63.0e9,
    "nvlink-c2c": 450.0e9,
}
"""Bytes a second between host and device, one way, by the standards' raw rates; pinned copies reach about 80% of them."""


def with_spill(
    chain: Chain,
    bytes_per_s: float,
    *,
    latency_s: float = 0.0,
    name: str = "spill",
    staying: Container[int] = (),
) -> Chain:
    """The chain in which each recomputable stage may keep what it saves in host memory, or what it holds under one of its options
    that make the rest again, and a frame from it on its input.

    Extras that a stage saves stay: other stages hold them anyway. `bytes_per_s`: of the link, one way; `latency_s`: further
    seconds for each storage, one way; `staying`: ids of storages that cannot be moved (parts of sparse or nested tensors).

    >>> from gpuckpt.planning import Stage
    >>> chain = Chain((Stage("a", 1e-3, 2e-3, saves=(0,)),), (63 * 10**6,))
    >>> [option.forward_s for option in with_spill(chain, LINK_BYTES_PER_S["pcie-gen5-x16"]).stages[0].options]
    [0.001, 0.002]
    """
    check_chain(chain)
    bytes_per_s = check_number(bytes_per_s, "bytes_per_s", _LEAST_BYTES_PER_S)
    latency_s = check_number(latency_s, "latency_s", 0.0, _MOST_LATENCY_S)
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}; expected what the option is called")
    try:
        _ = 0 in staying
    except Exception:
        raise TypeError(f"staying is {shown(staying)}; expected a container of ids") from None

    def moved_s(ids: Sequence[int]) -> float:
        return sum(chain.storages[i] for i in ids) / bytes_per_s + len(ids) * latency_s

    stages = []
    for number, stage in enumerate(chain.stages):
        here = tuple(i for i in stage.saves if i in stage.extras or i in staying)
        away = tuple(dict.fromkeys(i for i in stage.saves if i not in here))
        if stage.dropped_in is not None:
            stages.append(stage)  # nothing would come back
            continue
        if stage.recomputable and any(chain.storages[i] for i in away):
            seconds = moved_s(away)
            variant = Variant(name, here, stage.forward_s + seconds, stage.backward_s + seconds, away, moved_s=seconds)
            hosted = [_on_host(each, stage, staying, moved_s) for each in stage.variants if each.remade]
            stage = replace(stage, variants=(*stage.variants, variant, *(each for each in hosted if each.spilled)))
        own = tuple(dict.fromkeys(i for i in stage.inputs if i not in stage.extras))
        # What the first stage is given belongs to the caller, who keeps it.
        if number and stage.recomputable and any(chain.storages[i] for i in own) and not any(i in staying for i in own):
            stage = replace(stage, input_moved_s=moved_s(own))
        stages.append(stage)
    return replace(chain, stages=tuple(stages))


def _on_host(
    option: Variant, stage: Stage, staying: Container[int], moved_s: Callable[[Sequence[int]], float]
) -> Variant:
    """`option` with what it holds on the host, but for what stays."""
    here = tuple(i for i in option.saves if i in stage.extras or i in staying)
    away = tuple(dict.fromkeys(i for i in option.saves if i not in here))
    seconds = moved_s(away)
    forward_s, backward_s = option.forward_s + seconds, option.backward_s + seconds
    moved = replace(option, name=option.name + ON_HOST, saves=here, spilled=away, moved_s=seconds)
    return replace(moved, forward_s=forward_s, backward_s=backward_s)

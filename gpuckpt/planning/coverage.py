"""What stands in the way of a smaller budget: the words with which a refusal ends."""

from __future__ import annotations

from gpuckpt.planning.chain import Chain
from gpuckpt.planning.simulate import Simulation
from gpuckpt.units import format_bytes

__all__ = ["what_stands_in_the_way"]

_MOST_NAMED = 3


def what_stands_in_the_way(chain: Chain, smallest: Simulation) -> str:
    """How much of what a step saves lies in stages that can be recomputed, which stages are kept always, and which is the largest
    that has to run again at once; with what to do about each. `smallest`: the plan that holds the least."""
    total_bytes = chain.saved_bytes
    fixed = [stage for stage in chain.stages if not stage.recomputable and chain.charge(stage.saves)]
    fixed_bytes = chain.charge([i for stage in fixed for i in stage.saves])
    share = 100 if not total_bytes else round(100 * (total_bytes - fixed_bytes) / total_bytes)
    parts = [f"{share}% of the {format_bytes(total_bytes)} that a step saves can be recomputed"]
    if fixed:
        fixed.sort(key=lambda stage: -chain.charge(stage.saves))
        named = ", ".join(f"{stage.name} ({format_bytes(chain.charge(stage.saves))})" for stage in fixed[:_MOST_NAMED])
        more = f" and {len(fixed) - _MOST_NAMED} more" if len(fixed) > _MOST_NAMED else ""
        parts.append(
            f"kept always: {named}{more}; code outside of modules is recomputed where it is called as "
            "gpuckpt.checkpoint(code, x), and a module where it changes neither its input nor goes backward itself"
        )
    movable = [stage for stage in chain.stages if stage.recomputable]
    if movable:
        largest = max(movable, key=lambda stage: chain.charge(stage.saves) + stage.again_bytes)
        nbytes = chain.charge(largest.saves) + largest.again_bytes
        parts.append(
            f"the least is held at: {smallest.peak_step}; the largest stage, {largest.name}, holds {format_bytes(nbytes)} while "
            "it goes backward: make it of smaller modules that are called one after the other, or checkpoint parts of it"
        )
    return "; ".join(parts)

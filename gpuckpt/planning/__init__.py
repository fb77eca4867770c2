"""Planning: from the costs of a chain of stages and a budget in bytes to a plan of who keeps and who recomputes.

Pure arithmetic on NumPy and Numba; knows neither torch nor CuPy nor Triton. Numba is imported only when a solve needs it.
"""

from gpuckpt.planning.chain import KEEP, Chain, Stage, Variant
from gpuckpt.planning.frontier import Frontier, plan_frontier
from gpuckpt.planning.pipeline import (
    PipelinePlan,
    RankPlan,
    cut_chain,
    in_flight,
    plan_pipeline,
    step_seconds,
)
from gpuckpt.planning.plan import Certificate, Plan
from gpuckpt.planning.planner import STRATEGIES, certify, plan_chain
from gpuckpt.planning.simulate import Simulation, simulate
from gpuckpt.planning.tree import Keep, Node, Recompute, parse_tree, tree_text
from gpuckpt.planning.variants import LINK_BYTES_PER_S, ON_HOST, with_spill

__all__ = [
    "KEEP",
    "LINK_BYTES_PER_S",
    "ON_HOST",
    "STRATEGIES",
    "Certificate",
    "Chain",
    "Frontier",
    "Keep",
    "Node",
    "PipelinePlan",
    "Plan",
    "RankPlan",
    "Recompute",
    "Simulation",
    "Stage",
    "Variant",
    "certify",
    "cut_chain",
    "in_flight",
    "parse_tree",
    "plan_chain",
    "plan_frontier",
    "plan_pipeline",
    "simulate",
    "step_seconds",
    "tree_text",
    "with_spill",
]

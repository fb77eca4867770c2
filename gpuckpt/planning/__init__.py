"""Planning: from the costs of a chain of stages and a budget in bytes to a plan of who keeps and who recomputes.

Pure arithmetic on NumPy and Numba; knows neither torch nor CuPy nor Triton. Numba is imported only when a solve needs it.
"""

from gpuckpt.planning.chain import KEEP, Chain, Stage, Variant
from gpuckpt.planning.plan import Certificate, Keep, Node, Plan, Recompute, parse_tree, tree_text
from gpuckpt.planning.planner import STRATEGIES, plan_chain
from gpuckpt.planning.simulate import Simulation, simulate

__all__ = [
    "KEEP",
    "STRATEGIES",
    "Certificate",
    "Chain",
    "Keep",
    "Node",
    "Plan",
    "Recompute",
    "Simulation",
    "Stage",
    "Variant",
    "parse_tree",
    "plan_chain",
    "simulate",
    "tree_text",
]

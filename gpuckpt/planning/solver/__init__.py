"""The optimal plan of a chain under a budget: dynamic programming over slots of memory, and the plan of the smallest peak.

In reading order: `problem` (a chain as arrays), `slots` (memory in slots, pieces that look alike), `dp_numpy` (the recurrences),
`dp_numba` (the same compiled, on `threads`), `traceback` (from the tables to a tree), `optimal` (all of it); `min_peak` is
the closed form for the least memory.
"""

from gpuckpt.planning.solver.min_peak import min_peak_tree
from gpuckpt.planning.solver.optimal import Solution, solve
from gpuckpt.planning.solver.problem import Problem, build_problem

__all__ = ["Problem", "Solution", "build_problem", "min_peak_tree", "solve"]

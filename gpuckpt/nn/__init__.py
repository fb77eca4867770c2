"""Modules over `gpuckpt.functional`, and `fuse`, which lets the MLPs of a model that exists compute by them.

import gpuckpt.nn as gnn
"""

from gpuckpt.nn.fusing import Fusion, fuse
from gpuckpt.nn.layers import FusedLinear, FusedMLP, GatedMLP

__all__ = ["FusedLinear", "FusedMLP", "Fusion", "GatedMLP", "fuse"]

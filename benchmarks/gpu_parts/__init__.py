"""The parts of gpu_suite.py: each a function of a `Context`, named as in `gpu_suite.PARTS`."""

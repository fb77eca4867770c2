"""The examples in the docstrings of the public operations and modules run and print what they say."""

from __future__ import annotations

import doctest

import pytest

import gpuckpt.nn
from gpuckpt.pytorch.ops import foreign_arrays, gated_mlp, linear, linear_cross_entropy, mlp, norm

MODULES = [linear, mlp, gated_mlp, linear_cross_entropy, norm, foreign_arrays, gpuckpt.nn]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_everything_public_has_a_docstring():
    for home in (gpuckpt.functional, gpuckpt.nn):
        for name in home.__all__:
            assert getattr(home, name).__doc__, name

"""Finding the chain in what a model runs, and replacing calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpuckpt.errors import InvalidChain
from gpuckpt.pytorch.profiling.call_hooks import intercept, run_module, set_call
from gpuckpt.pytorch.profiling.call_paths import Call, heaviest_path
from gpuckpt.pytorch.profiling.chain_finder import find_chain


def call(name: str, begin: int, end: int, inputs: set[int], outputs: set[int]) -> Call:
    record = Call(nn.Identity(), begin, frozenset(inputs), end, frozenset(outputs))
    record.name = name
    return record


def names(path: list[Call]) -> list[str]:
    return [each.name for each in path]


def test_calls_that_hand_on_a_tensor_form_a_chain() -> None:
    calls = [
        call("a", 0, 10, {1}, {2}),
        call("b", 10, 20, {2}, {3}),
        call("other", 20, 25, {9}, {8}),
        call("c", 25, 40, {3}, {4}),
    ]
    assert names(heaviest_path(calls)) == ["a", "b", "c"]


def test_inner_blocks_win_over_the_stage_around_them_where_they_do_all_its_work() -> None:
    outer = [call("A", 0, 20, {1}, {3}), call("B", 20, 40, {3}, {5})]
    inner = [
        call("a", 0, 10, {1}, {2}),
        call("b", 10, 20, {2}, {3}),
        call("c", 20, 30, {3}, {4}),
        call("d", 30, 40, {4}, {5}),
    ]
    assert names(heaviest_path(outer + inner)) == ["a", "b", "c", "d"]


def test_the_stage_around_wins_where_its_blocks_leave_work_out() -> None:
    outer = [call("A", 0, 30, {1}, {3}), call("B", 30, 60, {3}, {5})]
    inner = [call("a", 5, 10, {10}, {11}), call("b", 10, 15, {11}, {12})]
    assert names(heaviest_path(outer + inner)) == ["A", "B"]


def test_a_call_within_another_does_not_follow_it() -> None:
    calls = [call("outer", 0, 30, {1}, {2}), call("inner", 5, 25, {2}, {3})]
    assert len(heaviest_path(calls)) == 1


def test_calls_that_hand_on_what_they_were_given_follow_neither_themselves_nor_what_is_around_them() -> None:
    def layer():
        return nn.Linear(4, 4)

    idle = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    model = nn.Sequential(
        idle, nn.Identity(), layer(), nn.Sequential(nn.Identity()), layer(), layer(), nn.Identity()
    ).eval()
    chain = find_chain(model, (torch.randn(2, 4),), {}).modules
    linear = [module for module in chain if isinstance(module, nn.Linear)]
    assert linear == [model[2], model[4], model[5]]
    assert not any(inner in chain for outer in chain for inner in outer.modules() if inner is not outer)


def test_nothing_is_a_path_of_nothing() -> None:
    assert heaviest_path([]) == []


def test_vision_levels_are_opened_and_side_branches_left_closed() -> None:
    class Level(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.gates = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid())

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.ModuleList(Level() for _ in range(2))

        def forward(self, x):
            for level in self.levels:
                x = level(x)
            return x

    model = Model()
    chain = find_chain(model, (torch.randn(3, 8),), {}).modules
    assert chain == [layer for level in model.levels for layer in level.layers]


def test_calls_are_replaced_and_put_back_even_after_an_error() -> None:
    linear = nn.Linear(2, 2)
    seen = []

    def ours(module, *args):
        seen.append(module)
        return module._call_impl(*args) + 1

    x = torch.zeros(1, 2)
    expected = linear(x)
    with intercept([linear], ours):
        assert torch.equal(linear(x), expected + 1)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.zeros(1, 3))
    with pytest.raises(KeyError), intercept([linear], ours):
        raise KeyError
    seen = seen[:1]
    assert seen == [linear]
    assert torch.equal(linear(x), expected)


def test_what_is_fitted_already_is_refused() -> None:
    linear = nn.Linear(2, 2)
    interception = set_call(linear, lambda module, x: x)
    with pytest.raises(ValueError, match="fitted already"):
        set_call(linear, lambda module, x: x)
    interception.restore()
    assert linear._compiled_call_impl is None


def test_a_compiled_module_runs_compiled_and_is_compiled_afterwards() -> None:
    linear = nn.Linear(2, 2)
    slot = linear._compiled_call_impl = lambda x: x + 1
    interception = set_call(linear, lambda module, x: run_module(module, (x,), {}) * 10)
    assert torch.equal(linear(torch.ones(1)), torch.full((1,), 20.0))
    interception.restore()
    assert linear._compiled_call_impl is slot


def test_what_takes_the_place_of_an_interception_stays() -> None:
    linear = nn.Linear(2, 2)
    interception = set_call(linear, lambda module, x: x)
    slot = linear._compiled_call_impl = lambda x: x + 1
    assert not interception.active
    interception.restore()
    assert linear._compiled_call_impl is slot


def test_no_chain_names_the_model_and_what_to_do() -> None:
    with pytest.raises(InvalidChain, match=r"Linear: found no chain .* wrap parts of the model in gpuckpt\.checkpoint"):
        find_chain(nn.Linear(2, 2), (torch.zeros(1, 2),), {})

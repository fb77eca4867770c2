"""Parameters of the segment classes with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuckpt import segments as s
from tests.inputs import OWN, Call, Make, rows_of


def layer() -> s.Dense:
    return s.Dense(4, 4, "tanh", seed=1)


def x() -> np.ndarray:
    return np.ones((2, 4), dtype=np.float32)


def of(kind: type, use: str, *rest: Any) -> Any:
    """Make one, and use it."""

    def run(**arguments: Any) -> None:
        getattr(kind(**arguments), use)(*rest)

    return run


def method(make: Any, name: str) -> Any:
    return lambda **arguments: getattr(make(), name)(**arguments)


def network() -> s.CheckpointedNetwork:
    made = s.CheckpointedNetwork([layer(), layer()])
    made.forward(x())
    return made


def pipeline() -> s.CheckpointedPipeline:
    return s.CheckpointedPipeline([layer(), layer()])


def checkpointer() -> s.ActivationCheckpointer:
    made = s.ActivationCheckpointer(s.CheckpointConfig(1, 8))
    made.save(0, x())
    return made


def differentiated(**arguments: Any) -> None:
    output, pullback = s.vjp_checkpoint(arguments.pop("step"), x(), **arguments)
    pullback(output)


def recomputed(index: int) -> None:
    try:
        network().recompute(index)
    except IndexError as error:  # as documented
        raise ValueError(str(error)) from error


def chain_function(name: str) -> Any:
    """A method of a checkpointer that has run the chain "a", "b", and afterwards holds nothing that its class forgot."""

    def run(**arguments: Any) -> None:
        made = s.ActivationCheckpointer(s.CheckpointConfig(1, 8))
        made.checkpointed_forward(x(), "ab", double)
        getattr(made, name)(**arguments)

    return run


def double(label: Any, x: Any) -> Any:
    return 2 * x


LAYERS = Make(lambda: [layer(), layer()])
CALLS = {
    "CheckpointConfig": Call(s.CheckpointConfig, checkpoint_every_n_layers=2, max_checkpoints=4, storage_dtype=None),
    "CheckpointStrategy": Call(s.CheckpointStrategy, kind="every_nth", n=2),
    "select_layers": Call(s.CheckpointStrategy("sqrt").select_layers, total=9),
    "GraphSegment": Call(s.GraphSegment, start_node=0, end_node=3),
    "GraphCheckpointConfig": Call(s.GraphCheckpointConfig, segments=Make(lambda: [s.GraphSegment(0, 3)])),
    "plan_recomputation": Call(
        s.plan_recomputation,
        names={"num_nodes": "runs past the graph"},
        num_nodes=5,
        config=Make(lambda: s.GraphCheckpointConfig([s.GraphSegment(0, 3)])),
    ),
    "ActivationCheckpointer": Call(s.ActivationCheckpointer, config=None, budget=None),
    "save": Call(method(checkpointer, "save"), layer=1, activation=Make(x)),
    "get": Call(method(checkpointer, "get"), layer=0),
    "Checkpoint": Call(of(s.Checkpoint, "recompute"), recomputable=Make(layer), input=Make(x), budget=None),
    "CheckpointedActivation": Call(
        of(s.CheckpointedActivation, "recompute"), segment=Make(layer), input=Make(x), budget=None
    ),
    "CheckpointedLayer": Call(of(s.CheckpointedLayer, "forward", x()), layer=Make(layer), tracker=None, budget=None),
    "CheckpointedNetwork": Call(
        of(s.CheckpointedNetwork, "forward", x()),
        names={"segments": "one segment"},
        segments=LAYERS,
        budget=None,
        strategy=None,
    ),
    "recompute": Call(recomputed, names={"index": "stage"}, index=0),
    "CheckpointedPipeline": Call(
        of(s.CheckpointedPipeline, "forward", x()), names={"segments": "one segment"}, segments=LAYERS, budget=None
    ),
    "total_checkpoint_memory": Call(method(pipeline, "total_checkpoint_memory"), input_size=4),
    "overall_savings": Call(method(pipeline, "overall_savings"), input_size=4),
    "Chained": Call(of(s.Chained, "forward", x()), names={"steps": "one segment"}, steps=LAYERS, budget=None),
    "SegmentCheckpointer": Call(
        of(s.SegmentCheckpointer, "forward", x()), layers=LAYERS, checkpoint_every=1, tracker=None, budget=None
    ),
    "Dense": Call(
        of(s.Dense, "forward", x()),
        names={"in_dim": "dimension of the input"},
        in_dim=4,
        out_dim=4,
        activation="tanh",
        bias=True,
        seed=0,
        like=None,
    ),
    "update": Call(method(layer, "update"), lr=0.1),
    "set_training": Call(method(layer, "set_training"), training=True),
    "LinearSegment": Call(
        of(s.LinearSegment, "forward", x()), weights=Make(lambda: [0.5] * 16), in_dim=4, out_dim=4, name="first"
    ),
    "vjp_checkpoint": Call(differentiated, step=Make(layer), budget=None),
    "uniform": Call(s.GraphCheckpointConfig.uniform, num_nodes=9, num_segments=3),
    "segment_of": Call(s.GraphCheckpointConfig([s.GraphSegment(0, 3)]).segment_of, node_id=2),
    "is_checkpoint_layer": Call(method(checkpointer, "is_checkpoint_layer"), layer=0),
    "checkpointed_forward": Call(
        chain_function("checkpointed_forward"), names={"forward_fn": OWN}, input=Make(x), layers="cd", forward_fn=double
    ),
    "recompute_from_checkpoint": Call(
        chain_function("recompute_from_checkpoint"), target_layer="b", layers="ab", forward_fn=double
    ),
    "checkpointed_backward": Call(
        chain_function("checkpointed_backward"),
        names={"backward_fn": OWN},
        grad_output=Make(x),
        layers="ab",
        forward_fn=double,
        backward_fn=lambda label, x, grad: 2 * grad,
    ),
    "push": Call(method(s.SegmentCheckpointer, "push"), layer=Make(layer)),
    "random_init": Call(s.LinearSegment.random_init, in_dim=4, out_dim=4, seed=1, like=None),
    "init_lcg": Call(s.LinearSegment.init_lcg, name="x", in_dim=4, out_dim=4, seed=1, like=None),
    "set_params": Call(
        method(layer, "set_params"), names={"params": "parameters"}, params=Make(lambda: layer().params)
    ),
    "set_gradients": Call(method(layer, "set_gradients"), gradients=Make(lambda: layer().params)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


@pytest.mark.parametrize("name", ["input", "forward_fn", "backward_fn", "layers", "grad_output"])
def test_what_a_chain_cannot_run_with_is_named_and_changes_nothing(name: str) -> None:
    made = s.ActivationCheckpointer(s.CheckpointConfig(1, 8))
    made.checkpointed_forward(x(), "ab", double)
    good = {"layers": "ab", "forward_fn": double}
    gradient = {"grad_output": x(), "backward_fn": lambda label, x, grad: 2 * grad}
    for method, arguments in (
        ("checkpointed_forward", {"input": x()} | good),
        ("recompute_from_checkpoint", {"target_layer": "b"} | good),
        ("checkpointed_backward", good | gradient),
    ):
        if name in arguments:
            with pytest.raises(TypeError, match=name):
                getattr(made, method)(**arguments | {name: None})
            assert made.num_checkpoints() == 2
            assert made.memory_stored_bytes() == 3 * x().nbytes
    np.testing.assert_array_equal(made.checkpointed_backward(**good, **gradient), 4 * x())


def test_a_class_in_place_of_a_layer_is_named() -> None:
    """Forgotten parentheses: a class has a forward too."""
    with pytest.raises(TypeError, match=r"segments\[1\] is <class"):
        s.CheckpointedNetwork([layer(), s.Dense])


def test_numbers_too_large_for_float32_do_not_become_infinities() -> None:
    assert np.isinf(s.Checkpoint(layer(), [float("inf")]).input).all()
    with pytest.raises(TypeError, match=r"input is .1e\+39."):
        s.Checkpoint(layer(), [1e39])


def test_arrays_of_python_objects_are_refused() -> None:
    """Their bytes are those of pointers: a cap would count less than is held."""
    with pytest.raises(TypeError, match="input is an array of Python objects"):
        s.Checkpoint(layer(), np.array([1.0, 2.0], dtype=object))

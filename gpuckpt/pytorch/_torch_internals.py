"""Every name of torch that is not public, and what it is used for. Checked with torch 2.11 to 2.13."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode as innermost_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

__all__ = [
    "LeanDispatchMode",
    "Sharded",
    "all_ordinary",
    "current_node",
    "forward_inside",
    "function_modes",
    "graph_task_id",
    "group_of",
    "has_accumulate_hook",
    "innermost_mode",
    "innermost_transform",
    "intercept_checkpoints",
    "is_profiling",
    "is_taken_apart",
    "is_wrapper",
    "keep_graph",
    "keep_sharding_state",
    "library_switches",
    "make_saved_tensor",
    "param_groups",
    "pop_function_mode",
    "pop_saved_tensors_hooks",
    "push_function_mode",
    "push_saved_tensors_hooks",
    "queue_callback",
    "run_backward",
    "set_versions",
    "sharded_parameters",
    "sharding_of",
    "sharing_versions",
    "storage_use_count",
    "tensor_use_count",
    "top_saved_tensors_hooks",
    "untraced",
    "unwatched",
    "version_number",
    "weights_are_cached",
]

F = TypeVar("F", bound=Callable[..., Any])

_frames = torch._C._dynamo.eval_frame
_SKIP = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP)

graph_task_id = torch._C._current_graph_task_id
"""The number of the backward that this thread is in, -1 outside of any."""

current_node = torch._C._current_autograd_node
"""The node that this thread's backward is running, None outside of any."""

keep_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the backward that this thread is in leaves the graph to be used again."""

push_saved_tensors_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_tensors_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
"""`torch.autograd.graph.saved_tensors_hooks` without the context, so that entering and leaving need not nest; and a look at the
innermost pair."""

make_saved_tensor = getattr(torch._C._autograd, "_make_saved_tensor", None)
"""Save a tensor as a node would, by the active hooks, without a node. From torch 2.13 on; None before."""

run_backward = torch.autograd.Variable._execution_engine.run_backward
queue_callback = torch.autograd.Variable._execution_engine.queue_callback
"""Run a function when the backward that this thread is in ends."""

storage_use_count = torch._C._storage_Use_Count
"""How many tensors and storage objects share a storage, by its address."""

set_versions = torch._C._autograd._unsafe_set_version_counter
"""Give tensors the versions that are named."""


def has_accumulate_hook(parameter: torch.Tensor) -> bool:
    """Whether something is called as soon as a parameter has its gradient (`register_post_accumulate_grad_hook`)."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def weights_are_cached() -> bool:
    """Whether `torch.nn.utils.parametrize.cached()` is entered."""
    return bool(parametrize._cache_enabled)


def version_number(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 for one that was made under `torch.inference_mode`, which keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


def tensor_use_count(tensor: torch.Tensor) -> int:
    """How many hold a tensor in C++, its Python object included."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


library_switches: tuple[tuple[Any, Any], ...] = (
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
)
"""What `torch.backends.mkldnn.enabled`, `cudnn.enabled` and `cudnn.deterministic` read and set, without their properties."""

push_function_mode = torch._C._push_on_torch_function_stack
pop_function_mode = torch._C._pop_torch_function_stack


def function_modes() -> list[Any]:
    """The torch function modes that this thread has entered, outermost first: `with torch.device(...)` is one."""
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def innermost_transform() -> str | None:
    """The innermost transform of torch.func that this thread is in ("Grad", "Jvp", "Vmap", ...), or None."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else str(interpreter.key().name)


def unwatched() -> bool:
    """Whether nothing in this thread is told of the operators that are called: no mode, transform of torch.func or tracer."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch._C._get_tracing_state() is None


_TENSORS = (torch.Tensor, nn.Parameter)


def all_ordinary(values: Iterable[Any]) -> bool:
    """Whether all tensors among `values` are of torch's own class, dense, and hold their values in memory: no subclass, negative
    view, fake or inference tensor, and nothing else that torch's dispatcher would see to before an operator runs."""
    known: int | None = None
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            if known is None:
                known = _keys_of(value.device.type)
            if torch._C._dispatch_keys(value).raw_repr() != known:
                return False
        elif isinstance(value, torch.Tensor):
            return False
    return True


@functools.cache
def _keys_of(device_type: str) -> int:
    """The dispatch keys of an ordinary tensor; -1, which no tensor has, for devices that are not known here."""
    if device_type not in ("cpu", "cuda"):
        return -1
    with torch.inference_mode(False):
        return int(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())


def is_taken_apart(op: torch._ops.OpOverload) -> bool:
    """Whether torch replaces `op` by the operations that it is made of above of autograd, so that nothing below meets it."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def sharing_versions() -> Any:
    """Below autograd, within the context: `detach()` shares the version counter, as it does above."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


def untraced(function: F) -> F:
    """Keep torch.compile out of `function` and of all that it calls: as `torch.compiler.disable` does, without a wrapper (so
    that a hook stays the object that it is) and without importing the compiler, which takes as long as torch itself.

    Where compiled code calls `function` there is a graph break; under `fullgraph=True` torch raises its own error, which says
    so.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        f"{function.__module__}.{function.__qualname__} runs eagerly: a ledger is no part of a graph. Compile the blocks "
        "inside instead"
    )
    function._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    _frames.set_code_exec_strategy(function.__code__, _SKIP)
    return function


class LeanDispatchMode(TorchDispatchMode):
    """A dispatch mode whose subclasses mark `__torch_dispatch__` as `untraced` themselves, which costs nothing in a call, and see
    nothing of what compiled code does inside."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@contextmanager
def intercept_checkpoints(called: Callable[[Any], None]) -> Iterator[None]:
    """Tell `called` of every function that `torch.utils.checkpoint.checkpoint` is given within the context, before it runs."""
    module: Any = torch_checkpoint
    lazy, reentrant = module._checkpoint_without_reentrant_generator, module.CheckpointFunction

    def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
        called(function)
        return lazy(function, *args, **kwargs)

    def apply(function: Any, *args: Any) -> Any:
        called(function)
        return reentrant.apply(function, *args)

    module._checkpoint_without_reentrant_generator, module.CheckpointFunction = generator, SimpleNamespace(apply=apply)
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = lazy, reentrant


is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled
"""Whether a profiler of torch runs in this thread, `emit_nvtx` included."""


def forward_inside(module: nn.Module) -> Any:
    """The module that a DistributedDataParallel wraps, None for other modules. The wrapper's forward arms its reducer and sends
    buffers to the other ranks: what runs a second time is the module inside."""
    return module.module if isinstance(module, DistributedDataParallel) else None


def sharding_of(module: nn.Module) -> Any:
    """What `fully_shard` keeps for a module; None where it was not applied to it."""
    state: Any = getattr(module, "_get_fsdp_state", None)
    return None if state is None else state()


def keep_sharding_state(module: nn.Module) -> Callable[[], None]:
    """For a second run of a sharded module that may be stopped half-way: what is returned lets FSDP2 know that its forward is
    over."""
    state = sharding_of(module)
    forward = type(state._training_state).FORWARD
    running = [part for part in (state, *param_groups(state)) if part._training_state == forward]

    def keep() -> None:
        for part in (state, *param_groups(state)):
            if part._training_state == forward and part not in running:
                part._training_state = type(forward).IDLE
                if state._state_ctx.iter_forward_root is state:
                    state._state_ctx.iter_forward_root = None

    return keep


def param_groups(state: Any) -> list[Any]:
    """The groups of parameters that are gathered together; one at most before torch 2.13."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


class Sharded(NamedTuple):
    """A parameter that `fully_shard` gathers around the calls of a module: the places where it stands, and torch's record of it.
    Which form stands there says nothing; what an optimizer changes is the sharded one."""

    places: list[tuple[nn.Module, str]]
    record: Any

    @property
    def tensor(self) -> torch.Tensor:
        """Its sharded form, which lasts."""
        return self.record.sharded_param

    @property
    def gathered(self) -> torch.Tensor | None:
        """Its gathered form, whose bytes come and go; None before it was first gathered."""
        return getattr(self.record, "_unsharded_param", None)


def sharded_parameters(module: nn.Module) -> list[Sharded]:
    """The parameters that are gathered around the calls of `module`: its own and those of modules inside of it."""
    state = sharding_of(module)
    found = []
    for record in [] if state is None else [record for group in param_groups(state) for record in group.fsdp_params]:
        info = record._module_info
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        found.append(Sharded([(info.module, info.param_name), *shared], record))
    return found


def group_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The process group that a call of an operator is a collective of; None for operators that are none."""
    if operator.namespace not in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return None
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    group = given.get("process_group", given.get("group_name"))
    if group is None:  # waiting for one that is under way
        return None
    distributed: Any = torch.distributed.distributed_c10d
    return (
        distributed._resolve_process_group(group) if isinstance(group, str) else distributed.ProcessGroup.unbox(group)
    )

"""What is compiled ahead of time is what is launched: every kernel, and of each the tiles, types, constants and options."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import gpuckpt.kernels
from gpuckpt.kernels import cross_entropy, gated, linear, mlp, norm
from gpuckpt.kernels.audit.record import recorded_spec, recording
from gpuckpt.kernels.audit.specs import ARCHS, DTYPES, WHOLE_ARCHS, shipped
from gpuckpt.kernels.device.activations import ACTIVATIONS
from gpuckpt.kernels.device.dropout import Dropout
from gpuckpt.kernels.host import problem
from gpuckpt.kernels.host.tiles import TileConfig

TYPES = {v: k for k, v in DTYPES.items()} | {torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
compiled = functools.cache(shipped)


def launched_names():
    """The kernels that any module of the package prepares a launch of: names that end in `_kernel`, outside of their definitions.
    And what is subscripted with a grid and called."""
    found, called = set(), set()
    for module in pkgutil.walk_packages(gpuckpt.kernels.__path__, "gpuckpt.kernels."):
        source = Path(importlib.import_module(module.name).__file__).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and node.id.endswith("_kernel"):
                found.add(node.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called.add(ast.unparse(node.func.value))
    return found, called


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_that_is_launched_ships(arch):
    names, called = launched_names()
    assert called == {"self.kernel"}, "a kernel is launched past host/launch.py"
    assert len(names) >= 10
    assert {s.fn.__name__ for s in compiled(arch)} == names


@pytest.fixture
def launches():
    """launches(arch): a list that fills with what would be launched on that architecture from now on."""
    with contextlib.ExitStack() as recordings:

        def on(arch):
            recordings.close()
            compiled(arch)
            return recordings.enter_context(recording(arch))

        yield on


def flattened(spec, arguments):
    """Path, name, compiled type, constant and launched value of each argument, those in tuples one by one."""
    for place, (name, kind) in enumerate(spec.signature.items()):
        if isinstance(kind, tuple):
            assert len(kind) == len(arguments[name])
            for k, (inner, value) in enumerate(zip(kind, arguments[name], strict=True)):
                yield (place, k), name, inner, spec.constexprs.get((place, k)), value
        else:
            yield (place,), name, kind, spec.constexprs.get(name), arguments[name]


def why_not(spec, arguments):
    """In what a launch is more than what was compiled, or None: the compiler may know less of it, never more."""
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": None, **spec.options}
    asked = {"num_stages": 3, "maxnreg": None} | {n: v for n, v in arguments.items() if n in OPTIONS}
    if options != asked:
        return f"options {asked}, compiled with {options}"
    for path, name, kind, constant, value in flattened(spec, arguments):
        if name in ("EVEN_K", "EVEN_D") and (value or arguments.get("TMA")):
            continue  # the same code without masks; and descriptors have none
        if kind == "constexpr":
            if value != constant or type(value) is not type(constant):
                return f"{name}={value!r}, compiled for {constant!r}"
            continue
        if value is None or (name.startswith("stride") and value in (0, 1)):
            continue  # an absent operand, or a stride that the launch knows better
        if isinstance(value, Tensor):
            own = f"*{TYPES[value.dtype]}"
        elif isinstance(value, TensorDescriptor):
            own = f"tensordesc<{TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        elif isinstance(value, float):
            own = "fp32"
        else:
            own = "i32" if abs(value) < 1 << 31 else "i64"
        if own != kind and (own, kind) != ("i32", "i64"):
            return f"{name} is {own}, compiled for {kind}"
        start = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        if path in spec.attrs and start % 16:
            return f"{name} is no multiple of 16 as it was compiled for"
    return None


def assert_compiled(arch, kept, count):
    """Names of what each of `count` launches was compiled as."""
    assert len(kept) == count
    names = []
    for launch in kept:
        given, name = {**launch.arguments, **launch.options}, launch.fn.__name__
        reasons = {s.name: why_not(s, given) for s in compiled(arch) if s.fn.__name__ == name}
        assert None in reasons.values(), "\n".join(f"{k}: {v}" for k, v in reasons.items())
        names.append(next(k for k, v in reasons.items() if v is None))
    return names


def matrix(rows, columns, dtype, layout="dense"):
    """A tensor without memory. "shifted": one element past an aligned address."""
    if layout == "transposed":
        return torch.empty(columns, rows, dtype=dtype, device="meta").t()
    if layout == "shifted":
        return torch.empty(rows * columns + 1, dtype=dtype, device="meta")[1:].view(rows, columns)
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def launch_gemms(M, N, K, D, dtype, activation, *, layout="dense", tma=None, dropout=None):
    """Every GEMM kernel once, with all that is optional. Returns how many."""
    x, w, wd, dy = matrix(M, K, dtype), matrix(N, K, dtype, layout), matrix(D, N, dtype), matrix(M, D, dtype)
    outs = [matrix(M, N, dtype) for _ in range(3)]
    b = torch.empty(N, dtype=dtype, device="meta")
    options = {"activation": activation}

    def sums(shape):
        return torch.empty(shape, dtype=torch.float32, device="meta")

    how = {"tma": tma, "dropout": dropout}
    linear.linear_fwd(x, w, b, outs[0], residual=outs[1], **options, **how)
    db = sums(linear.db_partials_shape(x, w, None, dropout))
    linear.linear_recompute_bwd(x, w, b, outs[0], outs[1], db, h=outs[2], **options, **how)
    if dropout is not None:
        return 2
    db = sums(mlp.db_partials_shape(x, w, wd, form="dual"))
    mlp.mlp_dual_bwd(x, w, b, dy, wd, *outs[:2], db, tma=tma, **options)
    gated.gated_fwd(x, w, b, w, b, outs[0], tma=tma, **options)
    both = [sums(gated.db_partials_shape(x, w, w, wd, form="triple")) for _ in range(2)]
    gated.gated_triple_bwd(x, w, b, w, b, dy, wd, *outs, *both, tma=tma, **options)
    both = [sums(gated.db_partials_shape(x, w, w, wd, form="plain")) for _ in range(2)]
    gated.gated_plain_bwd(x, w, b, w, b, *outs, *both, tma=tma, **options)
    return 6


SIZES = [(1 << 15, 14336, 4096, 4096), (2048, 1024, 128, 256), (100, 64, 192, 64)]
"""M, N, K, D that ask for large, middle and small tiles."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_launches_on_regular_operands_are_compiled(launches, arch, dtype):
    for sizes in SIZES if arch in WHOLE_ARCHS or dtype != "fp16" else SIZES[:1]:
        kept = launches(arch)
        count = launch_gemms(*sizes, DTYPES[dtype], "gelu_tanh")
        assert_compiled(arch, kept, count)
        assert {launch.arguments["TMA"] for launch in kept} == {arch in (90, 100) and dtype != "fp32"}
        kept = launches(arch)
        count = launch_gemms(*sizes, DTYPES[dtype], "gelu_tanh", dropout=Dropout(0.1, seed=1 << 40))
        assert_compiled(arch, kept, count)


# On sm_86, sm_89 and sm_120 bf16 stands for fp16 where it is not the preferred configuration.
WITHOUT_FP16 = [(a, d) for a in ARCHS for d in DTYPES if a in WHOLE_ARCHS or d != "fp16"]


@pytest.mark.parametrize(("arch", "dtype"), WITHOUT_FP16)
def test_a_last_step_of_k_that_is_not_whole_is_compiled(launches, arch, dtype):
    kept = launches(arch)
    assert_compiled(arch, kept, launch_gemms(1 << 15, 14336, 4112, 4112, DTYPES[dtype], "gelu_tanh"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arch", WHOLE_ARCHS)
def test_every_activation_is_compiled_in_the_preferred_tile(launches, arch, activation):
    kept = launches(arch)
    assert_compiled(arch, kept, launch_gemms(*SIZES[0], torch.bfloat16, activation))


@pytest.mark.parametrize("arch", [90, 100])
def test_pointers_on_request_are_compiled(launches, arch):
    for sizes in SIZES:
        kept = launches(arch)
        assert_compiled(arch, kept, launch_gemms(*sizes, torch.bfloat16, "gelu_tanh", tma=False))


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ((4096, 4100, 4096, 4096), "dense"),
        ((4096, 4096, 1001, 4096), "dense"),
        ((4096, 4096, 4096, 1001), "dense"),
        ((4096, 4096, 4096, 4096), "transposed"),
        ((4096, 4096, 4096, 4096), "shifted"),
    ],
)
@pytest.mark.parametrize(("arch", "dtype"), WITHOUT_FP16)
def test_irregular_operands_take_a_tile_that_was_compiled_without_knowing_them(launches, arch, dtype, sizes, layout):
    kept = launches(arch)
    count = launch_gemms(*sizes, DTYPES[dtype], "gelu_tanh", layout=layout)
    names = assert_compiled(arch, kept, count)
    second_layer = ("mlp_dual_bwd", "gated_triple_bwd")
    assert all("loose" in name for name in names if sizes[3] == 4096 or name.startswith(second_layer))
    assert not any(launch.arguments.get("TMA") for launch in kept if sizes[3] == 4096)


@pytest.mark.parametrize(("arch", "dtype"), [(a, d) for a in ARCHS for d in DTYPES if a in WHOLE_ARCHS or d == "bf16"])
def test_kernels_without_a_gemm_are_compiled(launches, arch, dtype):
    kept = launches(arch)
    M, K = 64, 8192
    x, out, dx = (torch.empty(M, K, dtype=DTYPES[dtype]) for _ in range(3))
    w, stats = torch.empty(K, dtype=x.dtype), torch.empty(2, M)
    sums = [torch.empty(norm.norm_partials_shape(x)) for _ in range(2)]
    for kind, bias in (("rms", None), ("layer", w)):
        norm.norm_fwd(x, w, bias, out, kind=kind)
    norm.norm_bwd(x, w, out, dx, stats, kind="rms")
    norm.norm_bwd(x, w, out, dx, stats, *sums, kind="layer")
    target, loss = torch.empty(M, dtype=torch.int64, device="meta"), torch.empty(M, device="meta")
    for V in (1024, 128256):
        for options in ({}, {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}):
            cross_entropy.cross_entropy_fwd(matrix(M, V, x.dtype), target, loss, **options)
            cross_entropy.cross_entropy_bwd(matrix(M, V, x.dtype), target, loss, **options)
    assert_compiled(arch, kept, 5 + 8)


def test_what_a_launcher_passes_is_what_is_compiled(monkeypatch):
    """The audit has no second account of a launch: changed options and operands of another dtype arrive in its spec."""
    (preferred, *_) = shipped(90)
    assert preferred.constexprs["GROUP_M"] == 8
    assert preferred.signature["p_b"] == "*bf16"
    options = problem.GemmProblem.options
    monkeypatch.setattr(problem.GemmProblem, "options", lambda self, **how: options(self, **how) | {"GROUP_M": 3})
    (preferred, *_) = shipped(90)
    assert preferred.constexprs["GROUP_M"] == 3


def test_a_recorded_launch_is_specialised_as_triton_does(launches):
    kept = launches(80)
    x, w = matrix(48, 64, torch.bfloat16), matrix(32, 64, torch.bfloat16, "transposed")
    tile = TileConfig(64, 64, 64, 4, 3)
    linear.linear_fwd(
        x, w, None, matrix(48, 32, torch.float32, "shifted"), dropout=Dropout(0.5, seed=1 << 40), tile=tile
    )
    how = {"variant": "identity", "dtype": "bf16", "arch": 80, "meta": {}}
    spec = recorded_spec(kept[0], tile=tile, **how)
    names = list(spec.signature)
    known = {names[path[0]] for path in spec.attrs}
    assert spec.signature["p_y"] == "*fp32"
    assert spec.constexprs["p_b"] is None
    assert (spec.signature["strides_x"], spec.signature["strides_w"]) == (("i32", "constexpr"), ("constexpr", "i32"))
    assert (spec.signature["seed"], spec.signature["offset"], spec.signature["scale"]) == ("i64", "i32", "fp32")
    assert {"p_x", "p_w", "N", "K", "strides_x", "strides_w"} <= known
    assert not {"p_y", "M", "seed", "offset", "threshold"} & known
    with pytest.raises(ValueError, match=r"is launched with .*'num_warps': 4.* and .* has .*'num_warps': 8"):
        recorded_spec(kept[0], tile=TileConfig(64, 64, 64, 8, 3), **how)


def test_a_launch_half_of_whose_strides_are_known_stands_for_nothing(launches):
    kept = launches(80)
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta").as_strided((48, 64), (1600, 17))
    tile = TileConfig(64, 64, 64, 4, 3)
    linear.linear_fwd(x, matrix(32, 64, torch.bfloat16), None, matrix(48, 32, torch.bfloat16), tile=tile)
    with pytest.raises(ValueError, match=r"strides_x=\(1600, 17\): of a tuple all are multiples of 16, or none is"):
        recorded_spec(kept[0], variant="", dtype="bf16", arch=80, tile=tile, meta={})

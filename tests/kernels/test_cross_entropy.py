"""The cross-entropy kernels in Triton's interpreter, against an fp64 oracle and against torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import cross_entropy as ce
from gpuckpt.kernels.host.tiles import BlockTile
from gpuckpt.kernels.testing.reference_loss import cross_entropy_ref

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAN = float("nan")


def problem(M, V, dtype, seed=0, ignored=(), scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(M, V, generator=g)).to(dtype)
    target = torch.randint(0, V, (M,), generator=g)
    target[list(ignored)] = -100
    return logits, target, torch.rand(M, generator=g)


def truth(logits, target, dloss, **options):
    wide = logits.double().requires_grad_()
    loss = cross_entropy_ref(wide, target, **options)
    loss.backward(dloss.double())
    return loss.detach(), wide.grad


def run(logits, target, dloss, **options):
    """Kernel's loss and gradient; everything written starts as NaN, everything that must survive is compared."""
    before = logits.clone()
    loss = torch.full((logits.shape[0],), NAN)
    ce.cross_entropy_fwd(logits, target, loss, **options)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True, msg="forward must not write the logits")
    grad = logits.clone()
    ce.cross_entropy_bwd(grad, target, dloss, **options)
    return loss, grad


def check(logits, target, dloss, **options):
    loss, grad = run(logits, target, dloss, **options)
    true_loss, true_grad = truth(logits, target, dloss, **options)
    own = logits.clone().requires_grad_()
    # torch's own, as a model would run it: softmax of the 16-bit logits in fp32.
    own_loss = cross_entropy_ref(own.float(), target, **options)
    own_loss.backward(dloss)
    for name, got, want, theirs in (
        ("loss", loss, true_loss, own_loss),
        ("gradient", grad, true_grad, own.grad),
    ):
        error = (got.double() - want).abs().max().item()
        # A loss of 100 has fp32 neighbours 7.6e-6 apart, and torch's few rows can be lucky: one unit in the last place on top.
        allowed = 2 * (theirs.double() - want).abs().max().item() + 1e-6 + 2**-23 * want.abs().max().item()
        assert error < allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} with {options}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 20.0},
        {"label_smoothing": 1.0},
        {"ignore_index": 3},
    ],
    ids=lambda o: "+".join(o) or "plain",
)
def test_loss_and_gradient_are_within_twice_torchs_error(dtype, options):
    logits, target, dloss = problem(6, 2500, DTYPES[dtype])
    target[[1, 4]] = options.get("ignore_index", -100)
    check(logits, target, dloss, **options)


@settings(max_examples=30, deadline=None)
@given(
    M=st.integers(0, 5),
    V=st.integers(1, 1100),
    dtype=st.sampled_from(list(DTYPES)),
    smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 10.0]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_options(M, V, dtype, smoothing, z_loss, softcap, scale, seed):
    logits, target, dloss = problem(M, V, DTYPES[dtype], seed, ignored=range(seed % (M + 1)), scale=scale)
    if M:
        check(logits, target, dloss, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap)
    else:
        run(logits, target, dloss, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap)


def test_both_tiles_give_the_same_result():
    logits, target, dloss = problem(3, 9000, torch.float32)
    results = [run(logits, target, dloss, tile=tile) for tile in (BlockTile(1, 4096, 8), BlockTile(1, 1024, 4))]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)


def test_strided_rows_leave_the_gap_alone():
    logits, target, dloss = problem(4, 300, torch.bfloat16)
    wide = torch.full((4, 512), NAN, dtype=torch.bfloat16)
    wide[:, :300] = logits
    loss = torch.full((4,), NAN)
    ce.cross_entropy_fwd(wide[:, :300], target, loss)
    ce.cross_entropy_bwd(wide[:, :300], target, dloss)
    want_loss, want_grad = run(logits, target, dloss)
    assert torch.equal(loss, want_loss)
    assert torch.equal(wide[:, :300], want_grad)
    assert wide[:, 300:].isnan().all()


def test_offsets_past_two_to_the_31():
    # Row 2 starts at element 2^31, though row and stride both fit 32 bits. Only the rows' own pages are ever touched.
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    logits = storage.as_strided((3, 64), (2**30, 1))
    values, target, dloss = problem(3, 64, torch.float16)
    logits.copy_(values)
    loss = torch.full((3,), NAN)
    ce.cross_entropy_fwd(logits, target, loss)
    ce.cross_entropy_bwd(logits, target, dloss)
    want_loss, want_grad = run(values, target, dloss)
    assert torch.equal(loss, want_loss)
    assert torch.equal(logits, want_grad)


def test_zero_stride_upstream_gradient():
    logits, target, _ = problem(5, 100, torch.float32)
    expanded = torch.tensor(0.25).expand(5)
    _, grad = run(logits, target, expanded)
    assert torch.equal(grad, run(logits, target, torch.full((5,), 0.25))[1])


def test_ignored_rows_are_exactly_zero_even_where_their_logits_are_not_finite():
    logits, target, dloss = problem(3, 50, torch.float32, ignored=(1,))
    logits[1] = NAN
    loss, grad = run(logits, target, dloss)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert loss[[0, 2]].isfinite().all()


def test_masked_classes_of_minus_infinity_get_no_gradient():
    logits, target, dloss = problem(3, 3000, torch.float32)
    logits[:, :1500] = float("-inf")  # the first blocks hold nothing finite
    target[:] = 2000
    loss, grad = run(logits, target, dloss)
    want_loss, want_grad = truth(logits, target, dloss)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)
    assert (grad[:, :1500] == 0).all()


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_a_target_that_is_no_class_gives_nan_and_reads_nothing_outside(wrong):
    logits, target, dloss = problem(3, 50, torch.float32)
    target[1] = wrong
    loss, grad = run(logits, target, dloss)
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    assert loss[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


def test_reruns_are_bit_identical():
    args = problem(4, 2000, torch.bfloat16)
    first, second = run(*args, z_loss=0.1), run(*args, z_loss=0.1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, ValueError, "int64"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"shape \(4,\)"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "at least one column"),
        ({"logits": torch.zeros(8, 4).t()}, ValueError, "contiguous along the vocabulary"),
        ({"loss": torch.zeros(4, dtype=torch.float16)}, TypeError, "float32"),
        ({"loss": torch.zeros(3)}, ValueError, "loss has shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"logits": torch.zeros(4, 8), "target": torch.zeros(4, dtype=torch.int64), "loss": torch.zeros(4)}
    with pytest.raises(error, match=message):
        ce.cross_entropy_fwd(**{**arguments, **change})

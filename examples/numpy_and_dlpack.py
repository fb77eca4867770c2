"""A budget over NumPy arrays, and over arrays of other libraries through DLPack.

python examples/numpy_and_dlpack.py
"""

import numpy as np
import torch

import gpuckpt


class Elsewhere:
    """An array of some library that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def main() -> None:
    budget = gpuckpt.CheckpointBudget("1MiB", device="cpu", hold="pool")
    x = np.arange(64 * 1024, dtype=np.float32)  # 256 KiB

    saved = budget.save(x)  # copied into the budget's own pool: x may now be overwritten
    print(f"saved a NumPy array: {budget.used_bytes} bytes held, {budget.remaining()} left")
    x[:] = 0
    assert saved.load()[-1] == 64 * 1024 - 1
    saved.free()

    # A step with a backward of its own, checkpointed without autograd; its input lives in the budget until the pullback.
    layer = gpuckpt.Dense(256, 256, "tanh", like=x)
    y, pullback = gpuckpt.vjp_checkpoint(layer, Elsewhere(np.ones((256, 256), np.float32)), budget=budget)
    print(f"between forward and backward: {budget.used_bytes} bytes held")
    gradient = pullback(np.ones_like(y))
    assert gradient.shape == (256, 256)

    # The same budget takes torch tensors; every saved array comes back in the library it came from.
    tensor = budget.save(torch.ones(1000))
    assert isinstance(tensor.load(), torch.Tensor)
    tensor.free()
    assert budget.used_bytes == 0
    print(f"everything freed; the most that was held: {budget.peak_bytes} bytes of {budget.max_bytes}")


if __name__ == "__main__":
    main()

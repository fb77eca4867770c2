"""What happens to tensors that are on a CUDA device, with tensors that say so while their bytes are on the host."""

from __future__ import annotations

import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.memory.adapters.torch import TorchForm
from gpuckpt.pytorch.engine.saved_storage import SavedStorage


class OnGpu(torch.Tensor):
    """A tensor of the host that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def detach(self) -> torch.Tensor:
        return super().detach().as_subclass(torch.Tensor)


@pytest.fixture
def host() -> CheckpointBudget:
    return CheckpointBudget("1MiB", device="cpu", hold="pool")


def on_gpu() -> OnGpu:
    return torch.arange(1024, dtype=torch.uint8).as_subclass(OnGpu)


def test_a_host_block_takes_the_bytes_of_a_cuda_tensor(host):
    holding = SavedStorage(1024)
    assert torch.equal(holding.copy_in(host, on_gpu()), on_gpu().detach())
    assert host.used_bytes == 1024


def test_a_form_writes_a_cuda_tensor_to_the_host(host):
    tensor = on_gpu()
    form = TorchForm(tensor)
    block = host.take(form.nbytes, "spilled")
    form.write(tensor, block)
    assert torch.equal(form.view(block), tensor.detach())


def test_a_cuda_block_is_told_that_it_is_written_whatever_it_is_written_from():
    class Block:
        written_count = 0

        def written(self) -> None:
            self.written_count += 1

    class Form(TorchForm):
        def stored(self, block):
            return torch.zeros(1024, dtype=torch.uint8).as_subclass(OnGpu)

    for source in (torch.ones(1024, dtype=torch.uint8), on_gpu()):
        block = Block()
        Form(source).write(source, block)
        assert block.written_count == 1

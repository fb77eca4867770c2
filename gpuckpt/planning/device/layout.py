"""How a model is laid out over devices: fully sharded, and its matrices split."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from gpuckpt.checks import shown

__all__ = ["ParallelLayout"]


@dataclass(frozen=True)
class ParallelLayout:
    """fsdp: ranks that share weights, gradients and optimizer state, each with a batch of its own (FSDP2's `fully_shard` on every
    block, forward's gathered weights dropped again). tp: ranks that split each block's matrices and work on the same batch. pp:
    ranks of a pipeline, each with as many blocks as any other, which work on micro-batches one after another (1F1B).

    Raises `ValueError` for a count below 1.

    >>> ParallelLayout.parse("fsdp=8,tp=2").devices
    16
    """

    fsdp: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"parallel: {name} is {shown(count)}; expected a count of ranks, 1 or more")

    @property
    def devices(self) -> int:
        return self.fsdp * self.tp * self.pp

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """A layout as a command line has it: "fsdp=8,tp=2". Raises `ValueError` that says what is allowed."""
        if not isinstance(text, str):
            raise TypeError(f"parallel is {shown(text)}; expected a ParallelLayout, or as text 'fsdp=8,tp=2'")
        known = [field.name for field in fields(cls)]
        counts: dict[str, int] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, equals, count = (each.strip() for each in part.partition("="))
            if name not in known or name in counts or not equals or not (count.isascii() and count.isdigit()):
                raise ValueError(
                    f"parallel layout {shown(text)}: expected {'=N,'.join(known)}=N, each at most once; got {shown(part)}"
                )
            counts[name] = int(count)
        return cls(**counts)

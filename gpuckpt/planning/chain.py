"""The chain model: what every stage of a network costs, in bytes and seconds.

A chain is a run of stages in order. Bytes live in *storages*, numbered 0, 1, 2, ...: two holders that name the same
number hold the same bytes, and those are counted once. This is the model of heterogeneous chains of Beaumont, Eyraud-Dubois,
Herrmann, Joly and Shilova, "Optimal checkpointing for heterogeneous chains" (2019), with shared storages added.

What it does not do: it knows no framework and no device. Measuring a model fills these in.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from gpuckpt.checks import check_int, shown
from gpuckpt.errors import InvalidChain
from gpuckpt.planning._checks import KEEP, MOST_BYTES, check_bytes, check_stage, is_int, plain_number
from gpuckpt.planning._json import read_record
from gpuckpt.planning.tables import WIDTH, cut_text, format_seconds, text_table
from gpuckpt.units import format_bytes

__all__ = ["KEEP", "Chain", "Stage", "Variant", "check_chain"]

CHAIN_FORMAT = "gpuckpt.chain/1"

_MOST_ROWS = 40  # of stages that `print(chain)` shows; of more those in the middle are left out
_IDS = ("saves", "spilled", "remade", "remade_later")  # of a variant


@dataclass(frozen=True)
class Variant:
    """Another way to keep a stage: spilled to the host, partly kept and partly recomputed, or fused.

    `saves`: storage ids held in the budget under this option; `forward_s`, `backward_s`: seconds of the stage's forward and
    backward under it, transfers included. `spilled`: ids that go to host memory in its forward and come
    back, into the budget, for its backward; one that others hold in the budget already is held on there instead. `moved_s`: the
    seconds of that, one way, which are part of `forward_s` and of `backward_s`, and overlap other work at a plan's top level.
    `remade`: ids that are made again when its backward begins, and held till that ends or, where there are any `remade_later`,
    till those are made instead; `again_s`: the seconds of both, which are part of `backward_s`.

    >>> Variant("spill", saves=(), forward_s=0.5, backward_s=0.5, spilled=(0, 1)).name
    'spill'
    """

    name: str
    saves: tuple[int, ...]
    forward_s: float
    backward_s: float
    spilled: tuple[int, ...] = ()
    remade: tuple[int, ...] = ()
    again_s: float = 0.0
    moved_s: float = 0.0
    remade_later: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The storages that it names."""
        return *self.saves, *self.spilled, *self.remade, *self.remade_later

    def renamed(self, name: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Variant:
        """The same with other ids."""
        return replace(self, **dict[str, Any]({field: name(getattr(self, field)) for field in _IDS}))


@dataclass(frozen=True)
class Stage:
    """One step of a chain.

    Args:
        name: how reports and errors call it.
        forward_s, backward_s: seconds of one forward and of one backward (the recompute not included).
        tail_s: the part of `forward_s`, under whichever option, that comes after the last tensor autograd saves in it. A
            recompute stops there (early stop), so a frame that ends with this stage is spared it.
        saves: ids of the storages autograd saves in it.
        inputs: ids that a frame starting here holds as its input; `()` when the input is not charged.
        extras: ids of arguments shared with other stages (masks, position embeddings) that every frame containing this
            stage holds.
        output: ids of its output; `()` when the output is not a storage of the chain, and then `output_bytes` alone counts.
        output_bytes: bytes of its output, which are also those of the gradient that comes back through it.
        workspace_bytes: temporaries at the worst moment of its forward or backward, beyond input, output and saves.
        gradients_bytes: what gradients of its parameters add to that worst moment; neither a budget nor a plan counts them.
        again_bytes: what checkpoints inside of it recompute and hold in its backward, at the most, beyond what is held when
            that begins.
        recomputable: False for stages that may only be kept, at top level (a loss, a stage with side effects).
        variants: further ways to keep it.
        input_moved_s: seconds that the input of a frame that starts here takes to the host, or back; None where it stays.
        dropped_in: after how many further stages (0: none) forward drops its result and what it holds: it has no backward.

    >>> block = Stage("block 0", forward_s=1e-3, backward_s=2e-3, saves=(0, 1), inputs=(0,))
    >>> [option.name for option in block.options]
    ['keep']
    """

    name: str
    forward_s: float = 0.0
    backward_s: float = 0.0
    saves: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    extras: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    output_bytes: int = 0
    workspace_bytes: int = 0
    recomputable: bool = True
    variants: tuple[Variant, ...] = ()
    tail_s: float = 0.0
    again_bytes: int = 0
    input_moved_s: float | None = None
    gradients_bytes: int = 0
    dropped_in: int | None = None

    def option(self, name: str) -> Variant:
        """The way to keep this stage called `name`; `KeyError` when it has none of that name."""
        if name == KEEP:
            return Variant(KEEP, self.saves, self.forward_s, self.backward_s)
        return {variant.name: variant for variant in self.variants}[name]

    @property
    def ids(self) -> tuple[Any, ...]:
        """The storages that it names and what it does with them, whatever their sizes."""
        variants = tuple([(v.name, v.saves, v.spilled, v.remade, v.remade_later) for v in self.variants])
        return self.saves, self.inputs, self.extras, self.output, variants

    @property
    def options(self) -> tuple[Variant, ...]:
        """Every way to keep this stage, the plain one first."""
        return (self.option(KEEP), *self.variants)


@dataclass(frozen=True)
class Chain:
    """Stages in order and the bytes of the storages they name. Refuses what cannot be planned with `InvalidChain`.

    `unit_bytes` is the granule of the pool: a storage of `b` bytes is charged `ceil(b / unit_bytes) * unit_bytes`
    (1 on the host, 512 for CuPy's and torch's CUDA pools); an empty storage is free.

    >>> chain = Chain((Stage("a", 1.0, 2.0, (0, 1), (0,)), Stage("b", 1.0, 2.0, (2,), (1,))), (400, 100, 600))
    >>> len(chain), chain.charge((0, 2))
    (2, 1000)
    """

    stages: tuple[Stage, ...]
    storages: tuple[int, ...] = ()
    unit_bytes: int = 1
    name: str = "chain"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidChain(f"a chain's name is {shown(self.name)}; expected a string")
        name = f"chain {shown(self.name)}"
        for field in ("stages", "storages"):
            values = getattr(self, field)
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
                raise InvalidChain(f"{name}: {field} is {shown(values)}; expected a tuple")
            object.__setattr__(self, field, tuple(values))
        if not self.stages:
            raise InvalidChain(f"{name} has no stages; a plan needs at least one")
        if not is_int(self.unit_bytes) or not 1 <= self.unit_bytes <= MOST_BYTES:
            raise InvalidChain(f"{name}: unit_bytes is {shown(self.unit_bytes)}; expected an int from 1 to 2^60")
        for i, size in enumerate(self.storages):
            check_bytes(size, f"{name}: storages: {i}")
        if sum(self.footprints) > MOST_BYTES:
            raise InvalidChain(
                f"{name}: storages of {sum(self.footprints)} bytes in all, in units; expected at most 2^60"
            )
        for i, stage in enumerate(self.stages):
            if not isinstance(stage, Stage):
                raise InvalidChain(f"{name}: stages: {i} is {shown(stage)}; expected a Stage")
            try:
                check_stage(stage, len(self.storages))
            except InvalidChain as error:
                raise InvalidChain(f"{name}: stage {i} ({shown(stage.name)}): {error}") from None

    def __len__(self) -> int:
        return len(self.stages)

    def __repr__(self) -> str:
        return f"Chain({self.name!r}, {len(self)} stages, {len(self.storages)} storages)"

    def __str__(self) -> str:
        """A table of the stages: bytes saved, bytes of the input a frame would hold, seconds, further options."""
        rows = [("", "stage", "saves", "input", "forward", "backward", "also")]
        for number, stage in enumerate(self.stages):
            names = [each.name for each in stage.variants] if stage.recomputable else ["kept always"]
            also = f"{names[0]}, ... ({len(names)})" if len(names) > 2 else ", ".join(names)
            rows.append(
                (
                    str(number),
                    cut_text(stage.name, 22),
                    format_bytes(self.charge(stage.saves)),
                    format_bytes(self.charge(stage.inputs)),
                    format_seconds(stage.forward_s),
                    format_seconds(stage.backward_s),
                    also,
                )
            )
        step_s = sum(stage.forward_s + stage.backward_s for stage in self.stages)
        lines = text_table(rows, (True, False, True, True, True, True, False), most_rows=_MOST_ROWS)
        summary = (
            f"{self.name}: {len(self)} stages that save {format_bytes(self.saved_bytes)}, step {format_seconds(step_s)}"
        )
        return "\n".join(cut_text(line, WIDTH) for line in (summary, *lines))

    @cached_property
    def footprints(self) -> tuple[int, ...]:
        """Bytes each storage is charged, its size rounded up to the unit."""
        return tuple(-(-size // self.unit_bytes) * self.unit_bytes for size in self.storages)

    def charge(self, ids: Sequence[int]) -> int:
        """Bytes that holding `ids` charges, each id once."""
        try:
            return sum([self.footprints[i] for i in set(ids)])
        except (IndexError, TypeError, ValueError):
            last = len(self.storages) - 1
            raise ValueError(f"ids is {shown(ids)}; chain {shown(self.name)} has storages 0..{last}") from None

    @cached_property
    def blocks(self) -> frozenset[int]:
        """Numbers of the stages that can be recomputed."""
        return frozenset(i for i, stage in enumerate(self.stages) if stage.recomputable)

    @property
    def saved_bytes(self) -> int:
        """Bytes that keeping every stage holds at the end of forward."""
        return self.charge([number for stage in self.stages for number in stage.saves])

    def frame_holds(self, first: int, last: int) -> tuple[int, ...]:
        """Ids that a frame over stages `first..last` holds: its input and the extras of all its stages, each once."""
        return tuple(dict.fromkeys([*self.extras_of(first, last), *self.stages[first].inputs]))

    def extras_of(self, first: int, last: int) -> tuple[int, ...]:
        """Ids of the extras of stages `first..last`, each once."""
        if not (type(first) is type(last) is int and 0 <= first <= last < len(self.stages)):
            self._check_range(first, last)
        held: dict[int, None] = {}
        for extras, users in self._users_of_extras.items():
            following = bisect_left(users, first)
            if following < len(users) and users[following] <= last:
                held.update(dict.fromkeys(extras))
        return tuple(held)

    @cached_property
    def made_extras(self) -> dict[int, int]:
        """Extras that a stage of the chain makes for a later one, past its neighbour (a skip, an entry of a cache): id and maker.

        Whoever holds such an extra holds what forward made. When its maker runs again it makes another of the same size.
        """
        maker: dict[int, int] = {}
        made: dict[int, int] = {}
        for number, stage in enumerate(self.stages):
            made.update((i, maker[i]) for i in stage.extras if maker.get(i, -1) >= 0)
            for i in (*stage.inputs, *stage.extras):
                maker.setdefault(i, -1)
            for i in (*stage.output, *stage.saves, *(i for v in stage.variants for i in v.ids)):
                maker.setdefault(i, number)
        return made

    @cached_property
    def _users_of_extras(self) -> dict[tuple[int, ...], list[int]]:
        # Blocks usually share one set of extras: asking the sets, not the stages, keeps deep plans linear.
        users: dict[tuple[int, ...], list[int]] = {}
        for i, stage in enumerate(self.stages):
            if stage.extras:
                users.setdefault(stage.extras, []).append(i)
        return users

    def running_bytes(self, stage: int, held: Container[int] = ()) -> int:
        """Bytes of a running stage's input and output, but for those in `held`.

        An output that is no storage of the chain counts with its stage's `output_bytes`.
        """
        if type(stage) is not int or not 0 <= stage < len(self.stages):
            check_int(stage, "stage", 0, len(self) - 1)
        now, before = self.stages[stage], self.stages[stage - 1] if stage else None
        ids, untracked_bytes = {*now.inputs, *now.output}, 0 if now.output else now.output_bytes
        if before is not None:
            ids.update(before.output)
            if not before.output and not now.inputs:
                untracked_bytes += before.output_bytes
        try:
            return untracked_bytes + sum([self.footprints[i] for i in ids if i not in held])
        except (TypeError, ValueError):
            raise TypeError(f"held is {shown(held)}; expected a container of ids") from None

    def part(self, first: int, last: int) -> Chain:
        """Stages `first..last` as a chain of their own, over the same storages."""
        self._check_range(first, last)
        return replace(self, stages=self.stages[first : last + 1], name=f"{self.name}[{first}..{last}]")

    def _check_range(self, first: int, last: int) -> None:
        """Raise `TypeError` or `ValueError` unless stages `first..last` are some of this chain's."""
        check_int(first, "first", 0, len(self) - 1)
        check_int(last, "last", first, len(self) - 1)

    def with_unit(self, unit_bytes: int) -> Chain:
        """The same chain, charged in granules of `unit_bytes`."""
        return replace(self, unit_bytes=unit_bytes)

    @cached_property
    def _fingerprint(self) -> str:
        record = [CHAIN_FORMAT, self.unit_bytes, self.storages]
        for s in self.stages:
            variants = [(v.name, v.saves, v.spilled, *filter(None, (v.remade, v.remade_later))) for v in s.variants]
            record.append([s.name, s.saves, s.inputs, s.extras, s.output, s.output_bytes, s.recomputable, variants])
            record += [s.again_bytes] * bool(s.again_bytes) + [["dropped", s.dropped_in]] * (s.dropped_in is not None)
        return hashlib.sha256(json.dumps(record, separators=(",", ":"), default=plain_number).encode()).hexdigest()[:32]

    def fingerprint(self) -> str:
        """32 hex digits of everything that decides bytes: names, storages, unit, options.

        Seconds and workspace are left out: they change from one measurement to the next, and a plan stays valid.
        """
        return self._fingerprint

    def to_json(self) -> str:
        """The chain as JSON text."""
        record = {"format": CHAIN_FORMAT, "name": self.name, "unit_bytes": self.unit_bytes, "storages": self.storages}
        return json.dumps({**record, "stages": [asdict(stage) for stage in self.stages]}, default=plain_number)

    @classmethod
    def from_json(cls, text: str) -> Chain:
        """A chain out of `to_json`'s text; `InvalidChain` names what is wrong with it."""
        record = read_record(text, CHAIN_FORMAT, "chain", InvalidChain)
        try:
            stages = tuple(_stage_from(fields) for fields in record["stages"])
            return cls(stages, tuple(record["storages"]), record["unit_bytes"], record["name"])
        except InvalidChain:
            raise
        except KeyError as error:
            raise InvalidChain(f"the chain file has no {error.args[0]!r}") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidChain(f"the chain file is damaged: {cut_text(str(error), 200)}") from None


def check_chain(value: object) -> None:
    """Raise `TypeError` for what is no chain."""
    if not isinstance(value, Chain):
        raise TypeError(f"chain is {shown(value)}; expected a Chain, as `measure` and `Chain.from_json` give")


def _stage_from(fields: Mapping[str, Any]) -> Stage:
    known = {**fields, **{key: tuple(fields.get(key, ())) for key in ("saves", "inputs", "extras", "output")}}
    known["variants"] = tuple(
        Variant(**{**v, **{key: tuple(v[key]) for key in _IDS if key in v}}) for v in known.get("variants", ())
    )
    return Stage(**known)

"""What a plan sends to the host at its top level, and the one link that copies it: see the rules in `simulate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

__all__ = ["HostBytes", "Traffic", "Transfer"]


@dataclass(frozen=True)
class Transfer:
    """One copy. Seconds count from the beginning of the step.

    `what`: the stage, or stages of a frame, whose `nbytes` move, of which `stage` is the first; `direction`: "out" to the host,
    "back" to the device; `asked_s`: when all that it copies was there; `began_s`, `done_s`: when the link had it;
    `queued_behind`: the number of the copy that kept it waiting, or None; `waited_s`: how long the step stood still for it.
    """

    stage: int
    what: str
    direction: str
    nbytes: int
    asked_s: float
    began_s: float
    done_s: float
    queued_behind: int | None
    waited_s: float = 0.0


class HostBytes:
    """Bytes on the host, where a storage takes no more than its size."""

    def __init__(self, storages: tuple[int, ...]) -> None:
        self.storages = storages
        self.holders: dict[int, int] = {}
        self.held_bytes = self.peak_bytes = 0

    def hold(self, ids: tuple[int, ...]) -> None:
        for i in ids:
            holders = self.holders.get(i, 0)
            self.held_bytes += 0 if holders else self.storages[i]
            self.holders[i] = holders + 1
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def release(self, ids: tuple[int, ...]) -> None:
        for i in ids:
            self.holders[i] -= 1
            self.held_bytes -= 0 if self.holders[i] else self.storages[i]


class SimulatedStep(Protocol):
    """The simulated step, as its traffic knows it. `step_s`: the time; `holders`: how many hold each storage here."""

    step_s: float
    holders: list[int]
    host: HostBytes

    def hold(self, ids: tuple[int, ...]) -> None: ...

    def release(self, ids: tuple[int, ...]) -> None: ...

    def record(self, label: str) -> None: ...


@dataclass(slots=True)
class Offloaded:
    """What a node of the top level sends to the host: `here`, ids that were held already, and `away`, of `nbytes`, which take
    `seconds` one way. `left`: they were let go; `coming`: they are held again. `copy`: the latest one's number on the link."""

    stage: int
    here: tuple[int, ...]
    away: tuple[int, ...]
    nbytes: int
    seconds: float
    what: str
    copy: int = -1
    left: bool = False
    coming: bool = False


class Traffic:
    """The offloads of one step and the copies that it takes."""

    def __init__(self, step: SimulatedStep) -> None:
        self.finished: Offloaded | None = None  # to be copied out when the next stage starts
        self._step = step
        self._copies: list[Transfer] = []
        self._waited_s: list[float] = []
        self._leaving: list[Offloaded] = []  # to be let go
        self._waiting: dict[int, Offloaded] = {}  # by node of the top level, in forward order
        self._reached: dict[int, Offloaded] = {}  # those whose backward has begun

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """The copies, in the order in which they were asked for."""
        return tuple(replace(copy, waited_s=s) for copy, s in zip(self._copies, self._waited_s, strict=True))

    def offload(self, node: int, stage: int, ids: tuple[int, ...], seconds: float, what: str) -> Offloaded:
        """What of `ids`, which take the link `seconds` one way, a node that starts with `stage` sends to the host. All is held
        here until it is out."""
        step, ids = self._step, tuple(dict.fromkeys(ids))
        here = tuple(i for i in ids if step.holders[i])
        away = tuple(i for i in ids if not step.holders[i])
        nbytes, all_bytes = (sum(step.host.storages[i] for i in some) for some in (away, ids))
        found = Offloaded(stage, here, away, nbytes, seconds * nbytes / all_bytes if all_bytes else 0.0, what)
        self._waiting[node] = found
        step.hold(ids)
        step.host.hold(away)
        return found

    def start_stage(self, *, last: bool, sends: bool) -> None:
        """A stage of the top level starts: what the stage before saved is sent. Before that, before the `last` stage that can be
        recomputed, and before a frame that `sends` its input, what is out is let go."""
        for each in self._leaving if last or sends or self.finished is not None else ():
            self._wait(each.copy)
            self._step.release(each.away)
            each.left = True
        self._leaving = [each for each in self._leaving if not each.left]
        if self.finished is not None:
            self.copy_out(self.finished)
            self.finished = None

    def copy_out(self, each: Offloaded) -> None:
        """Ask for a copy on the host; what it is of is let go before the next one, or before the last stage."""
        if each.away:
            each.copy = self._ask(each, "out")
            self._leaving.append(each)

    def reach(self, node: int, *, after: int) -> None:
        """Backward reaches a node: what it offloaded comes back, and what is offloaded next before it is asked for, if it has
        offloaded anything itself, or else if that begins with stage number `after` or a later one."""
        own = self._waiting.get(node)
        if own is not None and own.left:
            self._bring_back(own)
            self._wait(own.copy)
        while self._waiting and (latest := next(reversed(self._waiting))) >= node:
            self._reached[latest] = self._waiting.pop(latest)
        for each in reversed(self._waiting.values()):
            if each.away:
                if each.stage >= after or (own is not None and own.away):
                    self._bring_back(each)
                break

    def forget(self, node: int) -> None:
        """The backward of a node is done: what it offloaded is held nowhere any more."""
        if (each := self._reached.pop(node, None)) is not None:
            self._step.release((*each.here, *each.away))
            self._step.host.release(each.away)

    def _bring_back(self, each: Offloaded) -> None:
        if each.left and not each.coming:
            each.coming = True
            self._step.hold(each.away)
            each.copy = self._ask(each, "back")
            self._step.record(f"bring back {each.what}")

    def _ask(self, each: Offloaded, direction: str) -> int:
        now_s, free_s = self._step.step_s, self._copies[-1].done_s if self._copies else 0.0
        began_s = max(now_s, free_s)
        behind = len(self._copies) - 1 if free_s > now_s else None
        done_s = began_s + each.seconds
        self._copies.append(Transfer(each.stage, each.what, direction, each.nbytes, now_s, began_s, done_s, behind))
        self._waited_s.append(0.0)
        return len(self._copies) - 1

    def _wait(self, number: int) -> None:
        done_s = max(self._step.step_s, self._copies[number].done_s)
        self._waited_s[number] += done_s - self._step.step_s
        self._step.step_s = done_s

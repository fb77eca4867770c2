"""What a compiled kernel does, read from its machine code (SASS as `cuobjdump -sass` prints it).

Counts instructions by kind and finds the loops that run on the tensor cores. Loops are the natural loops of the control
flow graph (a back edge whose target dominates its source; Aho, Lam, Sethi and Ullman, section 9.6), not address ranges:
ptxas moves the slow half of a barrier wait behind the kernel and jumps back, which looks like a loop and is none.

Pure text analysis: needs no CUDA, no Triton and no GPU. It does not follow indirect branches (BRX), which warp-specialised
code contains: where there is one, every block that nothing else reaches counts as an entry of its own.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Instruction", "Loop", "SassReport", "analyse", "k_loops", "parse"]

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);", re.MULTILINE)
_SCHEDULING = re.compile(r"\s+[&?][A-Za-z].*$")  # `&req={4} ?WAIT15_END_GROUP`, printed for sm_120 by CUDA 12.8's tool
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)\s*$")

TENSOR_CORE = frozenset({"HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "BGMMA"})
UTC_MMA = re.compile(r"^UTC[A-Z]*MMA$")  # Blackwell: UTCHMMA (16-bit), UTCQMMA (8-bit), UTCIMMA, UTCOMMA (4-bit)
GLOBAL_ATOMICS = frozenset({"ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "UBLKRED", "SUATOM", "SURED"})
SHARED_ATOMICS = frozenset({"ATOMS", "REDS"})
SPILLS = frozenset({"STL", "LDL"})
GLOBAL_STORES = frozenset({"STG", "UTMASTG", "UBLKCP"})
GLOBAL_LOADS = frozenset({"LDG"})
TMA_LOADS = frozenset({"UTMALDG"})
ASYNC_COPIES = frozenset({"LDGSTS"})


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. `op` is the name up to the first dot; `guard` the predicate or None."""

    address: int
    guard: str | None
    opcode: str
    operands: str

    @functools.cached_property  # asked for a dozen times, of ten thousand instructions
    def op(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def is_tensor_core(self) -> bool:
        return self.op in TENSOR_CORE or UTC_MMA.match(self.op) is not None


@dataclass(frozen=True)
class Loop:
    """An innermost loop that runs on the tensor cores; all counts are static instructions in its body."""

    address: int
    instructions: int
    tensor_core: int
    tma_loads: int
    async_copies: int
    global_loads: int
    spills: int


@dataclass(frozen=True)
class SassReport:
    """Counts over the whole kernel, and its tensor-core loops in address order."""

    instructions: int
    spill_stores: int
    spill_loads: int
    tensor_core: dict[str, int]
    tma_loads: int
    async_copies: int
    global_loads: int
    global_stores: int
    global_atomics: int
    shared_atomics: int
    loops: list[Loop] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """Instructions of the first function in `cuobjdump -sass` output, in address order."""
    found: list[Instruction] = []
    for match in _LINE.finditer(text):
        address = int(match[1], 16)
        if found and address <= found[-1].address:
            break  # a second function starts again at zero
        found.append(Instruction(address, match[2], match[3], _SCHEDULING.sub("", match[4]).strip()))
    return found


def analyse(text: str) -> SassReport:
    """Read one kernel's SASS. Raises `ValueError` where the text holds no instruction."""
    code = parse(text)
    if not code:
        raise ValueError("no SASS instruction found: expected the output of `cuobjdump -sass` on a cubin")
    counts = Counter(i.op for i in code)

    def total(names: frozenset[str]) -> int:
        return sum(counts[n] for n in names)

    return SassReport(
        instructions=len(code),
        spill_stores=counts["STL"],
        spill_loads=counts["LDL"],
        tensor_core=dict(sorted(Counter(i.op for i in code if i.is_tensor_core).items())),
        tma_loads=total(TMA_LOADS),
        async_copies=total(ASYNC_COPIES),
        global_loads=total(GLOBAL_LOADS),
        global_stores=total(GLOBAL_STORES),
        global_atomics=total(GLOBAL_ATOMICS),
        shared_atomics=total(SHARED_ATOMICS),
        loops=_tensor_core_loops(code),
    )


def _target(instruction: Instruction) -> int | None:
    match = _ADDRESS.search(instruction.operands)
    return int(match[1], 16) if match else None


def _successors(code: list[Instruction]) -> list[list[int]]:
    """Indices that may run after each instruction."""
    index = {i.address: n for n, i in enumerate(code)}
    # BSSY Bk, target: where threads meet again after a BSYNC Bk. One register serves many: a BSYNC belongs to the last BSSY
    # before it, and an edge to another one's target would lead into a loop from outside and hide it.
    meeting: dict[str, list[tuple[int, int]]] = {}
    for n, i in enumerate(code):
        target = _target(i)
        if i.op == "BSSY" and target in index:
            meeting.setdefault(i.operands.split(",")[0].strip(), []).append((n, index[target]))
    result: list[list[int]] = []
    for n, i in enumerate(code):
        after = [n + 1] if n + 1 < len(code) else []
        conditional = i.guard is not None
        if i.op in ("BRA", "JMP", "BRX", "JMX", "RET"):
            target = _target(i)
            # `BRA.U UP0, 0x40` carries its condition as an operand; `BRA 0x40` has none.
            conditional = conditional or (i.op == "BRA" and "," in i.operands)
            jump = [index[target]] if target in index and i.op in ("BRA", "JMP") else []
            after = jump + (after if conditional else [])
        elif i.op == "EXIT":
            after = after if conditional else []
        elif i.op == "BSYNC":
            open_ones = [to for start, to in meeting.get(i.operands.strip(), []) if start < n < to]
            after = after + open_ones[-1:]
        result.append(after)
    return result


def _blocks(code: list[Instruction], after: list[list[int]]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instruction indices, and their successors."""
    index = {i.address: n for n, i in enumerate(code)}
    leaders = {0, *(index[t] for t in (_target(i) for i in code if i.op == "CALL") if t in index)}
    for n, nexts in enumerate(after):
        if nexts != [n + 1]:
            leaders.update(nexts)
            if n + 1 < len(code):
                leaders.add(n + 1)
    starts = sorted(leaders)
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {b.start: k for k, b in enumerate(blocks)}
    return blocks, [sorted({number[s] for s in after[b.stop - 1]}) for b in blocks]


def _entries(code: list[Instruction], blocks: list[range]) -> list[int]:
    """Blocks where execution may begin: the kernel's first, and those that calls lead to."""
    number = {code[b.start].address: k for k, b in enumerate(blocks)}
    called = {_target(i) for i in code if i.op == "CALL"}
    return [0, *sorted(number[t] for t in called if t in number and number[t] != 0)]


def _dominators(successors: list[list[int]], entries: list[int], all_live: bool) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey and Kennedy 2001) of the blocks that can run.

    A virtual root, numbered len(successors), leads to the entries, and with `all_live` to whatever they do not reach; without
    it such blocks are padding and left out, since an edge from them would hide a loop.
    """
    root = len(successors)
    edges: list[list[int]] = [*successors, []]
    order: list[int] = []
    seen: set[int] = set()
    for start in [*entries, *(range(root) if all_live else [])]:
        if start in seen:
            continue
        edges[root].append(start)
        seen.add(start)
        stack = [(start, iter(edges[start]))]
        while stack:
            node, rest = stack[-1]
            step = next((s for s in rest if s not in seen), None)
            if step is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(edges[step])))
    # An entry that another entry reaches can begin on its own all the same.
    edges[root] = list(dict.fromkeys([*edges[root], *entries]))
    order.append(root)
    position = {b: k for k, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for node in order:
        for s in edges[node]:
            before[s].append(node)
    parent: dict[int, int] = {root: root}

    def meet(a: int, b: int) -> int:
        while a != b:
            if position[a] < position[b]:
                a = parent[a]
            else:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [p for p in before[node] if p in parent]
            best = known[0]
            for p in known[1:]:
                best = meet(best, p)
            if parent.get(node) != best:
                parent[node] = best
                changed = True
    return parent


def _natural_loops(successors: list[list[int]], parent: dict[int, int]) -> dict[int, set[int]]:
    """Header block -> all blocks of its natural loop (loops that share a header are one)."""
    root = len(successors)
    live = [b for b in range(root) if b in parent]
    before: dict[int, list[int]] = {b: [] for b in live}
    for node in live:
        for s in successors[node]:
            before[s].append(node)

    def dominates(a: int, b: int) -> bool:
        while b != root:
            if a == b:
                return True
            b = parent[b]
        return False

    loops: dict[int, set[int]] = {}
    for node in live:
        for header in successors[node]:
            if dominates(header, node):
                body = loops.setdefault(header, {header})
                stack = [node]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack.extend(before[block])
    return loops


def k_loops(code: list[Instruction]) -> list[set[int]]:
    """The innermost loops that multiply, in the order of their addresses, as indices of instructions: those with tensor cores in
    them, or where a kernel uses none, those with multiply-adds."""
    multiplies = {n for n, i in enumerate(code) if i.is_tensor_core}
    multiplies = multiplies or {n for n, i in enumerate(code) if i.op == "FFMA"}
    blocks, successors = _blocks(code, _successors(code))
    indirect = any(i.op in ("BRX", "JMX") for i in code)
    parent = _dominators(successors, _entries(code, blocks), indirect)
    bodies = [{n for block in body for n in blocks[block]} for body in _natural_loops(successors, parent).values()]
    bodies = [body for body in bodies if body & multiplies]
    return sorted((b for b in bodies if not any(other < b for other in bodies)), key=min)


def _tensor_core_loops(code: list[Instruction]) -> list[Loop]:
    if not any(i.is_tensor_core for i in code):
        return []
    found = []
    for body in k_loops(code):
        ops = Counter(code[n].op for n in body)
        found.append(
            Loop(
                address=code[min(body)].address,
                instructions=len(body),
                tensor_core=sum(code[n].is_tensor_core for n in body),
                tma_loads=sum(ops[n] for n in TMA_LOADS),
                async_copies=sum(ops[n] for n in ASYNC_COPIES),
                global_loads=sum(ops[n] for n in GLOBAL_LOADS),
                spills=sum(ops[n] for n in SPILLS),
            )
        )
    return found

"""Plan without a model: a chain of costs as a JSON file in, a plan and its frontier out. Needs neither torch nor a GPU.

python examples/plan_without_a_model.py
"""

import tempfile
from pathlib import Path

from gpuckpt.planning import Chain, Plan, Stage, plan_chain, plan_frontier

MIB = 2**20


def blocks(count: int) -> Chain:
    """Equal blocks: each saves its input of 16 MiB and 120 MiB of its own, and takes 2 ms forward, 4 ms backward."""
    stages = tuple(
        Stage(f"block{i}", 0.002, 0.004, saves=(i, count + i), inputs=(i,), output=(i + 1,) if i + 1 < count else ())
        for i in range(count)
    )
    return Chain(stages, (16 * MIB,) * count + (120 * MIB,) * count, unit_bytes=512, name="twelve blocks")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chain.json"
        file.write_text(blocks(12).to_json())

        chain = Chain.from_json(file.read_text())
        plan = plan_chain(chain, 600 * MIB)
        print(plan)
        assert plan.certificate.peak_bytes <= 600 * MIB

        # A plan is a file too. It belongs to one chain and refuses others.
        file.write_text(plan.to_json())
        assert Plan.from_json(file.read_text(), chain) == plan

    for peak_bytes, step_s in plan_frontier(chain, 6).points:
        print(f"{peak_bytes / MIB:7.0f} MiB: {1e3 * step_s:.1f} ms a step")


if __name__ == "__main__":
    main()

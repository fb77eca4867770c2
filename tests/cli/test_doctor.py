"""`gpuckpt doctor` and `gpuckpt audit`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys


def gpuckpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuckpt.cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_doctor_tells_packages_devices_and_what_is_not_capped():
    done = gpuckpt("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "triton", "cupy", "cpu", "what no budget caps", "optimizer state", "process, resident"):
        assert word in done.stdout
    found = json.loads(gpuckpt("doctor", "--json").stdout)
    assert found["packages"]["torch"]["version"]
    assert found["devices"][0]["name"] == "cpu"
    resident = next(row for row in found["uncapped"] if row["name"] == "process, resident")
    assert resident["nbytes"] > 2**20


def test_audit_refuses_an_unknown_architecture():
    done = gpuckpt("audit", "--arch", "sm_1")
    assert done.returncode == 2
    assert "sm_1" in done.stderr

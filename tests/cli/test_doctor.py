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


def test_doctor_does_without_torch_and_answers_soon():
    code = (
        "import sys, time, gpuckpt.cli.app as app\n"
        "sys.argv = ['gpuckpt', 'doctor']\n"
        "try: app.main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded, seconds = done.stderr.split()[-2:]
    assert loaded == "False"
    assert float(seconds) < 2.0, "of processor time: the machine may be busy"


class Driver:
    """Two GPUs, as CUDA's driver names them."""

    names = (b"NVIDIA A", b"NVIDIA B")

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 10 + index

    def cuDeviceGetName(self, name, size, device):
        name.value = self.names[device.value - 10]

    def cuDeviceTotalMem_v2(self, nbytes, device):
        nbytes._obj.value = 80 << 30

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: device.value - 1, 76: 0}[attribute]


def test_the_gpus_are_those_of_the_driver(monkeypatch):
    from gpuckpt.cli import doctor

    assert doctor._gpus(Driver()) == [
        {"name": "cuda:0", "description": "NVIDIA A, sm_90", "memory_bytes": 80 << 30},
        {"name": "cuda:1", "description": "NVIDIA B, sm_100", "memory_bytes": 80 << 30},
    ]
    broken = Driver()
    broken.cuInit = lambda flags: 100  # no device
    assert doctor._gpus(broken) == []
    monkeypatch.setattr(doctor, "_gpus", lambda: [{"name": "cuda:0", "description": "x", "memory_bytes": 1}])
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else version(name))
    assert "built without CUDA" in doctor.examine()["packages"]["torch"]["advice"]


def test_a_package_that_is_missing_is_named_with_what_to_type():
    from gpuckpt.cli.doctor import _package

    found = _package("no_such_package", "pip install it")
    assert found == {"version": None, "advice": "pip install it", "error": "No module named 'no_such_package'"}


def test_audit_refuses_an_unknown_architecture():
    done = gpuckpt("audit", "--arch", "sm_1")
    assert done.returncode == 2
    assert "sm_1" in done.stderr

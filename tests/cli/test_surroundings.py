"""The command line in unfriendly surroundings: outputs that are closed or full, no home, two at a time, signals at any moment."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpuckpt
from gpuckpt.planning import Chain, Plan, Stage
from gpuckpt.report.files import whole_file, write_whole

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, /proc and signals as Linux has them")

HOME = Path(gpuckpt.__file__).parent.parent


def chain_of(count: int = 40, name: str = "chain") -> Chain:
    return Chain(
        tuple(Stage(f"s{i}", 1.0, 2.0, saves=(i,), inputs=(i - 1,) if i else ()) for i in range(count)),
        tuple(100 + i for i in range(count)),
        name=name,
    )


@pytest.fixture
def chain_file(tmp_path):
    path = tmp_path / "chain.json"
    path.write_text(chain_of().to_json())
    return path


def command(chain_file, *more, budget="2000", out):
    return [
        sys.executable,
        "-m",
        "gpuckpt.cli.app",
        "plan",
        str(chain_file),
        "--budget",
        budget,
        "--out",
        str(out),
        *more,
    ]


def run(words, env=None, **options):
    environment = {**os.environ, "PYTHONPATH": str(HOME), **(env or {})}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(words, env=environment, timeout=200, check=False, **{"capture_output": True, **options})


def check_files(out: Path, names=("chain.json", "plan.json", "report.json", "frontier.svg")) -> None:
    """All are there and whole, and nothing else is."""
    assert sorted(os.listdir(out)) == sorted(names)
    Plan.from_json((out / "plan.json").read_text(), Chain.from_json((out / "chain.json").read_text()))
    json.loads((out / "report.json").read_text())
    assert (out / "frontier.svg").read_text().rstrip().endswith("</svg>")


def one_line(stderr: bytes) -> bool:
    return len(stderr.decode().strip().splitlines()) == 1 and stderr.startswith(b"gpuckpt: ")


# ---- where it prints to


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_stream_that_is_closed(chain_file, tmp_path, closed, json_flag):
    words = command(chain_file, *json_flag, out=tmp_path / "out")
    found = run(["sh", "-c", f'"$@" {closed}', "sh", *words])
    assert found.returncode == 0, found.stderr
    assert b"Traceback" not in found.stderr
    check_files(tmp_path / "out")


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_full_device_is_told_of(chain_file, tmp_path, json_flag):
    with open("/dev/full", "w") as full:
        found = run(command(chain_file, *json_flag, out=tmp_path / "out"), capture_output=False, stdout=full, stderr=-1)
    assert found.returncode == 2
    assert found.stderr.decode().strip().splitlines()[-1] == "gpuckpt: [Errno 28] No space left on device"
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


def test_a_reader_that_goes_away_is_no_traceback(chain_file, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    found = run(command(chain_file, out=tmp_path / "out"), capture_output=False, stdout=writing, stderr=-1)
    os.close(writing)
    assert found.returncode != 0
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"COLUMNS": "40"},
        {"COLUMNS": "1"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb", "NO_COLOR": "1"},
    ],
    ids=["40 columns", "1 column", "LANG=C", "ascii", "dumb"],
)
@pytest.mark.parametrize(
    "name", ["chain", "Netz ä\u5b57 $a_b$ $\\frac <b>&amp;</b> \x00\x1b[31m \ud800"], ids=["plain", "odd"]
)
def test_narrow_terminals_other_encodings_and_odd_names(tmp_path, env, name):
    (tmp_path / "c.json").write_text(chain_of(name=name).to_json())
    found = run(command(tmp_path / "c.json", out=tmp_path / "out"), env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    check_files(tmp_path / "out")
    assert Chain.from_json((tmp_path / "out" / "chain.json").read_text()).name == name
    assert "<b>" not in (tmp_path / "out" / "frontier.svg").read_text()


def test_python_in_development_mode_with_warnings_as_errors(chain_file, tmp_path):
    words = command(chain_file, out=tmp_path / "out")
    found = run([words[0], "-X", "dev", "-W", "error", *words[1:]])
    assert found.returncode == 0, found.stderr[-2000:]
    assert b"Warning" not in found.stderr


# ---- what it reads and writes


@pytest.mark.parametrize(
    ("chain", "out"),
    [
        ("chain.json", "chain.json"),  # a file where the folder should be
        ("chain.json", "/proc/none"),
        (".", "out"),
        ("nothing.json", "out"),
        ("binary", "out"),
        ("empty", "out"),
    ],
)
def test_files_that_are_none_end_in_one_line(chain_file, tmp_path, chain, out):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    found = run(command(tmp_path / chain, out=tmp_path / out, budget="2000"))
    assert found.returncode == 2
    assert one_line(found.stderr.splitlines(keepends=True)[-1])
    assert b"Traceback" not in found.stderr


def test_two_processes_that_write_one_folder(tmp_path):
    """Whoever is last has the last word, file by file; none is a mixture."""
    words = []
    for number, count in enumerate((40, 41)):
        path = tmp_path / f"{number}.json"
        path.write_text(chain_of(count, name=f"chain {number}").to_json())
        words.append(command(path, out=tmp_path / "out", budget="3000"))
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    both = [subprocess.Popen(w, env=environment, stdout=-3, stderr=-3) for w in words]
    assert [each.wait(timeout=200) for each in both] == [0, 0]
    assert sorted(os.listdir(tmp_path / "out")) == ["chain.json", "frontier.svg", "plan.json", "report.json"]
    Chain.from_json((tmp_path / "out" / "chain.json").read_text())
    Plan.from_json((tmp_path / "out" / "plan.json").read_text())


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, "before")

    class Stop(BaseException):
        pass

    def write_half() -> None:
        with whole_file(path) as name:
            name.write_text("hal")
            raise Stop

    with pytest.raises(Stop):
        write_half()
    assert (path.read_text(), os.listdir(tmp_path)) == ("before", ["report.json"])
    (tmp_path / "link.json").symlink_to(path)
    write_whole(tmp_path / "link.json", "after")
    assert (path.read_text(), (tmp_path / "link.json").is_symlink()) == ("after", True)
    write_whole("/dev/null", "nothing")
    assert Path("/dev/null").is_char_device()


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, "before")
    code = (
        "import resource, sys; from gpuckpt.report.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_whole(sys.argv[1], 'x' * 5000)"
    )
    found = run([sys.executable, "-c", code, str(path)])
    assert b"OSError" in found.stderr
    assert (path.read_text(), os.listdir(tmp_path)) == ("before", ["report.json"])


# ---- signals


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_whole_files_or_none(chain_file, tmp_path, kind):
    end_signal(chain_file, tmp_path, kind, 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_three_hundred_signals_at_any_moment(chain_file, tmp_path, kind):
    end_signal(chain_file, tmp_path, kind, 300)


def end_signal(chain_file, tmp_path, kind, rounds):
    words = command(chain_file, out=tmp_path / "out", budget="2000")
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    began = time.monotonic()
    subprocess.run(words, env=environment, check=True, stdout=-3, stderr=-3)
    whole_s = time.monotonic() - began
    draw, ended = random.Random(0), 0
    for _ in range(rounds):
        shutil.rmtree(tmp_path / "out")
        process = subprocess.Popen(words, env=environment, stdout=-3, stderr=-3)
        time.sleep(draw.uniform(0, whole_s))
        process.send_signal(kind)
        ended += process.wait(timeout=100) != 0
        (tmp_path / "out").mkdir(exist_ok=True)
        for path in (tmp_path / "out").iterdir():
            assert not path.name.startswith("."), "half a file was left"
            if path.suffix == ".json":
                json.loads(path.read_text())
    print(f"\n{rounds} times {kind.name} within {whole_s:.1f} s: {ended} runs ended early, 0 files in half")
    assert ended


# ---- where it lives


SOLVE = """
import sys
from gpuckpt.planning import Chain, Stage, plan_chain
chain = Chain(tuple(Stage(f"s{i}", 1.0, 2.0, saves=(i,), inputs=(i - 1,) if i else ()) for i in range(12)), (100,) * 12)
plan = plan_chain(chain, 500, engine="numba")
assert plan.certificate.peak_bytes <= 500
print(sys.modules["gpuckpt"].__file__)
"""


@pytest.fixture(scope="module")
def read_only_package(tmp_path_factory):
    """A copy of the package whose cache folders are files: even root writes nothing there."""
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(HOME / "gpuckpt", place / "gpuckpt", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [place / "gpuckpt", *(path for path in (place / "gpuckpt").rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")
    return place


@pytest.mark.parametrize("home", ["writable", "missing", "a file", None])
def test_a_package_folder_that_cannot_be_written(read_only_package, tmp_path, home):
    """Numba's cache makes neither the import nor the plan fail, and lies nowhere that others can write."""
    (tmp_path / "writable").mkdir()
    (tmp_path / "a file").write_text("")
    env = {"HOME": None if home is None else str(tmp_path / home), "PYTHONPATH": str(read_only_package)}
    env |= {"XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None, "TMPDIR": str(tmp_path / "tmp")}
    if home is None:
        env["XDG_CACHE_HOME"] = "/proc/none"
    (tmp_path / "tmp").mkdir()
    found = run([sys.executable, "-c", SOLVE], env=env, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert str(read_only_package) in found.stdout.decode()
    assert not any((tmp_path / "tmp").rglob("*.nb?")), "a cache in a folder that everyone can write"
    assert any((tmp_path / "writable").rglob("*.nb?")) == (home == "writable")


@pytest.mark.parametrize("name", ["gpuckpt", "gpuckpt.memory", "gpuckpt.planning", "gpuckpt.cli.app"])
def test_import_in_little_memory(name):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    found = run([sys.executable, "-X", "dev", "-W", "error", "-c", f"import {name}"], preexec_fn=limit)
    assert found.returncode == 0, found.stderr[-2000:]

from __future__ import annotations

import numpy as np
import pytest

from gpuckpt.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("256MiB", 256 << 20),
        ("1.5GiB", 3 << 29),
        ("1GB", 10**9),
        ("1.5 kB", 1500),
        ("2TiB", 2 << 40),
        ("1PB", 10**15),
        (" 12 ", 12),
        ("12b", 12),
        ("1_000kib", 1024000),
        (".5KiB", 512),
        ("0", 0),
        (np.int64(7), 7),
        (0, 0),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes
    assert type(parse_bytes(text)) is int


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "-1MiB",
        "1 GiB 2",
        "1e9",
        "0x10",
        "1.2.3KiB",
        "10 apples",
        "1Mi",
        "0.1B",
        "1.3",
        "nan",
        "٣MiB",
        -1,
    ],
)
def test_nonsense_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r".*" if text == "" else str(text).replace(".", r"\.").replace("+", r"\+")):
        parse_bytes(text)


@pytest.mark.parametrize("value", [None, 1.5, True, [1], b"1MiB"])
def test_what_is_no_size_is_a_type_error(value):
    with pytest.raises(TypeError, match="size in bytes"):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (-2048, "-2 KiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_are_shown(nbytes, text):
    assert format_bytes(nbytes) == text

"""What examples are made of, and how long it is looked for more.

FUZZ_SECONDS: for each door; FUZZ_SEED: a number, or `random`; it is printed.
"""

import contextlib
import os
import random
import time

from fuzz.limits import Limited
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", 4))
LEAST = 20  # examples, however slow the machine is
SEED = os.environ.get("FUZZ_SEED", "0")

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from(
        [2**31, 2**32, 2**63, 2**64, 10**18, -(2**63), 10**90, 1e-9, 1e38, 1e308, 1e999, float("nan"), 0.5]
    ),
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "~nobody/x",
            "../x",
            "a",
            "null",
            "\0",
            "\n",
            "\x1b[2J",
            "\udce4",
            "\ud800",
            "x" * 5000,
            "9" * 400,
        ]
    ),
    st.sampled_from(
        ["${model.lr}", "${oc.env:HOME}", "${", "${a:b}", "???", "(" * 60, "1e400", "0x1f", "1:30", "=", "<<"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


class TimeIsUp(BaseException):
    """To Hypothesis, as Ctrl-C."""


def look(door, examples, known=()) -> None:
    """Gives the door what it must stand, then examples of a strategy until the time is over."""
    number = random.randrange(2**32) if SEED == "random" else int(SEED)
    print(f"FUZZ_SEED={number}")
    limited, count, has_failed, end = Limited(door), 0, False, 0.0

    @seed(number)
    @settings(
        max_examples=10**6, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(examples)
    def check(example) -> None:
        nonlocal count, has_failed, end
        end = end or time.monotonic() + SECONDS  # not while the strategies are made
        if count >= LEAST and time.monotonic() > end and not has_failed:
            raise TimeIsUp
        count += 1
        try:
            limited(example)
        except AssertionError:
            has_failed = True
            raise

    try:
        for example in known:
            limited(example)
        with contextlib.suppress(TimeIsUp):
            check()
    finally:
        limited.close()
    print(f"{count} examples")
    assert count >= LEAST

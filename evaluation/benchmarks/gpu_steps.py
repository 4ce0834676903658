"""What evaluation/gpu_check.py runs, best first, and the targets that it is held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from config.schema.benchmark import GPU_STEPS


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    value: of a row of a part's JSON, and all of the JSON. more: whether more is better. what: which part of the step it
    is of. has_no_limit: whether the share of the hardware's limit says nothing about it.
    """

    unit: str
    value: Callable[[dict[str, Any], dict[str, Any]], float | None]
    more: bool = False
    what: str = ""
    has_no_limit: bool = False


TIMES = Kind("times {baseline}", lambda row, figures: row["ratio"], more=True)
SECONDS = Kind("s", lambda row, figures: row["median_seconds"])
MILLISECONDS = Kind("ms", lambda row, figures: 1000 * row["median_seconds"])
PER_STEP = Kind("ms", lambda row, figures: 1000 / row["per_second"])
GIGABYTES = Kind("GB", lambda row, figures: row["peak_gb"], what=", peak memory", has_no_limit=True)
SAMPLING_STEP = Kind(
    "ms",
    lambda row, figures: 1000 * figures["sampling, seconds"][row["name"]] / figures["steps"],
    what=": a sampling step at 64³",
    has_no_limit=True,
)


@dataclass(frozen=True)
class Target:
    """What a figure should at least, or at most, be; bound None: it is only shown."""

    kind: Kind
    bound: float | None = None


@dataclass(frozen=True)
class Step:
    """A part of the benchmark with options.

    title: what is measured. attempts: words for evaluation/benchmark.py at paper size; where one fails or is killed
    the next is tried. rehearsal: the words at tiny size, None: left out. targets: of the best row beside the baseline.
    """

    title: str
    limit_s: float
    attempts: tuple[str, ...]
    rehearsal: str | None
    targets: tuple[Target, ...] = (Target(TIMES),)


TRAINING = "biflownet --grid 32 32 32 --batch-size 48 --repetitions 3"
TRAINING_TARGETS = (Target(MILLISECONDS, 135), Target(TIMES, 2.3))
PAIR = "autoencoder --batch-size 24 --repetitions 3"
# Many steps: the start of a sampling, which counts too, is not what the targets are about.
SAMPLING = "sample --steps 50 --repetitions 3"
DECODE = "decode --grid 64 64 64 --max-memory 16 --repetitions 3"
# What compiles can take minutes or fail, so it comes after the same without, or is followed by it.
STEPS = {
    "hardware": Step("limits of the hardware", 60, ("hardware",), "hardware", ()),
    "tests": Step("gpu tests", 100, (), None, ()),
    "training": Step(
        "training step, 48 latents 8 × 32³",
        90,
        (f"{TRAINING} --ways 'plain,float32,bf16,bf16 channels last'",),
        "biflownet --ways plain,float32",
        TRAINING_TARGETS,
    ),
    "training-compiled": Step(
        "training step, compiled, 48 latents 8 × 32³",
        170,
        (f"{TRAINING} --ways 'plain,bf16 compiled'",),
        None,
        TRAINING_TARGETS,
    ),
    "codebook": Step(
        "codebook step, 8192 codes, 32,768 tokens",
        60,
        ("codebook --ways 'plain,ours,ours compiled'", "codebook --ways plain,ours"),
        "codebook --ways plain,ours",
        (Target(TIMES, 15),),
    ),
    "pair": Step(
        "generator and discriminator step, 24 patches of 64³",
        90,
        (f"{PAIR} --ways 'plain,bf16,bf16 channels last'",),
        "autoencoder --ways plain,float32 --no-perceptual",
        (Target(TIMES, 3),),
    ),
    "sampling": Step(
        "sampling step, one latent of 32³",
        110,
        (
            f"{SAMPLING} --grid 32 32 32 --ways 'plain,bf16,compile bf16'",
            f"{SAMPLING} --grid 32 32 32 --ways 'plain,bf16,bf16 channels last'",
        ),
        "sample --ways 'plain,channels last'",
        (Target(PER_STEP, 1.3),),
    ),
    "decode": Step(
        "decoding of 512³",
        90,
        (f"{DECODE} --ways 'exact in 16 GB,bf16 exact in 16 GB,bf16 channels last exact in 16 GB'",),
        "decode --ways 'plain,exact in 0.008 GB' --max-memory 0.008",
        (Target(SECONDS, 0.7), Target(GIGABYTES, 16)),
    ),
    "generate": Step(
        "seed to file, 512³, 20 steps",
        110,
        ("generate --repetitions 3 --ways 'bf16,compile bf16'", "generate --repetitions 3 --ways bf16"),
        "generate --steps 2 --ways plain",
        (Target(SECONDS, 1.5), Target(SAMPLING_STEP, 10)),
    ),
    "pair-compiled": Step(
        "generator and discriminator step, compiled, 24 patches of 64³",
        150,
        (f"{PAIR} --ways 'plain,bf16 compiled'",),
        None,
        (Target(TIMES, 3),),
    ),
    "write": Step("writing of 256³", 60, ("write --repetitions 3",), "write"),
    "data": Step("patches from the cache", 60, ("data --repetitions 1",), "data"),
    "scaling": Step("training with two processes", 150, ("scaling --repetitions 1",), None),
}
assert tuple(STEPS) == GPU_STEPS

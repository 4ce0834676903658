"""Runs the steps of `gpu_steps.py` one after the other, each bounded, and shows and writes what came of them."""

import contextlib
import json
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from common.errors import UserError
from common.files import write_atomically
from common.log import stamped
from common.places import is_folder
from config.schema.benchmark import SCHEMAS
from evaluation.benchmarks.bounded import Ended, run_bounded
from evaluation.benchmarks.gpu_steps import STEPS, TIMES, Step, Target
from evaluation.benchmarks.running import markdown_table

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = "tests/gpu"
LEAST_S = {"paper": 20.0, "tiny": 5.0}  # with less time left a step is not begun: starting alone takes so long
RESERVE_S = 8.0  # of the whole time, for ending a step at its limit and for the results
MISTAKE, DONE, LEFT_OUT, KILLED, FAILED = 2, "done", "left out", "killed", "failed"
MISSING = re.compile(r"No module named '?(\w+)|import of (\w+)[\w.]* halted")
TEST_LINE = re.compile(rf"^({GPU_TESTS}/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)
SKIP_LINE = re.compile(r"^SKIPPED \[(\d+)\] (?:\S+: )?(.+)$", re.MULTILINE)
COLLECTION_LINE = re.compile(rf"^ERROR ({GPU_TESTS}[^\s:]+)(?: - .*)?$", re.MULTILINE)


@dataclass
class Outcome:
    """What came of a step. why: of another state than done, or what has to be said of a step that is.

    figures: of the part's JSON, or counts of the tests.
    """

    name: str
    state: str
    why: str = ""
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> Step:
        return STEPS[self.name]


def check(cfg: DictConfig, command: str) -> int:
    """Runs the steps of a config, shows the table and writes the JSON; returns the exit status.

    What was measured is shown and written also where Ctrl-C or SIGTERM ends the run. UserError without a GPU.
    """
    if cfg.json is not None and not is_folder(Path(cfg.json).absolute().parent):
        raise UserError(f"--json {cfg.json}: there is no folder {Path(cfg.json).parent}: make it, or name another")
    begin = time.monotonic()
    names = ["hardware", *(name for name in STEPS if name in cfg.only or not cfg.only)]
    outcomes = {name: Outcome(name, LEFT_OUT, "the run ended before") for name in names}
    device: dict[str, Any] = {}
    with _ending_in_order():
        try:
            for name in outcomes:
                seconds_left = begin + 60 * cfg.minutes - RESERVE_S - time.monotonic()
                outcomes[name] = _run(cfg, name, seconds_left, device)
                if name == "hardware":
                    _demand_device(outcomes[name])
                    device = outcomes[name].figures
        finally:
            if outcomes["hardware"].commands and not _is_useless(outcomes["hardware"]):
                results = {"command": command, "seconds": round(time.monotonic() - begin, 1)}
                _report(cfg, list(outcomes.values()), device, results)
    failed = [outcome.name for outcome in outcomes.values() if outcome.state == FAILED]
    return int(bool(failed) or ("tests" in outcomes and outcomes["tests"].state == KILLED))


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP, as of a batch system or a connection that breaks, end the step and leave its results."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_useless(hardware: Outcome) -> bool:
    """Whether nothing can be measured, by what came of the first step."""
    return "no usable GPU" in hardware.why or hardware.why == "needs torch"


def _demand_device(hardware: Outcome) -> None:
    """UserError where nothing can be measured."""
    if "no usable GPU" in hardware.why:
        raise UserError(
            f"--device cuda: {sys.executable} sees no GPU that torch can use: look at nvidia-smi, take a Python whose "
            "torch has CUDA (make PYTHON=… gpu-check), or rehearse with --device cpu --size tiny"
        )
    if _is_useless(hardware):
        raise UserError(f"{sys.executable} lacks torch: take another Python (make PYTHON=… gpu-check)")


# -------------------------------------------------------------------------------------------------------- running


def _run(cfg: DictConfig, name: str, seconds_left: float, device: dict[str, Any]) -> Outcome:
    """One step, with what is tried in its place where it fails."""
    step, end = STEPS[name], time.monotonic() + seconds_left
    if why := _reason_to_leave_out(cfg, name, device):
        return Outcome(name, LEFT_OUT, why)
    attempts = step.attempts if cfg.size == "paper" else (step.rehearsal,)
    outcome = Outcome(name, LEFT_OUT)
    for words in attempts or (None,):
        limit_s = min(step.limit_s, end - time.monotonic())
        if limit_s < LEAST_S[cfg.size]:
            outcome.why = "; ".join(filter(None, (outcome.why, f"{max(0, limit_s):.0f} s were left")))
            break
        sys.stderr.write(stamped(f"gpu_check: {step.title}, at most {limit_s:.0f} s") + "\n")
        before = outcome.why
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
            file = Path(folder) / "figures.json"
            command = _tests_command() if words is None else _part_command(cfg, words, file)
            ended = run_bounded(command, limit_s, ROOT)
            outcome.commands.append(shlex.join(["python", *command[1:]]).replace(str(file), "FILE"))
            outcome.seconds += ended.seconds
            if words is None:
                _judge_tests(outcome, ended)
            elif ended.status == 0:
                outcome.state, outcome.figures = DONE, json.loads(file.read_text())
                outcome.why = f"measured otherwise, as {before}" if before else ""
            else:
                outcome.state, outcome.why = _failure(ended, limit_s)
        if outcome.state == DONE or outcome.why.startswith("needs "):
            break
    return outcome


def _reason_to_leave_out(cfg: DictConfig, name: str, device: dict[str, Any]) -> str:
    if name == "tests":
        return "" if (ROOT / GPU_TESTS).is_dir() else f"there is no {GPU_TESTS}"
    if cfg.size == "tiny" and STEPS[name].rehearsal is None:
        return "no part of a rehearsal"
    if name == "scaling" and device.get("devices", 1) < 2:
        return "needs two GPUs"
    return ""


def _part_command(cfg: DictConfig, words: str, file: Path) -> list[str]:
    part, *options = shlex.split(words)
    options += ["--json", str(file)]
    if cfg.size == "tiny":
        options += ["--size", "tiny", "--repetitions", "1"]
    if "device" in SCHEMAS[part].__dataclass_fields__:
        options += ["--device", cfg.device]
    return [sys.executable, "evaluation/benchmark.py", part, *options]


def _tests_command() -> list[str]:
    """Each test in a line of its own, which says how far they were if they are killed."""
    options = ["-m", "gpu", "-v", "-rsfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, GPU_TESTS]


def _failure(ended: Ended, limit_s: float) -> tuple[str, str]:
    """State and reason of a command that did not reach its end."""
    if ended.status is None:
        return KILLED, f"killed after {limit_s:.0f} s"
    last = next((line.strip() for line in reversed(ended.errors.splitlines()) if line.strip()), "")
    if missing := MISSING.search(last):
        return LEFT_OUT, f"needs {missing[1] or missing[2]}"
    if "out of memory" in last or "ALLOC_FAILED" in last:
        return LEFT_OUT, f"out of memory: {last[:200]}"
    if ended.status < 0:  # as by the kernel where the main memory is full
        return FAILED, f"ended by {signal.Signals(-ended.status).name}"
    return FAILED, last.removeprefix("error: ")[:400] or f"exit status {ended.status}"


def _judge_tests(outcome: Outcome, ended: Ended) -> None:
    """Counts by what pytest has written so far."""
    results = TEST_LINE.findall(ended.output)
    not_collected = {name for name in COLLECTION_LINE.findall(ended.output)}
    counts = Counter(result.lower() for _, result in results)
    skipped = Counter()
    for count, reason in SKIP_LINE.findall(ended.output):
        skipped[reason] += int(count)
    failed = [name for name, result in results if result in ("FAILED", "ERROR")]
    outcome.figures = {"counts": dict(counts), "failed": failed, "skipped": dict(skipped)}
    missing = {first or second for first, second in MISSING.findall(ended.output)}
    if not_collected:
        outcome.figures["not collected"] = sorted(not_collected)
    if ended.status is None:
        outcome.state, outcome.why = KILLED, f"killed after {ended.seconds:.0f} s"
    elif failed:
        outcome.state, outcome.why = FAILED, f"{len(failed)} failed: {', '.join(failed)}"
    elif missing and (not results or not_collected):
        outcome.state, outcome.why = (DONE if results else LEFT_OUT), f"needs {', '.join(sorted(missing))}"
    elif not results and ended.status != 5:  # 5: pytest found none
        outcome.state, outcome.why = _failure(ended, 0)
    else:
        outcome.state, outcome.why = DONE, "; ".join(f"{count} skipped: {why}" for why, count in skipped.items())


# -------------------------------------------------------------------------------------------------------- results


def _report(cfg: DictConfig, outcomes: Sequence[Outcome], device: dict[str, Any], results: dict[str, Any]) -> None:
    """The table on stdout, below it what is missing; then the JSON."""
    described = {
        name: value for name, value in device.items() if name not in ("rows", "part", "size", "command", "unit")
    }
    header = ("what", "way", "target", "measured", "met", "of the limit")
    lines = [line for outcome in outcomes for line in _lines(outcome, cfg.size == "paper")]
    versions = ", ".join(f"{name} {number}" for name, number in device.get("versions", {}).items() if number)
    circumstances = [str(device.get(name)) for name in ("device", "cpu") if device.get(name)]
    circumstances += [f"{name} {device[name]}" for name in ("driver", "CUDA", "cuDNN") if device.get(name)]
    rehearsal = "" if cfg.size == "paper" else "A rehearsal at tiny size: it shows that things run.\n"
    sys.stdout.write(f"{rehearsal}{'; '.join([*circumstances, versions])}\n\n{markdown_table(header, lines)}\n")
    for outcome in outcomes:
        if outcome.why:
            sys.stdout.write(f"* {outcome.name}, {outcome.state}: {outcome.why}\n")
    sys.stdout.flush()

    steps = [
        {
            "step": outcome.name,
            "state": outcome.state,
            "why": outcome.why or None,
            "commands": outcome.commands,
            "seconds": round(outcome.seconds, 1),
            "figures": outcome.figures,
        }
        for outcome in outcomes
    ]
    table = [dict(zip(header, line, strict=True)) for line in lines]
    content = {**results, "size": cfg.size, "machine": described, "table": table, "steps": steps}
    slug = re.sub(r"\W+", "_", str(device.get("device", cfg.device))).strip("_")
    file = Path(cfg.json or f"gpu_check_{slug}.json")
    write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
    sys.stdout.write(f"\nfigures in {file}\n")


def _lines(outcome: Outcome, is_judged: bool) -> list[list[str]]:
    """Lines of the table: what, way, target, measured, met, share of the limit. is_judged: held against the targets."""
    title = outcome.step.title
    if outcome.name == "tests":
        counts = ", ".join(f"{count} {result}" for result, count in outcome.figures.get("counts", {}).items())
        met = "-" if outcome.state == LEFT_OUT else "yes" if outcome.state == DONE else "no"
        return [[title, "", "none fails", counts or outcome.state, met, "-"]]
    rows = outcome.figures.get("rows", [])
    if outcome.name == "hardware" and rows:
        units = {row["name"]: ("GB/s", 1e9) if row["name"] == "copy" else ("TFLOP/s", 1e12) for row in rows}
        rates = {row["name"]: row["per_second"] / units[row["name"]][1] for row in rows}
        return [[title, name, "-", f"{rate:.3g} {units[name][0]}", "-", "-"] for name, rate in rates.items()]
    if not rows:
        return [
            [f"{title}{target.kind.what}", "", _written(target, {"baseline": "the baseline"}), outcome.state, "-", "-"]
            for target in outcome.step.targets
        ]
    if (fitting := outcome.figures.get("batch size")) and "does not fit, batch size" in outcome.figures:
        title = f"{title}, but {fitting} of them: no more fitted"
    best = max(rows[1:] or rows, key=lambda row: row["per_second"])
    return [_line(title, target, best, outcome.figures, is_judged) for target in outcome.step.targets]


def _line(title: str, target: Target, row: dict[str, Any], figures: dict[str, Any], is_judged: bool) -> list[str]:
    kind, bound = target.kind, target.bound
    value = kind.value(row, figures)
    measured = "-" if value is None else f"{value:.3g} {kind.unit.format(**figures)}"
    is_same_work = kind is TIMES or "does not fit, batch size" not in figures  # times of a smaller batch are others
    met = "-"
    if is_judged and is_same_work and value is not None and bound is not None:
        met = "yes" if (value >= bound if kind.more else value <= bound) else "no"
    share = "-" if kind.has_no_limit or row["limit_share"] is None else f"{row['limit_share']:.2g}"
    return [f"{title}{kind.what}", row["name"], _written(target, figures), measured, met, share]


def _written(target: Target, figures: dict[str, Any]) -> str:
    if target.bound is None:
        return "-"
    return f"{'≥' if target.kind.more else '≤'} {target.bound:g} {target.kind.unit.format(**figures)}"

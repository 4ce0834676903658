"""What there is of a study for reading: study.md with tables, study.png with slices, curves.png of an autoencoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig

from common.files import write_atomically
from dataset.volumes.pictures import png_of, save_slice_grid
from evaluation.results.scales import SCALES
from evaluation.study.recipes import RUN_NAME
from evaluation.study.running import read_metrics
from evaluation.study.statistics import (
    BETTER,
    WORSE,
    Estimate,
    Measured,
    estimate,
    judged_difference,
    to_figures,
    verdict,
)

ARROWS = {"lower": "↓", "higher": "↑"}
CURVES = {"codebook_perplexity": "codebook perplexity (training batches)", "val/psnr": "PSNR of validation volumes, dB"}
METHOD = {
    "many": "Figures are means over the seeds. The 95 % interval is that of other seeds (Student's t over the runs, in "
    "which the choice of the generated volumes is contained; Welch's for differences) and of other held-out volumes "
    "(resampled by subjects, the same resamples for all runs), half widths added in squares.",
    "one": "One seed: the interval is that of other volumes alone (held-out and generated, resampled by subjects). "
    "How much another seed would change is not known, so nothing is called better.",
}
NO_VALUE = "–"


@dataclass(frozen=True)
class Result:
    """What there is of a variant with a seed. record: as in study.json; None: nothing yet."""

    variant: str
    seed: int
    record: Mapping[str, Any] | None

    @property
    def is_done(self) -> bool:
        return self.record is not None and self.record["status"] == "done"

    @property
    def failure(self) -> str:
        return self.record["reason"] if self.record is not None and self.record["status"] == "failed" else ""

    @cached_property
    def figures(self) -> dict[str, Measured]:
        return to_figures(self.record["figures"]) if self.is_done else {}


References = Mapping[str, Sequence[Mapping[str, Measured]]]  # floor and ceiling -> figures for each seed


def write_report(output: Path, cfg: DictConfig, judge: Any, results: Sequence[Result], references: References) -> None:
    """Writes everything anew. judge: that of the study, which has the pictures."""
    write_atomically(output / "study.md", text_of(cfg, judge.names, results, references).encode(errors="replace"))
    done = [result for result in results if result.is_done]
    first = {result.variant: result for result in reversed(done)}  # of the lowest seeds that are there
    shown = {variant: output / first[variant].record["judged"] for variant in by_variant(results) if variant in first}
    if shown:
        rows = judge.slices(shown, output)
        save_slice_grid(output / "study.png", rows, title="Central slices, variants from the same noise")
    if cfg.stage == "autoencoder" and done:
        write_atomically(output / "curves.png", curves(output, done))


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """In the order of the study."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.variant, []).append(result)
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def text_of(cfg: DictConfig, names: Sequence[str], results: Sequence[Result], references: References) -> str:
    """Markdown: the figures of each variant, and their differences from those of the first."""
    variants = by_variant(results)
    baseline = next(iter(variants))
    names = [name for name in names if any(name in result.figures for result in results)]
    rows, differences, num_compared = [], [], 0
    for variant, of_variant in variants.items():
        verdicts, cells = {}, []
        for name in names:
            runs, others = (_runs(variants[which], name) for which in (variant, baseline))
            if variant != baseline and runs and others:
                how = SCALES[name].better, target_of(name)
                verdicts[name] = verdict(*how, runs, others)
                cells.append(_cell(judged_difference(*how, runs, others)))
                num_compared += min(len(runs), len(others)) > 1
            else:
                cells.append(NO_VALUE)
        said = _said(variant, baseline, of_variant, verdicts)
        figures = [_cell(estimate(runs) if (runs := _runs(of_variant, name)) else None, name) for name in names]
        rows.append([variant, *_cost(of_variant), *figures, said])
        differences.append([variant, *cells])
    for name, of_seeds in references.items():
        cells = [_cell(estimate([of_seed[figure] for of_seed in of_seeds]), figure) for figure in names]
        rows.append([f"*{name}*", "", "", "", *cells, ""])
    titled = [f"{name} {ARROWS.get(SCALES[name].better) or f'→ {target_of(name):g}'}" for name in names]
    judged = [f"to {target_of(name):g}: {name}" if SCALES[name].better == "real" else name for name in names]
    parts = [
        f"# Study: {cfg.stage}, {_budget(cfg)}",
        _table(["variant", "runs", "steps", "seconds", *titled, f"against {baseline}"], rows),
        METHOD["many" if len(cfg.seeds) > 1 else "one"],
        "Floor: training volumes, as many as a run generates. Ceiling: the same after encoding and decoding, which no "
        "diffusion model on these latents passes."
        if references
        else "",
        f"Differences from {baseline}, 95 %; of figures with a target (→) that of their distances to it:",
        _table(["variant", *judged], differences[1:]),
        _chance(num_compared),
        _seconds_note(variants),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def target_of(name: str) -> float | None:
    """What "like real" is for a figure, such as 1 of "ratio 1"; None for one that has none."""
    scale = SCALES[name]
    return float(scale.like_real.split()[-1]) if scale.better == "real" else None


def _runs(results: Sequence[Result], name: str) -> list[Measured]:
    return [result.figures[name] for result in results if name in result.figures]


def _said(variant: str, baseline: str, results: Sequence[Result], verdicts: Mapping[str, str]) -> str:
    """The verdict: a variant that fails with a seed is better in nothing, whatever the others reach."""
    failures = [f"seed {result.seed}: {result.failure}" for result in results if result.failure]
    if failures:
        return f"failed: {'; '.join(failures)}".replace("|", "/")
    if variant == baseline:
        return "baseline"
    found = {word: [name for name, said in verdicts.items() if said == word] for word in (BETTER, WORSE)}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names) or NO_VALUE


def _cost(results: Sequence[Result]) -> list[str]:
    """Runs, steps and mean seconds."""
    done = [result.record for result in results if result.is_done]
    seconds = _seconds(results)
    steps = ", ".join(sorted({f"{record['steps']}" for record in done})) or NO_VALUE
    return [f"{len(done)} of {len(results)}", steps, NO_VALUE if seconds is None else f"{seconds:.3g}"]


def _seconds(results: Sequence[Result]) -> float | None:
    found = [result.record["seconds"] for result in results if result.is_done]
    return fmean(found) if found and None not in found else None


def _seconds_note(variants: Mapping[str, Sequence[Result]]) -> str:
    found = {variant: seconds for variant, results in variants.items() if (seconds := _seconds(results))}
    if len(found) < 2:
        return ""
    most, least = max(found, key=found.get), min(found, key=found.get)
    more = 100 * (found[most] / found[least] - 1)
    return f"Seconds of training as the runs counted them: {most} took {more:.0f} % more than {least}."


def _chance(count: int) -> str:
    if not count:
        return ""
    return (
        f"{count} comparisons: of recipes that don't differ about {count / 20:.1g} of them would be called better or "
        "worse by chance."
    )


def _budget(cfg: DictConfig) -> str:
    budget = cfg.budget
    return f"{budget.steps} steps a run" if budget.seconds is None else f"{budget.seconds:g} s of training a run"


def _cell(found: Estimate | None, name: str = "") -> str:
    """name: of the figure, in whose bounds the interval is kept; none of a difference."""
    if found is None:
        return NO_VALUE
    low, high = found.interval
    if name:
        low, high = max(low, SCALES[name].low), min(high, SCALES[name].high)
    return f"{found.value:.3g} [{low:.3g}, {high:.3g}]"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -------------------------------------------------------------------------------------------------------------- curves


def curves(output: Path, results: Sequence[Result]) -> bytes:
    """PNG: what autoencoders log of their codebook and of validation, against the optimiser steps; a line a run."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for number, (variant, of_variant) in enumerate(by_variant(results).items()):
            for i, result in enumerate(of_variant):
                lines = read_metrics(output / result.record["folder"] / RUN_NAME)
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                label = variant if i == 0 else None
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []), color=f"C{number % 10}", label=label, lw=1
                )
        axes.set_xlabel("steps")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8)
    return png_of(figure)

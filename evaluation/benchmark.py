"""Speed of the parts that were made for it, each beside the straightforward way and only after both agree.

python evaluation/benchmark.py hardware             what the hardware itself does
python evaluation/benchmark.py data                 at the paper's size
python evaluation/benchmark.py codebook             a training step of the codebook
python evaluation/benchmark.py convolution          convolutions of few channels on a CPU
python evaluation/benchmark.py sample               sampling steps of BiFlowNet
python evaluation/benchmark.py decode               latents to volumes
python evaluation/benchmark.py generate             a seed to a file
python evaluation/benchmark.py write                volumes to files
python evaluation/benchmark.py data --size tiny     in seconds: shows that it runs, not what it reaches
"""

import ast
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.benchmark import PARTS, SCHEMAS, BenchmarkConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    words = list(map(str, sys.argv[1:] if argv is None else argv))
    part = next((word for word in words if word in PARTS), None)
    summaries = (f"  {name:12}{documentation(name).splitlines()[0]}" for name in PARTS)
    description = documentation(part) if part else "\n".join([__doc__, *summaries])
    cfg = parse_command_line(words, SCHEMAS.get(part, BenchmarkConfig), None, description)
    from evaluation.benchmarks.running import run

    run(cfg, shlex.join(["python", "evaluation/benchmark.py", *words]))


def documentation(part: str) -> str:
    """The docstring of a part's module, which needs seconds to import."""
    return ast.get_docstring(ast.parse((ROOT / "evaluation" / "benchmarks" / f"{part}.py").read_text()))


if __name__ == "__main__":
    raise SystemExit(run_script(main))

"""What this code does on this machine's GPU: its tests, the hardware's limits, and the benchmark beside its targets.

python evaluation/gpu_check.py                              at paper size, in 8 minutes at most; the table is Markdown
python evaluation/gpu_check.py --only decode generate       some steps alone
python evaluation/gpu_check.py --device cpu --size tiny     a rehearsal: shows that it runs, not what it reaches

Each step is a process of its own with a time limit; what could not run is listed with the reason. The imaging libraries
are not needed, but for the steps that say so. Exit status: 0; 1 if tests or steps failed; 2 without a GPU.
"""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import UserError  # noqa: E402
from common.script import run_script  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    words = list(map(str, sys.argv[1:] if argv is None else argv))
    try:
        from config.cli import parse_command_line
    except ModuleNotFoundError as error:  # a Python that was made for something else
        raise UserError(
            f"{sys.executable} lacks {error.name}, which all options are read with: install the packages of "
            "requirements.txt there, or take another Python (make PYTHON=… gpu-check)"
        ) from error
    from config.schema.benchmark import GpuCheckConfig

    cfg = parse_command_line(words, GpuCheckConfig, None, __doc__)
    from evaluation.benchmarks.gpu_check import check

    return check(cfg, shlex.join(["python", "evaluation/gpu_check.py", *words]))


if __name__ == "__main__":
    raise SystemExit(run_script(main))

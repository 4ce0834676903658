"""Controlled generation in one command, after the demo: sparse-view CT, fast MRI, and images of masks.

    python evaluation/demo_control.py --demo demo --output-dir demo/control            12 minutes on two idle CPU cores
    python evaluation/demo_control.py --demo demo --output-dir demo/control --short    a few steps of each

Each stage is the real script. The same command again goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError  # noqa: E402
from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import DemoControlConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages; ends with exit status 1 where the figures miss their targets."""
    cfg = parse_command_line(argv, DemoControlConfig, None, __doc__)
    from evaluation.demonstration.control import control_stages, report_control
    from evaluation.demonstration.masks import write_masks
    from evaluation.demonstration.stages import DemoPaths, announce, run_stage

    demo, output = DemoPaths(Path(cfg.demo).resolve()), Path(cfg.output_dir).resolve()
    if not demo.stage2_ckpt.is_file():
        raise UserError(f"demo: {demo.output} is not a finished demo: run `make demo` first, or name its folder")
    begin = time.monotonic()
    announce("masks of the lungs")
    write_masks(demo, output / "mask")
    stages = control_stages(demo, output, cfg.short)
    for number, (title, command) in enumerate(stages.items(), start=1):
        run_stage(number, title, command, "`make demo-control` again")
    passed = report_control(demo, output, judge=not cfg.short)
    announce(
        f"done in {(time.monotonic() - begin) / 60:.1f} minutes: {output / 'control.png'}, {output / 'control.json'}"
    )
    if not passed:
        raise UserError(f"the demo missed a target, see the table above and {output / 'control.json'}")


if __name__ == "__main__":
    raise SystemExit(run_script(main))

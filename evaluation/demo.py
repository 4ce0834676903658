"""The whole pipeline in one command, on phantoms: data, autoencoder, latents, diffusion, generation, evaluation.

    python evaluation/demo.py --output-dir demo            14 minutes on two idle CPU cores: `make demo`
    python evaluation/demo.py --output-dir demo --short    a few steps of each: shows that every stage runs

Each stage is the real script with a small config of config/demo/. The same command again goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError  # noqa: E402
from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.schema.evaluation import DemoConfig  # noqa: E402
from evaluation.demonstration.stages import (  # noqa: E402
    DemoPaths,
    announce,
    evaluation_stages,
    run_stage,
    training_stages,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages, then the report; ends with exit status 1 where the report misses its targets."""
    cfg = parse_command_line(argv, DemoConfig, None, __doc__)
    from common.checkpoint_files import newest_checkpoint
    from evaluation.demonstration.figures import write_report

    output = Path(cfg.output_dir).resolve()
    begin = time.monotonic()

    paths = DemoPaths(output)
    stages = training_stages(paths, cfg.short)
    for number, (title, command) in enumerate(stages.items(), start=1):
        run_stage(number, title, command)
    model_ckpt = newest_checkpoint(paths.biflownet / "checkpoints")
    if model_ckpt is None:
        raise UserError(f"{paths.biflownet}: BiFlowNet's training left no checkpoint")
    last = evaluation_stages(paths, model_ckpt, cfg.short)
    for number, (title, command) in enumerate(last.items(), start=len(stages) + 1):
        run_stage(number, title, command)

    announce(f"[{len(stages) + len(last) + 1}] figures on phantoms that were not trained on")
    passed = write_report(paths, judge=not cfg.short)
    announce(f"done in {(time.monotonic() - begin) / 60:.1f} minutes: {output / 'demo.png'}, {output / 'demo.json'}")
    announce(f"report: {paths.evaluation / 'report.html'}")
    if not passed:
        raise UserError(f"the demo missed a target, see the table above and {output / 'demo.json'}")


if __name__ == "__main__":
    raise SystemExit(run_script(main))

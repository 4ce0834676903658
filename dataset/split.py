r"""Draws which subjects of a data set train, validate, or are held out, for all stages from training to evaluation.

    python dataset/split.py data/PatchVolume_data.json --subject-pattern '^[^/]+' --validation 0.1 --held-out 0.1

writes split.json beside the dataset JSONs. Both trainings keep to it, encoding copies it beside the latents, and the
evaluation scripts take data/split.json:held_out as real volumes. The same command after new volumes have come gives
their subjects a side and leaves all others where they are; another pattern or share is refused without --anew.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import run_script  # noqa: E402
from config.cli import parse_command_line  # noqa: E402
from config.loading import require  # noqa: E402
from config.schema.data import SplitConfig  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_command_line(argv, SplitConfig, None, __doc__)
    require(cfg, "json")
    from dataset.order.draw_split import keep_or_draw, show_split

    wanted = {key: cfg[key] for key in ("subject_pattern", "validation", "held_out", "seed")}
    show_split(keep_or_draw(cfg.json, wanted, cfg.anew), cfg.json)


if __name__ == "__main__":
    raise SystemExit(run_script(main))

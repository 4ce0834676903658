"""docs/cluster.md: its commands run as written, by bash, with stand-ins for Slurm's programs that note their words."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from config.cli import parse_command_line
from config.schema.autoencoder import AutoencoderConfig, LatentConfig
from config.schema.data import PreprocessConfig
from config.schema.diffusion import BiFlowNetConfig, GenerationConfig
from config.schema.evaluation import GenerationMetricsConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "docs" / "slurm").glob("*.sbatch"))
SCHEMAS = {
    "train/train_PatchVolume.py": (AutoencoderConfig, "PatchVolume_8x.yaml"),
    "train/train_BiFlowNet_SingleRes.py": (BiFlowNetConfig, "BiFlowNet_8x.yaml"),
    "train/generate_training_latent.py": (LatentConfig, None),
    "evaluation/class_conditional_generation.py": (GenerationConfig, "generation_8x.yaml"),
    "evaluation/generation_metrics.py": (GenerationMetricsConfig, None),
    "dataset/preprocess.py": (PreprocessConfig, "preprocess.yaml"),
}
# Notes its words, shell-quoted, as a line that begins with its name.
NOTING = 'printf "%s" "${0##*/}" >> "$NOTED"; printf " %q" "$@" >> "$NOTED"; echo >> "$NOTED"\n'
STAND_INS = {
    "srun": NOTING + 'exit "${STATUS:-0}"\n',
    "scontrol": NOTING + 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; fi\n',
    "sbatch": """
nodes=1 array= dependency=
while [[ $1 == --* ]]; do
    case $1 in
    --nodes) nodes=$2; shift ;;
    --array=1-*) array=${1#--array=1-} ;;
    --dependency=afterany:7) ;;
    --parsable) echo 7 ;;
    --gpus=0) ;;
    *) echo "unknown option $1" >&2; exit 1 ;;
    esac
    shift
done
export SLURM_JOB_ID=7 SLURM_NNODES=$nodes SLURM_JOB_NODELIST="node[1-2]" SLURM_GPUS_ON_NODE=8 SLURM_CPUS_PER_TASK=64
if [ -z "$array" ]; then exec bash "$@"; fi
for ((task = 1; task <= array; task++)); do
    SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$array bash "$@" || exit 1
done
""",
}


@pytest.fixture
def run(tmp_path):
    """Runs lines of bash in the project's folder, among stand-ins; returns exit status and what these were given."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / name).chmod(0o755)
    noted = tmp_path / "noted"

    def run_lines(text: str, **more: str) -> tuple[int, list[list[str]]]:
        noted.write_text("")
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTED": str(noted), **more}
        done = subprocess.run(["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, [shlex.split(line) for line in noted.read_text().splitlines()]

    return run_lines


def test_every_command_is_understood_by_the_script_that_gets_it(run):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), flags=re.DOTALL)
    status, calls = run("set -e\n" + "\n".join(blocks))
    assert status == 0
    shards: dict[str, list[str | None]] = {}
    nodes = []
    for words in (words for words in calls if words[0] == "srun"):
        words = words[words.index("python") + 1 :]
        if words[0] == "train/launch.py":
            launched = get_args_parser().parse_args(words[1:])
            assert (launched.nproc_per_node, launched.rdzv_backend) == ("8", "c10d")
            assert (launched.rdzv_endpoint, launched.rdzv_id) == ("node1:29500", "7")
            nodes.append(launched.nnodes)
            words = [launched.training_script, *launched.training_script_args]
        cfg = parse_command_line(words[1:], *SCHEMAS[words[0]], "")
        shards.setdefault(words[0], []).append(cfg.get("shard"))
    assert nodes == ["1", "4"]
    assert shards.keys() == SCHEMAS.keys()
    for script, found in list(shards.items())[2:]:
        count = len(found) - 1
        assert count > 1, script
        assert found == [*(f"{number}/{count}" for number in range(1, count + 1)), None]  # the last call completes


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("left_with", "is_requeued"), [(0, False), (1, False), (2, False), (138, True), (143, True)])
def test_a_job_that_saved_and_left_is_queued_again(run, script, left_with, is_requeued):
    """138: SIGUSR1, 143: SIGTERM; not after its end, a mistake or a fault."""
    status, calls = run(f"sbatch {script} train/some.py", STATUS=str(left_with))
    assert status == left_with
    assert (["scontrol", "requeue", "7"] in calls) == is_requeued


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_the_options_and_sends_the_signal(script):
    """Slurm reads them up to the first command."""
    head = script.read_text().split("\n\n")[0].splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head if line.startswith("#SBATCH"))
    assert re.fullmatch(r"USR1@\d+", options["signal"])
    assert {"requeue", "open-mode", "time"} <= options.keys()
    assert script.read_text().count("#SBATCH ") == len(options)

"""torchrun without its traceback: the same options, but after a user's mistake or Ctrl-C nothing follows our own line.

    python train/launch.py --standalone --nproc-per-node 8 train/train_BiFlowNet_SingleRes.py --config FILE ...

starts any script of this project in several processes. Its exit status is theirs: 2 after a user's mistake, 128 + the
signal after one (130: Ctrl-C); torchrun says 1. A fault of ours is still reported in full. At a signal the processes
have ten minutes to save a checkpoint before they are killed (torchrun: 30 s), or what
TORCH_ELASTIC_SHUTDOWN_TIMEOUT says, from torch 2.12 on also --shutdown-timeout. SIGUSR1 is such a signal too; torchrun
would die of it. On a node it starts at most as many processes as there are cores, with --oversubscribe, before all
other options, as many as one says.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.script import INTERRUPTED, MISTAKE  # noqa: E402

# Exit statuses whose reason the processes have said, and of processes that were left over when another had ended
EXPLAINED = {MISTAKE, INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGUSR1}
ENDED_BY_US = {-signal.SIGTERM, -signal.SIGKILL}
REPEATING_LOGS = ("multiprocessing.api", "agent.server.api")  # say that a process ended; so do we or the traceback
SHUTDOWN_S = "600"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: launch.py [torchrun's options] SCRIPT [its options]\n\n{__doc__}")
        return 0 if words else MISTAKE
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from common.errors import UserError
    from common.parallel import check_processes

    oversubscribe = words[0] == "--oversubscribe"
    options = parse_args(words[oversubscribe:])
    try:
        if options.nproc_per_node.isdecimal() and not oversubscribe:
            check_processes(int(options.nproc_per_node), "--nproc-per-node", "say --oversubscribe first")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_S)
    for name in REPEATING_LOGS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        options.signals_to_handle += ",SIGUSR1"
        run(options)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()} - ENDED_BY_US
        if not statuses or not statuses <= EXPLAINED:
            raise
        return max(statuses)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:  # before torchrun has its own way
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What srun runs on each node of a job for a Ray there: it starts the keeper.

That must be in a session of its own, which a task of srun cannot begin.
"""

import os
import signal
import subprocess
import sys

from moray.cluster.network import own_address_towards
from moray.cluster.ray.part import Part


def main() -> None:
    """Arguments: the temporary folder of this Ray, the head's name and, where there are more, the next node's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    temp_dir, head, *others = sys.argv[1:]
    is_head = os.environ["SLURM_NODEID"] == "0"
    # To a node its own name may mean loopback: it takes the address under which another, or Slurm, sees it.
    peer = head if not is_head else others[0] if others else os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    slots = int(os.environ["SLURM_CPUS_ON_NODE"])
    part = Part(slots, is_head, address=own_address_towards(peer), temp_dir=temp_dir)
    sys.exit(subprocess.call(part.command(), start_new_session=True))


if __name__ == "__main__":
    main()

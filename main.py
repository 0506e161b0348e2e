"""Train federated ResNet-18: `python main.py [--config FILE] [--dry_run] [key=value ...]`."""

import os
import sys

from command_line import read_command_line
from startup.terminal import outlive_readers

# On a busy machine OpenMP's threads wait for each other up to eight times longer when they spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    outlive_readers()
    config, dry_run = read_command_line("configs/default.yaml", sys.argv[1:])
    from experiment import main  # after the config is known to be good: torch takes a while

    sys.exit(main(config, dry_run))

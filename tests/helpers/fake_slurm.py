"""A cluster of one machine: the commands of SLURM that submitit calls, as small scripts."""

from pathlib import Path

# sbatch starts the script as a process of its own, whose number is that of the job.
SBATCH = """#!/bin/bash
cp "$1" "$0.submitted"
export SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
bash -c 'export SLURM_JOB_ID=$$; exec bash "$0"' "$1" >/dev/null 2>&1 &
echo "Submitted batch job $!"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --output|--error) shift ;; esac
  shift
done
exec "$@"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then
    kill -0 "$2" 2>/dev/null && echo "$2|RUNNING|here" || echo "$2|COMPLETED|here"
  fi
  shift
done
"""


def write_commands(folder: Path) -> None:
    folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = folder / name
        path.write_text(script)
        path.chmod(0o755)

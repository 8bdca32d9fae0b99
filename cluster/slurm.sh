#!/usr/bin/env bash
# A sweep or a training on nodes of Slurm: a Ray cluster for the time of one job. Arguments are raytrain's.
#   sbatch cluster/slurm.sh tune search_spaces/quickstart.yaml --name mine --load-if-exists storage=/shared/runs
# The clone with its .venv and the home folder are on a file system that all nodes have.
#SBATCH --job-name=raytrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
# One Ray per node, and no other: symmetric-run refuses a node with a Ray, and stops all of the user's at its end.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# A signal five minutes before the end of the job's time: raytrain is stopped, and with --load-if-exists queued again.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A lost node does not end the job.
#SBATCH --no-kill
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
umask 077

export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds; its default of 30 is too short for a busy file system
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"        # local and short: sockets have paths of at most 107 bytes
# The address of this machine, the first of the job, in the form in which its interfaces have it: by name it
# may be 127.0.1.1. Where there are several networks: HEAD_IP=... sbatch --export=ALL,HEAD_IP ...
head="${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}"
export RAY_ADDRESS="$head:6379" # raytrain joins the cluster at this address, and so does symmetric-run

ray get-auth-token --generate >/dev/null # makes ~/.ray/auth_token if there is none
chmod 600 "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

# On every node. Cores and GPUs are those of the job, not of the machine.
# shellcheck disable=SC2016
node='
  mkdir -p "$RAY_TMPDIR"
  ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_NNODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    bash -c "echo \$\$ > $RAY_TMPDIR/pid; exec raytrain \"\$@\"" raytrain "$@"
'
# Slurm gives a step one core unless it is asked for all.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=0 \
  bash -c "$node" node "$@" &
step=$!

# SIGTERM for raytrain alone, on this machine: it records what has finished and ends.
stopped=0
# shellcheck disable=SC2329
stop() {
  stopped=1
  kill -TERM "$(cat "$RAY_TMPDIR/pid")" || true
}
trap stop USR1
status=0
wait "$step" || status=$?
if ((stopped)); then # it was the wait that the signal ended
  status=0
  wait "$step" || status=$?
fi

if [[ ! -s $RAY_TMPDIR/pid ]]; then # symmetric-run ends with status 0 where `ray start` fails
  echo "slurm.sh: Ray did not start on $head; the reason is above" >&2
  exit 1
fi
if ((stopped)) && [[ " $* " == *" --load-if-exists "* ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

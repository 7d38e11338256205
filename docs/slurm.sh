#!/bin/bash
# Pre-training on several nodes: sbatch docs/slurm.sh STORE RUN --config RECIPE [--set KEY=VALUE]...
# One submission from the first step to the last: two minutes before the time limit, or when the job
# is preempted, the run saves its state and the job queues itself again. See docs/cluster.md.
#SBATCH --job-name=sparsemae
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sparsemae-%j.txt
set -u

if [ $# -lt 2 ]; then
    echo "usage: sbatch $0 STORE RUN --config RECIPE [--set KEY=VALUE]..." >&2
    exit 2
fi
store=$1 run=$2
shift 2

stopped='' step=''
# as USR1: srun answers a TERM by killing all tasks
trap 'stopped=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
told() { cksum "$run/status.json" 2>/dev/null; }
before=$(told)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # of the job's own: another may start on the same node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun knows this option from torch 2.12 on; before, ranks have 30 seconds
timeout=$(python -c 'from importlib.metadata import version
if tuple(map(int, version("torch").split(".")[:2])) >= (2, 12): print("--shutdown-timeout 100")')

# shellcheck disable=SC2086  # the option and its value are words
srun python -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 $timeout \
    --max-restarts 3 \
    -m sparsemae pretrain "$store" -o "$run" --resume "$@" &
step=$!
[ -z "$stopped" ] || kill -USR1 "$step"
while :; do # a signal ends the wait, not the step
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

# torchrun's own code is 1 whatever happened; what did is in the run folder
state=unknown
if [ "$(told)" != "$before" ]; then
    state=$(python -m sparsemae status "$run" --json |
        python -c 'import json, sys; print(json.load(sys.stdin)["state"])')
fi
case $state:$stopped in
finished:*) exit 0 ;;
preempted:* | killed:yes | unknown:yes) # killed: no time to save, an older checkpoint is there
    echo "requeued: $run is $state"
    scontrol requeue "$SLURM_JOB_ID"
    exit
    ;;
esac
echo "not requeued: $run is $state, exit code $code" >&2
[ "$code" -ne 0 ] || code=1
exit "$code"

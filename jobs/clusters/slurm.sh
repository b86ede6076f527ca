#!/usr/bin/env bash
#SBATCH --job-name=fewstep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#
# Starts Ray on the nodes of a SLURM allocation and runs one job of this repository there:
#
#   sbatch jobs/clusters/slurm.sh distill recipe=my.yaml name=big cluster.workers=16 cluster.wait_s=600
#
# SLURM sends SIGTERM two minutes before the end: the run saves and exits. A requeued job with the same name= resumes.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch $0 JOB key=value ...   (JOB: a file of jobs/, such as distill)"; exit 2; }
job=$1
shift
here=${SLURM_SUBMIT_DIR:?run this by sbatch, from the root of the repository}
[ -f "$here/jobs/$job.py" ] || { echo "$job: no file $here/jobs/$job.py"; exit 2; }
cd "$here"
. .venv/bin/activate

export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1
# every process of this allocation has the token; other users of the nodes do not
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # Ray ends with the job

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-0}

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --block --node-ip-address="$address" --port="$port" \
  --include-dashboard=false --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" &
started=$!
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 -w "$node" ray start --block --address="$address:$port" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" &
done

export RAY_ADDRESS="$address:$port"
until ray health-check --address "$RAY_ADDRESS" 2> /dev/null; do
  kill -0 "$started" || { echo "Ray's head did not start on $head" >&2; exit 1; }
  sleep 2
done
# a training job waits for its workers itself, up to cluster.wait_s; SIGTERM reaches it, and it saves
python "jobs/$job.py" "$@" &
pid=$!
trap 'kill -TERM $pid' TERM
status=0
wait $pid || status=$?
trap - TERM
wait $pid 2> /dev/null || status=$?
exit "$status"

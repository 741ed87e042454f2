# /runs/csam/slurm/train.sh
#!/usr/bin/env bash
# Written by launch/submit.py. `sbatch` of this file submits it again: a run goes on where it stopped.
#SBATCH --job-name=csam
#SBATCH --output=/runs/csam/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --distribution=block
#SBATCH --time=24:00:00
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --qos=long
set -uo pipefail

export PATH=/opt/env/bin:$PATH PYTHONPATH=/runs/csam/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
job=$SLURM_JOB_ID
run=/runs/csam

# The address of the first node: its name need not resolve on the others.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=16 LOCAL_WORLD_SIZE=8
export FLATCAL_EXIT_PREEMPTED=0 # launchers end all ranks when one exits otherwise

restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts > 20)); then
    echo "error: restarted $restarts times, 20 are allowed (--max-restarts)" >&2
    exit 1
fi
mkdir -p "$run/slurm"
echo "$job" > "$run/slurm/job"
before=$(cat "$run/state.json" 2> /dev/null)
command=(/runs/csam/code/recipes/imagenet_csam.py --config /runs/csam/slurm/config.yaml)

# Launchers and shells ignore the signal; the ranks heed it once they are set up.
# shellcheck disable=SC2016  # a rank's own variables
srun --kill-on-bad-exit=1 --wait=0 bash -c 'trap "" USR1 USR2
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python -u "$@"' rank "${command[@]}" &
step=$!

asked=0
trap 'asked=1; echo "SLURM asks to stop: the ranks are told"' USR1
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    # Told until they end: what comes while a rank is being set up is lost on it.
    for ((second = 0; asked && second < 20; second++)); do
        ((second)) || scancel --signal=USR1 "$job.0"
        kill -0 "$step" 2> /dev/null || break
        sleep 1
    done
done

# Exit codes are the launcher's; what became of the run stands in its state.
state=$(cat "$run/state.json" 2> /dev/null)
phase=$(sed -n 's/.*"phase": *"\([a-z]*\)".*/\1/p' <<< "$state")
cause=$(sed -n 's/.*"cause": *"\(\([^"\\]\|\\.\)*\)".*/\1/p' <<< "$state")
if [[ $phase == finished ]]; then
    exit 0
elif [[ $phase == preempted && $asked == 0 && $cause == *"file $run/STOP" && $state != "$before" ]]; then
    echo "stopped by $cause, so not requeued; sbatch this script again to go on" >&2
    exit 75
elif [[ $phase == preempted && ($asked == 1 || $state != "$before") ]] || [[ $asked == 1 && ! $state ]]; then
    if ((restarts < 20)); then
        echo "requeued after restart $restarts of at most 20"
        scontrol requeue "$job"
        exit
    fi
    echo "preempted, and not requeued: restarted $restarts times (--max-restarts)" >&2
    exit 75
fi
echo "error: the run ended as '${phase:-not begun}' and is not requeued; sbatch this script again" \
    "once the cause is mended: ${cause:-it stands above}" >&2
exit 1

# /runs/csam/slurm/evaluate.sh
#!/usr/bin/env bash
# Written by launch/submit.py. `sbatch` of this file submits it again: a run goes on where it stopped.
#SBATCH --job-name=csam-evaluate
#SBATCH --output=/runs/csam/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --distribution=block
#SBATCH --time=02:00:00
#SBATCH --gres=gpu:8
#SBATCH --qos=long
set -uo pipefail

export PATH=/opt/env/bin:$PATH PYTHONPATH=/runs/csam/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
run=/runs/csam

# The address of the first node: its name need not resolve on the others.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=8 LOCAL_WORLD_SIZE=8
command=(/runs/csam/code/recipes/evaluate.py "$run" --data v2=/data/v2)

# Launchers and shells ignore the signal; the ranks heed it once they are set up.
# shellcheck disable=SC2016  # a rank's own variables
srun --kill-on-bad-exit=1 --wait=0 bash -c 'trap "" USR1 USR2
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python -u "$@"' rank "${command[@]}" &
step=$!
wait "$step"

# /runs/csam/slurm/compare.sh
#!/usr/bin/env bash
# Written by launch/submit.py. `sbatch` of this file submits it again: a run goes on where it stopped.
#SBATCH --job-name=csam-compare
#SBATCH --output=/runs/csam/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --distribution=block
#SBATCH --time=02:00:00
#SBATCH --qos=long
set -uo pipefail

export PATH=/opt/env/bin:$PATH PYTHONPATH=/runs/csam/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it

exec srun python -m flatcal_dist.cli compare /runs/csam /runs/sgd --output /runs/csam/comparison


#!/usr/bin/env bash
# The body of launch/*.sbatch: one rank a task, started by srun, so that Slurm's signals reach the ranks themselves.
#
# Before the time limit (--signal=B:USR1@300), on scancel --signal=TERM and on preemption the ranks finish their step,
# save, and exit with status 75; the job then requeues itself, and the same command continues the run.
set -uo pipefail

exp=${EXP:-129f}
latents=${LATENTS:?set LATENTS to the latent store of encode_latents}
run=${RUN:?set RUN to the run folder}
python=${PYTHON:-.venv/bin/python}
resume_status=75

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Every rank sees all GPUs of its machine and takes its own. A rank that ends early must not cost the others their
# checkpoint, so srun kills nothing; the trainer's own watchdog ends a job that has lost a rank.
srun --kill-on-bad-exit=0 --gpu-bind=none \
    "$python" launch/train.py "+exp=$exp" "latents=$latents" "run_dir=$run" "$@" &
step=$!

save_and_stop() {
    echo "asked to stop: the ranks finish their step and save"
    # To the job's steps alone, not to this script.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap save_and_stop USR1 TERM

# A trapped signal ends `wait` early; the step's own status is wanted.
status=0
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
if [[ $status -eq $resume_status ]]; then
    echo "interrupted after saving: requeueing"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
#SBATCH --job-name=mifuse
#SBATCH --output=slurm-%A_%a.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# One line of a file of commands per job of an array; docs/slurm.md has the whole way.
#
#   sbatch --array=1-10%4 --cpus-per-task=2 --time=04:00:00 recipes/slurm_array.sh commands.txt
#
# A job that is told to end (preempted, or two minutes before its time is up) ends its command, which keeps what it has
# done, and puts itself back into the queue: the same command goes on where it was.
set -u
commands="${1:?give the file that 'speechbrain-mifuse sweep ... --commands FILE' wrote}"
task="${SLURM_ARRAY_TASK_ID:?is not set: start this with 'sbatch --array=1-N'}"
line="$(sed -n "${task}p" "$commands")"
if [ -z "$line" ]; then
    echo "error: $commands has no line $task. Give sbatch --array=1-$(wc -l <"$commands")." >&2
    exit 2
fi
# As many threads as the job has cores, unless the command sets its own; threads that wait sleep.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" OMP_WAIT_POLICY=passive

# `env`, since a line may begin with settings; `exec`, so that the signal reaches the command itself.
bash -c "exec env $line" &
child=$!
put_back() {
    kill -TERM "$child" 2>/dev/null
    wait "$child"
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_$task"
    exit 0
}
trap put_back TERM
wait "$child"

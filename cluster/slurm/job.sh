#!/bin/bash
# {what}. Written by `moray submit`; `sbatch` of this file starts it, or goes on with it.
{options}

stopping=
{start}
# SIGTERM, from Slurm before the time limit or by `scancel --batch --signal=TERM`, means: commit and leave.
trap stop TERM
while kill -0 $driver 2> /dev/null; do wait $driver; done  # wait returns for a signal, too
wait $driver
code=$?

# 75: stopped, and what was done is committed. 143: stopped before it could listen, and nothing was done.
# Where Slurm ends the job itself (scancel, preemption, scontrol requeue), it is not for us to start it again.
if [ $code = 75 ] || [ $code$stopping = 143yes ]; then
    [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

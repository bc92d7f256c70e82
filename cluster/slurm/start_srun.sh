# One task for each worker. One that dies has the others ended.
srun --kill-on-bad-exit=1 --mpi=none --cpus-per-task="$SLURM_CPUS_PER_TASK" {command} &
driver=$!
# The tasks are told, and not srun, which would end them at once.
stop() {{ stopping=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID"; }}

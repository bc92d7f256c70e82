# A Ray of this job's own on its nodes. Who reaches it needs the token, which only its user can read.
export RAY_ADDRESS=slurm RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}-$SLURM_JOB_ID
unset RAY_AUTH_TOKEN
(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

{command} &
driver=$!
stop() {{ stopping=yes; kill -TERM $driver; }}

# Sourced by the sbatch files: `on_ray COMMAND...` runs a command on a Ray cluster of the job's nodes, and has Slurm start
# the job again when its time is nearly up or the command was killed. What was begun is gone on with, so that costs little.

RESTARTS=3       # after a command that was killed; for time that is up it may be as often as need be
RAY_PORT=6379

on_ray() {
    # This script runs on the first node, which becomes the head. Name its address where it has several.
    local head=${MOTOR_RAY_HEAD:-$(hostname -I | awk '{print $1}')}
    local scratch=/tmp/ray-$SLURM_JOB_ID
    # A Ray that is told nothing takes all of the machine for its own, whatever Slurm has given to the job.
    local room=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$scratch")
    if [ "${SLURM_MEM_PER_NODE:-0}" -gt 0 ]; then
        room+=(--memory="$((SLURM_MEM_PER_NODE * 1048576 * 6 / 10))")
        room+=(--object-store-memory="$((SLURM_MEM_PER_NODE * 1048576 * 25 / 100))")
    fi
    # Other users of these machines cannot hand their own jobs to our Ray.
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
    export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300  # Python from a shared disk starts slowly
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK      # which srun no longer takes from sbatch
    export RAY_ADDRESS=$head:$RAY_PORT  # else symmetric-run, and the command, would start a Ray of their own
    # Training finds the way to other nodes by the machine's own name, which may lead nowhere: name what leads to them.
    if [ -n "${MOTOR_RAY_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$MOTOR_RAY_INTERFACE NCCL_SOCKET_IFNAME=$MOTOR_RAY_INTERFACE
    fi

    trap 'echo "time is nearly up: the job is queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1
    rm -f "$scratch.began"
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" "${room[@]}" -- \
        bash -c 'touch "$0.began" && exec "$@"' "$scratch" "$@" &
    local step=$! code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2> /dev/null; do  # it was a signal that ended the waiting
        code=0
        wait "$step" || code=$?
    done

    # Ray says nothing's wrong if it did not even start.
    if [ "$code" -eq 0 ] && [ ! -e "$scratch.began" ]; then code=1; fi
    if [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
        echo "the command was killed ($code): the job is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    # After a failure Ray's logs stay on the nodes, to be looked into.
    if [ "$code" -eq 0 ]; then srun --ntasks-per-node=1 rm -rf "$scratch" "$scratch.began" || true; fi
    return "$code"
}

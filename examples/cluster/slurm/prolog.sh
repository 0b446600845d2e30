#!/bin/bash
# Slurm's Prolog=, as root on each node before a job: what perseus finds on its GPUs goes to the system's log.
# It never fails: a prolog that does takes the node out of service.
PERSEUS=${PERSEUS:-/opt/perseus/bin/perseus}
if [ -x "$PERSEUS" ] && [ -n "${SLURM_JOB_GPUS:-}" ]; then
    timeout 30 "$PERSEUS" doctor --no-control 2>&1 | logger -t "perseus-prolog[$SLURM_JOB_ID]"
fi
exit 0

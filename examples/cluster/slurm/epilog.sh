#!/bin/bash
# Slurm's Epilog=, as root on each node after a job, outside of its container: frees the clocks of a job that was killed as
# a whole. GPUs that another running job controls are left alone. It never fails, for the same reason as the prolog.
PERSEUS=${PERSEUS:-/opt/perseus/bin/perseus}
if [ -x "$PERSEUS" ]; then
    timeout 60 "$PERSEUS" reset 2>&1 | logger -t "perseus-epilog[$SLURM_JOB_ID]"
fi
exit 0

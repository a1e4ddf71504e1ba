#!/bin/bash
# Runs script.py on every host of a TPU pod. JAX gets the processes from the pod.
# Usage: tpu_pod.sh NAME ZONE
# script.py calls jpaged.parallel.distributed.initialize() before anything else.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all \
    --command="cd jpaged && python3 script.py"

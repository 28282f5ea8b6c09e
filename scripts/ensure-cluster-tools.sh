#!/usr/bin/env bash
# What `make test-cluster` needs beside Rust: iproute2 (network namespaces and shaping), and to try the launchers Open MPI and a
# Slurm of one machine. As root on Debian and its relatives they are installed; elsewhere it is said what is missing.
set -euo pipefail

missing=()
need() {
  command -v "$1" >/dev/null || missing+=("${@:2}")
}
need ip iproute2
need mpirun openmpi-bin
need srun slurmctld slurmd slurm-client munge
[ "${#missing[@]}" -gt 0 ] || exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
  apt-get update -qq
  # No daemon is to start with its installation: the tests start their own.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && exit 0
fi
echo "make test-cluster: not installed (Debian's names): ${missing[*]}; what needs them is not tried" >&2

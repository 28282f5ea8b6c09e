#!/usr/bin/env bash
# Runs a command in a network namespace of its own whose only link is a loopback of 200 Mbit/s with packets of 1,500
# bytes: sockets there meet a wire's limits, and nothing outside. Needs root, ip and tc (iproute2).
#   tests/netns/shaped.sh COMMAND [ARGUMENT…]
set -euo pipefail

for tool in ip tc; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: install iproute2" >&2; exit 1; }
done
namespace="exflow-$$"
if ! ip netns add "$namespace"; then
  echo "No network namespace could be made: run as root, on a kernel that allows them." >&2
  exit 1
fi
trap 'ip netns delete "$namespace"' EXIT

ip -n "$namespace" link set lo mtu 1500 up
tc -n "$namespace" qdisc add dev lo root tbf rate 200mbit burst 32kb latency 50ms
ip netns exec "$namespace" "$@"

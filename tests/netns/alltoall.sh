#!/usr/bin/env bash
# Measures the all-to-all between N network namespaces of this machine, joined by a bridge, each link of RATE in both
# directions with packets of 1,500 bytes: `exflow bench alltoall`, one process per namespace. With --mpi, MPI_Alltoallv runs in
# the same namespaces. Needs root, ip and tc.
#   tests/netns/alltoall.sh EXFLOW [ARGUMENT of bench alltoall…]      N=4 RATE=200mbit by default
set -euo pipefail

exflow=${1:?give the exflow binary}
shift
n=${N:-4} rate=${RATE:-200mbit}
for tool in ip tc; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: install iproute2" >&2; exit 1; }
done
id="xf$$"
net="10.$((RANDOM % 200 + 20)).$((RANDOM % 250))"
folder=$(mktemp -d)
processes=()
clean() {
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
  for rank in $(seq 0 $((n - 1))); do ip netns delete "$id-$rank" 2>/dev/null || true; done
  ip netns delete "$id-sw" 2>/dev/null || true
  rm -rf "$folder"
}
trap clean EXIT

# The switch is a namespace too, so that nothing of this touches the machine's own network.
ip netns add "$id-sw" || { echo "No network namespace could be made: run as root." >&2; exit 1; }
ip -n "$id-sw" link add bridge0 type bridge
ip -n "$id-sw" link set bridge0 up
"$exflow" cert init "$folder" >/dev/null
for rank in $(seq 0 $((n - 1))); do
  ip netns add "$id-$rank"
  ip -n "$id-$rank" link set lo up
  ip -n "$id-$rank" link add eth0 type veth peer name "port$rank" netns "$id-sw"
  ip -n "$id-sw" link set "port$rank" master bridge0 up
  ip -n "$id-$rank" address add "$net.$((rank + 1))/24" dev eth0
  ip -n "$id-$rank" link set eth0 up
  # Queues of 10 ms at most, as in a switch for such links.
  tc -n "$id-$rank" qdisc add dev eth0 root tbf rate "$rate" burst 32kb latency 10ms
  tc -n "$id-sw" qdisc add dev "port$rank" root tbf rate "$rate" burst 32kb latency 10ms
  "$exflow" cert issue "$folder" --rank "$rank" >/dev/null
done
mpi=()
if [[ " $* " == *" --mpi "* ]]; then
  # How mpirun gets into the other namespaces: what it takes for a host is an address there.
  cat >"$folder/agent" <<AGENT
#!/bin/sh
rank=\$((\${1##*.} - 1)); shift
exec ip netns exec "$id-\$rank" sh -c "\$*"
AGENT
  chmod +x "$folder/agent"
  hosts=$(seq -s, -f "$net.%g" 1 "$n")
  mpi=(--mpirun "mpirun --allow-run-as-root --mca plm_rsh_agent $folder/agent --mca plm_rsh_no_tree_spawn 1 --mca btl tcp,self \
--mca pml ob1 --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 --host $hosts --map-by node")
fi
for rank in $(seq $((n - 1)) -1 0); do
  out=/dev/stdout
  [ "$rank" -eq 0 ] || out=/dev/null
  ip netns exec "$id-$rank" "$exflow" bench alltoall --rank "$rank" --world-size "$n" --leader "$net.1:7447" \
    --listen "$net.$((rank + 1)):7447" --identity "$folder/rank-$rank" "${mpi[@]}" "$@" >"$out" &
  processes+=($!)
done
status=0
for process in "${processes[@]}"; do wait "$process" || status=$?; done
processes=()
exit "$status"

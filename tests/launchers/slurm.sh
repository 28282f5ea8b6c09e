#!/usr/bin/env bash
# A Slurm of one machine (slurmctld, slurmd, munge from Debian's packages; root), started and ended here: two tasks of one step run
# the same command line, and the tokens must be those of one process alone.
#   tests/launchers/slurm.sh PATH/TO/exflow
set -euo pipefail
exflow="$(realpath "$1")" model="$(realpath examples/models/gpt-moe-16e)"
for tool in slurmctld slurmd srun munged; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 1; }
done
work="$(mktemp -d)"
chmod 755 "$work"
daemons=()
clean() {
  status=$?
  [ "$status" -eq 0 ] || tail -n 20 "$work"/*.log >&2 || true
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap clean EXIT
port=$((20000 + $$ % 20000))
host="$(hostname -s)"

# munged wants folders that only it can write to, and a key that only it can read.
install -d -m 0700 "$work/munge" "$work/keys"
install -d -m 0755 "$work/run"
dd if=/dev/urandom of="$work/keys/key" bs=128 count=1 status=none
chmod 600 "$work/keys/key"
munged --foreground --force --socket="$work/run/munge" --key-file="$work/keys/key" --pid-file="$work/run/munge.pid" \
  --seed-file="$work/munge/seed" --log-file="$work/munge/munge.log" 2>"$work/munged.log" &
daemons+=($!)
cat >"$work/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/run/munge
CredType=cred/munge
SlurmctldPort=$((port + 1))
SlurmdPort=$((port + 2))
SlurmctldPidFile=$work/run/slurmctld.pid
SlurmdPidFile=$work/run/slurmd.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES State=UP OverSubscribe=FORCE
CONF
mkdir "$work/state" "$work/spool"
export SLURM_CONF="$work/slurm.conf"
slurmctld -D -f "$SLURM_CONF" 2>"$work/slurmctld.log" &
daemons+=($!)
slurmd -D -f "$SLURM_CONF" -N "$host" 2>"$work/slurmd.log" &
daemons+=($!)
for _ in $(seq 100); do
  sinfo -h -o %t 2>/dev/null | grep -q idle && break
  sleep 0.2
done
sinfo -h -o %t | grep -q idle || { echo "the node does not come up" >&2; exit 1; }

identities="$work/certs"
"$exflow" cert init "$identities" >/dev/null
for rank in 0 1; do "$exflow" cert issue "$identities" --rank "$rank" >/dev/null; done
ask=(-m "$model" --prompt-ids 1,2,3 -n 24 --ignore-eos --format json)
tokens() { sed -n '/"output_ids"/,/]/p' "$1" | tr -d ' \n'; }
"$exflow" generate "${ask[@]}" >"$work/alone" 2>/dev/null
# The first node of the step leads; here it is reached at 127.0.0.1, on a port of this test.
EXFLOW_IDENTITY="$identities" EXFLOW_LEADER="127.0.0.1:$port" timeout 120 \
  srun --ntasks=2 --overcommit --chdir="$work" "$exflow" generate "${ask[@]}" >"$work/step" 2>"$work/step.log"
grep -q "from Slurm" "$work/step.log"
[ "$(tokens "$work/step")" = "$(tokens "$work/alone")" ] || { echo "other tokens than one process" >&2; exit 1; }
echo "Slurm: two tasks of one step, the tokens of one process"

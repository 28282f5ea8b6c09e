#!/usr/bin/env bash
# Four processes started by Open MPI, rank 0 generating: the tokens must be those of one process alone.
#   tests/launchers/open_mpi.sh PATH/TO/exflow
set -euo pipefail
exflow="$1" model=examples/models/gpt-moe-16e
port=$((20000 + $$ % 20000))
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
identities="$work/certs"
"$exflow" cert init "$identities" >/dev/null
for rank in 0 1 2 3; do "$exflow" cert issue "$identities" --rank "$rank" >/dev/null; done
group=(--leader "127.0.0.1:$port" --identity "$identities")
ask=(-m "$model" --prompt-ids 1,2,3 -n 24 --ignore-eos --format json)
mpi=(mpirun --allow-run-as-root --oversubscribe)
tokens() { sed -n '/"output_ids"/,/]/p' "$1" | tr -d ' \n'; }

"$exflow" generate "${ask[@]}" >"$work/alone" 2>/dev/null
"${mpi[@]}" -n 1 "$exflow" generate "${ask[@]}" "${group[@]}" : -n 3 "$exflow" worker -m "$model" "${group[@]}" \
  >"$work/mixed" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
"${mpi[@]}" -n 4 "$exflow" generate "${ask[@]}" "${group[@]}" >"$work/same" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
grep -q "from Open MPI" "$work/log"
for run in mixed same; do
  [ "$(tokens "$work/$run")" = "$(tokens "$work/alone")" ] || { echo "$run: other tokens than one process" >&2; exit 1; }
done
echo "Open MPI: four processes, the tokens of one"

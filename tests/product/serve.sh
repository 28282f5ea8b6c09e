#!/usr/bin/env bash
# `exflow serve` as its users meet it: curl, OpenAI's own Python client, the dashboard in headless Chromium, and
# 10,000 requests of 32 clients. Screenshots are left in runs/product/. Installs Chromium where it may; Python's
# packages go into a virtual environment outside the repository.
#   tests/product/serve.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
exflow="${EXFLOW:-target/release/exflow}"
model=examples/models/gpt-moe-16e
out=runs/product
venv="${EXFLOW_TEST_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/exflow-product-venv}"

[ -x "$exflow" ] || { echo "$exflow is not there: cargo build --release" >&2; exit 1; }
command -v curl >/dev/null || { echo "curl is missing: install it" >&2; exit 1; }
browser="$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)"
if [ -z "$browser" ] && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  browser="$(command -v chromium)"
fi
[ -n "$browser" ] || { echo "No Chromium: install it (Debian: apt-get install chromium)." >&2; exit 1; }
if ! "$venv/bin/python" -c 'import openai, playwright' 2>/dev/null; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q -r tests/product/requirements.txt
fi

mkdir -p "$out"
work="$(mktemp -d)"
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
# The bundled model has no chat template; this one writes a chat as a play.
printf '%s' '{% for m in messages %}{{ m.role | upper }}. {{ m.content }}
{% endfor %}ASSISTANT.' >"$work/chat.jinja"
"$exflow" serve -m "$model" --ep-size 4 --port 0 --api-key secret --served-model-name demo \
  --chat-template "$work/chat.jinja" 2>"$work/log" &
server=$!
for _ in $(seq 300); do grep -q 'listening on' "$work/log" && break; sleep 0.1; done
address="$(grep -oE 'http://[0-9.:]+' "$work/log" | head -1)"
[ -n "$address" ] || { cat "$work/log" >&2; exit 1; }

echo "== curl"
auth=(-H "Authorization: Bearer secret")
curl -sf "$address/health" | grep -q '"ok"'
[ "$(curl -s -o /dev/null -w '%{http_code}' "$address/v1/models")" = 401 ]
curl -sf "${auth[@]}" "$address/v1/models" | grep -q '"demo"'
curl -sf "${auth[@]}" "$address/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "demo", "prompt": "In the beginning", "max_tokens": 8}' | grep -q '"usage"'
curl -sfN "${auth[@]}" "$address/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages": [{"role": "user", "content": "Who goes there?"}], "max_tokens": 8, "stream": true}' |
  grep -q 'data: \[DONE\]'
curl -sf "${auth[@]}" "$address/metrics" | grep -q '^exflow_output_tokens_total [1-9]'

echo "== OpenAI's Python client"
"$venv/bin/python" tests/product/openai_client.py "$address/v1" secret demo

echo "== dashboard"
"$venv/bin/python" tests/product/dashboard.py "$address" secret "$browser" "$out"

kill -TERM "$server"
wait "$server"
grep -q 'done' "$work/log"
echo "== load"
cargo test --release --workspace --locked --test serving -- --ignored --nocapture ten_thousand
echo "the server passes; screenshots in $out/"

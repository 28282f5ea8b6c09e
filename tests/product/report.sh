#!/usr/bin/env bash
# Opens the quickstart's report in headless Chromium at 1280 and 400 pixels, in light and dark, and checks what a
# reader would see: every section, a heat map per pair of layers, nothing wider than the window, no script error,
# no request to elsewhere. Leaves screenshots in runs/product/. Installs Chromium where it may.
#   tests/product/report.sh [REPORT.html]
set -euo pipefail
cd "$(dirname "$0")/../.."
report="${1:-runs/quickstart/report.html}"
out=runs/product

browser="$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)"
if [ -z "$browser" ] && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  browser="$(command -v chromium)"
fi
[ -n "$browser" ] || { echo "No Chromium: install it (Debian: apt-get install chromium)." >&2; exit 1; }
[ -f "$report" ] || { echo "$report is not there: run 'make demo' first." >&2; exit 1; }
command -v python3 >/dev/null || { echo "python3 is missing: install it." >&2; exit 1; }

mkdir -p "$out"
work="$(mktemp -d)"
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
cp "$report" "$work/report.html"
cp tests/product/probe.html "$work/probe.html"
python3 -u -m http.server --bind 127.0.0.1 --directory "$work" 0 >"$work/port" 2>"$work/requests" &
server=$!
for _ in $(seq 50); do grep -q 'port [0-9]' "$work/port" && break; sleep 0.1; done
port="$(grep -oE 'port [0-9]+' "$work/port" | cut -d' ' -f2)"

chromium() {
  timeout 120 "$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
    --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars \
    --host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1' \
    --user-data-dir="$work/profile-$RANDOM" --virtual-time-budget=5000 "$@" 2>/dev/null
}

for width in 1280 400; do
  found="$(chromium --dump-dom "http://127.0.0.1:$port/probe.html?width=$width" |
    grep -oE '<pre id="found">[^<]*' | cut -d'>' -f2)"
  echo "$width pixels: $found"
  python3 - "$width" "$found" <<'PY'
import html, json, sys
width, found = int(sys.argv[1]), json.loads(html.unescape(sys.argv[2]))
data = found["data"]
pairs = data["model"]["moe_layers"] - 1
problems = []
if found["errors"]: problems.append(f"script errors: {found['errors']}")
if found["scroll_width"] > width: problems.append(f"the page is {found['scroll_width']} pixels wide")
if found["affinity_pairs"] != pairs: problems.append(f"affinity maps of {found['affinity_pairs']} pairs of layers, {pairs} there are")
if found["traffic_maps"] != len(data["settings"]): problems.append(f"{found['traffic_maps']} traffic maps for {len(data['settings'])} settings")
if found["sections"] < 7: problems.append(f"only {found['sections']} sections")
if found["empty_plots"]: problems.append(f"plots without marks: {found['empty_plots']}")
if found["elsewhere"]: problems.append(f"addresses elsewhere: {found['elsewhere']}")
if problems: sys.exit(f"the report at {width} pixels: " + "; ".join(problems))
PY
  for scheme in light dark; do
    dark=(); [ "$scheme" = dark ] && dark=(--blink-settings=preferredColorScheme=0)
    chromium "${dark[@]}" --window-size="$width,1600" --screenshot="$PWD/$out/report-$width-$scheme.png" \
      "http://127.0.0.1:$port/report.html"
    [ -s "$out/report-$width-$scheme.png" ] || { echo "no screenshot at $width pixels, $scheme" >&2; exit 1; }
  done
done
if grep -vE '"GET /(report|probe)\.html|favicon' "$work/requests" | grep -q '"GET'; then
  echo "the report asked its server for more than itself:" >&2
  grep '"GET' "$work/requests" >&2
  exit 1
fi
echo "the report renders; screenshots in $out/"

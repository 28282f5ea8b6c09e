# What a newcomer types. Linux; on Windows and macOS the plain cargo lines of the README do the same.
CARGO ?= cargo
# Property tests draw the same cases each time; PROPTEST_RNG_SEED=$$RANDOM make test, or plain cargo test, draws others.
export PROPTEST_RNG_SEED ?= 1

.PHONY: demo test test-cluster test-product check fmt lint deny bench vulkan help

help: ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

demo: vulkan ## the main job on the bundled model; ends with the address of its report
	$(CARGO) run --release --example quickstart

test: vulkan ## every test that needs only Rust and a Vulkan driver
	$(CARGO) test --workspace --locked

test-cluster: ## QUIC over a shaped link, processes killed, stopped and cut off, four hosts in network namespaces (root), Open MPI, Slurm
	@bash scripts/ensure-cluster-tools.sh
	tests/netns/shaped.sh $(CARGO) test --workspace --locked --test quic --test trust --test faults --test processes --test lives
	$(CARGO) test --workspace --locked --test group -- --include-ignored --test-threads=1
	$(CARGO) run --locked --example multi_host
	@if command -v mpirun >/dev/null; then tests/launchers/open_mpi.sh target/debug/exflow; else echo "no mpirun: Open MPI not tried"; fi
	@if command -v srun >/dev/null; then tests/launchers/slurm.sh target/debug/exflow; else echo "no srun: Slurm not tried"; fi

test-product: demo ## report and dashboard in Chromium, the server with OpenAI's client and under load, downloads from a Hub
	$(CARGO) build --release --locked --bin exflow
	tests/product/report.sh
	tests/product/serve.sh
	$(CARGO) test --workspace --locked --features hub --test hub

check: fmt lint deny ## formatting, clippy with warnings denied, licences and sources of dependencies

fmt:
	$(CARGO) fmt --all --check

lint:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) clippy --workspace --locked --no-default-features -- -D warnings

# Advisories need the network and change by the day: the workflow checks them, this does not.
deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --all-features check bans licenses sources; \
	else echo "cargo-deny is not installed: licences and sources not checked (cargo install cargo-deny)"; fi

bench: vulkan ## every strategy, schedule and table on links to order, 4 ranks, 8 sequences
	$(CARGO) run --release --bin exflow -- bench strategies --ranks 4 --sequences 8

vulkan:
	@bash scripts/ensure-vulkan.sh

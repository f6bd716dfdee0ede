# Every target is at most three lines and calls one tool or one script.
# KEEP=1 make demo      leaves the demo running
# make bench SUITE=NAME one suite only, of datapath, flow, policy, l7, cluster, encryption and service ONLY=SECTION, of service SERVICES=10,1000
# make golden UPDATE=1  rewrites the golden files
# make kernels ONLY=packets   the tests with this in their names, on both kernels
# make e2e ONLY=dns     the steps with this in their names; make e2e-faults ONLY=hundred and
#                       make platforms ONLY=gke likewise

export KEEP SUITE ONLY UPDATE NODES LIKE AWAY FAMILY ARCH
.DEFAULT_GOAL := help
.PHONY: setup build check deny test golden verify kernels arm64 upgrade fuzz bench demo image kind kind-down cluster cluster-down e2e e2e-faults platforms ui ui-test deploy undeploy clean help

setup: ## install what the build needs and the machine lacks (Debian, Ubuntu)
	@scripts/setup

build: setup ## build weir and weir-cni for use
	cargo build --release --bins

check: setup ## formatting and lints
	cargo fmt --check
	cargo clippy --all-targets -- --deny warnings

deny: ## licences, sources and duplicates of the dependencies, where cargo-deny is installed
	@if command -v cargo-deny >/dev/null; then cargo deny --all-features check bans licenses sources; \
	else echo "SKIPPED (needs cargo-deny: cargo install cargo-deny --locked): make deny"; fi

test: setup ## unit tests, packet tables, golden files and the lab (root)
	@scripts/test

golden: setup ## YAML in, map dump out: compare the golden files
	cargo test --test it golden

verify: setup ## verified instructions of every BPF program (root)
	cargo run --bin weir -- verify --limit 200000

fuzz: setup ## random policies by the model, the compiler and the loaded programs, until something differs (root)
	WEIR_POLICY_SEEDS=1000000000 PROPTEST_CASES=1000000 cargo test --test it -- loaded_policy policy_model policy_classes

bench: setup ## measure; tables here, JSON in target/bench (root)
	cargo build --release --bins --example bench --example cluster && cargo run --release --example bench

kernels: setup ## programs, packets and the lab on Linux 6.1 and 6.12, emulated (root)
	for release in 6.1 6.12; do CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="scripts/kernel $$release" \
		cargo test --test it -- $(or $(ONLY),datapath:: packets encryption:: same_node two_nodes services::) || exit 1; done

arm64: setup ## cross-compiled: the verifier and the packets (ONLY=...) on an emulated arm64 machine (root)
	scripts/arm64 verify && scripts/arm64 test $(ONLY)

upgrade: setup ## from the agent of the former ABI version to this one, under traffic (root)
	scripts/previous && cargo test --test it -- upgrade::

demo: setup ## two nodes, a small shop, its policies and its flows (root)
	cargo build --bins --example demo && cargo run --example demo

image: setup ## the container image, into docker, podman or buildah; ARCH=arm64 cross-compiles
	@scripts/image

kind: ## a kind cluster without a network: two workers, FAMILY=dual, ipv4 or ipv6
	@scripts/kind up

kind-down: ## delete it
	@scripts/kind down

cluster: setup ## real Kubernetes on this machine, without docker: NODES=3, LIKE=gke, eks, aks, k3s (root)
	cargo build --example cluster && target/debug/examples/cluster up

cluster-down: ## end and remove it
	@tests/lab/clean weirlab-cluster

e2e: setup ## end-to-end tests on a real cluster of their own (root)
	cargo build --bins --example cluster && cargo test --test e2e -- $(ONLY)

e2e-faults: setup ## the same cluster, and what it survives: AWAY=120 seconds without API server (root)
	cargo build --bins --example cluster && cargo test --test e2e -- --faults $(ONLY)

platforms: setup ## nodes like those of k3s, EKS, AKS, GKE and kubeadm: deploy, try, undeploy (root)
	cargo build --bins --example cluster && cargo test --test e2e -- --platforms $(ONLY)

ui: ## build the page into ui/dist (Node.js 20.19 or later, npm)
	@scripts/ui build

ui-test: ## the page: unit tests, Chromium, and whether ui/dist is what its sources give
	@scripts/ui test

deploy: setup ## build the image, install Weir in the cluster of kubectl's context
	@scripts/deploy up

undeploy: ## take Weir and all its traces off the cluster
	@scripts/deploy down

clean: ## remove what was built, and labs that were left behind
	tests/lab/clean --dead
	cargo clean

help:
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' Makefile | expand -t 12

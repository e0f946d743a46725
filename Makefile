# Thin names over cargo and the scripts of hack/; each target says what it does while it runs.
.PHONY: help setup build test lint lab bench bench-csi bench-services demo demo-cluster conformance-network conformance-storage cluster-programs kernels clean \
	setup-build setup-lab setup-cluster
.DEFAULT_GOAL := help

LAB := $(or $(CARGO_TARGET_DIR),target)/release/keelway-lab

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 24

setup: ## prepare a Debian 12 machine for everything below; quick when nothing is missing
	@hack/setup

# What a target needs of it.
setup-build setup-lab setup-cluster:
	@hack/setup $(@:setup-%=%)

build: setup-build ## build every program into target/release
	@hack/build

test: setup ## run every suite; ends in a table
	@cargo xtask test

lint: ## format, walls, scripts, licences and clippy; what is not installed is skipped and named
	@cargo xtask test format walls scripts "licences and bans" clippy

lab: setup-lab build ## two nodes to look around in, until Ctrl-C
	@$(LAB) lab

demo: setup-lab build ## the whole story on two nodes without Kubernetes; ends in a table
	@$(LAB) demo

bench: setup-lab build ## latency, throughput, time of programs, CNI calls, memory, each beside its peer; ends in a table
	@$(LAB) bench

bench-csi: setup-lab build ## volumes made, mounted and back, and fio on them, each beside Debian's tools by hand; ends in a table
	@$(LAB) bench-csi

bench-services: cluster-programs ## what Services cost beside real kube-proxy on the same objects (15 min); ends in a table
	@$(LAB) bench-services

cluster-programs: setup-lab setup-cluster build ## build etcd, Kubernetes, containerd, CoreDNS, the CSI sidecars into the cache (11 min once)
	@$(LAB) cluster build

demo-cluster: cluster-programs ## the same on a real Kubernetes
	@$(LAB) demo-cluster

conformance-network: setup-lab setup-cluster build ## upstream's [sig-network] specs on a real Kubernetes: [Conformance], Services, DNS, proxy
	@$(LAB) cluster build --suite
	@hack/conformance-network

conformance-storage: setup-lab setup-cluster build ## upstream's External.Storage suite against the volume driver on a real Kubernetes
	@$(LAB) cluster build --suite
	@hack/conformance-storage

kernels: setup ## load and run the data plane on Debian's 6.1 and 6.12 kernels under QEMU
	@cargo xtask kernels

clean: ## remove what was built
	cargo clean

# Thin names over cargo and the scripts of hack/; each target says what it does while it runs.
.PHONY: help setup build test lint kernels clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 24

setup: ## prepare a Debian 12 machine; quick when nothing is missing
	@hack/setup

build: setup ## build every program into target/release
	hack/build

test: setup ## run every suite; ends in a table
	@cargo xtask test

lint: ## format, walls, scripts, licences and clippy
	@cargo xtask test format walls scripts "licences and bans" clippy

kernels: setup ## load and run the data plane on Debian's 6.1 and 6.12 kernels under QEMU
	@cargo xtask kernels

clean: ## remove what was built
	cargo clean

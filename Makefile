# Debian 12 and Go are all that is assumed; demo, test and bench install the
# Debian packages that they miss, which needs root.

# git may be missing, or may distrust the owner of the checkout.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

# CI asks for the name of each test; a person sees one line a package.
TESTFLAGS ?= $(if $(CI),-v)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Where Go's own installer puts it, for shells whose PATH does not say so.
export PATH := $(PATH):/usr/local/go/bin
# The version is set below: Go need not ask git, which fails on a distrusted checkout.
export GOFLAGS += -buildvcs=false
# There is no C here; saying so for all commands lets build and test share Go's cache.
export CGO_ENABLED := 0

.PHONY: build demo test bench lint clean openapi crash-journal crash-matrix simulate

build:
	go build -ldflags "-X main.version=$(VERSION)" -o switchback ./cmd/switchback

# Two sites, two guests, the whole loop; writes demo.json.
demo:
	scripts/install-packages.sh demo
	$(MAKE) build
	./switchback lab demo

# -count=1: what was true of this machine's QEMU yesterday is no result.
test:
	scripts/install-packages.sh test
	$(MAKE) build
	go vet ./...
	go test -count=1 -p 2 -timeout 40m $(TESTFLAGS) ./...

# Crashes a journal RUNS times, at every operation of random histories, and looks
# whether all that was acknowledged is there; SEED=N begins with that history.
# MUTANTS=1 plants known bugs instead and fails unless each is caught.
RUNS ?= 10000
SEED ?= 1000
crash-journal:
	@bin=$$(mktemp) && trap 'rm -f "$$bin"' EXIT && go test -c -o "$$bin" ./journal && cd journal && \
	if [ -n "$(MUTANTS)" ]; then "$$bin" -test.v -test.timeout 0 -test.run '^TestCrashFindsBugs$$' -crash.mutants -crash.seed $(SEED); \
	else "$$bin" -test.v -test.timeout 0 -test.run '^TestCrash$$' -crash.runs $(RUNS) -crash.seed $(SEED); fi
# Who is active, decided over a network that fails in every way, SEEDS times; ends
# with "N seeds, N violations". SEED=N begins with that seed, MUTANTS=1 plants
# known bugs instead and fails unless each is caught.
SEEDS ?= 5000
simulate:
	@if [ -n "$(MUTANTS)" ]; then go test -count=1 -v -timeout 0 ./fencing -run '^TestSimulationFindsBugs$$'; \
	else bin=$$(mktemp) && trap 'rm -f "$$bin"' EXIT && go test -c -o "$$bin" ./fencing && \
		"$$bin" -test.timeout 0 -test.run '^TestSimulation$$' -simulate.seeds $(SEEDS) -simulate.seed $(SEED) > "$$bin.out"; \
		status=$$?; grep -v '^[0-9]* seeds,\|^PASS$$\|^FAIL$$' "$$bin.out"; grep '^[0-9]* seeds,' "$$bin.out"; rm -f "$$bin.out"; exit $$status; fi

# kill -9 at every line that matters, on simulated hypervisors; ends with "N cells, N failed".
crash-matrix:
	scripts/install-packages.sh test
	@rm -f crash-matrix.txt
	@go test -count=1 -timeout 4h ./lab/simlab -run '^TestCrashMatrix$$' -matrix.full -matrix.report=$(CURDIR)/crash-matrix.txt; \
		status=$$?; tail -n 1 crash-matrix.txt; exit $$status

# Against the tools that people use today; writes bench.json.
bench:
	scripts/install-packages.sh bench
	$(MAKE) build
	go run ./bench

# The API's document, which is kept in the repository; a test says when it is stale.
openapi: build
	./switchback server openapi > docs/api/openapi.yaml

lint:
	go vet ./...
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "gofmt these:"; echo "$$unformatted"; exit 1; fi
	go test -count=1 ./internal/lint
	@if go run $(STATICCHECK) -version >/dev/null 2>&1; then \
		echo "staticcheck ./..."; go run $(STATICCHECK) ./...; \
	else echo "staticcheck cannot be fetched here: skipped"; fi

clean:
	rm -f switchback demo.json bench.json crash-matrix.txt

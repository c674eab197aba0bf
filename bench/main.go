// Command bench measures Switchback against the tools that a user would reach
// for otherwise, and prints a table: `make bench`, or `go run ./bench`.
//
// It makes a lab of its own (two sites, server, agents, TLS over the lab's WAN)
// with two guests whose disks are equal: one is protected by Switchback, the
// other is the peers'. Both get the same seeded changes before each sample, and
// whose turn is first alternates, so that what disturbs the machine disturbs
// both. A figure is the median of its samples; all samples are in the report.
//
//	name               ours                                      peer
//	seed_vs_nbdcopy    seconds of the first full copy, as the    nbdcopy of a pull-mode backup of the same guest to
//	                   agent reports them                        a qemu-nbd at the target that writes a fresh qcow2
//	cycle_1mb          whole cycle, 1 MB in scattered 4 KiB      libvirt's push-mode incremental backup to a local qcow2
//	cycle_1mb_core     without begin and delete                  the same
//	cycle_1mb_vs_tool  whole cycle                               virtnbdbackup -l inc
//	cycle_64mb_mixed   whole cycle, 64 MB mixed                  push-mode backup
//	wire_per_changed   bytes of both directions on the WAN per   allocated bytes of the push-mode backup's target per
//	                   byte changed (4 KiB truth), 64 MB mixed   byte changed: information, the goal is for ours alone
//	wire_rand4k        the same, random 4 KiB only               the same
//	guest_p50, _p99    guest's 4 KiB O_DSYNC writes, 1 s cycles  the same guest, not protected
//	boot_ratio         start to CHECKED line, overlay on a view  plain qcow2 with the same content
//	view_seq           nbdcopy of a view to null:                of qemu-nbd on a raw file with the same content
//	view_rand4k        random 4 KiB reads, depth 16              the same
//	view_*_100         the same two, 100 points over the base    the same
//	boot_1000_points   boot_ratio's start, of the newest of      the same content as one point: the others merged away
//	                   1,000 points
//	drill_seconds_over_boot  request of a drill to CHECKED line  boot of the plain qcow2: the goal is for their
//	                   of its copy                               share of 2 s + 1.15 × boot
//	rpo_during_drills  p99 of the RPO during ten drills in a row the same in as long a time without
//	journal_space      bytes of the segments                     bare zstd of the changed blocks, in 64 KiB pieces
//	fold_throughput    live bytes folded per second              sequential write of as many bytes, synced
//	merge_throughput   stored bytes merged per second            the same
//	view_bytes_per_extent  memory of an open view per extent     a plain table of as many: the goal is for ours alone
//
// The report is a list of entries (type entry) as JSON. A measure without its
// peer or with too few samples is a failure, as is a copy that is not equal to
// its source: the exit status is 1 then and the entry is missing. A goal that is
// missed is said, and is no failure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// minRuns is what a median needs to count.
const minRuns = 5

// measureLimit bounds one measure: what waits for a failing replication would wait for ever.
const measureLimit = 30 * time.Minute

// config is what the flags say.
type config struct {
	runs       int
	only       []string
	quick      bool
	keep       bool
	dir        string
	output     string
	executable string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cfg, err := parse(os.Args[1:])
	if err == nil {
		err = run(ctx, cfg)
	}
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (config, error) {
	cfg := config{}
	only := ""
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.IntVar(&cfg.runs, "runs", minRuns, "samples of each side of each measure")
	f.StringVar(&only, "only", "", "measure only these (names, separated by commas)")
	f.BoolVar(&cfg.quick, "quick", false, "small sizes and any number of runs: for development, the report says so")
	f.BoolVar(&cfg.keep, "keep", false, "leave the lab up: for development")
	f.StringVar(&cfg.dir, "dir", fmt.Sprintf("/var/tmp/sb-bench-%d", os.Getpid()), "directory of the lab; it is removed at the end")
	f.StringVar(&cfg.output, "o", "bench.json", "the report")
	f.StringVar(&cfg.executable, "executable", "", "switchback binary to measure (default: built from the source)")
	if err := f.Parse(args); err != nil {
		return cfg, err
	}
	if f.NArg() > 0 {
		return cfg, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if only != "" {
		cfg.only = strings.Split(only, ",")
	}
	for _, name := range cfg.only {
		if _, ok := goals[name]; !ok {
			return cfg, fmt.Errorf("no measure is called %q", name)
		}
	}
	if cfg.runs < 1 || cfg.runs < minRuns && !cfg.quick {
		return cfg, fmt.Errorf("%d runs are too few: a median needs %d (any number with -quick)", cfg.runs, minRuns)
	}
	return cfg, nil
}

// measure yields the entries of one or more names.
type measure struct {
	names []string
	run   func(context.Context, *bed) ([]entry, error)
}

// measures in the order they run in: the first full copy is of untouched disks,
// and the last one takes the protection away.
var measures = []measure{
	{[]string{"seed_vs_nbdcopy"}, measureSeed},
	{[]string{"cycle_1mb", "cycle_1mb_core"}, measureCycle1MB},
	{[]string{"cycle_64mb_mixed", "wire_per_changed"}, measureCycleMixed},
	{[]string{"wire_rand4k"}, measureWireRandom},
	{[]string{"cycle_1mb_vs_tool"}, measureCycleTool},
	{[]string{"view_seq", "view_rand4k"}, measureView},
	{[]string{"boot_ratio"}, measureBoot},
	{[]string{"drill_seconds_over_boot"}, measureDrill},
	{[]string{"view_seq_100", "view_rand4k_100"}, measureView100},
	{[]string{"boot_1000_points"}, measureBootPoints},
	{[]string{"guest_p99", "guest_p50"}, measureGuest},
	{[]string{"rpo_during_drills"}, measureRPO},
	{[]string{"journal_space", "fold_throughput", "merge_throughput"}, measureJournal},
	{[]string{"view_bytes_per_extent"}, measureViewMemory},
}

func (c config) wants(name string) bool { return len(c.only) == 0 || slices.Contains(c.only, name) }

func run(ctx context.Context, cfg config) (err error) {
	if err := checkTools(); err != nil {
		return err
	}
	output, err := filepath.Abs(cfg.output)
	if err != nil {
		return err
	}
	// A report of an earlier run must not pass for this one's.
	if err := os.Remove(output); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	begin := time.Now()
	b, err := makeBed(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.takeDown(context.WithoutCancel(ctx))) }()

	var entries []entry
	var failures []error
	for _, m := range measures {
		if !slices.ContainsFunc(m.names, cfg.wants) {
			continue
		}
		b.say("%s …", strings.Join(m.names, ", "))
		bounded, cancel := context.WithTimeoutCause(ctx, measureLimit, fmt.Errorf("no end after %v", measureLimit))
		got, err := m.run(bounded, b)
		cancel()
		for _, e := range got {
			if err == nil && cfg.wants(e.Name) {
				e.Quick, e.Load = cfg.quick, load()
				entries = append(entries, e)
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			b.say("FAILED: %v", err)
			failures = append(failures, fmt.Errorf("%s: %w", strings.Join(m.names, ", "), err))
		}
	}
	for _, m := range measures {
		for _, name := range m.names {
			if cfg.wants(name) && len(failures) == 0 && !slices.ContainsFunc(entries, func(e entry) bool { return e.Name == name }) {
				failures = append(failures, fmt.Errorf("%s: no result", name))
			}
		}
	}
	for _, e := range entries {
		if err := e.check(cfg.runs); err != nil {
			failures = append(failures, err)
		}
	}
	if err := writeReport(output, entries); err != nil {
		failures = append(failures, err)
	}
	printTable(os.Stdout, entries)
	fmt.Printf("%d of %d measures, %s, report in %s\n", len(entries), wanted(cfg), time.Since(begin).Round(time.Second), output)
	return errors.Join(failures...)
}

func wanted(cfg config) (n int) {
	for name := range goals {
		if cfg.wants(name) {
			n++
		}
	}
	return n
}

// Command witness answers questions about disks and consoles as JSON. It exits
// with 1 if the answer is a bad one (records missing, disks that differ), with 2
// if there is none.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/switchback-dr/switchback/witness"
)

const usage = `usage: witness COMMAND ...
  records [-offset BYTES] [-slots N] DISK...   are the VM's records whole and in order?
  sha256 [-plain] [-all] DISK                  hash of the content
  compare DISK DISK                            is the content the same?
  changed [-block BYTES] DISK DISK             how many blocks differ?
  console FILE                                 what did the guest say?
A DISK is an image file or an NBD URI.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	good, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(2)
	}
	if !good {
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (good bool, err error) {
	if len(args) == 0 {
		return false, fmt.Errorf("no command\n%s", usage)
	}
	fs := flag.NewFlagSet(args[0], flag.ContinueOnError)
	offset := fs.Int64("offset", 2<<30, "where the ring of records begins")
	slots := fs.Int64("slots", 4096, "records in the ring of each disk")
	plain := fs.Bool("plain", false, "the hash that sha256sum prints")
	all := fs.Bool("all", false, "read holes, too")
	block := fs.Int64("block", 64<<10, "block size")
	if err := fs.Parse(args[1:]); err != nil {
		return false, err
	}
	want := map[string]int{"sha256": 1, "compare": 2, "changed": 2, "console": 1}
	if n, ok := want[args[0]]; ok && fs.NArg() != n {
		return false, fmt.Errorf("%s takes %d arguments\n%s", args[0], n, usage)
	}
	var answer any
	good = true
	switch args[0] {
	case "records":
		var r *witness.Records
		if r, err = witness.VerifyRecords(ctx, witness.Ring{Offset: *offset, Slots: *slots}, fs.Args()...); err == nil {
			answer, good = r, r.OK()
		}
	case "sha256":
		if *plain {
			answer, err = witness.PlainSHA256OfDisk(ctx, fs.Arg(0))
		} else {
			answer, err = witness.SHA256OfDisk(ctx, fs.Arg(0), witness.ReadHoles(*all))
		}
	case "compare":
		var c witness.Comparison
		c, err = witness.CompareDisks(ctx, fs.Arg(0), fs.Arg(1))
		answer, good = c, c.Identical
	case "changed":
		answer, err = witness.ChangedBlocks(ctx, fs.Arg(0), fs.Arg(1), *block)
	case "console":
		answer, err = witness.ParseConsole(fs.Arg(0))
	default:
		err = fmt.Errorf("unknown command %s\n%s", args[0], usage)
	}
	if err != nil {
		return false, err
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	return good, out.Encode(answer)
}

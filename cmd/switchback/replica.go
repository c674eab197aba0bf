package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/journal"
)

func parseBytes(text string) (int64, error) {
	n, err := humanize.ParseBytes(text)
	return int64(n), err
}

// replicaCommand works on a replica's directory alone: no server, no agent. It
// only reads, and may be used while an agent has the replica open.
func (c *cli) replicaCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "replica", Short: "Read a replica's directory, with no server and no agent"})
	cmd.AddCommand(c.replicaInspect(), c.replicaExport())
	return cmd
}

// inspection is what inspect shows.
type inspection struct {
	journal.Inspection
	Point  *journal.PointDetail  `json:"point,omitempty"`
	Branch *journal.BranchDetail `json:"branch,omitempty"`
	Check  *journal.CheckState   `json:"check,omitempty"`
}

func (c *cli) replicaInspect() *cobra.Command {
	var point uint64
	var snapshot string
	var verify bool
	cmd := &cobra.Command{Use: "inspect DIR", Short: "Show manifest, points, snapshots, marks, pins, chain and damage of a replica", Args: one("DIR"), RunE: func(cmd *cobra.Command, args []string) error {
		in, err := journal.Inspect(args[0])
		if err != nil {
			return err
		}
		x := inspection{Inspection: in}
		if point > 0 {
			d, err := journal.InspectPoint(args[0], switchback.Sequence(point))
			if err != nil {
				return err
			}
			x.Point = &d
		}
		if snapshot != "" {
			d, err := journal.InspectBranch(args[0], snapshot)
			if err != nil && (!verify || switchback.CodeOf(err) != switchback.CodeCorrupt) {
				return err
			}
			x.Branch = &d
		}
		if verify {
			st, err := journal.Check(cmd.Context(), args[0], journal.CheckOptions{Point: switchback.Sequence(point), Branch: snapshot})
			if err != nil {
				return err
			}
			x.Check, x.Damage = &st, st.Damage
		}
		if err := c.show(x, func(w io.Writer) { printInspection(w, x) }); err != nil {
			return err
		}
		if n := len(x.Damage); n > 0 {
			return switchback.Errorf(switchback.CodeCorrupt, "the replica is damaged in %d places", n).
				WithHint("while its VM is protected: switchback points repair VM")
		}
		return nil
	}}
	cmd.Flags().Uint64Var(&point, "point", 0, "show everything of this point; with --verify, look only at what its readers read")
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "show everything of this snapshot; with --verify, look only at what its readers read")
	cmd.MarkFlagsMutuallyExclusive("point", "snapshot")
	cmd.Flags().BoolVar(&verify, "verify", false, "read everything and compare it with its checksums")
	return cmd
}

func printInspection(w io.Writer, x inspection) {
	m := x.Manifest
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-9s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("replica", "of VM %s (%s), protection %s, epoch %d", m.Name, m.VM, m.Protection, m.Epoch)
	if x.Open != "" {
		line("open", "by process %s", x.Open)
	}
	for _, d := range m.Disks {
		line("base", "%s, %s, %s", d.Name, bytesText(d.SizeBytes), d.BasePath)
	}
	switch {
	case m.Detached:
		line("state", "a self-contained snapshot: there are no points and no bases")
	case m.FoldedBranch != "":
		line("state", "a commit is under way: the bases take in snapshot %s", m.FoldedBranch)
	case m.Seeding:
		line("state", "the first copy is under way: there is no point yet")
	case m.Folding > 0:
		line("state", "points up to %d are being folded into the base", m.Folding)
	case m.Dropping != nil:
		line("state", "points after %d are being deleted", *m.Dropping)
	case m.RetentionFrozen:
		line("state", "retention is frozen: a switch is uncommitted")
	}
	line("journal", "%d points, %s", len(x.Points), bytesText(x.SegmentBytes))
	for _, p := range x.Pins {
		line("pin", "%s at point %d %s", p.Name, p.Sequence, p.Info["for"])
	}
	for _, b := range x.Branches {
		line("snapshot", "%s", branchText(b))
	}
	if b := x.Branch; b != nil {
		fmt.Fprintln(w)
		for _, d := range b.Changes {
			line("disk", "%s, %s: %s changed in %d ranges (%s data, %s zeros)", d.Name, bytesText(d.SizeBytes), bytesText(d.ChangedBytes), d.Extents, bytesText(d.DataBytes), bytesText(d.ZeroBytes))
		}
		line("stored", "%s in %s", bytesText(b.StoredBytes), b.File)
	} else if x.Point != nil {
		fmt.Fprintln(w)
		printPoint(w, *x.Point)
		fmt.Fprintln(w)
	} else if len(x.Points) > 0 {
		printPoints(w, x.Points)
	}
	if x.Check != nil {
		line("verified", "%d segments and %s of the bases, %s in all", x.Check.Segments, bytesText(x.Check.BaseBytes), bytesText(x.Check.TotalBytes))
		if x.Check.UnprovenBytes > 0 {
			line("unproven", "%s of the bases: there is nothing to compare them with", bytesText(x.Check.UnprovenBytes))
		}
	}
	for _, d := range x.Damage {
		line("DAMAGE", "%v: affects %s", d, d.Points())
	}
	if len(x.Damage) == 0 {
		line("damage", "%s", map[bool]string{true: "none", false: "none met; --verify reads everything"}[x.Check != nil])
	}
}

// branchText is a snapshot in a few words.
func branchText(b journal.BranchInfo) string {
	switch {
	case b.Damaged:
		return fmt.Sprintf("%s cannot be read", b.Name)
	case b.Whole:
		return fmt.Sprintf("%s, self-contained: %s, of %s", b.Name, bytesText(b.StoredBytes), b.Time.Local().Format("2006-01-02 15:04:05"))
	}
	return fmt.Sprintf("%s on point %d (pin %s): %s changed, %s stored, of %s", b.Name, b.Point, b.Pin, bytesText(b.ChangedBytes), bytesText(b.StoredBytes), b.Time.Local().Format("2006-01-02 15:04:05"))
}

func (c *cli) replicaExport() *cobra.Command {
	var point uint64
	var snapshot, format, to, definition string
	cmd := &cobra.Command{Use: "export DIR {--point N | --snapshot NAME} --to PATH", Short: "Copy a point or a snapshot of a replica to images, or to a directory any QEMU starts from", Args: one("DIR"), RunE: func(cmd *cobra.Command, args []string) error {
		f, err := export.ParseFormat(format)
		if err != nil {
			return err
		}
		if to == "" {
			return switchback.Errorf(switchback.CodeInvalid, "--to is needed: where to export to")
		}
		if to, err = filepath.Abs(to); err != nil {
			return err
		}
		sockets, err := os.MkdirTemp("", "switchback-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(sockets)
		req := export.Request{Replica: args[0], Point: switchback.Sequence(point), Snapshot: snapshot, Format: f, To: to, SocketDir: sockets, Rewrite: rewriteDisks}
		if definition != "" {
			b, err := os.ReadFile(definition)
			if err != nil {
				return err
			}
			req.Definition = string(b)
		} else if f == export.Dir {
			kept, err := journal.ReadDefinition(args[0])
			if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
				return err
			}
			req.Definition = kept.Text
		}
		said := time.Now()
		req.Progress = func(done, total int64) {
			if !c.json() && time.Since(said) > 2*time.Second {
				said = time.Now()
				fmt.Fprintf(cmd.ErrOrStderr(), "%s of %s\n", bytesText(done), bytesText(total))
			}
		}
		res, err := export.Run(cmd.Context(), req)
		if err != nil {
			return err
		}
		return c.show(res, func(w io.Writer) {
			fmt.Fprintf(w, "%s: %s of content in %s\n  %s\n", exportedText(res), bytesText(res.Bytes), seconds(res.Took), strings.Join(res.Files, "\n  "))
		})
	}}
	cmd.Flags().Uint64Var(&point, "point", 0, "the point's number")
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "a snapshot's name, instead of a point")
	cmd.MarkFlagsMutuallyExclusive("point", "snapshot")
	cmd.Flags().StringVar(&format, "format", "qcow2", "raw, qcow2, or dir: qcow2 images with run.sh")
	cmd.Flags().StringVar(&to, "to", "", "path that does not exist yet: of the image for one disk, else of a directory")
	cmd.Flags().StringVar(&definition, "definition", "", "the VM's definition (domain XML), for --format dir, instead of the one kept with the replica")
	return cmd
}

// exportedText names what was exported.
func exportedText(r export.Result) string {
	if r.Snapshot != "" {
		return "snapshot " + r.Snapshot
	}
	return fmt.Sprintf("point %d", r.Point.Sequence)
}

// rewriteDisks points a definition's disks at stand-alone images.
func rewriteDisks(definition string, images map[string]string) (string, error) {
	sources := map[string]hypervisor.DiskSource{}
	for name, path := range images {
		sources[name] = hypervisor.DiskSource{Path: path, Format: "qcow2"}
	}
	return new(libvirt.Driver).Translate(definition, hypervisor.Translation{Disks: sources})
}

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/operation"
)

func (c *cli) pointsCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "points", Short: "Recovery points: look at them, mark, verify, export, delete"})
	cmd.AddCommand(c.pointsList("list VM"), c.pointsShow(), c.pointsTag(),
		c.pointsMark("untag", "Remove a point's tag", func(req *api.MarkRequest) { req.Tag = new(string) }),
		c.pointsMark("lock", "Keep a point: nothing drops it until it is unlocked", func(req *api.MarkRequest) { yes := true; req.Locked = &yes }),
		c.pointsMark("unlock", "Give a locked point back to retention", func(req *api.MarkRequest) { req.Locked = new(bool) }),
		c.pointsMark("dismiss", "Say that a suspicious point is well", func(req *api.MarkRequest) { req.Dismiss = true }),
		c.pointsVerify(), c.pointsExport(), c.pointsDelete(), c.pointsRepair())
	return cmd
}

// markText is a point's mark in a few words.
func markText(m switchback.Mark) string {
	var words []string
	if m.Tag != "" {
		words = append(words, fmt.Sprintf("%q", m.Tag))
	}
	if m.Locked {
		words = append(words, "locked")
	}
	if b := m.Boot; b != nil {
		if b.Passed {
			words = append(words, "boots")
		} else {
			words = append(words, "does not boot")
		}
	}
	if m.Suspicious != "" {
		words = append(words, "SUSPICIOUS")
	}
	return strings.Join(words, ", ")
}

func printPoints(w io.Writer, points []switchback.MarkedPoint) {
	table(w, "POINT\tTIME\tKIND\tEPOCH\tCHANGED\tSTORED\tMARK\tNOTE", func(row func(string, ...any)) {
		for _, p := range points {
			row("%d\t%s\t%s\t%d\t%s\t%s\t%s\t%s", p.Sequence, p.Time.Local().Format("2006-01-02 15:04:05.000"), p.Kind, p.Epoch,
				bytesText(p.ChangedBytes), bytesText(p.StoredBytes), markText(p.Mark), p.ResyncReason)
		}
	})
}

func (c *cli) pointsList(use string) *cobra.Command {
	return &cobra.Command{Use: use, Short: "List the recovery points of a VM", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		points, err := cl.Points(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return c.show(points, func(w io.Writer) { printPoints(w, points) })
	}}
}

// vmAndPoint is the arguments of most commands here.
func vmAndPoint(_ *cobra.Command, args []string) error {
	if len(args) != 2 {
		return usage(errors.New("needs VM and POINT: a number, a tag, oldest, or another choice such as latest-app or before:10m"))
	}
	return nil
}

func printPoint(w io.Writer, d journal.PointDetail) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-11s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("point", "%d, %s", d.Sequence, d.Kind)
	line("time", "%s (%s)", d.Time.Local().Format("2006-01-02 15:04:05.000"), ago(d.Time))
	line("epoch", "%d", d.Epoch)
	line("digest", "%s", d.Digest)
	if d.Parent != "" {
		line("parent", "%s", d.Parent)
	}
	if d.Checkpoint != "" {
		line("checkpoint", "%s", d.Checkpoint)
	}
	if d.Resync {
		line("resync", "%s", d.ResyncReason)
	}
	if d.InBase {
		line("stored", "in the base images")
	} else {
		line("stored", "%s in %s", bytesText(d.StoredBytes), d.File)
	}
	for _, x := range d.Disks {
		line("disk", "%s, %s: %s changed in %d ranges (%s data, %s zeros)", x.Name, bytesText(x.SizeBytes), bytesText(x.ChangedBytes), x.Extents, bytesText(x.DataBytes), bytesText(x.ZeroBytes))
	}
	if d.Mark.Tag != "" {
		line("tag", "%s", d.Mark.Tag)
	}
	if d.Mark.Locked {
		line("locked", "kept until unlocked")
	}
	if b := d.Mark.Boot; b != nil {
		line("boot", "%s %s (%s)", map[bool]string{true: "proven", false: "failed"}[b.Passed], ago(b.At), b.Report)
	}
	if d.Mark.Suspicious != "" {
		line("suspicious", "%s", d.Mark.Suspicious)
	}
	for _, p := range d.Pins {
		line("pin", "%s", p)
	}
}

func (c *cli) pointsShow() *cobra.Command {
	return &cobra.Command{Use: "show VM POINT", Short: "Show everything of a point", Args: vmAndPoint, RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		d, err := cl.Point(cmd.Context(), args[0], args[1])
		if err != nil {
			return err
		}
		return c.show(d, func(w io.Writer) { printPoint(w, d) })
	}}
}

func (c *cli) markPoint(cmd *cobra.Command, vm, point string, req api.MarkRequest) error {
	cl, err := c.client()
	if err != nil {
		return err
	}
	p, err := cl.MarkPoint(cmd.Context(), vm, point, req)
	if err != nil {
		return err
	}
	return c.show(p, func(w io.Writer) {
		text := markText(p.Mark)
		if text == "" {
			text = "no mark"
		}
		fmt.Fprintf(w, "point %d: %s\n", p.Sequence, text)
	})
}

func (c *cli) pointsMark(use, short string, fill func(*api.MarkRequest)) *cobra.Command {
	return &cobra.Command{Use: use + " VM POINT", Short: short, Args: vmAndPoint, RunE: func(cmd *cobra.Command, args []string) error {
		var req api.MarkRequest
		fill(&req)
		return c.markPoint(cmd, args[0], args[1], req)
	}}
}

func (c *cli) pointsTag() *cobra.Command {
	return &cobra.Command{Use: "tag VM POINT TAG", Short: "Name a point", Args: func(_ *cobra.Command, args []string) error {
		if len(args) != 3 || args[2] == "" {
			return usage(errors.New("needs VM, POINT and TAG"))
		}
		return nil
	}, RunE: func(cmd *cobra.Command, args []string) error {
		return c.markPoint(cmd, args[0], args[1], api.MarkRequest{Tag: &args[2]})
	}}
}

// operatePoints begins an operation on points and follows it.
func (c *cli) operatePoints(cmd *cobra.Command, vm, point, kind string, req api.PointsRequest, noWait bool) error {
	cl, err := c.client()
	if err != nil {
		return err
	}
	a, err := cl.RequestPoints(cmd.Context(), vm, point, kind, req)
	if err != nil {
		return err
	}
	if noWait {
		return c.show(a.Operation, func(w io.Writer) {
			fmt.Fprintf(w, "%s begun: %s\nwatch it: switchback operation watch %s\n", a.Operation.Title, a.Operation.ID, a.Operation.ID)
		})
	}
	if !c.json() {
		fmt.Fprintf(c.out, "%s (%s)\n", a.Operation.Title, a.Operation.ID)
	}
	return c.follow(cmd.Context(), cl, a.Operation.ID, operation.StateSucceeded)
}

func (c *cli) pointsVerify() *cobra.Command {
	var all, noWait bool
	var rate, snapshot string
	cmd := &cobra.Command{Use: "verify VM [POINT]", Short: "Read a point, a snapshot, or a whole replica, and compare it with its checksums", RunE: func(cmd *cobra.Command, args []string) error {
		req := api.PointsRequest{Snapshot: snapshot}
		if snapshot != "" && (all || len(args) != 1) {
			return usage(errors.New("--snapshot needs VM alone"))
		}
		if rate != "" {
			n, err := parseBytes(rate)
			if err != nil {
				return usage(err)
			}
			req.BytesPerSecond = n
		}
		if !all {
			if len(args) < 1 || len(args) > 2 {
				return usage(errors.New("needs VM and perhaps POINT, or --all"))
			}
			point := ""
			if len(args) == 2 {
				point = args[1]
			}
			return c.operatePoints(cmd, args[0], point, api.PointsVerify, req, noWait)
		}
		if len(args) > 0 {
			return usage(errors.New("--all stands alone"))
		}
		cl, err := c.client()
		if err != nil {
			return err
		}
		vms, err := cl.VMs(cmd.Context())
		if err != nil {
			return err
		}
		var worst error
		for _, v := range vms {
			err := c.operatePoints(cmd, string(v.ID), "", api.PointsVerify, req, noWait)
			if switchback.CodeOf(err) == switchback.CodeRefused && !c.json() { // it has no points now
				fmt.Fprintf(c.out, "%s: %v\n", v.Name, err)
				continue
			}
			if err != nil {
				worst = err
				if !c.json() {
					printError(c.out, err)
				}
			}
			if cmd.Context().Err() != nil {
				break
			}
		}
		return worst
	}}
	cmd.Flags().BoolVar(&all, "all", false, "the replicas of all VMs, one after the other")
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "a snapshot, with what it reads of its point ('vm snapshots' lists them)")
	cmd.Flags().StringVar(&rate, "rate", "", "bytes per second to read at most, e.g. 50MiB; default: as fast as it goes")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the operation has begun")
	return cmd
}

func (c *cli) pointsExport() *cobra.Command {
	var req api.PointsRequest
	var noWait bool
	cmd := &cobra.Command{Use: "export VM {POINT | --snapshot NAME} --to PATH", Short: "Copy a point or a snapshot to images, or to a directory any QEMU starts from", RunE: func(cmd *cobra.Command, args []string) error {
		if req.Snapshot != "" {
			if len(args) != 1 {
				return usage(errors.New("--snapshot needs VM alone"))
			}
			return c.operatePoints(cmd, args[0], "", api.PointsExport, req, noWait)
		}
		if err := vmAndPoint(cmd, args); err != nil {
			return err
		}
		return c.operatePoints(cmd, args[0], args[1], api.PointsExport, req, noWait)
	}}
	cmd.Flags().StringVar(&req.Snapshot, "snapshot", "", "a snapshot, instead of a point ('vm snapshots' lists them)")
	exportFlags(cmd, &req.Format, &req.To)
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the operation has begun")
	return cmd
}

func exportFlags(cmd *cobra.Command, format, to *string) {
	cmd.Flags().StringVar(format, "format", "qcow2", "raw, qcow2, or dir: qcow2 images with the VM's definition and run.sh")
	cmd.Flags().StringVar(to, "to", "", "absolute path that does not exist yet: of the image for one disk, else of a directory; on the host that keeps the points")
}

func (c *cli) pointsDelete() *cobra.Command {
	var noWait bool
	cmd := &cobra.Command{Use: "delete VM POINT", Short: "Delete the oldest point", Args: vmAndPoint, RunE: func(cmd *cobra.Command, args []string) error {
		return c.operatePoints(cmd, args[0], args[1], api.PointsDelete, api.PointsRequest{}, noWait)
	}}
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the operation has begun")
	return cmd
}

func (c *cli) pointsRepair() *cobra.Command {
	var req api.PointsRequest
	var noWait bool
	cmd := &cobra.Command{Use: "repair VM", Short: "Have the source send again what is damaged at the target, and mend older points where it still has the very blocks", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		return c.operatePoints(cmd, args[0], "", api.PointsRepair, req, noWait)
	}}
	cmd.Flags().BoolVar(&req.DropUnreadable, "drop-unreadable", false, "also delete points that cannot be opened any more, and those after them")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the operation has begun")
	return cmd
}

// checkText says how the checks of a replica stand.
func checkText(st agentapi.CheckStatus) string {
	text := "not yet"
	if l := st.Last; l != nil {
		text = fmt.Sprintf("%s: %d points, %s in %s", ago(l.At), l.Points, bytesText(l.Bytes), seconds(l.Took))
		if len(l.Damage) > 0 {
			text += fmt.Sprintf(", %d DAMAGED places", len(l.Damage))
		} else {
			text += ", no damage"
		}
		if l.UnprovenBytes > 0 {
			text += fmt.Sprintf(", %s of the base unproven until the next", bytesText(l.UnprovenBytes))
		}
	}
	if st.Percent != nil {
		text += fmt.Sprintf("; under way, %.0f %%", *st.Percent)
	} else if !st.Next.IsZero() {
		text += "; next " + st.Next.Local().Format("2006-01-02 15:04")
	}
	return text
}

// printPointsSummary prints what an operation found or wrote.
func printPointsSummary(line func(name, format string, args ...any), s api.Summary) {
	if x := s.Check; x != nil {
		line("checked", "%d points, %s in %s", x.Points, bytesText(x.Bytes), seconds(x.Took))
		if x.UnprovenBytes > 0 {
			line("unproven", "%s of the base: read, but nothing was known to compare it with", bytesText(x.UnprovenBytes))
		}
		for _, d := range x.Damage {
			line("damage", "%v: affects %s", d, d.Points())
		}
		if len(x.Damage) == 0 {
			line("damage", "none")
		}
	}
	if x := s.Mend; x != nil {
		if len(x.Mended) > 0 {
			line("mended", "%d places, %s, also in older points", len(x.Mended), bytesText(x.Bytes))
		}
		for _, d := range x.Left {
			line("stays damaged", "%s: %v", d.Points(), d)
		}
	}
	if x := s.Export; x != nil {
		what := fmt.Sprintf("%s of content in %s", bytesText(x.Bytes), seconds(x.Took))
		if x.Existed {
			what = "it was there, and holds just this"
		}
		line("exported", "%s to %s: %s", exportedText(*x), x.Path, what)
	}
	if x := s.Proof; x != nil {
		switch {
		case x.Missing != "":
			line("equality", "NOT PROVEN: %s", x.Missing)
		case x.Equal:
			line("equality", "proven: both sides hash to the same at point %d (%s read in %s)", x.Point, bytesText(x.ReadBytes), seconds(x.Took))
		default:
			line("equality", "BOTH SIDES DIFFER: %s", x.Mismatch())
		}
		for _, d := range x.Disks {
			line("  "+d.Name, "sha256 tree %s", d.New)
		}
	}
}

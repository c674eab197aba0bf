package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// changeCommands are what can be done with a switched VM short of commit and cancel.
func (c *cli) changeCommands() []*cobra.Command {
	var change api.OperationRequest
	changePoint := c.vmOperation(recovery.ChangePoint, "change-point VM", "Run a switched VM from another point, or on from a kept snapshot; what it wrote is kept", func(req *api.OperationRequest, _ *cobra.Command) {
		req.Point, req.Snapshot, req.ShutdownDeadline, req.ForceOff = change.Point, change.Snapshot, change.ShutdownDeadline, change.ForceOff
	})
	changePoint.Flags().StringVar(&change.Point, "point", "", recovery.ChoiceHelp)
	changePoint.Flags().StringVar(&change.Snapshot, "snapshot", "", "go on from what an earlier run wrote ('vm snapshots' lists them)")
	changePoint.Flags().DurationVar(&change.ShutdownDeadline, "shutdown-deadline", 20*time.Second, "how long the guest may take to power off before the plug is pulled")
	changePoint.Flags().BoolVar(&change.ForceOff, "force-off", false, "pull the plug at once")

	var stop bool
	extend := &cobra.Command{Use: "extend VM [DURATION]", Short: "Move the deadline of the commit policy, or stop its countdown", Args: func(_ *cobra.Command, args []string) error {
		if len(args) < 1 || len(args) > 2 {
			return usage(fmt.Errorf("VM is needed, and how much longer"))
		}
		return nil
	}}
	extend.Flags().BoolVar(&stop, "stop", false, "stop the countdown: the switch waits for an operator")
	var by time.Duration
	plain := c.vmOperation(recovery.Extend, "extend VM", "", func(req *api.OperationRequest, _ *cobra.Command) { req.ExtendBy, req.Stop = by, stop })
	extend.Flags().AddFlagSet(plain.Flags())
	extend.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 2 {
			var err error
			if by, err = time.ParseDuration(args[1]); err != nil {
				return usage(err)
			}
		}
		if stop == (len(args) == 2) {
			return usage(fmt.Errorf("name how much longer, or --stop"))
		}
		return plain.RunE(cmd, args[:1])
	}

	var drop string
	dropPlain := c.vmOperation(recovery.DropSnapshot, "drop VM", "", func(req *api.OperationRequest, _ *cobra.Command) { req.Snapshot = drop })
	dropSnapshot := &cobra.Command{Use: "drop VM NAME", Short: "Delete a snapshot and let go of its point", Args: func(_ *cobra.Command, args []string) error {
		if len(args) != 2 {
			return usage(fmt.Errorf("VM and NAME are needed"))
		}
		return nil
	}}
	dropSnapshot.Flags().AddFlagSet(dropPlain.Flags())
	dropSnapshot.RunE = func(cmd *cobra.Command, args []string) error {
		drop = args[1]
		return dropPlain.RunE(cmd, args[:1])
	}
	snapshot := group(&cobra.Command{Use: "snapshot", Short: "What runs that were abandoned wrote"})
	snapshot.AddCommand(dropSnapshot)
	return []*cobra.Command{changePoint, extend, c.vmSnapshots(), snapshot}
}

// keptSnapshot is a snapshot with the site that keeps it.
type keptSnapshot struct {
	Site switchback.SiteID `json:"site"`
	agentapi.Snapshot
}

func keptSnapshots(v api.VM) []keptSnapshot {
	list := []keptSnapshot{}
	for _, side := range []struct {
		site   switchback.SiteID
		status *agentapi.VMStatus
	}{{v.Source, v.AtSource}, {v.Target, v.AtTarget}} {
		if side.status != nil {
			for _, s := range side.status.Snapshots {
				list = append(list, keptSnapshot{side.site, s})
			}
		}
	}
	return list
}

// rests says what a snapshot stands on.
func rests(s agentapi.Snapshot) string {
	switch {
	case s.SelfContained:
		return "whole disks"
	case s.InUse:
		return fmt.Sprintf("point %d, pinned; the VM runs from it", s.Point)
	case s.Pending:
		return fmt.Sprintf("point %d, pinned; being stored", s.Point)
	}
	return fmt.Sprintf("point %d, pinned", s.Point)
}

func (c *cli) vmSnapshots() *cobra.Command {
	return &cobra.Command{Use: "snapshots VM", Short: "List what runs that were abandoned wrote, kept until dropped", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		v, err := cl.VM(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		list := keptSnapshots(v)
		return c.show(list, func(w io.Writer) {
			table(w, "SNAPSHOT\tSITE\tRESTS ON\tEPOCH\tSPACE\tSET ASIDE", func(row func(string, ...any)) {
				for _, s := range list {
					row("%s\t%s\t%s\t%d\t%s\t%s", s.Name, s.Site, rests(s.Snapshot), s.Epoch, bytesText(s.SizeBytes), ago(s.Time))
				}
			})
			for _, s := range list {
				if !s.Pending {
					fmt.Fprintf(w, "%s: replica %s\n", s.Name, s.Dir)
				}
			}
		})
	}}
}

// printSwitch says what an uncommitted VM runs from and what will become of it.
func printSwitch(line func(name, format string, args ...any), v api.VM) {
	if sw := v.Switch; sw != nil && sw.Point.Sequence > 0 {
		from := fmt.Sprintf("point %d of %s", sw.Point.Sequence, sw.Point.Time.Local().Format("2006-01-02 15:04:05"))
		if sw.Snapshot != "" {
			from = "snapshot " + sw.Snapshot + ", on " + from
		}
		line("runs from", "%s; the last point is %d", from, sw.Last.Sequence)
	}
	if cd := v.Countdown; cd != nil {
		if cd.Seconds < 0 {
			line("countdown", "%s has been due for %s", cd.Action, time.Duration(-cd.Seconds*float64(time.Second)).Round(time.Second))
		} else {
			line("countdown", "%s by itself in %s, at %s (vm extend moves or stops it)", cd.Action, time.Duration(cd.Seconds*float64(time.Second)).Round(time.Second), cd.At.Local().Format("2006-01-02 15:04:05"))
		}
	}
	if v.AtSource != nil && v.AtSource.Kept != nil {
		k := v.AtSource.Kept
		line("kept points", "%d, read-only, %s: %s (gone with the first point of a reprotect, or vm drop-kept)", k.Points, bytesText(k.SizeBytes), k.Dir)
	}
	for _, s := range keptSnapshots(v) {
		line("snapshot", "%s at %s: %s, on %s, set aside %s", s.Name, s.Site, bytesText(s.SizeBytes), rests(s.Snapshot), ago(s.Time))
	}
}

// commitPolicyFlags are flags of protect and edit.
func commitPolicyFlags(cmd *cobra.Command, p *switchback.CommitPolicy) {
	cmd.Flags().StringVar((*string)(&p.Action), "commit-action", "none", "what becomes of a switch by itself: none, commit or undo")
	cmd.Flags().BoolVar(&p.KeepPoints, "commit-keep-points", false, "the commit keeps the points up to the chosen one")
	cmd.Flags().DurationVar(&p.After, "commit-after", 0, "how long after the switch")
}

// commitPolicyUnchanged keeps what was not named.
func commitPolicyUnchanged(cmd *cobra.Command, p *switchback.CommitPolicy, was switchback.CommitPolicy) {
	if !cmd.Flags().Changed("commit-action") {
		p.Action = was.Action
	}
	if !cmd.Flags().Changed("commit-keep-points") {
		p.KeepPoints = was.KeepPoints
	}
	if !cmd.Flags().Changed("commit-after") {
		p.After = was.After
	}
}

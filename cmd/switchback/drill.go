package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/recovery"
)

// checkList is a flag of checks in text form; "none" empties it.
type checkList struct {
	list []switchback.GuestCheck
	set  bool
}

func (l *checkList) Set(text string) error {
	l.set = true
	if text == "none" {
		l.list = nil
		return nil
	}
	c, err := check.Parse(text)
	if err == nil {
		l.list = append(l.list, c)
	}
	return err
}

func (l *checkList) Type() string { return "check" }

func (l *checkList) String() string {
	var texts []string
	for _, c := range l.list {
		texts = append(texts, check.Format(c))
	}
	return strings.Join(texts, ", ")
}

const checkUsage = "of the guest after each start; repeatable: power, agent, console:REGEXP, tcp:HOST:PORT, http://…, icmp:ADDRESS, exec:COMMAND, with ;timeout=, ;retries= and :optional; none = no checks"

// guestFlags are what a policy says of checks and drills.
type guestFlags struct {
	flags  []*cobra.Command
	checks checkList
	drill  switchback.DrillPolicy
}

func (g *guestFlags) add(cmd *cobra.Command) {
	g.flags = append(g.flags, cmd)
	f := cmd.Flags()
	f.Var(&g.checks, "check", checkUsage)
	f.StringVar(&g.drill.Schedule, "drill-schedule", "", "drill at these times: a cron expression, @daily …; \"\" = never")
	f.DurationVar(&g.drill.Interval, "drill-interval", 0, "warn when no drill has passed for so long")
	f.StringVar(&g.drill.Network, "drill-network", "", "isolated network of the target that drills use by themselves; \"\" = no network")
	f.StringVar(&g.drill.OnTag, "drill-on-tag", "", "drill a point when it gets a tag that begins so")
}

// apply sets what was named and takes the rest from the policy as it is.
func (g *guestFlags) apply(policy *switchback.Policy, now switchback.Policy) {
	named := func(name string) bool {
		for _, cmd := range g.flags {
			if cmd.Flags().Changed(name) {
				return true
			}
		}
		return false
	}
	policy.Checks, policy.Drill = now.Checks, now.Drill
	if g.checks.set {
		policy.Checks = g.checks.list
	}
	var d switchback.DrillPolicy
	if now.Drill != nil {
		d = *now.Drill
	}
	if named("drill-schedule") {
		d.Schedule = g.drill.Schedule
	}
	if named("drill-interval") {
		d.Interval = g.drill.Interval
	}
	if named("drill-network") {
		d.Network = g.drill.Network
	}
	if named("drill-on-tag") {
		d.OnTag = g.drill.OnTag
	}
	policy.Drill = nil
	if d != (switchback.DrillPolicy{}) {
		policy.Drill = &d
	}
}

func (c *cli) vmTestFailover() *cobra.Command {
	var req api.OperationRequest
	var checks checkList
	drill := &api.DrillRequest{}
	cmd := c.vmOperation(recovery.TestFailover, "test-failover VM…", "Run copies of points on an isolated network, check them, clear them (a drill)", func(r *api.OperationRequest, _ *cobra.Command) {
		r.Point, r.Drill = req.Point, drill
		drill.Checks = checks.list
	})
	cmd.Args = some("VM")
	one := cmd.RunE
	var points map[string]string
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 && len(points) == 0 {
			return one(cmd, args)
		}
		drill.Checks = checks.list
		return c.askDrills(cmd, api.DrillsRequest{VMs: args, Point: req.Point, Points: points, Drill: drill})
	}
	f := cmd.Flags()
	f.StringToStringVar(&points, "point-of", nil, "VM=point, where several VMs start from points of their own; repeatable")
	f.StringVar(&req.Point, "point", "latest-processed", "latest-processed, a point's number, or its tag")
	f.StringVar(&drill.Network, "test-network", "", "isolated network for all interfaces")
	f.StringToStringVar(&drill.Networks, "network", nil, "network of the VM=isolated network; repeatable")
	f.BoolVar(&drill.NoNetwork, "no-network", false, "leave the copy's interfaces out")
	f.BoolVar(&drill.KeepMACs, "keep-macs", false, "the copy has the MAC addresses of the VM")
	f.DurationVar(&drill.Keep, "keep", 0, "keep the copy running so long after its checks; 'vm drill clean' ends it before")
	f.DurationVar(&drill.Keep, "ttl", 0, "the same as --keep")
	f.Var(&checks, "check", "instead of the policy's checks, "+checkUsage)
	cmd.MarkFlagsMutuallyExclusive("no-network", "test-network")
	cmd.MarkFlagsMutuallyExclusive("no-network", "network")
	cmd.MarkFlagsMutuallyExclusive("keep", "ttl")
	return cmd
}

func (c *cli) vmDrill() *cobra.Command {
	cmd := group(&cobra.Command{Use: "drill", Short: "Drills of a VM: their reports, and clearing one that is kept"})
	cmd.AddCommand(c.drillList(), c.drillReport(), c.drillClean())
	return cmd
}

func (c *cli) drillList() *cobra.Command {
	var limit int
	cmd := &cobra.Command{Use: "list VM", Short: "List drills, newest first", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		list, err := cl.Drills(cmd.Context(), args[0], limit)
		if err != nil {
			return err
		}
		return c.show(list, func(w io.Writer) {
			table(w, "DRILL\tASKED\tBY\tPOINT\tRESULT\tGUEST UP AFTER\tCHECKED AFTER", func(row func(string, ...any)) {
				for _, d := range list {
					row("%s\t%s\t%s\t%d\t%s\t%s\t%s", d.Drill, ago(d.RequestedAt), d.Cause, d.Point.Sequence, drillResult(d), since(d, d.GuestUpAt), since(d, d.CheckedAt))
				}
			})
		})
	}}
	cmd.Flags().IntVar(&limit, "limit", 20, "at most so many")
	return cmd
}

func drillResult(d api.DrillReport) string {
	switch {
	case d.Judged && d.Passed:
		return "passed"
	case d.Error != "":
		return "failed"
	case !d.Judged:
		return "no verdict"
	}
	return "failed"
}

func since(d api.DrillReport, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return seconds(t.Sub(d.RequestedAt))
}

func (c *cli) drillReport() *cobra.Command {
	var id, screenshot string
	cmd := &cobra.Command{Use: "report VM", Short: "Show the report of a drill: point, times, checks, picture, bytes", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		list, err := cl.Drills(cmd.Context(), args[0], 100)
		if err != nil {
			return err
		}
		var report *api.DrillReport
		for i := range list {
			if id == "" || string(list[i].Drill) == id {
				report = &list[i]
				break
			}
		}
		if report == nil {
			return switchback.Errorf(switchback.CodeNotFound, "no such drill of %s", args[0]).WithHint("'switchback vm drill list %s' shows them, 'switchback vm test-failover %s' makes one", args[0], args[0])
		}
		if screenshot != "" {
			picture, err := cl.DrillPicture(cmd.Context(), report.Drill)
			if err != nil {
				return err
			}
			if err := os.WriteFile(screenshot, picture, 0o644); err != nil {
				return err
			}
		}
		return c.show(report, func(w io.Writer) { printDrill(w, *report) })
	}}
	cmd.Flags().StringVar(&id, "drill", "", "which one; default the newest")
	cmd.Flags().StringVar(&screenshot, "screenshot", "", "write the picture of the screen, PNG, to this file")
	return cmd
}

func printDrill(w io.Writer, d api.DrillReport) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-14s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("drill", "%s of %s at %s (%s)", d.Drill, d.VM, d.Site, d.Cause)
	if len(d.Together) > 0 {
		line("together with", "%s (%s)", strings.Join(d.Together, ", "), d.Group)
	}
	line("result", "%s", drillResult(d))
	if d.Error != "" {
		line("error", "%s", d.Error)
	}
	line("point", "%d of %s", d.Point.Sequence, d.Point.Time.Local().Format(time.DateTime))
	line("asked", "%s", d.RequestedAt.Local().Format(time.DateTime))
	if !d.GuestUpAt.IsZero() {
		networks := strings.Join(d.Networks, ", ")
		if networks == "" {
			networks = "none"
		}
		line("guest up", "after %s, as %s, network %s", since(d, d.GuestUpAt), d.Domain, networks)
	}
	for _, n := range d.Notes {
		line("  differs", "%s", n)
	}
	for _, r := range d.Checks {
		result := "passed " + r.Detail
		if !r.Passed {
			result = "FAILED " + r.Error
			if !r.Required {
				result = "failed (informative) " + r.Error
			}
		}
		line("check", "%s: %s (after %s, %d attempts)", r.Check, strings.TrimSpace(result), seconds(r.EndedAt.Sub(r.StartedAt)), r.Attempts)
	}
	if !d.CheckedAt.IsZero() {
		line("checked", "after %s", since(d, d.CheckedAt))
	}
	switch {
	case d.Screen != nil:
		line("screen", "%d×%d, %s (--screenshot FILE)", d.Screen.Width, d.Screen.Height, bytesText(int64(d.Screen.Bytes)))
	case d.NoScreen != "":
		line("screen", "no picture: %s", d.NoScreen)
	}
	if !d.CleanedAt.IsZero() {
		line("cleared", "after %s; it had written %s", since(d, d.CleanedAt), bytesText(d.BytesWritten))
	}
	if x := d.Replication; x != nil {
		line("replication", "%d points meanwhile, at most %s apart (before: %s)", x.Points, seconds(x.LongestGap), seconds(x.LongestGapBefore))
	}
	for _, l := range d.Left {
		line("LEFT", "%s", l)
	}
}

// printGuestPolicy shows checks and drills of a VM.
func printGuestPolicy(line func(name, format string, args ...any), v api.VM) {
	for _, x := range v.Policy.Checks {
		line("check", "%s", check.Format(x))
	}
	if d := v.Policy.Drill; d != nil {
		var parts []string
		if d.Schedule != "" {
			parts = append(parts, "at "+d.Schedule)
		}
		if d.OnTag != "" {
			parts = append(parts, "of points tagged "+d.OnTag+"…")
		}
		if d.Interval > 0 {
			parts = append(parts, "at least every "+d.Interval.String())
		}
		if d.Network != "" {
			parts = append(parts, "on network "+d.Network)
		}
		line("drills", "%s", strings.Join(parts, ", "))
	}
	if p := v.Protection.Drill.Passed; p != nil {
		line("proven to boot", "%s, from point %d of %s", ago(p.At), p.Sequence, p.Time.Local().Format(time.DateTime))
	}
}

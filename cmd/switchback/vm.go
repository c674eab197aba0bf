package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

func (c *cli) vmCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "vm", Short: "Protect VMs, move them, bring them back"})
	cmd.AddCommand(c.vmList(), c.vmShow(), c.pointsList("points VM"))

	var protectFrom, protectTo string
	var networks map[string]string
	policy := switchback.DefaultPolicy()
	var guest guestFlags
	policyFlags := func(cmd *cobra.Command) {
		guest.add(cmd)
		cmd.Flags().DurationVar(&policy.Interval, "interval", policy.Interval, "time between recovery points, from 1s")
		retentionFlags(cmd, &policy)
		cmd.Flags().StringVar(&policy.Compression, "compression", policy.Compression, "auto, none, s2 or zstd")
		cmd.Flags().BoolVar(&policy.Encrypt, "encrypt", policy.Encrypt, "encrypt points and snapshots where they are kept; base images, and what an uncommitted VM writes until it is a snapshot, are not: put the agent's storage on an encrypted file system")
		cmd.Flags().DurationVar(&policy.OffloadAfter, "offload-after", policy.OffloadAfter, "age at which points move to the object store of the target's agent; 0 = never")
		cmd.Flags().DurationVar(&policy.AppConsistentEvery, "app-consistent-every", policy.AppConsistentEvery, "how often a point freezes the guest's file systems through its agent; 0 = never")
		commitPolicyFlags(cmd, &policy.Commit)
		fencingFlags(cmd, &policy.Fencing)
		cmd.Flags().DurationVar(&policy.VerifyEvery, "verify-every", policy.VerifyInterval(), "how often all of the replica is read and compared with its checksums; negative = never")
	}
	protect := c.vmOperation(recovery.Protect, "protect VM", "Replicate a VM to another site", func(req *api.OperationRequest, _ *cobra.Command) {
		req.From, req.To, req.Networks, req.Policy = switchback.SiteID(protectFrom), switchback.SiteID(protectTo), networks, &policy
		guest.apply(&policy, switchback.Policy{})
	})
	protect.Flags().StringVar(&protectTo, "to", "", "target site")
	protect.Flags().StringVar(&protectFrom, "from", "", "source site; needed only where the name is ambiguous")
	protect.Flags().StringToStringVar(&networks, "network", nil, "network at home=network at the target; repeatable")
	policyFlags(protect)

	edit := c.vmOperation(recovery.Edit, "edit VM", "Change the replication policy: what is named, nothing else", func(req *api.OperationRequest, _ *cobra.Command) { req.Policy = &policy })
	policyFlags(edit)
	editPlain := edit.RunE
	edit.RunE = func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		v, err := cl.VM(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("interval") {
			policy.Interval = v.Policy.Interval
		}
		keepUnnamed(cmd, &policy, v.Policy)
		for name, keep := range map[string]func(){
			"compression":   func() { policy.Compression = v.Policy.Compression },
			"encrypt":       func() { policy.Encrypt = v.Policy.Encrypt },
			"offload-after": func() { policy.OffloadAfter = v.Policy.OffloadAfter },
		} {
			if !cmd.Flags().Changed(name) {
				keep()
			}
		}
		guest.apply(&policy, v.Policy)
		if !cmd.Flags().Changed("app-consistent-every") {
			policy.AppConsistentEvery = v.Policy.AppConsistentEvery
		}
		fencingUnchanged(cmd, &policy.Fencing, v.Policy.Fencing)
		commitPolicyUnchanged(cmd, &policy.Commit, v.Policy.Commit)
		if !cmd.Flags().Changed("verify-every") {
			policy.VerifyEvery = v.Policy.VerifyEvery
		}
		return editPlain(cmd, args)
	}

	moves := func(cmd *cobra.Command, req *api.OperationRequest) {
		cmd.Flags().StringVar(&req.Point, "point", "latest", recovery.ChoiceHelp)
		cmd.Flags().BoolVar(&req.AcceptLoss, "accept-loss", false, "agree to lose what was written after an older point")
		cmd.Flags().DurationVar(&req.ShutdownDeadline, "shutdown-deadline", 90*time.Second, "how long the guest may take to power off")
		cmd.Flags().BoolVar(&req.ForceOff, "force-off", false, "pull the plug when the deadline has passed")
		cmd.Flags().BoolVar(&req.NoProof, "no-proof", false, "do not compare both sides once the guest runs")
	}
	var move api.OperationRequest
	setMove := func(req *api.OperationRequest, _ *cobra.Command) {
		dry := req.DryRun
		*req = move
		req.DryRun = dry
	}
	failover := c.vmOperation(recovery.Failover, "failover VM", "Move a VM to the other site (planned: nothing is lost)", setMove)
	moves(failover, &move)
	failback := c.vmOperation(recovery.Failback, "failback VM", "Move a VM home; reprotects first where needed", setMove)
	moves(failback, &move)
	failback.Flags().BoolVar(&move.AndCommit, "commit", false, "also commit")
	failback.Flags().StringVar(&move.Points, "points", "delete", "with --commit: delete or keep the points up to the chosen one")
	failback.Flags().StringVar(&move.Snapshots, "snapshots", "", "with --commit: drop or keep snapshots that need the points")
	failback.Flags().BoolVar(&move.AndReprotect, "reprotect", false, "also protect again in the forward direction (needs --commit)")

	var remove bool
	unprotect := c.vmOperation(recovery.Unprotect, "unprotect VM", "End the protection; says what it leaves", func(req *api.OperationRequest, _ *cobra.Command) { req.RemoveData = remove })
	unprotect.Flags().BoolVar(&remove, "remove-data", false, "delete the replica or seed disks at the other site")

	plain := func(k recovery.Kind, use, short string) *cobra.Command {
		return c.vmOperation(k, use+" VM", short, func(*api.OperationRequest, *cobra.Command) {})
	}
	var appConsistent bool
	takePoint := c.vmOperation(recovery.TakePoint, "take-point VM", "Take a recovery point now", func(req *api.OperationRequest, _ *cobra.Command) { req.ApplicationConsistent = appConsistent })
	takePoint.Flags().BoolVar(&appConsistent, "app-consistent", false, "freeze the guest's file systems through its agent, or take none")
	var snapshots, keepPoints string
	var mismatch bool
	commit := c.vmOperation(recovery.Commit, "commit VM", "Make a switch final: plain local disks", func(req *api.OperationRequest, _ *cobra.Command) {
		req.Snapshots, req.Points, req.AcceptMismatch = snapshots, keepPoints, mismatch
	})
	commit.Flags().BoolVar(&mismatch, "accept-mismatch", false, "commit though both sides were found to differ")
	commit.Flags().StringVar(&snapshots, "snapshots", "", "drop the kept snapshots, or keep them, made self-contained")
	commit.Flags().StringVar(&keepPoints, "points", "delete", "delete them, or keep those up to the chosen one, read-only, until the new direction has its own")
	cmd.AddCommand(c.changeCommands()...)
	cmd.AddCommand(c.vmTestFailover(), c.vmDrill(), c.vmTag(), c.vmResolve())
	cmd.AddCommand(takePoint, commit, protect, edit, failover, failback, unprotect,
		plain(recovery.DropKept, "drop-kept", "Delete the points that a commit has kept"),
		plain(recovery.Cancel, "cancel", "Undo an uncommitted switch, or stop the operation under way"),
		plain(recovery.Reprotect, "reprotect", "Replicate a committed VM the other way, by delta"),
		plain(recovery.Pause, "pause", "Hold replication"),
		plain(recovery.Resume, "resume", "Go on with replication"),
		plain(recovery.Retry, "retry", "Let the failed operation of a VM go on"))
	return cmd
}

// vmOperation is a command that asks for an operation and follows it.
func (c *cli) vmOperation(kind recovery.Kind, use, short string, fill func(*api.OperationRequest, *cobra.Command)) *cobra.Command {
	var dry, noWait bool
	cmd := &cobra.Command{Use: use, Short: short, Args: one("VM")}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "say what would be done, to what, how many bytes, how long; do nothing")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the operation has begun")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		req := api.OperationRequest{DryRun: dry}
		fill(&req, cmd)
		return c.ask(cmd.Context(), cl, args[0], kind, req, noWait)
	}
	return cmd
}

func (c *cli) ask(ctx context.Context, cl *api.Client, vm string, kind recovery.Kind, req api.OperationRequest, noWait bool) error {
	a, err := cl.Request(ctx, vm, kind, req)
	if err != nil {
		return err
	}
	want := operation.StateSucceeded
	if kind == recovery.Cancel {
		want = operation.StateCancelled
	}
	return c.answered(ctx, cl, a, want, noWait)
}

// answered shows the plan, or follows the operation that was begun.
func (c *cli) answered(ctx context.Context, cl *api.Client, a api.OperationAnswer, want operation.State, noWait bool) error {
	if a.Plan != nil {
		return c.show(a.Plan, func(w io.Writer) { printPlan(w, *a.Plan) })
	}
	if noWait {
		return c.show(a.Operation, func(w io.Writer) {
			fmt.Fprintf(w, "%s begun: %s\nwatch it: switchback operation watch %s\n", a.Operation.Title, a.Operation.ID, a.Operation.ID)
		})
	}
	if !c.json() {
		fmt.Fprintf(c.out, "%s (%s)\n", a.Operation.Title, a.Operation.ID)
	}
	return c.follow(ctx, cl, a.Operation.ID, want)
}

func printPlan(w io.Writer, p api.Plan) {
	fmt.Fprintf(w, "%s %s would do this (nothing has been done):\n", p.Kind, p.VM)
	for i, s := range p.Steps {
		fmt.Fprintf(w, "  %2d. %s\n", i+1, s.Title)
	}
	for _, x := range p.Changes {
		fmt.Fprintf(w, "  changes: %s\n", x)
	}
	for _, x := range p.Keeps {
		fmt.Fprintf(w, "  keeps:   %s\n", x)
	}
	for _, x := range p.Warnings {
		fmt.Fprintf(w, "  warning: %s\n", x)
	}
	fmt.Fprintf(w, "  network: about %s (%s)\n", bytesText(p.Bytes), p.Basis)
	fmt.Fprintf(w, "  time:    about %s", seconds(p.Time))
	if p.Outage > 0 {
		fmt.Fprintf(w, ", outage about %s", seconds(p.Outage))
	}
	fmt.Fprintln(w)
}

func (c *cli) vmList() *cobra.Command {
	var all bool
	var filter api.VMFilter
	var site, phase string
	cmd := &cobra.Command{Use: "list", Short: "List protected VMs, or with --all every VM of the sites", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		if all {
			ms, err := cl.Machines(cmd.Context())
			if err != nil {
				return err
			}
			return c.show(ms, func(w io.Writer) {
				table(w, "VM\tSITE\tPOWER\tDISKS\tPROTECTION", func(row func(string, ...any)) {
					for _, m := range ms {
						prot := "-"
						if m.Protection != "" {
							prot = m.Role
						}
						row("%s\t%s\t%s\t%d\t%s", m.Domain.Name, m.Site, m.Domain.State, len(m.Domain.Disks), prot)
					}
				})
			})
		}
		filter.Site, filter.Phase = switchback.SiteID(site), switchback.Phase(phase)
		vms, err := cl.VMs(cmd.Context(), filter)
		if err != nil {
			return err
		}
		return c.show(vms, func(w io.Writer) {
			table(w, "VM\tPHASE\tACTIVE AT\tREPLICATES TO\tHEALTH\tLAST POINT\tRPO\tNOW", func(row func(string, ...any)) {
				for _, v := range vms {
					to, last, rpo, now := "-", "-", "-", "-"
					if v.Phase == switchback.PhaseProtected || v.Phase == switchback.PhaseSeeding || v.Phase == switchback.PhaseReprotecting {
						to = string(v.Target)
					}
					if v.LastPoint != nil {
						last = fmt.Sprint(v.LastPoint.Sequence)
					}
					if v.RPOSeconds > 0 {
						rpo = fmt.Sprintf("%.1f s", v.RPOSeconds)
					}
					if v.Current != nil {
						now = fmt.Sprintf("%s %s", v.Current.Kind, v.Current.State)
					}
					row("%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s", v.Name, v.Phase, v.Source, to, v.Health, last, rpo, now)
				}
			})
		})
	}}
	cmd.Flags().BoolVar(&all, "all", false, "every VM of the sites, protected or not")
	cmd.Flags().StringVar(&site, "site", "", "only protected VMs that are active at, or replicate to, a site")
	cmd.Flags().StringVar(&phase, "phase", "", "only those in a phase")
	cmd.Flags().StringVar(&filter.Tag, "tag", "", "only those with a tag")
	cmd.Flags().StringVar(&filter.Health, "health", "", "only those of a health: normal, warning or critical")
	return cmd
}

func (c *cli) vmShow() *cobra.Command {
	return &cobra.Command{Use: "show VM", Short: "Show a protected VM: phase, health, figures, what may be done", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		v, err := cl.VM(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return c.show(v, func(w io.Writer) { printVM(w, v) })
	}}
}

func printVM(w io.Writer, v api.VM) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-14s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("VM", "%s (%s), protection %s", v.Name, v.Protection.VM, v.ID)
	line("phase", "%s", v.Phase)
	line("active at", "%s, epoch %d (home is %s)", v.Source, v.Epoch, v.Home)
	line("other site", "%s", v.Target)
	if len(v.Tags) > 0 {
		line("tags", "%s", strings.Join(v.Tags, ", "))
	}
	line("policy", "a point every %s, compression %s", v.Policy.Interval, v.Policy.Compression)
	line("retention", "%s", retentionText(v.Policy.EffectiveRetention()))
	if every := v.Policy.AppConsistentEvery; every > 0 {
		line("", "an application-consistent point every %s", every)
	}
	if c := v.Policy.Commit; c.Action != "" && c.Action != switchback.CommitNone {
		line("", "%s %s after a switch", c.Action, c.After)
	}
	for _, d := range v.Disks {
		line("disk", "%s, %s", d.Name, bytesText(d.SizeBytes))
	}
	printGuestPolicy(line, v)
	line("health", "%s", v.Health)
	for _, x := range v.Conditions {
		line("  "+string(x.Severity), "%s: %s (remedy: %s)", x.Name, x.Cause, x.Remedy)
	}
	if v.LastPoint != nil {
		line("last point", "%d, %s, %s", v.LastPoint.Sequence, v.LastPoint.Kind, ago(v.LastPoint.Time))
	}
	if s := v.AtSource; s != nil && s.Replication != nil {
		r := s.Replication
		if r.Progress != nil {
			line("copying", "%s: %.0f %% of %s, %s/s, ETA %s", r.Activity, r.Progress.Percent, bytesText(r.Progress.TotalBytes), bytesText(int64(r.Progress.RateBytesPerSecond)), seconds(r.Progress.ETA))
		}
		if r.RPOMaxSeconds > 0 {
			line("RPO", "p50 %.2f s, p99 %.2f s, max %.2f s over %d cycles", r.RPOP50Seconds, r.RPOP99Seconds, r.RPOMaxSeconds, r.Cycles)
		}
		if lc := r.LastCycle; lc != nil {
			line("last cycle", "%s in %s: %s dirty, %s changed, %s sent (%s)", lc.Mode, seconds(lc.Total), bytesText(lc.DirtyBytes), bytesText(lc.ChangedBytes), bytesText(lc.SentBytes), lc.Codec)
		}
	}
	for _, t := range []*agentapi.VMStatus{v.AtSource, v.AtTarget} {
		if t == nil {
			continue
		}
		if t.Replica != nil {
			line("replica", "%d points%s, journal %s, %s free there", t.Replica.Points, oldestText(t.Replica.Oldest), bytesText(t.Replica.JournalBytes), bytesText(t.Replica.FreeBytes))
			if n := t.Replica.SnapshotBytes; n > 0 {
				line("", "and %s of snapshots", bytesText(n))
			}
			if t.Replica.Encrypted {
				line("", "new points are encrypted there, base images are not")
			}
			if t.Replica.Objects != "" {
				line("", "the data of %d points is in %s", t.Replica.Offloaded, t.Replica.Objects)
			}
		}
		if t.Check != nil {
			line("verified", "%s", checkText(*t.Check))
		}
	}
	printOwnership(line, v)
	printSwitch(line, v)
	for site, disks := range v.Seeds {
		for _, d := range disks {
			line("seed", "%s at %s: kept for the next reprotect, removed by unprotect --remove-data", d.Path, site)
		}
	}
	if v.CurrentDrill != nil {
		line("drill", "%s %s: %s", v.CurrentDrill.ID, v.CurrentDrill.Title, v.CurrentDrill.State)
	}
	if v.Current != nil {
		line("operation", "%s %s: %s", v.Current.ID, v.Current.Title, v.Current.State)
	}
	fmt.Fprintln(w, "operations")
	for _, a := range v.Allowed {
		if a.Allowed {
			fmt.Fprintf(w, "  %-13s possible\n", a.Kind)
		} else {
			fmt.Fprintf(w, "  %-13s not now: %s", a.Kind, a.Reason)
			if a.Remedy != "" {
				fmt.Fprintf(w, " (%s)", a.Remedy)
			}
			fmt.Fprintln(w)
		}
	}
}

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

func (c *cli) operationCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "operation", Aliases: []string{"op"}, Short: "List, show and watch operations"})
	var vm string
	var all bool
	var limit int
	list := &cobra.Command{Use: "list", Short: "List operations, newest first", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		ops, err := cl.Operations(cmd.Context(), vm, !all && vm == "", limit)
		if err != nil {
			return err
		}
		return c.show(ops, func(w io.Writer) {
			table(w, "ID\tOPERATION\tSTATE\tSTARTED\tTOOK\tBY", func(row func(string, ...any)) {
				for _, o := range ops {
					row("%s\t%s\t%s\t%s\t%s\t%s", o.ID, o.Title, o.State, ago(o.CreatedAt), took(o), o.RequestedBy)
				}
			})
		})
	}}
	list.Flags().StringVar(&vm, "vm", "", "only those of a VM")
	list.Flags().BoolVar(&all, "all", false, "ended ones, too")
	list.Flags().IntVar(&limit, "limit", 50, "at most so many")
	show := &cobra.Command{Use: "show ID", Short: "Show an operation with its steps and log", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		rec, err := cl.Operation(cmd.Context(), switchback.OperationID(args[0]))
		if err != nil {
			return err
		}
		log, err := cl.OperationLog(cmd.Context(), rec.ID, 0)
		if err != nil {
			return err
		}
		return c.show(struct {
			operation.Record
			Log []operation.LogLine `json:"log"`
		}{rec, log}, func(w io.Writer) {
			printOperation(w, rec)
			if len(log) > 0 {
				fmt.Fprintln(w, "\nlog")
			}
			for _, l := range log {
				fmt.Fprintf(w, "  %s %-5s %s%s\n", l.Time.Local().Format("15:04:05.000"), l.Level, l.Message, attrs(l.Attrs))
			}
		})
	}}
	watch := &cobra.Command{Use: "watch ID", Short: "Follow an operation until it ends", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		return c.follow(cmd.Context(), cl, switchback.OperationID(args[0]), operation.StateSucceeded)
	}}
	cancel := &cobra.Command{Use: "cancel ID", Short: "Stop an operation and undo what it did", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		if err := cl.CancelOperation(cmd.Context(), switchback.OperationID(args[0])); err != nil {
			return err
		}
		return c.follow(cmd.Context(), cl, switchback.OperationID(args[0]), operation.StateCancelled)
	}}
	retry := &cobra.Command{Use: "retry ID", Short: "Let a failed operation go on", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		if err := cl.RetryOperation(cmd.Context(), switchback.OperationID(args[0])); err != nil {
			return err
		}
		return c.follow(cmd.Context(), cl, switchback.OperationID(args[0]), operation.StateSucceeded)
	}}
	cmd.AddCommand(list, show, watch, cancel, retry, c.operationApprove())
	return cmd
}

// printApproval says what became of the approval that an operation takes.
func printApproval(w io.Writer, rec operation.Record) {
	switch a := rec.Approval; {
	case a == nil:
	case a.BreakGlass != "":
		fmt.Fprintf(w, "  %s broke the glass: %s\n", rec.RequestedBy, a.BreakGlass)
	case a.Given():
		fmt.Fprintf(w, "  approved by %s at %s %s\n", a.By, a.At.Local().Format("2006-01-02 15:04:05"), a.Note)
	case rec.State == operation.StateAwaiting:
		fmt.Fprintf(w, "  awaits until %s that another person with the role %s approves it: switchback operation approve %s\n",
			a.Until.Local().Format("2006-01-02 15:04"), a.Role, rec.ID)
	}
}

func attrs(m map[string]string) string {
	var b strings.Builder
	for k, v := range m {
		fmt.Fprintf(&b, " %s=%s", k, v)
	}
	return b.String()
}

func took(o operation.Record) string {
	if o.EndedAt.IsZero() {
		return "-"
	}
	return seconds(o.EndedAt.Sub(o.CreatedAt))
}

func stepTook(s operation.StepRecord) string {
	switch {
	case s.StartedAt.IsZero():
		return ""
	case s.EndedAt.IsZero():
		return seconds(time.Since(s.StartedAt))
	}
	return seconds(s.EndedAt.Sub(s.StartedAt))
}

func printOperation(w io.Writer, rec operation.Record) {
	fmt.Fprintf(w, "%s  %s  %s", rec.ID, rec.Title, rec.State)
	if !rec.EndedAt.IsZero() {
		fmt.Fprintf(w, "  in %s", took(rec))
	}
	fmt.Fprintln(w)
	printApproval(w, rec)
	table(w, "  STEP\tSTATE\tTOOK\t", func(row func(string, ...any)) {
		for _, s := range rec.Steps {
			detail := ""
			if s.Error != nil {
				detail = s.Error.Error()
			} else if s.Progress != nil && s.State == operation.StepRunning {
				detail = progressText(*s.Progress)
			}
			row("  %s\t%s\t%s\t%s", s.Title, s.State, stepTook(s), detail)
		}
	})
	if rec.Error != nil {
		printError(w, rec.Error)
	}
	printSummary(w, rec)
}

// printSummary prints what an operation measured, as far as it did.
func printSummary(w io.Writer, rec operation.Record) {
	if len(rec.Result) == 0 {
		return
	}
	var s api.Summary
	if json.Unmarshal(rec.Result, &s) != nil {
		return
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %-14s %s\n", name, fmt.Sprintf(format, args...))
	}
	if x := s.Drill; x != nil {
		printDrill(w, *x)
	}
	printDrills(w, s.Drills)
	if x := s.Switch; x != nil {
		line("moved", "%s → %s, outage %s (from the guest seen off to the guest let run)", x.From, x.To, seconds(x.Outage))
		line("point", "%d, %s, of %s", x.Point.Sequence, x.Point.Kind, x.Point.Time.Local().Format("2006-01-02 15:04:05.000"))
		if x.Last.Sequence != x.Point.Sequence {
			line("left behind", "%d later points, %s of changes of the last", x.Last.Sequence-x.Point.Sequence, bytesText(x.Last.ChangedBytes))
		}
		line("last changes", "%s sent for %s changed", bytesText(x.BytesSent), bytesText(x.BytesChanged))
		line("guest agent", "%s", x.GuestAgent)
	}
	if x := s.Change; x != nil {
		line("point", "%d → %d, of %s, outage %s", x.From.Sequence, x.To.Sequence, x.To.Time.Local().Format("2006-01-02 15:04:05.000"), seconds(x.Outage))
		if x.Snapshot != "" {
			line("goes on with", "snapshot %s", x.Snapshot)
		}
		if x.SetAside != "" {
			line("kept", "snapshot %s", x.SetAside)
		}
		line("guest agent", "%s", x.GuestAgent)
	}
	if x := s.Commit; x != nil {
		line("committed", "%s folded, %s moved, %s", bytesText(x.FoldedBytes), bytesText(x.CopiedBytes), map[bool]string{true: "while the guest ran", false: "at rest"}[x.Live])
		if x.KeptPoints > 0 {
			line("kept", "%d points, read-only; %s were copied for that", x.KeptPoints, bytesText(x.KeptBytes))
		}
		for _, name := range x.Snapshots {
			line("kept", "snapshot %s, self-contained", name)
		}
		for _, d := range x.Seeds {
			line("kept as seed", "%s", d.Path)
		}
	}
	if x := s.Copy; x != nil {
		line("point", "%d by %s in %s: %s sent for %s changed", x.Point.Sequence, x.Mode, seconds(x.Took), bytesText(x.BytesSent), bytesText(x.BytesChanged))
		if x.Frozen > 0 {
			line("frozen", "%s, at most", seconds(x.Frozen))
		}
		if x.Reason != "" {
			line("why", "%s", x.Reason)
		}
	}
	printPointsSummary(line, s)
	for _, x := range s.Removed {
		line("removed", "%s", x)
	}
	for _, x := range s.Left {
		line("left", "%s", x)
	}
}

func progressText(p operation.Progress) string {
	if p.TotalBytes == 0 {
		return p.Message
	}
	return fmt.Sprintf("%.0f %% of %s, %s/s, ETA %s", p.Percent, bytesText(p.TotalBytes), bytesText(int64(p.RateBytesPerSecond)), seconds(p.ETA))
}

// follow shows an operation until it ends: a live bar on a terminal, a line per
// change elsewhere. Its error is the operation's, unless it ends as wanted.
func (c *cli) follow(ctx context.Context, cl *api.Client, id switchback.OperationID, want operation.State) error {
	live := false
	if f, ok := c.out.(*os.File); ok && !c.json() {
		live = term.IsTerminal(int(f.Fd()))
	}
	shown := map[string]operation.StepState{}
	var last operation.Record
	said := time.Now() // when a line about progress was last printed in a pipe
	err := cl.Watch(ctx, id, func(rec operation.Record) {
		if !c.json() && rec.State == operation.StateAwaiting && last.State != rec.State {
			printApproval(c.out, rec)
		}
		last = rec
		if c.json() {
			return
		}
		for _, s := range rec.Steps {
			if live {
				fmt.Fprint(c.out, "\r\x1b[K")
			}
			if s.State != operation.StepPending && shown[s.Name] != s.State {
				shown[s.Name] = s.State
				switch s.State {
				case operation.StepDone, operation.StepSkipped, operation.StepFailed, operation.StepUndone, operation.StepUndoFailed:
					fmt.Fprintf(c.out, "  %-8s %s  %s\n", s.State, s.Title, stepTook(s))
				case operation.StepWaiting:
					fmt.Fprintf(c.out, "  waiting  %s: %v\n", s.Title, s.Error)
				case operation.StepUndoing:
					fmt.Fprintf(c.out, "  undoing  %s\n", s.Title)
				default:
					if !live {
						fmt.Fprintf(c.out, "  %-8s %s\n", s.State, s.Title)
					}
				}
			}
			if !live && s.State == operation.StepRunning && s.Progress != nil && s.Progress.TotalBytes > 0 && time.Since(said) > 5*time.Second {
				said = time.Now()
				fmt.Fprintf(c.out, "           %s: %s\n", s.Title, progressText(*s.Progress))
			}
			if live && s.State == operation.StepRunning {
				fmt.Fprintf(c.out, "  %s %s  %s", bar(s.Progress), s.Title, stepTook(s))
				if s.Progress != nil {
					fmt.Fprintf(c.out, "  %s", progressText(*s.Progress))
				}
			}
		}
	})
	if live {
		fmt.Fprint(c.out, "\r\x1b[K")
	}
	if err != nil {
		return err
	}
	if c.json() {
		if err := c.show(last, nil); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(c.out, "%s %s in %s\n", last.Title, last.State, took(last))
		printSummary(c.out, last)
	}
	switch last.State {
	case want, operation.StateSucceeded:
		return nil
	case operation.StateCancelled:
		return switchback.Errorf(switchback.CodeCancelled, "%s was cancelled", last.Title)
	}
	if last.Error != nil {
		return last.Error
	}
	return switchback.Errorf(switchback.CodeInternal, "%s is %s", last.Title, last.State)
}

func bar(p *operation.Progress) string {
	const width = 20
	if p == nil || p.TotalBytes == 0 {
		return "[" + strings.Repeat("·", width) + "]"
	}
	n := min(width, int(p.Percent/100*width))
	return "[" + strings.Repeat("█", n) + strings.Repeat("·", width-n) + "]"
}

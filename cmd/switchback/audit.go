package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
)

func (c *cli) auditCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "audit", Short: "Who asked for what, and what came of it"})
	var f api.AuditFilter
	var since time.Duration
	list := &cobra.Command{Use: "list", Short: "List the audit log, newest first", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		if since > 0 {
			f.Since = time.Now().Add(-since)
		}
		entries, err := cl.Audit(cmd.Context(), f)
		if err != nil {
			return err
		}
		return c.show(entries, func(w io.Writer) {
			table(w, "SEQ\tAT\tWHO\tROLE\tACTION\tOBJECT\tOUTCOME\tREQUEST\tDETAIL", func(row func(string, ...any)) {
				for _, e := range entries {
					detail := e.Detail
					if len(detail) > 60 {
						detail = detail[:60] + "…"
					}
					row("%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%q", e.Sequence, e.At.Local().Format("2006-01-02 15:04:05"), e.Who, e.Role, e.Action, e.Object, e.Outcome, e.Request, detail)
				}
			})
		})
	}}
	fl := list.Flags()
	fl.StringVar(&f.Who, "who", "", "only what this person or program asked")
	fl.StringVar(&f.Action, "action", "", "only one action, such as request-operation")
	fl.StringVar(&f.Object, "object", "", "only what has this text in its object, such as vms/web")
	fl.StringVar(&f.Outcome, "outcome", "", "only asked, done, failed or refused")
	fl.StringVar(&f.Request, "request", "", "only one request")
	fl.DurationVar(&since, "since", 0, "only the last such time")
	fl.IntVar(&f.Limit, "limit", 50, "at most so many")

	var file string
	var expect []string
	verify := &cobra.Command{Use: "verify", Short: "Find entries that were changed, removed or inserted", Args: none,
		Long: `Read the whole audit log, or with --file an exported one, and say whether it is what it was. Whoever can write the
database can write all of it anew: note the head that is printed somewhere else, and name it the next time with --expect.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var heads []audit.Head
			for _, text := range expect {
				h, err := audit.ParseHead(text)
				if err != nil {
					return err
				}
				heads = append(heads, h)
			}
			v, err := c.verdict(cmd, file, heads)
			if err != nil {
				return err
			}
			err = c.show(v, func(w io.Writer) {
				for _, p := range v.Problems {
					fmt.Fprintf(w, "entry %d: %s\n", p.Sequence, p.What)
				}
				for _, id := range v.Unanswered {
					fmt.Fprintf(w, "request %s has no outcome: the server ended in it, or it is under way\n", id)
				}
				fmt.Fprintf(w, "%d entries, head %s\n", v.Entries, v.Head)
			})
			if err == nil && len(v.Problems) > 0 {
				return switchback.Errorf(switchback.CodeCorrupt, "the audit log is not what it was: entry %d: %s", v.Problems[0].Sequence, v.Problems[0].What).
					WithHint("compare it with what was exported, and find out who could write the database")
			}
			return err
		}}
	verify.Flags().StringVar(&file, "file", "", "an exported log instead of the server's")
	verify.Flags().StringSliceVar(&expect, "expect", nil, "a head that was noted before, SEQUENCE:HASH")

	export := &cobra.Command{Use: "export FILE", Short: "Write the whole audit log into a file, one JSON object per line", Args: one("FILE"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		entries, err := cl.Audit(cmd.Context(), api.AuditFilter{})
		if err != nil {
			return err
		}
		out, err := os.OpenFile(args[0], os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return switchback.Errorf(switchback.CodeInvalid, "%w", err)
		}
		enc := json.NewEncoder(out)
		var head audit.Head
		for _, e := range entries {
			if err := enc.Encode(e); err != nil {
				out.Close()
				return err
			}
			head = audit.Head{Sequence: e.Sequence, Hash: e.Hash}
		}
		if err := out.Sync(); err != nil {
			out.Close()
			return err
		}
		if err := out.Close(); err != nil {
			return err
		}
		return c.show(head, func(w io.Writer) { fmt.Fprintf(w, "%d entries, head %s\n", len(entries), head) })
	}}
	cmd.AddCommand(list, verify, export)
	return cmd
}

// verdict is that on the server's log, or on an exported one.
func (c *cli) verdict(cmd *cobra.Command, file string, expect []audit.Head) (v audit.Verdict, err error) {
	if file == "" {
		cl, err := c.client()
		if err != nil {
			return v, err
		}
		return cl.VerifyAudit(cmd.Context(), expect)
	}
	f, err := os.Open(file)
	if err != nil {
		return v, switchback.Errorf(switchback.CodeNotFound, "%w", err)
	}
	defer f.Close()
	verifier := audit.Verifier{Expect: expect}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		var e audit.Entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return v, switchback.Errorf(switchback.CodeCorrupt, "%s: line %d is no entry: %w", file, n, err)
		}
		verifier.Add(e)
	}
	return verifier.End(nil), lines.Err()
}

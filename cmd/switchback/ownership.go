package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/user"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// localAgent asks the agent of this host, over its socket.
func localAgent[R any](ctx context.Context, run, method, path string, body any) (R, error) {
	socket := agent.LocalSocket(run)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	answer, err := transport.Call[R](ctx, client, method, "http://agent"+path, body)
	if switchback.CodeOf(err) == switchback.CodeUnavailable {
		return answer, switchback.Errorf(switchback.CodeUnavailable, "no agent answers on %s: %w", socket, err).
			WithHint("run this as root on the agent's host, while the agent runs; --run names its run directory")
	}
	return answer, err
}

// agentLocal are the commands that work on the agent's own host, with or without a server.
func (c *cli) agentLocal() []*cobra.Command {
	var run string
	status := &cobra.Command{Use: "status", Short: "Show, on an agent's host, what may run there and why", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		s, err := localAgent[agentapi.LocalStatus](cmd.Context(), run, http.MethodGet, "/v1/local", nil)
		if err != nil {
			return err
		}
		return c.show(s, func(w io.Writer) { printLocal(w, s) })
	}}
	var reason string
	override := &cobra.Command{Use: "override VM", Short: "Let a VM start on this host with nobody's confirmation; it is contested from then on", Args: one("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			by := "unknown"
			if u, err := user.Current(); err == nil {
				by = u.Username
			}
			o, err := localAgent[agentapi.Ownership](cmd.Context(), run, http.MethodPost, "/v1/local/override", agentapi.OverrideRequest{VM: args[0], Reason: reason, By: by})
			if err != nil {
				return err
			}
			return c.show(o, func(w io.Writer) {
				fmt.Fprintf(w, "VM %s may be started here (virsh start). It is contested: no points are taken of it, and the server does nothing with it by itself,\n"+
					"until a winner is named: switchback vm resolve %s --winner SITE\n", args[0], args[0])
			})
		}}
	override.Flags().StringVar(&reason, "reason", "", "why, for the record (required)")
	for _, cmd := range []*cobra.Command{status, override} {
		cmd.Flags().StringVar(&run, "run", "/run/switchback", "the agent's run directory")
	}
	return []*cobra.Command{status, override}
}

func printLocal(w io.Writer, s agentapi.LocalStatus) {
	fmt.Fprintf(w, "agent %s of site %s\nserver %s: ", s.Agent, s.Site, s.Server)
	if s.ServerError != "" {
		fmt.Fprintf(w, "does not answer: %s\n", s.ServerError)
	} else {
		fmt.Fprintln(w, "answers")
	}
	table(w, "VM\tROLE\tEPOCH\tPOWER\tMAY RUN\tAUTOSTART\tCONFIRMED", func(row func(string, ...any)) {
		for _, v := range s.VMs {
			may, auto, by := "no", "-", "-"
			if o := v.Ownership; o != nil {
				may, by = ownershipText(*o), confirmedText(*o)
				if o.Autostart {
					auto = "agent"
				}
			}
			row("%s\t%s\t%d\t%s\t%s\t%s\t%s", v.Name, v.Role, v.Epoch, v.Power, may, auto, by)
		}
	})
	for _, v := range s.VMs {
		for _, x := range v.Conditions {
			fmt.Fprintf(w, "%s: %s: %s: %s (remedy: %s)\n", v.Name, x.Severity, x.Name, x.Cause, x.Remedy)
		}
	}
}

func ownershipText(o agentapi.Ownership) string {
	text := string(o.State)
	if o.LeaseSeconds > 0 {
		text += fmt.Sprintf(", lease %.0f s", o.LeaseSeconds)
	}
	return text
}

func confirmedText(o agentapi.Ownership) string {
	switch {
	case o.ConfirmedBy == "":
		return "not in this boot"
	case o.ConfirmedAt.IsZero():
		return "by " + o.ConfirmedBy
	}
	return "by " + o.ConfirmedBy + ", " + ago(o.ConfirmedAt)
}

// printOwnership shows what stands of a VM's right to run, on both sides.
func printOwnership(line func(name, format string, args ...any), v api.VM) {
	if f := v.Policy.Fencing; f.Lease > 0 {
		end := f.OnLeaseEnd
		if end == "" {
			end = switchback.LeaseEndStop
		}
		line("lease", "%s, then %s", f.Lease, end)
	} else if f.StartUnconfirmedAfter > 0 {
		line("after a boot", "held until confirmed, or for %s", f.StartUnconfirmedAfter)
	}
	for _, side := range []struct {
		site switchback.SiteID
		st   *agentapi.VMStatus
	}{{v.Source, v.AtSource}, {v.Target, v.AtTarget}} {
		if side.st == nil || side.st.Ownership == nil {
			continue
		}
		o := *side.st.Ownership
		text := ownershipText(o) + " (" + confirmedText(o) + ")"
		if o.Autostart {
			text += ", started by the agent after a boot"
		}
		line("may run at", "%s: %s", side.site, text)
	}
}

// fencingFlags are of the policy.
func fencingFlags(cmd *cobra.Command, f *switchback.FencingPolicy) {
	cmd.Flags().DurationVar(&f.Lease, "lease", f.Lease, "how long the VM may run unconfirmed before it is stopped; a takeover waits for it; 0 = it runs on")
	cmd.Flags().StringVar((*string)(&f.OnLeaseEnd), "on-lease-end", string(switchback.LeaseEndStop), "stop or suspend")
	cmd.Flags().DurationVar(&f.StartUnconfirmedAfter, "start-unconfirmed-after", f.StartUnconfirmedAfter, "how long a site that boots and hears from nobody holds the VM; 0 = until it is confirmed")
}

// fencingUnchanged keeps what is not named.
func fencingUnchanged(cmd *cobra.Command, f *switchback.FencingPolicy, was switchback.FencingPolicy) {
	if !cmd.Flags().Changed("lease") {
		f.Lease = was.Lease
	}
	if !cmd.Flags().Changed("on-lease-end") {
		f.OnLeaseEnd = was.OnLeaseEnd
	}
	if !cmd.Flags().Changed("start-unconfirmed-after") {
		f.StartUnconfirmedAfter = was.StartUnconfirmedAfter
	}
}

func (c *cli) vmResolve() *cobra.Command {
	var winner string
	cmd := c.vmOperation(recovery.Resolve, "resolve VM", "Name the site whose copy of a contested VM counts", func(req *api.OperationRequest, _ *cobra.Command) {
		req.Winner = switchback.SiteID(winner)
	})
	cmd.Flags().StringVar(&winner, "winner", "", "site whose copy goes on; the other is turned off and fenced")
	return cmd
}

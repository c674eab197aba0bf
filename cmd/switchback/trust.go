package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/transport"
)

// addressText is how an agent is reached.
func addressText(address string) string {
	if transport.IsName(address) {
		return "(it dials out)"
	}
	return address
}

// short is the beginning of a fingerprint.
func short(fingerprint string) string { return fingerprint[:min(16, len(fingerprint))] }

// joinFlags say how an agent that joins is reached.
type joinFlags struct{ address, reachable string }

func (f *joinFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.address, "address", "", "how this agent is reached, host:port")
	cmd.Flags().StringVar(&f.reachable, "reachable", "true", "whether others can open connections to the address: true, false (the agent opens them, and needs no address), or auto (both)")
}

// agentTrustCommands concern an agent as a party of the installation.
func (c *cli) agentTrustCommands(stateDir *string) []*cobra.Command {
	var how joinFlags
	join := &cobra.Command{Use: "join TOKEN", Short: "Join a site with a one-time token, or with the answer of 'site admit'", Args: one("TOKEN"), RunE: func(cmd *cobra.Command, args []string) error {
		var id transport.Identity
		var err error
		if strings.HasPrefix(strings.TrimSpace(args[0]), transport.AnswerPrefix) {
			id, err = agent.JoinByHand(*stateDir, args[0])
		} else {
			id, err = agent.Join(cmd.Context(), *stateDir, args[0], how.address, agentapi.Reachable(how.reachable), version)
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "joined as %s; credentials are in %s\nrun it: switchback agent --state %s\n", id, agent.IdentityDir(*stateDir), *stateDir)
		return nil
	}}
	how.add(join)

	var asked joinFlags
	request := &cobra.Command{Use: "request", Short: "Print a request to join, for an agent that cannot reach the server", Args: none,
		Long: `Print a request to join. Give it to 'switchback site admit SITE REQUEST', which prints an answer, and that to
'switchback agent join ANSWER' here. For an agent that cannot reach the server: it is the server that opens the
connections then (switchback server --reachable=false).`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := agent.Request(*stateDir, asked.address, agentapi.Reachable(asked.reachable), version)
			if err == nil {
				fmt.Fprintln(c.out, text)
			}
			return err
		}}
	asked.add(request)

	var moved joinFlags
	readdress := &cobra.Command{Use: "readdress", Short: "Change how the agent of this host is reached, from its next start on", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		if err := agent.Readdress(*stateDir, moved.address, agentapi.Reachable(moved.reachable)); err != nil {
			return err
		}
		fmt.Fprintln(c.out, "restart the agent; the server and its peers hear of it then")
		return nil
	}}
	moved.add(readdress)

	show := &cobra.Command{Use: "show AGENT", Short: "Show an agent: how it is reached, its certificate, its lines", Args: one("AGENT"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		a, err := cl.Agent(cmd.Context(), switchback.AgentID(args[0]))
		if err != nil {
			return err
		}
		return c.show(a, func(w io.Writer) { showAgent(w, a) })
	}}
	end := func(use, shortText string, call func(*api.Client, *cobra.Command, switchback.AgentID) (api.RevokeAnswer, error)) *cobra.Command {
		return &cobra.Command{Use: use + " AGENT", Short: shortText, Args: one("AGENT"), RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			r, err := call(cl, cmd, switchback.AgentID(args[0]))
			if err != nil {
				return err
			}
			return c.show(r, func(w io.Writer) {
				fmt.Fprintf(w, "agent %s of site %s is refused from now on: here at once, by other agents when they have heard of it\n", r.Agent, r.Site)
				if len(r.VMs) > 0 {
					fmt.Fprintf(w, "it has a part in %s: they are not replicated any more\n", strings.Join(r.VMs, ", "))
				}
			})
		}}
	}
	revoke := end("revoke", "Have an agent refused everywhere, whatever certificate it shows", func(cl *api.Client, cmd *cobra.Command, id switchback.AgentID) (api.RevokeAnswer, error) {
		return cl.RevokeAgent(cmd.Context(), id)
	})
	remove := end("remove", "Revoke and forget an agent that no VM depends on", func(cl *api.Client, cmd *cobra.Command, id switchback.AgentID) (api.RevokeAnswer, error) {
		return cl.RemoveAgent(cmd.Context(), id)
	})
	return []*cobra.Command{join, request, readdress, show, revoke, remove}
}

func showAgent(w io.Writer, a api.AgentDetail) {
	health := "ok"
	if !a.Healthy {
		health = a.Reason
	}
	if a.Revoked != nil {
		health = fmt.Sprintf("revoked %s by %s", a.Revoked.At.Format(time.RFC3339), a.Revoked.By)
	}
	reachable, lines := agentapi.ReachableYes, []transport.LineStatus(nil)
	fmt.Fprintf(w, "agent        %s\nsite         %s\naddress      %s\n", a.ID, a.Site, addressText(a.Address))
	if a.Status != nil {
		if lines = a.Status.Lines; a.Status.Reachable != "" { // an older agent does not say
			reachable = a.Status.Reachable
		}
	}
	fmt.Fprintf(w, "reachable    %s\nhealth       %s\nlast seen    %s\njoined       %s\n", reachable, health, ago(a.LastSeen), a.JoinedAt.Local().Format("2006-01-02 15:04"))
	if a.Status != nil {
		t := a.Status.Trust
		fmt.Fprintf(w, "certificate  serial %s, until %s, signed by %s\n", t.Serial, t.Expires.Local().Format("2006-01-02 15:04"), short(t.Issuer))
		for _, x := range t.Authorities {
			fmt.Fprintf(w, "believes     CA %s\n", short(x))
		}
		fmt.Fprintf(w, "storage      %s, %s of %s free\n", a.Status.Storage.Path, bytesText(a.Status.Storage.FreeBytes), bytesText(a.Status.Storage.SizeBytes))
	}
	if len(a.VMs) > 0 {
		fmt.Fprintf(w, "works for    %s\n", strings.Join(a.VMs, ", "))
	}
	if len(lines)+len(a.Lines) == 0 {
		return
	}
	fmt.Fprintln(w)
	table(w, "LINE\tPEER\tSTATE\tSINCE\tROUND TRIP", func(row func(string, ...any)) {
		add := func(where string, l transport.LineStatus) {
			state, trip := "up", "-"
			if !l.Up {
				state = "down"
				if l.Error != "" {
					state += ": " + l.Error
				}
			}
			if l.RoundTrip > 0 {
				trip = fmt.Sprintf("%.1f ms", float64(l.RoundTrip.Microseconds())/1000)
			}
			row("%s\t%s\t%s\t%s\t%s", where, l.Peer, state, ago(l.Since), trip)
		}
		for _, l := range lines {
			if l.Inbound {
				add("opened by the peer", l)
			} else {
				add("opened by the agent", l)
			}
		}
		for _, l := range a.Lines {
			add("as the server sees it", l)
		}
	})
}

func (c *cli) siteAdmitCommand() *cobra.Command {
	return &cobra.Command{Use: "admit SITE REQUEST", Short: "Let an agent join that cannot reach the server", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		a, err := cl.AdmitAgent(cmd.Context(), switchback.SiteID(args[0]), args[1])
		if err != nil {
			return err
		}
		return c.show(a, func(w io.Writer) {
			fmt.Fprintf(w, "agent %s is of site %s; on its host:\n\n  switchback agent join %s\n", a.Agent, a.Site, a.Answer)
		})
	}}
}

// serverCACommand shows and replaces the certificate authority of a running server.
func (c *cli) serverCACommand() *cobra.Command {
	status := func(w io.Writer, s api.CAStatus) {
		fmt.Fprintf(w, "installation  %s\nsigning       %s, until %s\n", s.Installation, short(s.Signing), s.Expires.Local().Format("2006-01-02"))
		switch s.Rotation.Phase {
		case transport.RotationIntroducing:
			fmt.Fprintf(w, "rotation      %s: CA %s is made known, since %s\n", s.Rotation.Phase, short(s.Rotation.Other), ago(s.Rotation.Since))
		case transport.RotationReplacing:
			fmt.Fprintf(w, "rotation      %s: certificates of CA %s are replaced, since %s\n", s.Rotation.Phase, short(s.Rotation.Other), ago(s.Rotation.Since))
		default:
			fmt.Fprintln(w, "rotation      none")
		}
		if len(s.Agents) == 0 {
			return
		}
		fmt.Fprintln(w)
		table(w, "AGENT\tSITE\tCERTIFICATE OF\tBELIEVES\tREADY\tLAST SEEN", func(row func(string, ...any)) {
			for _, a := range s.Agents {
				var believes []string
				for _, x := range a.Believes {
					believes = append(believes, short(x))
				}
				row("%s\t%s\t%s\t%s\t%t\t%s", a.Agent, a.Site, short(a.Issuer), strings.Join(believes, " "), a.Ready, ago(a.LastSeen))
			}
		})
	}
	cmd := &cobra.Command{Use: "ca", Short: "Show the certificate authority", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		s, err := cl.CA(cmd.Context())
		if err != nil {
			return err
		}
		return c.show(s, func(w io.Writer) { status(w, s) })
	}}
	var req api.RotateRequest
	rotate := &cobra.Command{Use: "rotate", Short: "Replace the certificate authority by a new one", Args: none,
		Long: `Replace the certificate authority by a new one, with a new key. All agents are told to believe both; when they
have said so the new one signs, and all certificates are replaced; when that is done the old one is dropped. This
goes on by itself, also through restarts; run the command again, or 'switchback server ca', to see how far it is. An
agent that is away is waited for; --force goes on to the next phase without it, and it must join again afterwards.
Join tokens made before stop working. Copies of STATE/admin have to be made again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			s, err := cl.RotateCA(cmd.Context(), req)
			if err != nil {
				return err
			}
			return c.show(s, func(w io.Writer) { status(w, s) })
		}}
	rotate.Flags().BoolVar(&req.Force, "force", false, "go on to the next phase though agents did not follow")
	cmd.AddCommand(rotate)
	return cmd
}

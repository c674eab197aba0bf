package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/server"
	"github.com/switchback-dr/switchback/transport"
)

// proofLife is how long a proof can be used: as long as an adoption may take, and
// clocks may differ.
const proofLife = time.Hour

func (c *cli) siteAdopt() *cobra.Command {
	var req api.AdoptRequest
	var keyFile, ca string
	cmd := &cobra.Command{Use: "adopt [AGENT-HOST:PORT…]", Short: "Take over what agents hold when their server is lost, or move them here",
		Long: `Make this installation know sites, protected VMs and their recovery points from what agents hold: after the
loss of every server of theirs, or to move them to this installation. Agents follow only the proof of their
installation's recovery key, which never leaves this command. The agents that the named ones work with are
found by themselves. Guests and replication are not touched; replication pauses until both ends are adopted.
What was interrupted can be run again. Without an address, what the agents of this installation hold is learned anew.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			req.Agents = args
			if keyFile != "" {
				text, err := os.ReadFile(keyFile)
				if err != nil {
					return switchback.Errorf(switchback.CodeNotFound, "the recovery key: %w", err)
				}
				key, err := transport.ParseRecoveryKey(string(text))
				if err != nil {
					return err
				}
				if ca != "" {
					key.CA = ca
				}
				proof := key.Prove(cl.CAFingerprint(), time.Now().Add(proofLife))
				req.Proof = &proof
			}
			a, err := cl.Adopt(cmd.Context(), req)
			if err != nil {
				return err
			}
			if err := c.show(a, func(w io.Writer) { adoptionText(w, a) }); err != nil {
				return err
			}
			for _, vm := range a.VMs {
				if vm.Error != nil {
					return switchback.Errorf(vm.Error.Code, "not every VM could be adopted: %s: %s", vm.Name, vm.Error.Message).WithHint("%s", vm.Error.Hint)
				}
			}
			return nil
		}}
	f := cmd.Flags()
	f.StringVar(&keyFile, "recovery-key", "", "file with the recovery key of the agents' present installation")
	f.StringVar(&ca, "ca", "", "SHA-256 of that installation's CA, where it was replaced since the key was made")
	f.BoolVar(&req.DryRun, "dry-run", false, "say what would be adopted; do nothing")
	f.BoolVar(&req.TakeOver, "take-over", false, "though the agents' own server still answers: move them away from it")
	f.BoolVar(&req.JoinSites, "join-sites", false, "sites of the same name here are the same places")
	return cmd
}

func adoptionText(w io.Writer, a api.Adoption) {
	table(w, "SITE\tAGENT\tADDRESS\tINSTALLATION\tSTATE", func(row func(string, ...any)) {
		for _, x := range a.Agents {
			state := "adopted"
			switch {
			case x.Missing != "":
				state = "missing: " + x.Missing
			case x.Own:
				state = "belongs here already"
			case a.DryRun:
				state = "would be adopted"
			}
			row("%s\t%s\t%s\t%s\t%s", x.Site, x.Agent, x.Address, x.Installation, state)
		}
	})
	fmt.Fprintln(w)
	table(w, "VM\tOUTCOME\tPHASE\tACTIVE AT\tTARGET\tEPOCH\tPOINTS\tGOES ON WITH", func(row func(string, ...any)) {
		for _, vm := range a.VMs {
			outcome := vm.Outcome
			if a.DryRun && outcome != api.VMKnown && outcome != api.VMRefused {
				outcome = "would be " + outcome
			}
			p := vm.Protection
			row("%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s", vm.Name, outcome, p.Phase, p.Source, p.Target, p.Epoch, vm.Points, vm.Next)
		}
	})
	for _, vm := range a.VMs {
		if vm.Why != "" {
			fmt.Fprintf(w, "%s: %s\n", vm.Name, vm.Why)
		}
		for _, n := range vm.Notes {
			fmt.Fprintf(w, "%s: %s\n", vm.Name, n)
		}
		if vm.Error != nil {
			fmt.Fprintf(w, "%s: refused: %v\n", vm.Name, vm.Error)
		}
	}
}

func (c *cli) serverInit(cfg *server.Config) *cobra.Command {
	var keyFile string
	cmd := &cobra.Command{Use: "init", Short: "Make a new installation and its recovery key", Args: none,
		Long: `Make the state directory of a new installation without running the server, and its recovery key: what lets a
new server take the agents over once every server of this installation is lost. 'switchback server' on an empty
state directory does the same, and leaves the key in STATE/recovery.key.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fresh := *cfg
			r, err := server.Init(cmd.Context(), fresh, keyFile)
			if err != nil {
				return err
			}
			return c.show(r, func(w io.Writer) {
				fmt.Fprintf(w, "installation %s is in %s\n", r.Installation, r.StateDir)
				if r.KeyFile != "" {
					fmt.Fprintf(w, "its recovery key is in %s: keep it where it survives the loss of this host\n", r.KeyFile)
					return
				}
				fmt.Fprintf(w, "\n%s\nThe same is in %s/recovery.key: move it away from here.\n", r.RecoveryKey, r.StateDir)
			})
		}}
	cmd.Flags().StringVar(&keyFile, "recovery-key", "", "write the recovery key to this file instead of printing it")
	cmd.Flags().StringVar(&cfg.Store, "store", os.Getenv("SWITCHBACK_STORE"), "postgres://… for an installation in a PostgreSQL database")
	cmd.Flags().StringVar(&cfg.KeyFile, "key-file", "", "key of the CA in the PostgreSQL database (default STATE/installation.key)")
	return cmd
}

func (c *cli) agentRecoveryKey(stateDir *string) *cobra.Command {
	return &cobra.Command{Use: "recovery-key [PUBLIC]", Short: "Show installation, CA and the public recovery key that this agent believes, or name a key",
		Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return agent.SetRecoveryKey(*stateDir, args[0])
			}
			public, err := agent.RecoveryKey(*stateDir)
			if err != nil {
				return err
			}
			id, err := agent.LoadIdentity(*stateDir)
			if err != nil {
				return err
			}
			is := map[string]string{"public": public, "installation": id.Credentials.Identity().Installation, "ca": id.Credentials.CAFingerprint()}
			return c.show(is, func(w io.Writer) {
				if public == "" {
					public = "none: it comes with the first report to the server"
				}
				fmt.Fprintf(w, "installation  %s\nCA            %s\nrecovery key  %s\n", is["installation"], is["ca"], public)
			})
		}}
}

package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

// accessCommands are about who may do what, and who did.
func (c *cli) accessCommands() []*cobra.Command {
	return []*cobra.Command{c.loginCommand(), c.tokenCommand(), c.whoamiCommand(), c.auditCommand(), c.approvalCommand()}
}

func (c *cli) whoamiCommand() *cobra.Command {
	return &cobra.Command{Use: "whoami", Short: "Say as whom this command line asks, and what they may", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		p, err := cl.Whoami(cmd.Context())
		if err != nil {
			return err
		}
		return c.show(p, func(w io.Writer) { fmt.Fprintf(w, "%s, %s of %s, by %s\n", p.Name, p.Role, p.Scope, p.Via) })
	}}
}

func (c *cli) tokenCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "token", Short: "API tokens of people and programs"})
	var person string
	list := &cobra.Command{Use: "list", Short: "List API tokens, without their secrets", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		tokens, err := cl.APITokens(cmd.Context(), person)
		if err != nil {
			return err
		}
		return c.show(tokens, func(w io.Writer) {
			table(w, "ID\tPERSON\tROLE\tSCOPE\tSTATE\tEXPIRES\tLAST USED\tNOTE", func(row func(string, ...any)) {
				for _, t := range tokens {
					row("%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s", t.ID, t.Person, t.Role, t.Scope, t.State, t.ExpiresAt.Local().Format("2006-01-02 15:04"), ago(t.UsedAt), t.Note)
				}
			})
		})
	}}
	list.Flags().StringVar(&person, "person", "", "only those of a person")

	var req api.APITokenRequest
	var role, out string
	var sites []string
	create := &cobra.Command{Use: "create PERSON", Short: "Make an API token for a person and print it, once", Args: one("PERSON"),
		Long: `Make an API token for a person (or a program) and print it; the server keeps only a hash of its secret.
With --out everything that the command line needs to use it is written into a directory instead: hand that to the person,
who names it with --config. Two tokens for the same name are the same person, also where a second one has to approve.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.Role, err = switchback.ParseAccessRole(role); err != nil {
				return err
			}
			req.Person, req.Scope.Sites = args[0], nil
			for _, s := range sites {
				req.Scope.Sites = append(req.Scope.Sites, switchback.SiteID(s))
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			t, err := cl.CreateAPIToken(cmd.Context(), req)
			if err != nil {
				return err
			}
			where := t.Token
			if out != "" {
				if err := api.SaveToken(out, t); err != nil {
					return err
				}
				t.Token, where = "", "written for: switchback --config "+out+" …"
			}
			return c.show(t, func(w io.Writer) {
				fmt.Fprintf(w, "token %s for %s, %s of %s, until %s:\n\n  %s\n", t.ID, t.Person, t.Role, t.Scope, t.ExpiresAt.Local().Format("2006-01-02 15:04"), where)
			})
		}}
	f := create.Flags()
	f.StringVar(&role, "role", "viewer", "viewer, operator or administrator")
	f.StringSliceVar(&sites, "site", nil, "only VMs whose home is this site; repeatable")
	f.StringSliceVar(&req.Scope.Tags, "tag", nil, "only VMs with this tag; repeatable")
	f.DurationVar(&req.ValidFor, "valid-for", 90*24*time.Hour, "how long the token can be used")
	f.StringVar(&req.Note, "note", "", "what it is for")
	f.StringVar(&out, "out", "", "directory to write token, server and CA certificate into")

	revoke := &cobra.Command{Use: "revoke ID", Short: "End an API token at once", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		return cl.RevokeAPIToken(cmd.Context(), args[0])
	}}
	cmd.AddCommand(list, create, revoke)
	return cmd
}

func (c *cli) vmTag() *cobra.Command {
	var remove []string
	cmd := &cobra.Command{Use: "tag VM [TAG]...", Short: "Add tags to a VM, or remove them; without any, list them",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return one("VM")(cmd, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			v, err := cl.VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			tags := append([]string{}, v.Tags...)
			if len(args) > 1 || len(remove) > 0 {
				tags = append(slices.DeleteFunc(tags, func(t string) bool { return slices.Contains(remove, t) }), args[1:]...)
				if tags, err = cl.SetTags(cmd.Context(), args[0], tags); err != nil {
					return err
				}
			}
			return c.show(api.Tags{Tags: tags}, func(w io.Writer) { fmt.Fprintln(w, strings.Join(tags, " ")) })
		}}
	cmd.Flags().StringSliceVar(&remove, "remove", nil, "tag to remove; repeatable")
	return cmd
}

func (c *cli) approvalCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "approval", Short: "Which operations take a second person's approval"})
	text := func(p api.ApprovalPolicy) func(io.Writer) {
		return func(w io.Writer) {
			if len(p.Operations) == 0 {
				fmt.Fprintln(w, "no operation takes a second person's approval")
				return
			}
			fmt.Fprintf(w, "%s: another person with the role %s has to approve within %s\n", strings.Join(p.Operations, ", "), p.Role, p.ValidFor)
		}
	}
	show := &cobra.Command{Use: "show", Short: "Show the policy", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		p, err := cl.ApprovalPolicy(cmd.Context())
		if err != nil {
			return err
		}
		return c.show(p, text(p))
	}}
	var p api.ApprovalPolicy
	var role string
	set := &cobra.Command{Use: "set", Short: "Choose the operations; without any, none takes an approval", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		p.Role = switchback.AccessRole(role)
		cl, err := c.client()
		if err != nil {
			return err
		}
		if p.Operations == nil {
			p.Operations = []string{}
		}
		p, err := cl.SetApprovalPolicy(cmd.Context(), p)
		if err != nil {
			return err
		}
		return c.show(p, text(p))
	}}
	set.Flags().StringSliceVar(&p.Operations, "operations", nil, "kinds, such as failover,failback,commit,delete-point")
	set.Flags().StringVar(&role, "role", "operator", "what the second person needs: operator or administrator")
	set.Flags().DurationVar(&p.ValidFor, "valid-for", 24*time.Hour, "how long an operation waits before it is cancelled")
	cmd.AddCommand(show, set)
	return cmd
}

// operationApprove is operation approve.
func (c *cli) operationApprove() *cobra.Command {
	var note string
	cmd := &cobra.Command{Use: "approve ID", Short: "Let an operation go on that another person has asked for", Args: one("ID"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		rec, err := cl.ApproveOperation(cmd.Context(), switchback.OperationID(args[0]), note)
		if err != nil {
			return err
		}
		return c.show(rec, func(w io.Writer) { fmt.Fprintf(w, "%s, asked for by %s, goes on\n", rec.Title, rec.RequestedBy) })
	}}
	cmd.Flags().StringVar(&note, "note", "", "what to say with it")
	return cmd
}

func (c *cli) loginCommand() *cobra.Command {
	var servers []string
	var ca string
	cmd := &cobra.Command{Use: "login", Short: "Log in at the identity provider; keeps a token of short life in the --config directory", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ca != "" || len(servers) > 0 {
				if ca == "" || len(servers) == 0 {
					return usage(fmt.Errorf("--server and --ca belong together"))
				}
				pem, err := os.ReadFile(ca)
				if err != nil {
					return switchback.Errorf(switchback.CodeInvalid, "%w", err)
				}
				if err := api.Trust(c.configDir, servers, pem); err != nil {
					return err
				}
			}
			t, err := api.Login(cmd.Context(), c.configDir, func(address, code string) {
				fmt.Fprintf(cmd.ErrOrStderr(), "open %s and type %s\n", address, code)
			})
			if err != nil {
				return err
			}
			t.Token = ""
			return c.show(t, func(w io.Writer) {
				fmt.Fprintf(w, "logged in as %s, %s of %s, until %s\n", t.Person, t.Role, t.Scope, t.ExpiresAt.Local().Format("2006-01-02 15:04"))
			})
		}}
	cmd.Flags().StringSliceVar(&servers, "server", nil, "the servers' addresses, needed once")
	cmd.Flags().StringVar(&ca, "ca", "", "file with the installation's CA certificate, needed once: ca.pem of any token, or from an administrator")
	return cmd
}

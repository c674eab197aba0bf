package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
)

func (c *cli) siteCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "site", Short: "Sites and join tokens"})
	list := &cobra.Command{Use: "list", Short: "List sites with their agents", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		sites, err := cl.Sites(cmd.Context())
		if err != nil {
			return err
		}
		return c.show(sites, func(w io.Writer) {
			table(w, "SITE\tAGENT\tADDRESS\tHEALTH\tSTORAGE FREE\tSITE'S HEALTH", func(row func(string, ...any)) {
				for _, s := range sites {
					if len(s.Agents) == 0 {
						row("%s\t-\t-\tno agent has joined\t-\t%s", s.ID, s.Health)
					}
					for _, a := range s.Agents {
						health, free := "ok", "-"
						if !a.Healthy {
							health = a.Reason
						}
						if a.Status != nil {
							free = bytesText(a.Status.Storage.FreeBytes)
						}
						row("%s\t%s\t%s\t%s\t%s\t%s", s.ID, a.ID, addressText(a.Address), health, free, s.Health)
					}
				}
			})
		})
	}}
	var valid time.Duration
	add := &cobra.Command{Use: "add SITE", Short: "Add a site and print a one-time token for its agent", Args: one("SITE"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		id := switchback.SiteID(args[0])
		if err := cl.CreateSite(cmd.Context(), id); err != nil && switchback.CodeOf(err) != switchback.CodeConflict {
			return err
		}
		t, err := cl.MintToken(cmd.Context(), id, valid)
		if err != nil {
			return err
		}
		return c.show(t, func(w io.Writer) {
			fmt.Fprintf(w, "site %s; on its host, once, until %s:\n\n  switchback agent join --address HOST:PORT %s\n\n(--reachable=false instead of an address where nothing can connect to it)\n", id, t.Expires.Local().Format("2006-01-02 15:04"), t.Token)
		})
	}}
	add.Flags().DurationVar(&valid, "valid-for", time.Hour, "how long the token can be used")
	remove := &cobra.Command{Use: "remove SITE", Short: "Remove a site that has no agent", Args: one("SITE"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		return cl.DeleteSite(cmd.Context(), switchback.SiteID(args[0]))
	}}
	cmd.AddCommand(list, add, remove, c.siteShow(), c.siteAdopt(), c.siteTestConnectivity(), c.siteAdmitCommand())
	return cmd
}

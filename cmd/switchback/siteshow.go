package main

import (
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

func (c *cli) siteShow() *cobra.Command {
	return &cobra.Command{Use: "show SITE", Short: "Show a site: health, agents, capacity and limits, VMs", Args: one("SITE"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		s, err := cl.Site(cmd.Context(), switchback.SiteID(args[0]))
		if err != nil {
			return err
		}
		return c.show(s, func(w io.Writer) { siteText(w, s) })
	}}
}

// ofLimit shows a use and its limit.
func ofLimit(n, limit int) string {
	if limit == 0 {
		return strconv.Itoa(n) + " (no limit)"
	}
	return fmt.Sprintf("%d of %d", n, limit)
}

func siteText(w io.Writer, s api.SiteDetail) {
	fmt.Fprintf(w, "site %s: %s\n", s.ID, s.Health)
	for _, x := range s.Conditions {
		fmt.Fprintf(w, "  %s (%s): %s\n    remedy: %s\n", x.Name, x.Severity, x.Cause, x.Remedy)
	}
	for _, a := range s.Agents {
		health := "ok"
		if !a.Healthy {
			health = a.Reason
		}
		fmt.Fprintf(w, "\nagent %s at %s, version %s: %s\n", a.ID, a.Address, a.Version, health)
		if a.Status == nil {
			continue
		}
		st, c := a.Status, a.Status.Capacity
		fmt.Fprintf(w, "  disks       %s\n  open files  %s\n", ofLimit(c.Disks, c.MaxDisks), ofLimit(c.OpenFiles, c.MaxOpenFiles))
		fmt.Fprintf(w, "  storage     %s free of %s, %s in reserve (%s)\n", bytesText(st.Storage.FreeBytes), bytesText(st.Storage.SizeBytes), bytesText(c.StorageReserveBytes), st.Storage.Path)
		fmt.Fprintf(w, "  scratch     %s free of %s (%s)\n", bytesText(c.Scratch.FreeBytes), bytesText(c.Scratch.SizeBytes), c.Scratch.Path)
		fmt.Fprintf(w, "  copies      %s\n", ofLimit(s.Copies, c.MaxCopies))
	}
	if len(s.VMs) == 0 {
		return
	}
	fmt.Fprintln(w)
	table(w, "VM\tPHASE\tHERE\tDISKS\tPOINTS\tJOURNAL", func(row func(string, ...any)) {
		for _, vm := range s.VMs {
			row("%s\t%s\t%s\t%d\t%d\t%s", vm.Name, vm.Phase, vm.Part, vm.Disks, vm.Points, bytesText(vm.JournalBytes))
		}
	})
}

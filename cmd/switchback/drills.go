package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// some takes one argument or more.
func some(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usage(fmt.Errorf("%q takes arguments, %s…; got none", cmd.CommandPath(), name))
		}
		return nil
	}
}

// askDrills begins drills of several VMs and follows them.
func (c *cli) askDrills(cmd *cobra.Command, req api.DrillsRequest) error {
	cl, err := c.client()
	if err != nil {
		return err
	}
	noWait, err := cmd.Flags().GetBool("no-wait")
	if err != nil {
		return err
	}
	if req.DryRun, err = cmd.Flags().GetBool("dry-run"); err != nil {
		return err
	}
	a, err := cl.DrillSeveral(cmd.Context(), req)
	if err != nil {
		return err
	}
	return c.answered(cmd.Context(), cl, a, operation.StateSucceeded, noWait)
}

// drillClean ends drills: of VMs by name, or all of one drill of several.
func (c *cli) drillClean() *cobra.Command {
	var id string
	cmd := c.vmOperation(recovery.CleanDrill, "clean VM…", "End the drills under way, or clear what they have left", func(*api.OperationRequest, *cobra.Command) {})
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if id != "" {
			return none(cmd, args)
		}
		return some("VM")(cmd, args)
	}
	each := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, vm := range args {
			if err := each(cmd, []string{vm}); err != nil {
				return err
			}
		}
		if id == "" {
			return nil
		}
		cl, err := c.client()
		if err != nil {
			return err
		}
		if err := cl.CleanDrills(cmd.Context(), switchback.OperationID(id)); err != nil {
			return err
		}
		rec, err := cl.Operation(cmd.Context(), switchback.OperationID(id))
		if err != nil {
			return err
		}
		noWait, err := cmd.Flags().GetBool("no-wait")
		if err != nil {
			return err
		}
		return c.answered(cmd.Context(), cl, api.OperationAnswer{Operation: &rec}, operation.StateCancelled, noWait)
	}
	cmd.Flags().StringVar(&id, "drill", "", "the operation that drills several VMs: end all of them")
	return cmd
}

// printDrills prints the reports of drills that belong together.
func printDrills(w io.Writer, list []api.DrillReport) {
	for _, d := range list {
		fmt.Fprintf(w, "\n%s\n", d.VM)
		printDrill(w, d)
	}
}

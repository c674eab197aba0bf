package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// none takes no arguments.
func none(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("unknown argument %q of %q", args[0], cmd.CommandPath()))
	}
	return nil
}

// one takes one argument, named for the error.
func one(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usage(fmt.Errorf("%q takes one argument, %s; got %d", cmd.CommandPath(), name, len(args)))
		}
		return nil
	}
}

// group makes a command that only has subcommands refuse unknown ones.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = none
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

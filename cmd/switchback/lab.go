package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/demo"
)

// labCommand makes two sites on this machine.
func labCommand() *cobra.Command {
	var dir string
	cmd := group(&cobra.Command{Use: "lab", Short: "Two libvirt sites on this machine, with guests, server and agents"})
	cmd.PersistentFlags().StringVar(&dir, "dir", "/var/tmp/switchback-lab", "directory of the lab")
	var bare bool
	up := &cobra.Command{Use: "up", Short: "Start the lab (needs root, and the packages of scripts/install-packages.sh)", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		guests := lab.DefaultGuests()
		if bare {
			guests = nil
		}
		out := cmd.OutOrStdout()
		l, err := lab.Up(cmd.Context(), lab.Config{Dir: dir, Executable: exe, Guests: guests, Log: func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "the lab is up; talk to it with\n\n  export SWITCHBACK_CONFIG=%s\n", l.ConfigDir())
		return nil
	}}
	up.Flags().BoolVar(&bare, "bare", false, "without guests")
	status := &cobra.Command{Use: "status", Short: "Show sites, processes and guests", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		l, err := lab.Attach(dir)
		if err != nil {
			return err
		}
		return printLab(cmd.OutOrStdout(), l, cmd)
	}}
	down := &cobra.Command{Use: "down", Short: "End the lab and remove its files", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		return lab.Down(cmd.Context(), dir)
	}}
	var report string
	var keep bool
	show := &cobra.Command{Use: "demo", Short: "Run the whole loop on real guests, with a witness, and write a report", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		return demo.Run(cmd.Context(), demo.Config{Dir: dir, Executable: exe, JSON: report, Out: cmd.OutOrStdout(), Keep: keep})
	}}
	show.Flags().StringVar(&report, "json", "demo.json", "where the report goes")
	show.Flags().BoolVar(&keep, "keep", false, "leave the lab up afterwards")
	cmd.AddCommand(up, status, down, show, simulatedHypervisorCommand())
	return cmd
}

func printLab(w io.Writer, l *lab.Lab, cmd *cobra.Command) error {
	fmt.Fprintf(w, "lab in %s, logs in %s\n", l.Dir(), filepath.Join(l.Dir(), "log"))
	fmt.Fprintf(w, "export SWITCHBACK_CONFIG=%s\n", l.ConfigDir())
	fmt.Fprintf(w, "server: %s\n", running(l.ServerAlive()))
	for _, name := range []string{lab.Primary, lab.Recovery} {
		if l.Site(name) == nil {
			fmt.Fprintf(w, "site %s: not running\n", name)
			continue
		}
		fmt.Fprintf(w, "site %s: agent %s; virsh -c '%s'\n", name, running(l.AgentAlive(name)), l.Site(name).URI())
		out, err := l.Virsh(cmd.Context(), name, "list", "--all")
		if err != nil {
			return err
		}
		fmt.Fprintln(w, out)
	}
	return nil
}

func running(alive bool) string {
	if alive {
		return "running"
	}
	return "not running"
}

package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/seal"
)

// agentCommand runs the agent; its subcommands join and list.
func (c *cli) agentCommand() *cobra.Command {
	var cfg agent.Config
	var libvirtSocket, platform, logLevel string
	cmd := &cobra.Command{Use: "agent", Short: "Run the agent of a site", Args: none}
	cmd.PersistentFlags().StringVar(&cfg.StateDir, "state", "/var/lib/switchback", "state directory")
	f := cmd.Flags()
	f.StringVar(&cfg.RunDir, "run", "/run/switchback", "directory of sockets")
	f.StringVar(&cfg.StorageDir, "storage", "", "directory of replicas (default STATE/storage)")
	f.StringVar(&cfg.ScratchDir, "scratch", "", "directory of scratch files (default STATE/scratch)")
	f.StringVar(&cfg.Listen, "listen", "", "address to listen on (default: the one given at join)")
	f.StringVar(&libvirtSocket, "libvirt", "/run/libvirt/libvirt-sock", "libvirt's socket")
	f.StringVar(&platform, "hypervisor", "libvirt", "libvirt, or simulated:DIR for a daemon started by 'lab simulated-hypervisor DIR'")
	f.StringVar(&cfg.LibvirtPIDFile, "libvirt-pid", "/run/libvirtd.pid", "libvirtd's pid file, to tell it about the hook")
	f.Int64Var(&cfg.StorageReserveBytes, "storage-reserve", 256<<20, "bytes kept free in the storage")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	var keys seal.Source
	var keyCommand, objects string
	f.StringVar(&keys.File, "encryption-key-file", "", "key file for encrypted replicas ('switchback key new FILE' makes one)")
	f.StringVar(&keyCommand, "encryption-command", "", "program, with arguments, that wraps and unwraps their data keys instead")
	f.StringVar(&objects, "object-store", "", "file that names the object store for old points, as JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		keys.Command = strings.Fields(keyCommand)
		if keys.File != "" || len(keys.Command) > 0 {
			if _, err := keys.Wrapper(); err != nil {
				return err
			}
			cfg.KeySource = &keys
		}
		if objects != "" {
			place, err := readObjectStore(objects)
			if err != nil {
				return err
			}
			cfg.Objects = place
		}
		log, err := newLogger(cmd.ErrOrStderr(), logLevel)
		if err != nil {
			return err
		}
		joined, err := agent.LoadIdentity(cfg.StateDir)
		if err != nil {
			return err
		}
		hv, err := openHypervisor(&cfg, platform, libvirt.Config{Socket: libvirtSocket, Logger: log})
		if err != nil {
			return err
		}
		defer hv.Close()
		cfg.Hypervisor, cfg.Logger, cfg.Version = hv, log, version
		cfg.GuardCommand = leaseGuardArguments(cfg, libvirtSocket, platform)
		cfg.Credentials, cfg.Address, cfg.ServerAddress, cfg.Servers = joined.Credentials, joined.Address, joined.Server, joined.Servers
		if cfg.Listen == "" {
			cfg.Listen = joined.Address
		}
		a, err := agent.New(cfg)
		if err != nil {
			return err
		}
		return a.Run(cmd.Context())
	}

	var address string
	join := &cobra.Command{Use: "join TOKEN", Short: "Join a site with a one-time token", Args: one("TOKEN"), RunE: func(cmd *cobra.Command, args []string) error {
		if !strings.Contains(address, ":") {
			return switchback.Errorf(switchback.CodeInvalid, "--address HOST:PORT is needed: how the server and the other agents reach this agent")
		}
		id, err := agent.Join(cmd.Context(), cfg.StateDir, args[0], address, version)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "joined as %s; credentials are in %s\nrun it: switchback agent --state %s\n", id, filepath.Join(cfg.StateDir, "identity"), cfg.StateDir)
		return nil
	}}
	join.Flags().StringVar(&address, "address", "", "how this agent is reached, host:port")

	list := &cobra.Command{Use: "list", Short: "List all agents", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		agents, err := cl.Agents(cmd.Context())
		if err != nil {
			return err
		}
		return c.show(agents, func(w io.Writer) {
			table(w, "AGENT\tSITE\tADDRESS\tVERSION\tLAST SEEN\tHEALTH", func(row func(string, ...any)) {
				for _, a := range agents {
					health := "ok"
					if !a.Healthy {
						health = a.Reason
					}
					row("%s\t%s\t%s\t%s\t%s\t%s", a.ID, a.Site, a.Address, a.Version, ago(a.LastSeen), health)
				}
			})
		})
	}}
	cmd.AddCommand(join, list)
	cmd.AddCommand(c.agentLocal()...)
	cmd.AddCommand(leaseGuardCommand())
	return cmd
}

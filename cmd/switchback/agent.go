package main

import (
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/seal"
)

// agentCommand runs the agent; its subcommands join, list and so on.
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
	fine := f.Bool("fine-tracking", true, "record writes in 4 KiB units in QEMU, so that less is read; libvirt marks such domains 'tainted: custom-monitor'")
	f.StringVar(&platform, "hypervisor", "libvirt", "libvirt, or simulated:DIR for a daemon started by 'lab simulated-hypervisor DIR'")
	f.StringVar(&cfg.LibvirtPIDFile, "libvirt-pid", "/run/libvirtd.pid", "libvirtd's pid file, to tell it about the hook")
	f.Int64Var(&cfg.StorageReserveBytes, "storage-reserve", 256<<20, "bytes kept free in the storage")
	f.IntVar(&cfg.MaxDisks, "max-disks", 0, "how many disks of protected VMs the agent works for; 0 = no limit")
	f.IntVar(&cfg.MaxCopies, "max-copies", 0, "how many first copies are made at the same time, others wait; 0 = no limit")
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
		hv, err := openHypervisor(&cfg, platform, libvirt.Config{Socket: libvirtSocket, NoMonitor: !*fine, Logger: log})
		if err != nil {
			return err
		}
		defer hv.Close()
		cfg.Hypervisor, cfg.Logger, cfg.Version = hv, log, version
		cfg.GuardCommand = leaseGuardArguments(cfg, libvirtSocket, platform)
		cfg.Credentials, cfg.Address, cfg.ServerAddress, cfg.Servers = joined.Credentials, joined.Address, joined.Server, joined.Servers
		if cfg.Reachable = joined.Reachable; cfg.Listen == "" && cfg.Reachable != agentapi.ReachableNo {
			cfg.Listen = joined.Address
		}
		a, err := agent.New(cfg)
		if err != nil {
			return err
		}
		return a.Run(cmd.Context())
	}

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
					row("%s\t%s\t%s\t%s\t%s\t%s", a.ID, a.Site, addressText(a.Address), a.Version, ago(a.LastSeen), health)
				}
			})
		})
	}}
	cmd.AddCommand(append(c.agentTrustCommands(&cfg.StateDir), list, c.agentRecoveryKey(&cfg.StateDir))...)
	cmd.AddCommand(c.agentLocal()...)
	cmd.AddCommand(leaseGuardCommand())
	return cmd
}

package main

import (
	"github.com/spf13/cobra"

	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
)

// leaseGuardCommand is the process that agents start beside them; see agent.GuardLeases.
func leaseGuardCommand() *cobra.Command {
	var cfg agent.Config
	var libvirtSocket, platform string
	cmd := &cobra.Command{Use: "lease-guard", Short: "Stop VMs whose lease has ended, also while the agent is dead", Hidden: true, Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(cmd.ErrOrStderr(), "info")
			if err != nil {
				return err
			}
			hv, err := openHypervisor(&cfg, platform, libvirt.Config{Socket: libvirtSocket, Logger: log})
			if err != nil {
				return err
			}
			defer hv.Close()
			cfg.Hypervisor, cfg.Logger = hv, log
			if cfg.StateDir, err = cmd.Flags().GetString("state"); err != nil { // the agent's
				return err
			}
			return agent.GuardLeases(cmd.Context(), cfg)
		}}
	f := cmd.Flags()
	f.StringVar(&cfg.RunDir, "run", "/run/switchback", "the agent's run directory")
	f.StringVar(&libvirtSocket, "libvirt", "/run/libvirt/libvirt-sock", "libvirt's socket")
	f.StringVar(&platform, "hypervisor", "libvirt", "as for the agent")
	return cmd
}

// leaseGuardArguments run it over the directories of an agent.
func leaseGuardArguments(cfg agent.Config, libvirtSocket, platform string) []string {
	return []string{"agent", "lease-guard", "--state", cfg.StateDir, "--run", cfg.RunDir, "--libvirt", libvirtSocket, "--hypervisor", platform}
}

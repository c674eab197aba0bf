package main

import (
	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
)

// openHypervisor makes the driver of the platform that --hypervisor names, and
// sets in cfg what goes with it.
func openHypervisor(cfg *agent.Config, platform string, lv libvirt.Config) (hypervisor.Hypervisor, error) {
	if platform == "libvirt" {
		return libvirt.New(lv)
	}
	dir, ok := simulated.Dir(platform)
	if !ok || dir == "" {
		return nil, switchback.Errorf(switchback.CodeInvalid, "unknown hypervisor %q", platform).WithHint("libvirt, or simulated:DIR")
	}
	cfg.HookPath, cfg.LibvirtPIDFile = simulated.HookPath(dir), simulated.PIDFile(dir)
	return simulated.New(dir), nil
}

// simulatedHypervisorCommand is the daemon of a simulated host.
func simulatedHypervisorCommand() *cobra.Command {
	var name, powerLog, logLevel string
	cmd := &cobra.Command{Use: "simulated-hypervisor DIR", Short: "Run the daemon of a simulated host, made in DIR where it is missing", Args: one("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := newLogger(cmd.ErrOrStderr(), logLevel)
			if err != nil {
				return err
			}
			h, err := simulated.Open(args[0], log)
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				if err = simulated.Create(args[0], simulated.Config{Name: name, PowerLog: powerLog}); err == nil {
					h, err = simulated.Open(args[0], log)
				}
			}
			if err != nil {
				return err
			}
			return h.Serve(cmd.Context())
		}}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "name of a new host (default: that of DIR)")
	f.StringVar(&powerLog, "power-log", "", "a new host's file of power events, which hosts may share (default DIR/power.log)")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

package main

import (
	"github.com/spf13/cobra"

	"github.com/switchback-dr/switchback/server"
)

func serverCommand() *cobra.Command {
	var cfg server.Config
	var logLevel string
	cmd := &cobra.Command{Use: "server", Short: "Run the control plane", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		log, err := newLogger(cmd.ErrOrStderr(), logLevel)
		if err != nil {
			return err
		}
		cfg.Logger, cfg.Version = log, version
		s, err := server.Open(cmd.Context(), cfg)
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Run(cmd.Context())
	}}
	f := cmd.Flags()
	f.StringVar(&cfg.StateDir, "state", "/var/lib/switchback-server", "state directory; STATE/admin holds the first administrator's credentials")
	f.StringSliceVar(&cfg.Listen, "listen", []string{"127.0.0.1:7443"}, "addresses to listen on")
	f.StringSliceVar(&cfg.Addresses, "address", nil, "how agents and clients reach the server (default: the listening addresses)")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

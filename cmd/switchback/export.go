package main

import (
	"fmt"
	"net"
	"os"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
)

// viewBackend serves one disk of a view over NBD.
type viewBackend struct{ *journal.DiskView }

func (b viewBackend) Extents(off, length int64) ([]nbd.Extent, error) {
	extents, err := b.DiskView.Extents(off, length)
	if err != nil {
		return nil, err
	}
	out := make([]nbd.Extent, len(extents))
	for i, x := range extents {
		out[i] = nbd.Extent{Offset: x.Offset, Length: x.Length}
		if x.Zero {
			out[i].Flags = nbd.StateHole | nbd.StateZero
		}
	}
	return out, nil
}

// exportCommand serves the view of one point until it is told to end. It is a
// process of its own, so that it outlives the agent.
func exportCommand() *cobra.Command {
	var replica, snapshot, socket, pidFile, logLevel string
	var point uint64
	cmd := &cobra.Command{Use: "export", Short: "Serve the disks of a recovery point or a snapshot, read-only, over NBD", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		log, err := newLogger(cmd.ErrOrStderr(), logLevel)
		if err != nil {
			return err
		}
		if replica == "" || socket == "" {
			return switchback.Errorf(switchback.CodeInvalid, "--replica and --socket are needed")
		}
		view, err := journal.OpenNamed(replica, switchback.Sequence(point), snapshot)
		if err != nil {
			return err
		}
		defer view.Close()
		backends := map[string]nbd.Backend{}
		var names []string
		for _, d := range view.Disks() {
			backends[d.Name()] = viewBackend{d}
			names = append(names, d.Name())
		}
		ln, err := net.Listen("unix", socket)
		if err != nil {
			return switchback.Errorf(switchback.CodeUnavailable, "listen on %s: %w", socket, err)
		}
		defer ln.Close()
		if pidFile != "" {
			if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600); err != nil {
				return err
			}
		}
		srv := nbd.NewServer(func(name string) (nbd.Backend, error) {
			if b, ok := backends[name]; ok {
				return b, nil
			}
			return nil, switchback.Errorf(switchback.CodeNotFound, "no disk %q", name)
		}, func() []string { return names }, log)
		return srv.Serve(cmd.Context(), ln)
	}}
	f := cmd.Flags()
	f.StringVar(&replica, "replica", "", "directory of the replica")
	f.Uint64Var(&point, "point", 0, "sequence number of the point")
	f.StringVar(&snapshot, "snapshot", "", "name of a snapshot, instead of a point")
	f.StringVar(&socket, "socket", "", "unix socket to serve on; the disks are its exports")
	f.StringVar(&pidFile, "pid-file", "", "file to write the process id to")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

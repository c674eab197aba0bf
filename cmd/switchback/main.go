// Command switchback is the whole product in one binary: the server, the
// agent, the command line that talks to the server, and the lab.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/killpoint"
)

// version is set by the build (-ldflags -X main.version=…).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	killpoint.Arm(os.Getenv(killpoint.Environment))
	os.Exit(Main{Args: os.Args[1:], Stdout: os.Stdout, Stderr: os.Stderr}.Run(ctx))
}

// Main is the program with its surroundings as fields, so that tests run it.
type Main struct {
	Args           []string
	Stdout, Stderr io.Writer
}

// Run runs one command and returns the exit status.
func (m Main) Run(ctx context.Context) int {
	root := m.root()
	root.SetArgs(m.Args)
	root.SetOut(m.Stdout)
	root.SetErr(m.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	printError(m.Stderr, err)
	return exitStatus(err)
}

// root builds the command tree.
func (m Main) root() *cobra.Command {
	c := &cli{out: m.Stdout}
	root := &cobra.Command{
		Use:           "switchback",
		Short:         "Disaster recovery for virtual machines: fail over, commit, reprotect, fail back",
		SilenceErrors: true, SilenceUsage: true, Version: version,
	}
	root.PersistentFlags().StringVar(&c.configDir, "config", defaultConfigDir(), "directory with the client's credentials (made by the server in STATE/admin)")
	root.PersistentFlags().StringVarP(&c.output, "output", "o", "text", "text or json; get: also yaml")
	root.PersistentFlags().StringVar(&c.breakGlass, "break-glass", "", "reason for going on without the second person's approval that an operation takes; it is noted")
	root.AddCommand(c.vmCommand(), c.siteCommand(), c.agentCommand(), c.operationCommand(), c.pointsCommand(), c.replicaCommand(), c.serverCommand(), exportCommand(), c.keyCommand(), labCommand())
	root.AddCommand(c.configCommands()...)
	root.AddCommand(c.accessCommands()...)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if c.output == "yaml" && cmd.Name() == "get" {
			return nil
		}
		if c.output != "text" && c.output != "json" {
			return switchback.Errorf(switchback.CodeInvalid, "unknown output format %q", c.output).WithHint("text or json")
		}
		return nil
	}
	group(root)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	return root
}

func defaultConfigDir() string {
	if d := os.Getenv("SWITCHBACK_CONFIG"); d != "" {
		return d
	}
	if d, err := os.UserConfigDir(); err == nil {
		return filepath.Join(d, "switchback")
	}
	return "/etc/switchback/client"
}

// usage marks an error as a wrong use of the command line.
func usage(err error) error {
	return &switchback.Error{Code: switchback.CodeInvalid, Message: err.Error(), Hint: "see --help"}
}

// exitStatus maps codes to exit statuses. The table is in the README.
func exitStatus(err error) int {
	switch switchback.CodeOf(err) {
	case switchback.CodeInvalid:
		return 2
	case switchback.CodeNotFound:
		return 3
	case switchback.CodeRefused, switchback.CodeConflict, switchback.CodeStaleEpoch, switchback.CodeUnsupported:
		return 4
	case switchback.CodeUnavailable, switchback.CodeTimeout:
		return 5
	case switchback.CodeUnauthorized:
		return 6
	case switchback.CodeCancelled:
		return 7
	}
	return 1
}

func printError(w io.Writer, err error) {
	var e *switchback.Error
	if errors.As(err, &e) && e.Hint != "" {
		text := *e
		text.Hint = ""
		fmt.Fprintf(w, "error: %s\nremedy: %s\n", text.Error(), e.Hint)
		return
	}
	fmt.Fprintf(w, "error: %v\n", err)
}

// newLogger logs to stderr; the level comes from --log-level.
func newLogger(w io.Writer, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "log level %q", level).WithHint("debug, info, warn or error")
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

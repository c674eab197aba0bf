package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/switchback-dr/switchback/server"
)

// serverCommand runs the server; its subcommands work on the installation while
// it does not run, except for backup.
func (c *cli) serverCommand() *cobra.Command {
	var cfg server.Config
	var logLevel, s3, oidc string
	cmd := &cobra.Command{Use: "server", Short: "Run the control plane", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		log, err := newLogger(cmd.ErrOrStderr(), logLevel)
		if err != nil {
			return err
		}
		if s3 != "" {
			if cfg.Backup.Objects, err = readObjectStore(s3); err != nil {
				return err
			}
		}
		if oidc != "" {
			data, err := os.ReadFile(oidc)
			if err != nil {
				return err
			}
			if cfg.OIDC, err = server.ParseOIDC(data); err != nil {
				return err
			}
		}
		cfg.Logger, cfg.Version = log, version
		s, err := server.Open(cmd.Context(), cfg)
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Run(cmd.Context())
	}}
	cmd.PersistentFlags().StringVar(&cfg.StateDir, "state", "/var/lib/switchback-server", "state directory; STATE/admin holds the first administrator's credentials")
	f := cmd.Flags()
	f.StringSliceVar(&cfg.Listen, "listen", []string{"127.0.0.1:7443"}, "addresses to listen on")
	f.StringSliceVar(&cfg.Addresses, "address", nil, "how agents and clients reach the server, or each of several servers (default: the listening addresses)")
	f.Func("reachable", "true, or false where agents cannot open connections to the server: it opens them then", func(v string) error {
		ok, err := strconv.ParseBool(v)
		cfg.Unreachable = !ok
		return err
	})
	f.StringVar(&cfg.Store, "store", os.Getenv("SWITCHBACK_STORE"), "postgres://… to share a PostgreSQL database with other servers (default: an embedded database in STATE)")
	f.StringVar(&cfg.KeyFile, "key-file", "", "key of the CA in the PostgreSQL database (default STATE/installation.key); copy it to every server")
	f.StringVar(&cfg.Backup.Dir, "backup-dir", "", "directory that gets backups of the embedded database")
	f.DurationVar(&cfg.Backup.Every, "backup-every", time.Hour, "time between two backups")
	f.IntVar(&cfg.Backup.Keep, "backup-keep", 24, "how many backups are kept")
	f.StringVar(&s3, "backup-s3", "", "file that names an S3 bucket for copies of the backups, JSON: endpoint, bucket, prefix, region, credentials_file")
	f.StringVar(&oidc, "oidc", "", "file that names the identity provider at which people log in, JSON: issuer, client_id, roles ([{group, role, scope}]), scopes, person_claim, groups_claim, token_hours")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	cmd.AddCommand(c.serverMigrateCommand(&cfg), c.serverBackupCommand(&cfg), c.serverRestoreCommand(&cfg), c.serverCACommand(), c.serverInit(&cfg), c.serverDocumentCommand())
	return cmd
}

func (c *cli) serverMigrateCommand(cfg *server.Config) *cobra.Command {
	var to, key string
	cmd := &cobra.Command{Use: "migrate --to postgres://…", Short: "Move the embedded database to PostgreSQL", Args: none,
		Long: `Move the embedded installation in STATE into an empty PostgreSQL database: all rows and the CA, in one
transaction, read back before it is committed. The server must be stopped. Afterwards the embedded one is
marked, so that it cannot be started by mistake. What was interrupted can be run again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				return usage(fmt.Errorf("--to is needed: the URL of an empty PostgreSQL database"))
			}
			m, err := server.Migrate(cmd.Context(), server.Config{StateDir: cfg.StateDir, Store: to, KeyFile: key})
			if err != nil {
				return err
			}
			return c.show(m, func(w io.Writer) {
				if m.Repeated {
					fmt.Fprintln(w, "the copy was there already, and is the same")
				}
				table(w, "TABLE\tROWS", func(row func(string, ...any)) {
					for _, t := range m.Tables {
						row("%s\t%d", t.Name, t.Rows)
					}
				})
				fmt.Fprintf(w, "moved to %s and read back; start the server with: switchback server --state %s --store %s\n", m.To, cfg.StateDir, m.To)
				fmt.Fprintf(w, "keep a copy of %s: without it nobody can open the CA in the database\n", m.KeyFile)
			})
		}}
	cmd.Flags().StringVar(&to, "to", "", "URL of an empty PostgreSQL database")
	cmd.Flags().StringVar(&key, "key-file", "", "key that seals the CA in the database (default STATE/installation.key; made where it is missing)")
	return cmd
}

func (c *cli) serverBackupCommand(cfg *server.Config) *cobra.Command {
	return &cobra.Command{Use: "backup FILE", Short: "Back the embedded database and the CA up, also while the server runs", Args: one("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := server.WriteBackup(cmd.Context(), cfg.StateDir, args[0], version)
			if err != nil {
				return err
			}
			return c.show(b, func(w io.Writer) {
				fmt.Fprintf(w, "%s holds installation %s as of %s; whoever has it can act as any part of it\n", args[0], b.Installation, b.MadeAt.Format(time.RFC3339))
			})
		}}
}

func (c *cli) serverRestoreCommand(cfg *server.Config) *cobra.Command {
	return &cobra.Command{Use: "restore FILE", Short: "Make the state directory of a server from a backup", Args: one("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := server.Restore(cmd.Context(), args[0], cfg.StateDir)
			if err != nil {
				return err
			}
			return c.show(b, func(w io.Writer) {
				fmt.Fprintf(w, "%s holds installation %s as of %s; start it with: switchback server --state %s\n", cfg.StateDir, b.Installation, b.MadeAt.Format(time.RFC3339), cfg.StateDir)
				fmt.Fprintln(w, "revocations of agents and of API tokens made since then are void: those of agents are learned again from the agents that answer;\nsee 'switchback token list' and 'switchback agent list', and revoke again what is missing")
				for _, id := range b.Suspended {
					fmt.Fprintf(w, "operation %s was under way: see how its VM stands, then retry or cancel it\n", id)
				}
			})
		}}
}

func (c *cli) serverDocumentCommand() *cobra.Command {
	return &cobra.Command{Use: "openapi", Short: "Print the OpenAPI document of the API", Args: none,
		RunE: func(*cobra.Command, []string) error {
			doc, err := server.Document()
			if err != nil {
				return err
			}
			_, err = c.out.Write(doc)
			return err
		}}
}

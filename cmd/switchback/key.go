package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore"
	"github.com/switchback-dr/switchback/seal"
)

// keyCommand makes the keys that agents wrap data keys with.
func (c *cli) keyCommand() *cobra.Command {
	key := &cobra.Command{Use: "key", Short: "Keys for encrypted replicas"}
	key.AddCommand(&cobra.Command{Use: "new FILE", Short: "Make a key file for agents (--encryption-key-file)", Args: one("FILE"), RunE: func(cmd *cobra.Command, args []string) error {
		if err := seal.MakeKeyFile(args[0]); err != nil {
			return err
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s made. Keep a copy at another place: without it the points encrypted under it are lost.\n", args[0])
		return err
	}})
	key.AddCommand(&cobra.Command{Use: "rotate VM", Short: "Encrypt the VM's new points under a new data key; older points keep theirs", Args: one("VM"), RunE: func(cmd *cobra.Command, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		r, err := cl.RotateKey(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return c.show(r, func(w io.Writer) {
			fmt.Fprintf(w, "%s has %d data keys; the newest encrypts from now on\n", args[0], r.Keys)
		})
	}})
	return key
}

// readObjectStore reads a file that names a place in an object store.
func readObjectStore(file string) (*objectstore.Config, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "object store: %w", err)
	}
	var c objectstore.Config
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "object store: %s: %w", file, err).
			WithHint(`it holds {"endpoint": …, "bucket": …, "prefix": …, "region": …, "credentials_file": …}`)
	}
	return &c, c.Validate()
}

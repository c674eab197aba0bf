package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/config"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// readConfig reads a file, or standard input for "-".
func readConfig(cmd *cobra.Command, file string) ([]config.Document, error) {
	if file == "" {
		return nil, usage(errors.New("-f FILE is needed ('-' for standard input)"))
	}
	var data []byte
	var err error
	if file == "-" {
		data, err = io.ReadAll(cmd.InOrStdin())
	} else {
		data, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeNotFound, "%w", err)
	}
	docs, err := config.Parse(data)
	if err != nil {
		e := switchback.Flatten(err)
		return nil, &switchback.Error{Code: e.Code, Message: file + ": " + e.Message, Hint: e.Hint}
	}
	return docs, nil
}

// currentConfig is what the installation has.
func currentConfig(ctx context.Context, cl *api.Client) ([]config.Document, error) {
	sites, err := cl.Sites(ctx)
	if err != nil {
		return nil, err
	}
	vms, err := cl.VMs(ctx)
	if err != nil {
		return nil, err
	}
	var docs []config.Document
	for _, s := range sites {
		docs = append(docs, config.OfSite(s))
	}
	for _, v := range vms {
		docs = append(docs, config.OfVM(v.Protection))
	}
	return docs, nil
}

// changesOf reads a file and compares it with what the installation has.
func (c *cli) changesOf(cmd *cobra.Command, file string) (*api.Client, []config.Change, error) {
	wanted, err := readConfig(cmd, file)
	if err != nil {
		return nil, nil, err
	}
	cl, err := c.client()
	if err != nil {
		return nil, nil, err
	}
	current, err := currentConfig(cmd.Context(), cl)
	if err != nil {
		return nil, nil, err
	}
	changes, err := config.Diff(current, wanted)
	return cl, changes, err
}

func changesText(w io.Writer, changes []config.Change) {
	if len(changes) == 0 {
		fmt.Fprintln(w, "everything is as the file says")
	}
	for _, x := range changes {
		fmt.Fprintf(w, "%s %s %s\n", x.Action, x.Kind, x.Name)
		for _, f := range x.Fields {
			if x.Action == config.Create {
				fmt.Fprintf(w, "  %s: %s\n", f.Path, f.To)
				continue
			}
			from, to := f.From, f.To
			if from == "" {
				from = "(unset)"
			}
			if to == "" {
				to = "(unset)"
			}
			fmt.Fprintf(w, "  %s: %s -> %s\n", f.Path, from, to)
		}
	}
}

func (c *cli) configCommands() []*cobra.Command {
	var file string
	var exitCode bool
	diff := &cobra.Command{Use: "diff -f FILE", Short: "Say what applying a configuration file would change", Args: none, RunE: func(cmd *cobra.Command, _ []string) error {
		_, changes, err := c.changesOf(cmd, file)
		if err != nil {
			return err
		}
		if changes == nil {
			changes = []config.Change{}
		}
		if err := c.show(changes, func(w io.Writer) { changesText(w, changes) }); err != nil {
			return err
		}
		if exitCode && len(changes) > 0 {
			return switchback.Errorf(switchback.CodeConflict, "%d objects differ from %s", len(changes), file).WithHint("switchback apply -f %s", file)
		}
		return nil
	}}
	diff.Flags().StringVarP(&file, "file", "f", "", "configuration file; '-' = standard input")
	diff.Flags().BoolVar(&exitCode, "exit-code", false, "end with status 4 if there are differences")

	var dry, noWait bool
	apply := &cobra.Command{Use: "apply -f FILE", Short: "Make sites and protected VMs as a configuration file says", Args: none,
		Long: `Make sites and protected VMs as a configuration file says: what is so already is left alone, what is missing is
made (a VM is protected, with a first full copy), what differs is changed. Nothing is deleted. 'get all -o yaml'
writes such a file. A field that is not named has its default.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, changes, err := c.changesOf(cmd, file)
			if err != nil {
				return err
			}
			if !c.json() {
				changesText(c.out, changes)
			}
			return c.applyChanges(cmd.Context(), cl, changes, dry, noWait)
		}}
	apply.Flags().StringVarP(&file, "file", "f", "", "configuration file; '-' = standard input")
	apply.Flags().BoolVar(&dry, "dry-run", false, "say what would be changed, and let the server check that it can be; do nothing")
	apply.Flags().BoolVar(&noWait, "no-wait", false, "return when the operations have begun")

	get := &cobra.Command{Use: "get KIND [NAME]", Short: "Write the configuration of sites and VMs as YAML (KIND: site, vm or all)", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind := map[string]string{"site": config.KindSite, "sites": config.KindSite, "vm": config.KindVM, "vms": config.KindVM, "all": "all"}[strings.ToLower(args[0])]
			if kind == "" {
				return usage(fmt.Errorf("unknown kind %q: site, vm or all", args[0]))
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			all, err := currentConfig(cmd.Context(), cl)
			if err != nil {
				return err
			}
			docs := []config.Document{}
			for _, d := range all {
				if (kind == "all" || d.Kind() == kind) && (len(args) == 1 || d.Name() == args[1]) {
					docs = append(docs, d)
				}
			}
			if len(args) == 2 && len(docs) == 0 {
				return switchback.Errorf(switchback.CodeNotFound, "there is no %s %q", args[0], args[1]).WithHint("'switchback get %s' shows all", args[0])
			}
			if !c.json() {
				return config.Write(c.out, docs)
			}
			plain := []any{}
			for _, d := range docs {
				p, err := d.Plain()
				if err != nil {
					return err
				}
				plain = append(plain, p)
			}
			return c.show(plain, nil)
		}}
	return []*cobra.Command{apply, diff, get}
}

// applied is what became of one object.
type applied struct {
	config.Change
	Operations []switchback.OperationID `json:"operations,omitempty"`
	// Plan is that of a dry run.
	Plan  *api.Plan         `json:"plan,omitempty"`
	Error *switchback.Error `json:"error,omitempty"`
}

// applyChanges carries changes out. One that fails does not keep the others from
// being made; the first error is returned.
func (c *cli) applyChanges(ctx context.Context, cl *api.Client, changes []config.Change, dry, noWait bool) error {
	newSites := map[string]bool{}
	results := make([]applied, len(changes))
	var first error
	for i, x := range changes {
		results[i].Change = x
		var err error
		switch {
		case x.Kind == config.KindSite:
			newSites[x.Name] = true
			if !dry {
				err = cl.CreateSite(ctx, x.Document.Site.Name)
			}
		case dry && (newSites[string(x.Document.VM.Home)] || newSites[string(x.Document.VM.To)]):
			// Its sites do not exist yet: nobody can check more.
		default:
			err = c.applyVM(ctx, cl, x, &results[i], dry, noWait)
		}
		if err != nil {
			results[i].Error = switchback.Flatten(err)
			if first == nil {
				e := switchback.Flatten(err)
				first = &switchback.Error{Code: e.Code, Message: x.Kind + " " + x.Name + ": " + e.Message, Hint: e.Hint}
			}
		}
	}
	if c.json() {
		if err := c.show(results, nil); err != nil {
			return err
		}
	} else {
		for _, r := range results {
			switch {
			case r.Error != nil:
				fmt.Fprintf(c.out, "%s %s: %v\n", r.Kind, r.Name, r.Error)
			case dry:
				fmt.Fprintf(c.out, "%s %s: can be done\n", r.Kind, r.Name)
			case r.Kind == config.KindSite:
				fmt.Fprintf(c.out, "%s %s: done; 'switchback site add %s' prints a token for its agent\n", r.Kind, r.Name, r.Name)
			default:
				fmt.Fprintf(c.out, "%s %s: done\n", r.Kind, r.Name)
			}
		}
	}
	return first
}

// applyVM protects a VM, or changes its policy, networks and pause.
func (c *cli) applyVM(ctx context.Context, cl *api.Client, x config.Change, r *applied, dry, noWait bool) error {
	vm := x.Document.VM
	ask := func(kind recovery.Kind, req api.OperationRequest) error {
		req.DryRun = dry
		a, err := cl.Request(ctx, vm.Name, kind, req)
		if err != nil || dry {
			if a.Plan != nil {
				r.Plan = a.Plan
			}
			return err
		}
		r.Operations = append(r.Operations, a.Operation.ID)
		if noWait {
			return nil
		}
		var last operation.Record
		if err := cl.Watch(ctx, a.Operation.ID, func(rec operation.Record) { last = rec }); err != nil {
			return err
		}
		if last.State != operation.StateSucceeded {
			if last.Error != nil {
				return last.Error
			}
			return switchback.Errorf(switchback.CodeConflict, "%s is %s", last.Title, last.State).WithHint("switchback operation show %s", last.ID)
		}
		return nil
	}
	networks := vm.Networks
	if networks == nil {
		networks = map[string]string{}
	}
	pause, edit, tag := x.Action == config.Create && vm.Paused, false, x.Action == config.Create && len(vm.Tags) > 0
	if x.Action == config.Create {
		if err := ask(recovery.Protect, api.OperationRequest{From: vm.Home, To: vm.To, Policy: &vm.Policy, Networks: networks}); err != nil || dry {
			return err
		}
	}
	if x.Action == config.Modify {
		for _, f := range x.Fields {
			switch f.Path {
			case "paused":
				pause = true
			case "tags":
				tag = true
			default:
				edit = true
			}
		}
	}
	if tag && !dry {
		if _, err := cl.SetTags(ctx, vm.Name, vm.Tags); err != nil {
			return err
		}
	}
	if edit {
		if err := ask(recovery.Edit, api.OperationRequest{Policy: &vm.Policy, Networks: networks}); err != nil {
			return err
		}
	}
	if pause && !(noWait && len(r.Operations) > 0) {
		kind := recovery.Resume
		if vm.Paused {
			kind = recovery.Pause
		}
		return ask(kind, api.OperationRequest{})
	}
	if pause {
		return switchback.Errorf(switchback.CodeRefused, "it is paused or resumed only after the other changes are made").WithHint("apply again, or without --no-wait")
	}
	return nil
}

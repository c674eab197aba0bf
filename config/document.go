package config

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

// Kinds of documents.
const (
	KindSite = "Site"
	KindVM   = "VM"
)

// Site is the configuration of a site.
type Site struct {
	Kind string            `json:"kind"`
	Name switchback.SiteID `json:"name"`
}

// VM is the configuration of a protected VM.
type VM struct {
	Kind string            `json:"kind"`
	Name string            `json:"name"`
	Home switchback.SiteID `json:"home"`
	To   switchback.SiteID `json:"to"`
	// Networks maps networks at home to networks at the other site.
	Networks map[string]string `json:"networks"`
	// Tags are words by which VMs are found and roles are limited.
	Tags   []string          `json:"tags"`
	Paused bool              `json:"paused"`
	Policy switchback.Policy `json:"policy"`
}

// Document is one of these; Line is where it begins in its file, 0 = it is of none.
type Document struct {
	Site *Site
	VM   *VM
	Line int
}

// Kind and Name say what the document is of.
func (d Document) Kind() string {
	if d.Site != nil {
		return KindSite
	}
	return KindVM
}

// Name is the object's.
func (d Document) Name() string {
	if d.Site != nil {
		return string(d.Site.Name)
	}
	return d.VM.Name
}

// OfSite is the configuration that a site has.
func OfSite(s api.Site) Document { return Document{Site: &Site{Kind: KindSite, Name: s.ID}} }

// OfVM is the configuration that a protected VM has.
func OfVM(p switchback.Protection) Document {
	other := p.Target
	if other == p.Home {
		other = p.Source
	}
	return Document{VM: &VM{Kind: KindVM, Name: p.Name, Home: p.Home, To: other, Networks: p.Networks, Tags: p.Tags, Paused: p.Paused, Policy: p.Policy}}
}

// node is the document as YAML.
func (d Document) node() *yaml.Node {
	if d.Site != nil {
		return encode(reflect.ValueOf(*d.Site), KindSite)
	}
	return encode(reflect.ValueOf(*d.VM), KindVM)
}

// Write writes documents as one file.
func Write(w io.Writer, docs []Document) error {
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	for _, d := range docs {
		if err := enc.Encode(d.node()); err != nil {
			return err
		}
	}
	return enc.Close()
}

// Plain is the document as maps, lists and texts, for other notations.
func (d Document) Plain() (any, error) {
	var v any
	err := d.node().Decode(&v)
	return v, err
}

// Parse reads a file. CodeInvalid, with the line: it is not what the package
// comment says, or a setting cannot work.
func Parse(data []byte) ([]Document, error) {
	var docs []Document
	seen := map[string]int{}
	for dec := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var file yaml.Node
		err := dec.Decode(&file)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, switchback.Errorf(switchback.CodeInvalid, "%s", strings.TrimPrefix(err.Error(), "yaml: ")).WithHint("the file is not YAML")
		}
		if len(file.Content) == 0 || file.Content[0].Tag == "!!null" {
			continue
		}
		d, err := parseOne(file.Content[0])
		if err != nil {
			return nil, err
		}
		if d.VM != nil {
			slices.Sort(d.VM.Tags) // as the server keeps them
		}
		key := d.Kind() + " " + d.Name()
		if line, twice := seen[key]; twice {
			return nil, at(file.Content[0], "%s is in the file twice, first in line %d", key, line)
		}
		seen[key] = d.Line
		docs = append(docs, d)
	}
}

func parseOne(n *yaml.Node) (Document, error) {
	d := Document{Line: n.Line}
	if n.Kind != yaml.MappingNode {
		return d, at(n, "a document has fields, the first of them kind").WithHint("kind: %s or kind: %s", KindSite, KindVM)
	}
	kind := ""
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			kind = n.Content[i+1].Value
		}
	}
	switch kind {
	case KindSite:
		d.Site = &Site{}
		if err := decode(n, reflect.ValueOf(d.Site).Elem(), kind); err != nil {
			return d, err
		}
	case KindVM:
		d.VM = &VM{Policy: switchback.DefaultPolicy()}
		if err := decode(n, reflect.ValueOf(d.VM).Elem(), kind); err != nil {
			return d, err
		}
		vm := d.VM
		if vm.Home == "" || vm.To == "" || vm.Home == vm.To {
			return d, at(n, "VM %s needs two sites, home and to", vm.Name)
		}
		if err := vm.Policy.Validate(); err != nil {
			e := switchback.Flatten(err)
			return d, at(n, "policy of VM %s: %s", vm.Name, e.Message).WithHint("%s", e.Hint)
		}
	case "":
		return d, at(n, "a document without kind").WithHint("kind: %s or kind: %s", KindSite, KindVM)
	default:
		return d, at(n, "unknown kind %q", kind).WithHint("%s or %s", KindSite, KindVM)
	}
	if d.Name() == "" {
		return d, at(n, "a %s without name", kind)
	}
	return d, nil
}

// What a change does.
const (
	Create = "create"
	Modify = "change"
)

// Change is what applying one document does.
type Change struct {
	Kind   string  `json:"kind"`
	Name   string  `json:"name"`
	Action string  `json:"action"`
	Fields []Field `json:"fields,omitempty"`
	// Document is what is wanted.
	Document Document `json:"-"`
}

// Field is one setting that differs; "" = it is not set.
type Field struct {
	Path string `json:"path"`
	From string `json:"from"`
	To   string `json:"to"`
}

// Diff says what has to be done for wanted to be so; nothing for what is so
// already. CodeRefused: something that a change cannot do.
func Diff(current, wanted []Document) ([]Change, error) {
	var changes []Change
	for _, w := range wanted {
		c := Change{Kind: w.Kind(), Name: w.Name(), Action: Create, Document: w}
		i := slices.IndexFunc(current, func(d Document) bool { return d.Kind() == w.Kind() && d.Name() == w.Name() })
		if i >= 0 {
			c.Action = Modify
			if c.Fields = differ(current[i].node(), w.node()); len(c.Fields) == 0 {
				continue
			}
			for _, f := range c.Fields {
				if f.Path == "home" || f.Path == "to" {
					return nil, switchback.Errorf(switchback.CodeRefused, "line %d: %s of VM %s is %s and cannot be changed to %s", w.Line, f.Path, w.Name(), f.From, f.To).
						WithHint("unprotect the VM, then apply again: it is protected anew, with a full copy")
				}
			}
		} else {
			c.Fields = differ(nil, w.node())
		}
		changes = append(changes, c)
	}
	slices.SortStableFunc(changes, func(x, y Change) int { return order(x.Kind) - order(y.Kind) })
	return changes, nil
}

// order: what others need comes first.
func order(kind string) int {
	if kind == KindSite {
		return 0
	}
	return 1
}

// differ compares two documents setting by setting.
func differ(from, to *yaml.Node) []Field {
	was, is := map[string]string{}, map[string]string{}
	var paths []string
	flatten(from, "", was, &paths)
	flatten(to, "", is, &paths)
	var fields []Field
	seen := map[string]bool{}
	for _, p := range paths {
		if !seen[p] && was[p] != is[p] {
			fields = append(fields, Field{Path: p, From: was[p], To: is[p]})
		}
		seen[p] = true
	}
	return fields
}

// flatten lists the settings of a document; a list is one setting.
func flatten(n *yaml.Node, prefix string, into map[string]string, paths *[]string) {
	if n == nil {
		return
	}
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			path := n.Content[i].Value
			if prefix != "" {
				path = prefix + "." + path
			}
			flatten(n.Content[i+1], path, into, paths)
		}
	case yaml.SequenceNode:
		var items []string
		for _, x := range n.Content {
			items = append(items, x.Value)
		}
		into[prefix] = strings.Join(items, ", ")
		*paths = append(*paths, prefix)
	default:
		into[prefix] = n.Value
		*paths = append(*paths, prefix)
	}
}

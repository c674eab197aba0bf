package lint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/switchback-dr/switchback"

// layer orders the packages: one may import its own layer and lower ones.
type layer int

const (
	domain    layer = iota // the words, and what is as plain as they are
	pure                   // policy and planning
	contract               // interfaces to platforms
	mechanism              // one technology each; they do not import each other
	engine                 // durable runs, replication cycles
	service                // agent, server, their API
	tool                   // lab, bench: may use everything but commands
	command                // imported by nobody
)

// layers gives each folder its layer; subfolders belong to their parent unless named.
var layers = map[string]layer{
	"": domain, "extent": domain,
	"retention": pure, "recovery": pure, "audit": pure, "replication": pure, "anomaly": pure, "fencing": pure,
	"hypervisor": contract,
	"seal":       mechanism, "objectstore": mechanism,
	"nbd": mechanism, "qemu": mechanism, "qcow2": mechanism, "journal": mechanism,
	"hypervisor/libvirt": mechanism, "hypervisor/simulated": mechanism, "store": mechanism, "transport": mechanism, "check": mechanism,
	"operation": engine, "replicator": engine, "export": engine,
	"api": service, "config": service, "agent": service, "agentapi": service, "server": service,
	"lab": tool, "bench": tool,
	"cmd": command,
}

// allowed are the imports that the order of layers forbids and that have a reason.
var allowed = map[[2]string]string{
	{"journal", "qcow2"}:                           "a view reads bases through the mapper",
	{"journal", "seal"}:                            "segments are sealed where they are stored",
	{"journal", "objectstore"}:                     "segments are read where they are",
	{"store", "operation"}:                         "the store implements the interface of its user",
	{"hypervisor/simulated", "hypervisor/libvirt"}: "its definitions are libvirt's",
	{"hypervisor/simulated", "nbd"}:                "its guests write to their disks through it",
}

// pureFolders may not touch the outside world.
var pureFolders = []string{"", "extent", "retention", "recovery", "replication", "anomaly", "audit", "fencing"}

// impureImports are packages that pure folders do not import, with everything below them.
var impureImports = []string{"os", "net", "sync", "log", "syscall", "math/rand", "crypto/rand"}

// clockCalls are functions of package time that read or wait for the clock.
var clockCalls = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}

// banned are names that say nothing.
var banned = []string{"util", "utils", "common", "helper", "helpers", "types", "model", "models", "base", "misc"}

// pkg is what go list says of a package of this module.
type pkg struct {
	ImportPath, Name, Dir, Doc string
	GoFiles, Imports           []string
}

// folder is the path within the module; "" for the root package.
func (p pkg) folder() string { return folderOf(p.ImportPath) }

func folderOf(importPath string) string {
	return strings.TrimPrefix(strings.TrimPrefix(importPath, module), "/")
}

// inside returns the folders of this module that p imports.
func (p pkg) inside() []string {
	var in []string
	for _, i := range p.Imports {
		if i == module || strings.HasPrefix(i, module+"/") {
			in = append(in, folderOf(i))
		}
	}
	return in
}

// testSupport reports whether the folder holds a conformance suite.
func testSupport(folder string) bool {
	name := path.Base(folder)
	return strings.HasSuffix(name, "test") || name == "conformance"
}

// owner returns the named folder that folder belongs to, and its layer.
func owner(folder string) (string, layer, bool) {
	for f := folder; ; f = path.Dir(f) {
		if f == "." {
			return "", 0, false
		}
		if l, ok := layers[f]; ok {
			return f, l, true
		}
		if f == "" {
			return "", 0, false
		}
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var listed = sync.OnceValues(func() ([]pkg, error) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Dir,Doc,GoFiles,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return nil, err
	}
	var list []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
})

func packages(t *testing.T) []pkg {
	t.Helper()
	list, err := listed()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(list, func(p pkg) bool { return p.folder() == "" }) {
		t.Fatal("go list does not know the root package")
	}
	return list
}

// direction returns why from may not import to; "" when it may.
func direction(from, to string) string {
	if testSupport(from) {
		return ""
	}
	fromOwner, fromLayer, known := owner(from)
	toOwner, toLayer, toKnown := owner(to)
	switch {
	case testSupport(to):
		return "a conformance suite is for tests"
	case slices.Contains(strings.Split(from, "/"), "witness"):
		if !slices.Contains(strings.Split(to, "/"), "witness") {
			return "a witness shares no code with what it judges"
		}
	case toKnown && toLayer == command && toOwner != fromOwner:
		return "a command is imported by nobody"
	case !known || !toKnown || fromOwner == toOwner || allowed[[2]string{fromOwner, toOwner}] != "":
	case toLayer > fromLayer:
		return "it is in a higher layer"
	case fromLayer == mechanism && toLayer == mechanism:
		return "mechanisms do not import each other: engines get them as interfaces"
	}
	return ""
}

func TestImportDirections(t *testing.T) {
	for _, p := range packages(t) {
		for _, to := range p.inside() {
			if why := direction(p.folder(), to); why != "" {
				t.Errorf("%s imports %s: %s", p.ImportPath, module+"/"+to, why)
			}
		}
	}
}

// TestDirection shows that the rule can say no.
func TestDirection(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"operation", "", true},
		{"", "extent", true},
		{"extent", "journal", false},
		{"", "nbd", false},
		{"retention", "extent", true},
		{"retention", "store", false},
		{"journal", "qcow2", true},
		{"qcow2", "journal", false},
		{"journal", "nbd", false},
		{"journal/view", "journal", true},
		{"journal/view", "transport", false},
		{"hypervisor/libvirt", "hypervisor", true},
		{"hypervisor", "hypervisor/libvirt", false},
		{"hypervisor/libvirt/rpc", "nbd", false},
		{"store", "operation", true},
		{"transport", "operation", false},
		{"replicator", "journal", true},
		{"store/storetest", "store", true},
		{"server", "store/storetest", false},
		{"agent", "server", true},
		{"operation", "agent", false},
		{"cmd/switchback", "agent", true},
		{"cmd/switchback", "cmd/switchback/table", true},
		{"agent", "cmd/switchback", false},
		{"newcomer", "cmd/switchback", false},
		{"lab/witness", "lab", false},
		{"lab/witness", "", false},
		{"witness", "witness/disk", true},
		{"lab", "lab/witness", true},
	} {
		if why := direction(c.from, c.to); (why == "") != c.ok {
			t.Errorf("%q importing %q: %q", c.from, c.to, why)
		}
	}
}

// parse returns the files of a package, comments included.
func parse(t *testing.T, p pkg) (*token.FileSet, []*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return fset, files
}

func TestPurePackages(t *testing.T) {
	for _, p := range packages(t) {
		if !slices.Contains(pureFolders, p.folder()) {
			continue
		}
		for _, i := range p.Imports {
			for _, bad := range impureImports {
				if i == bad || strings.HasPrefix(i, bad+"/") {
					t.Errorf("%s is pure, but imports %s", p.ImportPath, i)
				}
			}
		}
		fset, files := parse(t, p)
		for _, f := range files {
			for _, n := range clockUses(f) {
				t.Errorf("%s: a pure package does not use the clock: time is an argument", fset.Position(n.Pos()))
			}
		}
	}
}

// clockUses returns where a file uses a clock function of package time, under
// whatever name it is imported, called or passed on.
func clockUses(f *ast.File) (uses []ast.Node) {
	name := ""
	for _, i := range f.Imports {
		if i.Path.Value == `"time"` {
			if name = "time"; i.Name != nil {
				name = i.Name.Name
			}
		}
	}
	if name == "" {
		return nil
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && slices.Contains(clockCalls, sel.Sel.Name) {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == name {
				uses = append(uses, n)
			}
		}
		return true
	})
	return uses
}

func TestClockUses(t *testing.T) {
	for source, want := range map[string]int{
		`import "time"; var a = time.Now()`:                   1,
		`import clock "time"; var a = clock.Since`:            1,
		`import "time"; var a = time.Second; func Now() {}`:   0,
		`import "my/time2"; var a = time.Now()`:               0,
		`import "time"; var a, b = time.Tick, time.Until(zz)`: 2,
	} {
		f, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x; "+source, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(clockUses(f)); got != want {
			t.Errorf("%s: %d uses, want %d", source, got, want)
		}
	}
}

func TestNamesAndPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		for _, part := range strings.Split(p.folder(), "/") {
			if slices.Contains(banned, part) || slices.Contains(banned, p.Name) {
				t.Errorf("%s: the name says nothing; a folder is a noun of the domain or a technology", p.ImportPath)
				break
			}
		}
		if p.Doc == "" && len(p.GoFiles) > 0 {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func TestExportedIsDocumented(t *testing.T) {
	for _, p := range packages(t) {
		if p.Name == "main" {
			continue
		}
		fset, files := parse(t, p)
		for _, f := range files {
			for _, id := range undocumented(f) {
				t.Errorf("%s: %s has no doc comment", fset.Position(id.Pos()), id.Name)
			}
		}
	}
}

// selfEvident are methods whose meaning is that of a standard interface.
var selfEvident = []string{"Error", "Unwrap", "String", "Is", "As", "Close", "Len", "Less", "Swap",
	"MarshalJSON", "UnmarshalJSON", "MarshalText", "UnmarshalText", "Read", "Write", "ReadAt", "WriteAt"}

// undocumented returns the exported types, functions, methods and variables
// without a comment. Constants mostly are documented by their type, their group
// or the package comment's table, so they are left to the reader's judgement.
func undocumented(f *ast.File) (missing []*ast.Ident) {
	if ast.IsGenerated(f) {
		return nil
	}
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if !d.Name.IsExported() || d.Doc != nil || d.Recv != nil && (!exportedReceiver(d.Recv) || slices.Contains(selfEvident, d.Name.Name)) {
				continue
			}
			missing = append(missing, d.Name)
		case *ast.GenDecl:
			if d.Doc != nil {
				continue
			}
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() && s.Doc == nil {
						missing = append(missing, s.Name)
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if d.Tok == token.VAR && n.IsExported() && s.Doc == nil && s.Comment == nil {
							missing = append(missing, n)
						}
					}
				}
			}
		}
	}
	return missing
}

func exportedReceiver(recv *ast.FieldList) bool {
	exported := false
	ast.Inspect(recv.List[0].Type, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		exported = exported || ok && id.IsExported()
		return !ok
	})
	return exported
}

func TestUndocumented(t *testing.T) {
	for source, want := range map[string]int{
		"func F() {}":                           1,
		"// F is.\nfunc F() {}":                 0,
		"func f() {}":                           0,
		"type T struct{}":                       1,
		"// T is.\ntype T int\nfunc (T) M() {}": 1,
		"// T is.\ntype T int\nfunc (T) String() string { return \"\" }": 0,
		"type t int\nfunc (t) M() {}":                                    0,
		"// These are.\nvar (\n\tA = 1\n\tB = 2\n)":                      0,
		"var (\n\tA = 1 // one\n\tB = 2\n)":                              1,
		"const A = 1":                                                    0,
	} {
		f, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\n\n"+source, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(undocumented(f)); got != want {
			t.Errorf("%s: %d, want %d", source, got, want)
		}
	}
}

// TestDependenciesAreExplained: docs/dependencies.md names each direct dependency.
func TestDependenciesAreExplained(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root(t), "docs", "dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range mod.Require {
		if !r.Indirect && !bytes.Contains(text, []byte(r.Path)) {
			t.Errorf("docs/dependencies.md does not say why %s", r.Path)
		}
	}
}

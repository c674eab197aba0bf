package journal

import (
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
)

// TestDefinition: what was set is read with the replica open or not; the same is
// not written again, a damaged one is noticed and replaced.
func TestDefinition(t *testing.T) {
	w := newWorld(t, 1)
	if _, err := ReadDefinition(w.dir); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Fatal(err)
	}
	first := Definition{Text: "<domain/>", Networks: []string{"lan"}, Time: time.Unix(1000, 0).UTC()}
	set := func(d Definition) {
		t.Helper()
		if err := w.r.SetDefinition(d); err != nil {
			t.Fatal(err)
		}
	}
	read := func(want Definition) {
		t.Helper()
		got, err := ReadDefinition(w.dir)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	set(first)
	read(first)
	ops := w.fs.ops
	again := first
	again.Time = again.Time.Add(time.Hour)
	set(again)
	if read(first); w.fs.ops != ops {
		t.Error("the same definition was written again")
	}
	again.Networks = []string{"lan", "dmz"}
	set(again)
	read(again)
	if err := os.WriteFile(definitionPath(w.dir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadDefinition(w.dir); switchback.CodeOf(err) != switchback.CodeCorrupt {
		t.Error(err)
	}
	set(first)
	read(first)
	if err := w.r.SetDefinition(Definition{}); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Error(err)
	}
}

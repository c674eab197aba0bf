package main

import (
	"path/filepath"
	"testing"
)

// TestJournalMeasures: the measures run and give samples; figures of small sizes
// mean nothing, but for those that do not depend on time.
func TestJournalMeasures(t *testing.T) {
	sizes := journalSizesOf(true)
	space, fold, merge, err := journalWork(t.Context(), t.TempDir(), sizes, 2)
	if err != nil {
		t.Fatal(err)
	}
	memory, err := viewMemory(t.Context(), filepath.Join(t.TempDir(), "m"), sizes, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []entry{space, fold, merge, memory} {
		if err := e.check(2); err != nil {
			t.Error(err)
		}
		t.Logf("%+v", e)
	}
	for _, e := range []entry{space, memory} {
		if !e.Met {
			t.Errorf("%s is %.3f, the goal %.2f", e.Name, e.Ratio, e.Goal)
		}
	}
}

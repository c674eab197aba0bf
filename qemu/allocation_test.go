package qemu

import (
	"path/filepath"
	"testing"

	"github.com/switchback-dr/switchback/extent"
)

// TestAllocated: writes and discards in an overlay count, what is below does
// not; whether the overlay stands on its backing image or alone.
func TestAllocated(t *testing.T) {
	dir := t.TempDir()
	base := create(t, filepath.Join(dir, "base"), CreateOptions{Format: "qcow2", SizeBytes: 4 << 20})
	qemuIO(t, "qcow2", base, "write -P 1 0 4M")
	top := create(t, filepath.Join(dir, "top"), CreateOptions{Format: "qcow2", Backing: base, BackingFormat: "qcow2"})
	qemuIO(t, "qcow2", top, "write -P 2 64k 64k", "write -z 1M 128k", "write -P 3 3M 4k")
	want := extent.NewSet(extent.Range{Offset: 64 << 10, Length: 64 << 10}, extent.Range{Offset: 1 << 20, Length: 128 << 10}, extent.Range{Offset: 3 << 20, Length: 64 << 10})
	for range 2 {
		got, err := Allocated(t.Context(), top)
		must(t, err)
		if !got.Equal(want) {
			t.Errorf("allocated %v, want %v", got.Ranges(), want.Ranges())
		}
		must(t, Rebase(t.Context(), top, "", ""))
	}
}

package replicator

import (
	"bytes"
	"testing"

	"github.com/switchback-dr/switchback/extent"
)

func TestNarrow(t *testing.T) {
	const kib = 1 << 10
	set := func(ranges ...extent.Range) extent.Set { return extent.NewSet(ranges...) }
	for _, tt := range []struct {
		name                 string
		bitmap, record, want extent.Set
	}{
		{"nothing", set(), set(), set()},
		{"one block of a unit", set(extent.Range{Offset: 64 * kib, Length: 64 * kib}), set(extent.Range{Offset: 68 * kib, Length: 4 * kib}),
			set(extent.Range{Offset: 68 * kib, Length: 4 * kib})},
		{"written after the instant", set(extent.Range{Offset: 0, Length: 64 * kib}),
			set(extent.Range{Offset: 4 * kib, Length: 4 * kib}, extent.Range{Offset: 192 * kib, Length: 8 * kib}), set(extent.Range{Offset: 4 * kib, Length: 4 * kib})},
		{"a unit without a record", set(extent.Range{Offset: 0, Length: 128 * kib}), set(extent.Range{Offset: 0, Length: 4 * kib}),
			set(extent.Range{Offset: 0, Length: 128 * kib})},
		{"a finer bitmap", set(extent.Range{Offset: 16 * kib, Length: 16 * kib}), set(extent.Range{Offset: 20 * kib, Length: 4 * kib}),
			set(extent.Range{Offset: 20 * kib, Length: 4 * kib})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := narrow(tt.bitmap, tt.record); !got.Equal(tt.want) {
				t.Errorf("got %v, want %v", got.Ranges(), tt.want.Ranges())
			}
		})
	}
}

// TestRecordOfWrites: what is read follows the record, across a failed cycle
// and a restart of the agent; after a restart of the guest the bitmap has to do.
func TestRecordOfWrites(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 512<<10))
	p.cycle(ModeSeed)
	want := func(what string, read int64) {
		t.Helper()
		if r := p.cycle(ModeIncremental); r.ReadBytes != read {
			t.Errorf("%s: %d bytes were read, want %d", what, r.ReadBytes, read)
		}
	}
	p.vm.write("vda", 0, []byte{2})
	p.vm.write("vda", 300<<10, []byte{2})
	want("two blocks", 2*BlockSize)

	p.vm.write("vda", 100<<10, []byte{3})
	p.target.fail = func(call string) when {
		if call == "point" {
			return before
		}
		return never
	}
	if _, err := p.e.Cycle(t.Context(), CycleOptions{}); err == nil {
		t.Fatal("a cycle whose target fails has succeeded")
	}
	p.target.fail = func(string) when { return never }
	p.vm.write("vdb", 0, []byte{3})
	p.restart()
	want("both cycles", 2*BlockSize)

	p.vm.write("vda", 0, []byte{4})
	p.vm.records = nil
	want("without a record", bitmapGrain)
}

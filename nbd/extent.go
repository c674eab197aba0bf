package nbd

// Names of metadata contexts.
const (
	// ContextAllocation describes holes and zeros.
	ContextAllocation = "base:allocation"
	// ContextDirtyPrefix followed by a bitmap's (export's) name describes which
	// ranges QEMU's dirty bitmap has marked. See QEMU's docs/interop/nbd.txt.
	ContextDirtyPrefix = "qemu:dirty-bitmap:"
)

// Flags of an Extent. Their meaning depends on the metadata context.
const (
	StateHole  uint32 = 1 << 0 // base:allocation: not allocated
	StateZero  uint32 = 1 << 1 // base:allocation: reads as zeros
	StateDirty uint32 = 1 << 0 // qemu:dirty-bitmap: written since the bitmap was made
)

// Extent is a range of an export with the state that one metadata context
// gives it. Offset and Length are bytes.
type Extent struct {
	Offset, Length int64
	Flags          uint32
}

// End is the first byte behind e.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Hole reports that e has no storage; only for base:allocation.
func (e Extent) Hole() bool { return e.Flags&StateHole != 0 }

// Zero reports that e reads as zeros; only for base:allocation.
func (e Extent) Zero() bool { return e.Flags&StateZero != 0 }

// Dirty reports that e was written; only for qemu:dirty-bitmap.
func (e Extent) Dirty() bool { return e.Flags&StateDirty != 0 }

// appendExtent adds e to list, growing the last extent if e continues it.
func appendExtent(list []Extent, e Extent) []Extent {
	if n := len(list); n > 0 && list[n-1].Flags == e.Flags && list[n-1].End() == e.Offset {
		list[n-1].Length += e.Length
		return list
	}
	return append(list, e)
}

// cover makes list, which is ordered, describe exactly [off, off+length): it
// clips what stands over, fills gaps with plain data and merges neighbours.
func cover(list []Extent, off, length int64) []Extent {
	end := off + length
	var out []Extent
	for _, e := range list {
		if e.Offset >= end {
			break
		}
		if e.Length <= 0 || e.Length <= off-e.Offset {
			continue
		}
		if e.Offset > off {
			out = appendExtent(out, Extent{Offset: off, Length: e.Offset - off})
			off = e.Offset
		}
		n := min(e.Length-(off-e.Offset), end-off)
		out = appendExtent(out, Extent{Offset: off, Length: n, Flags: e.Flags})
		off += n
	}
	if off < end {
		out = appendExtent(out, Extent{Offset: off, Length: end - off})
	}
	return out
}

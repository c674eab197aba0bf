package nbd

const (
	// maxStatusExtents bounds one reply; the client asks on from there.
	maxStatusExtents = 64 << 10
	// firstWindow is how much the backend is asked about at first. A client
	// that wants one extent, as QEMU always does, would else pay for a list of
	// everything behind it.
	firstWindow = 4 << 20
	windowGrow  = 8
)

// blockStatus answers with the extents of the range, or with as many from its
// start as are reasonable, which the protocol allows.
func (s *session) blockStatus(r request) error {
	off, end := int64(r.offset), int64(r.offset)+int64(r.length)
	one := r.flags&cmdFlagReqOne != 0
	var list []Extent
	for window := int64(firstWindow); off < end; window *= windowGrow {
		n := min(window, end-off)
		part, err := s.backend.Extents(off, n)
		if err != nil {
			s.log.Error("extents for nbd client", "offset", off, "length", n, "err", err)
			return s.fail(r, errnoIO, "cannot tell the state of the range")
		}
		for _, e := range cover(part, off, n) {
			list = appendExtent(list, e)
		}
		off += n
		if one && len(list) > 1 || len(list) >= maxStatusExtents {
			break
		}
	}
	if one {
		list = list[:1]
	}
	list = list[:min(len(list), maxStatusExtents)]
	b := make([]byte, chunkSize, chunkSize+4+8*len(list))
	putChunkHeader(b, chunkHeader{chunkDone, chunkBlockStatus, r.handle, uint32(4 + 8*len(list))})
	b = be.AppendUint32(b, allocationID)
	for _, e := range list {
		b = be.AppendUint32(b, uint32(e.Length))
		b = be.AppendUint32(b, e.Flags&(StateHole|StateZero))
	}
	return s.write(b)
}

package nbd

import (
	"encoding/binary"
	"io"
)

var be = binary.BigEndian

type request struct {
	flags, command uint16
	handle, offset uint64
	length         uint32
}

func appendRequest(b []byte, r request) []byte {
	b = be.AppendUint32(b, magicRequest)
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, r.command)
	b = be.AppendUint64(b, r.handle)
	b = be.AppendUint64(b, r.offset)
	return be.AppendUint32(b, r.length)
}

// parseRequest decodes the requestSize bytes of a request.
func parseRequest(b []byte) (request, error) {
	if len(b) < requestSize {
		return request{}, protocolError("request is cut short")
	}
	if m := be.Uint32(b); m != magicRequest {
		return request{}, protocolErrorf("request starts with %#x", m)
	}
	return request{
		flags:   be.Uint16(b[4:]),
		command: be.Uint16(b[6:]),
		handle:  be.Uint64(b[8:]),
		offset:  be.Uint64(b[16:]),
		length:  be.Uint32(b[24:]),
	}, nil
}

type chunkHeader struct {
	flags, kind uint16
	handle      uint64
	length      uint32
}

func putChunkHeader(b []byte, h chunkHeader) {
	be.PutUint32(b, magicStructured)
	be.PutUint16(b[4:], h.flags)
	be.PutUint16(b[6:], h.kind)
	be.PutUint64(b[8:], h.handle)
	be.PutUint32(b[16:], h.length)
}

// parseChunkHeader decodes the chunkSize bytes before a chunk's payload and
// bounds the payload by the chunk's type.
func parseChunkHeader(b []byte) (chunkHeader, error) {
	if len(b) < chunkSize {
		return chunkHeader{}, protocolError("structured reply is cut short")
	}
	h := chunkHeader{
		flags:  be.Uint16(b[4:]),
		kind:   be.Uint16(b[6:]),
		handle: be.Uint64(b[8:]),
		length: be.Uint32(b[16:]),
	}
	ok := false
	switch h.kind {
	case chunkNone:
		ok = h.length == 0 && h.flags&chunkDone != 0
	case chunkOffsetData:
		ok = h.length > 8 && h.length <= 8+maxPayload
	case chunkOffsetHole:
		ok = h.length == 12
	case chunkBlockStatus:
		ok = h.length >= 12 && h.length <= maxStatusPayload && h.length%8 == 4
	default:
		ok = h.kind&chunkErrBit != 0 && h.length >= 6 && h.length <= maxErrorPayload
	}
	if !ok {
		return chunkHeader{}, protocolErrorf("chunk of type %#x with flags %#x and length %d", h.kind, h.flags, h.length)
	}
	return h, nil
}

// parseErrorChunk decodes the payload of any error chunk.
func parseErrorChunk(b []byte) (*ServerError, error) {
	if len(b) < 6 || int(be.Uint16(b[4:])) > len(b)-6 {
		return nil, protocolError("error chunk is cut short")
	}
	code := be.Uint32(b)
	if code == 0 {
		return nil, protocolError("error chunk without an error")
	}
	return &ServerError{Errno: errnoOf(code), Message: string(b[6 : 6+be.Uint16(b[4:])])}, nil
}

// appendStatus decodes the payload of a block status chunk about [off, end),
// adding its extents to list. What stands over end, which the last extent may,
// is cut.
func appendStatus(list []Extent, b []byte, off, end int64) (_ []Extent, context uint32, err error) {
	if len(b) < 12 || len(b)%8 != 4 {
		return list, 0, protocolErrorf("block status of %d bytes", len(b))
	}
	context = be.Uint32(b)
	for b = b[4:]; len(b) > 0 && off < end; b = b[8:] {
		n := int64(be.Uint32(b))
		if n == 0 {
			return list, 0, protocolError("block status with an empty extent")
		}
		n = min(n, end-off)
		list = appendExtent(list, Extent{Offset: off, Length: n, Flags: be.Uint32(b[4:])})
		off += n
	}
	return list, context, nil
}

type optionHeader struct{ option, length uint32 }

func appendOption(b []byte, option uint32, data []byte) []byte {
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint32(b, option)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func parseOptionHeader(b []byte) (optionHeader, error) {
	if len(b) < optHeaderSize || be.Uint64(b) != magicOption {
		return optionHeader{}, protocolError("bad option header")
	}
	return optionHeader{option: be.Uint32(b[8:]), length: be.Uint32(b[12:])}, nil
}

type optionReply struct {
	option, kind uint32
	data         []byte
}

func appendOptionReply(b []byte, r optionReply) []byte {
	b = be.AppendUint64(b, magicReply)
	b = be.AppendUint32(b, r.option)
	b = be.AppendUint32(b, r.kind)
	b = be.AppendUint32(b, uint32(len(r.data)))
	return append(b, r.data...)
}

func readOptionReply(r io.Reader) (optionReply, error) {
	var h [repHeaderSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return optionReply{}, err
	}
	if be.Uint64(h[:]) != magicReply {
		return optionReply{}, protocolErrorf("option reply starts with %#x", be.Uint64(h[:]))
	}
	n := be.Uint32(h[16:])
	if n > maxOptionData {
		return optionReply{}, protocolErrorf("option reply of %d bytes", n)
	}
	rep := optionReply{option: be.Uint32(h[8:]), kind: be.Uint32(h[12:]), data: make([]byte, n)}
	_, err := io.ReadFull(r, rep.data)
	return rep, err
}

func appendString(b []byte, s string) []byte {
	b = be.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// cutString takes a string with its length in front off b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := be.Uint32(b)
	if n > maxName || uint64(n) > uint64(len(b)-4) {
		return "", nil, false
	}
	return string(b[4 : 4+n]), b[4+n:], true
}

// parseGo decodes the data of NBD_OPT_INFO and NBD_OPT_GO.
func parseGo(b []byte) (export string, infos []uint16, ok bool) {
	export, b, ok = cutString(b)
	if !ok || len(b) < 2 || len(b)-2 != 2*int(be.Uint16(b)) {
		return "", nil, false
	}
	for b = b[2:]; len(b) > 0; b = b[2:] {
		infos = append(infos, be.Uint16(b))
	}
	return export, infos, true
}

func appendMetaQuery(b []byte, export string, contexts []string) []byte {
	b = appendString(b, export)
	b = be.AppendUint32(b, uint32(len(contexts)))
	for _, c := range contexts {
		b = appendString(b, c)
	}
	return b
}

// parseMetaQuery decodes the data of NBD_OPT_LIST_META_CONTEXT and
// NBD_OPT_SET_META_CONTEXT.
func parseMetaQuery(b []byte) (export string, contexts []string, ok bool) {
	export, b, ok = cutString(b)
	if !ok || len(b) < 4 {
		return "", nil, false
	}
	n := be.Uint32(b)
	b = b[4:]
	if uint64(n)*4 > uint64(len(b)) {
		return "", nil, false
	}
	for range n {
		var c string
		if c, b, ok = cutString(b); !ok {
			return "", nil, false
		}
		contexts = append(contexts, c)
	}
	return export, contexts, len(b) == 0
}

package libvirt

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	programRemote    = 0x20008086
	programQEMU      = 0x20008087
	programKeepAlive = 0x6b656570
	programVersion   = 1
)

// Message types and states (virNetMessageType, virNetMessageStatus).
const (
	typeCall    = 0
	typeReply   = 1
	typeMessage = 2
	typeStream  = 3

	statusOK       = 0
	statusError    = 1
	statusContinue = 2
)

const (
	headerBytes = 28 // the length word included
	// maxMessage bounds what is read: VIR_NET_MESSAGE_MAX and the length word.
	maxMessage = 32<<20 + 4
)

// header is virNetMessageHeader.
type header struct {
	program, version uint32
	procedure        int32
	kind             uint32
	serial           uint32
	status           uint32
}

// frame returns the wire form of one message.
func frame(h header, payload []byte) []byte {
	b := make([]byte, 0, headerBytes+len(payload))
	b = binary.BigEndian.AppendUint32(b, uint32(headerBytes+len(payload)))
	b = binary.BigEndian.AppendUint32(b, h.program)
	b = binary.BigEndian.AppendUint32(b, h.version)
	b = binary.BigEndian.AppendUint32(b, uint32(h.procedure))
	b = binary.BigEndian.AppendUint32(b, h.kind)
	b = binary.BigEndian.AppendUint32(b, h.serial)
	b = binary.BigEndian.AppendUint32(b, h.status)
	return append(b, payload...)
}

// readFrame reads one message. Memory grows with the bytes that really come,
// not with the length that is announced.
func readFrame(r io.Reader) (header, []byte, error) {
	var word [headerBytes]byte
	if _, err := io.ReadFull(r, word[:]); err != nil {
		return header{}, nil, err
	}
	n := binary.BigEndian.Uint32(word[:])
	if n < headerBytes || n > maxMessage {
		return header{}, nil, fmt.Errorf("message length %d is out of range", n)
	}
	h := header{
		program:   binary.BigEndian.Uint32(word[4:]),
		version:   binary.BigEndian.Uint32(word[8:]),
		procedure: int32(binary.BigEndian.Uint32(word[12:])),
		kind:      binary.BigEndian.Uint32(word[16:]),
		serial:    binary.BigEndian.Uint32(word[20:]),
		status:    binary.BigEndian.Uint32(word[24:]),
	}
	payload, err := io.ReadAll(io.LimitReader(r, int64(n-headerBytes)))
	if err != nil {
		return header{}, nil, err
	}
	if len(payload) != int(n-headerBytes) {
		return header{}, nil, io.ErrUnexpectedEOF
	}
	return h, payload, nil
}

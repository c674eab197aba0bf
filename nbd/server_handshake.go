package nbd

import (
	"errors"
	"io"

	switchback "github.com/switchback-dr/switchback"
)

// maxOptions bounds how many options a client may send before it chooses.
const maxOptions = 1024

// allocationID is the id under which base:allocation is spoken of.
const allocationID = 1

// errRefused ends a connection whose client chose an export that there is not
// by the option that has no error reply.
var errRefused = errors.New("export refused")

// serverHandshake is the server's side of option haggling with one client.
type serverHandshake struct {
	server     *Server
	rw         io.ReadWriter
	noZeroes   bool
	structured bool
	export     string
	// contextFor is the export for which contextSet was negotiated: choosing
	// another export voids it.
	contextFor string
	contextSet bool
}

// run returns the backend that the client chose, or nil without an error if it
// left in peace.
func (h *serverHandshake) run() (Backend, error) {
	b := be.AppendUint64(nil, magicInit)
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := h.rw.Write(b); err != nil {
		return nil, err
	}
	var f [4]byte
	if _, err := io.ReadFull(h.rw, f[:]); err != nil {
		return nil, err
	}
	flags := be.Uint32(f[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return nil, protocolErrorf("unknown client flags %#x", flags)
	}
	h.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		var hb [optHeaderSize]byte
		if _, err := io.ReadFull(h.rw, hb[:]); err != nil {
			return nil, err
		}
		o, err := parseOptionHeader(hb[:])
		if err != nil {
			return nil, err
		}
		if o.length > maxOptionData {
			return nil, protocolErrorf("option %d of %d bytes", o.option, o.length)
		}
		data := make([]byte, o.length)
		if _, err := io.ReadFull(h.rw, data); err != nil {
			return nil, err
		}
		backend, done, err := h.option(o.option, data)
		if err != nil || done {
			return backend, err
		}
	}
	return nil, protocolError("too many options")
}

// option answers one; done says that haggling is over.
func (h *serverHandshake) option(option uint32, data []byte) (_ Backend, done bool, err error) {
	switch option {
	case optExportName:
		b, err := h.exportName(string(data))
		return b, true, err
	case optAbort:
		// The client may be gone without waiting for it.
		_ = h.reply(option, repAck, nil)
		return nil, true, nil
	case optList:
		return nil, false, h.listExports(data)
	case optInfo, optGo:
		b, err := h.choose(option, data)
		return b, b != nil && option == optGo, err
	case optStructuredReply:
		if len(data) > 0 {
			return nil, false, h.reply(option, repErrInvalid, nil)
		}
		h.structured = true
		return nil, false, h.reply(option, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return nil, false, h.metaContext(option, data)
	default:
		return nil, false, h.reply(option, repErrUnsup, nil)
	}
}

func (h *serverHandshake) reply(option, kind uint32, data []byte) error {
	_, err := h.rw.Write(appendOptionReply(nil, optionReply{option, kind, data}))
	return err
}

func (h *serverHandshake) refuse(option uint32, err error) error {
	kind := uint32(repErrUnknown)
	if switchback.CodeOf(err) == switchback.CodeRefused {
		kind = repErrPolicy
	}
	msg := err.Error()
	return h.reply(option, kind, []byte(msg[:min(len(msg), maxName)]))
}

func (h *serverHandshake) flags() Flags {
	f := FlagHasFlags | FlagReadOnly | FlagCanMultiConn
	if h.structured {
		f |= FlagSendDF
	}
	return f
}

func (h *serverHandshake) exportName(name string) (Backend, error) {
	if len(name) > maxName {
		return nil, errRefused
	}
	backend, err := h.server.lookup(name)
	if err != nil {
		return nil, errors.Join(errRefused, err)
	}
	h.selected(name)
	b := be.AppendUint64(nil, uint64(backend.Size()))
	b = be.AppendUint16(b, uint16(h.flags()))
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err = h.rw.Write(b)
	return backend, err
}

func (h *serverHandshake) selected(name string) {
	h.export = name
	h.contextSet = h.contextSet && h.contextFor == name
}

func (h *serverHandshake) listExports(data []byte) error {
	if len(data) > 0 {
		return h.reply(optList, repErrInvalid, nil)
	}
	if h.server.list == nil {
		return h.reply(optList, repErrPolicy, nil)
	}
	for _, name := range h.server.list() {
		if len(name) > maxName {
			continue
		}
		if err := h.reply(optList, repServer, appendString(nil, name)); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

// choose answers NBD_OPT_INFO and NBD_OPT_GO; the backend is nil if the export
// was refused.
func (h *serverHandshake) choose(option uint32, data []byte) (Backend, error) {
	name, infos, ok := parseGo(data)
	if !ok {
		return nil, h.reply(option, repErrInvalid, nil)
	}
	backend, err := h.server.lookup(name)
	if err != nil {
		return nil, h.refuse(option, err)
	}
	b := be.AppendUint16(nil, infoExport)
	b = be.AppendUint64(b, uint64(backend.Size()))
	b = be.AppendUint16(b, uint16(h.flags()))
	if err := h.reply(option, repInfo, b); err != nil {
		return nil, err
	}
	for _, info := range infos {
		if info != infoBlockSize {
			continue
		}
		b := be.AppendUint16(nil, infoBlockSize)
		b = be.AppendUint32(b, 1)
		b = be.AppendUint32(b, 64<<10)
		b = be.AppendUint32(b, maxPayload)
		if err := h.reply(option, repInfo, b); err != nil {
			return nil, err
		}
		break
	}
	if option == optGo {
		h.selected(name)
	}
	return backend, h.reply(option, repAck, nil)
}

func (h *serverHandshake) metaContext(option uint32, data []byte) error {
	export, queries, ok := parseMetaQuery(data)
	if !ok || !h.structured {
		return h.reply(option, repErrInvalid, nil)
	}
	if option == optSetMetaContext {
		h.contextSet = false // a failed option leaves none selected
	}
	if _, err := h.server.lookup(export); err != nil {
		return h.refuse(option, err)
	}
	match := option == optListMetaContext && len(queries) == 0
	for _, q := range queries {
		// "base:" asks for all of a namespace; only LIST may.
		match = match || q == ContextAllocation || option == optListMetaContext && q == "base:"
	}
	if match {
		id := uint32(0)
		if option == optSetMetaContext {
			id = allocationID
			h.contextSet, h.contextFor = true, export
		}
		b := append(be.AppendUint32(nil, id), ContextAllocation...)
		if err := h.reply(option, repMetaContext, b); err != nil {
			return err
		}
	}
	return h.reply(option, repAck, nil)
}

package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	switchback "github.com/switchback-dr/switchback"
)

// List asks a server for the names of its exports.
func List(ctx context.Context, network, addr string) ([]string, error) {
	conn, err := dialConn(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var names []string
	err = boundHandshake(ctx, conn, func() error {
		h := negotiation{conn}
		if err := h.greet(); err != nil {
			return err
		}
		err := h.option(optList, nil, func(r optionReply) error {
			if r.kind != repServer {
				return nil
			}
			name, _, ok := cutString(r.data)
			if !ok || len(names) == maxExportsListed {
				return protocolError("bad list of exports")
			}
			names = append(names, name)
			return nil
		})
		if err != nil {
			return err
		}
		_, err = h.rw.Write(appendOption(nil, optAbort, nil))
		return err
	})
	if err != nil {
		return nil, &switchback.Error{Code: contextCode(ctx, switchback.CodeUnavailable), Op: "nbd.List",
			Message: "list exports", Err: err}
	}
	return names, nil
}

const (
	maxExportsListed = 1 << 16
	// maxReplies bounds the replies that one option may be answered with.
	maxReplies = maxExportsListed + 16
)

// negotiation is the client's side of option haggling.
type negotiation struct{ rw io.ReadWriter }

// optionError is the server's refusal of an option.
type optionError struct {
	option, kind uint32
	message      string
}

func (e *optionError) Error() string {
	s := fmt.Sprintf("server refused option %d with %#x", e.option, e.kind)
	if e.message != "" {
		s += ": " + e.message
	}
	return s
}

func (n negotiation) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(n.rw, b[:]); err != nil {
		return err
	}
	if be.Uint64(b[:]) != magicInit || be.Uint64(b[8:]) != magicOption {
		return protocolError("the peer is not a newstyle nbd server")
	}
	flags := uint32(be.Uint16(b[16:]))
	if flags&flagFixedNewstyle == 0 {
		return protocolError("the server does not speak fixed newstyle")
	}
	_, err := n.rw.Write(be.AppendUint32(nil, flags&(flagFixedNewstyle|flagNoZeroes)))
	return err
}

// option sends one and calls each with every reply before the final one.
func (n negotiation) option(option uint32, data []byte, each func(optionReply) error) error {
	if _, err := n.rw.Write(appendOption(nil, option, data)); err != nil {
		return err
	}
	for range maxReplies {
		r, err := readOptionReply(n.rw)
		switch {
		case err != nil:
			return err
		case r.option != option:
			return protocolErrorf("reply to option %d while %d was asked", r.option, option)
		case r.kind == repAck:
			return nil
		case r.kind&repErrBit != 0:
			return &optionError{option, r.kind, string(r.data[:min(len(r.data), maxName)])}
		}
		if err := each(r); err != nil {
			return err
		}
	}
	return protocolErrorf("endless replies to option %d", option)
}

func ignoreReply(optionReply) error { return nil }

// handshake agrees with the server on structured replies, metadata contexts
// and the export. Block sizes are not asked for on purpose: a server must then
// take requests of any alignment.
func (c *Client) handshake(o Options) error {
	if len(o.Export) > maxName {
		return switchback.Errorf(switchback.CodeInvalid, "export name of %d bytes is too long", len(o.Export))
	}
	n := negotiation{struct {
		io.Reader
		io.Writer
	}{c.br, c.conn}}
	if err := n.greet(); err != nil {
		return err
	}
	var refused *optionError
	err := n.option(optStructuredReply, nil, ignoreReply)
	c.structured = err == nil
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	if c.structured && len(o.MetaContexts) > 0 {
		if err := c.setMetaContexts(n, o); err != nil && !errors.As(err, &refused) {
			return err
		}
	}
	sized := false
	data := be.AppendUint16(appendString(nil, o.Export), 0)
	err = n.option(optGo, data, func(r optionReply) error {
		if r.kind != repInfo || len(r.data) < 2 {
			return nil
		}
		switch be.Uint16(r.data) {
		case infoExport:
			if len(r.data) != 12 || be.Uint64(r.data[2:]) > math.MaxInt64 {
				return protocolError("bad export info")
			}
			c.size, c.flags, sized = int64(be.Uint64(r.data[2:])), Flags(be.Uint16(r.data[10:])), true
		case infoBlockSize:
			if len(r.data) != 14 {
				return protocolError("bad block size info")
			}
			if m := int64(be.Uint32(r.data[10:])); m >= 4096 && m < c.maxRequest {
				c.maxRequest = m &^ 4095
			}
		}
		return nil
	})
	switch {
	case errors.As(err, &refused) && refused.kind == repErrUnknown:
		return &switchback.Error{Code: switchback.CodeNotFound, Op: "nbd.Dial",
			Message: fmt.Sprintf("the server has no export %q", o.Export), Err: err}
	case errors.As(err, &refused) && refused.kind == repErrPolicy:
		return &switchback.Error{Code: switchback.CodeRefused, Op: "nbd.Dial",
			Message: fmt.Sprintf("the server refuses export %q", o.Export), Err: err}
	case errors.As(err, &refused):
		return &switchback.Error{Code: switchback.CodeUnsupported, Op: "nbd.Dial",
			Message: fmt.Sprintf("the server does not open export %q", o.Export), Err: err}
	case err != nil:
		return err
	case !sized:
		return protocolError("no export info before the end of the handshake")
	}
	return nil
}

func (c *Client) setMetaContexts(n negotiation, o Options) error {
	c.contexts = make(map[string]uint32)
	data := appendMetaQuery(nil, o.Export, o.MetaContexts)
	return n.option(optSetMetaContext, data, func(r optionReply) error {
		if r.kind != repMetaContext {
			return nil
		}
		if len(r.data) < 4 || len(r.data) > 4+maxName || len(c.contexts) == 2*len(o.MetaContexts)+16 {
			return protocolError("bad metadata context reply")
		}
		c.contexts[string(r.data[4:])] = be.Uint32(r.data)
		return nil
	})
}

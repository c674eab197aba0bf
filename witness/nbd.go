package witness

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
)

// nbdConn is a small NBD client after the protocol's specification
// (github.com/NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle handshake,
// structured replies and base:allocation where the server has them; one request
// at a time.
type nbdConn struct {
	conn       net.Conn
	size       int64
	structured bool
	context    uint32 // id of base:allocation
	status     bool   // whether it was granted
	cookie     uint64
	stop       func() bool
}

const (
	optGo             = 7
	optStructured     = 8
	optSetMetaContext = 10
	optMagic          = 0x49484156454f5054
	optReplyMagic     = 0x3e889045565a9
	repAck            = 1
	repInfo           = 3
	repMetaContext    = 4
	repError          = 1 << 31

	requestMagic    = 0x25609513
	simpleMagic     = 0x67446698
	structuredMagic = 0x668e33ef
	cmdRead         = 0
	cmdDisconnect   = 2
	cmdBlockStatus  = 7
)

// dialNBD connects to an NBD URI (doc/uri.md of the same repository).
func dialNBD(ctx context.Context, uri string) (_ *nbdConn, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	network, addr := "tcp", u.Host
	switch u.Scheme {
	case "nbd":
		if u.Port() == "" {
			addr = net.JoinHostPort(u.Hostname(), "10809")
		}
	case "nbd+unix":
		network, addr = "unix", u.Query().Get("socket")
	default:
		return nil, fmt.Errorf("%s: only nbd and nbd+unix are known", uri)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c := &nbdConn{conn: conn, stop: context.AfterFunc(ctx, func() { conn.Close() })}
	if err := c.handshake(strings.TrimPrefix(u.Path, "/")); err != nil {
		c.close()
		return nil, fmt.Errorf("%s: %w", uri, errors.Join(err, ctx.Err()))
	}
	return c, nil
}

func (c *nbdConn) close() {
	c.stop()
	c.request(cmdDisconnect, 0, 0)
	c.conn.Close()
}

func (c *nbdConn) handshake(export string) error {
	var hello struct {
		Magic, Opt uint64
		Flags      uint16
	}
	if err := binary.Read(c.conn, binary.BigEndian, &hello); err != nil {
		return err
	}
	if hello.Magic != 0x4e42444d41474943 || hello.Opt != optMagic || hello.Flags&1 == 0 {
		return errors.New("not a newstyle NBD server")
	}
	flags := uint32(1) // fixed newstyle
	if hello.Flags&2 != 0 {
		flags |= 2 // no zeroes
	}
	if err := binary.Write(c.conn, binary.BigEndian, flags); err != nil {
		return err
	}
	typ, _, err := c.option(optStructured, nil)
	if err != nil {
		return err
	}
	c.structured = typ == repAck
	if c.structured {
		q := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
		q = append(q, export...)
		q = binary.BigEndian.AppendUint32(q, 1)
		q = binary.BigEndian.AppendUint32(q, uint32(len("base:allocation")))
		q = append(q, "base:allocation"...)
		typ, infos, err := c.option(optSetMetaContext, q)
		if err != nil {
			return err
		}
		for _, i := range infos {
			if i.typ == repMetaContext && len(i.data) >= 4 && typ == repAck {
				c.context, c.status = binary.BigEndian.Uint32(i.data), true
			}
		}
	}
	g := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	g = append(g, export...)
	g = binary.BigEndian.AppendUint16(g, 0)
	typ, infos, err := c.option(optGo, g)
	if err != nil {
		return err
	}
	if typ != repAck {
		return fmt.Errorf("the server refuses export %q (reply %#x)", export, typ)
	}
	for _, i := range infos {
		if i.typ == repInfo && len(i.data) >= 12 && binary.BigEndian.Uint16(i.data) == 0 {
			c.size = int64(binary.BigEndian.Uint64(i.data[2:]))
			return nil
		}
	}
	return errors.New("the server does not say how large the export is")
}

type optReply struct {
	typ  uint32
	data []byte
}

// option sends an option and reads replies up to the final one, whose type it
// returns: repAck, or an error type that the caller judges.
func (c *nbdConn) option(opt uint32, data []byte) (uint32, []optReply, error) {
	b := binary.BigEndian.AppendUint64(nil, optMagic)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := c.conn.Write(append(b, data...)); err != nil {
		return 0, nil, err
	}
	var infos []optReply
	for {
		var h struct {
			Magic          uint64
			Opt, Type, Len uint32
		}
		if err := binary.Read(c.conn, binary.BigEndian, &h); err != nil {
			return 0, nil, err
		}
		if h.Magic != optReplyMagic || h.Opt != opt || h.Len > 1<<20 {
			return 0, nil, errors.New("bad option reply")
		}
		data := make([]byte, h.Len)
		if _, err := io.ReadFull(c.conn, data); err != nil {
			return 0, nil, err
		}
		if h.Type == repAck || h.Type&repError != 0 {
			return h.Type, infos, nil
		}
		infos = append(infos, optReply{h.Type, data})
	}
}

func (c *nbdConn) request(cmd uint16, off int64, n int) error {
	c.cookie++
	b := binary.BigEndian.AppendUint32(nil, requestMagic)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, c.cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	_, err := c.conn.Write(b)
	return err
}

// read fills p from the offset.
func (c *nbdConn) read(p []byte, off int64) error {
	if err := c.request(cmdRead, off, len(p)); err != nil {
		return err
	}
	got := 0
	err := c.replies(func(typ uint16, n int) error {
		switch typ {
		case simpleReply:
			got = len(p)
			_, err := io.ReadFull(c.conn, p)
			return err
		case 1: // offset and data
			var at uint64
			if err := binary.Read(c.conn, binary.BigEndian, &at); err != nil {
				return err
			}
			from, n := int64(at)-off, n-8
			if from < 0 || n < 0 || from+int64(n) > int64(len(p)) {
				return errors.New("data outside of what was asked for")
			}
			got += n
			_, err := io.ReadFull(c.conn, p[from:from+int64(n)])
			return err
		case 2: // offset and hole
			var h struct {
				At  uint64
				Len uint32
			}
			if err := binary.Read(c.conn, binary.BigEndian, &h); err != nil {
				return err
			}
			from := int64(h.At) - off
			if from < 0 || from+int64(h.Len) > int64(len(p)) {
				return errors.New("hole outside of what was asked for")
			}
			got += int(h.Len)
			clear(p[from : from+int64(h.Len)])
			return nil
		}
		return fmt.Errorf("reply of type %d to a read", typ)
	})
	if err == nil && got != len(p) {
		err = fmt.Errorf("read of %d bytes at %d brought %d", len(p), off, got)
	}
	return err
}

// extent is a part of a disk; zero means that it reads as zeros.
type extent struct {
	off, n int64
	zero   bool
}

// blockStatus describes a part from the offset on, not more than n bytes of it.
func (c *nbdConn) blockStatus(off, n int64) ([]extent, error) {
	if !c.status {
		return []extent{{off, n, false}}, nil
	}
	if err := c.request(cmdBlockStatus, off, int(n)); err != nil {
		return nil, err
	}
	var es []extent
	err := c.replies(func(typ uint16, size int) error {
		if typ != 5 || size < 12 || size%8 != 4 || size > 64<<20 {
			return fmt.Errorf("reply of type %d and %d bytes to a block status", typ, size)
		}
		b := make([]byte, size)
		if _, err := io.ReadFull(c.conn, b); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(b) != c.context {
			return errors.New("status of another context")
		}
		at := off
		for b = b[4:]; len(b) > 0 && at < off+n; b = b[8:] {
			l := min(int64(binary.BigEndian.Uint32(b)), off+n-at)
			es = append(es, extent{at, l, binary.BigEndian.Uint32(b[4:])&2 != 0})
			at += l
		}
		return nil
	})
	if err == nil && len(es) == 0 {
		err = errors.New("empty block status")
	}
	return es, err
}

const simpleReply = 0xffff

// replies hands each chunk of the reply to one request to chunk, which reads
// exactly its n bytes.
func (c *nbdConn) replies(chunk func(typ uint16, n int) error) error {
	for {
		var magic uint32
		if err := binary.Read(c.conn, binary.BigEndian, &magic); err != nil {
			return err
		}
		if magic == simpleMagic {
			var h struct {
				Errno  uint32
				Cookie uint64
			}
			if err := binary.Read(c.conn, binary.BigEndian, &h); err != nil {
				return err
			}
			if h.Cookie != c.cookie {
				return errors.New("reply to another request")
			}
			if h.Errno != 0 {
				return fmt.Errorf("the server says error %d", h.Errno)
			}
			return chunk(simpleReply, 0)
		}
		var h struct {
			Flags, Type uint16
			Cookie      uint64
			Len         uint32
		}
		if err := binary.Read(c.conn, binary.BigEndian, &h); err != nil {
			return err
		}
		if magic != structuredMagic || h.Cookie != c.cookie {
			return errors.New("reply to another request")
		}
		switch {
		case h.Type&(1<<15) != 0:
			b := make([]byte, min(h.Len, 64<<10))
			if _, err := io.ReadFull(c.conn, b); err != nil {
				return err
			}
			text := ""
			if len(b) >= 6 {
				text = string(b[6:min(len(b), 6+int(binary.BigEndian.Uint16(b[4:])))])
				return fmt.Errorf("the server says error %d %s", binary.BigEndian.Uint32(b), text)
			}
			return errors.New("the server says error")
		case h.Type != 0:
			if err := chunk(h.Type, int(h.Len)); err != nil {
				return err
			}
		}
		if h.Flags&1 != 0 {
			return nil
		}
	}
}

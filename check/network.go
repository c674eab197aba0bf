package check

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dialer makes connections that leave through the runner's device: a copy in an
// isolated network has the address of its original, which must not be asked in its place.
func (r Runner) dialer() *net.Dialer {
	d := &net.Dialer{}
	if r.Device != "" {
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			var bound error
			if err := raw.Control(func(fd uintptr) { bound = unix.BindToDevice(int(fd), r.Device) }); err != nil {
				return err
			}
			if bound != nil {
				return fmt.Errorf("use network device %s: %w", r.Device, bound)
			}
			return nil
		}
	}
	return d
}

func (r Runner) tcp(ctx context.Context, target string) (string, error) {
	began := time.Now()
	c, err := r.dialer().DialContext(ctx, "tcp", target)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("connected in %v", time.Since(began).Round(time.Millisecond)), c.Close()
}

func (r Runner) http(ctx context.Context, target string) (string, error) {
	// The copy's certificate names the original, and the way there is the check's own.
	transport := &http.Transport{DialContext: r.dialer().DialContext, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return "", final{err}
	}
	req.Header.Set("User-Agent", "switchback-check")
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)); err != nil {
		return "", fmt.Errorf("read the answer: %w", err)
	}
	if resp.StatusCode >= 400 {
		return "", fmt.Errorf("the answer is %s", resp.Status)
	}
	return resp.Status, nil
}

const (
	icmpEchoReply   = 0
	icmpEchoRequest = 8
)

// icmp sends one echo request (RFC 792) and waits for its reply.
func (r Runner) icmp(ctx context.Context, target string) (string, error) {
	c, err := r.dialer().DialContext(ctx, "ip4:icmp", target)
	if err != nil {
		return "", err
	}
	defer c.Close()
	until := time.Now().Add(2 * time.Second)
	if d, ok := ctx.Deadline(); ok {
		until = earlier(until, d)
	}
	if err := c.SetDeadline(until); err != nil {
		return "", err
	}
	id, sequence := uint16(os.Getpid()), uint16(time.Now().UnixNano())
	began := time.Now()
	if _, err := c.Write(echoRequest(id, sequence)); err != nil {
		return "", err
	}
	for buf := make([]byte, 1500); ; {
		n, err := c.Read(buf)
		if err != nil {
			return "", err
		}
		if isEchoReply(buf[:n], id, sequence) {
			return fmt.Sprintf("answered in %v", time.Since(began).Round(100*time.Microsecond)), nil
		}
	}
}

func echoRequest(id, sequence uint16) []byte {
	m := []byte{icmpEchoRequest, 0, 0, 0, 0, 0, 0, 0, 's', 'w', 'i', 't', 'c', 'h', 'b', 'k'}
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], sequence)
	sum := uint32(0)
	for i := 0; i < len(m); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(m[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(m[2:], ^uint16(sum))
	return m
}

// isEchoReply judges a packet, with or without its IPv4 header.
func isEchoReply(p []byte, id, sequence uint16) bool {
	if len(p) > 0 && p[0]>>4 == 4 {
		header := int(p[0]&15) * 4
		if header > len(p) {
			return false
		}
		p = p[header:]
	}
	return len(p) >= 8 && p[0] == icmpEchoReply && binary.BigEndian.Uint16(p[4:]) == id && binary.BigEndian.Uint16(p[6:]) == sequence
}

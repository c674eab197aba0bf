package transport

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Paths that every server and agent serves to members of its installation, to be measured.
const (
	EchoPath = "/v1/echo"
	SinkPath = "/v1/sink"
)

// Echo is the answer of EchoPath.
type Echo struct {
	Time    time.Time `json:"time"`
	Version string    `json:"version"`
}

// Measurement is what a leg between two processes is like.
type Measurement struct {
	// Latency is the shortest round trip of a call on an open connection.
	Latency time.Duration `json:"latency"`
	// BytesPerSecond is what SentBytes took to be received; 0 = not measured.
	BytesPerSecond float64 `json:"bytes_per_second,omitempty"`
	SentBytes      int64   `json:"sent_bytes,omitempty"`
	// ClockSkew is the peer's clock less ours, give or take half the latency.
	ClockSkew          time.Duration `json:"clock_skew"`
	Version            string        `json:"version"`
	CertificateExpires time.Time     `json:"certificate_expires,omitzero"`
}

// maxSink bounds what one request may send to be measured.
const maxSink = 256 << 20

// RouteMeasure serves EchoPath and SinkPath to these roles.
func RouteMeasure(mux *http.ServeMux, version string, roles ...Role) {
	mux.Handle("GET "+EchoPath, RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		WriteJSON(w, http.StatusOK, Echo{Time: time.Now(), Version: version})
	}), roles...))
	mux.Handle("POST "+SinkPath, RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, maxSink))
		if err != nil {
			WriteError(w, switchback.Errorf(switchback.CodeInvalid, "after %d bytes: %w", n, err))
			return
		}
		WriteJSON(w, http.StatusOK, n)
	}), roles...))
}

// echoes is how many round trips are measured.
const echoes = 5

// Measure measures the leg to address: a few round trips, then data that does not
// compress for at most the time given, and not more than bytes (0 = no data). Errors are those of Do.
func Measure(ctx context.Context, client *http.Client, address string, bytes int64, limit time.Duration) (m Measurement, err error) {
	for i := range echoes {
		began := time.Now()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+EchoPath, nil)
		if err != nil {
			return m, err
		}
		resp, err := Do(client, req)
		if err != nil {
			return m, err
		}
		var e Echo
		err = json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&e)
		_, _ = io.Copy(io.Discard, resp.Body) // so that the connection is used again
		resp.Body.Close()
		if err != nil {
			return m, switchback.Errorf(switchback.CodeCorrupt, "the echo of %s is not understood: %w", address, err)
		}
		took := time.Since(began)
		if i == 0 && resp.TLS != nil && len(resp.TLS.PeerCertificates) > 0 {
			m.CertificateExpires = resp.TLS.PeerCertificates[0].NotAfter
		}
		if i == 0 { // with the connection
			m.Latency = took
			continue
		}
		if i == 1 || took < m.Latency {
			m.Latency, m.ClockSkew, m.Version = took, e.Time.Sub(began.Add(took/2)), e.Version
		}
	}
	if bytes <= 0 {
		return m, nil
	}
	began := time.Now()
	m.SentBytes, err = sink(ctx, client, address, &noise{left: bytes, until: began.Add(limit)})
	if err != nil {
		return m, err
	}
	m.BytesPerSecond = float64(m.SentBytes) / time.Since(began).Seconds()
	return m, nil
}

// sink sends data to be thrown away and returns how much arrived.
func sink(ctx context.Context, client *http.Client, address string, data io.Reader) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+SinkPath, data)
	if err != nil {
		return 0, err
	}
	resp, err := Do(client, req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var n int64
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<10)).Decode(&n); err != nil {
		return 0, switchback.Errorf(switchback.CodeCorrupt, "the answer of %s is not understood: %w", address, err)
	}
	return n, nil
}

// noise is a reader of random bytes that ends when its time is over.
type noise struct {
	left  int64
	until time.Time
	block []byte
}

func (n *noise) Read(p []byte) (int, error) {
	if n.left <= 0 || !time.Now().Before(n.until) {
		return 0, io.EOF
	}
	if n.block == nil {
		n.block = make([]byte, 64<<10)
		_, _ = rand.Read(n.block) // never fails
	}
	c := copy(p, n.block)
	c = int(min(int64(c), n.left))
	n.left -= int64(c)
	return c, nil
}

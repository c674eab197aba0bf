package transport

import (
	"context"
	"crypto/x509"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Issuer returns the SHA-256 of the authority that signed the certificate, hexadecimal.
func (c *Credentials) Issuer() string {
	h := c.held.Load()
	for _, ca := range h.authorities {
		if h.leaf.CheckSignatureFrom(ca) == nil {
			return fingerprint(ca)
		}
	}
	return "" // not reached: newHeld has checked it
}

// Authorities returns the SHA-256 of the authorities that are believed, sorted.
func (c *Credentials) Authorities() []string { return fingerprints(c.held.Load().authorities) }

func fingerprints(certs []*x509.Certificate) []string {
	var list []string
	for _, ca := range certs {
		list = append(list, fingerprint(ca))
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// Believes reports whether caPEM holds the very authorities that are believed.
func (c *Credentials) Believes(caPEM []byte) bool {
	b, err := parseBundle(caPEM)
	return err == nil && slices.Equal(fingerprints(b.certs), c.Authorities())
}

// WithAuthorities returns the same key and certificate with other authorities.
// CodeInvalid: the certificate is of none of them, so that nobody would believe it.
func (c *Credentials) WithAuthorities(caPEM []byte) (*Credentials, error) {
	h := c.held.Load()
	keyPEM, err := encodeKey(h.tls.PrivateKey)
	if err != nil {
		return nil, err
	}
	return NewCredentials(encodeCertificate(h.leaf.Raw), keyPEM, caPEM)
}

// Revoke makes these agents, and no others, be refused from now on, whatever
// certificate they show: at each handshake and each request. Requests of theirs
// that are being answered are cut off.
func (c *Credentials) Revoke(agents []switchback.AgentID) {
	revoked := map[string]bool{}
	for _, id := range agents {
		revoked[string(id)] = true
	}
	for {
		was := c.held.Load()
		if maps.Equal(was.revoked, revoked) {
			return
		}
		next := *was
		next.revoked = revoked
		if c.held.CompareAndSwap(was, &next) {
			break
		}
	}
	c.requests.judge(revoked)
}

// RevokedAre reports whether exactly these agents are refused.
func (c *Credentials) RevokedAre(agents []switchback.AgentID) bool {
	revoked := c.held.Load().revoked
	for _, id := range agents {
		if !revoked[string(id)] {
			return false
		}
	}
	return len(revoked) == len(agents)
}

// requests are those that are being answered, by what ends them.
type requests struct {
	mu     sync.Mutex
	active map[*activeRequest]struct{}
}

type activeRequest struct {
	id   Identity
	stop func()
}

// begin notes a request until the returned function is called; it may be cut
// off while it is noted.
func (rs *requests) begin(w http.ResponseWriter, r *http.Request, id Identity) (*http.Request, func()) {
	ctx, cancel := context.WithCancelCause(r.Context())
	a := &activeRequest{id: id, stop: func() {
		cancel(revokedError(id))
		_ = http.NewResponseController(w).SetReadDeadline(time.Now()) // where the connection has been taken over, its owner judges
	}}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.active == nil {
		rs.active = map[*activeRequest]struct{}{}
	}
	rs.active[a] = struct{}{}
	return r.WithContext(ctx), func() {
		cancel(nil)
		rs.mu.Lock()
		defer rs.mu.Unlock()
		delete(rs.active, a)
	}
}

func (rs *requests) judge(revoked map[string]bool) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for a := range rs.active {
		if a.id.Role == RoleAgent && revoked[a.id.ID] {
			a.stop()
		}
	}
}

func revokedError(id Identity) error {
	return switchback.Errorf(switchback.CodeUnauthorized, "agent %s of site %s was revoked", id.ID, id.Site).
		WithHint("if that was a mistake, join it again, with an empty state directory, which makes a new key, and a new token: switchback site add %s", id.Site)
}

package transport

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

type peerKey struct{}

// Authenticate judges the client's certificate of each request. A bad one
// (another installation's, expired) is answered with CodeUnauthorized and the
// reason; a request without one goes on without an identity.
func Authenticate(c *Credentials, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			id, err := c.verify(r.TLS.PeerCertificates, time.Now())
			if err != nil {
				WriteError(w, err)
				return
			}
			var done func()
			r, done = c.requests.begin(w, WithIdentity(r, id), id)
			defer done()
			if _, err := c.verify(r.TLS.PeerCertificates, time.Now()); err != nil { // revoked just now
				WriteError(w, err)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// PeerIdentity returns who sent a request that came through Authenticate;
// CodeUnauthorized where nobody is known.
func PeerIdentity(r *http.Request) (Identity, error) {
	if id, ok := r.Context().Value(peerKey{}).(Identity); ok {
		return id, nil
	}
	return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "no certificate was presented").
		WithHint("join the installation first")
}

// WithIdentity returns a request that PeerIdentity says is of id: for one that
// proved itself in another way than by a certificate.
func WithIdentity(r *http.Request, id Identity) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), peerKey{}, id))
}

// RequireRole lets only these roles through to next.
func RequireRole(next http.Handler, roles ...Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := PeerIdentity(r)
		if err == nil {
			if wantRole(id, roles...) != nil {
				err = switchback.Errorf(switchback.CodeUnauthorized, "%s may not do this: it takes the role %v", id, roles)
			}
		}
		if err != nil {
			WriteError(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

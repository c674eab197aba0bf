package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// ServerTLS returns the configuration of a listener that speaks HTTP/1.1 and
// HTTP/2. Certificates of clients are asked for here and judged by Authenticate.
func ServerTLS(c *Credentials) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &c.held.Load().tls, nil
		},
	}
}

// ClientTLS returns the configuration of a connection to a peer that must
// belong to this installation and satisfy want (nil: anybody in it).
func ClientTLS(c *Credentials, want func(Identity) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &c.held.Load().tls, nil
		},
		// Host names mean nothing here; VerifyConnection checks the chain and
		// the SPIFFE ID instead, also on resumed connections.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := c.verify(cs.PeerCertificates, time.Now())
			if err != nil {
				return err
			}
			if want != nil {
				return want(id)
			}
			return nil
		},
	}
}

// verify returns whom a chain speaks for, or CodeUnauthorized with the reason
// why it is not believed.
func (c *Credentials) verify(chain []*x509.Certificate, now time.Time) (Identity, error) {
	h := c.held.Load()
	if len(chain) == 0 {
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "no certificate was presented").
			WithHint("join the installation first")
	}
	leaf := chain[0]
	id, idErr := identityOf(leaf)
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: h.roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case err == nil && idErr == nil && id.Role == RoleAgent && h.revoked[id.ID]:
		return Identity{}, revokedError(id)
	case err == nil && idErr == nil && id.Installation == h.identity.Installation:
		return id, nil
	case err == nil && idErr != nil:
		return Identity{}, &switchback.Error{Code: switchback.CodeUnauthorized, Message: "certificate without an identity", Err: idErr}
	case errors.As(err, &unknown) && idErr == nil && id.Installation == h.identity.Installation:
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized,
			"the certificate of %s is signed by another installation of the same name", id).
			WithHint("join it to this installation with a new token")
	case err == nil || errors.As(err, &unknown) && idErr == nil:
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized,
			"certificate signed by another installation: %s, but this is installation %s", id, h.identity.Installation).
			WithHint("join it to this installation with a token of this one")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.After(leaf.NotAfter):
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "the certificate of %s expired at %s", id, leaf.NotAfter.Format(time.RFC3339)).
			WithHint("join it again with a new token")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "the certificate of %s is valid only from %s", id, leaf.NotBefore.Format(time.RFC3339)).
			WithHint("set the clocks right")
	}
	return Identity{}, &switchback.Error{Code: switchback.CodeUnauthorized, Message: "the certificate is not believed", Err: err}
}

// AnyServer is a want for ClientTLS: the control plane.
func AnyServer(id Identity) error { return wantRole(id, RoleServer) }

// AnyAgent wants an agent of the installation.
func AnyAgent(id Identity) error { return wantRole(id, RoleAgent) }

// Agent returns a want for ClientTLS: this one agent.
func Agent(agent switchback.AgentID) func(Identity) error {
	return func(id Identity) error {
		if id.Role != RoleAgent || id.ID != string(agent) {
			return switchback.Errorf(switchback.CodeUnauthorized, "the peer is %s, not agent %s", id, agent).
				WithHint("check the agent's address")
		}
		return nil
	}
}

func wantRole(id Identity, roles ...Role) error {
	for _, r := range roles {
		if id.Role == r {
			return nil
		}
	}
	return switchback.Errorf(switchback.CodeUnauthorized, "the peer is %s, not of role %v", id, roles)
}

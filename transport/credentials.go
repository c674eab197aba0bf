package transport

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"github.com/switchback-dr/switchback/internal/durable"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// credentialsFile holds key, certificate and CA certificates: one file, so that
// they always belong together.
const credentialsFile = "identity.pem"

// Credentials are a key, its certificate, and the authorities whose peers are
// believed. They can be replaced while in use; connections made from then on
// use the new ones. They may be used from several goroutines.
type Credentials struct {
	held     atomic.Pointer[held]
	requests requests
}

// held is one immutable generation.
type held struct {
	identity Identity
	leaf     *x509.Certificate
	tls      tls.Certificate // leaf and CA certificates, so that a joining agent sees the CA
	roots    *x509.CertPool
	// authorities are what roots holds; revoked are agents that are refused all the same.
	authorities []*x509.Certificate
	revoked     map[string]bool
	caPEM       []byte
	bundlePEM   []byte
}

// NewCredentials checks that certificate, key and CA certificates (one or more)
// belong together. An expired certificate is accepted: see Expires.
func NewCredentials(certPEM, keyPEM, caPEM []byte) (*Credentials, error) {
	h, err := newHeld(certPEM, keyPEM, caPEM)
	if err != nil {
		return nil, err
	}
	c := &Credentials{}
	c.held.Store(h)
	return c, nil
}

func newHeld(certPEM, keyPEM, caPEM []byte) (*held, error) {
	invalid := func(format string, args ...any) error {
		return switchback.Errorf(switchback.CodeInvalid, "credentials: "+format, args...)
	}
	own, err := parseBundle(append(bytes.Clone(keyPEM), certPEM...))
	if err != nil {
		return nil, invalid("%v", err)
	}
	authority, err := parseBundle(caPEM)
	if err != nil {
		return nil, invalid("%v", err)
	}
	if len(own.certs) != 1 || own.key == nil || len(authority.certs) == 0 {
		return nil, invalid("a key, a certificate and a CA certificate are needed")
	}
	h := &held{leaf: own.certs[0], roots: x509.NewCertPool(), caPEM: caPEM}
	if h.identity, err = identityOf(h.leaf); err != nil {
		return nil, err
	}
	signer, ok := own.key.(crypto.Signer)
	if !ok || !h.leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(signer.Public()) {
		return nil, invalid("the key is not the certificate's")
	}
	h.tls = tls.Certificate{Certificate: [][]byte{h.leaf.Raw}, PrivateKey: signer, Leaf: h.leaf}
	for _, ca := range authority.certs {
		h.roots.AddCert(ca)
		h.authorities = append(h.authorities, ca)
		h.tls.Certificate = append(h.tls.Certificate, ca.Raw)
	}
	if _, err := h.leaf.Verify(x509.VerifyOptions{Roots: h.roots, CurrentTime: h.leaf.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, invalid("the certificate is not signed by the CA")
	}
	h.bundlePEM = append(append(bytes.Clone(keyPEM), certPEM...), caPEM...)
	return h, nil
}

// NewTrust makes credentials without a certificate, for a client that proves
// itself in another way: by them it knows the peers of the installation whose CA
// certificate this is.
func NewTrust(caPEM []byte) (*Credentials, error) {
	authority, err := parseBundle(caPEM)
	if err != nil || len(authority.certs) == 0 || !authority.certs[0].IsCA || len(authority.certs[0].URIs) != 1 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "this is not the CA certificate of an installation")
	}
	h := &held{roots: x509.NewCertPool(), caPEM: caPEM, identity: Identity{Installation: authority.certs[0].URIs[0].Host}}
	for _, ca := range authority.certs {
		h.roots.AddCert(ca)
	}
	c := &Credentials{}
	c.held.Store(h)
	return c, nil
}

// SaveCredentials stores c in dir, readable by the owner only, replacing what
// was there at once or not at all.
func SaveCredentials(dir string, c *Credentials) error {
	if err := durable.WriteFile(filepath.Join(dir, credentialsFile), c.held.Load().bundlePEM, 0o600); err != nil {
		return fmt.Errorf("store credentials: %w", err)
	}
	return nil
}

// LoadCredentials loads what SaveCredentials stored. CodeNotFound: nothing there.
func LoadCredentials(dir string) (*Credentials, error) {
	path := filepath.Join(dir, credentialsFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no credentials in %s", dir).WithHint("join the installation first")
	}
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	b, err := parseBundle(data)
	if err != nil || b.key == nil || len(b.certs) < 2 {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "%s does not hold a key, a certificate and a CA certificate", path)
	}
	keyPEM, err := encodeKey(b.key)
	if err != nil {
		return nil, err
	}
	var caPEM []byte
	for _, ca := range b.certs[1:] {
		caPEM = append(caPEM, encodeCertificate(ca.Raw)...)
	}
	return NewCredentials(encodeCertificate(b.certs[0].Raw), keyPEM, caPEM)
}

// Replace makes everything that uses c use n's certificate, key and authorities
// from the next connection on. The identity must be the same; what c refuses as
// revoked stays so.
func (c *Credentials) Replace(n *Credentials) error {
	if was, is := c.Identity(), n.Identity(); was != is {
		return switchback.Errorf(switchback.CodeInvalid, "cannot replace the credentials of %s by those of %s", was, is)
	}
	c.take(n)
	return nil
}

// take goes on with n's certificate, key and authorities; what is revoked stays so.
func (c *Credentials) take(n *Credentials) {
	for {
		was, next := c.held.Load(), *n.held.Load()
		next.revoked = was.revoked
		if c.held.CompareAndSwap(was, &next) {
			return
		}
	}
}

// Identity returns whom the certificate speaks for.
func (c *Credentials) Identity() Identity { return c.held.Load().identity }

// CAPEM returns the certificates of the authorities.
func (c *Credentials) CAPEM() []byte { return bytes.Clone(c.held.Load().caPEM) }

// Serial returns the certificate's serial number, hexadecimal.
func (c *Credentials) Serial() string { return c.held.Load().leaf.SerialNumber.Text(16) }

// Expires returns when the certificate ends.
func (c *Credentials) Expires() time.Time { return c.held.Load().leaf.NotAfter }

// RenewAt returns when a new certificate should be asked for: after two thirds
// of the lifetime.
func (c *Credentials) RenewAt() time.Time {
	leaf := c.held.Load().leaf
	return leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3)
}

// CertificateInfo returns serial (hexadecimal) and end of a certificate.
func CertificateInfo(certPEM []byte) (serial string, expires time.Time, err error) {
	b, err := parseBundle(certPEM)
	if err != nil || len(b.certs) == 0 {
		return "", time.Time{}, switchback.Errorf(switchback.CodeInvalid, "not a certificate")
	}
	return b.certs[0].SerialNumber.Text(16), b.certs[0].NotAfter, nil
}

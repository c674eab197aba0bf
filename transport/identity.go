package transport

import (
	"crypto/x509"
	"net/url"
	"regexp"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// Role says what an identity may do.
type Role string

const (
	// RoleServer is the control plane.
	RoleServer Role = "server"
	// RoleAgent is the appliance of a site.
	RoleAgent Role = "agent"
	// RoleAdmin is a person or their command line.
	RoleAdmin Role = "admin"
)

// Identity is who a certificate speaks for.
type Identity struct {
	// Installation is the trust domain: lower-case letters, digits, dots, dashes.
	Installation string `json:"installation"`
	Role         Role   `json:"role"`
	// Site is an agent's site; empty for other roles.
	Site switchback.SiteID `json:"site,omitempty"`
	ID   string            `json:"id"`
}

var (
	installationPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	segmentPattern      = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)
)

// Validate reports the first part that cannot stand in a SPIFFE ID.
func (i Identity) Validate() error {
	bad := func(what, value string) error {
		return switchback.Errorf(switchback.CodeInvalid, "%q is not a valid %s", value, what).
			WithHint("letters, digits and dashes")
	}
	switch {
	case !installationPattern.MatchString(i.Installation):
		return bad("installation name", i.Installation)
	case i.Role != RoleServer && i.Role != RoleAgent && i.Role != RoleAdmin:
		return bad("role", string(i.Role))
	case !segmentPattern.MatchString(i.ID):
		return bad(string(i.Role)+" name", i.ID)
	case i.Role == RoleAgent && !segmentPattern.MatchString(string(i.Site)):
		return bad("site", string(i.Site))
	case i.Role != RoleAgent && i.Site != "":
		return switchback.Errorf(switchback.CodeInvalid, "a %s belongs to no site", i.Role)
	}
	return nil
}

// URI returns the SPIFFE ID.
func (i Identity) URI() *url.URL {
	path := "/" + string(i.Role) + "/" + i.ID
	if i.Role == RoleAgent {
		path = "/" + string(i.Role) + "/" + string(i.Site) + "/" + i.ID
	}
	return &url.URL{Scheme: "spiffe", Host: i.Installation, Path: path}
}

// String returns the SPIFFE ID as text.
func (i Identity) String() string { return i.URI().String() }

// ParseIdentity is the inverse of Identity.URI.
func ParseIdentity(u *url.URL) (Identity, error) {
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	i := Identity{Installation: u.Host, Role: Role(parts[0]), ID: parts[len(parts)-1]}
	want := 2
	if i.Role == RoleAgent && len(parts) == 3 {
		i.Site, want = switchback.SiteID(parts[1]), 3
	}
	if u.Scheme != "spiffe" || len(parts) != want || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return Identity{}, switchback.Errorf(switchback.CodeInvalid, "%q is not an identity of Switchback", u)
	}
	return i, i.Validate()
}

// identityOf returns what a certificate claims; whether it is to be believed is
// the verifier's business.
func identityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "the certificate carries %d identities, not one", len(cert.URIs))
	}
	return ParseIdentity(cert.URIs[0])
}

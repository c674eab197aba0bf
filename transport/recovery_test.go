package transport

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// stateOf is what a TLS connection from c shows.
func stateOf(c *Credentials) *tls.ConnectionState {
	var chain []*x509.Certificate
	for _, der := range c.held.Load().tls.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		chain = append(chain, cert)
	}
	return &tls.ConnectionState{PeerCertificates: chain}
}

func TestProvenServer(t *testing.T) {
	ca := func(name string) *CA {
		c, err := NewCA(name)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	issue := func(c *CA, id Identity) *Credentials {
		id.Installation = c.Installation()
		creds, err := c.Issue(id, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return creds
	}
	lost, next, other := ca("lost"), ca("next"), ca("other")
	agent := issue(lost, Identity{Role: RoleAgent, Site: "a", ID: "a-1"})
	server := issue(next, Identity{Role: RoleServer, ID: "server"})
	key, foreign := NewRecoveryKey(lost), NewRecoveryKey(other)
	now := time.Now()
	proof := key.Prove(next.Fingerprint(), now.Add(time.Hour))
	forged := foreign
	forged.Installation, forged.CA = key.Installation, key.CA
	for name, c := range map[string]struct {
		proof  AdoptionProof
		public string
		from   *tls.ConnectionState
		at     time.Time
		code   switchback.Code
		want   string
	}{
		"proven":                    {proof, key.Public(), stateOf(server), now, "", ""},
		"no proof":                  {AdoptionProof{}, key.Public(), stateOf(server), now, switchback.CodeUnauthorized, "no proof"},
		"no key known":              {proof, "", stateOf(server), now, switchback.CodeRefused, "never told a recovery key"},
		"of another installation":   {foreign.Prove(next.Fingerprint(), now.Add(time.Hour)), key.Public(), stateOf(server), now, switchback.CodeUnauthorized, "installation other"},
		"forged":                    {forged.Prove(next.Fingerprint(), now.Add(time.Hour)), key.Public(), stateOf(server), now, switchback.CodeUnauthorized, "not made with the recovery key"},
		"for another, replayed":     {proof, key.Public(), stateOf(issue(other, Identity{Role: RoleServer, ID: "server"})), now, switchback.CodeUnauthorized, "not sent by the server that it is for"},
		"redirected":                {with(proof, func(p *AdoptionProof) { p.To = other.Fingerprint() }), key.Public(), stateOf(issue(other, Identity{Role: RoleServer, ID: "server"})), now, switchback.CodeUnauthorized, "not made with"},
		"prolonged":                 {with(proof, func(p *AdoptionProof) { p.ExpiresAt = now.Add(99 * time.Hour) }), key.Public(), stateOf(server), now, switchback.CodeUnauthorized, "not made with"},
		"too late":                  {proof, key.Public(), stateOf(server), now.Add(2 * time.Hour), switchback.CodeUnauthorized, "expired"},
		"without a certificate":     {proof, key.Public(), &tls.ConnectionState{}, now, switchback.CodeUnauthorized, "not sent by the server"},
		"by an agent of the server": {proof, key.Public(), stateOf(issue(next, Identity{Role: RoleAgent, Site: "b", ID: "a-2"})), now, switchback.CodeUnauthorized, "not of role"},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := agent.ProvenServer(c.proof, c.public, c.from, c.at)
			if switchback.CodeOf(err) != c.code || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %s %q", err, c.code, c.want)
			}
			if err == nil && id != server.Identity() {
				t.Errorf("it is %s", id)
			}
		})
	}
	read, err := ParseRecoveryKey(string(key.File()))
	if err != nil || read.Public() != key.Public() || read.CA != key.CA {
		t.Errorf("read back: %v", err)
	}
	for _, text := range []string{"", "sbrecovery1.", key.String()[:40], "sbjoin1.abc"} {
		if _, err := ParseRecoveryKey(text); switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%q is read: %v", text, err)
		}
	}
	adopted := issue(next, Identity{Role: RoleAgent, Site: "a", ID: "a-1"})
	stranger := issue(next, Identity{Role: RoleAgent, Site: "b", ID: "a-1"})
	if err := agent.Adopt(stranger); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("credentials of another site are taken: %v", err)
	}
	if err := agent.Adopt(adopted); err != nil || agent.Identity() != adopted.Identity() {
		t.Errorf("not adopted: %v", err)
	}
}

func with(p AdoptionProof, f func(*AdoptionProof)) AdoptionProof { f(&p); return p }

package transport

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net/http"
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
	agent.Revoke([]switchback.AgentID{"a-bad"})
	defer func() {
		if !agent.RevokedAre([]switchback.AgentID{"a-bad"}) {
			t.Error("who was refused is believed again")
		}
	}()
	if err := agent.Adopt(adopted); err != nil || agent.Identity() != adopted.Identity() {
		t.Errorf("not adopted: %v", err)
	}
}

func with(p AdoptionProof, f func(*AdoptionProof)) AdoptionProof { f(&p); return p }

// TestAdoptionClient: a new server speaks to an agent whose certificate has ended
// with its own server, and to nobody who is not under the lost installation's CA.
func TestAdoptionClient(t *testing.T) {
	lost, err := NewCA("lost")
	if err != nil {
		t.Fatal(err)
	}
	next, err := NewCA("next")
	if err != nil {
		t.Fatal(err)
	}
	server, err := next.Issue(Identity{Installation: "next", Role: RoleServer, ID: "server"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		id   Identity
		ca   string
		want string
	}{
		"an agent":         {Identity{Installation: "lost", Role: RoleAgent, Site: "a", ID: "a-1"}, lost.Fingerprint(), ""},
		"another CA":       {Identity{Installation: "lost", Role: RoleAgent, Site: "a", ID: "a-1"}, next.Fingerprint(), "no agent of the installation that the recovery key is of"},
		"not an agent":     {Identity{Installation: "lost", Role: RoleServer, ID: "server"}, lost.Fingerprint(), "not of role"},
		"no CA in the key": {Identity{Installation: "lost", Role: RoleAgent, Site: "a", ID: "a-1"}, "", "no agent of"},
	} {
		t.Run(name, func(t *testing.T) {
			agent, err := lost.Issue(c.id, -time.Minute) // it has ended
			if err != nil {
				t.Fatal(err)
			}
			ln, err := Listen(t.Context(), "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{TLSConfig: ServerTLS(agent), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				WriteJSON(w, http.StatusOK, len(r.TLS.PeerCertificates))
			}), ErrorLog: log.New(io.Discard, "", 0)}
			go srv.ServeTLS(ln, "", "")
			defer srv.Close()
			var seen Identity
			var expires time.Time
			client := AdoptionClient(server, c.ca, func(id Identity, e time.Time) { seen, expires = id, e })
			n, err := Call[int](t.Context(), client, http.MethodGet, "https://"+ln.Addr().String()+"/", nil)
			if c.want != "" {
				if switchback.CodeOf(err) != switchback.CodeUnauthorized || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
				return
			}
			if err != nil || n != 2 || seen != c.id || !expires.Before(time.Now()) {
				t.Errorf("%v, %d certificates, seen %s until %s", err, n, seen, expires)
			}
		})
	}
}

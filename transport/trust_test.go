package transport

import (
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// TestRotationPhases: in each phase whoever has followed believes whoever has
// not yet, and the authority is found again from its text.
func TestRotationPhases(t *testing.T) {
	ca, err := NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(id string) *Credentials {
		t.Helper()
		c, err := ca.Issue(Identity{Installation: "sb-test", Role: RoleAgent, Site: "berlin", ID: id}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	believes := func(who, whom *Credentials) bool {
		_, err := who.verify([]*x509.Certificate{whom.held.Load().leaf}, time.Now())
		return err == nil
	}
	first := ca.Fingerprint()
	late, early := issue("a-late"), issue("a-early")
	for i, phase := range []RotationPhase{RotationIntroducing, RotationReplacing, RotationNone} {
		next, err := ca.Next(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		text, err := next.PEM()
		if err != nil {
			t.Fatal(err)
		}
		read, err := ParseCA(text)
		if err != nil {
			t.Fatal(err)
		}
		if read.Rotation() != next.Rotation() || read.Fingerprint() != next.Fingerprint() || next.Rotation().Phase != phase {
			t.Fatalf("%s: read %+v, written %+v", phase, read.Rotation(), next.Rotation())
		}
		if again, err := read.PEM(); err != nil || string(again) != string(text) {
			t.Errorf("%s: the text is not the same when it is written again: %v", phase, err)
		}
		if keys := strings.Count(string(text), "PRIVATE KEY-----\n") / 2; keys != []int{2, 1, 1}[i] {
			t.Errorf("%s: %d keys are stored", phase, keys)
		}
		ca.Become(read)
		switch phase {
		case RotationIntroducing:
			n, err := early.WithAuthorities(ca.BundlePEM())
			if err != nil {
				t.Fatal(err)
			}
			early = n
		case RotationReplacing:
			n, err := late.WithAuthorities(ca.BundlePEM()) // everybody believes both by now
			if err != nil {
				t.Fatal(err)
			}
			late, early = n, issue("a-early")
		case RotationNone:
			if _, err := late.WithAuthorities(ca.BundlePEM()); switchback.CodeOf(err) != switchback.CodeInvalid {
				t.Errorf("a certificate of the old authority would believe the new one only: %v", err)
			}
			late = issue("a-late")
			if early, err = early.WithAuthorities(ca.BundlePEM()); err != nil {
				t.Fatal(err)
			}
		}
		if !believes(late, early) || !believes(early, late) {
			t.Errorf("%s: early and late do not believe each other", phase)
		}
	}
	if ca.Fingerprint() == first || early.Issuer() != ca.Fingerprint() || !slices.Equal(early.Authorities(), []string{ca.Fingerprint()}) {
		t.Errorf("in the end %s signs, early is of %s and believes %v", ca.Fingerprint(), early.Issuer(), early.Authorities())
	}
}

// TestRevokeCutsOff: a request that is under way ends, and later ones are
// refused, over connections that stood before as well.
func TestRevokeCutsOff(t *testing.T) {
	ca, err := NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(role Role, site switchback.SiteID, id string) *Credentials {
		c, err := ca.Issue(Identity{Installation: "sb-test", Role: role, Site: site, ID: id}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server, bad, good := issue(RoleServer, "", "server"), issue(RoleAgent, "berlin", "a-bad"), issue(RoleAgent, "berlin", "a-good")
	began, ended := make(chan struct{}), make(chan error, 1)
	srv := NewHTTPServer(server, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			close(began)
		}
		_, err := io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/stream" {
			ended <- err
		}
		WriteJSON(w, http.StatusOK, "done")
	}), slog.New(slog.DiscardHandler))
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.ServeTLS(ln, "", "")
	defer srv.Close()
	url := "https://" + ln.Addr().String()
	clientOfBad := NewHTTPClient(ClientConfig{Credentials: bad})
	ask := func(c *http.Client) error {
		_, err := Call[string](t.Context(), c, http.MethodGet, url+"/", nil)
		return err
	}
	if err := ask(clientOfBad); err != nil {
		t.Fatal(err)
	}
	body, feed := io.Pipe()
	go func() {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/stream", body)
		if resp, err := clientOfBad.Do(req); err == nil {
			resp.Body.Close()
		}
		body.Close()
	}()
	if _, err := feed.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	<-began
	server.Revoke([]switchback.AgentID{"a-bad"})
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the stream ended well")
		}
	case <-time.After(10 * time.Second):
		t.Error("the stream goes on")
	}
	feed.Close()
	if err := ask(clientOfBad); switchback.CodeOf(err) != switchback.CodeUnauthorized || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("afterwards: %v", err)
	}
	if err := ask(NewHTTPClient(ClientConfig{Credentials: good})); err != nil {
		t.Errorf("another agent: %v", err)
	}
	if n, err := ca.Issue(server.Identity(), time.Hour); err != nil || server.Replace(n) != nil {
		t.Fatal(err)
	}
	if err := ask(clientOfBad); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("after a renewal of the server's certificate: %v", err)
	}
}

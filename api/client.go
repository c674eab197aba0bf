package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// Client is a client of the server's API.
type Client struct {
	// BreakGlass, if set, is the reason why operations that take a second
	// person's approval go on without; the audit log keeps it.
	BreakGlass string

	http *http.Client
	ca   string // fingerprint

	mu      sync.Mutex
	server  string   // that is asked
	servers []string // all that may be asked
}

func (c *Client) address() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server
}

// lookAgain chooses anew among several servers, for what may be asked twice.
func (c *Client) lookAgain() {
	if len(c.servers) < 2 {
		return
	}
	found := reachable(c.servers)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server = found
}

// Names in a directory of client credentials, beside those of a certificate.
const (
	serverFile = "server"
	tokenFile  = "token"
	caFile     = "ca.pem"
)

// Dial reads the client's credentials and the server's address from dir: a
// certificate, as the server makes it in STATE/admin, or a token, as SaveToken
// writes it. Of several servers it looks for one that takes connections;
// otherwise it does not connect yet.
func Dial(dir string) (*Client, error) {
	creds, token, err := credentials(dir)
	if err != nil {
		return nil, &switchback.Error{Code: switchback.CodeOf(err), Message: "no usable client credentials in " + dir, Err: err,
			Hint: "copy STATE/admin from the server, or have a token made for you, and name the directory with --config or SWITCHBACK_CONFIG"}
	}
	b, err := os.ReadFile(filepath.Join(dir, serverFile))
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "the server's address: %w", err)
	}
	c := transport.NewHTTPClient(transport.ClientConfig{Credentials: creds, Want: transport.AnyServer})
	if token != "" {
		c.Transport = bearer{c.Transport, token}
	}
	servers := strings.Fields(string(b))
	return &Client{http: c, server: reachable(servers), servers: servers, ca: creds.CAFingerprint()}, nil
}

// credentials of dir: a certificate, or a token and by what to know the server.
func credentials(dir string) (*transport.Credentials, string, error) {
	token, err := os.ReadFile(filepath.Join(dir, tokenFile))
	if errors.Is(err, fs.ErrNotExist) {
		creds, err := transport.LoadCredentials(dir)
		return creds, "", err
	}
	if err != nil {
		return nil, "", err
	}
	ca, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return nil, "", err
	}
	creds, err := transport.NewTrust(ca)
	return creds, strings.TrimSpace(string(token)), err
}

// bearer adds the token to each request.
type bearer struct {
	next  http.RoundTripper
	token string
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// SaveToken writes what Dial needs to use a token into dir, readable by the
// owner only. It replaces no certificate: CodeConflict.
func SaveToken(dir string, t NewAPIToken) error {
	if _, err := transport.LoadCredentials(dir); switchback.CodeOf(err) != switchback.CodeNotFound {
		return switchback.Errorf(switchback.CodeConflict, "%s holds the credentials of a certificate", dir).WithHint("name another directory")
	}
	for _, f := range []struct{ name, text string }{
		{caFile, t.CA}, {serverFile, strings.Join(t.Servers, "\n") + "\n"}, {tokenFile, t.Token + "\n"},
	} {
		if err := durable.WriteFile(filepath.Join(dir, f.name), []byte(f.text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// reachable chooses the first of several servers that takes connections. No
// call is sent to two of them, for the first might have carried it out, but for
// those that may be repeated: lookAgain.
func reachable(servers []string) string {
	if len(servers) == 0 {
		return ""
	}
	for _, s := range servers[:len(servers)-1] {
		if c, err := net.DialTimeout("tcp", s, time.Second); err == nil {
			c.Close()
			return s
		}
	}
	return servers[len(servers)-1]
}

func call[R any](ctx context.Context, c *Client, method, path string, body any) (R, error) {
	return transport.Call[R](ctx, c.http, method, "https://"+c.address()+path, body)
}

// Sites lists sites with their agents.
func (c *Client) Sites(ctx context.Context) ([]Site, error) {
	return list[Site](ctx, c, "/v1/sites", nil, 0)
}

// CreateSite adds a site. An existing one is CodeConflict.
func (c *Client) CreateSite(ctx context.Context, id switchback.SiteID) error {
	_, err := call[Site](ctx, c, http.MethodPost, "/v1/sites", CreateSiteRequest{ID: id})
	return err
}

// DeleteSite removes a site without agents.
func (c *Client) DeleteSite(ctx context.Context, id switchback.SiteID) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, "/v1/sites/"+url.PathEscape(string(id)), nil)
	return err
}

// MintToken makes a one-time join token for an agent of a site.
func (c *Client) MintToken(ctx context.Context, site switchback.SiteID, validFor time.Duration) (Token, error) {
	return call[Token](ctx, c, http.MethodPost, "/v1/sites/"+url.PathEscape(string(site))+"/tokens", TokenRequest{ValidFor: validFor})
}

// Agents lists all agents.
func (c *Client) Agents(ctx context.Context) ([]Agent, error) {
	return list[Agent](ctx, c, "/v1/agents", nil, 0)
}

// Machines lists every VM of the sites.
func (c *Client) Machines(ctx context.Context) ([]Machine, error) {
	return list[Machine](ctx, c, "/v1/machines", nil, 0)
}

// VMFilter chooses protected VMs. Zero fields do not restrict.
type VMFilter struct {
	// Site is where they are active or replicate to.
	Site  switchback.SiteID
	Phase switchback.Phase
	Tag   string
	// Health is "normal", "warning" or "critical".
	Health string
}

// VMs lists the protected VMs, those that the filter chooses.
func (c *Client) VMs(ctx context.Context, f ...VMFilter) ([]VM, error) {
	q := url.Values{}
	for _, x := range f {
		q = values("site", string(x.Site), "phase", string(x.Phase), "tag", x.Tag, "health", x.Health)
	}
	return list[VM](ctx, c, "/v1/vms", q, 0)
}

// VM returns one by name, UUID or protection ID.
func (c *Client) VM(ctx context.Context, name string) (VM, error) {
	return call[VM](ctx, c, http.MethodGet, "/v1/vms/"+url.PathEscape(name), nil)
}

// Points lists a VM's recovery points, oldest first.
func (c *Client) Points(ctx context.Context, name string) ([]switchback.MarkedPoint, error) {
	return list[switchback.MarkedPoint](ctx, c, "/v1/vms/"+url.PathEscape(name)+"/points", nil, 0)
}

// Request asks for an operation on a VM, or for its plan.
func (c *Client) Request(ctx context.Context, vm string, kind recovery.Kind, req OperationRequest) (OperationAnswer, error) {
	return begin(ctx, c, "/v1/vms/"+url.PathEscape(vm)+"/operations/"+url.PathEscape(string(kind)), req)
}

// Drills lists the reports of a VM's drills, newest first.
func (c *Client) Drills(ctx context.Context, vm string, limit int) ([]DrillReport, error) {
	return list[DrillReport](ctx, c, "/v1/vms/"+url.PathEscape(vm)+"/drills", nil, limit)
}

// DrillPicture returns the picture of a drill's screen as PNG. CodeNotFound: there is none.
func (c *Client) DrillPicture(ctx context.Context, id switchback.OperationID) ([]byte, error) {
	p, err := call[DrillPicture](ctx, c, http.MethodGet, operationPath(id, "/screenshot"), nil)
	return p.PNG, err
}

// Operations lists operations, newest first.
func (c *Client) Operations(ctx context.Context, vm string, unfinished bool, limit int) ([]operation.Record, error) {
	q := url.Values{"unfinished": {fmt.Sprint(unfinished)}}
	if vm != "" {
		q.Set("vm", vm)
	}
	return list[operation.Record](ctx, c, "/v1/operations", q, limit)
}

func operationPath(id switchback.OperationID, rest string) string {
	return "/v1/operations/" + url.PathEscape(string(id)) + rest
}

// Operation returns one operation.
func (c *Client) Operation(ctx context.Context, id switchback.OperationID) (operation.Record, error) {
	return call[operation.Record](ctx, c, http.MethodGet, operationPath(id, ""), nil)
}

// OperationLog returns the log lines after a sequence number.
func (c *Client) OperationLog(ctx context.Context, id switchback.OperationID, after int64) ([]operation.LogLine, error) {
	return list[operation.LogLine](ctx, c, operationPath(id, "/log"), url.Values{"after": {fmt.Sprint(after)}}, 0)
}

// CancelOperation asks for an operation to be stopped and undone.
func (c *Client) CancelOperation(ctx context.Context, id switchback.OperationID) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, operationPath(id, "/cancel"), nil)
	return err
}

// RetryOperation lets a failed operation go on.
func (c *Client) RetryOperation(ctx context.Context, id switchback.OperationID) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, operationPath(id, "/retry"), nil)
	return err
}

package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"regexp"
	"strings"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/transport"
)

// keyHeader carries the client's name for a request that begins an operation.
const keyHeader = "Idempotency-Key"

const maxKeyLength = 200

// caller is who asks.
type caller struct {
	api.Principal
	identity transport.Identity
}

// asked is what the guard knows of the request under way.
type asked struct {
	// id is the request's, key and digest are for requests that may be repeated.
	id, key, digest string
	who             caller
	// breakGlass is the reason for going on without a second person's approval.
	breakGlass string
	// came gets what the audit log says of its outcome: the operation that it
	// begins, what it has made.
	came *string
	// keyed: an operation has the key already. Of several that one request
	// begins the first has it.
	keyed *bool
}

type askedKey struct{}

// callOf is the request that ctx belongs to; the zero value for what the server
// does by itself.
func callOf(ctx context.Context) asked {
	c, _ := ctx.Value(askedKey{}).(asked)
	return c
}

var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{8,64}$`)

// guard lets a request through to next that is from somebody known who has the
// role that the route takes, in a scope that the request stays in. What changes
// something, and what is refused, stands in the audit log. Every route of people
// stands behind it.
func (s *Server) guard(x route, next http.Handler) http.Handler {
	if x.Need == "" {
		panic("route " + x.Pattern + " names no role")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := asked{id: r.Header.Get(transport.RequestIDHeader), came: new(string), keyed: new(bool)}
		if !requestIDPattern.MatchString(c.id) {
			c.id = uuid.NewString()
		}
		w.Header().Set(transport.RequestIDHeader, c.id)
		var err error
		if c.who, err = s.authenticate(r); err != nil {
			transport.WriteError(w, err)
			return
		}
		r = transport.WithIdentity(r, c.who.identity)
		if err := s.authorise(r, c.who, x.Need); err != nil {
			if switchback.CodeOf(err) == switchback.CodeUnauthorized {
				if aerr := s.auditRefused(r, x, c, err); aerr != nil {
					err = aerr
				}
			}
			transport.WriteError(w, err)
			return
		}
		if c.breakGlass = r.Header.Get(breakGlassHeader); len(c.breakGlass) > maxBreakGlass {
			transport.WriteError(w, switchback.Errorf(switchback.CodeInvalid, "the reason for breaking the glass is longer than %d bytes", maxBreakGlass))
			return
		}
		if err := c.readKey(r); err != nil {
			transport.WriteError(w, err)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), askedKey{}, c))
		if prior, err := s.repeated(r.Context(), c); err != nil {
			transport.WriteError(w, err)
			return
		} else if prior != nil {
			transport.WriteJSON(w, http.StatusOK, api.OperationAnswer{Operation: prior})
			return
		}
		if r.Method == http.MethodGet {
			next.ServeHTTP(w, r)
			return
		}
		s.audited(w, r, x, c, next)
	})
}

// authenticate finds out who asks: by the token of the request, else by the
// certificate of the connection.
func (s *Server) authenticate(r *http.Request) (caller, error) {
	if text, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return s.tokenCaller(r.Context(), text)
	}
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return caller{}, switchback.Errorf(switchback.CodeUnauthorized, "who asks is not known: neither a certificate nor a token was presented").
			WithHint("use the credentials in STATE/admin of the server, or a token: switchback token create")
	}
	if id.Role != transport.RoleAdmin {
		return caller{}, switchback.Errorf(switchback.CodeUnauthorized, "%s may not do this: it takes the role %s", id, transport.RoleAdmin)
	}
	return caller{Principal: api.Principal{Name: id.ID, Role: switchback.Administrator, Via: "certificate"}, identity: id}, nil
}

// authorise refuses what the caller's role or scope does not cover.
func (s *Server) authorise(r *http.Request, who caller, need switchback.AccessRole) error {
	if !who.Role.Includes(need) {
		return switchback.Errorf(switchback.CodeUnauthorized, "%s has the role %s: this takes the role %s", who.Name, who.Role, need).
			WithHint("ask an administrator for a token with the role %s", need)
	}
	if who.Scope.All() {
		return nil
	}
	outside := func(what string) error {
		return switchback.Errorf(switchback.CodeUnauthorized, "%s is outside of what %s may act on: %s", what, who.Name, who.Scope).
			WithHint("ask an administrator for a token with the role %s there", need)
	}
	vm, site, op := r.PathValue("vm"), r.PathValue("site"), ""
	if strings.HasPrefix(r.URL.Path, "/v1/operations/") {
		op = r.PathValue("id")
	}
	switch {
	case vm != "":
		p, err := s.find(r.Context(), vm)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			return nil // the request finds the same, or is the one that makes it
		}
		if err == nil && !sees(who.Scope, p) {
			return outside("VM " + p.Name)
		}
		return err
	case op != "":
		rec, err := s.store.Operation(r.Context(), switchback.OperationID(op))
		if err != nil {
			return err
		}
		in, err := s.seesOperations(r.Context(), who.Scope)
		if err == nil && !in(rec) {
			return outside("operation " + op)
		}
		return err
	case site != "":
		if !who.Scope.HasSite(switchback.SiteID(site)) {
			return outside("site " + site)
		}
	case r.Method != http.MethodGet || need == switchback.Administrator:
		return outside("the installation as a whole")
	}
	return nil
}

func sees(scope switchback.Scope, p switchback.Protection) bool { return scope.HasVM(p.Home, p.Tags) }

// mayProtect judges a VM that is to be protected: it has no tags yet.
func mayProtect(ctx context.Context, home switchback.SiteID) error {
	if who := callOf(ctx).who; !who.Scope.HasVM(home, nil) {
		return switchback.Errorf(switchback.CodeUnauthorized, "a VM of site %s is outside of what %s may act on: %s", home, who.Name, who.Scope).
			WithHint("ask somebody with the role %s there", switchback.Operator)
	}
	return nil
}

// readKey takes over the key of a request that may be repeated, and what it asks.
func (c *asked) readKey(r *http.Request) error {
	c.key = r.Header.Get(keyHeader)
	if c.key == "" || r.Method != http.MethodPost {
		c.key = ""
		return nil
	}
	if len(c.key) > maxKeyLength {
		return switchback.Errorf(switchback.CodeInvalid, "the idempotency key is longer than %d bytes", maxKeyLength)
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, transport.MaxRequestBytes+1))
	if err != nil {
		return switchback.Errorf(switchback.CodeUnavailable, "read request: %w", err)
	}
	r.Body = io.NopCloser(bytes.NewReader(data))
	sum := sha256.Sum256([]byte(r.URL.Path + "\n" + string(data)))
	c.digest = hex.EncodeToString(sum[:])
	return nil
}

// note says in the audit log what came of the request.
func (c asked) note(what string) {
	if c.came != nil {
		*c.came = what
	}
}

// request is what stands of the call in the operation that it begins.
func (c asked) request() operation.Origin {
	q := operation.Origin{ID: c.id}
	if c.key != "" {
		// A key belongs to whoever made it up.
		q.Key, q.Digest = c.who.Name+" "+c.key, c.digest
	}
	return q
}

// repeated returns the operation that an earlier request with the same key has
// begun; nil where there is none.
func (s *Server) repeated(ctx context.Context, c asked) (*operation.Record, error) {
	if c.key == "" {
		return nil, nil
	}
	rec, err := s.store.OperationByRequest(ctx, c.request().Key)
	switch {
	case switchback.CodeOf(err) == switchback.CodeNotFound:
		return nil, nil
	case err != nil:
		return nil, err
	case rec.Request.Digest != c.digest:
		return nil, switchback.Errorf(switchback.CodeConflict, "the idempotency key was used for another request: operation %s, %s", rec.ID, rec.Title).
			WithHint("make up a new key for each request")
	}
	rec, err = s.runner.Get(ctx, rec.ID)
	return &rec, err
}

// begin makes an operation durable, together with the request that asked for it.
func (s *Server) begin(ctx context.Context, rec operation.Record) (operation.Record, error) {
	c := callOf(ctx)
	if c.keyed != nil {
		if *c.keyed {
			c.key = ""
		}
		*c.keyed = true
	}
	rec.Request = c.request()
	var err error
	if rec.Approval, err = s.approval(ctx, rec); err != nil {
		return rec, err
	}
	out, err := s.runner.Submit(ctx, rec)
	if err == nil {
		s.auditBegun(ctx, c, out)
	}
	if switchback.CodeOf(err) == switchback.CodeConflict { // perhaps with itself: asked twice at once
		if prior, perr := s.repeated(ctx, c); perr == nil && prior != nil {
			return *prior, nil
		}
	}
	return out, err
}

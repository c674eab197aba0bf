package server

import (
	"context"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"strings"
	"time"
	"unicode"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/transport"
)

// Every error that huma makes by itself (a request that does not fit the
// document) is one of ours. The variable is the only way it offers, and the same
// for all of the process.
func init() {
	huma.NewErrorWithContext = func(ctx huma.Context, status int, msg string, details ...error) huma.StatusError {
		p := problemOf(status, msg, details)
		if ctx != nil {
			p.RequestID = callOf(ctx.Context()).id
		}
		return p
	}
	huma.NewError = func(status int, msg string, details ...error) huma.StatusError {
		return problemOf(status, msg, details)
	}
}

// problemOf is a problem that huma has found in a request.
func problemOf(status int, msg string, details []error) *transport.Problem {
	code := switchback.CodeInternal
	switch {
	case status == http.StatusRequestTimeout:
		code = switchback.CodeTimeout
	case status >= 400 && status < 500:
		code = switchback.CodeInvalid
	}
	e := switchback.Errorf(code, "the request is not understood: %s", msg).WithHint("see /docs of the server for what it takes")
	var parts []transport.ProblemPart
	for _, d := range details {
		part := transport.ProblemPart{Message: d.Error()}
		if x, ok := d.(huma.ErrorDetailer); ok {
			part = transport.ProblemPart{Location: x.ErrorDetail().Location, Message: x.ErrorDetail().Message}
		}
		e.Message += fmt.Sprintf("; %s: %s", part.Location, part.Message)
		parts = append(parts, part)
	}
	p := transport.ProblemOf(e)
	p.Errors = parts
	return p
}

// routes registers what the server answers: on the mux behind the guard, and in
// the OpenAPI document.
type routes struct {
	s   *Server
	mux *http.ServeMux
	api huma.API
	// known are the routes by pattern.
	known map[string]route
}

func newRoutes(s *Server) *routes {
	rt := &routes{s: s, mux: http.NewServeMux(), known: map[string]route{}}
	schemas := huma.NewMapRegistry("#/components/schemas/", schemaName)
	schemas.RegisterTypeAlias(reflect.TypeFor[time.Duration](), reflect.TypeFor[nanoseconds]())
	rt.api = humago.New(rt, huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info: &huma.Info{Title: "Switchback", Version: "v1", Description: apiDescription,
				License: &huma.License{Name: "Apache-2.0", Identifier: "Apache-2.0"}},
			Components: &huma.Components{Schemas: schemas, SecuritySchemes: map[string]*huma.SecurityScheme{
				"certificate": {Type: "mutualTLS", Description: "a certificate of the installation, such as that in STATE/admin: the bootstrap administrator"},
				"token":       {Type: "http", Scheme: "bearer", Description: "an API token: switchback token create"},
			}},
			Security: []map[string][]string{{"certificate": {}}, {"token": {}}},
		},
		Formats:       map[string]huma.Format{"application/json": huma.DefaultJSONFormat, "json": huma.DefaultJSONFormat},
		DefaultFormat: "application/json",
	})
	return rt
}

const apiDescription = "The control plane of a disaster recovery installation. Instants are RFC 3339, durations nanoseconds. " +
	"Lists come in pages. Errors are problem documents (RFC 9457) with code, reason (detail) and remedy. " +
	"A request that begins an operation may carry an Idempotency-Key: repeated with the same key it begins nothing new and gives the same operation. " +
	"Each answer names its request (X-Request-Id), as the audit log does."

// HandleFunc and ServeHTTP make routes what huma registers on.
func (rt *routes) HandleFunc(pattern string, f func(http.ResponseWriter, *http.Request)) {
	rt.mux.Handle(pattern, rt.s.guard(rt.known[pattern], http.HandlerFunc(f)))
}

func (rt *routes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, pattern := rt.mux.Handler(r); pattern == "" {
		p := transport.ProblemOf(switchback.Errorf(switchback.CodeUnsupported, "this server knows no request %s %s", r.Method, r.URL.Path).
			WithHint("see /docs of the server for what it knows; it may be of another version"))
		p.Status = http.StatusNotFound
		transport.WriteProblem(w, p)
		return
	}
	rt.mux.ServeHTTP(w, r)
}

// route describes one request.
type route struct {
	// ID names it in the document and in clients; Tag is its chapter there.
	ID, Tag string
	// Pattern is method and path.
	Pattern string
	Summary string
	// Need is the role that it takes.
	Need switchback.AccessRole
	// Begins: it begins an operation, and takes the headers of those that do.
	Begins bool
}

func (x route) operation() huma.Operation {
	method, path, _ := strings.Cut(x.Pattern, " ")
	op := huma.Operation{OperationID: x.ID, Method: method, Path: path, Summary: x.Summary, Tags: []string{x.Tag}, DefaultStatus: http.StatusOK,
		Description: "Takes the role " + string(x.Need) + ".", MaxBodyBytes: transport.MaxRequestBytes, BodyReadTimeout: -1,
		Errors: []int{http.StatusBadRequest, http.StatusForbidden}}
	if strings.Contains(path, "{") {
		op.Errors = append(op.Errors, http.StatusNotFound)
	}
	if method != http.MethodGet {
		op.Errors = append(op.Errors, http.StatusConflict, http.StatusUnprocessableEntity, http.StatusServiceUnavailable)
	}
	if x.Begins {
		text := &huma.Schema{Type: huma.TypeString, MaxLength: new(maxKeyLength)}
		op.Parameters = []*huma.Param{
			{Name: keyHeader, In: "header", Schema: text, Description: "chosen by the client; repeated with the same key the request begins nothing new"},
			{Name: breakGlassHeader, In: "header", Schema: &huma.Schema{Type: huma.TypeString, MaxLength: new(maxBreakGlass)},
				Description: "the reason for going on without a second person's approval, where one is needed; it is noted in the audit log"},
		}
	}
	return op
}

// body is an answer with a JSON document.
type body[T any] struct{ Body T }

// handle registers a request with typed parameters and a typed answer. In has
// the fields that huma reads (path, query, header, Body).
func handle[In, Out any](rt *routes, x route, f func(ctx context.Context, in *In) (Out, error)) {
	rt.known[x.Pattern] = x
	huma.Register(rt.api, x.operation(), func(ctx context.Context, in *In) (*body[Out], error) {
		v, err := f(ctx, in)
		if err != nil {
			p := transport.ProblemOf(err)
			p.RequestID = callOf(ctx).id
			return nil, p
		}
		return &body[Out]{v}, nil
	})
}

// plain registers a request by a function that reads it by itself: one line for
// a route whose types need not stand in the document. Its path does.
func (rt *routes) plain(need switchback.AccessRole, pattern string, f func(r *http.Request) (any, error)) {
	x := route{ID: plainID(pattern), Tag: "More", Pattern: pattern, Summary: pattern, Need: need}
	op := x.operation()
	for _, m := range pathParameter.FindAllStringSubmatch(op.Path, -1) {
		op.Parameters = append(op.Parameters, &huma.Param{Name: m[1], In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}})
	}
	anything := map[string]*huma.MediaType{"application/json": {Schema: &huma.Schema{}}}
	op.Responses = map[string]*huma.Response{"200": {Description: "OK", Content: anything}}
	if op.Method != http.MethodGet && op.Method != http.MethodDelete {
		op.RequestBody = &huma.RequestBody{Content: anything}
	}
	rt.api.OpenAPI().AddOperation(&op)
	rt.known[pattern] = x
	rt.HandleFunc(pattern, answer(f).ServeHTTP)
}

// admin registers as plain does, for administrators: s.routeX(rt.admin).
func (rt *routes) admin(pattern string, f func(r *http.Request) (any, error)) {
	rt.plain(switchback.Administrator, pattern, f)
}

var pathParameter = regexp.MustCompile(`\{([a-z]+)(?:\.\.\.)?\}`)

func plainID(pattern string) string {
	words := strings.FieldsFunc(strings.ToLower(pattern), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	return strings.Join(words, "-")
}

// answer adapts a function to an HTTP handler.
func answer(f func(r *http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, v)
	})
}

// nanoseconds stands for time.Duration in the document.
type nanoseconds int64

// Schema implements huma.SchemaProvider.
func (nanoseconds) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeInteger, Format: "int64", Description: "nanoseconds"}
}

// schemaName names a type in the document: with its package, but for the words
// of the domain and the API's own.
func schemaName(t reflect.Type, hint string) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	name, pkg := t.Name(), t.PkgPath()
	if base, arg, ok := strings.Cut(name, "["); ok { // Page[github.com/…/api.VM]
		arg = strings.TrimSuffix(arg, "]")
		path, item := arg[:strings.LastIndex(arg, ".")], arg[strings.LastIndex(arg, ".")+1:]
		return packagePrefix(path) + item + base
	}
	if name == "" {
		return huma.DefaultSchemaNamer(t, hint)
	}
	return packagePrefix(pkg) + name
}

func packagePrefix(path string) string {
	switch last := path[strings.LastIndex(path, "/")+1:]; last {
	case "", "switchback", "api", "transport", "server":
		return ""
	case "agentapi":
		return "Agent"
	default:
		return strings.ToUpper(last[:1]) + last[1:]
	}
}

package transport

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// Limits of one JSON document, in bytes.
const (
	MaxRequestBytes  = 4 << 20
	MaxResponseBytes = 64 << 20
	maxProblemBytes  = 64 << 10
)

// status is the one table from codes to HTTP. Several codes may share a status:
// the code itself travels in the body.
var status = map[switchback.Code]int{
	switchback.CodeInvalid:      http.StatusBadRequest,
	switchback.CodeNotFound:     http.StatusNotFound,
	switchback.CodeConflict:     http.StatusConflict,
	switchback.CodeRefused:      http.StatusUnprocessableEntity,
	switchback.CodeStaleEpoch:   http.StatusPreconditionFailed,
	switchback.CodeUnauthorized: http.StatusForbidden,
	switchback.CodeUnavailable:  http.StatusServiceUnavailable,
	switchback.CodeTimeout:      http.StatusGatewayTimeout,
	switchback.CodeNoSpace:      http.StatusInsufficientStorage,
	switchback.CodeCorrupt:      http.StatusUnprocessableEntity,
	switchback.CodeBitmapLost:   http.StatusConflict,
	switchback.CodeUnsupported:  http.StatusNotImplemented,
	switchback.CodeCancelled:    http.StatusConflict,
	switchback.CodeInternal:     http.StatusInternalServerError,
}

// StatusOf returns the HTTP status of a code.
func StatusOf(code switchback.Code) int {
	if s, ok := status[code]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// RequestIDHeader names a request in the answer, in problems and in the audit log.
const RequestIDHeader = "X-Request-Id"

// Problem is the body of an error: RFC 9457, with code, op, remedy and the
// request's ID as extension members. Detail is the reason.
type Problem struct {
	Type   string          `json:"type" doc:"urn:switchback:error: and the code"`
	Title  string          `json:"title"`
	Status int             `json:"status"`
	Detail string          `json:"detail" doc:"the reason"`
	Code   switchback.Code `json:"code"`
	Op     string          `json:"op,omitempty" doc:"what was being done, or at which site"`
	Remedy string          `json:"remedy,omitempty" doc:"what to do about it"`
	// RequestID is that of the audit log.
	RequestID string `json:"request_id,omitempty"`
	// Errors are the parts of the request that are not valid.
	Errors []ProblemPart `json:"errors,omitempty"`
}

// ProblemPart is one part of a request that is not valid.
type ProblemPart struct {
	Location string `json:"location" doc:"such as body.policy.interval"`
	Message  string `json:"message"`
}

const problemType = "application/problem+json"

// ProblemOf is how an error crosses the wire.
func ProblemOf(err error) *Problem {
	e := switchback.Flatten(err)
	return &Problem{
		Type: "urn:switchback:error:" + string(e.Code), Title: strings.ReplaceAll(string(e.Code), "_", " "),
		Status: StatusOf(e.Code), Detail: e.Message, Code: e.Code, Op: e.Op, Remedy: e.Hint,
	}
}

// Error is the error that the problem carries.
func (p *Problem) Error() string {
	return (&switchback.Error{Code: p.Code, Op: p.Op, Message: p.Detail, Hint: p.Remedy}).Error()
}

// GetStatus and ContentType let a problem be answered by huma.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType is that of a problem, whatever was asked for.
func (p *Problem) ContentType(string) string { return problemType }

// WriteError answers a request with an error. Nothing may have been written before.
func WriteError(w http.ResponseWriter, err error) { WriteProblem(w, ProblemOf(err)) }

// WriteProblem answers a request with a problem, as WriteError does.
func WriteProblem(w http.ResponseWriter, p *Problem) {
	p.RequestID = w.Header().Get(RequestIDHeader)
	w.Header().Set("Content-Type", problemType)
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // the client is gone, or it is not
}

// ReadError returns the *switchback.Error that an answer outside 2xx carries.
// It reads the body, but does not close it.
func ReadError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblemBytes))
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind == problemType {
		var p Problem
		if err := json.Unmarshal(body, &p); err == nil && p.Code != "" {
			return &switchback.Error{Code: p.Code, Op: p.Op, Message: p.Detail, Hint: p.Remedy}
		}
	}
	code := switchback.CodeInternal
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		code = switchback.CodeUnsupported // no such route: the peer is of another version
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		code = switchback.CodeInvalid
	case http.StatusUnauthorized, http.StatusForbidden:
		code = switchback.CodeUnauthorized
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusTooManyRequests:
		code = switchback.CodeUnavailable
	case http.StatusGatewayTimeout:
		code = switchback.CodeTimeout
	}
	text := strings.TrimSpace(string(body[:min(len(body), 200)]))
	where := ""
	if resp.Request != nil {
		where = " to " + resp.Request.Method + " " + resp.Request.URL.Redacted()
	}
	return switchback.Errorf(code, "answer %s%s: %s", resp.Status, where, text)
}

// WriteJSON answers a request with v.
func WriteJSON(w http.ResponseWriter, httpStatus int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		WriteError(w, fmt.Errorf("encode answer: %w", err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpStatus)
	_, _ = w.Write(append(data, '\n'))
}

// ReadJSON decodes a request's body: one document of at most MaxRequestBytes,
// without fields that into does not know. CodeInvalid otherwise.
func ReadJSON(r *http.Request, into any) error {
	body, err := io.ReadAll(io.LimitReader(r.Body, MaxRequestBytes+1))
	if err != nil {
		return switchback.Errorf(switchback.CodeUnavailable, "read request: %w", err)
	}
	if len(body) > MaxRequestBytes {
		return switchback.Errorf(switchback.CodeInvalid, "the request is larger than %d bytes", MaxRequestBytes)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return switchback.Errorf(switchback.CodeInvalid, "request is not understood: %v", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return switchback.Errorf(switchback.CodeInvalid, "request is not understood: more than one JSON document")
	}
	return nil
}

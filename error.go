package switchback

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Code classifies an Error. It survives the wire unchanged.
type Code string

const (
	// CodeInvalid: the request can never succeed as it stands.
	CodeInvalid Code = "invalid"
	// CodeNotFound: the thing named does not exist.
	CodeNotFound Code = "not_found"
	// CodeConflict: the thing exists already, or is in another state than the request needs.
	CodeConflict Code = "conflict"
	// CodeRefused: the state machine or a guard does not allow this now; Hint says the remedy.
	CodeRefused Code = "refused"
	// CodeStaleEpoch: the sender holds an older epoch than the receiver.
	CodeStaleEpoch Code = "stale_epoch"
	// CodeUnauthorized: no valid identity, or one without the right to do this.
	CodeUnauthorized Code = "unauthorized"
	// CodeUnavailable: a peer, hypervisor or store cannot be reached now; trying again may help.
	CodeUnavailable Code = "unavailable"
	// CodeTimeout: a deadline passed; the effect may or may not have happened.
	CodeTimeout Code = "timeout"
	// CodeNoSpace: a file system or pool has no room.
	CodeNoSpace Code = "no_space"
	// CodeCorrupt: stored or received data does not match its checksum or form.
	CodeCorrupt Code = "corrupt"
	// CodeBitmapLost: the hypervisor no longer has a valid dirty bitmap for a checkpoint; a resync is needed.
	CodeBitmapLost Code = "bitmap_lost"
	// CodeUnsupported: this VM, disk or hypervisor cannot do what was asked.
	CodeUnsupported Code = "unsupported"
	// CodeCancelled: the operation was cancelled on request.
	CodeCancelled Code = "cancelled"
	// CodeInternal: a defect or an unclassified failure.
	CodeInternal Code = "internal"
)

// Error is the one error type that crosses package and process borders.
type Error struct {
	Code Code `json:"code"`
	// Op is what was being done, e.g. "libvirt.BeginBackup"; may be empty.
	Op string `json:"op,omitempty"`
	// Message says what is wrong, in lower case, for an operator.
	Message string `json:"message"`
	// Hint says what to do about it; may be empty.
	Hint string `json:"hint,omitempty"`
	// Err is the cause; it does not cross the wire.
	Err error `json:"-"`
}

// Error prints message, cause and hint on one line.
func (e *Error) Error() string {
	s := e.Message
	if e.Op != "" {
		s = e.Op + ": " + s
	}
	if e.Err != nil {
		if cause := e.Err.Error(); cause != "" { // empty: it stands in the message already
			if s != "" {
				s += ": "
			}
			s += cause
		}
	}
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error with a formatted message. A %w verb sets the cause.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: hidden{errors.Unwrap(err)}.orNil()}
}

// WithHint returns a copy of e that carries the remedy.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// hidden wraps a cause whose text already stands in the message, so that it
// is found by errors.Is and errors.As but not printed twice.
type hidden struct{ err error }

func (h hidden) orNil() error {
	if h.err == nil {
		return nil
	}
	return h
}
func (h hidden) Error() string { return "" }
func (h hidden) Unwrap() error { return h.err }

// Flatten turns any error but nil into an Error without a cause, as it is
// stored and sent: the cause's text becomes part of the message. An ended
// context is CodeTimeout or CodeCancelled.
func Flatten(err error) *Error {
	var e *Error
	if !errors.As(err, &e) {
		flat := &Error{Code: CodeInternal, Message: err.Error()}
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			flat.Code = CodeTimeout
		case errors.Is(err, context.Canceled):
			flat.Code = CodeCancelled
		}
		return flat
	}
	if err == error(e) { // not wrapped: its parts stay apart
		bare := Error{Message: e.Message, Err: e.Err}
		return &Error{Code: e.Code, Op: e.Op, Message: bare.Error(), Hint: e.Hint}
	}
	text := err.Error()
	if e.Hint != "" {
		text = strings.TrimSuffix(text, " ("+e.Hint+")")
	}
	return &Error{Code: e.Code, Message: text, Hint: e.Hint}
}

// CodeOf returns the code of the outermost Error in err's chain: "" for nil,
// CodeInternal for an error that carries none.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// IsRetryable reports whether trying the same thing again later may succeed
// without anybody changing anything.
func IsRetryable(err error) bool {
	switch CodeOf(err) {
	case CodeUnavailable, CodeTimeout, CodeNoSpace:
		return true
	}
	return false
}

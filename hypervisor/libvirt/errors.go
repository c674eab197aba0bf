package libvirt

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	switchback "github.com/switchback-dr/switchback"
)

// Numbers of virErrorNumber (libvirt/virterror.h) that the driver tells apart.
const (
	errInternal               = 1
	errNoSupport              = 3
	errNoConnect              = 5
	errInvalidConn            = 6
	errInvalidDomain          = 7
	errInvalidArg             = 8
	errOperationFailed        = 9
	errXML                    = 27
	errDomainExists           = 28
	errOperationDenied        = 29
	errXMLDetail              = 35
	errSystem                 = 38
	errRPC                    = 39
	errNoDomain               = 42
	errNoNetwork              = 43
	errAuthFailed             = 45
	errOperationInvalid       = 55
	errConfigUnsupported      = 67
	errOperationTimeout       = 68
	errHookFailed             = 70
	errArgumentUnsupported    = 74
	errOperationAborted       = 78
	errBlockCopyActive        = 83
	errOperationUnsupported   = 84
	errAgentUnresponsive      = 86
	errResourceBusy           = 87
	errAccessDenied           = 88
	errXMLInvalidSchema       = 92
	errAuthUnavailable        = 94
	errAgentUnsynced          = 97
	errDeviceMissing          = 99
	errInvalidCheckpoint      = 102
	errNoCheckpoint           = 103
	errNoBackup               = 104
	errCheckpointInconsistent = 109
)

// Error is an error as libvirt reported it.
type Error struct {
	// Number is virErrorNumber, e.g. 42 for a domain that does not exist.
	Number int
	// Domain is virErrorDomain: the part of libvirt that speaks.
	Domain int
	// Message is libvirt's text.
	Message string
	// Errno is the system's error number where Number is 38 (system error).
	Errno int
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the system's error, if libvirt reported one.
func (e *Error) Unwrap() error {
	if e.Number == errSystem && e.Errno > 0 {
		return syscall.Errno(e.Errno)
	}
	return nil
}

// decodeError reads virNetMessageError.
func decodeError(payload []byte) error {
	r := &result{b: payload}
	e := &Error{Number: int(r.i32()), Domain: int(r.i32()), Message: r.optional()}
	r.i32() // level
	if r.present() {
		r.domain()
	}
	r.optional()
	r.optional()
	r.optional()
	e.Errno = int(r.i32())
	if e.Number == 0 && r.err != nil {
		return fmt.Errorf("read libvirt's error: %w", r.err)
	}
	if e.Message == "" {
		e.Message = "libvirt gave no reason"
	}
	return e
}

// numberOf returns libvirt's error number in err's chain, 0 when there is none.
func numberOf(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Number
	}
	return 0
}

// isNumber reports whether err is one of libvirt's errors with these numbers.
func isNumber(err error, numbers ...int) bool {
	n := numberOf(err)
	for _, v := range numbers {
		if n == v && n != 0 {
			return true
		}
	}
	return false
}

// codeOf classifies an error that came from libvirt.
func codeOf(e *Error) switchback.Code {
	switch e.Number {
	case errNoDomain, errNoCheckpoint, errInvalidCheckpoint, errNoBackup:
		return switchback.CodeNotFound
	case errOperationInvalid, errOperationTimeout, errDomainExists, errOperationAborted, errBlockCopyActive, errResourceBusy:
		return switchback.CodeConflict
	case errCheckpointInconsistent:
		return switchback.CodeBitmapLost
	case errNoSupport, errConfigUnsupported, errArgumentUnsupported, errOperationUnsupported:
		return switchback.CodeUnsupported
	case errInvalidArg, errXML, errXMLDetail, errXMLInvalidSchema, errNoNetwork, errInvalidDomain, errDeviceMissing:
		return switchback.CodeInvalid
	case errHookFailed:
		return switchback.CodeRefused
	case errAuthFailed, errAuthUnavailable, errAccessDenied, errOperationDenied:
		return switchback.CodeUnauthorized
	case errNoConnect, errInvalidConn, errAgentUnresponsive, errAgentUnsynced:
		return switchback.CodeUnavailable
	case errSystem:
		switch syscall.Errno(e.Errno) {
		case syscall.ENOSPC, syscall.EDQUOT:
			return switchback.CodeNoSpace
		case syscall.ENOENT:
			return switchback.CodeInvalid
		}
	}
	return switchback.CodeInternal
}

// hintOf says what to do about an error, where that is known.
func hintOf(e *Error) string {
	switch e.Number {
	case errOperationTimeout:
		return "another job holds the domain; try again when it has ended"
	case errCheckpointInconsistent:
		return "the bitmap did not survive; resynchronise"
	case errAuthFailed, errAuthUnavailable:
		return `run as root, or set auth_unix_rw = "none" in libvirtd.conf`
	}
	return ""
}

// wrap turns any error of a call into a *switchback.Error that says op. An
// error that is one already keeps its code, message and hint.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var known *switchback.Error
	if errors.As(err, &known) {
		c := *known
		if c.Op == "" {
			c.Op = op
		}
		return &c
	}
	out := &switchback.Error{Code: switchback.CodeInternal, Op: op, Err: err}
	var e *Error
	var m *monitorError
	switch {
	case errors.As(err, &m):
		out.Code, out.Message = switchback.CodeUnsupported, m.Error()
	case errors.As(err, &e):
		out.Code, out.Message, out.Hint = codeOf(e), err.Error(), hintOf(e)
		out.Err = cause{err}
	case errors.Is(err, context.DeadlineExceeded):
		out.Code, out.Message = switchback.CodeTimeout, "libvirt did not answer in time"
	case errors.Is(err, context.Canceled):
		out.Code, out.Message = switchback.CodeCancelled, "given up before libvirt answered"
	default:
		out.Message = "unexpected answer"
	}
	return out
}

// cause prints as libvirt's number only, because the message is printed beside it.
type cause struct{ err error }

func (c cause) Error() string { return fmt.Sprintf("libvirt error %d", numberOf(c.err)) }
func (c cause) Unwrap() error { return c.err }

// conflict makes the error for a domain in another state than the call needs.
func conflict(format string, a ...any) *switchback.Error {
	return switchback.Errorf(switchback.CodeConflict, format, a...)
}

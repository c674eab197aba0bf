package nbd

import (
	"fmt"
	"syscall"

	switchback "github.com/switchback-dr/switchback"
)

// ServerError is an error the server answered to a request. The connection
// stays usable after it.
type ServerError struct {
	Errno   syscall.Errno // errors.Is(err, syscall.ENOSPC) and the like work
	Message string        // the server's own words; may be empty
}

func (e *ServerError) Error() string {
	if e.Message == "" {
		return e.Errno.Error()
	}
	return fmt.Sprintf("%v: %s", e.Errno, e.Message)
}

func (e *ServerError) Unwrap() error { return e.Errno }

// errnoOf gives a wire error its number on this system.
func errnoOf(wire uint32) syscall.Errno {
	switch wire {
	case errnoPerm:
		return syscall.EPERM
	case errnoNoMem:
		return syscall.ENOMEM
	case errnoInval:
		return syscall.EINVAL
	case errnoNoSpace:
		return syscall.ENOSPC
	case errnoOverflow:
		return syscall.EOVERFLOW
	case errnoNotSup:
		return syscall.ENOTSUP
	case errnoShutdown:
		return syscall.ESHUTDOWN
	}
	return syscall.EIO
}

// codeOfErrno classifies an answered error.
func codeOfErrno(e syscall.Errno) switchback.Code {
	switch e {
	case syscall.EPERM:
		return switchback.CodeRefused
	case syscall.EINVAL, syscall.EOVERFLOW:
		return switchback.CodeInvalid
	case syscall.ENOSPC:
		return switchback.CodeNoSpace
	case syscall.ENOTSUP:
		return switchback.CodeUnsupported
	case syscall.ENOMEM, syscall.ESHUTDOWN:
		return switchback.CodeUnavailable
	}
	return switchback.CodeInternal
}

// protocolError says how the peer broke the protocol; it ends the connection.
type protocolError string

func (e protocolError) Error() string { return "nbd protocol: " + string(e) }

func protocolErrorf(format string, args ...any) error {
	return protocolError(fmt.Sprintf(format, args...))
}

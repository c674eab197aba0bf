// Package libvirt drives QEMU virtual machines through libvirt. It speaks the
// remote protocol of libvirtd (and of the modular virtqemud) over the local
// unix socket in pure Go: no cgo, no libvirt client library, no thread-local
// errors.
//
// # The protocol
//
// The protocol is an XDR (RFC 4506) call protocol. It is described by three
// files of libvirt's source, rpc/virnetprotocol.x, remote/remote_protocol.x
// and remote/qemu_protocol.x; procedure numbers and argument layouts are only
// ever appended to, which is how old clients keep working with new daemons.
// Every message is
//
//	bytes 0..3    length of the message, these four bytes included
//	bytes 4..7    program: remote 0x20008086, qemu 0x20008087, keep-alive 0x6b656570
//	bytes 8..11   program version, 1
//	bytes 12..15  procedure
//	bytes 16..19  type: 0 call, 1 reply, 2 message (event or keep-alive), 3 stream
//	bytes 20..23  serial: a reply repeats its call's, messages have 0
//	bytes 24..27  status: 0 good, 1 the payload is an error, 2 stream goes on
//	bytes 28..    payload: the procedure's arguments, result, or the error
//
// # Connections
//
// libvirtd reads no more from a client that has max_client_requests (5 by
// default, the read buffer counts as one) calls pending, keep-alive messages
// included. A connection here therefore never has more than four calls under
// way; a call that its caller gave up still counts until libvirtd answers it.
// Because one blocked call (libvirt waits up to 30 s for a domain's job lock)
// must not stop the others, calls that may block are spread by domain over
// several connections, and queries have one of their own. Each Events
// subscription has one, too.
//
// A connection is made when it is first needed, and anew when it was lost.
// Calls under way when it is lost fail with CodeUnavailable: whether they took
// effect is not known. Nothing is ever sent twice.
//
// # Errors
//
// Every error is a *switchback.Error; libvirt's own number, domain and text
// are reachable as *Error through errors.As.
package libvirt

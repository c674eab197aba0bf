// Package nbd speaks the network block device protocol, as client and as
// read-only server. It is how disks are read from a hypervisor's backup job,
// how bases are written through qemu-nbd, and how views of recovery points are
// served to guests.
//
// The protocol is the fixed newstyle one of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; section
// names in comments refer to that document. Structured replies, block status
// and metadata contexts are used where the peer has them. TLS and extended
// headers are not: connections are local sockets or run inside a tunnel that
// is already authenticated.
//
// All numbers on the wire are big endian:
//
//	request          magic u32 25609513 | flags u16 | command u16 | handle u64 | offset u64 | length u32 [| payload of a write]
//	simple reply     magic u32 67446698 | errno u32 | handle u64 [| payload of a read]
//	structured chunk magic u32 668e33ef | flags u16 | type u16 | handle u64 | length u32 | payload
//	option           magic u64 IHAVEOPT | option u32 | length u32 | data
//	option reply     magic u64 0003e889045565a9 | option u32 | type u32 | length u32 | data
//
// Neither side trusts the other: every length is bounded before memory is
// taken for it, and a peer that breaks the protocol loses its connection. A
// Client returns an error rather than bytes that were not all received.
package nbd

// Package guest makes the lab's guests: a kernel and an initrd (Build), disks
// with known content (MakeDisk), the domain's definition (DomainXML), and a
// client of the guest's control port (Dial). What runs inside is the program in
// lab/guest/workload.
//
// # Disks
//
// A disk has no partitions. From its start lies an ext4 file system (optional)
// with files that its manifest lists (package lab/guest/manifest), then free
// room, at RecordOffset the ring of records (package lab/guest/record, Slots × 4
// KiB), and from DirtyOffset to the end room for changes on command. The
// offsets are the same in all sizes; the smallest disk is MinDiskBytes.
//
//	0            RecordOffset   DirtyOffset          size
//	| ext4 … free | records …   | changes on command |
//
// # Console
//
// The guest says what happens on its serial console, which the domain appends to
// /var/log/libvirt/qemu/NAME.console. Lines of interest start with "SB " and end
// with the guest's clock (nanoseconds since 1970, set from the RTC and so within
// half a second of the host's) and the milliseconds since its kernel started:
//
//	SB BOOT <boot id, 32 hex digits> vm=<uuid> t=… up=…
//	SB MOUNTED <disk> ms=<taken> t=… up=…
//	SB CHECKED <bytes> ok ms=<taken> t=… up=…       the disk's files were read cold and are right
//	SB CHECKED <bytes> BAD ms=<taken> error=<why> t=… up=…
//	SB RESUME seq=<highest valid record found, 0 if none> boot=<its boot id> t=… up=…
//	SB ACK <first>-<last> t=… up=…                  these records are durable
//	SB EIO <read|write|dirty|lat> [seq=<n>] disk=<disk> errno=<n> t=… up=…
//	SB SHUTDOWN cause=<button|agent|command> t=… up=…
//	SB POWEROFF seq=<newest durable record> errors=<n> cause=… t=… up=…   the last words; ACK lines may follow
//	SB FAIL <why> t=… up=…
package guest

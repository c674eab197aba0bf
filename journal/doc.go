// Package journal keeps the recovery points of protected VMs at their target:
// per VM a replica, which is one base image per disk and one immutable segment
// file per point. A point is readable at once as its base overlaid by all
// segments up to it (View); older points are folded into the base (Fold), and
// points in the middle are merged into newer ones (Merge).
//
// # Guarantees
//
//   - A point that Receive returned is durable and complete; one that it did
//     not return leaves nothing behind.
//   - Content is checked end to end: the checksum made where the source
//     gathered the bytes is checked by the receiver and again at every read.
//     A mismatch is an error with CodeCorrupt that names segment, disk and
//     range; it is never wrong data. Bases are checked against checksums
//     beside them, but for what is unproven: original disks until a fold has
//     written or a check has read the place.
//   - A crash at any write needs no repair. Intentions (fold, drop) are in the
//     manifest before their first effect, and Open completes or forgets them. A
//     merge needs none: its segment replaces the newest of those it has taken in
//     by rename, and Open removes the others.
//   - Fold, Merge and DropAfter never take away what a pin needs, nor a locked
//     point, nor anything while pins or marks cannot be read.
//
// The caller owes: bases are created before they are used and written only
// through the BaseWriters it passes; a view that must last is pinned before it
// is opened.
//
// # A replica's directory
//
//	manifest.json               what the base stands for; see Manifest
//	lock                        held with flock by the process that has it open
//	segments/%016d.seg          one per point, named by its sequence
//	segments/%016d-*.tmp        being received; removed at Open
//	branches/NAME.seg           one per branch; see below
//	branches/NAME-*.tmp         being written; removed at Open
//	pins/NAME.json              one per pin
//	marks.json                  what is said of points: tags, locks, proofs
//	sums/DISK.sum               checksums of a base; see basesum.go
//	definition.json             the VM's definition, as its source last said
//	check.json                  how far a check is, and what the last one found
//	samples.log                 what points' content looks like; statistics
//
// manifest.json, marks.json, definition.json and pins are {"version", "checksum", "content"}: the checksum
// is xxh3-128 (hexadecimal) of the compact JSON of content. They are replaced
// by write-temp, fsync, rename, fsync directory.
//
// # A segment, version 1
//
// The same bytes on the wire and on disk. Integers are little-endian; a
// uvarint is that of encoding/binary, a svarint its zigzag form. A sector is
// 512 bytes; offsets, lengths and sizes on disks are multiples of it.
//
//	header
//	   0   8  magic "SBSEGMNT"
//	   8   4  version, 1
//	  12   4  length M of the meta data, at most 1 MiB
//	  16   M  meta data: Header as JSON
//	16+M  16  xxh3-128 of the bytes before, big-endian
//	frames, one after the other
//	   0   1  'F'
//	   1   1  codec: 0 none, 1 s2, 2 zstd
//	   2   2  disk, an index into Header.Disks
//	   4   1  raw length in sectors, less 1 (0..127: 512 bytes to 64 KiB)
//	   5   3  stored length S in bytes (1..65536; the raw length for codec none)
//	   8   8  low half of the checksum (xxh3-128 of the raw content)
//	  16   S  stored bytes
//	index
//	   0   1  'I'
//	   1   7  zero
//	   8   8  packed length P
//	  16   8  plain length: of the packed part when decompressed
//	  24   8  number of frames F
//	  32   P  packed part, zstd
//	32+P 16F  checksums of the frames, 16 bytes each, big-endian
//	footer
//	   0   8  magic "SBSEGEND"
//	   8   8  file offset of the index
//	  16   8  length of the index, 32+P+16F
//	  24   8  data bytes: sum of the raw lengths
//	  32   8  zero bytes: sum of the zero extents
//	  40  32  digest: BLAKE3-256 of header and index
//	  72   8  xxh3-64 of the 72 bytes before
//
// The packed part of the index, decompressed, is in columns:
//
//	uvarint  number of disks D, that of the header
//	F x 2    disk of each frame
//	F x 1    codec of each frame
//	F x 1    raw length of each frame in sectors, less 1
//	F x 3    stored length of each frame
//	D times, one list for each disk:
//	  uvarint number of data extents; for each
//	    svarint  sectors from the end of the extent before (0 for the first) to its start
//	    uvarint  sectors in it
//	  uvarint number of zero extents, and the same for each
//
// The frames of one disk, decompressed and put together, are its stream; its
// data extents, in order, say where on the disk the bytes of the stream
// belong. A frame may thus gather many scattered extents and an extent may
// span frames. Extents of one disk never overlap, data or zero. Frames follow
// each other without gap from the end of the header to the index, so their
// file offsets are sums.
//
// Content is covered by the digest through the checksums in the index.
//
// # A merged segment
//
// It has the same form and the name of the point that it ends in. Its header is
// that of the point's segment as it was received, with one more member:
//
//	"merged": {
//	  "digest":           the digest of the segment as it was received
//	  "continues":        the sequence of the point that it follows now
//	  "continues_digest": the digest of that point; absent when empty
//	  "fresh":            [names of disks], absent when there are none
//	}
//
// "digest" identifies the point, and is what the next segment's parent names; the
// digest in the footer is that of the file. "parent" remains as received. A
// segment that is not merged follows the point sequence-1, whose digest is its
// parent. Of a fresh disk nothing counts that older segments or the base hold.
// A segment of which damaged frames were put back (Replica.Mend) has this form,
// too, and continues what it continued before.
// Files between "continues" and the segment itself are left by a crash and no
// part of the chain.
//
// # A branch
//
// It holds what was written to a VM that ran from a point and left it, and reads as
// that point overlaid by this segment. It has the same form, in branches/, under its
// name, under which it is also sealed: "branch/NAME". Its header has one more member:
//
//	"branch": {
//	  "name":   letters, digits, dots, dashes and underscores, as its file's
//	  "pin":    the pin that keeps its parent; it is removed only after the branch
//	  "whole":  true if all of every disk is in the segment, as in a fresh disk;
//	            "parent" and "sequence" are of no account then
//	}
//
// "sequence" is the parent point's plus 1 and "parent" the parent's digest, as in the
// segment of the point that came after it, if one did; "time" is when the run ended.
// A branch is no part of the chain: nothing follows it, and it is never sent.
//
// A manifest with "detached" is of a directory that holds nothing but a branch that
// is whole: no bases, no points. One with "folded_branch" is of a replica whose
// bases have begun to take in the branch of that name, in a commit: then only it
// can be read, as the point that its parent was under what it holds.
package journal

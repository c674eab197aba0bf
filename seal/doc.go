// Package seal encrypts files at rest: AES-256-GCM in chunks that are read at
// random, under data keys that are themselves wrapped by a key nobody stores
// beside the data.
//
// # Keys
//
// A Keyring belongs to one owner (a replica). It holds data keys, each wrapped
// by a Wrapper: a key file, or an external command in front of a key manager.
// The newest data key seals new files; older ones stay to open theirs. Rotate
// adds a data key, Rewrap changes the wrapping. Neither rewrites data.
//
// # A sealed file, version 1
//
//	 0   8  magic "SBSEALED"
//	 8   4  version, 1, little-endian
//	12   4  zero
//	16  16  ID of the data key
//	32  32  salt, random
//	64      chunks: 64 KiB of content each, the last 1 byte to 64 KiB (none
//	        only in an empty file), each followed by its 16-byte tag
//
// The key of a file is HKDF-SHA256(data key, salt, "switchback file v1 " + the
// file's name, as its owner knows it). The nonce of a chunk is its number in 11
// bytes, big-endian, and a byte that is 1 in the last chunk, else 0; its
// additional data is the first 64 bytes of the file. An empty file has one empty last chunk.
//
// # Guarantees
//
//   - Nothing that was not sealed under this name is ever returned: changed,
//     moved, shortened, lengthened or exchanged content is CodeCorrupt.
//   - A file key is never used twice: each file has its own salt.
//   - A wrong or missing key is CodeUnauthorized, not CodeCorrupt: the data may be well.
package seal

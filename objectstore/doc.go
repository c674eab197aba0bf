// Package objectstore keeps immutable files in an S3 bucket: written once, read
// at random, listed, removed, and held against removal where the bucket has
// object lock.
//
// # Guarantees
//
//   - An object exists wholly or not at all: Put returns when the store has
//     acknowledged all of it, and never replaces an object of the same name
//     (CodeConflict), unless it has the same size and checksum.
//   - What is read was checked by TLS at most; who needs more seals or
//     checksums the content, as the journal does.
//   - Errors say what to do: CodeUnavailable (the store does not answer; try
//     again), CodeUnauthorized, CodeNotFound, CodeNoSpace (quota), CodeRefused (held).
package objectstore

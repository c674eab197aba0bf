// Package switchback is the vocabulary of Switchback, disaster recovery for
// virtual machines: the words of docs/glossary.md as types, states and errors.
// It does no I/O, reads no clock and starts no goroutine; everything else in
// the module speaks in its terms.
package switchback

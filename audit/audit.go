// Package audit is the form of the audit log: what an entry says, how entries
// are chained, and how a chain is verified. It is pure; package store keeps the
// entries.
//
// # Chain
//
// Each entry carries the hash of the entry before ("" for the first) and its own:
//
//	Hash = hex(SHA-256(JSON of the entry with Hash = ""))
//
// with the fields in the order of Entry and the instant in microseconds, UTC. A
// field that is added must be left out of the JSON where it is empty, so that
// entries of before keep their hashes (TestGolden). So
// an entry that is changed, removed from or inserted into the middle breaks the
// chain. Entries removed from the end are found by the head, which is kept apart.
//
// # What it does not do
//
// Whoever can write the database can write the whole log and its head anew. A
// head that was noted elsewhere (an export, a printed line of audit verify)
// shows that: Verifier.Expect.
package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Outcomes of what was asked.
const (
	// Asked: it is about to be done; an entry with the same request says how it
	// went. Where there is none the server died meanwhile.
	Asked = "asked"
	// Done: it was done, or has begun as an operation of its own.
	Done = "done"
	// Failed: it was not done, for the reason in Code and Detail.
	Failed = "failed"
	// Refused: who asked may not do this.
	Refused = "refused"
)

// Entry is one line of the log.
type Entry struct {
	// Sequence is 1 for the first entry.
	Sequence int64     `json:"sequence"`
	At       time.Time `json:"at"`
	// Request is the ID of the request, "" for what the server does by itself.
	Request string `json:"request,omitempty"`
	// Who asked, with which role, and how they proved it.
	Who  string                `json:"who"`
	Role switchback.AccessRole `json:"role,omitempty"`
	Via  string                `json:"via,omitempty"`
	// Action is what was asked, Object on what.
	Action  string `json:"action"`
	Object  string `json:"object,omitempty"`
	Outcome string `json:"outcome"`
	// Code is that of the error of what failed or was refused.
	Code switchback.Code `json:"code,omitempty"`
	// Detail is what was asked in full, or what came of it.
	Detail string `json:"detail,omitempty"`
	// Previous and Hash chain the entries.
	Previous string `json:"previous"`
	Hash     string `json:"hash"`
}

// Chained returns the entry as it follows head.
func (e Entry) Chained(head Head) Entry {
	e.Sequence, e.Previous = head.Sequence+1, head.Hash
	e.At = e.At.UTC().Truncate(time.Microsecond)
	e.Hash = e.sum()
	return e
}

func (e Entry) sum() string {
	e.Hash = ""
	e.At = e.At.UTC()
	data, err := json.Marshal(e)
	if err != nil { // an instant beyond the year 9999
		return "not to be hashed: " + err.Error()
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Head names the newest entry of a log.
type Head struct {
	Sequence int64  `json:"sequence"`
	Hash     string `json:"hash"`
}

// String is "sequence:hash", as ParseHead reads it.
func (h Head) String() string { return strconv.FormatInt(h.Sequence, 10) + ":" + h.Hash }

// ParseHead is the inverse of Head.String.
func ParseHead(text string) (Head, error) {
	n, hash, ok := strings.Cut(text, ":")
	seq, err := strconv.ParseInt(n, 10, 64)
	if !ok || err != nil || len(hash) != 2*sha256.Size {
		return Head{}, switchback.Errorf(switchback.CodeInvalid, "%q is no head of an audit log", text).WithHint("SEQUENCE:HASH, as audit verify prints it")
	}
	return Head{Sequence: seq, Hash: hash}, nil
}

// Problem is one place where a log is not what it was.
type Problem struct {
	Sequence int64  `json:"sequence"`
	What     string `json:"what"`
}

// Verdict says whether a log is whole.
type Verdict struct {
	Entries int64 `json:"entries"`
	Head    Head  `json:"head"`
	// Problems are the first ones found; none: it is whole.
	Problems []Problem `json:"problems,omitempty"`
	// Unanswered are requests that the server died in: asked, and no outcome.
	Unanswered []string `json:"unanswered,omitempty"`
}

// maxProblems is how many problems and unanswered requests a verdict names.
const maxProblems = 20

// Verifier judges the entries of a log, given one after another.
type Verifier struct {
	// Expect, if set, are heads that were noted before.
	Expect  []Head
	verdict Verdict
	open    map[string]bool
}

func (v *Verifier) problem(seq int64, format string, args ...any) {
	if len(v.verdict.Problems) < maxProblems {
		v.verdict.Problems = append(v.verdict.Problems, Problem{Sequence: seq, What: fmt.Sprintf(format, args...)})
	}
}

// Add judges the next entry.
func (v *Verifier) Add(e Entry) {
	head := v.verdict.Head
	switch {
	case e.Sequence > head.Sequence+1:
		v.problem(head.Sequence+1, "%d entries are missing", e.Sequence-head.Sequence-1)
	case e.Sequence <= head.Sequence:
		v.problem(e.Sequence, "it comes after entry %d", head.Sequence)
	}
	if e.Previous != head.Hash && e.Sequence == head.Sequence+1 {
		v.problem(e.Sequence, "it does not continue entry %d: one of them was changed, or one between them inserted or removed", head.Sequence)
	}
	if sum := e.sum(); sum != e.Hash {
		v.problem(e.Sequence, "it was changed: its content has another hash than it says")
	}
	for _, x := range v.Expect {
		if x.Sequence == e.Sequence && x.Hash != e.Hash {
			v.problem(e.Sequence, "it is another one than was noted: the log was written anew")
		}
	}
	if v.open == nil {
		v.open = map[string]bool{}
	}
	switch {
	case e.Outcome == Asked:
		v.open[e.Request] = true
	case e.Request != "":
		delete(v.open, e.Request)
	}
	v.verdict.Entries++
	v.verdict.Head = Head{Sequence: e.Sequence, Hash: e.Hash}
}

// End returns the verdict; kept is the head that is kept apart, nil for none.
func (v *Verifier) End(kept *Head) Verdict {
	head := v.verdict.Head
	switch {
	case kept == nil || *kept == head:
	case kept.Sequence > head.Sequence:
		v.problem(head.Sequence+1, "%d entries are missing at the end", kept.Sequence-head.Sequence)
	case kept.Sequence < head.Sequence:
		v.problem(kept.Sequence+1, "%d entries were added behind the log's back", head.Sequence-kept.Sequence)
	default:
		v.problem(head.Sequence, "it is not the entry that was written last")
	}
	for _, x := range v.Expect {
		if x.Sequence > head.Sequence {
			v.problem(x.Sequence, "it was noted, and is missing")
		}
	}
	for id := range v.open {
		if len(v.verdict.Unanswered) < maxProblems {
			v.verdict.Unanswered = append(v.verdict.Unanswered, id)
		}
	}
	return v.verdict
}

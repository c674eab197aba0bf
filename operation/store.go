package operation

import (
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Filter chooses operations. Zero fields do not restrict.
type Filter struct {
	Protection switchback.ProtectionID
	Kind       string
	State      State
	// Unfinished leaves out operations that have ended.
	Unfinished bool
	// Before leaves out this operation and newer ones: the last ID of a page
	// continues with the next.
	Before switchback.OperationID
	// Limit is the most to return; 0 means 100.
	Limit int
}

// Store keeps operations. Every method is one transaction and is durable when
// it returns nil; records it returns are the caller's own.
type Store interface {
	// CreateOperation stores a new record. CodeConflict: the ID or the request's
	// key exists, or an unfinished operation works on the same protection in the
	// same lane.
	CreateOperation(ctx context.Context, rec Record) error
	// Operation returns one record, or CodeNotFound.
	Operation(ctx context.Context, id switchback.OperationID) (Record, error)
	// Operations returns records, newest first.
	Operations(ctx context.Context, f Filter) ([]Record, error)

	// ClaimableOperations lists unfinished operations whose lease owner holds,
	// nobody holds, or has expired; oldest first.
	ClaimableOperations(ctx context.Context, owner string, now time.Time) ([]switchback.OperationID, error)
	// ClaimOperation takes the lease of an operation that is claimable and
	// returns the record with its new epoch, or CodeConflict.
	ClaimOperation(ctx context.Context, id switchback.OperationID, owner string, now, until time.Time) (Record, error)
	// SaveOperation replaces a record, except CancelRequested, of which it
	// returns what is stored. CodeConflict: rec.Lease is not the newest.
	// CodeCancelled: rec sets Irreversible for the first time, but a cancel was
	// requested; nothing was written.
	SaveOperation(ctx context.Context, rec Record) (cancelRequested bool, err error)
	// RequestCancel sets CancelRequested of a queued or running operation that
	// is not Irreversible. Idempotent: nil also for one that is being undone or
	// is cancelled. Otherwise CodeRefused.
	RequestCancel(ctx context.Context, id switchback.OperationID) error
	// ReleaseOperation replaces a record that awaits approval by a queued one,
	// CancelRequested included. CodeConflict: it does not await it any more.
	ReleaseOperation(ctx context.Context, rec Record) error
	// ReopenOperation replaces a failed record by an unfinished one without a
	// lease. CodeConflict: it is not failed any more, or a newer operation on
	// the same protection and lane exists.
	ReopenOperation(ctx context.Context, rec Record) error

	// AppendOperationLog adds a line, giving it the next sequence.
	AppendOperationLog(ctx context.Context, id switchback.OperationID, line LogLine) error
	// OperationLog returns the lines with a sequence above after, in order.
	OperationLog(ctx context.Context, id switchback.OperationID, after int64) ([]LogLine, error)
}

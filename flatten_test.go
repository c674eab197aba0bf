package switchback

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFlatten(t *testing.T) {
	inner := Errorf(CodeNoSpace, "pool is full").WithHint("add a disk")
	for _, c := range []struct {
		err  error
		want Error
	}{
		{context.DeadlineExceeded, Error{Code: CodeTimeout, Message: "context deadline exceeded"}},
		{inner, *inner},
		{&Error{Code: CodeTimeout, Op: "nbd.Read", Message: "no answer", Err: context.Canceled},
			Error{Code: CodeTimeout, Op: "nbd.Read", Message: "no answer: context canceled"}},
		{context.Canceled, Error{Code: CodeCancelled, Message: "context canceled"}},
		{wrapped{inner}, Error{Code: CodeNoSpace, Message: "write: pool is full", Hint: "add a disk"}},
	} {
		if diff := cmp.Diff(c.want, *Flatten(c.err)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.err, diff)
		}
	}
}

type wrapped struct{ err error }

func (w wrapped) Error() string { return "write: " + w.err.Error() }
func (w wrapped) Unwrap() error { return w.err }

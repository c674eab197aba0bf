package api

import (
	"context"
	"net/http"
	"testing"

	"github.com/switchback-dr/switchback/operation"
)

// Once a defect (half-line): a server killed in the middle of a record ends the watch.
func TestOnceHalfLine(t *testing.T) {
	n := 0
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if n++; n == 1 {
			w.Write([]byte("event: operation\ndata: {\"id\":\"op-1\",\"sta"))
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		sendEvent(t, w, "", operation.Record{ID: "op-1", State: operation.StateSucceeded})
	})
	if err := c.Watch(context.Background(), "op-1", func(operation.Record) {}); err != nil {
		t.Error(err)
	}
}

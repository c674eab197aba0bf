package api

import (
	"context"
	"encoding/json"
	"net/http"
	"testing"

	"github.com/switchback-dr/switchback/operation"
)

// Once a defect (half-line): a server killed in the middle of a record ends the watch.
func TestOnceHalfLine(t *testing.T) {
	n := 0
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if n++; n == 1 {
			w.Write([]byte(`{"id":"op-1","sta`))
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		json.NewEncoder(w).Encode(operation.Record{ID: "op-1", State: operation.StateSucceeded})
	})
	if err := c.Watch(context.Background(), "op-1", func(operation.Record) {}); err != nil {
		t.Error(err)
	}
}

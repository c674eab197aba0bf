package api

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/transport"
)

// maxEventBytes bounds one event of a stream.
const maxEventBytes = 8 << 20

// Watch calls see with an operation each time it changes, until it has ended,
// and log, unless it is nil, with each line of its log once. A server that
// restarts meanwhile is waited for, for a minute; the stream goes on where it broke.
func (c *Client) Watch(ctx context.Context, id switchback.OperationID, see func(operation.Record), log ...func(operation.LogLine)) error {
	lost, last := time.Time{}, ""
	for {
		ended, err := c.watch(ctx, id, &last, see, log)
		switch {
		case ended || ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !switchback.IsRetryable(err):
			return err
		case lost.IsZero():
			lost = time.Now()
		case time.Since(lost) > time.Minute:
			return err
		}
		if err == nil {
			lost = time.Time{}
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
		c.lookAgain()
	}
}

// watch reads one stream; last is the ID of the last event, of this and former ones.
func (c *Client) watch(ctx context.Context, id switchback.OperationID, last *string, see func(operation.Record), log []func(operation.LogLine)) (ended bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.address()+operationPath(id, "/events"), nil)
	if err != nil {
		return false, err
	}
	req.Header.Set("Accept", "text/event-stream")
	if *last != "" {
		req.Header.Set("Last-Event-ID", *last)
	}
	resp, err := transport.Do(c.http, req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	for e := range events(resp.Body) {
		switch e.kind {
		case "operation":
			var rec operation.Record
			if json.Unmarshal(e.data, &rec) != nil {
				return false, nil // cut off in the middle: ask again
			}
			see(rec)
			if rec.State.Finished() {
				return true, nil
			}
		case "log":
			var line operation.LogLine
			if json.Unmarshal(e.data, &line) != nil {
				return false, nil
			}
			for _, f := range log {
				f(line)
			}
		}
		if e.id != "" {
			*last = e.id
		}
	}
	return false, nil // the stream broke: ask again
}

// event is one server-sent event
// (https://html.spec.whatwg.org/multipage/server-sent-events.html).
type event struct {
	id, kind string
	data     []byte
}

// events yields the events of a stream that are whole, until it ends or breaks.
func events(r io.Reader) func(yield func(event) bool) {
	return func(yield func(event) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxEventBytes)
		e := event{}
		for lines.Scan() {
			field, value, _ := strings.Cut(lines.Text(), ":")
			value = strings.TrimPrefix(value, " ")
			switch {
			case lines.Text() == "":
				if len(e.data) > 0 && !yield(e) {
					return
				}
				e = event{}
			case field == "id":
				e.id = value
			case field == "event":
				e.kind = value
			case field == "data":
				if len(e.data) > 0 {
					e.data = append(e.data, '\n')
				}
				e.data = append(e.data, value...)
			}
		}
	}
}

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/transport"
)

// A request whose answer is lost is sent again so often, under the same key: it
// begins one operation, whatever became of the first.
const (
	sendAttempts = 4
	sendAgain    = 500 * time.Millisecond
)

// begin sends a request that begins an operation.
func begin(ctx context.Context, c *Client, path string, body any) (OperationAnswer, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return OperationAnswer{}, fmt.Errorf("encode request: %w", err)
	}
	key := uuid.NewString()
	for attempt := 1; ; attempt++ {
		a, err := c.post(ctx, path, key, data)
		var broken *url.Error
		if err == nil || attempt == sendAttempts || !switchback.IsRetryable(err) || !errors.As(err, &broken) {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-time.After(sendAgain):
		}
		c.lookAgain()
	}
}

func (c *Client) post(ctx context.Context, path, key string, data []byte) (a OperationAnswer, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.address()+path, bytes.NewReader(data))
	if err != nil {
		return a, switchback.Errorf(switchback.CodeInvalid, "request: %v", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	if c.BreakGlass != "" {
		req.Header.Set("Break-Glass", c.BreakGlass)
	}
	resp, err := transport.Do(c.http, req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, transport.MaxResponseBytes))
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err != nil { // cut off: as good as none
		return a, &switchback.Error{Code: switchback.CodeUnavailable, Message: "the answer of " + c.address() + " was cut off", Err: &url.Error{Op: "Post", URL: path, Err: err}}
	}
	return a, nil
}

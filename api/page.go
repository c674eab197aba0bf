package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
)

// Page is one part of a list, in the list's own order.
type Page[T any] struct {
	Items []T `json:"items"`
	// Next, where it is set, is the value of the query parameter after that asks for the next part.
	Next string `json:"next,omitempty"`
}

// PageLimit is how many items a page has at most, and DefaultPage how many where none is named.
const (
	PageLimit   = 1000
	DefaultPage = 100
)

// list asks for all pages of a list, or until it has most items (0: all).
func list[T any](ctx context.Context, c *Client, path string, q url.Values, most int) ([]T, error) {
	if q == nil {
		q = url.Values{}
	}
	all := []T{}
	for {
		limit := PageLimit
		if most > 0 {
			limit = min(limit, most-len(all))
		}
		q.Set("limit", strconv.Itoa(limit))
		p, err := call[Page[T]](ctx, c, http.MethodGet, path+"?"+q.Encode(), nil)
		if err != nil {
			return nil, err
		}
		all = append(all, p.Items...)
		if p.Next == "" || most > 0 && len(all) >= most {
			return all, nil
		}
		q.Set("after", p.Next)
	}
}

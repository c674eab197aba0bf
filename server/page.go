package server

import (
	"cmp"
	"encoding/base64"
	"slices"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
)

// Paging are the query parameters of every list. It is exported, as all that is
// embedded in parameters, because huma reads no others.
type Paging struct {
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"100" doc:"how many items at most"`
	After string `query:"after" doc:"where to go on: what the page before said as next"`
}

// size is the limit, also for callers that went past the check of parameters.
func (p Paging) size() int {
	if p.Limit <= 0 {
		return api.DefaultPage
	}
	return min(p.Limit, api.PageLimit)
}

// pageOf sorts items by a key that is unique and gives the page that was asked
// for. An item that went away between two pages changes nothing for the others.
func pageOf[T any](items []T, key func(T) string, p Paging) (api.Page[T], error) {
	after, err := base64.RawURLEncoding.DecodeString(p.After)
	if err != nil {
		return api.Page[T]{}, badCursor(p.After)
	}
	items = slices.SortedFunc(slices.Values(items), func(a, b T) int { return cmp.Compare(key(a), key(b)) })
	if p.After != "" {
		items = slices.DeleteFunc(items, func(x T) bool { return key(x) <= string(after) })
	}
	page := api.Page[T]{Items: items[:min(len(items), p.size())]}
	if page.Items == nil {
		page.Items = []T{}
	}
	if len(page.Items) < len(items) {
		page.Next = base64.RawURLEncoding.EncodeToString([]byte(key(page.Items[len(page.Items)-1])))
	}
	return page, nil
}

func badCursor(after string) error {
	return switchback.Errorf(switchback.CodeInvalid, "after=%s is no place in this list", after).WithHint("take it from next of the page before")
}

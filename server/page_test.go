package server

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
)

func TestPageOf(t *testing.T) {
	key := func(s string) string { return s }
	items := []string{"c", "a", "e", "b", "d"}
	var got []string
	p := Paging{Limit: 2}
	for range 4 {
		page, err := pageOf(items, key, p)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(page.Items))
		if p.After = page.Next; p.After == "" {
			break
		}
		items = []string{"a", "c", "d", "e"} // b, the last that was given, went away
	}
	if d := cmp.Diff([]string{"[a b]", "[c d]", "[e]"}, got); d != "" {
		t.Error(d)
	}
	if page, err := pageOf(nil, key, Paging{}); err != nil || page.Items == nil || page.Next != "" {
		t.Errorf("empty list: %+v, %v", page, err)
	}
	if _, err := pageOf(items, key, Paging{After: "!"}); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Error(err)
	}
}

package audit

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func log(n int) []Entry {
	var list []Entry
	head := Head{}
	for i := range n {
		e := Entry{At: time.Unix(int64(i), 123456789), Who: "alice", Action: "a", Outcome: Done, Request: fmt.Sprint("r", i)}.Chained(head)
		head = Head{e.Sequence, e.Hash}
		list = append(list, e)
	}
	return list
}

func TestVerify(t *testing.T) {
	whole := log(5)
	last := Head{5, whole[4].Hash}
	for _, x := range []struct {
		name   string
		change func([]Entry) []Entry
		expect []Head
		found  int64 // sequence of the first problem, 0: whole
	}{
		{"whole", func(l []Entry) []Entry { return l }, []Head{{3, whole[2].Hash}, last}, 0},
		{"changed", func(l []Entry) []Entry { l[2].Who = "bob"; return l }, nil, 3},
		{"changed, and its hash", func(l []Entry) []Entry { l[2].Who = "bob"; l[2].Hash = l[2].sum(); return l }, nil, 4},
		{"removed", func(l []Entry) []Entry { return slices.Delete(l, 1, 2) }, nil, 2},
		{"removed at the begin", func(l []Entry) []Entry { return l[1:] }, nil, 1},
		{"removed at the end", func(l []Entry) []Entry { return l[:4] }, nil, 5},
		{"removed, and numbered anew", func(l []Entry) []Entry {
			l = slices.Delete(l, 1, 2)
			for i := range l {
				l[i].Sequence = int64(i + 1)
				l[i].Hash = l[i].sum()
			}
			return l
		}, nil, 2},
		{"inserted", func(l []Entry) []Entry { return slices.Insert(l, 2, l[1]) }, nil, 2},
		{"added at the end", func(l []Entry) []Entry { return append(l, Entry{Who: "eve"}.Chained(last)) }, nil, 6},
		{"written anew", func([]Entry) []Entry { l := log(6); return l[:5] }, []Head{{2, "x"}}, 2},
		{"noted, and gone", func(l []Entry) []Entry { return l }, []Head{{9, "x"}}, 9},
	} {
		v := Verifier{Expect: x.expect}
		for _, e := range x.change(slices.Clone(whole)) {
			v.Add(e)
		}
		got := v.End(&last)
		if x.found == 0 && len(got.Problems) > 0 || x.found > 0 && (len(got.Problems) == 0 || got.Problems[0].Sequence != x.found) {
			t.Errorf("%s: %+v, want one at %d", x.name, got.Problems, x.found)
		}
	}
}

func TestUnanswered(t *testing.T) {
	v := Verifier{}
	a := Entry{Request: "r1", Outcome: Asked}.Chained(Head{})
	b := Entry{Request: "r2", Outcome: Asked}.Chained(Head{1, a.Hash})
	c := Entry{Request: "r1", Outcome: Done}.Chained(Head{2, b.Hash})
	for _, e := range []Entry{a, b, c} {
		v.Add(e)
	}
	if got := v.End(nil); len(got.Problems) > 0 || !slices.Equal(got.Unanswered, []string{"r2"}) {
		t.Errorf("%+v", got)
	}
}

func TestHead(t *testing.T) {
	h := Head{7, log(1)[0].Hash}
	if got, err := ParseHead(h.String()); err != nil || got != h {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "7", "7:ab", "x:" + h.Hash} {
		if _, err := ParseHead(bad); err == nil {
			t.Errorf("%q is a head", bad)
		}
	}
}

// TestGolden: the hash of an entry never changes.
func TestGolden(t *testing.T) {
	e := Entry{At: time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.FixedZone("", 3600)), Request: "r-1", Who: "alice", Role: "operator", Via: "token 1",
		Action: "request-operation", Object: "vms/web/operations/failover", Outcome: Failed, Code: "refused", Detail: "<no> & \u2028"}.Chained(Head{41, "00ff"})
	const want = "4e0e454ce6b06c09d2a2222ec4f5711126e57c6afab5224d39e27cc54671d65b"
	if e.Hash != want || e.Sequence != 42 {
		t.Errorf("hash %s, want %s", e.Hash, want)
	}
}

package extent

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// space is the size of the small disk that the oracle models byte by byte.
const space = 96

type oracle [space]bool

func (o *oracle) add(offset, length int64) {
	for i := offset; i < offset+length; i++ {
		if i >= 0 && i < space {
			o[i] = true
		}
	}
}

// check compares s with the oracle and looks after the invariants.
func check(t *testing.T, what string, s Set, want oracle) {
	t.Helper()
	var got oracle
	end := int64(-1)
	for _, r := range s.Ranges() {
		if r.Length <= 0 || r.Offset <= end {
			t.Fatalf("%s: %v is not sorted, disjoint and merged", what, s.Ranges())
		}
		end = r.End()
		got.add(r.Offset, r.Length)
	}
	if got != want {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
	var n int64
	for _, set := range want {
		if set {
			n++
		}
	}
	if s.Bytes() != n {
		t.Fatalf("%s: %d bytes, want %d", what, s.Bytes(), n)
	}
}

// run interprets script as operations on two sets and compares each result.
func run(t *testing.T, script []byte) {
	var a, b Set
	var oa, ob oracle
	var listed []Range
	for len(script) >= 3 {
		op, x, y := script[0], int64(script[1])%space, int64(script[2])%16
		script = script[3:]
		y = min(y, space-x)
		if op%2 == 0 {
			a.Add(x, y)
			oa.add(x, y)
			listed = append(listed, Range{x, y})
		} else {
			b.Add(x, y)
			ob.add(x, y)
		}
	}
	check(t, "a", a, oa)
	check(t, "b", b, ob)
	check(t, "NewSet", NewSet(listed...), oa)
	var union, both, minus, aligned oracle
	for i := range oa {
		union[i] = oa[i] || ob[i]
		both[i] = oa[i] && ob[i]
		minus[i] = oa[i] && !ob[i]
		if oa[i] {
			aligned.add(int64(i/8*8), 8)
		}
	}
	check(t, "union", a.Union(b), union)
	check(t, "intersect", a.Intersect(b), both)
	check(t, "subtract", a.Subtract(b), minus)
	check(t, "align", a.Align(8), aligned)
	check(t, "a afterwards", a, oa)
	var split Set
	for _, r := range a.Split(5) {
		if r.Length > 5 {
			t.Fatalf("split gave %v", r)
		}
		split.AddRange(r)
	}
	check(t, "split", split, oa)
	for off := int64(0); off < space; off++ {
		all := true
		for n := int64(1); off+n <= space; n++ {
			all = all && oa[off+n-1]
			if a.Contains(off, n) != all {
				t.Fatalf("Contains(%d, %d) = %v in %v", off, n, !all, a.Ranges())
			}
		}
	}
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var back Set
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatalf("unmarshal %s: %v", text, err)
	}
	if !back.Equal(a) {
		t.Fatalf("%s came back as %v", text, back.Ranges())
	}
}

func TestAgainstOracle(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		script := make([]byte, 3*rng.IntN(30))
		for i := range script {
			script[i] = byte(rng.Uint32())
		}
		run(t, script)
	}
}

func FuzzSet(f *testing.F) {
	f.Add([]byte{0, 1, 2, 1, 0, 15, 0, 3, 1})
	f.Fuzz(run)
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`[0,1,1,1]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s Set
		if s.UnmarshalJSON(b) != nil {
			return
		}
		if diff := cmp.Diff(NewSet(s.Ranges()...).Ranges(), s.Ranges()); diff != "" && s.Len() > 0 {
			t.Fatal(diff)
		}
	})
}

func TestEdges(t *testing.T) {
	var s Set
	s.Add(-10, 15)
	s.Add(math.MaxInt64-5, 100)
	s.Add(50, -1)
	want := []Range{{0, 5}, {math.MaxInt64 - 5, 5}}
	if diff := cmp.Diff(want, s.Ranges()); diff != "" {
		t.Error(diff)
	}
	if got := s.Align(4096).Ranges()[1].End(); got != math.MaxInt64 {
		t.Errorf("aligned end is %d", got)
	}
	if s.Contains(math.MaxInt64-2, 100) {
		t.Error("contains bytes past the largest offset")
	}
	for _, bad := range []string{`[1]`, `[-1,5]`, `[0,0]`, `[0,5,0,5]`, `[0,5,9223372036854775807,1]`, `{}`, `[1,9223372036854775807]`} {
		if err := new(Set).UnmarshalJSON([]byte(bad)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
	text, _ := json.Marshal(NewSet(Range{4096, 512}, Range{8192, 512}))
	if string(text) != "[4096,512,3584,512]" {
		t.Errorf("json is %s", text)
	}
}

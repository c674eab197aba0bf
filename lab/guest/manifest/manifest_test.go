package manifest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Vectors of the XXH64 specification's reference implementation.
func TestHash(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want uint64
	}{
		{"", 0xef46db3751d8e999},
		{"a", 0xd24ec4f1a98c6e5b},
		{"abc", 0x44bc2cf5ad770999},
		{"Nobody inspects the spammish repetition", 0xfbcea83c8a378bf1},
	} {
		h := NewHash()
		h.Write([]byte(tt.in))
		if got := h.Sum(); got != tt.want {
			t.Errorf("XXH64(%q) = %x, want %x", tt.in, got, tt.want)
		}
	}
	one, parts := NewHash(), NewHash()
	text := []byte(strings.Repeat("0123456789abcdef", 1000) + "end")
	one.Write(text)
	parts.Write(text[:64])
	parts.Write(text[64:4096])
	parts.Write(text[4096:])
	if one.Sum() != parts.Sum() {
		t.Error("the hash depends on how the bytes are cut")
	}
}

func TestParse(t *testing.T) {
	want := []Entry{{Sum: 0x1f, Size: 5, Path: "d/a b"}, {Sum: 1 << 63, Size: 0, Path: "x"}}
	var text []byte
	for _, e := range want {
		text = e.Append(text)
	}
	got, err := Parse(string(text))
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	for _, bad := range []string{"", "zz 1 x", "1f x y", "1f 1"} {
		if es, err := Parse(bad); err == nil {
			t.Errorf("Parse(%q) = %v, want an error", bad, es)
		}
	}
}

package seal

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/switchback-dr/switchback"
)

var when = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

func testFile(t *testing.T) Wrapper {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := MakeKeyFile(path); err != nil {
		t.Fatal(err)
	}
	w, err := KeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func testRing(t *testing.T, w Wrapper) (Keyring, *Keys) {
	t.Helper()
	ring, err := NewKeyring(t.Context(), w, "p-1", when)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ring.Unwrap(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	return ring, keys
}

func sealed(t *testing.T, k *Keys, name string, content []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := k.NewWriter(&out, name)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, uint64(len(content))))
	for p := content; len(p) > 0; {
		n := min(len(p), 1+rng.IntN(100_000))
		if _, err := w.Write(p[:n]); err != nil {
			t.Fatal(err)
		}
		p = p[n:]
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)}).Read(b)
	return b
}

var sizes = []int{0, 1, 100, chunkSize - 1, chunkSize, chunkSize + 1, 2 * chunkSize, 3*chunkSize + 17}

func TestRoundTrip(t *testing.T) {
	_, keys := testRing(t, testFile(t))
	for _, size := range sizes {
		content := random(size)
		b := sealed(t, keys, "segments/7", content)
		if int64(len(b)) != SealedSize(int64(size)) || !Sealed(b) {
			t.Errorf("%d bytes: sealed in %d, SealedSize says %d", size, len(b), SealedSize(int64(size)))
		}
		r, err := keys.NewReader(bytes.NewReader(b), int64(len(b)), "segments/7")
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if r.Size() != int64(size) {
			t.Errorf("%d bytes: size is %d", size, r.Size())
		}
		got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()+10))
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: content differs, %v", size, err)
		}
		for _, at := range []int{0, 1, chunkSize - 3, chunkSize, size - 5} {
			if at < 0 || at+5 > size {
				continue
			}
			p := make([]byte, 5)
			if n, err := r.ReadAt(p, int64(at)); n != 5 || err != nil || !bytes.Equal(p, content[at:at+5]) {
				t.Errorf("%d bytes: read at %d: %d, %v", size, at, n, err)
			}
		}
	}
}

// Whatever happens to a file, reading it is an error or the content.
func TestTampering(t *testing.T) {
	_, keys := testRing(t, testFile(t))
	rng := rand.New(rand.NewPCG(3, 4))
	for _, size := range sizes {
		content := random(size)
		good := sealed(t, keys, "a", content)
		try := func(what, name string, b []byte) {
			r, err := keys.NewReader(bytes.NewReader(b), int64(len(b)), name)
			if err == nil {
				var got []byte
				if got, err = io.ReadAll(io.NewSectionReader(r, 0, r.Size())); err == nil {
					t.Errorf("%d bytes, %s: accepted (%d bytes, equal %t)", size, what, len(got), bytes.Equal(got, content))
					return
				}
			}
			if c := switchback.CodeOf(err); c != switchback.CodeCorrupt && c != switchback.CodeUnsupported && c != switchback.CodeUnauthorized {
				t.Errorf("%d bytes, %s: %v", size, what, err)
			}
		}
		try("another name", "b", good)
		for range 50 {
			b := slices.Clone(good)
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
			try("a flipped bit", "a", b)
			try("shortened", "a", good[:rng.IntN(len(good))])
		}
		try("one more byte", "a", append(slices.Clone(good), 0))
		if size > 2*chunkSize {
			b := slices.Clone(good)
			const c = chunkSize + tagSize
			copy(b[headerSize:], good[headerSize+c:headerSize+2*c])
			copy(b[headerSize+c:], good[headerSize:headerSize+c])
			try("exchanged chunks", "a", b)
			try("a chunk less", "a", good[:headerSize+2*c])
		}
	}
}

func TestKeys(t *testing.T) {
	first, second := testFile(t), testFile(t)
	ring, old := testRing(t, first)
	before := sealed(t, old, "a", []byte("before"))
	rotated, err := ring.Rotate(t.Context(), first, when)
	if err != nil {
		t.Fatal(err)
	}
	rewrapped, err := rotated.Rewrap(t.Context(), first, second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rewrapped.Unwrap(t.Context(), first); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("the old key file after rewrapping: %v", err)
	}
	keys, err := rewrapped.Unwrap(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	after := sealed(t, keys, "a", []byte("after"))
	for want, b := range map[string][]byte{"before": before, "after": after} {
		r, err := keys.NewReader(bytes.NewReader(b), int64(len(b)), "a")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size())); string(got) != want || err != nil {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	if _, err := old.NewReader(bytes.NewReader(after), int64(len(after)), "a"); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("a file of a newer data key: %v", err)
	}
	stolen := rewrapped
	stolen.Owner = "p-2"
	if _, err := stolen.Unwrap(t.Context(), second); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("the key ring of another owner: %v", err)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if _, err := KeyFile(path); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("no key file: %v", err)
	}
	if err := MakeKeyFile(path); err != nil {
		t.Fatal(err)
	}
	if err := MakeKeyFile(path); switchback.CodeOf(err) != switchback.CodeConflict {
		t.Errorf("overwriting a key: %v", err)
	}
	os.Chmod(path, 0o644)
	if _, err := KeyFile(path); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("a key that all may read: %v", err)
	}
	os.WriteFile(path, []byte("short\n"), 0o600)
	os.Chmod(path, 0o600)
	if _, err := KeyFile(path); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("a key file without a key: %v", err)
	}
}

func TestCommand(t *testing.T) {
	script := func(body string) Wrapper {
		path := filepath.Join(t.TempDir(), "kms")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
			t.Fatal(err)
		}
		w, err := Command([]string{path})
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	for _, c := range []struct {
		name, body string
		code       switchback.Code
	}{
		{name: "echoes", body: `sed 's/.*"data":"\([^"]*\)".*/{"data":"\1"}/'`},
		{name: "refuses", body: "echo 'access denied' >&2; exit 3", code: switchback.CodeUnauthorized},
		{name: "says nothing", body: "true", code: switchback.CodeInvalid},
		{name: "gives another key back", body: `cat >/dev/null; echo '{"data":"AAAA"}'`, code: switchback.CodeRefused},
	} {
		_, err := NewKeyring(t.Context(), script(c.body), "p", when)
		if switchback.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want code %q", c.name, err, c.code)
		}
	}
	missing, err := Command([]string{filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := missing.Wrap(t.Context(), []byte("k"), nil); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("no program: %v", err)
	}
	if _, err := Command(nil); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("no command: %v", err)
	}
}

// The format as written; it must never change under the same version.
func TestGolden(t *testing.T) {
	k := &Keys{keys: map[KeyID][]byte{}, newest: KeyID([]byte("0123456789abcdef"))}
	k.keys[k.newest] = bytes.Repeat([]byte{7}, keySize)
	header := append([]byte("SBSEALED\x01\x00\x00\x00\x00\x00\x00\x000123456789abcdef"), bytes.Repeat([]byte{9}, saltSize)...)
	var out bytes.Buffer
	w, err := k.writer(&out, "segments/1", header)
	if err != nil {
		t.Fatal(err)
	}
	w.Write([]byte("recovery point"))
	w.Close()
	const want = "9ba33ccf92a26dc9258aaa4d6033973ee89f73912f0823a6709eb32e5aaa"
	if got := hex.EncodeToString(out.Bytes()[headerSize:]); got != want {
		t.Errorf("sealed as %s, want %s", got, want)
	}
}

func FuzzReader(f *testing.F) {
	k := &Keys{keys: map[KeyID][]byte{}, newest: KeyID([]byte("0123456789abcdef"))}
	k.keys[k.newest] = bytes.Repeat([]byte{7}, keySize)
	f.Add([]byte("SBSEALED"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := k.NewReader(bytes.NewReader(b), int64(len(b)), "a")
		if err == nil {
			_, err = r.ReadAt(make([]byte, 10), 0)
		}
		var typed *switchback.Error
		if err != nil && !errors.Is(err, io.EOF) && !errors.As(err, &typed) {
			t.Error(err)
		}
	})
}

func TestCancelled(t *testing.T) {
	w, err := Command([]string{"/bin/sleep", "60"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Wrap(ctx, []byte("k"), nil); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Error(err)
	}
}
